"""Comparison, transfer, ranking, demo and card of pretrained models, after a run of each family."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import write_vqa
from runs import reset_accelerate, tiny_run, with_

import dept_vl
from benchmarks.compare import compare
from benchmarks.options import CompareConfig
from dept_vl._utils.errors import UsageError
from dept_vl._utils.printable import printable
from dept_vl.adapters.adapter import Adapter
from dept_vl.adapters.card import model_card
from dept_vl.config import BackboneOptions, DataOptions, EvaluateConfig, RunConfig, to_json
from dept_vl.inference import demo
from dept_vl.models.pretrained_vlm import open_backbone
from dept_vl.studies.options import TransferConfig
from dept_vl.studies.transfer import transfer
from dept_vl.training.run import run
from dept_vl.training.score_run import score_run

pytestmark = [pytest.mark.usefixtures("fresh_accelerate"), pytest.mark.slow]


@pytest.fixture(scope="module", params=["blip2", "qwen2_5_vl", "paligemma"])
def trained(
    request: pytest.FixtureRequest,
    pretrained_folder: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> RunConfig:
    """A run: on an encoder-decoder, with positions in three dimensions, with a prefix read both ways."""
    root, model = tmp_path_factory.mktemp(request.param), pretrained_folder(request.param)
    data = DataOptions(data_dir=write_vqa(root / "vqa", images=8), holdout_images=2)
    config = tiny_run(data, vision=model, language=model)
    config = replace(config, backbone=BackboneOptions(model=str(model)), output_dir=root / "run")
    reset_accelerate()
    run(with_(config, prompt={"rank": None}))
    return with_(config, prompt={"rank": None})


def comparison(trained: RunConfig, tmp_path: Path, **options: Any) -> CompareConfig:
    (tmp_path / "base.json").write_text(json.dumps(to_json(trained)))
    return CompareConfig(
        tasks=(str(tmp_path / "base.json"),),
        seeds=(1,),
        rounds=1,
        output_dir=tmp_path / "compare",
        smallest=True,
        **options,
    )


def test_compared_with_lora(trained: RunConfig, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    # Of a composed backbone, which the model replaces.
    composed = with_(trained, backbone={"model": None, "backbone": Path("data/tiny-clip-t5")})
    carried, left_out = {"zero-shot", "pt", "dept", "LoRA", "BitFit"}, {"memory", "adept + images"}
    left_out |= {"dept + projection", "LoRA + projection"}
    methods = tuple(sorted(carried | left_out))
    config = comparison(composed, tmp_path, model=trained.backbone.model, methods=methods)
    rows = {row.method: row for row in compare(config)}
    assert set(rows) == carried
    width = open_backbone(model=trained.backbone.model).d_model
    budget = trained.prompt.reference_prompt_length * width
    assert 0 < rows["dept"].parameters <= rows["pt"].parameters == budget
    assert rows["LoRA"].parameters > 0
    assert rows["LoRA"].cost is not None
    assert rows["zero-shot"].parameters == 0
    report = (tmp_path / "compare" / "2-steps" / "comparison.md").read_text().splitlines()
    noted = [line.partition(" is left out: ")[0] for line in report if " is left out: " in line]
    assert set(noted) == left_out
    assert len(noted) == len(left_out)


def test_what_no_pretrained_model_carries_is_refused_where_nothing_else_is_asked_for(
    trained: RunConfig, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"memory is left out: .*pt, dept, adept"):
        compare(comparison(trained, tmp_path, methods=("memory",)))
    assert not (tmp_path / "compare" / "2-steps").exists()


def test_transferred(trained: RunConfig, tmp_path: Path) -> None:
    reset_accelerate()
    transfer(
        TransferConfig(
            source=(str(trained.output_dir),),
            target="vqav2",
            data_dir=trained.data.data_dir,
            k=(1,),
            seeds=1,
            max_steps=2,
            test_limit=4,
            output_dir=tmp_path / "transfer",
        )
    )
    assert (tmp_path / "transfer" / "transfer.md").is_file()


def test_answers_cards_and_pages(trained: RunConfig, tmp_path: Path) -> None:
    folder = trained.output_dir
    assert folder is not None
    assert (folder / "report.html").stat().st_size > 10_000
    assert trained.data.data_dir is not None
    picture = next(trained.data.data_dir.rglob("*.jpg"))
    many = dept_vl.load_many({"one": folder, "two": folder})
    together = many.answer([picture] * 3, ["is it red?"] * 3, adapters=["one", None, "two"])
    assert together[0] == together[2] == dept_vl.load(folder).answer(picture, "is it red?")
    shown = {"path": str(picture), "orig_name": picture.name}
    said = demo.respond(many, "one", [shown, None], "is it red?", picture.parent)
    assert said[0] == printable(together[0])
    (tmp_path / "candidates.json").write_text(json.dumps(["yes", "no", "two"]))
    ranked = score_run(EvaluateConfig(run=folder, candidates=tmp_path / "candidates.json"))
    assert set(ranked.evaluation.predictions.values()) <= {"yes", "no", "2"}  # as the scorer has them
    adapter = json.loads((folder / "best" / "adapter.json").read_text())
    card = model_card("someone/prompt", adapter, images=True)
    assert adapter["backbone"]["name"] in card
    assert Adapter.from_pretrained(folder).trainable_parameters["total"] > 0
