"""Tiny random models of the real classes in a temporary folder, and what most tests start from."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
# Models are so small that threads wait for each other more than they work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
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

from dept_vl.backbone import Backbone
from dept_vl.model import IGNORE_INDEX
from dept_vl.scenes.official import write_tasks

VOCABULARY = 160
IMAGE_SIZE = 32
D_MODEL = 32
D_VISION = 24
TOWERS = ("clip", "siglip", "dinov2", "timm_vit", "timm_resnet")
LANGUAGES = ("t5", "bart")
DECODERS = ("gpt2", "llama")

CORPUS = [
    "vqa: what colour is the small circle left of the square ?",
    "gqa: how many large triangles are there ? yes no true false",
    "nlvr: both images hold the same number of red , green and blue shapes .",
    "caption: a yellow star above two purple crosses on a white ground",
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test draws the same random numbers, alone or in company."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models lose time to more threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def language_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a T5 and a BART, each with its tokenizer."""
    root = tmp_path_factory.mktemp("languages")
    torch.manual_seed(0)
    t5 = T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=D_MODEL,
            d_kv=8,
            d_ff=48,
            num_heads=4,
            num_layers=2,
            num_decoder_layers=2,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=20,
            dropout_rate=0.1,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )
    bart = BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCABULARY,
            d_model=D_MODEL,
            max_position_embeddings=64,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            dropout=0.1,
            scale_embedding=True,
            bos_token_id=0,
            pad_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
        )
    )
    for language in (t5, bart):
        _spread_out(language)
    tokenizers = {
        "t5": _tokenizer(
            ["<pad>", "</s>", "<unk>"], "$A </s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        ),
        "bart": _tokenizer(
            ["<s>", "<pad>", "</s>", "<unk>"],
            "<s> $A </s>",
            bos_token="<s>",
            pad_token="<pad>",
            eos_token="</s>",
            unk_token="<unk>",
        ),
    }
    for name, language in (("t5", t5), ("bart", bart)):
        language.save_pretrained(root / name)
        tokenizers[name].save_pretrained(root / name)
    return {name: root / name for name in LANGUAGES}


@pytest.fixture(scope="session")
def decoder_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a GPT-2 and a Llama, each with a tokenizer of its kind, which has no padding token."""
    root = tmp_path_factory.mktemp("decoders")
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=64,
            n_embd=D_MODEL,
            n_layer=2,
            n_head=4,
            n_inner=48,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            max_position_embeddings=64,
            hidden_size=D_MODEL,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    tokenizers = {"gpt2": _byte_level_tokenizer(), "llama": _sentence_piece_tokenizer()}
    for name, decoder in (("gpt2", gpt2), ("llama", llama)):
        _spread_out(decoder)
        decoder.save_pretrained(root / name)
        tokenizers[name].save_pretrained(root / name)
    return {name: root / name for name in DECODERS}


def _byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """As GPT-2's: a space belongs to the word behind it, and nothing is put around a text."""
    end = "<|endoftext|>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[end], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, unk_token=end)


def _sentence_piece_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama's: the first word gets a space too, and `<s>` goes in front of a text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    # Learnt from words, used on whole texts.
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _spread_out(language: PreTrainedModel) -> None:
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


def _tokenizer(special_tokens: list[str], template: str, **named: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special_tokens, show_progress=False)
    )
    used = [(token, special_tokens.index(token)) for token in ("<s>", "</s>") if token in template]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


@pytest.fixture(scope="session")
def vision_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of image encoders by the names of `TOWERS`; images become 32 x 32 pixels."""
    root = tmp_path_factory.mktemp("towers")
    torch.manual_seed(1)
    transformer = {
        "hidden_size": D_VISION,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    patches = {"image_size": IMAGE_SIZE, "patch_size": 8}
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    models_: dict[str, PreTrainedModel] = {
        # Both halves, as on the Hub: the loader has to take the image half out.
        "clip": CLIPModel(
            CLIPConfig(
                text_config=transformer | {"vocab_size": 50, "max_position_embeddings": 8},
                vision_config=transformer | patches,
                projection_dim=16,
            )
        ),
        "siglip": SiglipVisionModel(SiglipVisionConfig(**transformer, **patches)),
        "dinov2": Dinov2Model(Dinov2Config(**transformer, **patches, mlp_ratio=2)),
        "timm_vit": timm_tower(
            "vit_tiny_patch16_224",
            img_size=IMAGE_SIZE,
            patch_size=8,
            embed_dim=D_VISION,
            depth=3,
            num_heads=2,
            reg_tokens=2,
        ),
        "timm_resnet": timm_tower("resnet10t", channels=[8, 8, 16, D_VISION], stem_width=8, output_stride=8),
    }
    images: dict[str, Any] = {
        "clip": CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=size),
        "siglip": SiglipImageProcessor(size=size),
        "dinov2": BitImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=size),
        "timm_vit": timm_processor(models_["timm_vit"]),
        "timm_resnet": timm_processor(models_["timm_resnet"]),
    }
    for name in TOWERS:
        models_[name].save_pretrained(root / name)
        images[name].save_pretrained(root / name)
    return {name: root / name for name in TOWERS}


def timm_tower(architecture: str, **model_args: Any) -> TimmWrapperModel:
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
    config = model.config
    return TimmWrapperImageProcessor(pretrained_cfg=config.pretrained_cfg, architecture=config.architecture)


@pytest.fixture(scope="session")
def _loaded(
    language_folders: dict[str, Path], decoder_folders: dict[str, Path], vision_folders: dict[str, Path]
) -> Callable[[str, str | None, str], Backbone]:
    """Backbones as first loaded; tests get copies."""
    folders = language_folders | decoder_folders
    loaded: dict[tuple[str, str | None, str], Backbone] = {}

    def load(language: str, tower: str | None, visual_position_bias: str) -> Backbone:
        key = (language, tower, visual_position_bias)
        if key not in loaded:
            loaded[key] = Backbone.from_pretrained(
                language=folders[language],
                vision=None if tower is None else vision_folders[tower],
                visual_position_bias=visual_position_bias,  # type: ignore[arg-type]
            ).eval()
            projection = loaded[key].visual_projection
            if projection is not None:
                # As after training: the order of the images is told.
                torch.nn.init.normal_(projection.image_order.weight)
        return loaded[key]

    return load


@pytest.fixture
def make_backbone(_loaded: Callable[[str, str | None, str], Backbone]) -> Callable[..., Backbone]:
    """Makes a fresh backbone, in evaluation mode, that a test may change as it likes."""

    def make(language: str, tower: str | None = "clip", *, visual_position_bias: str = "none") -> Backbone:
        return copy.deepcopy(_loaded(language, tower, visual_position_bias))

    return make


@pytest.fixture(params=LANGUAGES)
def backbone(request: pytest.FixtureRequest, make_backbone: Callable[..., Backbone]) -> Backbone:
    """T5, then BART, each with the CLIP tower."""
    return make_backbone(request.param)


@pytest.fixture
def t5(make_backbone: Callable[..., Backbone]) -> Backbone:
    """T5 with the CLIP tower."""
    return make_backbone("t5")


@pytest.fixture
def bart(make_backbone: Callable[..., Backbone]) -> Backbone:
    """BART with the CLIP tower."""
    return make_backbone("bart")


@pytest.fixture
def images() -> list[Image.Image]:
    """Three different photographs, so to speak."""
    return [random_image(size, seed) for seed, size in enumerate([(40, 36), (64, 48), (32, 32)])]


def random_image(size: tuple[int, int], seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Noise of (width, height)."""
    generator = torch.Generator().manual_seed(seed)
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = torch.randint(256, (size[0] * size[1] * bands,), generator=generator, dtype=torch.uint8)
    return Image.frombytes(mode, size, pixels.numpy().tobytes())


def random_text(
    backbone: Backbone, lengths: tuple[int, ...] = (7, 4, 5), *, side: str = "right", seed: int = 0
) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` of random ordinary tokens, padded on the side named.

    The tokens of a text depend on the seed and its row alone, not on the padding.
    """
    pad: int = backbone.tokenizer.pad_token_id
    input_ids = torch.full((len(lengths), max(lengths)), pad)
    mask = torch.zeros_like(input_ids)
    for row, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(1000 * seed + row)
        start = max(lengths) - length if side == "left" else 0
        input_ids[row, start : start + length] = torch.randint(5, VOCABULARY, (length,), generator=generator)
        mask[row, start : start + length] = 1
    return {"input_ids": input_ids, "attention_mask": mask}


def random_features(backbone: Backbone, batch: int = 3, images: int = 1, *, seed: int = 0) -> Tensor:
    """Visual features, (batch, images, tokens, d_vision), as the tower might give them."""
    assert backbone.vision is not None
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(
        batch, images, backbone.vision.token_count, backbone.vision.d_vision, generator=generator
    )


def random_labels(lengths: tuple[int, ...] = (4, 2, 3), *, seed: int = 0) -> Tensor:
    """Target tokens, `IGNORE_INDEX` on padding."""
    labels = torch.full((len(lengths), max(lengths)), IGNORE_INDEX)
    generator = torch.Generator().manual_seed(seed)
    for row, length in enumerate(lengths):
        labels[row, :length] = torch.randint(5, VOCABULARY, (length,), generator=generator)
    return labels


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Converted annotation files go where pytest cleans up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEPT_VL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders vqav2, gqa, nlvr2 and coco in the official form; a test that damages one copies it first."""
    folder = tmp_path_factory.mktemp("scenes") / "official"
    write_tasks(folder, train=12, val=6, test=6)
    return folder
