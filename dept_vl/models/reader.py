"""Wrapper that scores and generates answers with a pretrained model; see `pretrained_vlm`."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from dept_vl.models.generation import GENERATING, generate, special_tokens
from dept_vl.models.image_features import FEATURES, PIXELS, given_features
from dept_vl.models.language import Answerer
from dept_vl.models.prompt_hook import Placement, prompting, words_of
from dept_vl.models.tokens import IGNORE_INDEX
from dept_vl.prompts.dept import DePT

ANSWER_TYPE = {"paligemma": 1}
"""Token type of answers by model type, where it is not the text's (PaliGemma reads text bidirectionally)."""


@dataclass(frozen=True)
class Source:
    """Source with its prompt, as an input of `PretrainedReader`."""

    prompt: DePT | None
    placed: Placement  # token ids with placeholders
    more: dict[str, Tensor]  # further model inputs, such as pixels


class PretrainedReader(Answerer):
    """Wrapper that scores and generates answers with a pretrained model."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, name: str) -> None:
        super().__init__(model, model, name)
        self.word_embeddings = words_of(model)
        self.answer_type = ANSWER_TYPE.get(model.config.model_type, 0)
        self.special_tokens = special_tokens(model, tokenizer)
        self.counts_text = True
        self.output_of_images: tuple[type, bool] | None = None
        self.taken = set(inspect.signature(model.forward).parameters)
        # Models with three-dimensional positions compute them from the tokens.
        self.counted = "position_ids" in self.taken and not any(
            hasattr(module, "get_rope_index") for module in (model, getattr(model, "model", None))
        )

    @contextmanager
    def _reading(self, encoded: Source, inputs: dict[str, Any]) -> Iterator[None]:
        """Let the model read the prompt, and image features if given, within a `with` statement.

        One thread at a time: the hooks are on the model, which threads may share.
        """
        features = inputs.pop(FEATURES, None)
        with GENERATING, prompting(self.word_embeddings, encoded.prompt, encoded.placed):
            if features is None:
                yield
                return
            assert self.output_of_images is not None  # set by `VisionLanguageModel.read`
            inputs[PIXELS] = features.to(self.word_embeddings.weight.dtype)
            with given_features(self.model, self.output_of_images):
                yield

    def logits(
        self, encoded: Source, mask: Bool[Tensor, "batch source"], labels: Int[Tensor, "batch target"]
    ) -> Float[Tensor, "batch target vocabulary"]:
        """Return the logits of each answer token, given the tokens before it."""
        placed = encoded.placed
        self.check_length(0, placed.ids.shape[1], answer=labels.shape[1])
        inputs: dict[str, Any] = {"input_ids": placed.ids, "attention_mask": mask.long()}
        inputs |= placed.others | encoded.more
        if self.encoder_decoder:
            with self._reading(encoded, inputs):
                separate: Tensor = self.model(**inputs, labels=labels, use_cache=False).logits
            return separate
        answered = labels != IGNORE_INDEX
        joined = torch.cat([mask, answered], dim=1)
        answer = labels.where(answered, self.special_tokens["pad_token_id"])
        inputs |= {"input_ids": torch.cat([placed.ids, answer], dim=1), "attention_mask": joined.long()}
        for name, row in placed.others.items():
            of_answer = row[:, -1:].expand(-1, labels.shape[1], *row.shape[2:])
            if name == "token_type_ids":
                of_answer = torch.full_like(of_answer, self.answer_type)
            inputs[name] = torch.cat([row, of_answer], dim=1)
        if self.counted:
            inputs["position_ids"] = (joined.cumsum(1) - 1).clamp(min=0)
        keep = labels.shape[1] + 1
        if "logits_to_keep" in self.taken:
            inputs["logits_to_keep"] = keep
        with self._reading(encoded, inputs):
            logits: Tensor = self.model(**inputs, use_cache=False).logits
        return logits[:, -keep:-1]  # each token is predicted at the position before it

    def generate(
        self, encoded: Source, mask: Bool[Tensor, "batch source"], **options: Any
    ) -> Int[Tensor, "sequences target"]:
        """Generate token ids of answers, after the decoder's start token if there is one."""
        placed = encoded.placed
        width = placed.ids.shape[1]
        self.check_length(0, width, answer=options.get("max_new_tokens") or 0)
        allowed = options.get("prefix_allowed_tokens_fn")
        if allowed is not None and not self.encoder_decoder:
            options["prefix_allowed_tokens_fn"] = lambda row, tokens: allowed(row, tokens[width:])
        inputs = {"input_ids": placed.ids, "attention_mask": mask.long(), **placed.others, **encoded.more}
        with self._reading(encoded, inputs):
            tokens = generate(self.model, self.special_tokens, options, inputs)
        return tokens if self.encoder_decoder else tokens[:, width:]
