"""Generation settings for transformers, from the caller's options and the model's token ids alone.

A checkpoint's `generation_config.json` (with old ones the generation fields of `config.json`) has habits:
summaries of 56 tokens and more, sampling, four beams, no three tokens twice. transformers takes each for an
option that the caller left out. Here they are left out.
"""

from collections.abc import Callable
from threading import RLock
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from dept_vl.models.tokens import WORD

GENERATING = RLock()
"""While a model has our settings: threads of a server may share it."""
MARIAN = "marian"


def special_tokens(model: PreTrainedModel, tokenizer: Any) -> dict[str, Any]:
    """Generation settings that a model and its tokenizer imply, which are those that training teaches.

    No token is forced: the first of BART's answers, `<s>`, and the last are learnt as all others are.
    """
    ids: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    if not model.config.is_encoder_decoder:
        return ids
    labels = torch.tensor([tokenizer(text_target=WORD).input_ids])
    ids["decoder_start_token_id"] = int(model.prepare_decoder_input_ids_from_labels(labels)[0, 0])
    if model.config.model_type == MARIAN:
        # Its padding has a score that nothing ever taught, often the highest.
        ids["bad_words_ids"] = [[tokenizer.pad_token_id]]
    return ids


def generate(
    model: PreTrainedModel,
    special: dict[str, Any],
    options: dict[str, Any],
    inputs: dict[str, Any],
) -> torch.Tensor:
    """Call `model.generate` with these settings alone.

    Args:
        model: Of transformers; its own `generation_config` is as before afterwards.
        special: Of `special_tokens`.
        options: Of the caller, whatever `generate` of transformers takes; they come before `special`. Who
            wants the habits of the checkpoint says so: `generation_config=model.generation_config`.
        inputs: What is read.
    """
    asked: GenerationConfig | None = options.get("generation_config")
    settings = GenerationConfig(**special | (asked.to_diff_dict() if asked is not None else {}))
    others = settings.update(**{k: v for k, v in options.items() if k != "generation_config"})
    run: Callable[..., torch.Tensor] = model.generate
    # A pretrained model may let a part of it generate.
    parts = [module for module in model.modules() if getattr(module, "generation_config", None) is not None]
    with GENERATING:
        # transformers fills what is not set from the model's own, whichever settings it is given.
        own = [part.generation_config for part in parts]
        try:
            for part in parts:
                part.generation_config = settings
            return run(**inputs, generation_config=settings, **others)
        finally:
            for part, config in zip(parts, own, strict=True):
                part.generation_config = config
