"""Greedy decoding of short answers as CUDA graphs.

Decoding a few tokens takes little arithmetic, so launching the kernels dominates its time. Encoder and all
decoder steps of a batch are therefore recorded as one CUDA graph per batch shape. There is no key-value
cache: recomputing a few tokens is faster than the kernels that a cache needs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from dept_vl._utils.io import one_line
from dept_vl.models import graphs
from dept_vl.models.graphs import SHAPES, shape_of
from dept_vl.models.prompted import PromptedModel

LONGEST = 16
"""Maximum number of tokens of an answer; without a cache, the cost grows quadratically."""
WARM_UPS = 2


def greedy(model: PromptedModel, inputs: Mapping[str, Any], new_tokens: int) -> Int[Tensor, "batch target"]:
    """Decode greedily for a fixed number of steps, without synchronising with the device.

    `model` is an encoder-decoder in evaluation mode, and `inputs` are those of `PromptedModel.encode`. Return
    the token ids that `PromptedModel.generate` returns for greedy search, padded to `new_tokens`.
    """
    language = model.backbone.language_model
    special = language.special_tokens
    padding = special["pad_token_id"]
    encoded, mask = model.encode(**inputs)
    answers = torch.full((len(mask), 1 + new_tokens), padding, device=mask.device)
    answers[:, 0] = special["decoder_start_token_id"]
    ended = torch.zeros_like(mask[:, 0])
    for place in range(1, 1 + new_tokens):
        # The decoder predicts the last label and does not read it.
        logits = language.logits(encoded, mask, answers[:, 1 : place + 1])[:, -1]
        answers[:, place] = logits.float().argmax(dim=-1).where(~ended, padding)
        for end in special["eos_token_id"]:
            ended = ended | (answers[:, place] == end)
    return answers


def why_plain(model: PromptedModel, options: Mapping[str, Any]) -> str:
    """Return the reason why decoding cannot be recorded as a CUDA graph; empty if it can."""
    device = next(model.parameters()).device
    special = model.backbone.language_model.special_tokens
    if device.type != "cuda":
        return f"graphs need a CUDA device, and the model is on {device.type}"
    if not model.backbone.language.config.is_encoder_decoder:
        return "the model has no encoder, and would read its text again for every token"
    if special.keys() != {"pad_token_id", "eos_token_id", "decoder_start_token_id"}:
        return "some tokens are forbidden"
    others = sorted(set(options) - {"num_beams", "max_new_tokens"})
    if others or options.get("num_beams", 1) > 1:
        return f"they are not decoded freely by greedy search: {', '.join(others) or 'beams'}"
    if options.get("max_new_tokens", LONGEST + 1) > LONGEST:
        return f"they may have more than {LONGEST} tokens"
    return ""


@dataclass(frozen=True)
class Recorded:
    """A recorded graph for one batch shape, with its input and output tensors."""

    inputs: dict[str, Tensor]
    answers: Int[Tensor, "batch target"]
    replay: Any


class GraphedAnswers:
    """Replacement of `PromptedModel.generate` that replays CUDA graphs if possible.

    Only batches of `rows` questions are recorded, because other sizes may occur only once. The values of
    trained parameters may change between calls. `report` is called once with each reason not to record.
    """

    def __init__(self, model: PromptedModel, rows: int, report: Any) -> None:
        self.model, self.rows, self.report = model, rows, report
        self.recorded: dict[tuple[Any, ...], Recorded] = {}
        self.reasons: set[str] = set()
        self.failed = False
        self._pool: Any = None

    @torch.no_grad()
    def __call__(self, **given: Any) -> Int[Tensor, "sequences target"]:
        """Return the token ids that `PromptedModel.generate` returns for the same arguments."""
        inputs = {name: x for name, x in given.items() if isinstance(x, Tensor)}
        options = {name: x for name, x in given.items() if name not in inputs and x is not None}
        step = None
        if not self.failed and len(inputs["input_ids"]) == self.rows:
            step = self._step(inputs, options)
        if step is None:
            return self.model.generate(**given)
        for name, tensor in inputs.items():
            step.inputs[name].copy_(tensor, non_blocking=True)
        step.replay()
        return step.answers.clone()  # the next replay overwrites them

    def _step(self, inputs: dict[str, Tensor], options: dict[str, Any]) -> Recorded | None:
        if reason := why_plain(self.model, options):
            self._say(reason)
            return None
        # A graph reads parameters at the addresses at which they were when it was recorded.
        places = tuple(parameter.data_ptr() for parameter in self.model.parameters())
        key = (shape_of(inputs), options["max_new_tokens"], hash(places))
        if key not in self.recorded and len(self.recorded) < SHAPES:
            try:
                self.recorded[key] = self._record(inputs, options["max_new_tokens"])
            except RuntimeError as error:  # out of memory, or an operation that cannot be recorded
                self.failed = True
                self._say(one_line(error))
        return self.recorded.get(key)

    def _record(self, given: dict[str, Tensor], new_tokens: int) -> Recorded:
        device = given["input_ids"].device
        inputs = {name: tensor.clone() for name, tensor in given.items()}

        def answer() -> Tensor:
            kind = device.type
            # Cached casts of weights would be in memory that is freed before a replay.
            with torch.autocast(
                kind,
                torch.get_autocast_dtype(kind),
                enabled=torch.is_autocast_enabled(kind),
                cache_enabled=False,
            ):
                return greedy(self.model, inputs, new_tokens)

        with graphs.aside(device):
            for _ in range(WARM_UPS):
                answer()
        if self._pool is None:
            self._pool = graphs.new_pool()
        replay, answers = graphs.record(answer, self._pool, device)
        return Recorded(inputs, answers, replay)

    def _say(self, reason: str) -> None:
        if reason not in self.reasons:
            self.reasons.add(reason)
            self.report(f"answers are not recorded as CUDA graphs: {reason}")
