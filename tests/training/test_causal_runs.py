"""A vision tower and a decoder-only language model through the whole pipeline."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import write_vqa
from runs import assert_same, in_two_processes, reset_accelerate, tensors, tiny_run, with_
from test_resume import assert_answers, assert_goes_on

from dept_vl import load
from dept_vl._utils.errors import UsageError
from dept_vl.config import BackboneOptions, DataOptions, RunConfig
from dept_vl.inference.mixed import load_many
from dept_vl.models.backbone import Backbone
from dept_vl.tasks import load_task
from dept_vl.tasks.vqav2 import VQAv2
from dept_vl.training.extract import extract
from dept_vl.training.options import ExtractConfig
from dept_vl.training.run import run

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(params=[pytest.param("gpt2", marks=pytest.mark.slow), "llama"])
def make(
    request: pytest.FixtureRequest, decoder_folders: dict[str, Path], vision_folders: dict[str, Path]
) -> Callable[..., RunConfig]:
    """Makes a run of CLIP and GPT-2, then of CLIP and Llama."""
    return partial(tiny_run, vision=vision_folders["clip"], language=decoder_folders[request.param])


@pytest.fixture
def config(make: Callable[..., RunConfig], tmp_path: Path) -> RunConfig:
    data = DataOptions(data_dir=write_vqa(tmp_path / "vqa", images=4), holdout_images=1)
    made = make(data, dropout=True, max_steps=4, eval_every=2, checkpoint_every=2)
    return with_(made, output_dir=tmp_path / "whole")


def test_a_run_and_what_comes_of_it(config: RunConfig, tmp_path: Path) -> None:
    """It pauses and goes on to the same bits, answers as it predicted, and mixes with others."""
    assert_goes_on(config, tmp_path / "paused")
    trained = tensors(tmp_path / "whole")
    assert trained["prompt.offset_b"].abs().max() > 0
    assert "visual_projection.linear.weight" in trained
    images, questions, answers = assert_answers(tmp_path / "whole", config.data.data_dir)
    many = load_many({"one": tmp_path / "whole", "two": tmp_path / "whole" / "best"}, device="cpu")
    names = ["one", "two"] * len(images)
    assert many.answer(images, questions, adapters=names[: len(images)]) == answers


def test_features_change_nothing(config: RunConfig, tmp_path: Path) -> None:
    """In memory, encoded at every step, and from files."""
    config = with_(config, backbone={"backbone_dropout": False})
    run(config)
    live = with_(config, data={"features": "live"}, output_dir=tmp_path / "live")
    stored = with_(config, data={"features": "cached"}, output_dir=tmp_path / "stored")
    reset_accelerate()
    extract(ExtractConfig(data=config.data, backbone=config.backbone, dtype="float32"))
    for other in (live, stored):
        reset_accelerate()
        run(other)
        assert other.output_dir is not None
        assert_same(tmp_path / "whole", other.output_dir, atol=1e-5)
    reset_accelerate()
    with pytest.raises(UsageError, match="encoder-decoder"):
        run(with_(config, data={"features": "encoded"}, output_dir=tmp_path / "encoded"))


@pytest.mark.slow
def test_two_processes_train_as_one_does(config: RunConfig, tmp_path: Path) -> None:
    config = with_(config, backbone={"backbone_dropout": False})
    run(config)
    in_two_processes(run, with_(config, output_dir=tmp_path / "two", train={"per_device_batch_size": 2}))
    assert_same(tmp_path / "whole", tmp_path / "two", atol=1e-5)


@pytest.mark.parametrize("task", ["nlvr2", "coco"])
def test_two_images_and_captions(
    make: Callable[..., RunConfig], scenes: Path, tmp_path: Path, task: str
) -> None:
    data = DataOptions(
        task=task,
        data_dir=scenes / task,
        meteor=False,
        max_answer_tokens=8,
        num_beams=2,
        max_lost_answers=1.0,
    )
    config = with_(make(data, max_steps=2), output_dir=tmp_path / "run")
    result = run(config)
    tested = load_task(task, scenes / task, "test1" if task == "nlvr2" else "test")
    assert result.scores
    predictor = load(tmp_path / "run")
    written = tested.prediction_format.read(next((tmp_path / "run").glob("predictions.*")))
    example = tested[0]
    answer = (
        predictor.answer(example.images, example.question)
        if task == "nlvr2"
        else predictor.answer(example.images[0])
    )
    assert answer == written[example.example_id]


def test_a_saved_backbone_is_trained_on(config: RunConfig, tmp_path: Path) -> None:
    """Its folder carries its projection, and gives what the joined models with that projection give."""
    torch.manual_seed(0)
    given = config.backbone
    joined = Backbone.from_pretrained(vision=given.vision, language=given.language)
    joined.save_pretrained(tmp_path / "backbone")
    whole = with_(config, backbone=BackboneOptions(backbone=tmp_path / "backbone"), train={"max_steps": 2})
    run(with_(whole, backbone={"train_projection": False}))
    projection = joined.visual_projection
    assert projection is not None
    kept = Backbone.from_pretrained(tmp_path / "backbone").visual_projection
    assert kept is not None
    assert all(torch.equal(t, kept.state_dict()[n]) for n, t in projection.state_dict().items())
    assert load(tmp_path / "whole", backbone=Backbone.from_pretrained(tmp_path / "backbone")).answer(
        next(iter(VQAv2().load(config.data.data_dir, "val").image_files())),
        "what?",  # type: ignore[arg-type]
    )
