"""Answers that are lost are counted and shown before training, and too many are an error."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dept_vl._utils.errors import UsageError
from dept_vl.config import DataOptions
from dept_vl.data.answers import fit_answers, look_at_answers
from dept_vl.data.splits import Splits, choose_decoding
from dept_vl.models.backbone import Backbone
from dept_vl.tasks import load_task
from dept_vl.tasks.own.options import OwnOptions

PHOTOS = Path(__file__).parents[1] / "fixtures" / "own" / "photos"


@pytest.fixture
def splits(tmp_path: Path) -> Callable[..., Splits]:
    def make(*answers: str, **options: object) -> Splits:
        rows = "".join(f'IMG_0001.JPG,"which?","{answer}"\n' for answer in answers)
        file = tmp_path / "data.csv"
        file.write_text("image,question,answer\n" + rows, encoding="utf-8")
        chosen = DataOptions(own=OwnOptions(data=str(file), images=PHOTOS), **options)  # type: ignore[arg-type]
        task = load_task("vqa", data=file, images=PHOTOS, split="all")
        return Splits(task, task, task, choose_decoding(task, chosen), chosen)

    return make


def test_lost_answers_are_counted(splits: Callable[..., Splits], t5: Backbone) -> None:
    made = splits("red", "red", "日本", "yellow star above two purple crosses")
    lost = look_at_answers(made.train, t5.tokenizer, 4)
    assert dict(lost.unwritable) == {"日本": 1}
    assert dict(lost.cut) == {"yellow star above two purple crosses": 1}
    assert (lost.answers, lost.share) == (4, 0.5)


def test_the_longest_answer_is_that_of_the_data(splits: Callable[..., Splits], t5: Backbone) -> None:
    made = splits("red", "yellow star above two purple crosses")
    longest = len(t5.tokenizer("yellow star above two purple crosses").input_ids)
    fitted, lines = fit_answers(made, t5.tokenizer)
    assert (fitted.decoding.max_new_tokens, lines) == (longest, [])
    short, lines = fit_answers(splits("red", "yellow star above", max_answer_tokens=2), t5.tokenizer)
    assert short.decoding.max_new_tokens == 2
    assert len(lines) == 1
    assert "'yellow star above'" in lines[0]


def test_too_many_lost_answers_are_an_error(splits: Callable[..., Splits], t5: Backbone) -> None:
    made = splits(*["red", "日本", "{x}"] * 4)
    with pytest.raises(UsageError, match="max_lost_answers"):
        fit_answers(made, t5.tokenizer)
    allowed = replace(made, options=replace(made.options, max_lost_answers=1.0))
    assert len(fit_answers(allowed, t5.tokenizer)[1]) == 1


def test_official_tasks_are_counted_too(scenes: Path, t5: Backbone) -> None:
    task = load_task("vqav2", scenes / "vqav2", "train")
    options = DataOptions(data_dir=scenes / "vqav2", max_answer_tokens=1, max_lost_answers=1.0)
    _, lines = fit_answers(Splits(task, task, task, task.decoding, options), t5.tokenizer)
    assert any("have more than 1 tokens" in line for line in lines)


def test_candidates_that_the_tokenizer_makes_alike_are_counted(
    splits: Callable[..., Splits], t5: Backbone
) -> None:
    longest = "yellow star above two purple crosses"
    made = splits("red", "red", "red", "日本", "中国", longest)
    made = replace(made, decoding=replace(made.decoding, candidates=("red", "日本", "中国", longest)))
    fitted, lines = fit_answers(made, t5.tokenizer)
    assert fitted.decoding.max_new_tokens == len(t5.tokenizer(longest).input_ids)
    assert len(lines) == 1
    assert "2 of 6 training answers" in lines[0]
    assert "'日本', '中国'" in lines[0]
    _, lines = fit_answers(replace(made, options=replace(made.options, max_answer_tokens=3)), t5.tokenizer)
    assert [longest in line for line in lines] == [True, False]
    many = splits(*["日本", "中国"] * 5)
    many = replace(many, decoding=replace(many.decoding, candidates=("日本", "中国")))
    with pytest.raises(UsageError, match="max_lost_answers"):
        fit_answers(many, t5.tokenizer)
