"""A backbone spread over two processes of a CPU trains and answers as one that is whole."""

import os
from collections.abc import Callable, Iterator
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
from zoo.vlm_subjects import asked
from zoo.vlms import FAMILIES

from dept_vl._utils.errors import UsageError
from dept_vl.config import BackboneOptions, DataOptions, EvaluateConfig, RunConfig
from dept_vl.data.feature_index import fingerprint
from dept_vl.models import sharding as spread
from dept_vl.models.pretrained_vlm import VisionLanguageModel
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


def configuration(folder: Path, **parts: Path) -> RunConfig:
    """A run on `vision` and `language`, or on a pretrained `model`."""
    config = tiny_run(
        # 5 images and an odd number of questions: the processes have unequal shares.
        DataOptions(data_dir=write_vqa(folder / "vqa", images=5), holdout_images=1),
        vision=parts.get("vision", folder),
        language=parts.get("language", folder),
        max_steps=4,
        per_device_batch_size=2,
        gradient_accumulation_steps=2,
        eval_batch_size=3,
        checkpoint_every=2,
    )
    if "model" in parts:
        config = replace(config, backbone=BackboneOptions(model=str(parts["model"]), backbone_dropout=False))
    return replace(config, output_dir=folder / "whole")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("t5", DistributedType.FSDP),
        pytest.param("bart", DistributedType.FSDP, marks=pytest.mark.slow),
        pytest.param("t5", DistributedType.DEEPSPEED, marks=pytest.mark.slow),
        *(pytest.param(family, DistributedType.FSDP, marks=pytest.mark.slow) for family in FAMILIES),
    ],
)
def test_spread_equals_whole(
    name: str,
    kind: DistributedType,
    tmp_path: Path,
    language_folders: dict[str, Path],
    vision_folders: dict[str, Path],
    pretrained_folder: Callable[[str], Path],
) -> None:
    if name in FAMILIES:
        config = configuration(tmp_path, model=pretrained_folder(name))
    else:
        config = configuration(tmp_path, language=language_folders[name], vision=vision_folders["clip"])
    spread_config = replace(config, output_dir=tmp_path / "spread")
    in_two_processes(run, config)
    in_two_processes(partial(run_spread, kind=kind), spread_config, tmp_path)
    for which in ("best", "last"):
        whole, of_spread = tensors(tmp_path / "whole", which), tensors(tmp_path / "spread", which)
        assert whole.keys() == of_spread.keys()
        for tensor in whole:
            torch.testing.assert_close(of_spread[tensor], whole[tensor], rtol=1e-3, atol=1e-5)
    losses = [
        [line["loss"] for line in log(tmp_path / which) if "loss" in line] for which in ("whole", "spread")
    ]
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-4, atol=1e-5)
    assert files(tmp_path / "whole").keys() == files(tmp_path / "spread").keys()
    said = "predictions.json"
    assert (tmp_path / "spread" / said).read_bytes() == (tmp_path / "whole" / said).read_bytes()
    for rank in range(2):
        shares = torch.load(tmp_path / f"shares-{rank}.pt")
        assert len(shares) > 10
        assert all("language" in tensor or "vision" in tensor for tensor in shares)
        assert sum(shares.values()) / len(shares) == pytest.approx(0.5, abs=0.05)
    # Going on from a checkpoint of the spread run, and answering with its adapter on one device.
    (tmp_path / "spread" / "summary.json").unlink()
    before = tensors(tmp_path / "spread")
    in_two_processes(run_spread, replace(spread_config, resume=str(tmp_path / "spread")), tmp_path)
    assert all(torch.equal(value, before[tensor]) for tensor, value in tensors(tmp_path / "spread").items())
    whole_answers = score_run(
        EvaluateConfig(run=tmp_path / "spread", split="val", output_dir=tmp_path / "one")
    )
    in_two_processes(
        score_spread, EvaluateConfig(run=tmp_path / "spread", split="val", output_dir=tmp_path / "two")
    )
    assert (tmp_path / "one" / said).read_bytes() == (tmp_path / "two" / said).read_bytes()
    assert len(whole_answers.evaluation.predictions) % 2


def test_a_backbone_that_is_trained_is_not_spread(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    language_folders: dict[str, Path],
    vision_folders: dict[str, Path],
) -> None:
    config = configuration(tmp_path, language=language_folders["t5"], vision=vision_folders["clip"])
    monkeypatch.setattr(spread, "_asked", lambda _: True)
    with pytest.raises(ValueError, match="spread a frozen backbone here, and this language model is trained"):
        run(with_(config, backbone={"train_backbone": True}))


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Accelerator]:
    """The only process of a group, as if it were one of several that share a backbone."""
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(spread, "_asked", lambda _: True)
    yield Accelerator(cpu=True)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "family",
    [name if name == "florence2" else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES],
)
def test_a_pretrained_model_is_spread(
    alone: Accelerator, pretrained_folder: Callable[[str], Path], family: str
) -> None:
    """Layers of the language model and of the image encoder, lists of lists among them; the same bits."""
    backbone = VisionLanguageModel.from_pretrained(pretrained_folder(family))
    model, labels = PromptedModel(backbone).eval(), torch.tensor([[5, 6, 7]] * 2)
    inputs = asked(backbone, range(2))
    stored = fingerprint(backbone.image_features()) if family == "florence2" else None
    with torch.no_grad():
        expected = model(**inputs, labels=labels).logits
        spread.place_model(model, alone)
        assert torch.equal(model(**inputs, labels=labels).logits, expected)
    backbone.probe()
    assert stored is None or fingerprint(backbone.image_features()) == stored
    encoder = backbone.image_encoder()
    assert encoder is not None
    for part in (encoder, backbone.language):
        assert any(isinstance(parameter, DTensor) for parameter in part.parameters())
    backbone.load_in = "4bit"
    with pytest.raises(UsageError, match="--load_in 4bit"):
        spread.place_model(model, alone)
