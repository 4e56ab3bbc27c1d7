"""Tiny models of the real classes with random weights: for the tests, and for the table of what works."""

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LongT5Config,
    LongT5ForConditionalGeneration,
    MT5Config,
    MT5ForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5ForConditionalGeneration,
    TimmWrapperConfig,
    TimmWrapperModel,
)
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

VOCABULARY = 160
IMAGE_SIZE = 32
D_MODEL = 32
D_VISION = 24
TOWERS = ("clip", "siglip", "dinov2", "timm_vit", "timm_resnet")

CORPUS = [
    "vqa: what colour is the small circle left of the square ?",
    "gqa: how many large triangles are there ? yes no true false",
    "nlvr: both images hold the same number of red , green and blue shapes .",
    "caption: a yellow star above two purple crosses on a white ground",
]
"""What tokenizers are made from."""

T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": D_MODEL,
    "d_kv": 8,
    "d_ff": 48,
    "num_heads": 4,
    "num_layers": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
BART: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": D_MODEL,
    "max_position_embeddings": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "dropout": 0.1,
    "scale_embedding": True,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_positions": 64,
    "n_embd": D_MODEL,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 48,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "hidden_size": D_MODEL,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BLOCKS: dict[str, Any] = {"local_radius": 3, "global_block_size": 4}
"""Of LongT5, shorter than the texts of the tests."""
TRANSFORMER: dict[str, Any] = {
    "hidden_size": D_VISION,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
PATCHES: dict[str, Any] = {"image_size": IMAGE_SIZE, "patch_size": 8}


def language_model(name: str) -> PreTrainedModel:
    """A t5, mt5, longt5-local, longt5-global, bart, gpt2 or llama, as transformers begins it."""
    if name.startswith("longt5"):
        attention = {"longt5-local": "local", "longt5-global": "transient-global"}[name]
        return LongT5ForConditionalGeneration(LongT5Config(**T5, **BLOCKS, encoder_attention_type=attention))
    made: dict[str, PreTrainedModel] = {
        "t5": lambda: T5ForConditionalGeneration(T5Config(**T5)),
        "mt5": lambda: MT5ForConditionalGeneration(MT5Config(**T5)),
        "bart": lambda: BartForConditionalGeneration(BartConfig(**BART)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    }[name]()
    return made


def spread_out(language: PreTrainedModel) -> PreTrainedModel:
    """Enlarge what random initialisation leaves too small to tell one input from another."""
    with torch.no_grad():
        for name, parameter in language.named_parameters():
            if "relative_attention_bias" in name:
                parameter.normal_(std=2.0)
            elif "embed_positions" in name or "wpe" in name:
                parameter.normal_(std=0.5)
            elif parameter.dim() == 2:
                parameter.normal_(std=0.25)
            # The source has to outweigh the decoder's last token, or every answer repeats one word.
            if "EncDecAttention.o" in name or "encoder_attn.out_proj.weight" in name:
                parameter.mul_(6)
    return language


def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Of the kind that the language model has; that of T5 for its relatives too."""
    if name == "gpt2":
        return _byte_level_tokenizer()
    if name == "llama":
        return _sentence_piece_tokenizer()
    if name == "bart":
        return _tokenizer(
            ["<s>", "<pad>", "</s>", "<unk>"],
            "<s> $A </s>",
            bos_token="<s>",
            pad_token="<pad>",
            eos_token="</s>",
            unk_token="<unk>",
        )
    return _tokenizer(
        ["<pad>", "</s>", "<unk>"], "$A </s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def _byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """As GPT-2's: a space belongs to the word behind it, and nothing is put around a text."""
    end = "<|endoftext|>"
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[end], show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=end, eos_token=end, unk_token=end)


def _sentence_piece_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama's: the first word gets a space too, and `<s>` goes in front of a text."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    # Learnt from words, used on whole texts.
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Metaspace(prepend_scheme="first")
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _tokenizer(special_tokens: list[str], template: str, **named: str) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special_tokens, show_progress=False)
    )
    used = [(token, special_tokens.index(token)) for token in ("<s>", "</s>") if token in template]
    made.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    return PreTrainedTokenizerFast(tokenizer_object=made, **named)


def tower(name: str) -> tuple[PreTrainedModel, Any]:
    """An image encoder of `TOWERS` and its processor; images become 32 x 32 pixels."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    if name == "clip":
        # Both halves, as on the Hub: the loader has to take the image half out.
        config = CLIPConfig(
            text_config=TRANSFORMER | {"vocab_size": 50, "max_position_embeddings": 8},
            vision_config=TRANSFORMER | PATCHES,
            projection_dim=16,
        )
        return CLIPModel(config), CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=size)
    if name == "siglip":
        siglip = SiglipVisionModel(SiglipVisionConfig(**TRANSFORMER, **PATCHES))
        return siglip, SiglipImageProcessor(size=size)
    if name == "dinov2":
        dinov2 = Dinov2Model(Dinov2Config(**TRANSFORMER, **PATCHES, mlp_ratio=2))
        return dinov2, BitImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=size)
    if name == "timm_vit":
        timm = timm_tower(
            "vit_tiny_patch16_224",
            img_size=IMAGE_SIZE,
            patch_size=8,
            embed_dim=D_VISION,
            depth=3,
            num_heads=2,
            reg_tokens=2,
        )
    else:
        timm = timm_tower("resnet10t", channels=[8, 8, 16, D_VISION], stem_width=8, output_stride=8)
    return timm, timm_processor(timm)


def timm_tower(architecture: str, **model_args: Any) -> TimmWrapperModel:
    """A timm model in transformers' wrapper."""
    pixels = {
        "input_size": (3, IMAGE_SIZE, IMAGE_SIZE),
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
    }
    return TimmWrapperModel(
        TimmWrapperConfig(
            architecture=architecture,
            model_args=model_args,
            do_pooling=False,
            num_labels=0,
            pretrained_cfg=pixels,
        )
    )


def timm_processor(model: PreTrainedModel) -> TimmWrapperImageProcessor:
    """The image processor of a timm model."""
    config = model.config
    return TimmWrapperImageProcessor(pretrained_cfg=config.pretrained_cfg, architecture=config.architecture)
