"""A backbone spread over two processes of a CPU trains and answers as one that is whole."""

import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from helpers import write_vqa
from runs import files, in_two_processes, log, tensors, tiny_run, with_
from torch.distributed.tensor import DTensor

from dept_vl.config import DataOptions, EvaluateConfig, RunConfig
from dept_vl.models import sharding as spread
from dept_vl.models.prompted import PromptedModel
from dept_vl.training import run as runs
from dept_vl.training.run import run
from dept_vl.training.score_run import score_run

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def run_spread(config: RunConfig, notes: Path, *, kind: DistributedType = DistributedType.FSDP) -> None:
    """As a launcher configured for FSDP or ZeRO-3 starts a process; notes its share of each block."""
    ask_for(kind)
    placed = spread.place_model

    def look(model: PromptedModel, accelerator: Accelerator) -> None:
        placed(model, accelerator)
        shares = {
            name: parameter.to_local().numel() / parameter.numel()
            for name, parameter in model.named_parameters()
            if isinstance(parameter, DTensor)
        }
        torch.save(shares, notes / f"shares-{accelerator.process_index}.pt")

    runs.place_model = look  # type: ignore[attr-defined]
    run(config)


def ask_for(kind: DistributedType) -> None:
    if kind == DistributedType.FSDP:
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    else:  # DeepSpeed itself is not at hand: what accelerate would say of it
        Accelerator.distributed_type = property(lambda _: kind)  # type: ignore[assignment]


def score_spread(config: EvaluateConfig) -> None:
    ask_for(DistributedType.FSDP)
    score_run(config)


def configuration(folder: Path, language: Path, vision: Path) -> RunConfig:
    config = tiny_run(
        # 5 images and an odd number of questions: the processes have unequal shares.
        DataOptions(data_dir=write_vqa(folder / "vqa", images=5), holdout_images=1),
        vision=vision,
        language=language,
        max_steps=4,
        per_device_batch_size=2,
        gradient_accumulation_steps=2,
        eval_batch_size=3,
        checkpoint_every=2,
    )
    return replace(config, output_dir=folder / "whole")


@pytest.mark.parametrize(
    ("language", "kind"),
    [
        ("t5", DistributedType.FSDP),
        pytest.param("bart", DistributedType.FSDP, marks=pytest.mark.slow),
        pytest.param("t5", DistributedType.DEEPSPEED, marks=pytest.mark.slow),
    ],
)
def test_spread_equals_whole(
    language: str,
    kind: DistributedType,
    tmp_path: Path,
    language_folders: dict[str, Path],
    vision_folders: dict[str, Path],
) -> None:
    config = configuration(tmp_path, language_folders[language], vision_folders["clip"])
    spread_config = replace(config, output_dir=tmp_path / "spread")
    in_two_processes(run, config)
    in_two_processes(partial(run_spread, kind=kind), spread_config, tmp_path)
    for which in ("best", "last"):
        whole, of_spread = tensors(tmp_path / "whole", which), tensors(tmp_path / "spread", which)
        assert whole.keys() == of_spread.keys()
        for name in whole:
            torch.testing.assert_close(of_spread[name], whole[name], rtol=1e-3, atol=1e-5)
    losses = [
        [line["loss"] for line in log(tmp_path / name) if "loss" in line] for name in ("whole", "spread")
    ]
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-4, atol=1e-5)
    assert files(tmp_path / "whole").keys() == files(tmp_path / "spread").keys()
    name = "predictions.json"
    assert (tmp_path / "spread" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    for rank in range(2):
        shares = torch.load(tmp_path / f"shares-{rank}.pt")
        assert len(shares) > 10
        assert all("language" in name or "vision" in name for name in shares)
        assert sum(shares.values()) / len(shares) == pytest.approx(0.5, abs=0.05)
    # Going on from a checkpoint of the spread run, and answering with its adapter on one device.
    (tmp_path / "spread" / "summary.json").unlink()
    before = tensors(tmp_path / "spread")
    in_two_processes(run_spread, replace(spread_config, resume=str(tmp_path / "spread")), tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in tensors(tmp_path / "spread").items())
    whole_answers = score_run(
        EvaluateConfig(run=tmp_path / "spread", split="val", output_dir=tmp_path / "one")
    )
    in_two_processes(
        score_spread, EvaluateConfig(run=tmp_path / "spread", split="val", output_dir=tmp_path / "two")
    )
    assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert len(whole_answers.evaluation.predictions) % 2


def test_a_backbone_that_is_trained_is_not_spread(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    language_folders: dict[str, Path],
    vision_folders: dict[str, Path],
) -> None:
    config = configuration(tmp_path, language_folders["t5"], vision_folders["clip"])
    monkeypatch.setattr(spread, "_asked", lambda _: True)
    with pytest.raises(ValueError, match="spread a frozen backbone here, and this language model is trained"):
        run(with_(config, backbone={"train_backbone": True}))
