"""Few shots, prompts that start from trained ones, and the table of both."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import torch
from conftest import D_MODEL
from helpers import task_of, write_vqa
from runs import in_two_processes, reset_accelerate, tensors, with_

from dept_vl._utils.errors import UsageError
from dept_vl._utils.stats import interval, quantile
from dept_vl.adapters.adapter import Adapter
from dept_vl.adapters.warm_start import inherit
from dept_vl.config import DataOptions, RunConfig, read_config, to_json
from dept_vl.data.shots import draw_shots, read_shots
from dept_vl.data.splits import load_splits
from dept_vl.models.backbone import Backbone
from dept_vl.models.prompted import PromptedModel
from dept_vl.prompts.base import sized
from dept_vl.prompts.methods import build
from dept_vl.studies.options import TransferConfig
from dept_vl.studies.transfer import cell_config, source_config, target_config, transfer
from dept_vl.tasks import load_task
from dept_vl.tasks.own.options import OwnOptions
from dept_vl.tasks.vqav2 import VQAv2
from dept_vl.training.identity import DifferentError
from dept_vl.training.run import run

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

OWN = Path(__file__).parents[1] / "fixtures" / "own"
SIZES = {"prompt_length": 3, "rank": 2, "max_source_length": 16}


def yes_no(yes: int, no: int, images: list[int] | None = None) -> VQAv2:
    return task_of(*[["yes"] * 10] * yes, *[["no"] * 10] * no, images=images)


def test_shots_are_of_each_class_and_differ_in_seed() -> None:
    task = yes_no(20, 30)
    shots = draw_shots(task, 4, seed=1)
    for side in (shots.train, shots.dev):
        answers = [task[index].answer for index in side]
        assert (answers.count("yes"), answers.count("no")) == (4, 4)
        assert list(side) == sorted(set(side))
    assert not set(shots.train) & set(shots.dev)
    assert shots.classes == ("no", "yes")
    assert shots == draw_shots(task, 4, seed=1)
    assert shots != draw_shots(task, 4, seed=2)


def test_shots_in_all_are_spread_over_the_classes() -> None:
    shots = draw_shots(yes_no(30, 30), 16, seed=1, per="all")
    for side in (shots.train, shots.dev):
        assert len(side) == 16
        assert Counter(yes_no(30, 30)[place].answer for place in side) == {"no": 8, "yes": 8}
    odd = draw_shots(yes_no(30, 30), 5, seed=1, per="all")
    assert Counter(yes_no(30, 30)[place].answer for place in odd.train) == {"no": 3, "yes": 2}


def test_shots_may_be_chosen_on_the_dev_split(scenes: Path) -> None:
    options = DataOptions(task="nlvr2", data_dir=scenes / "nlvr2", shots=4, shots_per="all", dev_limit=0)
    on_shots, on_split = load_splits(options, 0), load_splits(replace(options, shots_dev="split"), 0)
    assert on_shots.train.example_ids() == on_split.train.example_ids()
    assert (len(on_shots.train), len(on_shots.dev)) == (4, 4)
    assert on_split.dev.example_ids() == load_task("nlvr2", scenes / "nlvr2", "dev").example_ids()
    vqa = DataOptions(task="vqav2", data_dir=scenes / "vqav2", shots=2, shots_dev="split", dev_split="")
    with pytest.raises(UsageError, match="dev_split"):
        load_splits(vqa, 0)


def test_the_papers_shots_are_a_preset(base: RunConfig, source: Path) -> None:
    config = TransferConfig(source=(str(source),), target=base.data.task, preset="paper")
    data = target_config(config).data
    assert (data.shots_per, data.shots_dev, data.dev_limit) == ("all", "split", 0)
    data = target_config(replace(config, preset="own")).data
    assert (data.shots_per, data.shots_dev, data.dev_limit) == ("class", "shots", base.data.dev_limit)


def test_a_source_that_was_started_from_another_leaves_nothing_to_the_targets_runs(
    base: RunConfig, source: Path, tmp_path: Path
) -> None:
    also = DataOptions(task="gqa", data_dir=tmp_path / "gqa")
    warm = with_(
        base,
        also=(also,),
        data={"shots_file": tmp_path / "shots.json"},
        prompt={"init_from": (source,), "init_parts": "all"},
        train={"pause_at": 1},
    )
    (tmp_path / "config.json").write_text(json.dumps(to_json(warm)))
    config = TransferConfig(source=(str(source),), target=base.data.task, config=tmp_path / "config.json")
    of_target = target_config(config)
    assert of_target.prompt == base.prompt
    assert (of_target.data.shots_file, of_target.train.pause_at, of_target.also) == (None, 0, ())
    assert cell_config(config, of_target, [source], 4, 1, "scratch").prompt.init_from == ()
    assert cell_config(config, of_target, [source], 4, 1, "all").prompt.init_from == (source,)
    assert target_config(replace(config, target="gqa")).data.data_dir == also.data_dir
    of_source = source_config(replace(config, max_steps=1), "gqa")
    assert (of_source.data, of_source.also) == (also, ())
    assert (
        of_source.train.max_steps == read_config(config.config or Path()).train.max_steps
    )  # not --max_steps


def test_a_target_without_published_answers_is_refused(base: RunConfig, scenes: Path, tmp_path: Path) -> None:
    hidden = with_(base, data={"data_dir": scenes / "vqav2", "test_split": "test"})
    with pytest.raises(ValueError, match="no published answers"):
        transfer(transfer_config(hidden, tmp_path, "vqav2", starts=("scratch",), k=(1,), seeds=1))


@pytest.mark.parametrize(
    "twice", [{"k": (2, 2)}, {"starts": ("scratch", "scratch")}, {"source": ("gqa", "gqa")}]
)
def test_no_run_counts_twice(source: Path, twice: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="more than once"):
        transfer(TransferConfig(**{"source": (str(source),), "target": "vqav2", **twice}))


def test_open_answers_are_drawn_as_they_come() -> None:
    task = task_of(*[[word] * 10 for word in ["red", "green", "blue", "teal", "pink", "gray"]] * 3)
    shots = draw_shots(task, 5, seed=1)
    assert shots.classes == ()
    assert (len(shots.train), len(shots.dev)) == (5, 5)


def test_no_image_is_on_both_sides() -> None:
    # Four questions to an image.
    task = yes_no(40, 40, images=[number // 4 for number in range(80)])
    for seed in range(5):
        shots = draw_shots(task, 4, seed)
        images = [
            {path for index in side for path in task.images(index)} for side in (shots.train, shots.dev)
        ]
        assert not images[0] & images[1]


def test_too_few_of_a_class_are_named_and_counted() -> None:
    with pytest.raises(ValueError, match=r"8 examples of the class 'yes' .* has 15: choose a smaller k"):
        draw_shots(yes_no(15, 100), 8, seed=1)
    with pytest.raises(ValueError, match=r"4 shots are 4 examples to learn .* has 7:"):
        draw_shots(task_of(*[[word] * 10 for word in "abcdefg"]), 4, seed=1)


def test_text_and_pairs_have_classes(scenes: Path, tmp_path: Path) -> None:
    pairs = load_task("nlvr2", scenes / "nlvr2", "train")
    assert draw_shots(pairs, 2, seed=1).classes == ("false", "true")
    rows = [{"sentence": f"film {n}", "label": n % 2} for n in range(20)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = load_task("snippets", tmp_path, "train")
    shots = draw_shots(text, 3, seed=1)
    assert shots.classes == ("negative", "positive")
    assert len(shots.train) == len(shots.dev) == 6


def test_shots_are_kept_and_used_again(scenes: Path, tmp_path: Path) -> None:
    options = DataOptions(
        task="nlvr2", data_dir=scenes / "nlvr2", test_split="test1", shots=2, shots_seed=3
    )  # fmt: skip
    drawn = load_splits(options, 0)
    assert drawn.shots is not None
    path = tmp_path / "shots.json"
    drawn.shots.write(path)
    again = load_splits(replace(options, shots=0, shots_file=path), 0)
    assert again.shots == drawn.shots
    for side in ("train", "dev"):
        assert getattr(again, side).example_ids() == getattr(drawn, side).example_ids()
        assert len(getattr(drawn, side)) == 4
    with pytest.raises(ValueError, match="give one"):
        load_splits(replace(options, shots_file=path), 0)
    whole = load_task("nlvr2", scenes / "nlvr2", "train")
    with pytest.raises(ValueError, match="of another training split: expected places below 2"):
        read_shots(path, whole.subset([0, 1]))
    with pytest.raises(ValueError, match="of another training split: the examples at its indices differ"):
        read_shots(path, whole.subset(range(len(whole))[::-1]))
    older = tmp_path / "older" / "shots.json"
    older.parent.mkdir()
    older.write_text(json.dumps(json.loads(path.read_text()) | {"content": ""}))
    assert read_shots(older, whole).train == drawn.shots.train


@pytest.mark.parametrize("change", [{"train": []}, {"dev": [1, 1]}, {"k": "two"}, {"more": 1}])
def test_damaged_shots_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "shots.json"
    path.write_text(json.dumps({"k": 1, "seed": 0, "classes": [], "train": [0], "dev": [1]} | change))
    with pytest.raises(ValueError, match=r"shots\.json is damaged"):
        read_shots(path, yes_no(5, 5))


@pytest.mark.parametrize("count", [2, 3, 5, 11, 31, 32, 60])
def test_interval_is_students(count: int) -> None:
    values = torch.randn(count, dtype=torch.float64).tolist()
    found = interval(values)
    low, high = scipy.stats.t.interval(
        0.95, count - 1, loc=found.mean, scale=scipy.stats.sem(values)
    )  # fmt: skip
    assert found.half_width == pytest.approx((high - low) / 2, rel=1e-4)
    assert found.mean == pytest.approx(sum(values) / count)
    assert quantile(count) == pytest.approx(scipy.stats.t.ppf(0.975, count), rel=1e-4)


def test_interval_of_one_and_of_none() -> None:
    assert str(interval([3.0])) == "3.00"
    assert str(interval([1.0, 3.0])) == "2.00 ± 12.71"
    with pytest.raises(ValueError, match="found none"):
        interval([])


def model_of(backbone: Backbone, method: str = "dept", **sizes: int) -> PromptedModel:
    of_method = {"pt": {"rank": 0}, "memory": {"prompt_length": 0}}.get(method, {})
    prompt = build(sized(method, d_model=D_MODEL, **(SIZES | of_method | sizes)))
    model = PromptedModel(backbone, prompt)
    for parameter in prompt.parameters():
        torch.nn.init.normal_(parameter)
    return model


def saved(model: PromptedModel, folder: Path) -> Path:
    Adapter.of(model, task="vqav2", metrics={}).save(folder)
    return folder


@pytest.mark.parametrize("method", ["dept", "adept", "hybrid", "residual", "lopt", "ulpt", "memory"])
def test_all_of_one_source_is_taken_exactly(
    make_backbone: Callable[..., Backbone], tmp_path: Path, method: str
) -> None:
    backbone = make_backbone("t5")
    source, target = model_of(backbone, method), model_of(backbone, method)
    inherit(target, [saved(source, tmp_path)], "all")
    theirs = dict(source.prompt.named_parameters())
    assert all(torch.equal(p, theirs[name]) for name, p in target.prompt.named_parameters())
    assert all(p.requires_grad for p in target.prompt.parameters())


def test_frozen_values_come_along_with_a_source(
    make_backbone: Callable[..., Backbone], tmp_path: Path
) -> None:
    backbone = make_backbone("t5")
    source, target = (model_of(backbone, "ulpt", seed=seed) for seed in (42, 1))
    inherit(target, [saved(source, tmp_path)], "all")
    assert torch.equal(target.prompt.vectors(), source.prompt.vectors())
    assert target.prompt.describe()["seed"] == 42
    again = saved(source, tmp_path / "again")
    with pytest.raises(ValueError, match="seed=42 there, 1 here"):  # a mean has no frozen values of its own
        inherit(model_of(backbone, "ulpt", seed=1), [saved(source, tmp_path / "one"), again], "all")


@pytest.mark.parametrize("method", ["pt", "dept", "adept", "hybrid"])
def test_the_prompt_alone_goes_to_any_method(
    make_backbone: Callable[..., Backbone], tmp_path: Path, method: str
) -> None:
    backbone = make_backbone("t5")
    source, target = model_of(backbone, "lopt"), model_of(backbone, method)
    before = {name: p.detach().clone() for name, p in target.prompt.named_parameters()}
    inherit(target, [saved(source, tmp_path)], "prompt")
    assert torch.equal(target.prompt.vectors(), source.prompt.vectors())
    changed = {name for name, p in target.prompt.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"soft_prompt"}


def test_mean_of_several(make_backbone: Callable[..., Backbone], tmp_path: Path) -> None:
    backbone = make_backbone("t5")
    one, other = model_of(backbone), model_of(backbone)
    target = model_of(backbone, rank=4)
    paths = [saved(model_of(backbone, rank=4), tmp_path / "wide")]
    with pytest.raises(ValueError, match="rank=2 there, 4 here"):
        inherit(target, [*paths, saved(one, tmp_path / "one")], "all")
    # Rank 2 and rank 2 make rank 4, so the mean of two such products can be met exactly.
    for model, name in ((one, "one"), (other, "other")):
        wide = model_of(backbone, rank=4)
        with torch.no_grad():
            wide.prompt.soft_prompt.copy_(model.prompt.soft_prompt)
            for ours, theirs in (
                (wide.prompt.offset_a.T, model.prompt.offset_a.T),
                (wide.prompt.offset_b, model.prompt.offset_b),
            ):
                ours.zero_()
                ours[:2] = theirs * 2**0.25  # the scale has a root of the rank
        saved(wide, tmp_path / name)
    inherit(target, [tmp_path / "one", tmp_path / "other"], "all")
    prompts = [model.prompt for model in (one, other)]
    torch.testing.assert_close(target.prompt.vectors(), (prompts[0].vectors() + prompts[1].vectors()) / 2)
    torch.testing.assert_close(target.prompt.offset(16), (prompts[0].offset(16) + prompts[1].offset(16)) / 2)


@pytest.mark.parametrize("method", ["adept", "hybrid"])
def test_offsets_by_token_have_no_mean(
    make_backbone: Callable[..., Backbone], tmp_path: Path, method: str
) -> None:
    backbone = make_backbone("t5")
    paths = [saved(model_of(backbone, method), tmp_path / name) for name in ("one", "other")]
    with pytest.raises(ValueError, match="--init_parts prompt"):
        inherit(model_of(backbone, method), paths, "all")
    inherit(model_of(backbone, method), paths, "prompt")


def test_a_trained_projection_comes_along(make_backbone: Callable[..., Backbone], tmp_path: Path) -> None:
    source, target = model_of(make_backbone("t5")), model_of(make_backbone("t5"))
    torch.nn.init.normal_(source.backbone.visual_projection.linear.weight)
    inherit(target, [saved(source, tmp_path)], "prompt")
    ours, theirs = (m.backbone.visual_projection.linear.weight for m in (target, source))
    assert torch.equal(ours, theirs)


def test_a_source_of_another_backbone_is_refused_with_both_fingerprints(
    make_backbone: Callable[..., Backbone], tmp_path: Path
) -> None:
    source, target = model_of(make_backbone("bart")), model_of(make_backbone("t5"))
    with pytest.raises(ValueError, match="not from language model to language model") as error:
        inherit(target, [saved(source, tmp_path)], "prompt")
    for backbone in (source.backbone, target.backbone):
        assert str(backbone.fingerprint) in str(error.value)
    # Of another vision tower the prompt fits, and a projection that was trained does not.
    other = model_of(make_backbone("t5", "siglip"))
    with pytest.raises(ValueError, match="load the backbone it was trained on"):
        inherit(target, [saved(other, tmp_path / "siglip")], "prompt")
    text = model_of(make_backbone("t5", None))
    inherit(target, [saved(text, tmp_path / "text")], "prompt")
    assert torch.equal(target.prompt.vectors(), text.prompt.vectors())


def test_a_source_of_other_sizes_is_refused(make_backbone: Callable[..., Backbone], tmp_path: Path) -> None:
    backbone = make_backbone("t5")
    path = saved(model_of(backbone), tmp_path)
    with pytest.raises(ValueError, match="prompt_length=3 there, 5 here"):
        inherit(model_of(backbone, prompt_length=5), [path], "prompt")
    with pytest.raises(ValueError, match=r"max_source_length=16 there, 9 here; .*--init_parts prompt"):
        inherit(model_of(backbone, max_source_length=9), [path], "all")
    with pytest.raises(ValueError, match="the model has no prompt"):
        inherit(PromptedModel(backbone), [path], "prompt")
    with pytest.raises(FileNotFoundError, match="no adapter at"):
        inherit(model_of(backbone), [tmp_path / "none"], "prompt")


@pytest.fixture(scope="module")
def base(
    tmp_path_factory: pytest.TempPathFactory,
    make_run: Callable[..., RunConfig],
) -> RunConfig:
    """A run of two steps on 36 questions."""
    data = write_vqa(tmp_path_factory.mktemp("data") / "vqa", images=12)
    return make_run(
        DataOptions(data_dir=data, holdout_images=1, test_limit=8),
    )


@pytest.fixture(scope="module")
def source(base: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "run"
    reset_accelerate()
    run(replace(base, output_dir=folder))
    return folder


def test_a_run_starts_where_another_ended(base: RunConfig, source: Path, tmp_path: Path) -> None:
    prompt = {"init_from": (source,), "init_parts": "all"}
    started = with_(base, prompt=prompt, data={"shots": 2}, train={"max_steps": 1}, optim={"prompt_lr": 0.0})
    run(replace(with_(started, optim={"offset_lr": 0.0, "projection_lr": 0.0}), output_dir=tmp_path / "run"))
    ours, theirs = tensors(tmp_path / "run"), tensors(source, "best")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert len(json.loads((tmp_path / "run" / "shots.json").read_text())["train"]) == 2


def transfer_config(base: RunConfig, folder: Path, *source: str, **options: Any) -> TransferConfig:
    folder.mkdir(exist_ok=True)
    (folder / "base.json").write_text(json.dumps(to_json(base)))
    return TransferConfig(
        source=source, target="vqav2", config=folder / "base.json", output_dir=folder / "out", **options
    )


def test_table_of_every_start_and_k(base: RunConfig, source: Path, tmp_path: Path) -> None:
    config = transfer_config(base, tmp_path, str(source), k=(1, 2), seeds=2)
    transfer(config)
    folder = tmp_path / "out"
    content = json.loads((folder / "transfer.json").read_text())
    assert [(c["k"], c["start"]) for c in content["cells"]] == [
        (k, start) for k in (1, 2) for start in ("scratch", "prompt", "all")
    ]
    for cell in content["cells"]:
        scores = [
            json.loads(path.read_text())["scores"]["overall"]
            for path in sorted(folder.glob(f"k{cell['k']}/seed*/{cell['start']}/summary.json"))
        ]
        assert cell["mean"] == pytest.approx(sum(scores) / 2)
        assert cell["count"] == len(scores) == 2
    table = (folder / "transfer.md").read_text()
    assert "from P and offset" in table
    assert (folder / "transfer.png").stat().st_size > 1000
    shots = {
        (k, seed): (folder / f"k{k}" / f"seed{seed}" / "all" / "shots.json").read_text()
        for k in (1, 2)
        for seed in (1, 2)
    }
    assert len(set(shots.values())) == 4
    # All starts of a seed learn from the same examples.
    assert shots[2, 1] == (folder / "k2" / "seed1" / "scratch" / "shots.json").read_text()
    # A second call repeats nothing but what is missing.
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("summary.json")}
    missing = next(iter(times))
    missing.unlink()
    (folder / "transfer.md").unlink()
    transfer(config)
    assert (folder / "transfer.md").read_text() == table
    assert missing.is_file()
    assert all(path.stat().st_mtime_ns == time for path, time in times.items() if path != missing)


def test_of_several_the_one_with_the_least_loss(base: RunConfig, source: Path, tmp_path: Path) -> None:
    worse = Adapter.load(source / "best")
    worse.tensors["prompt.soft_prompt"] += 50.0
    worse.save(tmp_path / "worse")
    sources = (str(tmp_path / "worse"), str(source))
    config = transfer_config(base, tmp_path, *sources, k=(2,), seeds=1, starts=("prompt",))
    transfer(config)
    cell = tmp_path / "out" / "k2" / "seed1"
    losses = json.loads((cell / "pick.json").read_text())["losses"]
    least = min(losses, key=losses.get)
    assert losses.keys() == set(sources)
    assert json.loads((cell / "prompt" / "config.json").read_text())["prompt"]["init_from"] == [least]
    mean = replace(config, several="average", output_dir=tmp_path / "mean")
    transfer(mean)
    written = json.loads((tmp_path / "mean" / "k2" / "seed1" / "prompt" / "config.json").read_text())
    assert written["prompt"]["init_from"] == list(sources)


def test_runs_from_another_source_are_no_rows(
    base: RunConfig, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = [Adapter.load(source / "best") for _ in range(2)]
    sources = [tmp_path / name for name in ("one", "other")]
    for path, adapter in zip(sources, adapters, strict=True):
        adapter.save(path)
    config = transfer_config(base, tmp_path, *map(str, sources), k=(2,), seeds=1, starts=("prompt",))
    transfer(config)
    run_folder = tmp_path / "out" / "k2" / "seed1" / "prompt"
    started = json.loads((run_folder / "config.json").read_text())["prompt"]["init_from"]
    assert started == [str(sources[0])]  # the first of two that are alike
    # Its P, and so what it was chosen by, is the same.
    adapters[0].tensors["prompt.offset_b"] += 1.0
    adapters[0].save(sources[0])
    before = (run_folder / "summary.json").read_bytes()
    losses = json.loads((run_folder.parent / "pick.json").read_text())["losses"]
    capsys.readouterr()
    with pytest.raises(DifferentError, match="init_from") as error:
        transfer(config)
    assert str(sources[0]) in str(error.value)
    assert str(run_folder) in str(error.value)
    assert (run_folder / "summary.json").read_bytes() == before
    assert "the sources are tried again" in capsys.readouterr().out
    assert json.loads((run_folder.parent / "pick.json").read_text())["losses"] == losses
    # Without the run it is made again.
    shutil.rmtree(run_folder)
    transfer(config)
    assert (run_folder / "summary.json").is_file()


def test_a_task_is_trained_on_first(base: RunConfig, tmp_path: Path) -> None:
    config = transfer_config(base, tmp_path, "vqav2", k=(1,), seeds=1, starts=("all",))
    config = replace(config, source_config=(tmp_path / "base.json",))
    transfer(config)
    assert (tmp_path / "out" / "source-vqav2" / "summary.json").is_file()


def test_bad_input_is_refused_before_any_run(base: RunConfig, source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the training split of vqav2 has 36: choose a smaller k"):
        transfer(transfer_config(base, tmp_path, str(source), k=(1, 30), seeds=1))
    with pytest.raises(ValueError, match="unknown target 'magic'"):
        transfer(replace(transfer_config(base, tmp_path, str(source)), target="magic"))
    with pytest.raises(ValueError, match="prompt_length=3 there, 4 here"):
        transfer(transfer_config(with_(base, prompt={"prompt_length": 4}), tmp_path, str(source), k=(1,)))
    with pytest.raises(FileNotFoundError, match="no adapter at"):
        transfer(transfer_config(base, tmp_path, "runs/none"))
    with pytest.raises(FileNotFoundError, match="give --config"):
        transfer(replace(transfer_config(base, tmp_path, "vqav2"), config=None))
    assert not (tmp_path / "out").exists()


def test_two_processes_make_the_table_once(base: RunConfig, source: Path, tmp_path: Path) -> None:
    config = transfer_config(base, tmp_path, str(source), k=(2,), seeds=2, starts=("scratch", "all"))
    in_two_processes(transfer, config)
    content = json.loads((tmp_path / "out" / "transfer.json").read_text())
    assert [cell["count"] for cell in content["cells"]] == [2, 2]


def test_transfer_to_data_of_ones_own(make_run: Callable[..., RunConfig], tmp_path: Path) -> None:
    own = OwnOptions(data=str(OWN / "qa.csv"), images=OWN / "photos")
    source = run(with_(make_run(DataOptions(own=own, max_lost_answers=1.0)), output_dir=tmp_path / "source"))
    config = TransferConfig(
        (str(source.output_dir),),
        own=replace(own, data=str(OWN / "qa.jsonl")),
        k=(2,),
        seeds=1,
        starts=("prompt",),
        max_steps=1,
        output_dir=tmp_path / "transfer",
    )
    assert config.target == "vqa"
    transfer(config)
    trained = json.loads((tmp_path / "transfer/k2/seed1/prompt/config.json").read_text())
    assert trained["data"]["own"]["data"] == str(OWN / "qa.jsonl")
    assert json.loads((tmp_path / "transfer/transfer.json").read_text())["cells"][0]["k"] == 2
