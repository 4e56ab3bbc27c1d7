"""What tiny pretrained models are made of: tokenizers, chat templates, configurations."""

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from zoo import ready_made
from zoo.models import CORPUS

Made = tuple[PreTrainedModel, Any]
"""A model and its processor, or tokenizer."""
WIDTH = 32
MERGES = 60
"""Tokens learnt from the corpus, beside one for each byte."""
START = {"pad": "<pad>", "eos": "</s>", "bos": "<s>", "unk": "<unk>"}
"""The first four tokens of every tokenizer."""
IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}


def words(around: str = "$A", special: Sequence[str] = (), **named: str) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes and a few words.

    Args:
        around: What a text becomes, such as `<s> $A`.
        special: Further tokens that are never split.
        named: The same, for which the processor asks by a name such as `image_token`.
    """
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    added = list(dict.fromkeys([*special, *named.values()]))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = len(START) + len(alphabet) + MERGES
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(START.values()), initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in added])
    ids = [(token, made.token_to_id(token)) for token in START.values() if token in around]
    made.post_processor = processors.TemplateProcessing(
        single=around, pair=f"{around} $B:1", special_tokens=ids
    )
    basic = {f"{name}_token": token for name, token in START.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        **basic,
        additional_special_tokens=list(special),
        model_specific_special_tokens=named,
    )


def chat(
    turn: str, image: str, end: str, *, start: str = "", user: str = "user", assistant: str = "assistant"
) -> str:
    """A chat template.

    Args:
        turn: In front of a message; `ROLE` is whose it is.
        image: Of each image.
        end: Behind a message.
        start: In front of the whole.
        user: The role of who asks.
        assistant: The role of who answers.
    """
    role = f"{{{{ {{'user': '{user}', 'assistant': '{assistant}'}}.get(m.role, m.role) }}}}"
    return (
        f"{start}{{% for m in messages %}}{turn.replace('ROLE', role)}"
        "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
        f"{{% if part.type == 'image' %}}{image}{{% else %}}{{{{ part.text }}}}{{% endif %}}"
        f"{{% endfor %}}{{% endif %}}{end}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{turn.replace('ROLE', assistant).rstrip(' ')}{{% endif %}}"
    )


VISION: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
CLIP = VISION | {"model_type": "clip_vision_model"}
SIGLIP = VISION | {"model_type": "siglip_vision_model", "vision_use_head": False}
QWEN_VISION: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": 8, "spatial_merge_size": 2}
Q_FORMER: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
DAVIT: dict[str, Any] = {**ready_made.DAVIT, "projection_dim": WIDTH}
SQUARE = {"height": 16, "width": 16}


def decoder(kind: str, tokens: PreTrainedTokenizerFast, **others: Any) -> dict[str, Any]:
    """The configuration of a decoder-only language model that has grouped heads and rotary positions."""
    return {
        "model_type": kind,
        "vocab_size": len(tokens),
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        **IDS,
        **others,
    }


def gemma(kind: str, tokens: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Of Gemma 2 and later: every other layer sees what is near alone."""
    sliding = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
    return decoder(kind, tokens, query_pre_attn_scalar=8, **sliding)


def t5(tokens: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The configuration of a T5."""
    return {
        "model_type": "t5",
        "vocab_size": len(tokens),
        "d_model": WIDTH,
        "d_kv": 8,
        "d_ff": 48,
        "num_heads": 4,
        "num_layers": 2,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 20,
        "decoder_start_token_id": 0,
        **IDS,
    }


def bart(tokens: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The configuration of a BART."""
    halves = {
        f"{half}_{name}": size
        for half in ("encoder", "decoder")
        for name, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))
    }
    numbers = {"vocab_size": len(tokens), "d_model": WIDTH, "max_position_embeddings": 128}
    special = {"decoder_start_token_id": 1, "forced_eos_token_id": None}
    return {"model_type": "bart", **halves, **numbers, **special, **IDS}


def has_encoder(model: PreTrainedModel) -> bool:
    """Whether answers are no continuation of the source; InstructBLIP's configuration says it in a part."""
    config = model.config
    return any(part.is_encoder_decoder for part in (config, getattr(config, "text_config", config)))


def model_of(kind: str, auto: Any = AutoModelForImageTextToText, **parts: Any) -> PreTrainedModel:
    """A model of this configuration, with numbers large enough to tell one input from another."""
    torch.manual_seed(0)
    parts.pop("model_type", None)
    model: PreTrainedModel = auto.from_config(AutoConfig.for_model(kind, **parts)).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25)
            # The source has to outweigh the decoder's last token, or every answer repeats one word.
            if "EncDecAttention.o" in name or "encoder_attn.out_proj.weight" in name:
                parameter.mul_(6)
    image = getattr(model.config, "image_token_id", None) or getattr(model.config, "image_token_index", None)
    if image is not None:  # no model answers with the token of an image
        torch.nn.init.zeros_(model.get_output_embeddings().weight[image])
    # `generate` of a fresh model knows of no token that ends an answer.
    model.generation_config = GenerationConfig(**IDS)
    if has_encoder(model):
        model.generation_config.decoder_start_token_id = 1 if kind in ("florence2", "bart") else 0
    return model
