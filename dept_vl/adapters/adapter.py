"""The adapter: what training changed, as a small file that fits one backbone.

A folder with `adapter.safetensors` (the prompt's tensors, as `Method.trained` has them, and the visual
projection, trained or not, because a projection is no part of the models on the Hub) and `adapter.json`,
which says what they are, for which backbone, and how well they do.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from dept_vl._utils.io import check_noted, write_atomically, write_noted
from dept_vl._utils.printable import printable
from dept_vl._utils.tensors import check_parameters, copies, load_exactly, read_tensors, under
from dept_vl.adapters import authors
from dept_vl.adapters.card import CARD_FILE, TRAINING_FILE, model_card, training_of
from dept_vl.adapters.fingerprint import check_backbone, describe_backbone
from dept_vl.adapters.hub import ADAPTER_FILE, PEFT_CONFIG_FILE, TENSORS_FILE, adapter_folder, push
from dept_vl.adapters.schema import FORMAT_VERSION, described_method, read_description
from dept_vl.adapters.tensors import check_described, count_parameters, count_trainable, parts_of, tensors_of
from dept_vl.models.base import FrozenBackbone
from dept_vl.models.prompted import PromptedModel
from dept_vl.prompts.dept import DePT, current_name
from dept_vl.prompts.methods import build
from dept_vl.tasks.base import QuestionCase


@dataclass(frozen=True)
class Adapter:
    """Trained tensors and their description.

    Attributes:
        prompt: Method and sizes of the prompt (`method`, `prompt_length`, `rank`, `max_source_length`,
            `d_model`, `alpha`, `scale`, and the `seed` of what is random and frozen), as
            `DePT.describe` gives them; None if only the backbone's own parts were trained.
        backbone: Its name, the hashes of its frozen weights, `visual_position_bias`, `object_order`,
            `visual_norm`, `image_fit`, and what is read of the image encoder (`vision`, as
            `VisionEncoder.options`). The authors' files tell the name alone: of theirs the rest is None, and
            `official_config` is kept.
        task: The task it was trained on.
        metrics: Figures, on the task's own scale.
        trainable_parameters: How many were trained, by group, `total` and `without_projection`.
        tensors: By name: `prompt.*`, `visual_projection.*`, and what was trained of
            `language.*`.
        format_version: Of the two files; those of an older version are read into the newest.
        question_case: In which questions were read.
        answering: Of your own data, by the task's name: the longest answer in tokens (`max_new_tokens`), and
            `facts` such as labels.

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
        """Copy what is trained out of a model."""
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
        """Copy a prompt that is trained on a model of someone else's (see `attach`).

        Args:
            prompt: Of which all is kept.
            backbone: What the attribute of that name says of the model.
            task: The task it was trained on.
            metrics: Figures, on the task's own scale.
        """
        return cls(
            prompt=prompt.describe(),
            backbone=backbone,
            task=task,
            metrics=dict(metrics),
            trainable_parameters=count_parameters(prompt.parameter_groups()),
            tensors=copies(prompt.named_parameters("prompt")),
        )

    def save(self, folder: str | Path) -> None:
        """Write both files, each beside its final name first, so that no half-written one is left.

        Their checksums stand in `.checksums.json` beside them, and are compared where they are loaded.
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
        """Upload both files and a model card in one commit.

        Args:
            repo_id: Name of the repository (`user/adapter`), made if it is missing.
            private: Of a repository that is made; None is the owner's default.
            revision: Branch, made if it is missing; None is the main one.
            commit_message: Of the commit.
            token: With the right to write; None takes the one of `hf auth login`.
            datasets: For the card: names on the Hub of what the adapter was trained on.
            run: Folder of the run that made it, whose options go along, without this machine's paths: for
                the card, and to repeat it.

        Returns:
            The commit's address.

        Raises:
            FileNotFoundError: If there is no such run.
            ValueError: If the run was of another task.
            PermissionError: If the token may not write there.
            ConnectionError: If the Hub is switched off (`HF_HUB_OFFLINE`).
        """
        files = self._contents()
        training = None
        if run is not None:
            training = training_of(Path(run), self.task)
            files[TRAINING_FILE] = (json.dumps(training, indent=2) + "\n").encode()
        trained_on = self.backbone["fingerprint"] or {}
        images = "vision" in trained_on or "class" in trained_on  # the latter: see `attach`
        card = model_card(repo_id, self._description(), images=images, datasets=datasets, training=training)
        files[CARD_FILE] = card.encode()
        return push(repo_id, files, private=private, revision=revision, message=commit_message, token=token)

    def _description(self) -> dict[str, Any]:
        """What `adapter.json` says."""
        left_out = {"tensors"} if self.answering else {"tensors", "answering"}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}

    def _contents(self) -> dict[str, bytes]:
        """Both files, by name."""
        return {
            TENSORS_FILE: save(self.tensors, metadata={"format": "pt"}),
            ADAPTER_FILE: (json.dumps(self._description(), indent=2) + "\n").encode(),
        }

    @classmethod
    def load(cls, folder: str | Path) -> "Adapter":
        """Read both files, and see to it that they are what they say.

        Raises:
            FileNotFoundError: If one is missing.
            ValueError: If one is damaged, of another format version, holds numbers that are not finite, or
                they do not belong together.
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
        # JSON writes a whole number without its point.
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
        """Read an adapter from its folder, from the run that made it, or from the Hub.

        Args:
            name_or_folder: A folder, or the name of a repository on the Hub (`user/adapter`), whose files
                are kept in the Hub's cache and read from there where there is no network.
            revision: Branch, tag or commit of the repository.
            token: For private and gated repositories; None takes the one of `hf auth login`.

        Raises:
            FileNotFoundError: If there is no such folder, repository or revision, no adapter in it, or
                neither network nor a copy in the cache.
            PermissionError: If the repository is gated, or the token is not accepted.
            ValueError: As `load`; or if a folder is asked for a revision.
        """
        return cls.load(adapter_folder(name_or_folder, revision=revision, token=token))

    @classmethod
    def from_authors(cls, folder: str | Path, *, task: str, prompt_only: bool = False) -> "Adapter":
        """Read an adapter in the files of the authors of DePT (see `authors`).

        The files do not say which weights the adapter belongs to: `build` compares the backbone's
        name and width alone and warns of it.

        Args:
            folder: Holds `adapter_model.bin` and `adapter_config.json`.
            task: The task it was trained on, of which the files say nothing.
            prompt_only: Take the soft prompt P alone, as plain prompt tuning. Files without A and B
                are rejected otherwise.

        Raises:
            FileNotFoundError: If a file is missing.
            ValueError: If one is damaged, holds anything but tensors, or holds P alone unasked.
        """
        tensors, config = authors.read(folder, prompt_only=prompt_only)
        with torch.device("meta"):  # for its sizes alone
            prompt = DePT(
                config["token_dim"],
                prompt_length=config["num_virtual_tokens"],
                rank=0 if prompt_only else config["r"],
                max_source_length=config["max_length"],
                alpha=float(config["lora_alpha"]),
            )
        return cls(
            prompt=prompt.describe(),
            backbone=authors.describe_backbone(config),
            task=task,
            metrics={},
            trainable_parameters=count_parameters(prompt.parameter_groups()),
            tensors={"prompt." + name: tensor for name, tensor in tensors.items()},
        )

    def to_authors(self, folder: str | Path) -> None:
        """Write the adapter in the files of the authors of DePT, whose code runs T5 on text.

        Raises:
            ValueError: If it is more or less than P, A and B, which is all that they hold.
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
    """Earlier name of `from_authors`."""
    to_official = to_authors
    """Earlier name of `to_authors`."""

    def build(self, backbone: FrozenBackbone) -> PromptedModel:
        """A model with this adapter on its backbone.

        Raises:
            ValueError: If this is another backbone, or the tensors are not those described.
        """
        self.check_backbone(backbone)
        ranks = [tensor.shape[0] for name, tensor in self.tensors.items() if ".lora_A." in name]
        if ranks:
            backbone.add_lora(ranks[0])
        if self.prompt is not None and self.prompt["d_model"] != backbone.d_model:
            # Before anything of that width is made.
            raise ValueError(
                f"the adapter's prompt is {self.prompt['d_model']} wide and {backbone.name} is "
                f"{backbone.d_model} wide; load the backbone it was trained on"
            )
        model = PromptedModel(backbone, None if self.prompt is None else self.new_prompt())
        self.apply(model)
        # What was trained may be trained on, and is saved again.
        trained = sum(name.startswith("language.") for name in self.tensors)
        whole = trained == sum(1 for _ in backbone.language.parameters())
        backbone.freeze(
            language=not trained,
            visual_projection="visual_projection" not in self.trainable_parameters,
            but="lora" if ranks else "all" if whole else "biases",
        )
        return model

    def build_prompt(self) -> DePT:
        """The prompt alone, with its tensors.

        Raises:
            ValueError: If the tensors are not those described.
        """
        prompt = self.new_prompt()
        load_exactly(prompt, under("prompt.", self.tensors), "the adapter's", "prompt.")
        return prompt

    def new_prompt(self) -> DePT:
        """A prompt of the method and sizes described, not yet with the tensors.

        Raises:
            ValueError: If there is no prompt in the adapter.
        """
        if self.prompt is None:
            raise ValueError(f"this adapter of {printable(self.backbone['name'])} holds no prompt")
        return build(described_method(self.prompt))

    def apply(self, model: PromptedModel) -> None:
        """Put the tensors into a model built alike."""
        parts = parts_of(model)
        unknown = [name for name in self.tensors if not name.startswith(tuple(parts))]
        if unknown:
            raise ValueError(f"the adapter holds tensors of no known part: {unknown[:3]}")
        for prefix, module in parts.items():
            state = under(prefix, self.tensors)
            if module is None or (not state and module is model.backbone.language):
                continue
            if module is model.backbone.language:  # of which a part may be trained
                state = dict(module.named_parameters()) | state
            load_exactly(module, state, "the adapter's", prefix)

    def check_backbone(self, backbone: FrozenBackbone) -> None:
        """Raise a `ValueError` for any backbone but the one that the adapter was trained on."""
        check_backbone(self.backbone, backbone)
