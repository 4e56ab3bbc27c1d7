"""Adapters: the trained parameters of a model as two small files that fit one backbone.

The folder of an adapter contains `adapter.safetensors`, with the tensors, and `adapter.json`, which describes
the prompt, the backbone and the metrics. The visual projection is always saved, trained or not, because the
models on the Hub do not contain one.
"""

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from dept_vl._utils.errors import UsageError
from dept_vl._utils.io import check_noted, write_atomically, write_noted
from dept_vl._utils.printable import printable
from dept_vl._utils.tensors import check_parameters, copies, load_exactly, read_tensors, under
from dept_vl.adapters import authors
from dept_vl.adapters.card import CARD_FILE, TRAINING_FILE, model_card, training_of
from dept_vl.adapters.fingerprint import check_backbone, describe_backbone
from dept_vl.adapters.hub import ADAPTER_FILE, PEFT_CONFIG_FILE, TENSORS_FILE, adapter_folder, push
from dept_vl.adapters.schema import FORMAT_VERSION, described_method, read_description
from dept_vl.adapters.tensors import (
    check_described,
    count_parameters,
    count_trainable,
    filled,
    parts_of,
    tensors_of,
)
from dept_vl.models.base import FrozenBackbone
from dept_vl.models.prompted import PromptedModel
from dept_vl.prompts.dept import DePT, current_name
from dept_vl.prompts.methods import build
from dept_vl.tasks.base import QuestionCase


@dataclass(frozen=True)
class Adapter:
    """Trained tensors and their description.

    Attributes:
        prompt: Method and sizes of the prompt, as returned by `DePT.describe`; None if only parts of the
            backbone were trained.
        backbone: Name and options of the backbone and hashes of its frozen weights, as returned by
            `fingerprint.describe_backbone`. An adapter of DePT's authors has only the name, and their
            configuration as `official_config`.
        task: Task that the adapter was trained on.
        metrics: Metrics on the task's own scale.
        trainable_parameters: Number of trained parameters by group, in `total` and `without_projection`.
        tensors: Tensors by name: `prompt.*`, `visual_projection.*`, and the trained ones of `language.*`.
        format_version: Format version of the files. Older versions are converted when they are read.
        question_case: Letter case of the questions in training.
        answering: For tasks on your own data, by task name: the maximum answer length in tokens
            (`max_new_tokens`), and `facts` such as labels.

    Example:
        >>> import dept_vl
        >>> adapter = dept_vl.Adapter.load("runs/vqa/best")
        >>> adapter.task
        'vqav2'
        >>> model = adapter.build(dept_vl.load("runs/vqa").model.backbone)
    """

    prompt: dict[str, Any] | None
    backbone: dict[str, Any]
    task: str
    metrics: dict[str, float]
    trainable_parameters: dict[str, int]
    tensors: dict[str, Tensor] = field(repr=False)
    format_version: int = FORMAT_VERSION
    question_case: QuestionCase = "lower"
    answering: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: PromptedModel,
        *,
        task: str,
        metrics: Mapping[str, float],
        question_case: QuestionCase = "lower",
        answering: Mapping[str, Any] | None = None,
    ) -> "Adapter":
        """Return an adapter with copies of the trained tensors of a model."""
        prompt, backbone = model.prompt, model.backbone
        return cls(
            prompt=None if prompt is None else prompt.describe(),
            backbone=describe_backbone(backbone),
            task=task,
            metrics=dict(metrics),
            trainable_parameters=count_trainable(model),
            tensors=copies(tensors_of(model).items()),
            question_case=question_case,
            answering=dict(answering or {}),
        )

    @classmethod
    def of_prompt(
        cls, prompt: DePT, backbone: dict[str, Any], *, task: str, metrics: Mapping[str, float]
    ) -> "Adapter":
        """Return an adapter with a copy of a prompt, and this description of its backbone."""
        return cls(
            prompt=prompt.describe(),
            backbone=backbone,
            task=task,
            metrics={name: float(value) for name, value in metrics.items()},
            trainable_parameters=count_parameters(prompt.parameter_groups()),
            tensors=copies(prompt.named_parameters("prompt")),
        )

    def save(self, folder: str | Path) -> None:
        """Write `adapter.safetensors` and `adapter.json`, without leaving a half-written file on failure.

        Their checksums are written to `.checksums.json` in the same folder, and checked by `load`.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_noted(folder, self._contents())

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload adapter",
        token: str | bool | None = None,
        datasets: Sequence[str] = (),
        run: str | Path | None = None,
    ) -> str:
        """Upload both files and a model card to the Hub in one commit.

        Args:
            repo_id: Name of the repository (`user/adapter`), which is created if it does not exist.
            private: Whether a new repository is private; None for the owner's default.
            revision: Branch, which is created if it does not exist; None for the main branch.
            commit_message: Commit message.
            token: Token with write access; None uses the token of `hf auth login`.
            datasets: Hub names of the training datasets, for the card.
            run: Folder of the training run. Its options are uploaded too, without local paths, and shown on
                the card, so that the training can be repeated.

        Returns:
            URL of the commit.

        Raises:
            FileNotFoundError: If `run` is not the folder of a run.
            ValueError: If the run was trained on another task.
            PermissionError: If the token has no write access to the repository.
            ConnectionError: If the Hub is disabled (`HF_HUB_OFFLINE`).
        """
        files = self._contents()
        training = None
        if run is not None:
            training = training_of(Path(run), self.task)
            files[TRAINING_FILE] = (json.dumps(training, indent=2) + "\n").encode()
        from transformers.models.auto.modeling_auto import (
            MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as SEEING,
        )

        trained_on = self.backbone["fingerprint"] or {}
        whole = trained_on.get("class") or trained_on.get("model")  # attached, or of `--model`
        images = "vision" in trained_on or whole in SEEING.values()
        card = model_card(repo_id, self._description(), images=images, datasets=datasets, training=training)
        files[CARD_FILE] = card.encode()
        return push(repo_id, files, private=private, revision=revision, message=commit_message, token=token)

    def _description(self) -> dict[str, Any]:
        """Return the content of `adapter.json`."""
        left_out = {"tensors"} if self.answering else {"tensors", "answering"}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}

    def _contents(self) -> dict[str, bytes]:
        """Return the content of both files by file name; UsageError if a metric is not a finite number."""
        for name, value in self.metrics.items():
            if not math.isfinite(value):
                raise UsageError(f"the metric {name} is {value}; expected a finite number: leave it out")
        return {
            TENSORS_FILE: save(self.tensors, metadata={"format": "pt"}),
            ADAPTER_FILE: (json.dumps(self._description(), indent=2) + "\n").encode(),
        }

    @classmethod
    def load(cls, folder: str | Path) -> "Adapter":
        """Load an adapter from its folder and check its files.

        Raises:
            FileNotFoundError: If one of the two files is missing.
            ValueError: If a file is damaged, has an unknown format version or contains numbers that are not
                finite, or if the files do not belong together.
        """
        folder = Path(folder)
        for name in (ADAPTER_FILE, TENSORS_FILE):
            if not (folder / name).is_file():
                hint = ""
                if (folder / PEFT_CONFIG_FILE).is_file():
                    hint = "; files of PEFT's are read by dept_vl.adapters.peft.files.from_peft"
                raise FileNotFoundError(f"no adapter at {folder}: {name} is missing there{hint}")
        check_noted(folder / ADAPTER_FILE, folder / TENSORS_FILE)
        description = read_description(folder / ADAPTER_FILE)
        # JSON may have a whole number without a decimal point.
        description["metrics"] = {name: float(value) for name, value in description["metrics"].items()}
        tensors = read_tensors(folder / TENSORS_FILE)
        check_parameters(tensors, folder / TENSORS_FILE)
        if description["format_version"] != FORMAT_VERSION:
            tensors = {current_name(name): tensor for name, tensor in tensors.items()}
            description["format_version"] = FORMAT_VERSION
        adapter = cls(**description, tensors=tensors)
        try:
            order = adapter.backbone.get("object_order")
            check_described(tensors, adapter.prompt, adapter.trainable_parameters, order)
        except ValueError as error:
            raise ValueError(f"the adapter at {folder} is damaged: {error}") from None
        return adapter

    @classmethod
    def from_pretrained(
        cls, name_or_folder: str | Path, *, revision: str | None = None, token: str | bool | None = None
    ) -> "Adapter":
        """Load an adapter from its folder, from the folder of a run, or from the Hub.

        Args:
            name_or_folder: Folder, or name of a repository on the Hub (`user/adapter`). Files of the Hub are
                cached, and read from the cache when there is no network.
            revision: Branch, tag or commit of the repository.
            token: Token for private and gated repositories; None uses the token of `hf auth login`.

        Raises:
            FileNotFoundError: If the folder, repository or revision does not exist or contains no adapter, or
                if there is neither a network nor a cached copy.
            PermissionError: If the repository is gated, or the token is not accepted.
            ValueError: If `load` raises it, or if `revision` is given with a folder.
        """
        return cls.load(adapter_folder(name_or_folder, revision=revision, token=token))

    @classmethod
    def from_authors(cls, folder: str | Path, *, task: str, prompt_only: bool = False) -> "Adapter":
        """Load an adapter from the file format of DePT's authors (see `authors`).

        The files have no hashes of the backbone's weights, so `build` compares only the backbone's name and
        hidden size, and warns that the weights cannot be checked.

        Args:
            folder: Folder with `adapter_model.bin` and `adapter_config.json`.
            task: Task that the adapter was trained on, which the files do not record.
            prompt_only: Load only the soft prompt P, as plain prompt tuning. Required for files without A
                and B.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If a file is damaged, contains anything but tensors, or has no A and B while
                `prompt_only` is False.
        """
        method, tensors, config = authors.read(folder, prompt_only=prompt_only)
        groups = {name: [tensors[one] for one in group] for name, group in method.trained().items()}
        return cls(
            prompt=method.describe(),
            backbone=authors.describe_backbone(config),
            task=task,
            metrics={},
            trainable_parameters=count_parameters(groups),
            tensors={"prompt." + name: tensor for name, tensor in tensors.items()},
        )

    def to_authors(self, folder: str | Path) -> None:
        """Save the adapter in the file format of DePT's authors, whose code runs T5 on text.

        Raises:
            ValueError: If the tensors of the adapter are not exactly P, A and B.
        """
        expected = {"prompt." + name for name in authors.NAMES}
        if self.prompt is None or self.tensors.keys() != expected:
            raise ValueError(
                f"the authors' files hold {sorted(expected)} and nothing else; this adapter has "
                f"{sorted(self.tensors)}: keep it in its own format"
            )
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = authors.contents(
            under("prompt.", self.tensors),
            self.prompt,
            self.backbone["name"],
            self.backbone.get("official_config", {}),
        )
        for name, content in files.items():
            write_atomically(folder / name, content)

    from_official = from_authors
    """Former name of `from_authors`."""
    to_official = to_authors
    """Former name of `to_authors`."""

    def build(self, backbone: FrozenBackbone) -> PromptedModel:
        """Return the model of a backbone with this adapter.

        The weights of `backbone` stay as they are, so that several adapters can share it: parts that the
        adapter replaces (the visual projection; the language model of LoRA and BitFit) are copied.

        Raises:
            ValueError: If the adapter was trained on another backbone, or its tensors do not fit its
                description.
        """
        check_backbone(self.backbone, backbone)
        if any(name.startswith("language.") for name in self.tensors):
            backbone = copy.deepcopy(backbone)
        else:
            backbone = backbone.with_projection(copy.deepcopy(backbone.visual_projection))
        ranks = [tensor.shape[0] for name, tensor in self.tensors.items() if ".lora_A." in name]
        if ranks:
            backbone.add_lora(ranks[0])
        if self.prompt is not None and self.prompt["d_model"] != backbone.d_model:
            # Checked before anything of that width is allocated.
            raise ValueError(
                f"the adapter's prompt is {self.prompt['d_model']} wide and {backbone.name} is "
                f"{backbone.d_model} wide; load the backbone it was trained on"
            )
        prompt = None if self.prompt is None else build(described_method(self.prompt))
        model = PromptedModel(backbone, prompt)
        self.apply(model)
        # Trained parts stay trainable, and are saved again.
        trained = sum(name.startswith("language.") for name in self.tensors)
        whole = trained == sum(1 for _ in backbone.language.parameters())
        backbone.freeze(
            language=not trained,
            visual_projection="visual_projection" not in self.trainable_parameters,
            but="lora" if ranks else "all" if whole else "biases",
        )
        return model

    def build_prompt(self) -> DePT:
        """Return the trained prompt without a backbone.

        Raises:
            ValueError: If the adapter has no prompt, or its tensors do not fit its description.
        """
        if self.prompt is None:
            raise ValueError(f"this adapter of {printable(self.backbone['name'])} holds no prompt")
        tensors = under("prompt.", self.tensors)
        return filled(described_method(self.prompt), tensors, "the adapter's prompt")

    def apply(self, model: PromptedModel) -> None:
        """Copy the adapter's tensors into a model with the same prompt and backbone."""
        parts = parts_of(model)
        unknown = [name for name in self.tensors if not name.startswith(tuple(parts))]
        if unknown:
            raise ValueError(f"the adapter has tensors of unknown parts: {unknown[:3]}")
        for prefix, module in parts.items():
            state = under(prefix, self.tensors)
            if module is None or (not state and module is model.backbone.language):
                continue
            if module is model.backbone.language:  # the adapter may have only a part of its tensors
                state = dict(module.named_parameters()) | state
            load_exactly(module, state, "the adapter's", prefix)
