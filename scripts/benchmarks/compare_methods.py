"""Methods that `compare` can compare, and the learning rates that are tried for each."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from dept_vl.config import RunConfig
from dept_vl.models.options import TrainedPart
from dept_vl.prompts.base import METHODS

Rates = dict[str, float]
"""Learning rates by option."""


@dataclass(frozen=True)
class Compared:
    """Method to compare.

    Attributes:
        configure: Function from the task's configuration to the method's.
        tried: Learning rates to try; empty if nothing is trained, or if `method` determines them.
        method: Method of the prompt, which determines the learning rates to try.
        like: Method whose chosen learning rates are used instead.
        reads_images: Whether it trains the visual projection, so that it is not for text tasks.
    """

    configure: Callable[[RunConfig], RunConfig]
    tried: tuple[Rates, ...] = ()
    method: str = ""
    like: str = ""
    reads_images: bool = False

    @property
    def rates(self) -> tuple[Rates, ...]:
        """Learning rates to try."""
        if self.tried or not self.method:
            return self.tried
        groups = METHODS[self.method].groups()
        if "prompt" not in groups:
            return OFFSET_RATES
        return BOTH_RATES if "low_rank" in groups else LONG_RATES


def prompted(method: str, *, projection: bool = False, **options: Any) -> Callable[[RunConfig], RunConfig]:
    """Return a function that configures a prompt within the budget, with these `PromptOptions`."""

    def configure(config: RunConfig) -> RunConfig:
        prompt = replace(config.prompt, method=method, rank=None, **options)
        return replace(bare(config, projection=projection), prompt=prompt)

    return configure


def bare(config: RunConfig, *, projection: bool = False, language: TrainedPart | None = None) -> RunConfig:
    """Return the configuration without a prompt. Only the given parts of the backbone are trained."""
    return replace(
        config,
        prompt=replace(config.prompt, method="dept", prompt_length=0, rank=0),
        backbone=replace(
            config.backbone,
            train_projection=projection,
            train_backbone=language is not None,
            train_only=language or "all",
        ),
    )


def with_relative_rates(config: RunConfig) -> RunConfig:
    """Configure DePT with learning rates relative to the size of the word embeddings."""
    config = prompted("dept")(config)
    return replace(config, optim=replace(config.optim, rates="relative"))


def with_encoder_kept(config: RunConfig) -> RunConfig:
    """Configure method `memory` on encoder outputs that are computed once."""
    config = prompted("memory")(config)
    return replace(config, data=replace(config.data, features="encoded"))


def with_lora(config: RunConfig) -> RunConfig:
    """Configure LoRA with the largest rank within the budget of the prompts, but at least 1."""
    width, each = _lora_sizes(tuple(config.backbone.loading().items()))
    rank = max(1, config.prompt.reference_prompt_length * width // each)
    config = bare(config, language="lora")
    return replace(config, backbone=replace(config.backbone, lora_rank=rank))


@cache
def _lora_sizes(loading: tuple[tuple[str, Any], ...]) -> tuple[int, int]:
    """Return a backbone's hidden size, and the number of parameters of LoRA of rank 1 on it."""
    from dept_vl.models.pretrained_vlm import open_backbone

    backbone = open_backbone(**dict(loading))
    backbone.add_lora(1)
    return backbone.d_model, sum(p.numel() for p in backbone.language.parameters() if p.requires_grad)


def with_lora_and_projection(config: RunConfig) -> RunConfig:
    """Configure LoRA and train the visual projection, as published results do."""
    config = with_lora(config)
    return replace(config, backbone=replace(config.backbone, train_projection=True))


def _rates(**options: tuple[float, ...]) -> tuple[Rates, ...]:
    """Return one set of learning rates from each position of all options."""
    return tuple(dict(zip(options, values, strict=True)) for values in zip(*options.values(), strict=True))


BOTH_RATES = _rates(prompt_lr=(0.3, 0.15, 0.15), offset_lr=(1e-3, 0.005, 0.02))
LONG_RATES = _rates(prompt_lr=(0.3, 0.15, 0.05))
OFFSET_RATES = _rates(offset_lr=(0.01, 0.003, 0.03))
PROJECTION_RATES = _rates(projection_lr=(0.01, 3e-3, 0.03))
LORA_RATES = _rates(backbone_lr=(0.01, 3e-3, 1e-3))
BIAS_RATES = _rates(backbone_lr=(0.1, 0.03, 0.01))
WHOLE_RATES = _rates(backbone_lr=(3e-4, 1e-4, 1e-3))
"""Three tries for every method. `offset_lr` trains the parts of a prompt that `prompt_lr` does not. The first
of `BOTH_RATES` and of `OFFSET_RATES` are the defaults of a run."""


def compared() -> dict[str, Compared]:
    """Return every method by name. On T5, which has no biases, BitFit trains the scales of the norms."""
    return {
        "zero-shot": Compared(bare),
        "projection only": Compared(lambda c: bare(c, projection=True), PROJECTION_RATES, reads_images=True),
        "BitFit": Compared(lambda c: bare(c, language="biases"), BIAS_RATES),
        "LoRA": Compared(with_lora, LORA_RATES),
        "full fine-tuning": Compared(lambda c: bare(c, language="all"), WHOLE_RATES),
        **{name: Compared(prompted(name), method=name) for name in METHODS},
        "memory, encoded": Compared(with_encoder_kept, method="memory"),
        "adept + images": Compared(prompted("adept", visual_offset=True), method="adept"),
        "adept + images, m = 0": Compared(
            prompted("adept", visual_offset=True, prompt_length=0), OFFSET_RATES, method="adept"
        ),
        "pt + projection": Compared(prompted("pt", projection=True), like="pt", reads_images=True),
        "dept + projection": Compared(prompted("dept", projection=True), like="dept", reads_images=True),
        "LoRA + projection": Compared(with_lora_and_projection, like="LoRA", reads_images=True),
        **ablated(),
    }


def ablated() -> dict[str, Compared]:
    """Return the ablations of the paper: split and size of the budget, learning rates, and initial P."""
    of_split = {0: OFFSET_RATES, 100: LONG_RATES}
    one_rate = _rates(prompt_lr=(0.1, 0.03, 0.01), offset_lr=(0.1, 0.03, 0.01))
    starts = {"noise": "random", "words": "vocabulary", "a text": "text"}
    text = "answer the question about the image"
    return {
        **{
            f"dept, m = {m}": Compared(prompted("dept", prompt_length=m), of_split.get(m, BOTH_RATES))
            for m in (0, 20, 40, 60, 80, 100)
        },
        **{
            f"dept, l = {length}": Compared(
                prompted("dept", reference_prompt_length=length, prompt_length=length // 5), BOTH_RATES
            )
            for length in (12, 25, 50, 100, 200)
        },
        **{
            f"dept, from {start}": Compared(prompted("dept", prompt_init=init, init_text=text), BOTH_RATES)
            for start, init in starts.items()
        },
        "dept, one rate": Compared(prompted("dept"), one_rate),
        "dept, default rates": Compared(prompted("dept"), BOTH_RATES[:1]),
        "dept, relative rates": Compared(with_relative_rates, BOTH_RATES[:1]),
    }
