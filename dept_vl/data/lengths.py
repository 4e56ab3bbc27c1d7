"""Lengths of a task's texts in tokens, counted once per tokenizer and cached."""

import hashlib
import json
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
from accelerate import Accelerator

from dept_vl._utils.checksums import open_sealed
from dept_vl._utils.printable import say
from dept_vl._utils.processes import main_first
from dept_vl._utils.terminal import counted
from dept_vl.models.tokens import target_ids, tokenised
from dept_vl.tasks.base import Task
from dept_vl.tasks.io.rows import CHUNK_ROWS, cache_folder, new_cache_file, writing_cache

Lengths = np.ndarray[Any, np.dtype[np.int32]]
LENGTH_SAMPLE = 2000
"""Number of texts to measure for truncation, unless the rows have a column with all texts."""


def source_lengths(task: Task, tokenizer: Any) -> Lengths:
    """Count the tokens of every source text, with special tokens and without truncation.

    Counts are cached by texts and tokenizer. Raises OSError if the cache folder cannot be written.
    """
    texts = source_texts(task)
    path = cache_folder() / f"lengths-{_key(texts, tokenizer)}.bin"
    if path.is_file():
        try:
            return np.frombuffer(open_sealed(path), dtype=np.int32)
        except ValueError as error:
            say(f"note: {error}; it is made again", error=True)
    starts = range(0, len(texts), CHUNK_ROWS)
    found = [
        len(ids)
        for start in counted("counting tokens", starts, len(starts))
        # Not verbose, to avoid warnings about texts longer than the model's maximum.
        for ids in tokenised(
            tokenizer,
            texts.slice(start, CHUNK_ROWS).to_pylist(),
            return_attention_mask=False,
            verbose=False,
        ).input_ids
    ]
    lengths = np.array(found, dtype=np.int32)
    what = f"the lengths of {task.name}"
    with new_cache_file(path, what) as partial, writing_cache(path.parent, what):
        partial.write_bytes(lengths.tobytes())
    return lengths


def source_texts(task: Task) -> pa.ChunkedArray:
    """Return the texts for the encoder of all examples, from a column of the rows if there is one."""
    if task.source_column:
        return task.rows.column(task.source_column)
    texts = pa.array([task[index].source_text for index in range(len(task))], pa.string())
    return pa.chunked_array([texts])


def _key(texts: pa.ChunkedArray, tokenizer: Any) -> str:
    digest = hashlib.sha256(tokenizer_description(tokenizer).encode())
    for start in range(0, len(texts), CHUNK_ROWS):
        digest.update("\0".join([*texts.slice(start, CHUNK_ROWS).to_pylist(), ""]).encode())
    return digest.hexdigest()[:24]


def tokenizer_description(tokenizer: Any) -> str:
    """Return everything that a tokenizer's output depends on, except truncation and padding."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])
    description = json.loads(backend.to_str())
    return json.dumps({**description, "truncation": None, "padding": None}, sort_keys=True)


def check_texts(
    task: Task, split: str, tokenizer: Any, max_source_length: int, accelerator: Accelerator, frame: int = 0
) -> None:
    """Print how many texts are truncated, and how many questions have choices of the same tokens.

    `max_source_length` includes the `frame` of a pretrained model. ValueError if the task prefix fills it.
    """
    max_source_length -= frame
    _tell_alike_choices(task, split, tokenizer)
    text = task[0].source_text
    prefix = text.split(":")[0] + ":" if task.source_column else task.source("").rstrip()
    shared = len(tokenised(tokenizer, prefix).input_ids)
    taken = 0 if frame else shared  # a pretrained model reads texts without our prefixes
    if max_source_length <= taken:
        raise ValueError(
            f"max_source_length is {max_source_length} tokens, but the task prefix of "
            f"{text!r} takes {shared}; raise max_source_length"
        )
    whole = bool(task.source_column)
    with main_first(accelerator):  # the main process caches the lengths for all
        lengths = source_lengths(
            task if whole else task.subset(range(min(LENGTH_SAMPLE, len(task)))), tokenizer
        )
    cut = int((lengths > max_source_length + shared - taken).sum())
    if cut:
        which = f"{'all' if whole else 'the first'} {len(lengths):,} texts ({task.name} {split})"
        say(
            f"warning: max_source_length={max_source_length} cuts {cut:,} of {which}; the longest has "
            f"{lengths.max():,} tokens"
        )


def _tell_alike_choices(task: Task, split: str, tokenizer: Any) -> None:
    """Print how many of the first questions have choices that become the same tokens."""
    sets = Counter(task[index].choices for index in range(min(LENGTH_SAMPLE, len(task))))
    del sets[()]
    if not sets:
        return
    texts = list({text: None for choices in sets for text in choices})
    ids = dict(zip(texts, map(tuple, target_ids(tokenizer, texts)), strict=True))
    alike = [choices for choices in sets if len({ids[text] for text in choices}) < len({*choices})]
    if alike:
        count = sum(sets[choices] for choices in alike)
        say(
            f"warning: {count:,} of the first {sets.total():,} questions of {task.name} {split} have choices "
            "that become the same tokens, so that one of them always wins, such as "
            f"{', '.join(map(repr, alike[0])):.100}"
        )
