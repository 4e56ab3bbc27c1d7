"""The model card: what the Hub reads of it, and what people do."""

import ast
import re
from typing import Any

import pytest
from huggingface_hub import ModelCard

from dept_vl.adapters.card import model_card

COUNTS = {"prompt": 1280, "low_rank": 20424, "visual_projection": 33792}
COUNTS |= {"total": 55496, "without_projection": 21704}
PROMPT = {"method": "dept", "prompt_length": 5, "rank": 71, "max_source_length": 32, "d_model": 256}
PROMPT |= {"alpha": 8.0, "scale": 0.9494, "seed": 0}
BOTH = {"language": "0123456789abcdef", "vision": "fedcba9876543210"}


def described(**changed: Any) -> dict[str, Any]:
    backbone = {"name": "openai/clip+google-t5/t5-base", "fingerprint": BOTH, "visual_position_bias": "none"}
    return {
        "prompt": PROMPT,
        "backbone": backbone | changed.pop("backbone", {}),
        "task": "vqav2",
        "metrics": {"overall": 61.504, "answer_type/yes/no": 80.0, "question_type/is the": 71.0},
        "trainable_parameters": COUNTS,
        "format_version": 1,
        **changed,
    }


def card(*, images: bool = True, training: Any = None, **changed: Any) -> ModelCard:
    text = model_card("someone/adapter", described(**changed), images=images, training=training)
    return ModelCard(text)


def cells(text: str) -> dict[str, str]:
    """The first column of all tables with the last one."""
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return {row[0].strip(): row[-1].strip() for row in rows}


def test_what_the_hub_reads() -> None:
    data = card().data
    assert data.base_model == ["openai/clip", "google-t5/t5-base"]
    assert (data.library_name, data.pipeline_tag) == ("dept_vl", "visual-question-answering")
    assert data.tags == ["dept", "prompt-tuning"]
    results = {(r.metric_name, r.metric_type, r.metric_value, r.dataset_name) for r in data.eval_results}
    assert results == {
        ("overall (0-100)", "accuracy", 61.5, "vqav2"),
        ("answer_type/yes/no (0-100)", "accuracy", 80.0, "vqav2"),
    }


def test_names_of_strangers_do_not_reach_the_hub() -> None:
    found = card(backbone={"name": "a\x1b[31m\n<script>/b"}, metrics={"over\x1b[2J\nall": 1.0})
    assert found.data.base_model is None
    assert "\x1b" not in str(found)
    assert [result.metric_name for result in found.data.eval_results] == [r"over\x1b[2J\nall (0-100)"]


def test_what_people_read() -> None:
    found = cells(card().text)
    assert found["overall"] == "61.50"
    assert "question_type/is the" not in found
    assert (found["vectors of the prompt (m)"], found["rank (r)"]) == ("5", "71")
    assert found["longest text in tokens (s)"] == "32"
    assert (found["visual_projection"], found["in all"]) == ("33,792", "55,496")
    assert found["without the visual projection"] == "21,704"
    assert BOTH["language"] in card().text


@pytest.mark.parametrize(
    ("task", "images", "metrics", "pipeline", "metric"),
    [
        ("coco", True, {"CIDEr": 112.0}, "image-to-text", "cider"),
        ("nlvr2", True, {"accuracy": 70.0}, "image-text-to-text", "accuracy"),
        ("cola", False, {"matthews": 60.0}, "text-classification", "matthews_correlation"),
        ("newsqa", False, {"em": 40.0}, "question-answering", "exact_match"),
        ("of my own", False, {"score": 40.0}, "text-generation", "score"),
    ],
)
def test_tasks(task: str, images: bool, metrics: dict[str, float], pipeline: str, metric: str) -> None:
    data = card(images=images, task=task, metrics=metrics).data
    assert data.pipeline_tag == pipeline
    assert [(r.metric_type, r.dataset_name) for r in data.eval_results] == [(metric, task)]


def test_scales_are_told() -> None:
    text = card(task="coco", metrics={"CIDEr": 112.0, "Bleu_4": 34.0}).text
    assert re.search(r"CIDEr +\| +x100 +\| +112.00", text)
    assert re.search(r"Bleu_4 +\| +0-100 +\| +34.00", text)


def test_several_tasks() -> None:
    data = card(task="vqav2+gqa", metrics={"vqav2/overall": 60.0, "gqa/accuracy": 50.0}).data
    assert [(r.dataset_name, r.metric_value) for r in data.eval_results] == [("vqav2", 60.0), ("gqa", 50.0)]


def test_without_figures() -> None:
    found = card(task="", metrics={})
    assert found.data.eval_results is None
    assert "None are on record." in found.text


def test_a_base_that_is_on_no_hub_is_not_named_as_one() -> None:
    """`base_model` is a link; a folder's name would lead somewhere else or nowhere."""
    for name in ("tiny-clip-t5", "/models/t5+/models/clip", "./t5", "a/b/c"):
        found = card(backbone={"name": name})
        assert found.data.base_model is None
        assert f"`{name}`" in found.text


def test_without_a_prompt() -> None:
    counts = {"backbone": 3_302_144, "total": 3_302_144, "without_projection": 3_302_144}
    found = card(prompt=None, trainable_parameters=counts)
    assert "## Prompt" not in found.text
    assert "was trained in part" in found.text
    assert cells(found.text)["backbone"] == "3,302,144"


@pytest.mark.parametrize(
    "changed",
    [
        {"images": True},
        {"images": True, "task": "nlvr2"},
        {"images": True, "task": "gqa+vqav2"},
        {"images": True, "task": "of my own"},
        {"images": False, "task": "of my own"},
        {"images": False, "task": "cola", "backbone": {"fingerprint": {"language": "0" * 16}}},
        {"images": False, "task": "cola", "backbone": {"fingerprint": None, "visual_position_bias": None}},
        {
            "images": True,
            "task": "vqa",
            "backbone": {"fingerprint": {"class": "Blip2ForConditionalGeneration", "all": "0" * 16}},
        },
    ],
)
def test_the_code_on_it_names_the_adapter_and_is_python(changed: dict[str, Any]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", card(**changed).text, re.DOTALL)
    ast.parse(code)
    assert '"someone/adapter"' in code


def test_how_it_was_trained() -> None:
    training = {
        "data": {"task": "gqa"},
        "optim": {"prompt_lr": 0.3, "offset_lr": 0.001, "projection_lr": 0.001},
        "train": {"max_steps": 150, "per_device_batch_size": 64, "seed": 42},
    }
    text = card(task="gqa", training=training).text
    assert cells(text)["learning rate of the prompt (`--prompt_lr`)"] == "0.3"
    assert "accelerate launch -m dept_vl train --config training.json" in text
    assert "## Training" not in card(task="gqa").text


def test_what_an_adapter_says_is_text() -> None:
    odd = """x`y"\n</b><script>alert(1)</script>![x](http://y)\x1b[31m|[1]: z"""
    found = card(
        task=odd,
        metrics={odd: 1.0, "overall": 61.5},
        backbone={"name": odd, "fingerprint": {odd: odd, "class": "T5 import y; z()"}},
        training={"optim": {"prompt_lr": odd}},
    )
    code = re.findall(r"```python\n(.*?)```", found.text, re.DOTALL)
    assert len(code) == 1
    assert [type(one) for one in ast.walk(ast.parse(code[0])) if isinstance(one, ast.Import)] == []
    text = found.text.replace(code[0], "")
    outside = re.sub(r"`[^`\n]*`", "", text)
    assert "script>" not in outside
    assert "](http://y" not in outside
    assert "\x1b" not in found.text
    assert [line for line in outside.splitlines() if line.startswith(("</b>", "[1]:"))] == []
    assert all(line.count("|") in (3, 4) for line in text.splitlines() if line.startswith("|"))
    assert found.data.model_name == "someone/adapter"
