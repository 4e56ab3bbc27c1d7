"""Models of transformers that a prompt can be attached to, with the properties that the hooks need."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto as auto

from dept_vl.adapters.adapter import Adapter
from dept_vl.adapters.base_model import check_base, describe_base
from dept_vl.models.language import check_positions
from dept_vl.models.prompt_hook import is_encoder_decoder, words_of
from dept_vl.models.tokens import IGNORE_INDEX

OF_IMAGES = "AutoModelForImageTextToText"
SUPPORTED = {
    OF_IMAGES: auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "AutoModelForSeq2SeqLM": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForCausalLM": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}
"""Supported model classes by the auto class of transformers that loads them."""
IMAGE_TOKENS = ("image", "video", "vision_start", "vision_end", "boi", "eoi")
"""Names in configurations of the image token and of the tokens at the start and end of an image."""


@dataclass(frozen=True)
class Parts:
    """Properties of a model that the hooks need."""

    name: str  # for error messages
    embedding: Any  # word embeddings of the source; see `words_of`
    encoder_decoder: bool
    image_tokens: tuple[int, ...]  # ids, with those of tokens at the start and end of an image
    special_tokens: tuple[int, ...]  # ids of all tokens in the configuration
    start: int | None  # id of the start token of a decoder-only model
    positions: int | None  # number of positions; None if there is no limit

    @property
    def placeholder(self) -> int:
        """Id of a token that is not special, for use as a placeholder."""
        return next(n for n in range(len(self.special_tokens) + 1) if n not in self.special_tokens)

    @classmethod
    def of(cls, model: Any) -> "Parts":
        """Return the properties of a model.

        Raises:
            ValueError: If the model is not supported, or reads images and has no image token.
        """
        classes = {kind.__name__ for kind in type(model).__mro__}
        known = [name for name, kinds in SUPPORTED.items() if classes & {*kinds.values()}]
        if not known:
            raise ValueError(
                f"a prompt cannot be attached to a {type(model).__name__}; supported is what transformers "
                f"opens by {', '.join(SUPPORTED)}. Attach before the model is wrapped or compiled; for an "
                "image encoder and a language model of your own choice there is dept_vl.Backbone"
            )
        tokens = [*tokens_of(model.config.to_dict())]
        images = {token for name, token in tokens if name in IMAGE_TOKENS}
        if OF_IMAGES in known and not images:
            raise ValueError(
                f"the configuration of {model_name(model)} has no image_token_id, which is needed "
                "to tell images from text; load the checkpoint's current revision"
            )
        encoder_decoder, text = is_encoder_decoder(model.config), model.config.get_text_config()
        return cls(
            name=model_name(model),
            embedding=words_of(model),
            encoder_decoder=encoder_decoder,
            image_tokens=tuple(sorted(images)),
            special_tokens=tuple({token for _, token in tokens}),
            start=None if encoder_decoder else getattr(text, "bos_token_id", None),
            positions=getattr(text, "max_position_embeddings", None),
        )

    def check_length(self, prompt: int, source: int) -> None:
        """Check that the model has enough positions for a prompt and a source; see `check_positions`."""
        check_positions(self.name, self.positions, prompt=prompt, image_and_text=source)


def tokens_of(config: Mapping[Any, Any]) -> Iterator[tuple[str, int]]:
    """Yield the names and ids of the tokens in a configuration and its nested configurations."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from tokens_of(value)
        name, token, _ = str(key).rpartition("_token_")
        for number in (value if isinstance(value, list) else [value]) if token else []:
            if isinstance(number, int):
                yield name, number


def model_name(model: PreTrainedModel) -> str:
    """Return the name or folder that a model was loaded from, or else the name of its class."""
    name: str = model.name_or_path
    return name or type(model).__name__


def describe_model(model: PreTrainedModel) -> dict[str, Any]:
    """Return the description of a model that is saved with an adapter; see `Adapter.backbone`."""
    weights = describe_base(model)
    return {
        "name": model_name(model),
        "fingerprint": {"class": type(model).__name__, **weights},
        "visual_position_bias": "relative",  # every position counts, as in the unchanged model
        "object_order": "none",
        "visual_norm": None,
        "image_fit": None,
        "vision": None,
    }


def check_model(adapter: Adapter, model: PreTrainedModel) -> None:
    """Check that an adapter was trained on a model, and warn about differences that are allowed.

    Raises:
        ValueError: If the model has another class or other word embeddings.
    """
    known = adapter.backbone
    record = known["fingerprint"] or {}
    check_base({"class": "", **record}, model, trained_on=known["name"])


def over_items(output: Any, labels: Tensor | None, items: Tensor | int | None) -> Any:
    """Return an output with the loss averaged over all label tokens of a step, instead of those of its batch.

    Trainers that accumulate gradients pass `items`, the number of label tokens in the step. Some models
    accept that argument but ignore it, which would make the step too large.
    """
    if items is None or labels is None:
        return output
    share = (labels != IGNORE_INDEX).sum() / items
    if isinstance(output, tuple):
        return output[0] * share, *output[1:]
    output["loss"] = output["loss"] * share
    return output
