"""Generation with settings from the caller's options and the model's token ids only.

transformers fills options that the caller omits from the checkpoint's `generation_config.json` (in old ones,
`config.json`), such as a minimum of 56 tokens, sampling, four beams or no repeated trigrams. These settings
are ignored here. The beams and lengths of a task's answers are set in `inference.decoding`.
"""

from collections.abc import Callable
from threading import RLock
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from dept_vl.models.prompt_hook import is_encoder_decoder
from dept_vl.models.tokens import WORD, style_of

GENERATING = RLock()
"""Lock for the time in which a model has our settings or hooks, because threads may share the model."""


def special_tokens(model: PreTrainedModel, tokenizer: Any) -> dict[str, Any]:
    """Return the generation settings that follow from a model and its tokenizer.

    No token is forced, not even `<s>` at the start of BART's answers, because all are learnt in training.
    """
    ends = sorted({tokenizer.eos_token_id, style_of(tokenizer).end})
    ids: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": ends}
    if not is_encoder_decoder(model.config):
        return ids
    for module in model.modules():
        if hasattr(module, "prepare_decoder_input_ids_from_labels"):
            labels = torch.tensor([tokenizer(text_target=WORD).input_ids])
            ids["decoder_start_token_id"] = int(module.prepare_decoder_input_ids_from_labels(labels)[0, 0])
            break
    else:
        ids["decoder_start_token_id"] = model.config.get_text_config().decoder_start_token_id
    if model.config.model_type == "marian":
        # The logit of Marian's padding token was never trained, and is often the highest.
        ids["bad_words_ids"] = [[tokenizer.pad_token_id]]
    return ids


def generate(
    model: PreTrainedModel, special: dict[str, Any], options: dict[str, Any], inputs: dict[str, Any]
) -> torch.Tensor:
    """Call `model.generate` without the checkpoint's own settings.

    `options` are those of transformers and override `special`, which are from `special_tokens`. With
    `generation_config=model.generation_config`, they are the checkpoint's own. The model's settings are
    restored afterwards.
    """
    asked: GenerationConfig | None = options.get("generation_config")
    settings = GenerationConfig(**special | (asked.to_diff_dict() if asked is not None else {}))
    others = settings.update(**{k: v for k, v in options.items() if k != "generation_config"})
    run: Callable[..., torch.Tensor] = model.generate
    # A pretrained model may call `generate` of one of its modules.
    parts = [module for module in model.modules() if getattr(module, "generation_config", None) is not None]
    with GENERATING:
        # transformers fills unset settings from the model's own, even if it is given others.
        own = [part.generation_config for part in parts]
        try:
            for part in parts:
                part.generation_config = settings
            return run(**inputs, generation_config=settings, **others)
        finally:
            for part, config in zip(parts, own, strict=True):
                part.generation_config = config
