"""What is measured: frozen backbones of T5's sizes with random weights, batches of three shapes, and methods.

Speed does not depend on the weights. All methods see the same batches; all prompts have the parameters of
100 vectors (T5-base: 76,800), and the visual projection is frozen, so that nothing else is trained.
"""

import copy
import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    T5Config,
    T5ForConditionalGeneration,
)

from dept_vl.config import OptimOptions
from dept_vl.data.feature_store import open_features, write_features
from dept_vl.data.features import load_pixels
from dept_vl.models.backbone import Backbone
from dept_vl.models.checks import load_tokenizer
from dept_vl.models.prompted import PromptedModel, sequence_loss
from dept_vl.models.vision import VisionEncoder
from dept_vl.prompts.base import METHODS as PROMPT_METHODS
from dept_vl.prompts.dept import DePT
from dept_vl.training.optim import build_optimizer

REFERENCE_LENGTH = 100
"""Vectors whose parameters every prompt has (l)."""
TARGET_LENGTH = 4
"""Tokens of every training target."""


@dataclass(frozen=True)
class Size:
    """A T5 and the CLIP tower that goes with it."""

    d_model: int
    d_ff: int
    layers: int
    heads: int
    d_kv: int = 64
    vocabulary: int = 32128
    d_vision: int = 768
    vision_layers: int = 12
    image: int = 224

    @property
    def d_inner(self) -> int:
        """All heads together."""
        return self.heads * self.d_kv


SIZES = {
    "tiny": Size(32, 64, 2, 2, d_kv=16, vocabulary=512, d_vision=32, vision_layers=1, image=224),
    "small": Size(512, 2048, 6, 8),
    "base": Size(768, 3072, 12, 12),
    "large": Size(1024, 4096, 24, 16),
}


@dataclass(frozen=True)
class Shape:
    """What an example is like.

    Attributes:
        text: Mean length, in tokens.
        spread: Standard deviation of it.
        longest: Of any text (s), to which the authors' implementation pads.
        image: Whether 49 visual tokens follow.
    """

    text: int
    spread: float
    longest: int
    image: bool


SHAPES = {
    "vl": Shape(20, 0.0, 256, True),
    "glue": Shape(60, 12.0, 256, False),
    "mrqa": Shape(300, 40.0, 512, False),
}

Inputs = dict[str, Any]
"""Tensors by name, and `paths` of the images where they are read in the step."""


@dataclass
class Runner:
    """A method, ready to be measured.

    Attributes:
        forward: From what `prepare` gives to a loss, or to tokens.
        modules: What it computes with; their parameters are no activations.
        trained: What the optimizer moves; empty where the backbone alone is measured.
        prompt_length: Positions in front of the text.
        prepare: From a batch to what goes into `forward`; not measured.
        compiled: Its layers are: the first step of a length may compile another graph.
    """

    forward: Callable[[Inputs], Tensor]
    modules: list[nn.Module]
    trained: list[nn.Parameter] = field(default_factory=list)
    prompt_length: int = 0
    prepare: Callable[[Inputs], Inputs] = lambda batch: batch
    compiled: bool = False

    def __post_init__(self) -> None:
        """AdamW, as in training."""
        groups = {"prompt": self.trained} if self.trained else {}
        self.optimizer = build_optimizer(groups, OptimOptions()) if groups else None

    def train_step(self, given: Inputs) -> None:
        """Forward, backward, clipping, optimizer."""
        self.forward(given).backward()  # type: ignore[no-untyped-call]
        if self.optimizer is not None:
            nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()


def t5_config(size: Size) -> T5Config:
    """T5 1.0 of this size."""
    return T5Config(
        vocab_size=size.vocabulary,
        d_model=size.d_model,
        d_kv=size.d_kv,
        d_ff=size.d_ff,
        num_layers=size.layers,
        num_decoder_layers=size.layers,
        num_heads=size.heads,
        feed_forward_proj="relu",
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )


def build_backbone(size: Size, tokenizer: Path, *, vision: bool) -> Backbone:
    """A frozen T5 with random weights, and a CLIP ViT with 49 patches.

    Args:
        size: Widths and depths.
        tokenizer: Folder of any tokenizer of T5's kind; texts are drawn as token ids.
        vision: With the tower and a projection.
    """
    language = T5ForConditionalGeneration(t5_config(size))
    tower = None
    if vision:
        config = CLIPVisionConfig(
            hidden_size=size.d_vision,
            intermediate_size=4 * size.d_vision,
            num_hidden_layers=size.vision_layers,
            num_attention_heads=max(1, size.d_vision // 64),
            image_size=size.image,
            patch_size=size.image // 7,
        )
        square = {"height": size.image, "width": size.image}
        processor = CLIPImageProcessor(size={"shortest_edge": size.image}, crop_size=square)
        tower = VisionEncoder(CLIPVisionModel(config), processor)
    backbone = Backbone(
        tower,
        language,
        load_tokenizer(tokenizer),
        name="T5, random weights",
    )
    backbone.freeze(visual_projection=True)
    return backbone


def draw_batch(backbone: Backbone, shape: Shape, size: int, seed: int, *, multiple: int = 1) -> Inputs:
    """Random tokens, padded to the longest text of the batch; features if the shape has an image.

    Args:
        backbone: Its vocabulary and its tower's sizes.
        shape: Of the examples.
        size: How many.
        seed: Of the batch.
        multiple: The width is rounded up to it.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(size, generator=generator)
    lengths = (shape.text + shape.spread * noise).round().long().clamp(2, shape.longest)
    width = -(-int(lengths.max()) // multiple) * multiple
    vocabulary = backbone.language_model.word_embeddings.num_embeddings
    mask = (torch.arange(width) < lengths[:, None]).long()
    labels = torch.randint(2, vocabulary, (size, TARGET_LENGTH), generator=generator)
    batch = {
        "input_ids": torch.randint(2, vocabulary, (size, width), generator=generator) * mask,
        "attention_mask": mask,
        "labels": labels,
    }
    if shape.image:
        assert backbone.vision is not None
        shown = (size, 1, backbone.vision.token_count, backbone.vision.d_vision)
        batch["visual_features"] = torch.randn(shown, generator=generator)
    return batch


METHODS = {
    "pt100": "PT (l=100)",
    "dept0": "DePT (m=0)",
    "dept20": "DePT (m=20)",
    "dept40": "DePT (m=40)",
    "dept60": "DePT (m=60)",
    "dept80": "DePT (m=80)",
    "padded": "DePT (m=40), padded to s",
    "floor": "backbone alone",
    "constant": "backbone alone, 40 positions more",
    "peft100": "PEFT's PT (l=100)",
    "peft40": "PEFT's PT (l=40)",
    "peft100held": "PEFT's PT (l=100) on our backbone",
    "lora8": "PEFT's LoRA (r=8 on q, v)",
}
"""By the name on the command line: the name in a table."""
COMPILED = "+compiled"
"""Behind the name of a method: its layers are compiled."""
COMPILABLE = ("pt100", "dept0", "dept20", "dept40", "dept60", "dept80", "floor", "constant")
METHODS |= {name + COMPILED: f"{METHODS[name]}, compiled" for name in COMPILABLE}


def needs_peft(method: str) -> bool:
    """Whether a method is PEFT's."""
    return method.startswith(("peft", "lora"))


def has_peft() -> bool:
    """Whether PEFT is installed (`pip install -e ".[bench]"`)."""
    return importlib.util.find_spec("peft") is not None


def build_runners(
    names: Sequence[str],
    backbone: Backbone,
    shape: Shape,
    *,
    stock: nn.Module | None = None,
    compiled: Backbone | None = None,
) -> dict[str, Runner]:
    """A runner for each method.

    Args:
        names: Of `METHODS`.
        backbone: Ready for a step; ours, the backbone alone and `peft100held` share it.
        shape: Of the batches.
        stock: The language model as it was loaded, for PEFT; None if none of its methods is named.
        compiled: A copy of the backbone whose layers are compiled; None if no such method is named.

    Raises:
        ValueError: If there is no such method, or no compiled backbone for it.
    """
    runners = {}
    for name in names:
        if name not in METHODS:
            raise ValueError(f"there is no method {name!r}; expected some of {', '.join(METHODS)}")
        used = compiled if name.endswith(COMPILED) else backbone
        if used is None:
            raise ValueError(f"{name} needs a backbone whose layers are compiled, and none was given")
        runners[name] = _build_runner(name.removesuffix(COMPILED), used, stock, shape)
        runners[name].compiled = used is compiled
    return runners


def _build_runner(name: str, backbone: Backbone, stock: nn.Module | None, shape: Shape) -> Runner:
    number = int("".join(re.findall(r"\d+", name)) or 0)
    if name == "padded":
        runner = _ours(backbone, shape, 40)
        runner.prepare = lambda batch: pad_text(batch, shape.longest)
        return runner
    if name.startswith(("pt", "dept")):
        return _ours(backbone, shape, number)
    if name in ("floor", "constant"):
        return _bare(backbone, 40 if name == "constant" else 0)
    assert stock is not None
    if name == "lora8":
        return _peft(backbone, copy.deepcopy(stock), prompt_length=0)
    return _peft(backbone, backbone.language if name.endswith("held") else stock, prompt_length=number)


def build_prompt(d_model: int, shape: Shape, prompt_length: int) -> DePT:
    """A prompt of so many vectors, the rest of the budget as rank."""
    sizes: dict[str, Any] = {
        "d_model": d_model,
        "max_source_length": shape.longest,
        "prompt_length": prompt_length,
    }
    _, rank = PROMPT_METHODS["dept"].solve(reference_prompt_length=REFERENCE_LENGTH, **sizes)
    return DePT(**sizes, rank=rank)


def _ours(backbone: Backbone, shape: Shape, prompt_length: int) -> Runner:
    return ours(backbone, build_prompt(backbone.d_model, shape, prompt_length).to(backbone.device))


def ours(backbone: Backbone, prompt: DePT) -> Runner:
    """The backbone with a prompt, which is on its device."""
    model = PromptedModel(backbone, prompt, backbone_dropout=backbone.training).train()

    def forward(batch: Inputs) -> Tensor:
        loss: Tensor = model(**batch).loss
        return loss

    return Runner(forward, [model], list(prompt.parameters()), prompt.prompt_length)


def pad_text(batch: Inputs, length: int) -> Inputs:
    """Every text padded to one length, as the authors' implementation needs it for `A @ B`."""
    missing = length - batch["input_ids"].shape[1]
    padded = {name: nn.functional.pad(batch[name], (0, missing)) for name in ("input_ids", "attention_mask")}
    return batch | padded


def _bare(backbone: Backbone, more: int) -> Runner:
    """The backbone on one tensor of input embeddings that needs a gradient, as deep as a prompt's.

    Nothing of ours is in it: no look-up, no offset, no concatenation, no projection and no optimizer.
    """

    def prepare(batch: Inputs) -> Inputs:
        size, text = batch["input_ids"].shape
        visual = batch["visual_features"].shape[1:3].numel() if "visual_features" in batch else 0
        like = {"device": batch["input_ids"].device, "dtype": torch.float32}
        mask = torch.cat(
            [
                torch.ones(size, more, dtype=torch.bool, device=like["device"]),
                batch["attention_mask"].bool(),
                torch.ones(size, visual, dtype=torch.bool, device=like["device"]),
            ],
            dim=1,
        )
        embeddings = torch.randn(size, more + text + visual, backbone.d_model, **like)
        return {
            "embeddings": embeddings.requires_grad_(),
            "mask": mask,
            "segments": (more, visual),
            "labels": batch["labels"],
        }

    def forward(given: Inputs) -> Tensor:
        embeddings, mask = given["embeddings"], given["mask"]
        encoded = backbone.language.get_encoder()(
            inputs_embeds=embeddings, attention_mask=mask, segments=given["segments"]
        )
        return sequence_loss(backbone.language_model.logits(encoded, mask, given["labels"]), given["labels"])

    return Runner(forward, [backbone], prompt_length=more, prepare=prepare)


def _peft(backbone: Backbone, language: nn.Module, *, prompt_length: int) -> Runner:
    """PEFT on the whole model; images as input embeddings, projected by the same projection.

    Args:
        backbone: Word table and projection.
        language: What PEFT wraps; LoRA changes it.
        prompt_length: Of prompt tuning; 0 is LoRA.
    """
    from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model

    config = (
        PromptTuningConfig(task_type=TaskType.SEQ_2_SEQ_LM, num_virtual_tokens=prompt_length)
        if prompt_length
        else LoraConfig(task_type=TaskType.SEQ_2_SEQ_LM, r=8, target_modules=["q", "v"])
    )
    training = language.training
    model = get_peft_model(language, config).train()
    language.train(training)

    def forward(batch: Inputs) -> Tensor:
        given = {"input_ids": batch["input_ids"]}
        mask = batch["attention_mask"]
        if "visual_features" in batch:
            visual = backbone.project(visual_features=batch["visual_features"])
            assert visual is not None
            embeddings = backbone.embed(batch["input_ids"])
            given = {"inputs_embeds": torch.cat([embeddings, visual], dim=1)}
            mask = torch.cat([mask, mask.new_ones(visual.shape[:2])], dim=1)
        loss: Tensor = model(**given, attention_mask=mask, labels=batch["labels"]).loss
        return loss

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Runner(forward, [backbone, model], trained, prompt_length)


def generating(runners: dict[str, Runner], new_tokens: int) -> dict[str, Runner]:
    """Runners of our methods and of the backbone alone that answer with so many tokens, no fewer."""

    def of(runner: Runner) -> Runner:
        (model,) = runner.modules
        if isinstance(model, Backbone):
            model = PromptedModel(model, None)
        assert isinstance(model, PromptedModel)
        model.eval()

        def forward(batch: Inputs) -> Tensor:
            given = {name: value for name, value in batch.items() if name != "labels"}
            tokens: Tensor = model.generate(
                **given, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
            )
            return tokens

        return Runner(forward, [model], prompt_length=runner.prompt_length)

    return {name: of(runner) for name, runner in runners.items()}


def write_images(folder: Path, count: int) -> list[Path]:
    """JPEG files of COCO's usual size, 640 x 480, with something in them to decode."""
    paths = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        coarse = torch.randint(256, (60 * 80 * 3,), generator=generator, dtype=torch.uint8)
        image = Image.frombytes("RGB", (80, 60), coarse.numpy().tobytes()).resize((640, 480))
        paths.append(folder / f"{number:012d}.jpg")
        image.save(paths[-1], quality=90)
    return paths


def seeing(runner: Runner, vision: VisionEncoder, paths: Sequence[Path]) -> dict[str, Runner]:
    """A method with features read from files (`cached`), and with images decoded and encoded (`live`)."""
    device = next(vision.parameters()).device
    images, folder = paths[0].parent, paths[0].parent / "features"
    write_features(vision, images, paths, folder, Accelerator(cpu=device.type == "cpu"))
    table = open_features(vision, images, paths, folder)

    def cached(batch: Inputs) -> Tensor:
        features = table([[path] for path in batch["paths"]])
        return runner.forward(_shown(batch, visual_features=features.to(device)))

    def live(batch: Inputs) -> Tensor:
        pixels = torch.stack([load_pixels(vision, path)[None] for path in batch["paths"]])
        return runner.forward(_shown(batch, pixel_values=pixels.to(device)))

    def prepare(batch: Inputs) -> Inputs:
        number = int(batch["input_ids"].sum())  # another choice for every batch, the same for both
        return batch | {"paths": [paths[(number + n) % len(paths)] for n in range(len(batch["labels"]))]}

    ways = {"cached": cached, "live": live}
    return {
        name: Runner(way, runner.modules, runner.trained, runner.prompt_length, prepare)
        for name, way in ways.items()
    }


def _shown(batch: Inputs, **images: Tensor) -> Inputs:
    left_out = ("paths", "visual_features")
    return {name: value for name, value in batch.items() if name not in left_out} | images
