"""Ready-made vision-language models that a prompt can be attached to: their parts, and their identity."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from dept_vl.adapters.adapter import Adapter
from dept_vl.adapters.fingerprint import check_base, describe_base
from dept_vl.models.tokens import IGNORE_INDEX

SUPPORTED = {
    "Blip2ForConditionalGeneration": "Salesforce/blip2-flan-t5-xl",
    "InstructBlipForConditionalGeneration": "Salesforce/instructblip-flan-t5-xl",
    "Florence2ForConditionalGeneration": "florence-community/Florence-2-base",
    "T5Gemma2ForConditionalGeneration": "google/t5gemma-2-270m-270m",
}
"""Classes of transformers, each with a checkpoint of the Hub that it reads."""


@dataclass(frozen=True)
class Parts:
    """What the hooks are put on.

    Attributes:
        embedding: Looks the source's tokens up, placeholders included.
        encoder: Reads embeddings; the text encoder alone.
        decoder: Attends to what the encoder gave.
        image_tokens: Ids of the placeholders, and of the tokens that fence an image in.
        positions: How many the encoder has; None where there is no limit.
    """

    embedding: nn.Embedding
    encoder: nn.Module
    decoder: nn.Module
    image_tokens: tuple[int, ...]
    positions: int | None

    @property
    def width(self) -> int:
        """Of the embeddings (d)."""
        width: int = self.embedding.weight.shape[1]
        return width

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Parts":
        """Find them in a model.

        Raises:
            ValueError: If the model is of no supported class, has no encoder, or names no placeholder.
        """
        supported = "; ".join(f"{name} (such as {hub})" for name, hub in SUPPORTED.items())
        known = [c.__name__ for c in type(model).__mro__ if c.__name__ in SUPPORTED]
        if not known:
            raise ValueError(
                f"a prompt cannot be attached to a {type(model).__name__}; supported are {supported}. Attach "
                "before the model is wrapped or compiled; for an image encoder and a language model of your "
                "own choice there is dept_vl.Backbone"
            )
        config = model.config
        if known[0].startswith("T5Gemma2"):
            config = model.config.encoder
            encoder, decoder = model.get_encoder().text_model, model.get_decoder()
        else:
            holder = model.model if known[0].startswith("Florence2") else model
            language = holder.language_model
            if not language.config.is_encoder_decoder:
                raise ValueError(
                    f"the language model of {model_name(model)} is a {type(language).__name__}, which has no "
                    f"encoder to prompt; take a checkpoint with FLAN-T5 such as {SUPPORTED[known[0]]}"
                )
            encoder, decoder = language.get_encoder(), language.get_decoder()
        names = ("image_token_id", "boi_token_id", "eoi_token_id")
        ids = [getattr(config, name, None) for name in names]
        if ids[0] is None:
            raise ValueError(
                f"the configuration of {model_name(model)} has no image_token_id, without which images "
                "cannot be told from text; load the checkpoint's current revision"
            )
        return cls(
            embedding=model.get_input_embeddings(),
            encoder=encoder,
            decoder=decoder,
            image_tokens=tuple(token for token in ids if token is not None),
            positions=getattr(encoder.config, "max_position_embeddings", None),
        )


def model_name(model: PreTrainedModel) -> str:
    """Name of a model for messages and adapters: where it was loaded from, or its class."""
    name: str = model.name_or_path
    return name or type(model).__name__


def special_tokens(encoder: nn.Module) -> list[int]:
    """Ids of padding, start and end, which a prompt should not start from."""
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
    ids = (getattr(encoder.config, name, None) for name in names)
    return [token for token in ids if isinstance(token, int)]


def describe_model(model: PreTrainedModel) -> dict[str, Any]:
    """Return what an adapter records of the model that it belongs to."""
    weights = describe_base(model, model.get_input_embeddings())
    return {
        "name": model_name(model),
        "fingerprint": {"class": type(model).__name__, **weights},
        "visual_position_bias": "relative",  # every position counts, as the stock encoder does it
        "object_order": "none",
        "visual_norm": None,
        "image_fit": None,
        "vision": None,
    }


def check_model(adapter: Adapter, model: PreTrainedModel) -> None:
    """Compare a model with the one that an adapter was trained on; warn of what differs and may.

    Raises:
        ValueError: If the model is of another class, or has other word embeddings.
    """
    known = adapter.backbone
    record = known["fingerprint"] or {}
    check_base({"class": "", **record}, model, model.get_input_embeddings(), trained_on=known["name"])


def over_items(output: Any, labels: Tensor | None, items: Tensor | int | None) -> Any:
    """An output whose loss is a mean over all tokens that are learnt in a step, not over those of its batch.

    So a trainer that accumulates gradients asks for it. Of the families some know how and some do not but
    take the argument: a trainer would leave the loss of those as it is, and the step would be too large.
    """
    if items is None or labels is None:
        return output
    share = (labels != IGNORE_INDEX).sum() / items
    if isinstance(output, tuple):
        return output[0] * share, *output[1:]
    output["loss"] = output["loss"] * share
    return output
