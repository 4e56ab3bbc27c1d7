"""A method that users register works wherever the built-in ones do."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers import write_vqa
from PIL import Image
from runs import reset_accelerate, with_
from torch import Tensor, nn

import dept_vl
from benchmarks.compare import CompareConfig, compare
from dept_vl._utils.errors import UnknownNameError
from dept_vl.adapters.adapter import Adapter
from dept_vl.config import DataOptions, RunConfig, to_json
from dept_vl.prompts.base import METHODS, Method
from dept_vl.prompts.dept import DePT
from dept_vl.prompts.methods import build
from dept_vl.training.run import run

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


class Shift(nn.Module):
    """The same shift for every token; zero until it is trained."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(d_model))

    def forward(self, vectors: Tensor) -> Tensor:
        return self.bias.to(vectors.dtype).expand_as(vectors)


# As the recipe of `register_method` has it.
class Shifted(Method):
    name, has_rank = "shifted", False

    def build(self) -> DePT:
        return DePT(**self.common, token_offset=Shift(self.d_model))


SIZES = {"d_model": 4, "prompt_length": 3, "rank": 0, "max_source_length": 8}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    assert dept_vl.register_method(Shifted) is Shifted
    yield
    METHODS.unregister("shifted")


@pytest.fixture
def config(make_run: Callable[..., RunConfig], tmp_path: Path) -> RunConfig:
    data = DataOptions(data_dir=write_vqa(tmp_path / "vqa"), holdout_images=1)
    config = make_run(data)
    prompt = {"method": "shifted", "rank": None}
    return with_(config, prompt=prompt, optim={"offset_lr": 0.1}, output_dir=tmp_path / "run")


def test_it_trains_saves_loads_and_answers_beside_another(config: RunConfig, tmp_path: Path) -> None:
    result = run(config)
    width = result.trainable["low_rank"]
    assert result.trainable["prompt"] == 3 * width
    adapter = Adapter.load(result.output_dir / "best")
    assert adapter.prompt is not None
    assert (adapter.prompt["method"], adapter.prompt["rank"]) == ("shifted", 0)
    assert adapter.tensors["prompt.token_offset.bias"].abs().max() > 0
    adapter.save(tmp_path / "copy")
    assert Adapter.load(tmp_path / "copy").prompt == adapter.prompt

    reset_accelerate()
    other = with_(config, prompt={"method": "dept", "rank": 2}, output_dir=tmp_path / "other")
    folders = {"shifted": result.output_dir, "dept": run(other).output_dir}
    image, questions = Image.new("RGB", (32, 32), "red"), ["what is it?", "is it red?"]
    alone = {name: dept_vl.load(folder).answer(image, questions) for name, folder in folders.items()}
    many = dept_vl.load_many(folders)
    rows = [(name, question) for name in folders for question in questions]
    mixed = many.answer(image, [q for _, q in rows], adapters=[name for name, _ in rows])
    assert mixed == [*alone["shifted"], *alone["dept"]]


def test_it_is_compared(config: RunConfig, tmp_path: Path) -> None:
    base = with_(config, prompt={"method": "dept"}, output_dir=None)
    (tmp_path / "tiny.json").write_text(json.dumps(to_json(base)))
    (row,) = compare(
        CompareConfig(
            tasks=(str(tmp_path / "tiny.json"),),
            methods=("shifted",),
            output_dir=tmp_path / "compared",
            smallest=True,
        )
    )
    assert row.method == "shifted"
    assert set(row.rates) == {"prompt_lr", "offset_lr"}
    assert (tmp_path / "compared" / "2-steps" / "comparison.md").is_file()


def test_a_name_is_taken_once_and_known_only_while_registered(config: RunConfig) -> None:
    with pytest.raises(ValueError, match="'shifted' is registered already"):
        dept_vl.register_method(type("Other", (Shifted,), {}))
    again = type("Shifted", (Shifted,), {"__module__": __name__})  # as by running its cell again
    assert dept_vl.register_method(again) is METHODS["shifted"]
    METHODS.unregister("shifted")
    try:
        with pytest.raises(ValueError, match=r"unknown method 'shifted'; there are: pt, dept"):
            run(config)
        with pytest.raises(UnknownNameError):
            METHODS["shifted"]
    finally:
        dept_vl.register_method(Shifted)


def other(**members: object) -> type[Method]:
    """A method that differs from `Shifted`."""
    return type("Other", (Shifted,), {"name": "other", "has_rank": False, **members})


def test_what_builds_no_prompt_is_refused() -> None:
    assert build(other()(**SIZES)).method.name == "other"
    with pytest.raises(ValueError, match="returned a Linear"):
        other(build=lambda self: nn.Linear(2, 2)).groups()


def test_buffers_that_no_adapter_would_hold_are_refused() -> None:
    def built(self: Method) -> DePT:
        shift = Shift(self.d_model)
        shift.register_buffer("mean", torch.zeros(self.d_model))
        return DePT(**self.common, token_offset=shift)

    with pytest.raises(ValueError, match=r"token_offset\.mean"):
        other(build=built).groups()


def test_a_module_in_two_places_is_trained_once() -> None:
    def built(self: Method) -> DePT:
        shift = Shift(self.d_model)
        return DePT(**self.common, token_offset=shift, visual_offset=shift)

    shapes = other(build=built)(**SIZES).trained()
    assert shapes == {"prompt": {"soft_prompt": (3, 4)}, "low_rank": {"token_offset.bias": (4,)}}


def test_a_rank_that_buys_nothing_is_refused() -> None:
    sizes = {"d_model": 4, "max_source_length": 8, "reference_prompt_length": 9, "prompt_length": 3}
    with pytest.raises(ValueError, match="has_rank = False"):
        other(has_rank=True).solve(**sizes)


@pytest.mark.parametrize("name", ["", "a/b", "..", "a+b", 5, None])
def test_a_name_that_no_folder_has_is_refused(name: object) -> None:
    with pytest.raises(ValueError, match="name that a folder can have"):
        dept_vl.register_method(other(name=name))


@pytest.mark.parametrize("method", ["shifted", Shifted(**SIZES), Method])
def test_what_is_no_method_is_refused(method: object) -> None:
    with pytest.raises(TypeError):
        dept_vl.register_method(method)
