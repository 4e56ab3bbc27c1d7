"""What the benchmark measures with, and a whole run of the smallest size."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import backbones, methods, steps
from benchmarks.backbones import SHAPES, SIZES, Size, build_backbone, draw_batch
from benchmarks.figures import BARS, GROWTH, bar_rows
from benchmarks.measure import Ratio, encoder_flops, in_turn, saved_bytes
from benchmarks.methods import build_prompt, build_runners, has_peft, needs_peft
from benchmarks.options import BenchConfig
from benchmarks.steps import Bench, plan
from dept_vl.models.backbone import Backbone
from dept_vl.models.precision import layers_of
from scripts import bench

TINY = SIZES["tiny"]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    return build_backbone(TINY, bench.TOKENIZER, vision=True)


# -- measuring


@pytest.mark.parametrize("tokens", [5, 12])
@pytest.mark.parametrize("size", [TINY, replace(TINY, layers=1, heads=3, d_kv=8, d_ff=40)])
def test_operations_are_those_that_torch_counts(size: Size, tokens: int) -> None:
    backbone = build_backbone(size, bench.TOKENIZER, vision=False)
    backbone.language.set_attn_implementation("eager")  # in SDPA on a CPU torch counts nothing
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        backbone.language.get_encoder()(inputs_embeds=torch.randn(3, tokens, size.d_model))
    assert counter.get_total_flops() == encoder_flops(
        batch=3,
        tokens=tokens,
        d_model=size.d_model,
        d_inner=size.d_inner,
        d_ff=size.d_ff,
        layers=size.layers,
    )


def test_saved_bytes_of_a_known_graph() -> None:
    weight = nn.Parameter(torch.randn(4, 5))
    given = torch.randn(3, 4)

    def forward() -> torch.Tensor:
        product = given @ weight  # keeps what is given: 3 x 4
        shown = product.tanh()  # keeps its result: 3 x 5
        return (shown * shown).sum()  # keeps the same storage twice more

    assert saved_bytes(forward, [weight]) == 4 * (3 * 4 + 3 * 5)
    assert saved_bytes(forward, [weight, given]) == 4 * 3 * 5
    with torch.no_grad():
        assert saved_bytes(forward, [weight]) == 0


def test_parameters_and_their_views_are_not_counted() -> None:
    layer = nn.Linear(6, 6)
    given = torch.randn(2, 6, requires_grad=True)
    kept = saved_bytes(lambda: layer.requires_grad_(False)(given).sum(), layer.parameters())
    assert kept == 0
    assert saved_bytes(lambda: (given @ layer.weight.t()).sum(), []) == 4 * 6 * 6


def test_a_storage_is_counted_whole_and_dead_ones_too() -> None:
    given = torch.randn(8, requires_grad=True)

    def forward() -> torch.Tensor:
        total = torch.zeros(())
        for _ in range(5):  # each keeps a copy that nothing else holds
            copy = given.clone()
            total = total + (copy[:2] ** 2).sum()
        return total

    assert saved_bytes(forward, [given]) == 5 * 4 * 8


def test_rounds_are_interleaved_and_begin_with_another_each_time() -> None:
    assert in_turn("ab", 3) == [["a", "b"], ["b", "a"], ["a", "b"]]
    orders = in_turn("abc", 6)
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert [order[0] for order in orders] == list("abcabc")


def test_ratio_is_of_rounds() -> None:
    # Rounds of a machine that slows down: the ratio of the medians would be 1.5.
    found = Ratio.of([1.0, 2.0, 6.0], [2.0, 4.0, 4.0])
    assert (found.median, found.low, found.high) == (0.5, 0.5, 1.5)
    assert str(found) == "0.500 (0.500-1.500)"
    with pytest.raises(ValueError, match="3 and 2"):
        Ratio.of([1.0, 2.0, 3.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="0 and 0"):
        Ratio.of([], [])


# -- what is measured


@pytest.mark.parametrize("model", ["small", "base", "large"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prompt_length", [0, 20, 40, 60, 80, 100])
def test_prompts_have_the_parameters_of_100_vectors(model: str, shape: str, prompt_length: int) -> None:
    d_model = SIZES[model].d_model
    prompt = build_prompt(d_model, SHAPES[shape], prompt_length)
    left = methods.REFERENCE_LENGTH * d_model - sum(p.numel() for p in prompt.parameters())
    assert 0 <= left < SHAPES[shape].longest + d_model
    if model == "base":
        assert left == 0
        assert sum(p.numel() for p in prompt.parameters()) == 76_800


def test_sizes_are_those_of_t5() -> None:
    expected = {"small": 60_506_624, "base": 222_903_552, "large": 737_668_096}  # of the Hub's t5-*
    for name, count in expected.items():
        with torch.device("meta"):
            size = SIZES[name]
            config = backbones.t5_config(size)
            language = backbones.T5ForConditionalGeneration(config)
        assert sum(p.numel() for p in language.parameters()) == count


@pytest.mark.parametrize("shape", SHAPES)
def test_batches_have_their_shape(backbone: Backbone, shape: str) -> None:
    batches = [draw_batch(backbone, SHAPES[shape], 6, seed) for seed in range(4)]
    lengths = torch.cat([batch["attention_mask"].sum(1) for batch in batches])
    assert abs(lengths.float().mean() - SHAPES[shape].text) <= SHAPES[shape].spread / 2
    assert all(batch["input_ids"].shape[1] == batch["attention_mask"].sum(1).max() for batch in batches)
    assert ("visual_features" in batches[0]) == SHAPES[shape].image
    again = draw_batch(backbone, SHAPES[shape], 6, 0)
    assert all(torch.equal(again[name], batches[0][name]) for name in again)


def test_authors_padding_changes_the_length_and_not_the_loss(backbone: Backbone) -> None:
    torch.manual_seed(0)
    backbone.eval()
    padded = build_runners(["padded"], backbone, SHAPES["glue"])["padded"]
    batch = draw_batch(backbone, SHAPES["glue"], 2, 0)
    wide = padded.prepare(batch)
    assert wide["input_ids"].shape[1] == wide["attention_mask"].shape[1] == 256
    torch.testing.assert_close(padded.forward(wide), padded.forward(batch), rtol=1e-4, atol=1e-5)


def test_bare_backbone_reads_as_many_positions_and_gets_a_gradient_as_deep(backbone: Backbone) -> None:
    backbone.eval()
    runners = build_runners(["constant", "floor", "dept40"], backbone, SHAPES["vl"])
    batch = draw_batch(backbone, SHAPES["vl"], 2, 0)
    read: list[int] = []
    hook = backbone.language.get_encoder().register_forward_hook(
        lambda *call: read.append(call[-1].last_hidden_state.shape[1])
    )
    given = {name: runner.prepare(batch) for name, runner in runners.items()}
    for name, runner in runners.items():
        runner.train_step(given[name])
    hook.remove()
    assert read == [40 + 20 + 49, 20 + 49, 40 + 20 + 49]
    for name in ("constant", "floor"):
        assert given[name]["embeddings"].grad.abs().sum() > 0
    assert not any(p.grad is not None for p in backbone.parameters())


def test_peft_reads_the_same_backbone(backbone: Backbone) -> None:
    pytest.importorskip("peft")
    backbone.eval()
    names = ["pt100", "peft100held"]
    runners = build_runners(names, backbone, SHAPES["glue"], stock=backbone.language)
    ours, theirs = (runners[name] for name in names)
    prompt = ours.trained[0]
    with torch.no_grad():  # the first half is the encoder's; the other is never used
        theirs.trained[0][:100].copy_(prompt)
    batch = draw_batch(backbone, SHAPES["glue"], 1, 0)
    torch.testing.assert_close(ours.forward(batch), theirs.forward(batch), rtol=1e-4, atol=1e-5)


def test_unknown_names_are_refused(backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="magic"):
        build_runners(["magic"], backbone, SHAPES["vl"])
    config = BenchConfig(tmp_path)
    for option in ("models", "shapes", "methods"):
        with pytest.raises(ValueError, match=f"--{option}.*magic"):
            plan(replace(config, **{option: "magic"}))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nothing to measure"):
        plan(replace(config, models="large", shapes="glue"))


def test_plan_measures_every_bar(tmp_path: Path) -> None:
    groups = {group.key: group for group in plan(BenchConfig(tmp_path))}
    for bar in BARS:
        missing = {bar.ours, bar.theirs} - set(groups[bar.group].methods)
        assert not {name for name in missing if has_peft() or not needs_peft(name)}
    assert all(f"{model}/vl/train" in groups for model in GROWTH)
    assert groups["large/vl/train"].batch_size == 4
    chosen = plan(BenchConfig(tmp_path, models="base", shapes="vl", methods="pt100,dept60"))
    assert [(group.key, group.methods) for group in chosen] == [("base/vl/train", ("pt100", "dept60"))]


# -- a whole run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("bench") / "out"
    return folder, bench.main(BenchConfig(folder, tiny=True, bars=True))


def test_everything_is_measured(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, results = finished
    assert json.loads((folder / "bench.json").read_text()) == results
    assert set(results["groups"]) == {
        f"tiny/{name}"
        for name in (*("vl/train", "vl/generate4", "vl/generate20", "vl/images", "glue/train", "mrqa/train"),)
    }
    for record in results["groups"].values():
        assert len(record["measured"]) == len(record["methods"])
        for one in record["measured"].values():
            assert len(one["seconds"]) == len(one["wall_seconds"]) == record["rounds"]
            assert min(one["seconds"]) > 0
            assert (one["memory"] is None) == record["work"].startswith("generate")
    measured = results["groups"]["tiny/vl/train"]["measured"]
    assert measured["dept40"]["tokens"] == measured["constant"]["tokens"] == 109
    assert measured["dept40"]["memory"] < measured["pt100"]["memory"]
    assert measured["dept40"]["trained"] <= measured["pt100"]["trained"] == 100 * TINY.d_model
    assert results["machine"]["threads"] == torch.get_num_threads()


def test_results_are_shown(finished: tuple[Path, dict[str, Any]]) -> None:
    folder, results = finished
    text = (folder / "bench.md").read_text()
    for name in ("PT (l=100)", "DePT (m=40), padded to s", "cached", "backbone alone, 40 positions more"):
        assert f"| {name} " in text
    assert "of the throughput of the backbone alone" in text
    assert len(results["bars"]) == len(BARS) + 2
    assert sum(bar["met"] in ("met", "NOT met") for bar in results["bars"]) >= len(BARS) - 2
    if pytest.importorskip("matplotlib"):
        assert (folder / "bench.png").stat().st_size > 1000


@pytest.mark.slow
def test_compiled_beside_the_same_as_it_is(tmp_path: Path, graphs: Callable[[], int]) -> None:
    methods = "dept40,dept40+compiled"
    results = bench.main(
        BenchConfig(tmp_path, models="tiny", shapes="vl", methods=methods, rounds=2, batch_size=1)
    )
    assert list(results["groups"]["tiny/vl/train"]["measured"]) == methods.split(",")
    assert "| DePT (m=40), compiled " in (tmp_path / "bench.md").read_text()
    assert graphs() >= 4


def test_the_backbone_itself_is_not_compiled(backbone: Backbone, tmp_path: Path) -> None:
    compiled = Bench(BenchConfig(tmp_path), bench.TOKENIZER)._compiled(backbone)
    runners = build_runners(["dept40", "dept40+compiled"], backbone, SHAPES["vl"], compiled=compiled)
    assert [runner.compiled for runner in runners.values()] == [False, True]
    found = [
        {"forward" in vars(layer) for layer in layers_of(runner.modules[0].backbone.language)}
        for runner in runners.values()
    ]
    assert found == [{False}, {True}]
    with pytest.raises(ValueError, match=r"dept40\+compiled needs a backbone whose layers are compiled"):
        build_runners(["dept40+compiled"], backbone, SHAPES["vl"])


def test_what_was_measured_is_kept_when_a_run_ends_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = BenchConfig(tmp_path, models="tiny", shapes="vl", methods="pt100,dept40", rounds=5, batch_size=1)
    calls: list[int] = []
    step = Bench._time

    def failing(*arguments: Any) -> tuple[float, float]:
        calls.append(1)
        if len(calls) == 6:  # in the third round
            raise RuntimeError("the machine went away")
        return step(*arguments)

    monkeypatch.setattr(Bench, "_time", failing)
    with pytest.raises(RuntimeError, match="went away"):
        bench.main(config)
    measured = json.loads((tmp_path / "bench.json").read_text())["groups"]["tiny/vl/train"]["measured"]
    assert [len(one["seconds"]) for one in measured.values()] == [2, 2]
    monkeypatch.undo()
    results = bench.main(config)  # once more, since a group is measured whole or not at all
    whole = results["groups"]["tiny/vl/train"]["measured"]
    assert [len(one["seconds"]) for one in whole.values()] == [5, 5]
    assert bench.main(config)["groups"] == results["groups"]
    with pytest.raises(ValueError, match=r"rounds=5 -> 1.*another --output_dir"):
        bench.main(replace(config, rounds=1))
    assert json.loads((tmp_path / "bench.json").read_text())["groups"] == results["groups"]


def test_without_peft_its_methods_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (methods, steps):
        monkeypatch.setattr(module, "has_peft", lambda: False)
    results = bench.main(
        BenchConfig(
            tmp_path, models="tiny", shapes="glue", methods="pt100,peft100,lora8", rounds=1, batch_size=1
        )
    )
    assert list(results["groups"]["tiny/glue/train"]["measured"]) == ["pt100"]
    assert 'pip install -e ".[bench]"' in capsys.readouterr().out


def test_bars(tmp_path: Path) -> None:
    def record(**seconds: float) -> dict[str, Any]:
        return {"measured": {name: {"seconds": [s, s], "memory": s} for name, s in seconds.items()}}

    groups = {
        "base/vl/train": record(pt100=1.0, dept40=0.6),
        "base/vl/generate4": record(pt100=1.2, dept40=1.0),
        "small/vl/train": record(pt100=1.0, dept40=0.7),
        "large/vl/train": record(pt100=1.0, dept40=0.65),
    }
    rows = {row[0]: row[1:] for row in bar_rows({"groups": groups, "config": {"tiny": False}})}
    assert rows["DePT m=40 over PT l=100, step time"] == ("<= 0.70", "0.600 (0.600-0.600)", "met")
    assert rows["PT l=100 over DePT m=40, 4 tokens generated"][0::2] == (">= 1.25", "NOT met")
    assert rows["PT l=100 over DePT m=40, 20 tokens generated"][1:] == ("not measured", "")
    growth = rows["DePT m=40 over PT l=100 at small, base, large, step time"]
    assert growth == ("falling", "0.700, 0.600, 0.650", "NOT met")
    groups["large/vl/train"] = record(pt100=1.0, dept40=0.5)
    rows = {row[0]: row[1:] for row in bar_rows({"groups": groups, "config": {"tiny": False}})}
    assert rows["DePT m=40 over PT l=100 at small, base, large, step time"][-1] == "met"
