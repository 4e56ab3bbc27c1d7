"""The comparison: one budget, as many tries for each method, runs that are kept, tables."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import D_MODEL
from helpers import write_vqa
from runs import tiny_run

from dept_vl import family
from dept_vl.backbone import Backbone
from dept_vl.checkpoint import count_trainable
from dept_vl.compare import COMPARED, TASKS, CompareConfig, task_config
from dept_vl.config import DataOptions, to_json
from dept_vl.run import build_model, load_backbone
from dept_vl.scenes.official import write_concepts
from dept_vl.scenes.questions import CODES
from dept_vl.tasks import load_task
from scripts import compare as script

ROOT = Path(__file__).parents[1]
BUDGET = 6 * D_MODEL


@pytest.fixture(scope="module")
def base(
    tmp_path_factory: pytest.TempPathFactory,
    language_folders: dict[str, Path],
    vision_folders: dict[str, Path],
) -> Path:
    """A configuration file of a tiny task."""
    folder = tmp_path_factory.mktemp("base")
    config = tiny_run(
        DataOptions(data_dir=write_vqa(folder / "vqa"), holdout_images=1),
        vision=vision_folders["clip"],
        language=language_folders["t5"],
    )
    (folder / "tiny.json").write_text(json.dumps(to_json(config)))
    return folder / "tiny.json"


def test_every_method_has_as_many_tries() -> None:
    tries = {name: len(method.rates) for name, method in COMPARED.items()}
    assert tries.pop("zero-shot") == 0
    assert set(tries.values()) == {4}
    assert set(family.METHODS) < COMPARED.keys()


def test_every_shipped_task_has_a_configuration() -> None:
    assert all((ROOT / path).is_file() for path in TASKS.values())


def trained(base: Path, name: str) -> dict[str, int]:
    config = task_config(CompareConfig(), str(base))
    return count_trainable(build_model(COMPARED[name].configure(config)))


@pytest.mark.parametrize("method", family.METHODS)
def test_prompts_have_one_budget_and_nothing_else_is_trained(base: Path, method: str) -> None:
    counts = trained(base, method)
    assert counts["total"] == counts.get("prompt", 0) + counts.get("low_rank", 0) <= BUDGET
    # What is left over buys no further rank, or none that would change what P can be.
    assert counts["total"] > BUDGET - (2 * D_MODEL + 16 + D_MODEL + 1)


def test_baselines_train_what_they_say(base: Path) -> None:
    backbone = Backbone.from_pretrained(**source(base))
    language = sum(p.numel() for p in backbone.language.parameters())
    projection = sum(p.numel() for p in backbone.visual_projection.parameters())
    assert trained(base, "zero-shot")["total"] == 0
    assert trained(base, "projection only")["total"] == projection
    assert trained(base, "full fine-tuning")["total"] == language
    assert trained(base, "BitFit")["total"] == 12 * D_MODEL  # the scales of T5's norms
    pytest.importorskip("peft")
    pair = 2 * 2 * D_MODEL
    # Rank 1 is over the tiny budget already, and is taken as the least there is.
    assert trained(base, "LoRA")["total"] == (2 + 2 * 2) * pair > BUDGET
    assert trained(base, "dept + projection")["visual_projection"] == projection


def source(base: Path) -> dict[str, str]:
    options = json.loads(base.read_text())["backbone"]
    return {"vision": options["vision"], "language": options["language"]}


def test_lora_takes_the_largest_rank_of_the_budget(base: Path) -> None:
    pytest.importorskip("peft")
    config = task_config(CompareConfig(), str(base))
    wider = replace(config, prompt=replace(config.prompt, reference_prompt_length=90))
    configured = COMPARED["LoRA"].configure(wider)
    assert configured.backbone.lora_rank == 90 * D_MODEL // (6 * 4 * D_MODEL) == 3
    assert not any("lora_" in name for name, _ in load_backbone(config.backbone).named_parameters())


def test_runs_are_kept_and_the_best_rates_chosen_on_the_dev_split(base: Path, tmp_path: Path) -> None:
    config = CompareConfig(
        tasks=(str(base),), methods=("zero-shot", "dept"), seeds=(1, 2), max_steps=2, output_dir=tmp_path
    )
    rows = script.main(config)
    assert [(row.task, row.method) for row in rows] == [("tiny", "zero-shot"), ("tiny", "dept")]
    folders = sorted(path.name for path in (tmp_path / "tiny" / "dept").iterdir())
    assert len([name for name in folders if name.startswith("seed1,")]) == 4
    (second,) = [name for name in folders if name.startswith("seed2,")]
    zero, dept = rows
    best = max(dept.tried.values())
    assert dept.tried["seed1" + second.removeprefix("seed2")] == best
    assert zero.tried == zero.rates == {}
    assert zero.parameters == 0 < dept.parameters
    assert dept.score.count == 2
    assert dept.peak_mib > 100
    report = (tmp_path / "comparison.md").read_text()
    for said in (
        "majority answer (no)",
        "| dept",
        f"{dept.parameters:,}",
        str(dept.score),
        "### tiny: overall",
    ):
        assert said in report
    content = json.loads((tmp_path / "comparison.json").read_text())
    assert content["rows"][1]["scores"] == dept.scores
    # Again: only what is missing is run.
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("summary.json")}
    missing = next(iter(times))
    missing.unlink()
    assert [row.scores for row in script.main(config)] == [row.scores for row in rows]
    assert missing.is_file()
    assert all(path.stat().st_mtime_ns == time for path, time in times.items() if path != missing)


def test_smallest_is_one_run_of_two_steps(base: Path, tmp_path: Path) -> None:
    config = CompareConfig(tasks=(str(base),), methods=("adept",), output_dir=tmp_path, smallest=True)
    (row,) = script.main(config)
    (summary,) = tmp_path.rglob("summary.json")
    assert json.loads(summary.read_text())["steps"] == 2
    assert row.score.count == 1


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown methods \['magic'\]; there are: zero-shot, "):
        script.main(CompareConfig(methods=("magic",)))
    with pytest.raises(
        ValueError, match="unknown task 'magic'; expected a configuration file or one of easy-vqa"
    ):
        script.main(CompareConfig(tasks=("magic",)))


def test_a_run_that_fails_ends_the_comparison(base: Path, tmp_path: Path) -> None:
    config = json.loads(base.read_text())
    config["prompt"]["max_source_length"] = 1
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps(config))
    with pytest.raises(SystemExit) as stopped:
        script.main(CompareConfig(tasks=(str(broken),), methods=("zero-shot",), output_dir=tmp_path / "out"))
    assert stopped.value.code == 1


def test_concepts_are_new_and_in_the_form_of_vqav2(tmp_path: Path) -> None:
    write_concepts(tmp_path / "concepts", train=30, val=20)
    codes = load_task("vqav2", tmp_path / "concepts" / "relabelled", "train")
    assert len(codes) == 30
    answers = {codes[index].answer for index in range(30)}
    assert answers <= set(CODES.values())
    assert len(answers) > 3
    # As written they are what is learnt: normalisation changes none of them.
    assert all(codes[index].targets == ((codes[index].answer, 1.0),) for index in range(30))
    judged = load_task("vqav2", tmp_path / "concepts" / "many-or-few", "val")
    assert {judged[index].answer for index in range(20)} == {"many", "few"}
    with pytest.raises(FileExistsError):
        write_concepts(tmp_path / "concepts")
    with pytest.raises(ValueError, match="val=0"):
        write_concepts(tmp_path / "more", val=0)
