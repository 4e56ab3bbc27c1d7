"""The ways to adapt a backbone that `compare` puts side by side, with the rates that each tries."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from dept_vl.config import RunConfig
from dept_vl.models.options import TrainedPart
from dept_vl.prompts.base import METHODS

Rates = dict[str, float]
"""Learning rates, by their options."""


@dataclass(frozen=True)
class Compared:
    """A way to adapt the backbone.

    Attributes:
        configure: Makes its configuration of the task's.
        tried: The learning rates that are tried; empty if nothing is trained.
        method: Method of the prompt, which decides what is tried.
        like: Method whose rates it takes instead.
        reads_images: It trains the visual projection, and means nothing for text.
        few_seeds: The first seeds are enough: it is there to compare prompts with. Zero-shot, which is too,
            has all of them: nothing is trained, and test examples differ by seed.
    """

    configure: Callable[[RunConfig], RunConfig]
    tried: tuple[Rates, ...] = ()
    method: str = ""
    like: str = ""
    reads_images: bool = False
    few_seeds: bool = True

    @property
    def rates(self) -> tuple[Rates, ...]:
        """The learning rates that are tried."""
        if not self.method:
            return self.tried
        groups = METHODS[self.method].groups()
        if "prompt" not in groups:
            return OFFSET_RATES
        return BOTH_RATES if "low_rank" in groups else LONG_RATES


def prompted(method: str, *, projection: bool = False, **options: Any) -> Callable[[RunConfig], RunConfig]:
    """A prompt of the family at the configuration's budget, with options of `PromptOptions`."""

    def configure(config: RunConfig) -> RunConfig:
        prompt = replace(config.prompt, method=method, rank=None, **options)
        return replace(bare(config, projection=projection), prompt=prompt)

    return configure


def bare(config: RunConfig, *, projection: bool = False, language: TrainedPart | None = None) -> RunConfig:
    """No prompt; of the backbone only the named parameters are trained."""
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


def with_lora(config: RunConfig) -> RunConfig:
    """LoRA of the largest rank within the budget of the prompts, or of 1."""
    from dept_vl.models.vlm import open_backbone

    backbone = open_backbone(**config.backbone.loading())
    backbone.add_lora(1)
    each = sum(p.numel() for p in backbone.language.parameters() if p.requires_grad)
    rank = max(1, config.prompt.reference_prompt_length * backbone.d_model // each)
    config = bare(config, language="lora")
    return replace(config, backbone=replace(config.backbone, lora_rank=rank))


def with_lora_and_projection(config: RunConfig) -> RunConfig:
    """The same, and the visual projection is trained, as published rows do."""
    config = with_lora(config)
    return replace(config, backbone=replace(config.backbone, train_projection=True))


def _rates(**options: tuple[float, ...]) -> tuple[Rates, ...]:
    """One set of rates from each place of all options."""
    return tuple(dict(zip(options, values, strict=True)) for values in zip(*options.values(), strict=True))


LONG_RATES = _rates(prompt_lr=(0.15, 0.02, 0.05, 0.3))
BOTH_RATES = _rates(prompt_lr=(0.15, 0.15, 0.05, 0.3), offset_lr=(0.02, 0.005, 0.02, 0.001))
OFFSET_RATES = _rates(offset_lr=(0.01, 0.003, 0.03, 0.001))
PROJECTION_RATES = _rates(projection_lr=(1e-3, 3e-4, 3e-3, 1e-2))
PART_RATES = _rates(backbone_lr=(3e-3, 1e-3, 1e-2, 3e-2))
WHOLE_RATES = _rates(backbone_lr=(3e-4, 1e-4, 1e-3, 3e-3))
"""Four tries for every method; `offset_lr` trains what of a prompt `prompt_lr` does not. The last of a
prompt's two are the defaults of `OptimOptions`."""


def compared() -> dict[str, Compared]:
    """Return every way to adapt, by name. T5 has no biases; BitFit trains the scales of its norms."""
    return {
        "zero-shot": Compared(bare, few_seeds=False),
        "projection only": Compared(lambda c: bare(c, projection=True), PROJECTION_RATES, reads_images=True),
        "BitFit": Compared(lambda c: bare(c, language="biases"), PART_RATES),
        "LoRA": Compared(with_lora, PART_RATES),
        "full fine-tuning": Compared(lambda c: bare(c, language="all"), WHOLE_RATES),
        **{name: Compared(prompted(name), method=name, few_seeds=False) for name in METHODS},
        "adept + images": Compared(
            prompted("adept", visual_offset=True), method="adept", reads_images=True, few_seeds=False
        ),
        "adept + images, m = 0": Compared(
            prompted("adept", visual_offset=True, prompt_length=0),
            method="adept",
            reads_images=True,
            few_seeds=False,
        ),
        "pt + projection": Compared(prompted("pt", projection=True), like="pt", reads_images=True),
        "dept + projection": Compared(prompted("dept", projection=True), like="dept", reads_images=True),
        "LoRA + projection": Compared(with_lora_and_projection, like="LoRA", reads_images=True),
    }
