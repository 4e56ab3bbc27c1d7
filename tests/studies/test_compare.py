"""The comparison: one budget, as many tries for each method, runs that are kept, tables."""

import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import D_MODEL
from helpers import write_vqa
from runs import forget_checksums, with_
from safetensors.torch import load_file, save

import dept_vl.training.identity
import dept_vl.training.run
from benchmarks.compare import best_dev, compare, task_config
from benchmarks.compare_methods import LORA_RATES, ablated, compared
from benchmarks.compare_report import Row, bars, report
from benchmarks.costs import StepCost
from benchmarks.options import COMPARED_TASKS, CompareConfig
from dept_vl._utils.errors import UsageError
from dept_vl._utils.stats import interval
from dept_vl.adapters.tensors import count_trainable
from dept_vl.config import (
    OFFSET_LR,
    OFFSET_LR_ALONE,
    DataOptions,
    OptimOptions,
    RunConfig,
    read_config,
    to_json,
)
from dept_vl.data.splits import load_splits
from dept_vl.models.backbone import Backbone
from dept_vl.prompts.base import METHODS
from dept_vl.tasks import load_task
from dept_vl.tasks.own.options import OwnOptions
from dept_vl.training.build import build_model
from dept_vl.training.identity import DifferentError
from dept_vl.training.owner import owning
from dept_vl.training.run import run
from dept_vl.training.summary import RunResult
from study_data.official import write_concepts
from study_data.questions import CODES

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

ROOT = Path(__file__).parents[2]
OWN = ROOT / "tests" / "fixtures" / "own"
BUDGET = 6 * D_MODEL


@pytest.fixture(scope="module")
def base(
    tmp_path_factory: pytest.TempPathFactory,
    make_run: Callable[..., RunConfig],
) -> Path:
    """A configuration file of a tiny task."""
    folder = tmp_path_factory.mktemp("base")
    config = make_run(
        DataOptions(data_dir=write_vqa(folder / "vqa"), holdout_images=1),
    )
    (folder / "tiny.json").write_text(json.dumps(to_json(config)))
    return folder / "tiny.json"


@pytest.fixture
def _one_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRA at one rate, where nothing is chosen."""
    monkeypatch.setattr("benchmarks.compare_methods.LORA_RATES", LORA_RATES[:1])


@pytest.fixture
def _undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No plots, where they are not looked at."""
    for name in ("draw", "draw_curves"):
        monkeypatch.setattr(f"benchmarks.compare_report.{name}", lambda rows, path: False)


def test_every_method_has_as_many_tries() -> None:
    tries = {name: len(compared()[method.like or name].rates) for name, method in compared().items()}
    assert tries.pop("zero-shot") == 0
    # Given, not chosen:
    assert (tries.pop("dept, default rates"), tries.pop("dept, relative rates")) == (
        1,
        1,
    )  # given, not chosen
    assert set(tries.values()) == {3}
    assert set(METHODS) < compared().keys()
    # Every one of them is another setting of what the method trains.
    assert len({str(rates) for rates in compared()["adept + images, m = 0"].rates}) == 3
    # What is said of the first one.
    default = OptimOptions()
    assert compared()["dept"].rates[0] == {"prompt_lr": default.prompt_lr, "offset_lr": OFFSET_LR}
    assert compared()["memory"].rates[0] == {"offset_lr": OFFSET_LR_ALONE}


def test_every_shipped_task_has_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all((ROOT / path).is_file() for path in COMPARED_TASKS.values())
    monkeypatch.chdir(tmp_path)  # outside the clone
    base = task_config(CompareConfig(), "relabelled", 60)
    assert base.backbone.backbone == ROOT / "data" / "tiny-clip-t5"
    with pytest.raises(UsageError, match="--max_steps"):
        CompareConfig(smallest=True, max_steps=(5,)).check()


def trained(base: Path, name: str) -> dict[str, int]:
    config = task_config(CompareConfig(), str(base), 60)
    return count_trainable(build_model(compared()[name].configure(config)))


@pytest.mark.parametrize("method", METHODS)
def test_prompts_have_one_budget_and_nothing_else_is_trained(base: Path, method: str) -> None:
    counts = trained(base, method)
    assert counts["total"] == counts.get("prompt", 0) + counts.get("low_rank", 0) <= BUDGET
    # What is left over buys no further rank, or none that would change what P can be.
    assert counts["total"] > BUDGET - (2 * D_MODEL + 16 + D_MODEL + 1)


def test_baselines_train_what_they_say(base: Path) -> None:
    backbone = Backbone.from_pretrained(**source(base))
    language = sum(p.numel() for p in backbone.language.parameters())
    projection = sum(p.numel() for p in backbone.visual_projection.parameters() if p.requires_grad)
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
    config = task_config(CompareConfig(), str(base), 60)
    wider = replace(config, prompt=replace(config.prompt, reference_prompt_length=90))
    configured = compared()["LoRA"].configure(wider)
    assert configured.backbone.lora_rank == 90 * D_MODEL // (6 * 4 * D_MODEL) == 3
    assert not any(
        "lora_" in name
        for name, _ in Backbone.from_pretrained(**config.backbone.loading()).named_parameters()
    )


@pytest.mark.usefixtures("_undrawn")
def test_runs_are_kept_and_the_best_rates_chosen_on_the_dev_split(base: Path, tmp_path: Path) -> None:
    methods = ("zero-shot", "dept", "dept + projection")
    config = CompareConfig(
        tasks=(str(base),), methods=methods, seeds=(1, 2), max_steps=(3,), rounds=2, output_dir=tmp_path
    )
    rows = compare(config)
    assert [(row.task, row.method) for row in rows] == [("tiny", name) for name in methods]
    zero, dept, both = rows
    runs = tmp_path / "3-steps" / "tiny" / "dept"
    tries = {path.name.removeprefix("seed1,"): path for path in runs.glob("seed1,*")}
    assert dept.tried == {name: best_dev(path) for name, path in tries.items()}
    assert len(dept.tried) == 3
    best = ",".join(f"{option}={rate:g}" for option, rate in dept.rates.items())
    assert dept.tried[best] == max(dept.tried.values())
    assert [path.name for path in runs.glob("seed2,*")] == [f"seed2,{best}"]
    assert {steps(path) for path in runs.iterdir()} == {3}
    # A prompt with more beside it takes the prompt's rates.
    assert both.rates == dept.rates
    assert len(list((runs.parent / "dept_+_projection").iterdir())) == 2
    assert dept.curve == {3: [best_dev(runs / f"seed{seed},{best}") for seed in config.seeds]}
    assert zero.tried == zero.rates == {}
    assert zero.cost is None
    assert zero.parameters == 0 < dept.parameters
    assert dept.cost is not None
    assert len(dept.cost.seconds) == 2
    assert dept.cost.bytes > 12 * dept.parameters
    content = json.loads((tmp_path / "3-steps" / "comparison.json").read_text())
    assert content["rows"][1]["scores"] == dept.scores
    assert content["config"]["seeds"] == [1, 2]
    (backbone,) = content["config"]["backbones"].values()
    assert backbone == Backbone.from_pretrained(**source(base)).fingerprint
    # Again: only what is missing is run.
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("summary.json")}
    missing = next(iter(times))
    missing.unlink()
    assert [row.scores for row in compare(config)] == [row.scores for row in rows]
    assert missing.is_file()
    assert all(path.stat().st_mtime_ns == time for path, time in times.items() if path != missing)


@pytest.mark.usefixtures("_one_try", "_undrawn")
def test_runs_of_other_data_or_models_are_no_rows(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = read_config(base)
    data = Path(shutil.copytree(usual.data.data_dir or "", tmp_path / "data"))
    language = Path(shutil.copytree(usual.backbone.language or "", tmp_path / "language"))
    own = with_(usual, data={"data_dir": data}, backbone={"language": str(language)})
    (tmp_path / "own.json").write_text(json.dumps(to_json(own)))
    out = tmp_path / "out"
    config = CompareConfig(tasks=(str(tmp_path / "own.json"),), methods=("zero-shot", "LoRA"), seeds=(1,))
    config = replace(config, rounds=1, max_steps=(1,), output_dir=out)
    compare(config)
    costs = out / "own" / "steps.json"
    kept = {path: path.read_bytes() for path in [costs, *out.glob("1-steps/**/*")] if path.is_file()}
    weights, image = language / "model.safetensors", next(data.glob("train2014/*"))
    answers = next(data.glob("*annotations*.json"))
    moved = {name: tensor + 1 for name, tensor in load_file(weights).items()}
    for path, changed, named in (
        (weights, save(moved, {"format": "pt"}), "backbone.language weights="),
        (image, image.read_bytes() + b" ", r"vqav2\.(train|dev|test)\.images="),
        (answers, answers.read_bytes().replace(b'"answer": "red"', b'"answer": "rad"'), r"vqav2\.train="),
    ):
        before = path.read_bytes()
        path.write_bytes(changed)
        with pytest.raises(DifferentError, match=named) as error:
            compare(config)
        assert str(out / "1-steps" / "own" / "zero-shot") in str(error.value)
        path.write_bytes(before)
    assert {path: path.read_bytes() for path in kept} == kept
    # Another length is made of what is there now, and so are its costs; the table of all has this one alone.
    path.write_bytes(changed)
    capsys.readouterr()
    compare(replace(config, max_steps=(2,)))
    assert "the comparison of 1 steps is of other data or models" in capsys.readouterr().out
    table = (out / "lengths.md").read_text()
    assert ("1 steps" in table, "2 steps" in table) == (False, True)
    assert json.loads(costs.read_text())["settings"] != json.loads(kept[costs])["settings"]


@pytest.mark.usefixtures("_undrawn")
def test_data_are_looked_at_once(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CompareConfig(tasks=(str(base),), methods=("dept",), seeds=(1,), rounds=1, max_steps=(1,))
    config = replace(config, output_dir=tmp_path)
    (row,) = compare(config)
    looked = []

    def counted(*arguments: Any) -> Any:
        looked.append(arguments)
        return load_splits(*arguments)

    monkeypatch.setattr(dept_vl.training.identity, "load_splits", counted)
    (again,) = compare(config)
    assert (again.scores, again.tried) == (row.scores, row.tried)
    assert len(row.tried) == 3
    assert len(looked) == 1


def steps(folder: Path) -> int:
    found: int = json.loads((folder / "summary.json").read_text())["steps"]
    return found


def test_a_comparison_that_is_stopped_is_one_of_fewer_seeds(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CompareConfig(tasks=(str(base),), methods=("zero-shot",), seeds=(1, 2), output_dir=tmp_path)

    def stopped_at_second(configured: RunConfig, **options: Any) -> RunResult:
        if configured.train.seed == 2:
            raise KeyboardInterrupt
        return run(configured, **options)

    with monkeypatch.context() as patch:
        patch.setattr(dept_vl.training.run, "run", stopped_at_second)
        with pytest.raises(KeyboardInterrupt):
            compare(config)
    one = json.loads((tmp_path / "60-steps" / "comparison.json").read_text())
    assert one["config"]["seeds"] == [1]
    assert len(one["rows"][0]["scores"]) == 1
    (row,) = compare(config)
    assert row.scores[:1] == one["rows"][0]["scores"]
    assert row.score.count == 2


def test_runs_in_folders_with_the_older_names_of_rates_are_kept(base: Path, tmp_path: Path) -> None:
    config = CompareConfig(tasks=(str(base),), methods=("dept",), output_dir=tmp_path, smallest=True)
    (row,) = compare(config)
    (summary,) = tmp_path.rglob("summary.json")
    folder = summary.parent
    older = folder.rename(folder.with_name(folder.name.replace("offset_lr", "lora_lr")))
    assert older != folder
    content = (older / "config.json").read_text().replace("offset_", "lora_")
    (older / "config.json").write_text(content)
    forget_checksums(older)
    before = (older / "summary.json").stat().st_mtime_ns
    (again,) = compare(config)
    assert (again.scores, again.rates) == (row.scores, row.rates)
    assert [path.parent for path in tmp_path.rglob("summary.json")] == [older]
    assert (older / "summary.json").stat().st_mtime_ns == before


def test_smallest_is_one_run_of_two_steps(base: Path, tmp_path: Path) -> None:
    config = CompareConfig(tasks=(str(base),), methods=("adept",), output_dir=tmp_path, smallest=True)
    (row,) = compare(config)
    (summary,) = tmp_path.rglob("summary.json")
    assert json.loads(summary.read_text())["steps"] == 2
    assert row.score.count == 1


@pytest.mark.parametrize("name", ablated())
def test_what_the_paper_takes_apart_has_its_budget(base: Path, name: str) -> None:
    config = task_config(CompareConfig(), str(base), 60)
    wide = replace(config, prompt=replace(config.prompt, reference_prompt_length=100))
    configured = compared()[name].configure(wide)
    spent = count_trainable(build_model(configured))["total"]
    length = int(name.rpartition("l = ")[2]) if "l = " in name else 100
    assert length * D_MODEL - (D_MODEL + 20) < spent <= length * D_MODEL
    if "m = " in name:
        assert configured.prompt.prompt_length == int(name.rpartition("m = ")[2])


def test_constant_shifts_have_the_budget_and_read_nothing(base: Path) -> None:
    from scripts import why_slow

    names = why_slow.ConstantInput.name, why_slow.ConstantOutput.name
    try:
        for name in names:
            model = build_model(compared()[name].configure(task_config(CompareConfig(), str(base), 60)))
            assert BUDGET - 2 * D_MODEL < count_trainable(model)["total"] <= BUDGET
            assert model.prompt is not None
            shift = model.prompt.memory_offset or model.prompt.visual_offset
            assert shift is not None
            torch.nn.init.normal_(next(shift.parameters()))
            once, again = (shift(torch.randn(2, 9, D_MODEL)) for _ in range(2))
            assert torch.equal(once, again)
            assert len(once.unique(dim=0)) == min(9, len(next(shift.parameters())))
    finally:  # other tests have the methods of the package
        for name in names:
            METHODS.unregister(name)


def test_two_processes_share_the_runs(base: Path, tmp_path: Path) -> None:
    config = CompareConfig(
        tasks=(str(base),), methods=("pt",), seeds=(1,), max_steps=(1,), rounds=1, output_dir=tmp_path
    )
    runs = tmp_path / "1-steps" / "tiny" / "pt"
    first, *others = (runs / f"seed1,prompt_lr={rates['prompt_lr']:g}" for rates in compared()["pt"].rates)
    with ThreadPoolExecutor() as pool:
        with owning(first):  # as another process has it
            compared_here = pool.submit(compare, config)
            while not all((folder / "summary.json").is_file() for folder in others):
                assert not compared_here.done()
                time.sleep(0.01)
            assert not (first / "summary.json").exists()
        (row,) = compared_here.result()
    assert len(row.tried) == 3
    assert (first / "summary.json").is_file()


@pytest.mark.usefixtures("_one_try")
def test_lengths_side_by_side(base: Path, tmp_path: Path) -> None:
    config = CompareConfig(
        tasks=(str(base),), methods=("zero-shot", "LoRA"), seeds=(1,), rounds=1, output_dir=tmp_path
    )
    rows = {steps: compare(replace(config, max_steps=(steps,))) for steps in (1, 2)}
    text = (tmp_path / "lengths.md").read_text()
    assert "| 1 steps | 2 steps |" in text
    for place, name in enumerate(config.methods):
        assert [f"{of_length[place].score}" in text for of_length in rows.values()] == [True, True], name
    gains = [of_length[0].score.mean - of_length[1].score.mean for of_length in rows.values()]
    relative = text.partition("Relative to LoRA")[2]
    assert [cell.strip() for cell in relative.splitlines()[-1].split("|")[2:4]] == [
        f"{x:+.2f}" for x in gains
    ]
    assert (tmp_path / "lengths.png").is_file()
    # A method that one length has not is left blank there.
    compare(replace(config, methods=("zero-shot",), max_steps=(3,)))
    (line,) = [x for x in (tmp_path / "lengths.md").read_text().splitlines() if x.startswith("| LoRA")]
    assert [bool(cell.strip()) for cell in line.split("|")[2:-1]] == [True, True, False]


def test_tables_and_bars(tmp_path: Path) -> None:
    def row(task: str, method: str, scores: list[float], cost: StepCost | None) -> Row:
        tried = {"prompt_lr=0.1": scores[0], "prompt_lr=0.3": scores[0] - 2}
        figure = "CIDEr" if task == "captions" else "overall"
        return Row(
            task, method, figure, interval(scores), scores, {"prompt_lr": 0.1}, tried, 1000, 46.0, cost
        )

    quick, slow = StepCost([0.02, 0.04], 2**20), StepCost([0.06, 0.08], 4 * 2**20)
    rows = [
        row("words", "pt", [60.0, 62.0], slow),
        row("words", "dept", [70.0, 71.0], quick),
        row("words", "lopt", [50.0, 51.0], slow),
        row("captions", "pt", [500.0, 520.0], slow),
        row("captions", "dept", [480.0, 500.0], quick),
        row("captions", "lopt", [700.0, 720.0], slow),
    ]
    report({"seeds": [1, 2]}, {"words": ("yes", 50.0), "captions": None}, rows, tmp_path)
    text = (tmp_path / "comparison.md").read_text()
    for said in (
        "majority answer (yes)",
        # CIDEr counts a tenth: (70 + 48) / 2 and (71 + 50) / 2 against 55 and 57.
        f"DePT's mean over tasks >= PT's: {interval([59.0, 60.5])} against {interval([55.0, 57.0])}, "
        f"difference {interval([4.0, 3.5])} over seeds: met.",
        "Processor time of a step, DePT over PT: 0.42, the median over tasks (0.42 to 0.42): met.",
        "Memory of a step, DePT over PT: 0.25, the median over tasks (0.25 to 0.25): met.",
        f">= DePT: lopt; the best is lopt with {interval([60.0, 61.5])}: met.",
        f"Difference to DePT, seed by seed: pt {interval([-4.0, -3.5])}, lopt {interval([1.0, 1.0])}.",
        "### captions: CIDEr",
        "| prompt_lr=0.3 |",
    ):
        assert said in text
    assert (tmp_path / "comparison.png").stat().st_size > 1000
    # Without PT there is nothing to hold against.
    assert bars([one for one in rows if one.method != "pt"]) == ""


def test_unknown_names_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown method 'magic'; there are: zero-shot, "):
        compare(CompareConfig(methods=("magic",)))
    with pytest.raises(ValueError, match="unknown task or configuration file 'magic'; there are: easy-vqa"):
        compare(CompareConfig(tasks=("magic",)))
    other = shutil.copy(base, tmp_path)  # results are named by the file
    for twice in (
        {"seeds": (1, 1)},
        {"methods": ("dept", "dept")},
        {"tasks": (str(base), other)},
    ):
        with pytest.raises(UsageError, match="more than once"):
            compare(CompareConfig(**twice))


def test_a_run_that_fails_ends_the_comparison(base: Path, tmp_path: Path) -> None:
    config = json.loads(base.read_text())
    config["prompt"]["max_source_length"] = -1
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="max_source_length is -1"):
        compare(CompareConfig(tasks=(str(broken),), methods=("zero-shot",), output_dir=tmp_path / "out"))


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


@pytest.mark.parametrize("file", ["qa.csv", "captions.jsonl"])
def test_data_of_ones_own_are_compared_on(file: str, base: Path, tmp_path: Path) -> None:
    own = OwnOptions(data=str(OWN / file), images=OWN / "photos")
    config = CompareConfig(
        (str(base),),
        ("zero-shot",),
        (1,),
        rounds=1,
        output_dir=tmp_path,
        smallest=True,
        own=own,
    )
    (row,) = compare(config)
    assert (row.task, row.method) == (Path(file).stem, "zero-shot")
    assert row.figure == {"qa.csv": "exact_match", "captions.jsonl": "CIDEr"}[file]
