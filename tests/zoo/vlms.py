"""Tiny pretrained vision-language models, so to speak: real classes and real processors, random weights.

`saved` writes one as a repository has it, so that `AutoModelForImageTextToText` and `AutoProcessor` read it.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from zoo.texts import bart_text, gpt2_text, llama_text, t5_text
from zoo.vlm_parts import (
    CLIP,
    DAVIT,
    Q_FORMER,
    QWEN_VISION,
    SIGLIP,
    SQUARE,
    VISION,
    WIDTH,
    Made,
    bart,
    chat,
    decoder,
    gemma,
    model_of,
    t5,
    words,
)

# -- encoder-decoders


def blip2() -> Made:
    """BLIP-2 with FLAN-T5."""
    tokens = words("$A </s>", ["<image>"])
    model = model_of("blip-2", **blip_parts(tokens, Q_FORMER))
    return model, hf.Blip2Processor(hf.BlipImageProcessor(size=SQUARE), tokens, num_query_tokens=4)


def instructblip() -> Made:
    """InstructBLIP with FLAN-T5; its Q-Former reads the text too."""
    tokens, q_former = words("$A </s>", ["<image>"]), words("<s> $A </s>")
    model = model_of("instructblip", **blip_parts(tokens, Q_FORMER | {"vocab_size": len(q_former)}))
    images = hf.BlipImageProcessor(size=SQUARE)
    return model, hf.InstructBlipProcessor(images, tokens, q_former, num_query_tokens=4)


def blip_parts(tokens: PreTrainedTokenizerFast, q_former: dict[str, Any]) -> dict[str, Any]:
    """What BLIP-2 and InstructBLIP are made of."""
    parts = {"vision_config": VISION, "qformer_config": q_former, "text_config": t5(tokens)}
    image = tokens.convert_tokens_to_ids("<image>")
    return {**parts, "num_query_tokens": 4, "image_token_index": image}


def blip2_opt() -> Made:
    """BLIP-2 with OPT, which is decoder-only."""
    tokens = words("</s> $A", ["<image>"])
    sizes = {"hidden_size": WIDTH, "word_embed_proj_dim": WIDTH, "ffn_dim": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 128}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    text = hf.OPTConfig(vocab_size=len(tokens), **sizes, **ids).to_dict()
    model = model_of("blip-2", **blip_parts(tokens, Q_FORMER) | {"text_config": text})
    return model, hf.Blip2Processor(hf.BlipImageProcessor(size=SQUARE), tokens, num_query_tokens=4)


def instructblip_vicuna() -> Made:
    """InstructBLIP with Vicuna, which is decoder-only."""
    tokens, q_former = words("<s> $A", ["<image>"]), words("<s> $A </s>")
    parts = blip_parts(tokens, Q_FORMER | {"vocab_size": len(q_former)})
    model = model_of("instructblip", **parts | {"text_config": decoder("llama", tokens)})
    images = hf.BlipImageProcessor(size=SQUARE)
    return model, hf.InstructBlipProcessor(images, tokens, q_former, num_query_tokens=4)


def florence2() -> Made:
    """Florence-2."""
    tokens = words("<s> $A </s>", image_token="<image>")
    model = model_of(
        "florence2", vision_config=DAVIT, text_config=bart(tokens), image_token_id=tokens.image_token_id
    )
    size = {"height": 32, "width": 32}
    images = hf.CLIPImageProcessor(size=size, crop_size=size)
    images.image_seq_length = 2
    return model, hf.Florence2Processor(images, tokens, num_additional_image_tokens=1)


def gemma_tokens() -> PreTrainedTokenizerFast:
    """Of Gemma 3 and T5Gemma 2: an image is fenced in."""
    return words(
        "<s> $A",
        ["<start_of_turn>", "<end_of_turn>"],
        image_token="<image_soft_token>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
    )


def t5gemma2() -> Made:
    """T5Gemma 2."""
    tokens = gemma_tokens()
    encoder = {
        "text_config": gemma("t5gemma2_text", tokens),
        "vision_config": SIGLIP,
        "mm_tokens_per_image": 4,
        "boi_token_index": tokens.boi_token_id,
        "eoi_token_index": tokens.eoi_token_id,
    }
    model = model_of(
        "t5gemma2",
        encoder=encoder,
        decoder=gemma("t5gemma2_decoder", tokens),
        image_token_index=tokens.image_token_id,
    )
    for name, parameter in model.named_parameters():
        if "eoi_embedding" in name:
            torch.nn.init.normal_(parameter)
    return model, hf.Gemma3Processor(hf.Gemma3ImageProcessor(size=SQUARE), tokens, image_seq_length=4)


# -- decoder-only


def llava() -> Made:
    """LLaVA 1.5."""
    tokens = words("<s> $A", image_token="<image>")
    parts = {"vision_config": CLIP, "text_config": decoder("llama", tokens)}
    model = model_of("llava", **parts, image_token_index=tokens.image_token_id, image_seq_length=4)
    images = hf.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=SQUARE)
    sizes = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    template = chat("ROLE: ", "<image>\n", " ", user="USER", assistant="ASSISTANT")
    return model, hf.LlavaProcessor(images, tokens, **sizes, chat_template=template)


PINPOINTS = [[16, 32], [32, 16]]
"""Images of LLaVA-NeXT are read as a whole and in two halves."""


def llava_next() -> Made:
    """LLaVA-NeXT with Mistral."""
    tokens = words("<s> $A", image_token="<image>")
    parts = {"vision_config": CLIP, "text_config": decoder("mistral", tokens)}
    model = model_of(
        "llava_next",
        **parts,
        image_token_index=tokens.image_token_id,
        image_seq_length=4,
        image_grid_pinpoints=PINPOINTS,
    )
    images = hf.LlavaNextImageProcessor(
        size={"shortest_edge": 16}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS
    )
    sizes = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    turn = "{% if m.role == 'user' %}[INST] {% endif %}"
    template = chat(turn, "<image>\n", "{% if m.role == 'user' %} [/INST]{% else %}</s>{% endif %}")
    template = template.partition("{% if add_generation_prompt")[0]
    return model, hf.LlavaNextProcessor(images, tokens, **sizes, chat_template=template)


QWEN = ["<|im_start|>", "<|im_end|>"]
QWEN_TURN = "<|im_start|>ROLE\n"


def llava_onevision() -> Made:
    """LLaVA-OneVision with Qwen2."""
    tokens = words("$A", QWEN, image_token="<image>", video_token="<video>")
    model = model_of(
        "llava_onevision",
        vision_config=SIGLIP,
        text_config=decoder("qwen2", tokens),
        image_token_index=tokens.image_token_id,
        video_token_index=tokens.video_token_id,
        image_grid_pinpoints=PINPOINTS,
    )
    images = hf.LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=PINPOINTS)
    template = chat("<|im_start|>ROLE ", "<image>\n", "<|im_end|>\n")
    return model, hf.LlavaOnevisionProcessor(
        images,
        tokens,
        hf.LlavaOnevisionVideoProcessor(size=SQUARE),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=template,
    )


def qwen(kind: str, processor: Any, videos: Any, vision: dict[str, Any], **rope: Any) -> Made:
    """The Qwen-VL models; an image becomes as many tokens as it has blocks of 16 pixels."""
    fences = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokens = words("$A", [*QWEN, *fences])
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    ids = dict(zip(names, tokens.convert_tokens_to_ids(fences), strict=True))
    positions = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], **rope}
    text = decoder(f"{kind}_text", tokens, rope_parameters=positions)
    model = model_of(kind, vision_config=QWEN_VISION | vision, text_config=text, **ids)
    pixels = {"patch_size": 8, "size": {"shortest_edge": 256, "longest_edge": 1024}}
    template = chat(
        QWEN_TURN,
        "<|vision_start|><|image_pad|><|vision_end|>",
        "<|im_end|>\n",
        start="{% if messages[0].role != 'system' %}<|im_start|>system\nYou answer.<|im_end|>\n{% endif %}",
    )
    return model, processor(
        hf.Qwen2VLImageProcessor(**pixels), tokens, videos(**pixels), chat_template=template
    )


def qwen2_vl() -> Made:
    """Qwen2-VL."""
    vision = {"embed_dim": 32, "hidden_size": WIDTH, "mlp_ratio": 1}
    return qwen("qwen2_vl", hf.Qwen2VLProcessor, hf.Qwen2VLVideoProcessor, vision)


def qwen2_5_vl() -> Made:
    """Qwen2.5-VL, whose vision tower looks through windows."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "out_hidden_size": WIDTH}
    vision = {**sizes, "window_size": 16, "fullatt_block_indexes": [1]}
    return qwen("qwen2_5_vl", hf.Qwen2_5_VLProcessor, hf.Qwen2VLVideoProcessor, vision)


def qwen3_vl() -> Made:
    """Qwen3-VL, whose first layers get features of their own."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "out_hidden_size": WIDTH}
    vision = {**sizes, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return qwen(
        "qwen3_vl",
        hf.Qwen3VLProcessor,
        hf.Qwen3VLVideoProcessor,
        vision,
        mrope_interleaved=True,
    )


def paligemma(
    text: Callable[[str, PreTrainedTokenizerFast], dict[str, Any]] = decoder, kind: str = "gemma"
) -> Made:
    """PaliGemma; its prefix sees itself from both sides."""
    images = hf.SiglipImageProcessor(size=SQUARE)
    images.image_seq_length = 4
    tokens = words("<s> $A")
    processor = hf.PaliGemmaProcessor(images, tokens)  # adds more than a thousand tokens
    model = model_of(
        "paligemma",
        vision_config=SIGLIP | {"projection_dim": WIDTH},
        text_config=text(kind, tokens),
        image_token_index=processor.image_token_id,
        vocab_size=len(tokens),
        projection_dim=WIDTH,
        hidden_size=WIDTH,
    )
    return model, processor


def paligemma2() -> Made:
    """PaliGemma 2."""
    return paligemma(gemma, "gemma2")


def idefics(kind: str, tokens: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Idefics3 or SmolVLM: an image of 16 pixels is four patches, which become one token."""
    return model_of(
        kind,
        vision_config=VISION,
        text_config=decoder("llama", tokens),
        image_token_id=tokens.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=0,
    )


def idefics_tokens() -> PreTrainedTokenizerFast:
    """With names for the parts of an image."""
    parts = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    fences = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
    return words("$A", ["<|im_start|>", *fences, *parts])


IDEFICS: dict[str, Any] = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
IDEFICS_CHAT = chat(
    "ROLE: ", "<image>", "<end_of_utterance>\n", start="<|im_start|>", user="User", assistant="Assistant"
)


def idefics3() -> Made:
    """Idefics3, which the first SmolVLM is too."""
    tokens = idefics_tokens()
    images = hf.Idefics3ImageProcessor(**IDEFICS)
    processor = hf.Idefics3Processor(images, tokens, image_seq_len=1, chat_template=IDEFICS_CHAT)
    return idefics("idefics3", tokens), processor


def smolvlm() -> Made:
    """SmolVLM 2; its processor needs num2words."""
    tokens = idefics_tokens()
    videos = hf.SmolVLMVideoProcessor(size={"longest_edge": 16}, max_image_size={"longest_edge": 16})
    processor = hf.SmolVLMProcessor(
        hf.SmolVLMImageProcessor(**IDEFICS),
        tokens,
        videos,
        image_seq_len=1,
        chat_template=IDEFICS_CHAT,
    )
    return idefics("smolvlm", tokens), processor


def gemma3() -> Made:
    """Gemma 3; the tokens of an image see each other."""
    tokens = gemma_tokens()
    model = model_of(
        "gemma3",
        vision_config=SIGLIP,
        text_config=gemma("gemma3_text", tokens),
        mm_tokens_per_image=4,
        boi_token_index=tokens.boi_token_id,
        eoi_token_index=tokens.eoi_token_id,
        image_token_index=tokens.image_token_id,
    )
    model.generation_config.eos_token_id = [1, tokens.convert_tokens_to_ids("<end_of_turn>")]
    told = {"start": "{{ bos_token }}", "assistant": "model"}
    template = chat("<start_of_turn>ROLE\n", "<start_of_image>", "<end_of_turn>\n", **told)
    images = hf.Gemma3ImageProcessor(size=SQUARE)
    return model, hf.Gemma3Processor(images, tokens, image_seq_length=4, chat_template=template)


def internvl() -> Made:
    """InternVL 3."""
    tokens = words(
        "$A",
        QWEN,
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    model = model_of(
        "internvl",
        vision_config=VISION | {"image_size": [16, 16], "patch_size": [8, 8]},
        text_config=decoder("qwen2", tokens),
        image_token_id=tokens.context_image_token_id,
        image_seq_length=1,
    )
    images = hf.GotOcr2ImageProcessor(size=SQUARE, max_patches=2)
    videos = hf.InternVLVideoProcessor(size=SQUARE)
    template = chat(QWEN_TURN, "<IMG_CONTEXT>\n", "<|im_end|>\n")
    return model, hf.InternVLProcessor(images, tokens, videos, image_seq_length=1, chat_template=template)


def _by_name(*made: Callable[[], Made]) -> dict[str, Callable[[], Made]]:
    return {one.__name__: one for one in made}


FAMILIES = (
    _by_name(blip2, instructblip, florence2, t5gemma2)
    | _by_name(llava, llava_next, llava_onevision, qwen2_vl, qwen2_5_vl, qwen3_vl)
    | _by_name(paligemma, paligemma2, idefics3, smolvlm, gemma3, internvl)
)
DECODER_ONLY = _by_name(blip2_opt, instructblip_vicuna)
"""Families of encoder-decoders with another language model."""
TEXT_ONLY = _by_name(gpt2_text, llama_text, t5_text, bart_text)


def saved(name: str, folder: Path) -> Path:
    """Write a model of one of these tables and its processor, and return the folder."""
    model, processor = (FAMILIES | DECODER_ONLY | TEXT_ONLY)[name]()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def question_for(processor: Any, text: str, *, images: int = 1) -> str:
    """A question as the family's checkpoints are asked: with their chat template, or in their usual words."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}] * images + [{"type": "text", "text": text}]
        asked: str = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        return asked
    usual = {
        "Blip2Processor": "Question: {} Answer:",
        "InstructBlipProcessor": "Question: {} Answer:",
        "Gemma3Processor": "<start_of_image> {}",
        "PaliGemmaProcessor": "<image>answer en {}",
    }
    return usual.get(type(processor).__name__, "{}").format(text)


if __name__ == "__main__":
    for family in FAMILIES:
        saved(family, Path(sys.argv[1]) / family)
