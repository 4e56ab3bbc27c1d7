"""DePT as a method of PEFT: `import dept_vl.adapters.peft.plugin`, then use `DeptConfig` like a `LoraConfig`.

In an encoder-decoder for text alone, the tuner wraps the encoder (`DeptLayer`), because encoders create
their masks before they embed the tokens. A hook on the decoder extends the cross-attention mask by the
prompt. In all other models it wraps the word embeddings (`DeptWords`), and hooks on the model's calls insert
placeholders (`adapters.calls`). The README of `adapters` has what each supports. Tensors are named
`<wrapped>.dept_prompt.<adapter>.{soft_prompt,offset_a,offset_b}`. Written for PEFT 0.21.
"""

import enum
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, cast, get_args

import torch
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from dept_vl.adapters.base_model import check_base, describe_base, device_of
from dept_vl.adapters.calls import CONTAINER, refuse_second
from dept_vl.adapters.families import Parts, tokens_of
from dept_vl.adapters.peft.files import (
    PEFT_TYPE,
    add_use,
    base_record,
    is_text_encoder_decoder,
    wrapped,
)
from dept_vl.adapters.peft.layer import (
    BASE,
    DeptLayer,
    DeptTunerLayer,
    DeptWords,
    hide_unused,
    refuse_merging,
    tell_adapter_names,
)
from dept_vl.models.checks import check_tokenizer, load_tokenizer
from dept_vl.models.language import LanguageModel
from dept_vl.models.prompt_hook import words_of
from dept_vl.prompts.base import LARGEST_SIZE, METHODS, Init
from dept_vl.prompts.dept import DePT, current_name
from dept_vl.prompts.initialise import initialise

INITS = get_args(Init)


class DeptType(str, enum.Enum):  # noqa: UP042  PEFT takes the name from str()
    """Name of the method, because PEFT's own enumeration cannot be extended."""

    DEPT = PEFT_TYPE


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class DeptConfig(PeftConfig):  # type: ignore[misc]
    """Configuration of DePT for `get_peft_model`. The metadata of each field has its description.

    Raises:
        ValueError: If a value is out of range or does not fit the others.
    """

    prompt_length: int = _option(60, "Vectors in the soft prompt (m); 0 for the offset alone.")
    rank: int | None = _option(
        None, "Rank of the offset (r); 0 is plain prompt tuning, None takes what the budget leaves."
    )
    max_source_length: int = _option(
        256, "Longest text in tokens (s); of encoder-decoders of text, padding counts."
    )
    alpha: float = _option(8.0, "The offset is scaled by alpha / sqrt(rank).")
    reference_prompt_length: int = _option(
        100, "Where rank is None: the plain prompt whose parameters may be spent."
    )
    prompt_init: str = _option(
        "vocabulary", "Start from random words of the vocabulary, from a text, or random."
    )
    prompt_init_text: str | None = _option(None, "The text, repeated or cut to the prompt's length.")
    tokenizer_name_or_path: str | None = _option(None, "Tokenizer of the text.")
    init_weights: bool = _option(
        True, "False starts B away from zero, so that the offset is there before any training; for tests."
    )
    modules_to_save: list[str] | None = _option(
        None, "Modules of the base model that are trained and saved as well."
    )
    trainable_token_indices: dict[str, list[int]] | None = _option(
        None, "Tokens whose embeddings are trained and saved as well, by module: of the decoder."
    )
    target_modules: list[str] | str | None = _option(None, "Not for DePT, which finds what it wraps.")
    base_fingerprint: dict[str, str] | None = _option(
        None, "Of the base's weights; taken from the base, and compared on loading."
    )
    embedding_fingerprint: str | None = _option(None, "The same, as older versions wrote it.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = DeptType.DEPT
        least = {"prompt_length": 0, "rank": 0, "max_source_length": 1, "reference_prompt_length": 1}
        for name, smallest in least.items():
            value = getattr(self, name)
            if name == "rank" and value is None:
                continue
            if type(value) is not int or not smallest <= value <= LARGEST_SIZE:
                raise ValueError(
                    f"DeptConfig.{name} is a whole number of {smallest} to {LARGEST_SIZE:,}; got "
                    f"{value!r:.60}"
                )
        if self.prompt_length == self.rank == 0:
            raise ValueError("DeptConfig has prompt_length=0 and rank=0: nothing to train; raise one of them")
        if self.rank is None and self.prompt_length > self.reference_prompt_length:
            raise ValueError(
                f"a prompt of prompt_length={self.prompt_length} alone is over the budget of "
                f"reference_prompt_length={self.reference_prompt_length}; shorten it, or set rank yourself"
            )
        if isinstance(self.alpha, bool | str) or not math.isfinite(self.alpha):
            raise ValueError(f"DeptConfig.alpha is a finite number; got {self.alpha!r:.60}")
        self.alpha = float(self.alpha)
        if self.prompt_init not in INITS:
            raise ValueError(f"DeptConfig.prompt_init is one of {INITS}; got {self.prompt_init!r:.60}")
        has_text = self.prompt_init_text is not None and self.tokenizer_name_or_path is not None
        if self.prompt_init == "text" and not has_text:
            raise ValueError(
                "prompt_init='text' needs prompt_init_text and tokenizer_name_or_path; got "
                f"{self.prompt_init_text!r:.60} and {self.tokenizer_name_or_path!r:.60}"
            )
        if self.target_modules is not None:
            raise ValueError(
                "DePT finds by itself what it wraps; leave target_modules out (got "
                f"{self.target_modules!r:.100})"
            )

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save `adapter_config.json`, and add usage to the model card if the folder has an adapter."""
        super().save_pretrained(save_directory, **kwargs)
        folder = Path(save_directory)
        if any(folder.glob("adapter_model.*")):
            add_use(folder, self.task_type, self.base_model_name_or_path)


class DeptModel(BaseTuner):  # type: ignore[misc]
    """Tuner of PEFT that adds prompts to a model and removes them."""

    prefix = "dept_"
    tuner_layer_cls = DeptTunerLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  PEFT's name and form

    def _check_merge_allowed(self) -> NoReturn:
        refuse_merging()

    def unmerge_adapter(self) -> None:
        """Do nothing, because prompts are never merged."""

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise a `ValueError`; prompts cannot be added."""
        raise ValueError(
            "prompts cannot be added up: the m vectors of a prompt have no counterparts in another, and A @ "
            "B of two adapters has twice the rank; train one prompt on both tasks, or mix rows by "
            "adapter_names"
        )

    def _check_new_adapter_config(self, config: DeptConfig) -> None:
        super()._check_new_adapter_config(config)
        check_length(self.model, config.prompt_length)
        # An adapter for further training, or a configuration that is used again, may be on another base.
        strict = config.inference_mode
        check_base(
            base_record(config.base_fingerprint, config.embedding_fingerprint),
            self.model,
            trained_on=config.base_model_name_or_path,
            adapter="this adapter" if strict else "the adapter of this configuration",
            strict=strict,
        )

    def _prepare_adapter_config(self, peft_config: DeptConfig, model_config: dict[str, Any]) -> DeptConfig:
        if peft_config.rank is None:
            width = words_of(self.model).embedding_dim
            _, rank = METHODS["dept"].solve(
                d_model=width,
                max_source_length=peft_config.max_source_length,
                reference_prompt_length=peft_config.reference_prompt_length,
                prompt_length=peft_config.prompt_length,
            )
            if rank == peft_config.prompt_length == 0:
                raise ValueError(
                    f"reference_prompt_length={peft_config.reference_prompt_length} buys no rank at "
                    f"max_source_length={peft_config.max_source_length}; raise it"
                )
            peft_config.rank = rank
        return peft_config

    def _check_target_module_exists(self, peft_config: DeptConfig, key: str) -> bool:
        return self.model.get_submodule(key) is wrapped(self.model)

    def _create_and_replace(
        self,
        peft_config: DeptConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        prompt = _new_prompt(peft_config, self.model)
        if fingerprint := describe_base(self.model):
            peft_config.base_fingerprint, peft_config.embedding_fingerprint = fingerprint, None
        layer = target
        if not isinstance(layer, DeptTunerLayer):
            refuse_second(self.model)
            of_text = is_text_encoder_decoder(self.model)
            layer = DeptLayer(target, self.model.get_decoder()) if of_text else DeptWords(self.model)
            layer.set_adapter(self.active_adapters)
        layer.update_layer(adapter_name, prompt, inference_mode=peft_config.inference_mode)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: object
    ) -> None:
        setattr(parent, child_name, new_module)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: DeptConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Rename tensors of our own adapters, and of older versions that wrapped another module."""
        layer = next(name for name, module in model.named_modules() if isinstance(module, DeptTunerLayer))
        of_prompt = re.compile(rf"^(prompt\.|(.*\.)?{CONTAINER}\.)")
        renamed = {
            f"{layer}.{CONTAINER}.{current_name(of_prompt.sub('', name))}"
            if of_prompt.match(name)
            else name: t
            for name, t in state_dict.items()
        }
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, renamed
        )
        return remapped

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Pass `adapter_names` to the modules that need them, during one call of forward or generate."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        if not is_text_encoder_decoder(self.model):
            raise ValueError(
                "in PEFT, rows with different prompts (adapter_names) are for encoder-decoders of text, and "
                f"{type(self.model).__name__} is none: choose one prompt by set_adapter, or mix rows by "
                "dept_vl.load with several adapters"
            )
        layer = self.model.get_encoder()
        unknown = sorted(set(names) - layer.dept_prompt.keys() - {BASE})
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        tell = partial(tell_adapter_names, adapter_names=list(names))
        hide = partial(hide_unused, prompt_lengths=layer.prompt_lengths(names))
        listeners = [m for m in self.modules() if isinstance(m, DeptLayer | AuxiliaryTrainingWrapper)]
        handles = [module.register_forward_pre_hook(tell, with_kwargs=True) for module in listeners]
        handles.append(self.model.get_decoder().register_forward_pre_hook(hide, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def create_dept_optimizer(
    model: PeftModel,
    optimizer_cls: type[torch.optim.Optimizer],
    *,
    prompt_lr: float,
    offset_lr: float,
    **kwargs: Any,
) -> torch.optim.Optimizer:
    """Return an optimizer with DePT's two learning rates, for `Trainer(optimizers=(optimizer, None))`.

    Args:
        model: Model with a trainable prompt.
        optimizer_cls: Class of the optimizer, such as `torch.optim.AdamW`.
        prompt_lr: Learning rate of the soft prompt (alpha1; start with 0.3).
        offset_lr: Learning rate of the low-rank pair (alpha2; 1e-4 to 5e-3), and of all other trainable
            parameters unless `lr` is given.
        **kwargs: Further arguments of the optimizer.

    Raises:
        ValueError: If the model has no trainable prompt.
    """
    prompts = [module for module in model.modules() if isinstance(module, DePT)]
    named = [group for prompt in prompts for group in prompt.parameter_groups().items()]
    groups = {
        name: [p for other, group in named if other == name for p in group if p.requires_grad]
        for name in ("prompt", "low_rank")
    }
    if not any(groups.values()):
        raise ValueError(
            "the model has no trainable prompt; make it with get_peft_model, or load it with "
            "is_trainable=True"
        )
    of_dept = {id(p) for group in groups.values() for p in group}
    groups["others"] = [p for p in model.parameters() if p.requires_grad and id(p) not in of_dept]
    rates = {"prompt": prompt_lr, "low_rank": offset_lr, "others": kwargs.pop("lr", offset_lr)}
    return optimizer_cls(
        [{"params": group, "lr": rates[name], "name": name} for name, group in groups.items() if group],
        **kwargs,
    )


def check_length(model: nn.Module, prompt_length: int) -> None:
    """Raise ValueError if a model is not supported, or has too few positions for a prompt of this length."""
    if is_text_encoder_decoder(model):
        _language(model).check_length(prompt_length, 1)
    else:
        Parts.of(model).check_length(prompt_length, 1)


def _language(model: nn.Module) -> LanguageModel:
    """Return the text encoder of an encoder-decoder without the PEFT wrapper."""
    encoder = cast(PreTrainedModel, model).get_encoder()
    encoder = encoder.base_layer if isinstance(encoder, DeptLayer) else encoder
    return LanguageModel(encoder, encoder, type(model).__name__)


def _new_prompt(config: DeptConfig, model: PreTrainedModel) -> DePT:
    """Return an initialised prompt for a configuration."""
    words = words_of(model)
    assert config.rank is not None  # solved in `_prepare_adapter_config`
    prompt = DePT(
        words.embedding_dim,
        prompt_length=config.prompt_length,
        rank=config.rank,
        max_source_length=config.max_source_length,
        alpha=config.alpha,
    )
    if not config.init_weights and prompt.offset_b is not None:
        nn.init.normal_(prompt.offset_b)
    tokenizer = None
    if config.prompt_init == "text":
        if config.inference_mode:  # the initial vectors are replaced by those of the loaded adapter
            return prompt
        tokenizer = load_tokenizer(str(config.tokenizer_name_or_path))
        check_tokenizer(tokenizer, model, str(config.tokenizer_name_or_path))
    of_text = is_text_encoder_decoder(model)
    initialise(
        prompt,
        cast(Init, config.prompt_init),
        lambda ids: (_language(model).embed if of_text else words)(ids[None].to(device_of(words)))[0],
        vocabulary_size=words.num_embeddings,
        special_tokens=[token for _, token in tokens_of(model.config.to_dict())],
        tokenizer=tokenizer,
        text=config.prompt_init_text or "",
    )
    return prompt


PEFT_TYPE_TO_CONFIG_MAPPING[DeptType.DEPT] = DeptConfig
PEFT_TYPE_TO_TUNER_MAPPING[DeptType.DEPT] = DeptModel
PEFT_TYPE_TO_PREFIX_MAPPING[DeptType.DEPT] = DeptModel.prefix
