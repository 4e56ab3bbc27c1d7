"""Lengths of texts: counted once, kept by text and tokenizer."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from conftest import LANGUAGES
from helpers import task_of
from transformers import AutoTokenizer

from dept_vl.data.lengths import check_texts, source_lengths
from dept_vl.tasks import load_task
from dept_vl.tasks.io.rows import Rows, cache_folder
from dept_vl.tasks.text.task import SCHEMA, TextTask
from dept_vl.tasks.vqav2 import VQAv2

TEXTS = ("how many red shapes are there ?", "yes", "the small circle left of the square", "")


@pytest.fixture
def tokenizers(language_folders: dict[str, Path]) -> dict[str, Any]:
    return {name: AutoTokenizer.from_pretrained(language_folders[name]) for name in LANGUAGES}


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEPT_VL_CACHE", str(tmp_path / "cache"))


def text_task(*texts: str) -> TextTask:
    rows = [{"id": n, "source_text": text, "answers": [], "group": ""} for n, text in enumerate(texts)]
    return TextTask("cola", Rows.of(rows, SCHEMA))


def kept() -> list[Path]:
    return sorted(cache_folder().glob("*"))


@pytest.mark.parametrize("language", LANGUAGES)
def test_lengths_are_those_of_the_tokens(tokenizers: dict[str, Any], language: str) -> None:
    tokenizer = tokenizers[language]
    lengths = source_lengths(text_task(*TEXTS), tokenizer)
    assert lengths.dtype == np.int32
    assert lengths.tolist() == [len(tokenizer(text).input_ids) for text in TEXTS]


def test_questions_about_images_have_lengths_too(tokenizers: dict[str, Any]) -> None:
    task = task_of(["yes"], ["no"])
    lengths = source_lengths(task, tokenizers["t5"])
    assert lengths.tolist() == [len(tokenizers["t5"](task[n].source_text).input_ids) for n in range(2)]


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_longest_published_statement_is_read_whole(
    tokenizers: dict[str, Any],
    language: str,
    scenes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With T5's tokenizer it has 71 tokens, prefix and end included."""
    tokenizer = tokenizers[language]
    root = shutil.copytree(scenes / "nlvr2", tmp_path / "nlvr2")
    first = json.loads((root / "dev.json").read_text().splitlines()[0])
    words = ["red"] * (71 - len(tokenizer("nlvr:").input_ids))
    (root / "dev.json").write_text(json.dumps(first | {"sentence": " ".join(words)}) + "\n")
    task = load_task("nlvr2", root, "dev")
    assert source_lengths(task, tokenizer).tolist() == [71]
    check_texts(task, "dev", tokenizer, task.max_source_length, Accelerator())
    assert capsys.readouterr().out == ""
    check_texts(task, "dev", tokenizer, 70, Accelerator())
    assert "cuts 1 of" in capsys.readouterr().out
    check_texts(task, "dev", tokenizer, len(words) + 5, Accelerator(), frame=5)  # without our prefix
    assert capsys.readouterr().out == ""
    check_texts(task, "dev", tokenizer, len(words) + 4, Accelerator(), frame=5)
    assert f"max_source_length={len(words) - 1} cuts 1 of" in capsys.readouterr().out


def test_choices_that_are_written_alike_are_told(
    tokenizers: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"image": "a.png", "question": "q", "choices": choices, "answer": choices[0]}
        for choices in (["貓", "狗"], ["red", "blue"])
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = load_task("vqa", data=tmp_path / "a.jsonl", split="all")
    check_texts(task, "all", tokenizers["t5"], 20, Accelerator())
    assert "1 of the first 2 questions of" in capsys.readouterr().out


@dataclass(frozen=True)
class Bare(VQAv2):
    prefix = ""


def test_a_question_is_no_prefix(tokenizers: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    task = Bare(task_of(["yes"]).rows, {"train2014": Path()})
    check_texts(task, "dev", tokenizers["t5"], 3, Accelerator())
    assert "max_source_length=3 cuts 1 of" in capsys.readouterr().out


def test_nothing_is_counted_twice(tokenizers: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizers["t5"]
    counted = source_lengths(text_task(*TEXTS), tokenizer)
    assert len(kept()) == 1
    # What a call cuts and pads is no part of the tokenizer, though it remembers it.
    tokenizer(list(TEXTS), padding=True, truncation=True, max_length=3)
    monkeypatch.setattr(type(tokenizer), "__call__", None)
    assert source_lengths(text_task(*TEXTS), tokenizer).tolist() == counted.tolist()
    assert len(kept()) == 1


def test_other_texts_and_other_tokenizers_are_counted_anew(tokenizers: dict[str, Any]) -> None:
    source_lengths(text_task("a", "bc"), tokenizers["t5"])
    source_lengths(text_task("ab", "c"), tokenizers["t5"])
    source_lengths(text_task("bc", "a"), tokenizers["t5"])
    source_lengths(text_task("a", "bc"), tokenizers["bart"])
    assert len(kept()) == 4


def test_a_subset_has_lengths_of_its_own(tokenizers: dict[str, Any]) -> None:
    whole = source_lengths(text_task(*TEXTS), tokenizers["t5"])
    assert (
        source_lengths(text_task(*TEXTS).subset([2, 0]), tokenizers["t5"]).tolist() == whole[[2, 0]].tolist()
    )


def test_damaged_lengths_are_counted_anew(tokenizers: dict[str, Any]) -> None:
    counted = source_lengths(text_task(*TEXTS), tokenizers["t5"])
    for content in (b"", b"no array", kept()[0].read_bytes()[:-3]):
        kept()[0].write_bytes(content)
        assert source_lengths(text_task(*TEXTS), tokenizers["t5"]).tolist() == counted.tolist()


def test_a_cache_that_cannot_be_written_is_named(
    tokenizers: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DEPT_VL_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"cannot write the lengths of cola .* set DEPT_VL_CACHE"):
        source_lengths(text_task(*TEXTS), tokenizers["t5"])
