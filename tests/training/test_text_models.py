"""A pretrained model without images through `train_nlp.py --model`, and asked afterwards."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dept_vl import load
from dept_vl.adapters.adapter import Adapter
from dept_vl.cli import parse, predict, train
from dept_vl.tasks import load_task
from dept_vl.tasks.text.table import TEXT_TASKS
from scripts.train_nlp import DEFAULTS

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

TEXTS = ("is it red ? yes", "no star")
LABELS = ("negative", "positive")


def write_sst2(folder: Path, labels: tuple[int, int]) -> Path:
    """Rows of two texts by turns, with the label of each."""
    folder.mkdir()
    for split in ("train", "validation", "test"):
        rows = [{"sentence": TEXTS[n % 2], "label": labels[n % 2], "idx": n} for n in range(16)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("llama_text", (1, 0)),
        pytest.param("llama_text", (0, 1), marks=pytest.mark.slow),
        pytest.param("gpt2_text", (1, 0), marks=pytest.mark.slow),
        ("t5_text", (1, 0)),
    ],
)
def test_it_learns_what_the_labels_say_and_answers_so(
    name: str,
    labels: tuple[int, int],
    pretrained_folder: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, run = write_sst2(tmp_path / "data", labels), tmp_path / "run"
    options = {"task": "sst2", "data_dir": data, "model": pretrained_folder(name), "output_dir": run}
    steps = 2 if name == "t5_text" else 40
    options |= {"max_steps": steps, "eval_every": steps, "per_device_batch_size": 8, "warmup_steps": 0}
    options |= {"prompt_length": 8, "reference_prompt_length": 20, "max_source_length": 28}
    options |= {"prompt_lr": 0.5, "offset_lr": 0.05, "seed": 1}
    given = [word for option, value in options.items() for word in (f"--{option}", str(value))]
    assert train(given, DEFAULTS, TEXT_TASKS) == 0
    expected = [LABELS[label] for label in labels]
    if name == "t5_text":  # of random weights the decoder hears too little of the source to learn this
        expected = [str(answer) for answer in load(run / "best").answer(None, TEXTS)]
    assert load(run).answer(None, TEXTS) == expected
    test = load_task("sst2", data, "test")
    predictions = test.prediction_format.read(run / "predictions.json")
    said = {f"sst2 sentence: {text}": answer for text, answer in zip(TEXTS, expected, strict=True)}
    assert all(predictions[test[n].example_id] == said[test[n].question] for n in range(len(test)))
    moved = Adapter.load(run / "best").tensors["prompt.offset_b"]
    assert moved.abs().max() > 0
    capsys.readouterr()
    predict([*TEXTS, "--adapter", str(run)])
    assert capsys.readouterr().out.splitlines() == expected


@pytest.mark.parametrize("option", ["--model", "--backbone"])
def test_a_whole_model_takes_the_place_of_the_script_s_own(option: str) -> None:
    about, given = "Train.", [option, "tiny"]
    assert parse(DEFAULTS, about, []).backbone == DEFAULTS.backbone
    whole = parse(DEFAULTS, about, given).backbone
    assert whole.language is None
    assert str(whole.model or whole.backbone) == "tiny"
    # What is asked for besides is refused, where it is opened.
    assert parse(DEFAULTS, about, [*given, "--language", "t5"]).backbone.language == "t5"
