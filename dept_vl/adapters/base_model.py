"""Fingerprints and devices of models of transformers, for `attach` and the PEFT plugin.

Such models come in several precisions and vocabulary sizes, so hashes are compared first and then samples of
the values. accelerate may have offloaded their weights to the CPU or the disk.
The README of this folder has a table of what differs and what happens.
"""

import base64
import binascii
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dept_vl._utils.printable import printable, warn
from dept_vl._utils.tensors import fingerprint
from dept_vl.models.prompt_hook import words_of

ROWS = 512
"""Number of word embeddings to sample, with one value each."""
TOLERANCE = 2**-7
"""Relative tolerance in bfloat16: a value that was rounded to float16 first may differ by one step."""
SMALLEST = 2**-24
"""Smallest positive number in float16, used as the absolute tolerance."""

_PEFT_TENSORS = re.compile(r"(^|\.)(dept_prompt|modules_to_save|trainable_tokens_\w+|token_indices)(\.|$)")
_PEFT_WRAPPERS = re.compile(r"(^|(?<=\.))(base_layer|original_module|token_adapter)\.")


@dataclass(frozen=True)
class Sample:
    """Sampled values of a model, in bfloat16."""

    vocabulary: int  # number of word embeddings
    dtype: str  # data type of the word embeddings
    rows: Tensor  # one value of each sampled word embedding (see `_rows`)
    others: Tensor  # one value of each tensor whose shape does not depend on the vocabulary

    @classmethod
    def recorded(cls, record: Mapping[str, str]) -> "Sample | None":
        """Return the sample in a fingerprint; None if it has none, as in files of older versions.

        Raises:
            ValueError: If the fingerprint is damaged.
        """
        if "rows" not in record:
            return None
        try:
            vocabulary = int(record["vocabulary"])
            rows, others = (_decoded(record[name]) for name in ("rows", "others"))
            if not 0 < vocabulary < 2**31 or len(rows) != len(_rows(vocabulary)):
                raise ValueError(f"{len(rows)} sampled rows of {vocabulary}")
        except (KeyError, ValueError, TypeError, binascii.Error) as error:
            raise ValueError(f"the adapter's fingerprint of its base is damaged: {error!s:.100}") from None
        return cls(vocabulary, record.get("dtype", ""), rows, others)


class _OtherBaseError(Exception):
    """Why a model is another one than that of an adapter."""


def describe_base(model: PreTrainedModel) -> dict[str, str]:
    """Return the fingerprint of a model of transformers; empty if its word embeddings have no values."""
    words, weights = _base_weights(words_of(model)), _base_weights(model)
    if "weight" not in words:
        return {}
    weight = words["weight"]
    record = {
        "embeddings": fingerprint(words.items()),
        "all": fingerprint(weights.items()),
        "vocabulary": str(len(weight)),
        "dtype": str(weight.dtype).removeprefix("torch."),
    }
    if not weight.is_floating_point():  # quantised
        return record
    # Others have no row or column for each word, as BART's `final_logits_bias` has.
    fixed = [tensor for _, tensor in sorted(weights.items()) if len(weight) not in tensor.shape]
    others = [tensor.flatten()[tensor.numel() // 2 :][:1] for tensor in fixed]
    return record | {"rows": _encoded([_values(weight, _rows(len(weight)))]), "others": _encoded(others)}


def check_base(
    record: Mapping[str, str],
    model: PreTrainedModel,
    *,
    adapter: str = "this adapter",
    trained_on: str | None = None,
    strict: bool = True,
) -> None:
    """Check that an adapter was trained on a model of transformers, by its `record` from `describe_base`.

    `adapter` and `trained_on` name the adapter and its model in messages.

    Raises:
        ValueError: If the model is a different one (a warning if not `strict`), or the record is damaged.
    """
    here = describe_base(model)
    name = model.name_or_path or type(model).__name__
    bases = printable(
        f"{trained_on or 'its own'} (fingerprint {shown(record)}), not {name} (fingerprint {shown(here)})"
    )
    try:
        note = _compare(record, here, model)
    except _OtherBaseError as other:
        message = (
            f"{adapter} was trained on another base and does not fit: {bases}: {other}; load the base it was "
            "trained on"
        )
        if strict:
            raise ValueError(message) from None
        warn(message, stacklevel=3)
    else:
        if note:
            warn(f"{adapter} was trained on {bases}: {note}", stacklevel=3)


def shown(record: Mapping[str, str] | None) -> dict[str, str]:
    """Return a fingerprint without its samples, which are too long for messages."""
    return {name: value for name, value in (record or {}).items() if name not in ("rows", "others")}


def _compare(record: Mapping[str, str], here: Mapping[str, str], model: PreTrainedModel) -> str:
    """Return differences to warn about, or an empty string; `_OtherBaseError` if the model is another one."""
    if not record:
        return ""
    if record.get("class", type(model).__name__) != type(model).__name__:
        raise _OtherBaseError(f"it is a {type(model).__name__}")
    sample = Sample.recorded(record)
    if not here:
        return "its word embeddings have no values yet, so that they were not compared"
    note = _compare_words(record, sample, here, _base_weights(words_of(model)))
    mine = Sample.recorded(here)
    if sample is None or mine is None:
        hashed = record.get("all", here["all"])
        same = bool(note) or hashed in (here["all"], _rounded(_base_weights(model)))
    elif _exact(sample.dtype, mine.dtype) and not note:
        same = record.get("all") == here["all"]
    else:
        same = not len(_different(sample.others, mine.others, _exact(sample.dtype, mine.dtype)))
    if same:
        return note
    words = f"{note}; and it has" if note else "it has the same word embeddings, but"
    return f"{words} other weights: quantised, fine-tuned, or another checkpoint"


def _compare_words(
    record: Mapping[str, str], sample: Sample | None, here: Mapping[str, str], words: Mapping[str, Tensor]
) -> str:
    """Compare word embeddings; see `_compare`."""
    hashes = (here["embeddings"], fingerprint([("embeddings", words["weight"])]))  # the latter: older files
    if record.get("embeddings") in hashes:
        return ""
    mine = Sample.recorded(here)
    if sample is None or mine is None:
        return _compare_older(record, words)
    rows = _rows(sample.vocabulary)
    both = rows < mine.vocabulary
    rows, exact = rows[both], _exact(sample.dtype, mine.dtype)
    different = _different(sample.rows[both], _decoded(_encoded([_values(words["weight"], rows)])), exact)
    if not len(different):
        if sample.vocabulary != mine.vocabulary:
            return (
                f"it has {mine.vocabulary:,} word embeddings and the adapter was trained with "
                f"{sample.vocabulary:,}; those that both have are the same"
            )
        # In the same precision, the hash decides, because it covers all values.
        if exact:
            raise _OtherBaseError("it has other word embeddings, though few")
        return ""
    first = int(different[0])
    # Tokens are added at the end, with random rows near the mean, some of which can be equal by chance.
    if 2 * first > len(rows):
        return (
            f"its last word embeddings, after row {int(rows[first - 1]):,}, are others (tokens were added?): "
            "texts with these tokens are read otherwise, unless the adapter brings their embeddings along"
        )
    raise _OtherBaseError(
        f"it has other word embeddings ({len(different)} of {len(rows)} sampled rows differ)"
    )


def _compare_older(record: Mapping[str, str], words: Mapping[str, Tensor]) -> str:
    """Compare word embeddings with a record of an older version, which has hashes but no samples."""
    if record.get("embeddings") == _rounded(words):
        return ""
    values = _values(words["weight"], _rows(len(words["weight"])))
    # From values that were rounded before, the recorded float16 values cannot be computed.
    if values.dtype == torch.float16 or torch.equal(values, values.bfloat16().to(values.dtype)):
        return (
            "its word embeddings could not be compared: an older version recorded a hash of them, which "
            "rounding to float16 or bfloat16 changes"
        )
    raise _OtherBaseError("it has other word embeddings")


def _rounded(weights: Mapping[str, Tensor]) -> str:
    """Return the hash of weights in float16."""
    return fingerprint(
        (name, tensor.half() if tensor.is_floating_point() else tensor) for name, tensor in weights.items()
    )


def _different(one: Tensor, other: Tensor, exact: bool) -> Tensor:
    """Return the indices at which two samples differ; all indices if their lengths differ."""
    if len(one) != len(other):
        return torch.arange(max(len(one), len(other)))
    same = one == other
    if not exact:
        a, b = one.float(), other.float()
        same |= (a - b).abs() <= TOLERANCE * torch.maximum(a.abs(), b.abs()) + SMALLEST
    return (~same).nonzero().flatten()


def _exact(one: str, other: str) -> bool:
    """Return whether samples of two precisions can be compared exactly: both or neither are float16."""
    return (one == "float16") == (other == "float16")


def _base_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a model by their names without PEFT, and without PEFT's own tensors."""
    return {
        _PEFT_WRAPPERS.sub("", name): tensor
        for name, tensor in _weights_of(module).items()
        # Single values of quantised weights in subclasses that wrap other tensors cannot be read.
        if not _PEFT_TENSORS.search(name) and not hasattr(tensor, "__tensor_flatten__")
    }


def _rows(vocabulary: int) -> Tensor:
    """Return the indices of the sampled word embeddings: evenly spaced, with the first and the last."""
    count = min(vocabulary, ROWS)
    return torch.arange(count) * (vocabulary - 1) // max(count - 1, 1)


def _values(weight: Tensor, rows: Tensor) -> Tensor:
    """Return one value of each of these rows, from varying columns."""
    rows = rows.to(weight.device)
    return weight.detach()[rows, rows * 7 % weight.shape[1]]


def _encoded(values: Sequence[Tensor]) -> str:
    """Return values in bfloat16, encoded as text in base64."""
    flat = [tensor.detach().to("cpu", torch.bfloat16) for tensor in values]
    content = torch.cat(flat) if flat else torch.empty(0, dtype=torch.bfloat16)
    return base64.b64encode(content.contiguous().view(torch.uint8).numpy().tobytes()).decode()


def _decoded(text: str) -> Tensor:
    content = bytearray(base64.b64decode(text, validate=True))
    if len(content) % 2:
        raise ValueError(f"{len(content)} bytes of values of two bytes")
    return (
        torch.frombuffer(content, dtype=torch.bfloat16) if content else torch.empty(0, dtype=torch.bfloat16)
    )


def device_of(embedding: nn.Module) -> torch.device:
    """Return the device that an embedding runs on, even if its weights are offloaded.

    Raises:
        ValueError: If the weights are on the meta device and are not offloaded by accelerate.
    """
    device: torch.device = embedding.weight.device  # type: ignore[assignment]
    if device.type != "meta":
        return device
    for hook in _hooks_of(embedding):
        return torch.device(hook.execution_device)
    raise ValueError(
        "the word embeddings of this model are on the meta device and hold no values; load the model's "
        "weights first"
    )


def _weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's state dict with offloaded weights, and without tensors that have no values."""
    state: dict[str, Tensor] = dict(module.state_dict())
    for prefix, part in module.named_modules():
        for hook in _hooks_of(part):
            for name, tensor in part.named_parameters(recurse=hook.place_submodules):
                full = f"{prefix}.{name}" if prefix else name
                if tensor.is_meta and full in state:
                    state[full] = hook.weights_map[name]
    return {name: tensor for name, tensor in state.items() if not tensor.is_meta}


def _hooks_of(module: nn.Module) -> Iterator[Any]:
    """Yield the hooks of accelerate that load offloaded weights of this module."""
    hooks = [getattr(module, "_hf_hook", None)]
    while hooks:
        hook = hooks.pop()
        hooks += getattr(hook, "hooks", ())  # a sequence of hooks
        if getattr(hook, "offload", False) and getattr(hook, "weights_map", None) is not None:
            yield hook
