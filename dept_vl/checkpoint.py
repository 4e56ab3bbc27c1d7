"""The adapter: what training changed, as a small file that fits one backbone.

A folder with `adapter.safetensors` (soft_prompt, lora_a, lora_b, and the visual projection, trained
or not, because a projection is no part of the models on the Hub) and `adapter.json`, which says what
they are, for which backbone, and how well they do.
"""

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from dept_vl import official
from dept_vl.backbone import Backbone
from dept_vl.dept import DePT
from dept_vl.model import PromptedModel

FORMAT_VERSION = 1
TENSORS_FILE = "adapter.safetensors"
CONFIG_FILE = "adapter.json"


@dataclass(frozen=True)
class Adapter:
    """Trained tensors and their description.

    Attributes:
        prompt: Sizes of the prompt (`prompt_length`, `rank`, `max_source_length`, `d_model`,
            `alpha`, `scale`); None if only the backbone's own parts were trained.
        backbone: Its name, the hashes of its frozen weights and `visual_position_bias`. The authors'
            files tell the name alone: of theirs the rest is None, and `official_config` is kept.
        task: The task it was trained on.
        metrics: Figures, on the task's own scale.
        trainable_parameters: How many were trained, by group, `total` and `without_projection`.
        tensors: By name: `prompt.*`, `visual_projection.*`, and `language.*` after full fine-tuning.
        format_version: Of the two files.
    """

    prompt: dict[str, Any] | None
    backbone: dict[str, Any]
    task: str
    metrics: dict[str, float]
    trainable_parameters: dict[str, int]
    tensors: dict[str, Tensor] = field(repr=False)
    format_version: int = FORMAT_VERSION

    @classmethod
    def of(cls, model: PromptedModel, *, task: str, metrics: Mapping[str, float]) -> "Adapter":
        """Copy what is trained out of a model."""
        prompt, backbone = model.prompt, model.backbone
        return cls(
            prompt=None if prompt is None else _sizes(prompt),
            backbone=_identity(backbone),
            task=task,
            metrics=dict(metrics),
            trainable_parameters=count_trainable(model),
            tensors={
                name: tensor.detach().to("cpu", copy=True).contiguous()
                for name, tensor in _adapter_tensors(model).items()
            },
        )

    def save(self, folder: str | Path) -> None:
        """Write both files, each beside its final name first, so that no half-written one is left."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        description = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "tensors"}
        write_atomically(folder / TENSORS_FILE, save(self.tensors, metadata={"format": "pt"}))
        write_atomically(folder / CONFIG_FILE, (json.dumps(description, indent=2) + "\n").encode())

    @classmethod
    def load(cls, folder: str | Path) -> "Adapter":
        """Read both files.

        Raises:
            FileNotFoundError: If one is missing.
            ValueError: If one is damaged, of another format version, or they do not belong together.
        """
        folder = Path(folder)
        for name in (CONFIG_FILE, TENSORS_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"no adapter at {folder}: {name} is missing there")
        try:
            description = json.loads((folder / CONFIG_FILE).read_text())
            tensors = load_file(folder / TENSORS_FILE)
        except (ValueError, SafetensorError) as error:
            raise ValueError(f"the adapter at {folder} is damaged: {error}") from None
        if not isinstance(description, dict):
            raise ValueError(f"the adapter at {folder} is damaged: {CONFIG_FILE} holds no JSON object")
        found = description.get("format_version")
        if found != FORMAT_VERSION:
            raise ValueError(
                f"the adapter at {folder} has format version {found}; this dept_vl reads "
                f"{FORMAT_VERSION}: use the dept_vl that wrote it"
            )
        expected = {f.name for f in fields(cls)} - {"tensors"}
        if description.keys() != expected:
            raise ValueError(
                f"the adapter at {folder} is damaged: expected {sorted(expected)} in {CONFIG_FILE}, "
                f"found {sorted(description)}"
            )
        return cls(**description, tensors=tensors)

    @classmethod
    def from_official(cls, folder: str | Path, *, task: str, prompt_only: bool = False) -> "Adapter":
        """Read an adapter in the files of the authors of DePT (see `official`).

        The files do not say which weights the adapter belongs to: `build` compares the backbone's
        name and width alone and warns of it.

        Args:
            folder: Holds `adapter_model.bin` and `adapter_config.json`.
            task: The task it was trained on, of which the files say nothing.
            prompt_only: Take the soft prompt P alone, as plain prompt tuning. Files without A and B
                are refused otherwise.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If one is damaged, holds anything but tensors, or holds P alone unasked.
        """
        tensors, config = official.read(folder, prompt_only=prompt_only)
        with torch.device("meta"):  # for its sizes alone
            prompt = DePT(
                config["token_dim"],
                prompt_length=config["num_virtual_tokens"],
                rank=0 if prompt_only else config["r"],
                max_source_length=config["max_length"],
                alpha=float(config["lora_alpha"]),
            )
        return cls(
            prompt=_sizes(prompt),
            backbone={
                "name": config["base_model_name_or_path"],
                "fingerprint": None,
                "visual_position_bias": None,
                "official_config": config,
            },
            task=task,
            metrics={},
            trainable_parameters=_count(prompt.parameter_groups()),
            tensors={"prompt." + name: tensor for name, tensor in tensors.items()},
        )

    def to_official(self, folder: str | Path) -> None:
        """Write the adapter in the files of the authors of DePT, whose code runs T5 on text.

        Raises:
            ValueError: If it is more or less than P, A and B, which is all that they hold.
        """
        expected = {"prompt." + name for name in official.NAMES}
        if self.prompt is None or self.tensors.keys() != expected:
            raise ValueError(
                f"the authors' files hold {sorted(expected)} and nothing else; this adapter has "
                f"{sorted(self.tensors)}: keep it in its own format"
            )
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = official.contents(
            {name.removeprefix("prompt."): tensor for name, tensor in self.tensors.items()},
            self.prompt,
            self.backbone["name"],
            self.backbone.get("official_config", {}),
        )
        for name, content in files.items():
            write_atomically(folder / name, content)

    def build(self, backbone: Backbone) -> PromptedModel:
        """A model with this adapter on its backbone.

        Raises:
            ValueError: If this is another backbone, or the tensors are not those described.
        """
        self._check_backbone(backbone)
        prompt = None
        if self.prompt is not None:
            sizes = {key: value for key, value in self.prompt.items() if key not in ("d_model", "scale")}
            prompt = DePT(self.prompt["d_model"], **sizes)
        model = PromptedModel(backbone, prompt)
        self.apply(model)
        return model

    def apply(self, model: PromptedModel) -> None:
        """Put the tensors into a model built alike."""
        parts = _parts(model)
        unknown = [name for name in self.tensors if not name.startswith(tuple(parts))]
        if unknown:
            raise ValueError(f"the adapter holds tensors of no known part: {unknown[:3]}")
        for prefix, module in parts.items():
            state = {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}
            if module is None or (not state and module is model.backbone.language):
                continue
            _load_exactly(module, state, prefix)

    def _check_backbone(self, backbone: Backbone) -> None:
        if self.backbone["fingerprint"] is None:
            self._check_name(backbone)
            return
        here = _identity(backbone)
        compared = ("fingerprint", "visual_position_bias")
        if any(self.backbone[key] != here[key] for key in compared):
            raise ValueError(
                f"this adapter was trained on {self.backbone['name']} "
                f"(fingerprint {self.backbone['fingerprint']}, visual_position_bias "
                f"{self.backbone['visual_position_bias']}) and does not fit {here['name']} "
                f"(fingerprint {here['fingerprint']}, visual_position_bias "
                f"{here['visual_position_bias']}); load the backbone it was trained on"
            )

    def _check_name(self, backbone: Backbone) -> None:
        """All that can be compared where the weights are not on record; `PromptedModel` adds the width."""
        name = self.backbone["name"]
        if backbone.vision is not None:
            raise ValueError(
                f"this adapter was trained on {name} for text alone and does not fit {backbone.name}, "
                "which has a vision tower; load the language model without one"
            )
        # "t5-base" is "google-t5/t5-base" on the Hub now, and any folder of that name on a disk.
        if Path(name).name != Path(backbone.name).name:
            raise ValueError(
                f"this adapter was trained on {name} and does not fit {backbone.name}; load {name}, or set "
                "backbone.name if this is the same model under another name"
            )
        warnings.warn(
            f"the authors' files do not say on which weights of {name} this adapter was trained; of "
            f"{backbone.name} only the name and the width were compared",
            stacklevel=4,
        )


def count_trainable(model: PromptedModel) -> dict[str, int]:
    """Trained parameters by group, in all, and without the visual projection."""
    return _count(model.parameter_groups())


def _count(parameter_groups: Mapping[str, list[nn.Parameter]]) -> dict[str, int]:
    groups = {name: sum(p.numel() for p in group) for name, group in parameter_groups.items() if group}
    total = sum(groups.values())
    return {
        **groups,
        "total": total,
        "without_projection": total - groups.get("visual_projection", 0),
    }


def _parts(model: PromptedModel) -> dict[str, nn.Module | None]:
    """The modules that an adapter may hold, by the prefix of their tensors in the file."""
    return {
        "prompt.": model.prompt,
        "visual_projection.": model.backbone.visual_projection,
        "language.": model.backbone.language,
    }


def _adapter_tensors(model: PromptedModel) -> dict[str, Tensor]:
    return {
        prefix + name: parameter
        for prefix, module in _parts(model).items()
        if module is not None
        for name, parameter in module.named_parameters()
        if parameter.requires_grad or module is model.backbone.visual_projection
    }


def _load_exactly(module: nn.Module, state: dict[str, Tensor], prefix: str) -> None:
    own = dict(module.named_parameters())
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    reshaped = [
        f"{prefix}{name}: expected {tuple(own[name].shape)}, found {tuple(state[name].shape)}"
        for name in own.keys() & state.keys()
        if own[name].shape != state[name].shape
    ]
    if missing or extra or reshaped:
        raise ValueError(
            f"the adapter's tensors are not those of the model: missing {missing}, extra {extra}, "
            f"other shapes {reshaped}"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])


def _sizes(prompt: DePT) -> dict[str, Any]:
    return {
        "prompt_length": prompt.prompt_length,
        "rank": prompt.rank,
        "max_source_length": prompt.max_source_length,
        "d_model": prompt.d_model,
        "alpha": prompt.alpha,
        "scale": prompt.scale,
    }


def _identity(backbone: Backbone) -> dict[str, Any]:
    return {
        "name": backbone.name,
        "fingerprint": backbone.fingerprint,
        "visual_position_bias": backbone.visual_position_bias,
    }


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file beside its place, flush it to the disk, and rename it: whole or not at all.

    Raises:
        OSError: If it cannot be written, naming the file; what was there before is untouched.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with writing(path), partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        # A full disk has no room for a part either.
        with suppress(OSError):
            partial.unlink()
        raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file in errors of writing it, where the system says only that there is no space left."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            error.filename = str(path)
        raise
