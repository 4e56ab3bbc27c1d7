"""Pretrained models are measured against themselves at equal length; the difference is the prompt alone."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.measure import peak_bytes
from benchmarks.options import BenchConfig
from benchmarks.pretrained import (
    ANSWER,
    LENGTH,
    MODELS,
    PLAN,
    VARIABLE,
    build_pretrained,
    build_pretrained_runners,
    draw_pretrained,
    of_pretrained,
)
from benchmarks.steps import plan
from dept_vl.models.pretrained_vlm import VisionLanguageModel
from dept_vl.models.prompted import PromptedModel
from dept_vl.prompts.dept import DePT
from scripts import bench


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> tuple[str, VisionLanguageModel]:
    torch.manual_seed(0)
    made = build_pretrained(request.param, "tiny", bench.TOKENIZER, torch.device("cpu"))
    return request.param, made


def test_the_bare_model_reads_what_a_prompt_of_the_same_words_would(
    model: tuple[str, VisionLanguageModel],
) -> None:
    name, backbone = model
    prompt = DePT(backbone.d_model, prompt_length=LENGTH, rank=1, max_source_length=40)
    prompt.init_prompt(backbone.embed(torch.tensor([[backbone.placeholder]]))[0].detach())
    prompted = PromptedModel(backbone, prompt).eval()
    for work in {key for _, key in of_pretrained(name)} - {"labels"}:
        batch = draw_pretrained(backbone, 2, 0, cached=work == "cached")
        runner = build_pretrained_runners(["bare40"], backbone, work)["bare40"]
        bare = runner.forward(runner.prepare(batch))
        if work.startswith("generate"):
            given = {key: value for key, value in batch.items() if key != "labels"}
            tokens = prompted.generate(**given, max_new_tokens=10, min_new_tokens=10, do_sample=False)
            assert tokens.tolist() == bare[:, -tokens.shape[1] :].tolist()
            continue
        torch.testing.assert_close(bare, prompted(**batch).loss, rtol=1e-4, atol=1e-5)


def test_both_ways_to_ask_for_a_loss_are_the_same_one(model: tuple[str, VisionLanguageModel]) -> None:
    _, backbone = model
    batch = draw_pretrained(backbone, 2, 0)
    losses = []
    for work in ("train", "labels"):
        runner = build_pretrained_runners(["bare40"], backbone, work)["bare40"]
        losses.append(runner.forward(runner.prepare(batch)))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    assert batch["labels"].shape == (2, ANSWER)


def test_a_gradient_goes_back_through_the_bare_model_and_its_weights_get_none(
    model: tuple[str, VisionLanguageModel],
) -> None:
    _, backbone = model
    words, got = backbone.language_model.word_embeddings, list[Tensor]()
    runner = build_pretrained_runners(["bare40"], backbone)["bare40"]

    def note(module: nn.Module, inputs: object, output: Tensor) -> None:
        output.register_hook(got.append)

    runner.modules[0].get_input_embeddings().register_forward_hook(note)
    batch = draw_pretrained(backbone, 2, 0)
    given = runner.prepare(batch)
    assert runner.prompt_length + batch["input_ids"].shape[1] == given["input_ids"].shape[1] - (
        0 if backbone.language_model.encoder_decoder else ANSWER
    )
    runner.train_step(given)
    assert max(one.abs().max() for one in got) > 0
    assert not any(parameter.grad is not None for parameter in backbone.language.parameters())
    assert len(words._forward_hooks) == 0  # the copy has hooks of its own


def test_lora_and_attached_prompts_leave_the_shared_model_alone(
    model: tuple[str, VisionLanguageModel],
) -> None:
    pytest.importorskip("peft")
    _, backbone = model
    batch = draw_pretrained(backbone, 2, 0)
    modules = [name for name, _ in backbone.language.named_modules()]
    runners = build_pretrained_runners(["lora8"], backbone)
    runners |= build_pretrained_runners(["attached40"], backbone, "labels")
    for runner in runners.values():
        before = [parameter.detach().clone() for parameter in runner.trained]
        runner.train_step(runner.prepare(batch))
        assert any(not torch.equal(a, b) for a, b in zip(before, runner.trained, strict=True))
    assert [name for name, _ in backbone.language.named_modules()] == modules
    assert not any(parameter.requires_grad for parameter in backbone.language.parameters())
    assert "forward" not in vars(backbone.language)
    shared = {id(parameter) for parameter in backbone.language.parameters()}
    assert shared <= {id(p) for p in runners["lora8"].modules[0].parameters()}


def test_peak_of_a_known_call() -> None:
    def run() -> None:
        one = torch.zeros(1000)
        two = one + 1
        del one
        three = two + 1
        four = three * two  # with two and three the most
        del four

    assert peak_bytes(run) == 3 * 4000
    assert peak_bytes(lambda: None) == 0


def test_every_model_and_work_is_planned(tmp_path: Path) -> None:
    groups = {group.key: group.methods for group in plan(BenchConfig(tmp_path, models=",".join(MODELS)))}
    assert groups.keys() == {f"{name}/vl/{work}" for name in MODELS for work in PLAN} - {
        f"{name}/vl/cached" for name in VARIABLE
    }
    for key, methods in groups.items():
        assert "bare40" in methods
        assert {"dept40", "attached40"} & set(methods), key


@pytest.mark.slow
def test_a_whole_run_says_of_each_bar_whether_it_is_met(tmp_path: Path) -> None:
    results = bench.main(BenchConfig(tmp_path, models="blip2", tiny=True, bars=True))
    assert set(results["groups"]) == {f"blip2/vl/{work}" for work in PLAN}
    for record in results["groups"].values():
        measured = record["measured"]
        assert all(one["memory"] > 0 and min(one["seconds"]) > 0 for one in measured.values())
        assert len({one["tokens"] for name, one in measured.items() if name.endswith("40")}) == 1
    # Of T5, which was not asked for, nothing is said; every other bar has a figure.
    assert len(results["bars"]) == 2 * (3 + 2)
    assert {bar["met"] for bar in results["bars"]} <= {"met", "NOT met"}
    memory = [bar for bar in results["bars"] if bar["what"].endswith("peak memory")]
    assert {bar["met"] for bar in memory} == {"met"}
    assert "T5-" not in (tmp_path / "bench.md").read_text()
