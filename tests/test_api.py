"""The public names: every one is documented, its example runs, and importing the package costs nothing."""

import ast
import doctest
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_image
from runs import alone, reset_accelerate, with_
from transformers.utils import logging
from zoo.ready_made import ready_made

import dept_vl
import dept_vl.api
from dept_vl._utils.errors import UsageError
from dept_vl.config import DataOptions, RunConfig, to_json
from dept_vl.models.backbone import Backbone
from dept_vl.training.run import run
from dept_vl.training.summary import RunResult

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def folder(
    scenes: Path,
    make_run: Callable[..., RunConfig],
    _loaded: Callable[..., Backbone],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """What the examples find beside them: data, a small backbone, a finished run, an image."""
    place = tmp_path_factory.mktemp("examples")
    shutil.copytree(scenes / "vqav2", place / "data" / "vqav2")
    _loaded("t5", "clip", "none").save_pretrained(place / "data" / "tiny-clip-t5")
    random_image((40, 36)).save(place / "street.jpg")
    data = DataOptions(data_dir=place / "data" / "vqav2", dev_split="val", dev_limit=4)
    reset_accelerate()
    run(with_(make_run(data), output_dir=place / "runs" / "vqa"))
    reset_accelerate()
    return place


@pytest.fixture
def beside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the examples, as the current one."""
    monkeypatch.chdir(folder)
    return folder


class AnyOutput(doctest.OutputChecker):
    """Where an example shows no output it may print what it likes, as `train` does."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


def test_an_unknown_keyword_is_named_with_the_closest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown option 'splitt'; .*; closest: split"):
        dept_vl.evaluate(tmp_path, splitt="train")
    with pytest.raises(UsageError, match=r"unknown option 'image'; .*; closest: images"):
        dept_vl.load_task("vqa", data="x.csv", image="photos")


def test_a_number_out_of_range_is_told_as_by_the_command(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="limit is -3; expected 0 or more"):
        dept_vl.evaluate(tmp_path, split="train", limit=-3)
    with pytest.raises(UsageError, match="batch_size is 0; expected 1 or more; num_workers is -1"):
        dept_vl.evaluate(tmp_path, batch_size=0, num_workers=-1)


@pytest.mark.parametrize("name", dept_vl.__all__)
def test_every_public_name_has_a_docstring_with_an_example_that_runs(name: str, beside: Path) -> None:
    thing = getattr(dept_vl, name)
    assert thing is getattr(sys.modules[thing.__module__], name)
    assert (thing.__doc__ or "").strip()
    names = {"blip2": ready_made("blip2")} if name in ("attach", "Attached") else {}
    test = doctest.DocTestParser().get_doctest(inspect.getdoc(thing) or "", names, name, None, None)
    assert test.examples
    runner = doctest.DocTestRunner(checker=AnyOutput())
    said: list[str] = []
    runner.run(test, out=said.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(said)


def test_type_checkers_and_the_table_of_names_know_all_of_them() -> None:
    tree = ast.parse(Path(dept_vl.__file__ or "").read_text())
    imports = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dept_vl")
        for alias in node.names
    }
    assert imports == {name: f"dept_vl.{module}" for name, module in dept_vl._MODULES.items()}
    assert sorted(imports) == dept_vl.__all__
    assert set(dept_vl.__all__) <= set(dir(dept_vl))
    assert all(f"`{name}`" in (dept_vl.api.__doc__ or "") for name in dept_vl.__all__)
    with pytest.raises(AttributeError, match="Tuner"):
        dept_vl.Tuner  # noqa: B018


def test_importing_the_package_costs_nothing() -> None:
    code = (
        "import sys, dept_vl; heavy = {'torch', 'transformers', 'pyarrow', 'accelerate', 'numpy'};"
        "dir(dept_vl); print(sorted(heavy & sys.modules.keys()))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "[]"


def test_the_readme_trains_from_python(beside: Path, make_run: Callable[..., RunConfig]) -> None:
    page = Path(__file__).parents[1] / "dept_vl" / "inference" / "README.md"
    blocks = page.read_text().split("```python\n")[1:]
    (block,) = [block.split("```")[0] for block in blocks if "dept_vl.train(" in block.split("```")[0]]
    config = make_run(DataOptions(data_dir=Path("data/vqav2"), dev_split="val", dev_limit=4))
    Path("data/configs").mkdir()
    Path("data/configs/easy-vqa.json").write_text(json.dumps(to_json(config)))
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["trained"].folder == Path("runs/python").absolute()
    assert 0 <= names["trained"].scores["overall"] <= 100


def test_training_twice_as_in_a_notebook(
    beside: Path, make_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Runs of one process, of other precision and determinism, and in other modes: nothing is left behind."""
    config = with_(make_run(DataOptions(dev_split="val", dev_limit=4)), output_dir=tmp_path / "one")
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    drawn = np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[union-attr]
    logging.enable_progress_bar()  # which a run disables
    first = dept_vl.train(config)
    assert not torch.are_deterministic_algorithms_enabled()
    second = dept_vl.train(
        with_(config, output_dir=tmp_path / "two", mixed_precision="bf16", train={"deterministic": True})
    )
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        third = dept_vl.train(with_(config, output_dir=tmp_path / "three"))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert np.random.get_state()[1].tolist() == drawn[0]  # type: ignore[union-attr]
    assert torch.equal(torch.get_rng_state(), drawn[1])
    assert not torch.are_deterministic_algorithms_enabled()
    assert logging.is_progress_bar_enabled()
    assert first.scores == third.scores
    assert first.finished
    assert second.finished
    assert first.adapter.metrics == first.scores
    assert first.trainable["total"] > 0
    for name, tensor in first.adapter.tensors.items():
        assert torch.equal(tensor, third.adapter.tensors[name])
    for trained in (first, second):
        answer = dept_vl.load(trained.folder).answer("street.jpg", "what colour is the car?")
        assert isinstance(answer, str)


SCRIPT = """
import random, sys
from dataclasses import replace
from pathlib import Path
import dept_vl
from dept_vl.config import read_config

config = replace(read_config(Path(sys.argv[1])), output_dir=Path(sys.argv[2]))
before = random.getstate()
trained = dept_vl.train(config)
assert random.getstate() == before
print("scores:", trained.scores)
"""


def test_one_thread_trains_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    training, most = [], []

    def slowly(config: RunConfig, **options: Any) -> RunResult:
        training.append(config)
        time.sleep(0.05)
        most.append(len(training))
        training.remove(config)
        return RunResult(Path(), {}, {})

    monkeypatch.setattr(dept_vl.api, "run", slowly)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(dept_vl.train, [RunConfig()] * 3))
    assert most == [1, 1, 1]


def plain_script(folder: Path, *arguments: str, said: Path) -> None:
    os.chdir(folder)
    sys.argv = ["script", *arguments]
    with said.open("w") as file, redirect_stdout(file):
        exec(SCRIPT, {"__name__": "__main__"})


def test_training_in_a_plain_script(beside: Path, tmp_path: Path) -> None:
    script = partial(plain_script, beside, "runs/vqa/config.json", str(tmp_path / "run"))
    assert alone(partial(script, said=tmp_path / "said")) == 0
    said = (tmp_path / "said").read_text()
    summary = json.loads((beside / "runs" / "vqa" / "summary.json").read_text())
    assert said.splitlines()[-1] == f"scores: {summary['scores']}"


def test_evaluating_a_run_an_adapter_and_a_predictor_gives_the_same(beside: Path, tmp_path: Path) -> None:
    predictor = dept_vl.load("runs/vqa")
    shutil.copytree("runs/vqa/best", tmp_path / "adapter")
    of_run = dept_vl.evaluate("runs/vqa", split="val")
    assert of_run.output_dir is None
    for source in ("runs/vqa/best", predictor):
        assert dept_vl.evaluate(source, split="val").predictions == of_run.predictions
    of_adapter = dept_vl.evaluate(tmp_path / "adapter", split="val", output_dir=tmp_path / "written")
    assert of_adapter.predictions == of_run.predictions
    assert of_adapter.scores == of_run.scores
    assert {path.name for path in (tmp_path / "written").iterdir()} >= {"predictions.json", "scores.json"}
    with pytest.raises(FileExistsError):
        dept_vl.evaluate(predictor, split="val", output_dir=tmp_path / "written")
    with pytest.raises(UsageError, match="gqa"):
        dept_vl.evaluate(predictor, task="gqa")


@pytest.mark.parametrize(
    ("option", "value"),
    [("limit", -1), ("batch_size", 0), ("num_workers", -1)],
)
def test_options_of_an_evaluation_are_checked_as_those_of_the_command(option: str, value: Any) -> None:
    with pytest.raises(UsageError, match=option):
        dept_vl.evaluate("runs/vqa", **{option: value})


def test_a_prompt_without_a_configuration(t5: Backbone) -> None:
    prompt = dept_vl.build_prompt("dept", t5, prompt_length=4, rank=2, max_source_length=9, init="random")
    assert (prompt.prompt_length, prompt.max_source_length) == (4, 9)
    words: Any = dept_vl.build_prompt(
        "pt", t5, reference_prompt_length=3, init="text", init_text="red no yes"
    )
    ids = t5.tokenizer("red no yes", add_special_tokens=False, return_tensors="pt").input_ids
    assert torch.equal(words.vectors()[: ids.shape[1]], t5.embed(ids)[0, :3])
    with pytest.raises(UsageError):
        dept_vl.build_prompt("dept", t5, prompt_length=0, rank=0)
