"""Checks of untrusted models while they are loaded, for damaged or hostile files and wrong tokenizers.

transformers creates a tokenizer if a folder has none, initialises missing weights at random, and trusts sizes
in files. Here each of these raises an error before much is read, and no code of a folder is run.
"""

import json
import math
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import cached_file

from dept_vl._utils.errors import is_user_error
from dept_vl._utils.io import one_line, read_json
from dept_vl._utils.printable import printable

CHECKED_FILES = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)
"""Files that have to be JSON objects. `tokenizer.json` is read by its own library, which is fast."""
TERSE_FILES = CHECKED_FILES[:4]
"""Files whose texts must have no control characters, because transformers logs them."""
LARGEST_SIZE = 1 << 27
"""Upper bound on sizes in a configuration (the longest contexts have 10 million tokens)."""
MOST_LAYERS = MOST_EXPERTS = 1 << 10
TENSORS_ANYWAY = 5_000
TENSORS_PER_LAYER = 64
HEADER_PER_TENSOR = 400
"""Upper bound on bytes per tensor in a safetensors header; about 100 are usual."""
WIDTHS = ("d_model", "hidden_size", "n_embd")
TABLES = (*WIDTHS, "vocab_size", "d_ff", "intermediate_size", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim")
LARGEST_HEADER = 1 << 25
PIXELS = 4096
"""Largest side in pixels of an image processor's output."""
LOADING = threading.RLock()
"""Lock for loading models: while transformers loads one, it patches functions of torch for all threads."""
PLAIN_WORDS = ("the", "what", "red", "is", "no", "two")


@contextmanager
def loading(name: str | Path, what: str) -> Iterator[None]:
    """Convert the errors of libraries about untrusted files to a `ValueError` that names the files.

    Files of a folder are checked first. `what` is being loaded, such as "a language model".

    Raises:
        ValueError: If the files are damaged, or do not contain `what`.
        OSError: If transformers finds no files.
    """
    if Path(name).is_dir():
        _check_folder(Path(name))
    try:
        with LOADING:
            yield
    except MemoryError as error:
        raise ValueError(f"{name} cannot be loaded as {what}: it does not fit the memory") from error
    except Exception as error:
        if is_user_error(error):
            raise
        raise ValueError(
            f"{name} cannot be loaded as {what}; its files are damaged or of something else: "
            f"{type(error).__name__}: {one_line(error)}"
        ) from error


def load_config(name: str | Path, what: str, supported: str) -> Any:
    """Load the configuration of a model of transformers.

    Raises:
        OSError: If transformers finds no such model.
        ValueError: If transformers does not know the type of the model, or its files are damaged.
    """
    # Without trust_remote_code=False, transformers asks whether to run code of the model's folder.
    with loading(name, what):
        try:
            return AutoConfig.from_pretrained(name, trust_remote_code=False)
        except ValueError as error:  # unknown model type
            problem = one_line(error).partition(". ")[0]
            kind = what.split(maxsplit=1)[1]
            raise ValueError(
                f"{name} is not a supported {kind}: {problem}. Supported are {supported}"
            ) from None


def _check_folder(folder: Path) -> None:
    """Check the configurations and headers in a folder, without reading weights."""
    for name in CHECKED_FILES:
        path = folder / name
        if path.exists():
            content = read_json(path, json.loads)
            if not isinstance(content, dict):
                raise ValueError(
                    f"{path} is damaged: expected a JSON object, found a {type(content).__name__}"
                )
            for place, value in _values(content):
                bad_text = isinstance(value, str) and not value.isprintable() and name in TERSE_FILES
                if bad_text or not printable(place) == place:
                    raise ValueError(
                        f"{path} is damaged: expected text without control characters, found "
                        f"{printable(value)!r:.80} at {printable(place):.80}"
                    )
    config_path = folder / "config.json"
    config = read_json(config_path, json.loads) if config_path.exists() else {}
    layers, experts = _check_sizes(config, config_path)
    _check_tables(config, config_path, sum(p.stat().st_size for p in folder.glob("*.safetensors")))
    most = TENSORS_ANYWAY + TENSORS_PER_LAYER * layers * max(1, experts)
    for path in sorted(folder.glob("*.index.json")):
        _check_index(path)
    for path in sorted(folder.glob("*.safetensors")):
        _check_header(path, most)


def _values(content: Any) -> Iterator[tuple[str, Any]]:
    """Yield all values in JSON content that are neither objects nor lists, with their dotted names."""
    open_ = [("", content)]
    while open_:
        place, value = open_.pop()
        if isinstance(value, dict):
            open_ += [(f"{place}.{key}".lstrip("."), inner) for key, inner in value.items()]
        elif isinstance(value, list):
            open_ += [(f"{place}[{n}]", inner) for n, inner in enumerate(value)]
        else:
            yield place, value


def _check_sizes(config: dict[str, Any], path: Path) -> tuple[int, int]:
    """Return the numbers of layers and experts in a configuration."""
    layers = experts = 0
    for place, value in _values(config):
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        key = place.rpartition(".")[2]
        if re.search(r"theta|seed|length|param", key):
            continue
        counted = re.fullmatch(r"(num_|n_)?(\w+_)?layers?", key)
        expert = re.fullmatch(r"(num_|n_)(\w+_)?experts", key)
        sized = counted or re.search(r"size$|^d_|dim$|_heads$|positions$|^n_|channels$", key)
        highest = MOST_LAYERS if counted else MOST_EXPERTS if expert else LARGEST_SIZE
        if abs(value) > highest or (sized and value < -1 and "feature_layer" not in key):
            found = f"{value:,}" if value.bit_length() < 256 else "a number of hundreds of digits"
            raise ValueError(
                f"{path} is damaged: expected {printable(place)!r:.80} to be 0 to {highest:,}, found {found}"
            )
        layers += value if counted and value > 0 else 0
        experts = max(experts, value) if expert else experts
    return layers, experts


def _check_tables(config: dict[str, Any], path: Path, stored: int) -> None:
    """Check that the weight files are large enough for the largest matrices of a configuration.

    transformers would allocate and fill a matrix of any size before it reports a mismatch.
    """
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        sizes = {key: part[key] for key in TABLES if type(part.get(key)) is int}
        width = max((sizes[key] for key in WIDTHS if key in sizes), default=1)
        for key, size in sizes.items():
            if stored and key not in WIDTHS and size * width > 2 * stored:
                raise ValueError(
                    f"{path} is damaged: it asks for a table of {size:,} ({key}) by {width:,}, "
                    f"and the weights beside it are {stored:,} bytes"
                )


def _check_index(path: Path) -> None:
    """Check that an index only names files in its own folder."""
    content = read_json(path, json.loads)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{path} is damaged: expected 'weight_map' to name a file for every tensor")
    for name in dict.fromkeys(names.values()):
        if Path(name).name != name or not name.isprintable() or "\\" in name:
            raise ValueError(
                f"{path} is damaged or hostile: expected names of files beside it, found "
                f"{printable(name)!r:.120}"
            )
        if not (path.parent / name).is_file():
            raise ValueError(f"{path} names a file that is not beside it: {name!r:.120}; put it there")


def _check_header(path: Path, most: int) -> None:
    """Check the header of a safetensors file, which may have at most `most` tensors."""
    with path.open("rb") as opened:
        length = min(int.from_bytes(opened.read(8), "little"), path.stat().st_size)
    if length > min(LARGEST_HEADER, HEADER_PER_TENSOR * most):
        raise ValueError(
            f"{path} is not a model with this configuration: expected a header for at most {most:,} tensors, "
            f"found one of {length:,} bytes"
        )
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {one_line(error)}") from None
    odd = next((name for name in names if not name.isprintable()), None)
    if odd is not None:
        raise ValueError(
            f"{path} is damaged: a tensor has control characters in its name, {printable(odd)!r:.80}"
        )


def load_model(opens: Any, name: str | Path, what: str, *, unused: str | None = None, **options: Any) -> Any:
    """Load a model of transformers in full precision with `opens.from_pretrained`.

    Errors name it by `what`. Weights with `unused` in their names may be missing.

    Raises:
        ValueError: If the files are damaged, or weights are missing in them.
    """
    with loading(name, what):
        model, info = opens.from_pretrained(
            name, dtype=torch.float32, trust_remote_code=False, output_loading_info=True, **options
        )
    missing = sorted(key for key in info["missing_keys"] if unused is None or unused not in key)
    if missing:
        more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        raise ValueError(
            f"the weights of {name} do not match its configuration: expected {missing[0]!r:.120}{more}, "
            "found none in its files; give a folder with all weights of the model"
        )
    return model


def load_tokenizer(name: str | Path) -> Any:
    """Load a tokenizer from its own files; `check_tokenizer` checks that it belongs to the model.

    Raises:
        ValueError: If there are no files of a tokenizer, or they are damaged.
        OSError: If transformers finds no such model.
    """
    with loading(name, "a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    # A tokenizer of bytes has no vocabulary to store.
    stored = getattr(tokenizer, "vocab_files_names", {}).values()
    files = dict.fromkeys(["tokenizer.json", *stored])
    if stored and not any(_has(name, file) for file in files):
        raise ValueError(
            f"{name} holds a model without its tokenizer: expected one of {', '.join(files)}, found none; "
            "save it there too (tokenizer.save_pretrained)"
        )
    return tokenizer


def _has(name: str | Path, file: str) -> bool:
    if Path(name).is_dir():
        return (Path(name) / file).is_file()
    found = cached_file(
        str(name),
        file,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return found is not None


def check_tokenizer(tokenizer: Any, model: nn.Module, name: str | Path) -> None:
    """Check that a tokenizer belongs to a model.

    Raises:
        ValueError: If a token has no row in the embedding matrix, the configuration has other special tokens,
            or common words cannot be encoded and decoded.
    """
    rows = len(model.get_input_embeddings().weight)  # type: ignore[operator]
    # bart-large-cnn is published without a row for `<mask>`, which no text has.
    mask = getattr(tokenizer, "mask_token_id", None)
    largest, token = max((id_, token) for token, id_ in tokenizer.get_vocab().items() if id_ != mask)
    if largest >= rows:
        raise ValueError(
            f"the tokenizer of {name} does not match the model: token {printable(token)!r:.60} has id "
            f"{largest:,}, but the embedding matrix has {rows:,} rows. If you added tokens, call "
            "model.resize_token_embeddings(len(tokenizer)) and save model and tokenizer together"
        )
    _check_special_tokens(tokenizer, getattr(model, "config", None), name)
    if not any(_comes_back(tokenizer, word) for word in PLAIN_WORDS):
        raise ValueError(
            f"the tokenizer of {name} knows no words: expected some of {', '.join(PLAIN_WORDS)} to come "
            f"back, found {tokenizer.convert_ids_to_tokens(tokenizer(' '.join(PLAIN_WORDS)).input_ids)[:8]}; "
            "put the tokenizer beside the model that it was trained with"
        )


def _check_special_tokens(tokenizer: Any, config: Any, name: str | Path) -> None:
    """Raise a `ValueError` if tokenizer and configuration name different special tokens.

    The tokenizer of a decoder-only model may use any of its special tokens, as some chat models do.
    """
    special = set(tokenizer.all_special_ids) | {
        id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    for role in ("pad", "bos", "eos"):
        found = getattr(tokenizer, f"{role}_token_id", None)
        named = getattr(config, f"{role}_token_id", None)
        expected = [i for i in (named if isinstance(named, list) else [named]) if i is not None and i >= 0]
        allowed = {*expected} if getattr(config, "is_encoder_decoder", True) else {*expected} | special
        known = getattr(config, "is_encoder_decoder", True) or special.issuperset(expected)
        if found is None or not expected or (found in allowed and known):
            continue
        raise ValueError(
            f"the tokenizer of {name} belongs to another model: expected the {role} token to be "
            f"{expected[0]}, as in config.json, found {found} "
            f"({printable(getattr(tokenizer, f'{role}_token'))!r:.60}); put the tokenizer beside the model "
            "that it was trained with"
        )


def _comes_back(tokenizer: Any, word: str) -> bool:
    ids = tokenizer(word, add_special_tokens=False).input_ids
    if not ids or tokenizer.unk_token_id in ids:
        return False
    text: str = tokenizer.decode(ids)
    return text.replace(" ", "").lower() == word


def check_processor(processor: Any, name: str | Path) -> None:
    """Check the image size and the number of channels of an image processor, before it is used.

    Raises:
        ValueError: If the images would be too large, or would not have three channels.
    """
    for field in ("size", "crop_size"):
        given = getattr(processor, field, None)
        edges = (
            given.values() if isinstance(given, Mapping) else getattr(given, "__dict__", {0: given}).values()
        )
        for edge in edges:
            if edge is not None and not (isinstance(edge, int) and 1 <= edge <= PIXELS):
                raise ValueError(
                    f"the image processor of {name} is damaged: expected {field!r} to be 1 to {PIXELS:,} "
                    f"pixels, found {edge!r:.60}"
                )
    for field, lowest in (("image_mean", -math.inf), ("image_std", 0.0)):
        values = getattr(processor, field, None)
        if not isinstance(values, Iterable):
            continue
        numbers = [v for v in values if isinstance(v, int | float) and math.isfinite(v)]
        if len(numbers) != 3 or len(list(values)) != 3 or min(numbers) <= lowest:
            raise ValueError(
                f"the image processor of {name} is damaged: expected {field!r} to be 3 finite "
                f"numbers{' above 0' if lowest == 0 else ''}, found {values!r:.80}"
            )
