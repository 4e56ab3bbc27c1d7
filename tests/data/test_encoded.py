"""Training on what the frozen encoder made of texts and images is training on texts and images."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import write_vqa
from runs import in_two_processes, reset_accelerate, with_
from safetensors.torch import load_file

from dept_vl._utils.errors import UsageError
from dept_vl.config import DataOptions, RunConfig
from dept_vl.models.backbone import Backbone
from dept_vl.tasks import load_task
from dept_vl.training.run import run

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def config(tmp_path: Path, make_run: Callable[..., RunConfig]) -> RunConfig:
    data = DataOptions(data_dir=write_vqa(tmp_path / "vqa", images=5), holdout_images=1, features="live")
    config = make_run(data, max_steps=6, per_device_batch_size=4, eval_every=3)
    return with_(
        config,
        output_dir=tmp_path / "live",
        prompt={"method": "memory", "rank": 3, "prompt_length": 0},
        optim={"offset_lr": 0.05},
        backbone={"train_projection": False},
    )


def encoded(config: RunConfig, name: str = "encoded", **parts: Any) -> RunConfig:
    reset_accelerate()
    folder = Path(config.output_dir or "").with_name(name)
    return with_(replace(config, output_dir=folder), **{"data": {"features": "encoded"}, **parts})


def tensors(config: RunConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(config.output_dir or "") / "best" / "adapter.safetensors")


def test_results_are_those_of_live_images(config: RunConfig) -> None:
    live, kept = run(config), run(encoded(config))
    assert kept.scores == live.scores
    expected = tensors(config)
    assert any(tensor.abs().sum() > 0 for tensor in expected.values())
    torch.testing.assert_close(tensors(encoded(config)), expected)
    answers = [Path(config.output_dir or "").with_name(name) for name in ("live", "encoded")]
    assert len({(folder / "predictions.json").read_bytes() for folder in answers}) == 1


def test_losses_in_bfloat16_are_those_of_live_images(config: RunConfig) -> None:
    config = replace(config, mixed_precision="bf16")
    losses = []
    for one in (config, encoded(config)):
        reset_accelerate()
        run(one)
        lines = (Path(one.output_dir or "") / "log.jsonl").read_text().splitlines()
        losses.append([record["loss"] for record in map(json.loads, lines) if "loss" in record][:2])
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_the_encoder_reads_every_source_once(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    encode = Backbone.encode

    def counting(self: Backbone, embeddings: torch.Tensor, *args: Any, **named: Any) -> Any:
        rows.append(len(embeddings))
        return encode(self, embeddings, *args, **named)

    monkeypatch.setattr(Backbone, "encode", counting)
    run(encoded(config))
    folder = Path(config.data.data_dir or "")
    tasks = [load_task("vqav2", folder, split) for split in ("train", "val")]
    sources = {(one.source_text, one.images) for task in tasks for one in (task[n] for n in range(len(task)))}
    assert sum(rows) == len(sources)


def test_a_run_that_was_paused_ends_as_one_that_was_not(config: RunConfig) -> None:
    config = with_(config, backbone={"backbone_dropout": True})
    whole, paused = encoded(config), encoded(config, "paused")
    run(whole)
    reset_accelerate()
    run(with_(paused, train={"pause_at": 3}))
    reset_accelerate()
    with pytest.raises(ValueError, match="features"):
        run(with_(paused, resume="auto", data={"features": "live"}))
    reset_accelerate()
    run(replace(paused, resume="auto"))
    for name, tensor in tensors(whole).items():
        assert torch.equal(tensor, tensors(paused)[name])


def test_two_processes_train_as_one_does(config: RunConfig) -> None:
    one, two = encoded(config, "one"), encoded(config, "two", train={"per_device_batch_size": 2})
    two = with_(two, data={"features": "encoded"})
    run(one)
    in_two_processes(run, two)
    for name, tensor in tensors(one).items():
        torch.testing.assert_close(tensors(two)[name], tensor, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("parts", "word"),
    [
        ({"prompt": {"method": "dept", "rank": 2, "prompt_length": 3}}, "memory"),
        ({"backbone": {"train_projection": True}}, "--no_train_projection"),
        ({"backbone": {"train_backbone": True, "train_only": "biases"}}, "train_backbone"),
        ({"data": {"features": "encoded", "feature_memory": 1e-6}}, "feature_memory"),
    ],
)
def test_what_cannot_be_is_refused_before_a_step(config: RunConfig, parts: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError) as caught:
        run(encoded(config, **parts))
    assert "--features encoded" in str(caught.value)
    assert word in str(caught.value)


def test_images_that_cannot_be_read_are_skipped_as_live_ones_are(config: RunConfig) -> None:
    broken = load_task("vqav2", config.data.data_dir, "val").image_files()[0]
    broken.write_bytes(b"no image")
    counts = []
    for one in (config, encoded(config)):
        reset_accelerate()
        with pytest.raises(ValueError, match=re.escape(broken.name)):
            run(one)
        reset_accelerate()
        skipping = with_(one, data={"on_bad_image": "skip"}, output_dir=Path(f"{one.output_dir}-skipping"))
        run(skipping)
        summary = json.loads((Path(skipping.output_dir or "") / "summary.json").read_text())
        counts.append(summary["unanswered_examples"])
    assert counts == [3, 3]
