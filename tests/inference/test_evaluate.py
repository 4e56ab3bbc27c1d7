"""Every example is answered once, by the model as it is in use."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from helpers import write_vqa
from own_files import QUESTION, lines, own, written

from dept_vl._utils import terminal
from dept_vl._utils.terminal import Count
from dept_vl.data.collate import Collator
from dept_vl.inference.evaluate import Evaluation, checked_scores, evaluate
from dept_vl.models.backbone import Backbone
from dept_vl.models.prompted import PromptedModel
from dept_vl.prompts.dept import DePT
from dept_vl.tasks.base import Decoding
from dept_vl.tasks.metrics.vqa import vqa_accuracy
from dept_vl.tasks.vqav2 import VQAv2


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(True)


@pytest.fixture
def model(t5: Backbone) -> PromptedModel:
    prompt = DePT(t5.d_model, prompt_length=3, rank=2, max_source_length=16)
    torch.nn.init.normal_(prompt.offset_b)
    return PromptedModel(t5, prompt)


@pytest.fixture
def task(tmp_path: Path) -> VQAv2:
    return VQAv2().load(write_vqa(tmp_path, images=3), "val")


@pytest.fixture
def answer(model: PromptedModel, task: VQAv2, accelerator: Accelerator) -> Callable[..., Evaluation]:
    """Evaluates the model on the task."""

    def run(batch_size: int = 4, **options: Any) -> Evaluation:
        collator = Collator(
            model.backbone.tokenizer, max_source_length=16, max_target_length=10, images=model.backbone.vision
        )
        return evaluate(model, task, collator, accelerator, batch_size=batch_size, **options)

    return run


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_every_id_is_answered_once(
    answer: Callable[..., Evaluation], task: VQAv2, model: PromptedModel, batch_size: int
) -> None:
    seen: list[int] = []
    model.backbone.vision.register_forward_hook(  # type: ignore[union-attr]
        lambda module, inputs, output: seen.append(len(output))
    )
    predictions = answer(batch_size).predictions
    assert set(predictions) == {task[index].example_id for index in range(len(task))}
    assert sum(seen) == len(task) == 9


def test_answers_do_not_depend_on_the_batch(answer: Callable[..., Evaluation]) -> None:
    assert answer(1).predictions == answer(4).predictions == answer(9).predictions


def test_scores_are_those_of_the_predictions(answer: Callable[..., Evaluation], task: VQAv2) -> None:
    evaluation = answer()
    assert evaluation.scores == task.score(evaluation.predictions)
    assert task.primary in evaluation.scores


def test_predictions_are_what_is_scored(
    answer: Callable[..., Evaluation], task: VQAv2, model: PromptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The official scorer compares raw where ten humans agree, so the file has to hold what was scored.
    monkeypatch.setattr(
        model.backbone.tokenizer, "batch_decode", lambda tokens, **options: ["The Red."] * len(tokens)
    )
    evaluation = answer()
    official = [vqa_accuracy(evaluation.predictions[row["question_id"]], row["answers"]) for row in task.rows]
    assert set(evaluation.predictions.values()) == {"red"}
    assert evaluation.scores["overall"] == round(100 * sum(official) / len(official), 2) > 0


def test_rows_with_choices_and_rows_without_share_a_batch(
    model: PromptedModel, accelerator: Accelerator, tmp_path: Path
) -> None:
    choices = [["red", "blue", "no"], [], ["yes", "no"], []]
    rows = [QUESTION | {"question": f"what {n}?", "choices": some} for n, some in enumerate(choices)]
    for row in rows:
        row["answer"] = (row["choices"] or ["red"])[0]
    own_task = own(written(tmp_path, lines(*rows)))
    collator = Collator(
        model.backbone.tokenizer, max_source_length=16, max_target_length=10, images=model.backbone.vision
    )
    alone, together = (
        evaluate(model, own_task, collator, accelerator, batch_size=size).predictions for size in (1, 4)
    )
    assert alone == together
    assert all(said in some for said, some in zip(together.values(), choices, strict=True) if some)


def test_text_tokens_are_the_mean_length(
    answer: Callable[..., Evaluation], task: VQAv2, model: PromptedModel
) -> None:
    tokenizer = model.backbone.tokenizer
    lengths = [min(16, len(tokenizer(task[index].source_text).input_ids)) for index in range(len(task))]
    assert len(set(lengths)) > 1
    assert answer(2).text_tokens == pytest.approx(sum(lengths) / len(lengths))


@pytest.mark.parametrize("training", [True, False])
def test_answers_in_evaluation_mode_and_restores_the_mode(
    answer: Callable[..., Evaluation], model: PromptedModel, training: bool
) -> None:
    model.train(training)
    modes: list[bool] = []
    model.backbone.language.get_encoder().register_forward_pre_hook(
        lambda module, inputs: modes.append(module.training)
    )
    predictions = answer().predictions
    assert set(modes) == {False}
    assert model.training == model.backbone.training == training
    model.eval()
    assert answer().predictions == predictions


def test_leaves_no_gradient(answer: Callable[..., Evaluation], model: PromptedModel) -> None:
    answer()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_more_beams_find_likelier_answers(answer: Callable[..., Evaluation], model: PromptedModel) -> None:
    beams: list[int] = []
    generate = model.generate

    def noting(*args: Any, **options: Any) -> torch.Tensor:
        beams.append(options["num_beams"])
        assert options["max_new_tokens"] == 10
        return generate(*args, **options)

    model.generate = noting  # type: ignore[method-assign]
    answer(9)
    answer(9, decoding=Decoding(10, num_beams=3))
    assert beams == [1, 3]


def test_an_example_without_image_is_answered_with_nothing_and_counted(
    model: PromptedModel, task: VQAv2, accelerator: Accelerator
) -> None:
    task.images(0)[0].write_bytes(b"no image")
    collator = Collator(model.backbone.tokenizer, 16, 10, model.backbone.vision, on_bad_image="skip")
    evaluation = evaluate(model, task, collator, accelerator, batch_size=2)
    assert sorted(map(int, evaluation.skipped)) == [10_000, 10_001, 10_002]
    assert {evaluation.predictions[key] for key in evaluation.skipped} == {""}
    assert evaluation.predictions.keys() == set(task.example_ids())
    assert evaluation.scores == task.score(evaluation.predictions)


def test_candidates_are_all_that_is_answered(answer: Callable[..., Evaluation]) -> None:
    candidates = ("red", "green circles", "no")  # of words that the task writes as they are
    found = answer(decoding=Decoding(10, candidates=candidates)).predictions
    assert set(found.values()) <= set(candidates)
    (only,) = set(answer(decoding=Decoding(10, candidates=("blue",))).predictions.values())
    assert only == "blue"


def test_of_several_processes_the_count_is_that_of_all(
    answer: Callable[..., Evaluation],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The main process of two has every second example: one batch of four here says eight."""
    clock = iter(range(0, 10**6, 11))
    monkeypatch.setattr(terminal, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(Count, "told_at", 0.0)
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    monkeypatch.setattr(VQAv2, "score", lambda *_: {})
    answer(4)
    said = [line.split(",")[0] for line in capsys.readouterr().err.splitlines()]
    assert said[:2] == ["evaluating: 8 of 9", "evaluating: 9 of 9"]


def test_scores_are_plain_numbers_with_the_primary_first() -> None:
    found = checked_scores(VQAv2(), {"other": torch.tensor(2.0), "overall": np.float32(3)})
    assert list(found.items()) == [("overall", 3.0), ("other", 2.0)]
    assert {type(value) for value in found.values()} == {float}
    assert checked_scores(VQAv2(), {}) == {}


@pytest.mark.parametrize(
    "scores", [{"overall": math.nan}, {"overall": 1, "f1": math.inf}, {"overall": "high"}, {"f1": 3.0}]
)
def test_scores_that_decide_nothing_are_refused(scores: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="of vqav2"):
        checked_scores(VQAv2(), scores)
