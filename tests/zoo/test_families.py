"""Each family of pretrained models through the whole pipeline, on tiny random models of the real classes."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_image
from helpers import write_vqa
from runs import assert_same, in_two_processes, reset_accelerate, tiny_run, with_
from test_resume import assert_answers, assert_goes_on
from torch import Tensor
from zoo.reference import reference_logits
from zoo.vlms import FAMILIES

from dept_vl.config import BackboneOptions, DataOptions, OptimOptions, PromptOptions, RunConfig
from dept_vl.data.collate import Batch, Collator, Draw
from dept_vl.models.pretrained_vlm import VisionLanguageModel, open_backbone
from dept_vl.models.prompted import PromptedModel
from dept_vl.models.row_prompts import PromptTable, RowPrompts
from dept_vl.prompts.dept import DePT
from dept_vl.tasks.base import Example
from dept_vl.training.build import build_prompt
from dept_vl.training.optim import build_optimizer
from dept_vl.training.run import run

QUESTIONS = ("what colour is the star ?", "how many ?", "is there a red one ?")
IMAGES = tuple(random_image(size, seed) for seed, size in enumerate([(40, 36), (20, 48), (32, 32)]))
ANSWERS = ("red", "two", "no")
ALWAYS = ("blip2", "florence2", "qwen2_5_vl", "paligemma", "gemma3")
"""In the default suite: T5, BART, M-RoPE, and a prefix and an image that are read both ways."""


def families(*always: str) -> pytest.MarkDecorator:
    """Parametrise by family; but for these it takes too long for the default suite."""
    return pytest.mark.parametrize(
        "family",
        [name if name in always else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES],
    )


BackboneOf = Callable[[str], VisionLanguageModel]


@pytest.fixture(scope="module")
def backbone_of(pretrained_folder: Callable[[str], Path]) -> BackboneOf:
    """Frozen models by family."""
    return cache(lambda name: open_backbone(model=pretrained_folder(name)).eval())


def prompt_of(backbone: VisionLanguageModel, prompt_length: int, rank: int = 2, seed: int = 0) -> DePT:
    """A prompt as if it were trained."""
    options = PromptOptions(prompt_length=prompt_length, rank=rank, max_source_length=32)
    prompt = build_prompt(options, backbone, 0)
    assert prompt is not None
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) / 2)
    return prompt.eval()


@pytest.fixture(scope="session")
def image_paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files of `IMAGES`."""
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"{number}.png" for number in range(len(IMAGES))]
    for path, image in zip(paths, IMAGES, strict=True):
        image.save(path)
    return paths


def batch_of(model: PromptedModel, paths: list[Path], rows: tuple[int, ...]) -> Batch:
    """Questions with their answers, padded."""
    collator = Collator.for_model(model, 8, max_source_length=32 + model.backbone.frame)
    return collator(
        [
            Draw(Example(row, QUESTIONS[row], (paths[row],), ((ANSWERS[row], 1.0),)), ANSWERS[row])
            for row in rows
        ]
    )


def logits_of(model: PromptedModel, batch: Batch) -> Tensor:
    """Scores of the answers' tokens."""
    with torch.no_grad():
        found: Tensor = model(**batch.training_inputs()).logits
    return found


def answers_of(model: PromptedModel, batch: Batch, **options: Any) -> list[list[int]]:
    """Five tokens for each row, whatever ends an answer."""
    tokens = model.generate(**batch.inputs(), max_new_tokens=5, min_new_tokens=5, **options)
    rows: list[list[int]] = tokens[:, -5:].tolist()
    return rows


@families(*ALWAYS)
def test_a_prompt_is_where_it_belongs(backbone_of: BackboneOf, image_paths: list[Path], family: str) -> None:
    """The reference's logits, in a batch as alone; with nothing trained the bare model's, to the bit."""
    backbone = backbone_of(family)
    prompt, bare = prompt_of(backbone, 3), PromptedModel(backbone).eval()
    model = PromptedModel(backbone, prompt).eval()
    untrained = build_prompt(PromptOptions(prompt_length=0, rank=2, max_source_length=32), backbone, 0)
    nothing = PromptedModel(backbone, untrained).eval()
    offset = prompt.offset(prompt.max_source_length)
    vectors = prompt.vectors()
    assert offset is not None
    assert vectors is not None
    together = logits_of(model, batch_of(model, image_paths, (0, 1, 2)))
    for row in range(3):
        alone = batch_of(model, image_paths, (row,))
        assert alone.labels is not None
        source = backbone.processor.process([QUESTIONS[row]], [[IMAGES[row]]])
        for prompted, parts in ((model, (vectors, offset)), (bare, (vectors[:0], offset * 0))):
            expected = reference_logits(
                backbone.language,
                backbone.tokenizer,
                source,
                *map(torch.detach, parts),
                alone.labels[0].tolist(),
            )
            torch.testing.assert_close(logits_of(prompted, alone)[0], expected, atol=1e-5, rtol=1e-5)
        logits = logits_of(model, alone)[0]
        torch.testing.assert_close(together[row, : len(logits)], logits, atol=1e-4, rtol=1e-4)
        assert torch.equal(logits_of(nothing, alone), logits_of(bare, alone))
        assert not torch.allclose(logits_of(bare, alone)[0], logits, atol=1e-2)


@families(*ALWAYS)
def test_answers(backbone_of: BackboneOf, image_paths: list[Path], family: str) -> None:
    """Greedy and by beams a row answers as alone; beams and samples of a row differ, a seed repeats them."""
    model = PromptedModel(backbone_of(family), prompt_of(backbone_of(family), 3)).eval()
    batch = batch_of(model, image_paths, (0, 1, 2))
    several = {"num_return_sequences": 3}
    for options in ({}, {"num_beams": 3, **several}):
        together = answers_of(model, batch, **options)
        alone = [answers_of(model, batch_of(model, image_paths, (row,)), **options) for row in range(3)]
        assert together == [tokens for row in alone for tokens in row]
    assert all(len(set(map(tuple, together[row : row + 3]))) == 3 for row in (0, 3, 6))
    logits = logits_of(model, batch)
    greedy = answers_of(model, batch)
    assert [tokens[0] for tokens in greedy] == logits[:, 0].argmax(-1).tolist()
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(answers_of(model, batch, do_sample=True, top_k=0, **several))
    assert drawn[0] == drawn[1] != drawn[2]


@families(*ALWAYS)
def test_rows_with_other_prompts(backbone_of: BackboneOf, image_paths: list[Path], family: str) -> None:
    """In a batch, rows with prompts of several lengths and without one are as they are alone."""
    backbone = backbone_of(family)
    prompts = [None, prompt_of(backbone, 2, seed=1), prompt_of(backbone, 5, seed=2)]
    with torch.no_grad():
        table = PromptTable(prompts, backbone.language_model.word_embeddings.weight, padding_first=True)
    rows = [2, 0, 1]
    mixed = PromptedModel(backbone, RowPrompts(table, torch.tensor(rows))).eval()
    batch = batch_of(mixed, image_paths, (0, 1, 2))
    logits, answers = logits_of(mixed, batch), answers_of(mixed, batch)
    for row, prompt in enumerate(rows):
        model = PromptedModel(backbone, prompts[prompt]).eval()
        alone = batch_of(model, image_paths, (row,))
        expected = logits_of(model, alone)[0]
        torch.testing.assert_close(logits[row, : len(expected)], expected, atol=1e-4, rtol=1e-4)
        assert answers[row] == answers_of(model, alone)[0]


@families(*ALWAYS)
def test_steps_change_the_prompt_alone(backbone_of: BackboneOf, image_paths: list[Path], family: str) -> None:
    """Gradients reach P, A and B and nothing else, and the loss falls."""
    backbone = backbone_of(family)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    model = PromptedModel(backbone, prompt_of(backbone, 3), backbone_dropout=False).train()
    batch = batch_of(model, image_paths, (0, 1, 2)).training_inputs()
    optimizer = build_optimizer(model.parameter_groups(), OptimOptions(prompt_lr=0.05, offset_lr=0.02))
    losses = []
    for step in range(6):
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert reached == {"prompt.soft_prompt", "prompt.offset_a", "prompt.offset_b"}, step
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


@pytest.fixture(scope="module")
def vqa(tmp_path_factory: pytest.TempPathFactory) -> DataOptions:
    """A few questions in the official form."""
    return DataOptions(data_dir=write_vqa(tmp_path_factory.mktemp("vqa"), images=3), holdout_images=1)


@families("blip2", "qwen2_5_vl")
@pytest.mark.usefixtures("fresh_accelerate")
def test_a_run(
    pretrained_folder: Callable[[str], Path], vqa: DataOptions, tmp_path: Path, family: str
) -> None:
    """A run that pauses goes on to the same bits, and what it saved answers as it did."""
    config = run_of(pretrained_folder(family), vqa, tmp_path / "whole", dropout=True)
    assert_goes_on(config, tmp_path / "paused")
    assert_answers(tmp_path / "whole", vqa.data_dir)


@families()
def test_two_processes(
    pretrained_folder: Callable[[str], Path], vqa: DataOptions, tmp_path: Path, family: str
) -> None:
    """Two processes train as one on the same batches."""
    reset_accelerate()
    config = run_of(pretrained_folder(family), vqa, tmp_path / "one", dropout=False)
    run(config)
    in_two_processes(run, with_(config, output_dir=tmp_path / "two", train={"per_device_batch_size": 2}))
    assert_same(tmp_path / "one", tmp_path / "two", atol=1e-5)


def run_of(model: Path, data: DataOptions, output_dir: Path, *, dropout: bool) -> RunConfig:
    """A run of four steps on a pretrained model."""
    config = tiny_run(data, vision=model, language=model, max_steps=4, eval_every=2, checkpoint_every=2)
    backbone = BackboneOptions(model=str(model), backbone_dropout=dropout)
    return replace(config, backbone=backbone, output_dir=output_dir)
