"""Methods to measure on the backbones of `backbones`.

Speed does not depend on the weights. All methods see the same batches. All prompts have the parameters of 100
vectors (76,800 for T5-base). The visual projection is frozen, so that only the prompt is trained.
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

from benchmarks.backbones import Inputs, Shape
from dept_vl._utils.errors import UsageError
from dept_vl.config import OptimOptions
from dept_vl.data.feature_store import open_features, write_features
from dept_vl.data.features import load_pixels
from dept_vl.models.backbone import Backbone
from dept_vl.models.prompted import PromptedModel, sequence_loss
from dept_vl.models.vision import VisionEncoder
from dept_vl.prompts.base import METHODS as PROMPT_METHODS
from dept_vl.prompts.dept import DePT
from dept_vl.training.optim import build_optimizer

REFERENCE_LENGTH = 100
"""Budget of every prompt: the parameters of this many vectors (l)."""


@dataclass
class Runner:
    """Method that is ready to be measured.

    Attributes:
        forward: Function from prepared inputs to the loss, or to token ids.
        modules: Modules it uses. Their parameters do not count as activations.
        trained: Trained parameters; empty for the bare backbone.
        prompt_length: Number of positions in front of the text.
        prepare: Function from a batch to the inputs of `forward`. It is not measured.
        compiled: Whether layers are compiled, so that the first step of a length may compile.
    """

    forward: Callable[[Inputs], Tensor]
    modules: list[nn.Module]
    trained: list[nn.Parameter] = field(default_factory=list)
    prompt_length: int = 0
    prepare: Callable[[Inputs], Inputs] = lambda batch: batch
    compiled: bool = False

    def __post_init__(self) -> None:
        """Create AdamW, as in training."""
        groups = {"prompt": self.trained} if self.trained else {}
        self.optimizer = build_optimizer(groups, OptimOptions()) if groups else None

    def train_step(self, given: Inputs) -> None:
        """Run forward, backward, clipping and optimizer."""
        self.forward(given).backward()  # type: ignore[no-untyped-call]
        if self.optimizer is not None:
            nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()


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
"""Name of each method in tables, by its name on the command line."""
COMPILED = "+compiled"
"""Suffix of the names of methods with compiled layers."""
COMPILABLE = ("pt100", "dept0", "dept20", "dept40", "dept60", "dept80", "floor", "constant")
METHODS |= {name + COMPILED: f"{METHODS[name]}, compiled" for name in COMPILABLE}


def needs_peft(method: str) -> bool:
    """Return whether a method needs PEFT."""
    return method.startswith(("peft", "lora"))


def has_peft() -> bool:
    """Return whether PEFT is installed (`pip install -e ".[bench]"`)."""
    return importlib.util.find_spec("peft") is not None


def build_runners(
    names: Sequence[str],
    backbone: Backbone,
    shape: Shape,
    *,
    stock: nn.Module | None = None,
    compiled: Backbone | None = None,
) -> dict[str, Runner]:
    """Return a runner for each method.

    Args:
        names: Names in `METHODS`.
        backbone: Backbone ready for a step. All methods share it, except PEFT's on `stock`.
        shape: Shape of the batches.
        stock: Language model as loaded, for PEFT; None if no name needs it.
        compiled: Copy of the backbone with compiled layers; None if no name needs it.

    Raises:
        ValueError: If a method is unknown, or needs a compiled backbone and there is none.
    """
    runners = {}
    for name in names:
        if name not in METHODS:
            raise UsageError(f"there is no method {name!r}; expected some of {', '.join(METHODS)}")
        used = compiled if name.endswith(COMPILED) else backbone
        if used is None:
            raise UsageError(f"{name} needs a backbone whose layers are compiled, and none was given")
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
    """Build a prompt of this length; the rest of the budget determines its rank."""
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
    """Return a runner for the backbone with a prompt on the same device."""
    model = PromptedModel(backbone, prompt, backbone_dropout=backbone.training).train()

    def forward(batch: Inputs) -> Tensor:
        loss: Tensor = model(**batch).loss
        return loss

    return Runner(forward, [model], list(prompt.parameters()), prompt.prompt_length)


def pad_text(batch: Inputs, length: int) -> Inputs:
    """Pad every text to one length, as the implementation of DePT's authors needs for `A @ B`."""
    missing = length - batch["input_ids"].shape[1]
    padded = {name: nn.functional.pad(batch[name], (0, missing)) for name in ("input_ids", "attention_mask")}
    return batch | padded


def _bare(backbone: Backbone, more: int) -> Runner:
    """Return a runner for the bare backbone, whose input embeddings need a gradient like a prompt.

    It includes no look-up, offset, concatenation, projection or optimizer.
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
    """Return a runner for PEFT on the whole model. Images are input embeddings from the same projection.

    Args:
        backbone: Backbone with embedding matrix and projection.
        language: Model that PEFT wraps. LoRA changes it.
        prompt_length: Length for prompt tuning; 0 is LoRA.
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
    """Return runners that generate exactly this many tokens, for our methods and the bare backbone."""

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
    """Write JPEG images of COCO's usual size, 640 x 480, with random content."""
    paths = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        coarse = torch.randint(256, (60 * 80 * 3,), generator=generator, dtype=torch.uint8)
        image = Image.frombytes("RGB", (80, 60), coarse.numpy().tobytes()).resize((640, 480))
        paths.append(folder / f"{number:012d}.jpg")
        image.save(paths[-1], quality=90)
    return paths


def seeing(runner: Runner, vision: VisionEncoder, paths: Sequence[Path]) -> dict[str, Runner]:
    """Return two runners of a method: `cached` reads stored features, `live` decodes and encodes images."""
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
