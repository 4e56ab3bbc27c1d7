"""Features of pretrained models: given back they are as good as pixels; where they cannot be kept is said."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import random_image
from helpers import write_vqa
from runs import log, reset_accelerate, tiny_run, with_
from test_resume import result_of
from zoo.vlms import FAMILIES

from dept_vl._utils.errors import UsageError
from dept_vl.config import BackboneOptions, DataOptions, EvaluateConfig, RunConfig
from dept_vl.data.collate import Batch, Collator, Draw
from dept_vl.data.feature_index import fingerprint
from dept_vl.data.features import FeatureTable
from dept_vl.models.pretrained_vlm import VisionLanguageModel
from dept_vl.models.prompted import PromptedModel
from dept_vl.prompts.dept import DePT
from dept_vl.tasks.vqav2 import VQAv2
from dept_vl.training.extract import extract
from dept_vl.training.options import ExtractConfig
from dept_vl.training.run import run
from dept_vl.training.score_run import score_run

KEPT = ("blip2", "florence2", "t5gemma2", "llava", "paligemma", "paligemma2", "gemma3")
ASKED = ("instructblip",)
SIZED = tuple(name for name in FAMILIES if name not in (*KEPT, *ASKED))
ALWAYS = ("blip2", "llava", "paligemma", "instructblip", "qwen2_5_vl")
"""In the default suite."""
Folder = Callable[[str], Path]


def families(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "family",
        [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in names],
    )


def model_of(folder: Path) -> PromptedModel:
    backbone = VisionLanguageModel.from_pretrained(folder)
    torch.manual_seed(0)
    prompt = DePT(backbone.d_model, prompt_length=3, rank=2, max_source_length=32 + backbone.frame)
    torch.nn.init.normal_(prompt.offset_b)  # type: ignore[arg-type]
    return PromptedModel(backbone, prompt).eval()


@families(*KEPT)
def test_features_are_as_good_as_pixels(pretrained_folder: Folder, family: str, tmp_path: Path) -> None:
    """To the bit for one image; for several, whose sums come in another order, as near as that."""
    model = model_of(pretrained_folder(family))
    folder = write_vqa(tmp_path, images=3)
    asked = VQAv2().load(folder, "val")
    draws = [Draw(asked[number], "red") for number in (0, len(asked) // 2, len(asked) - 1)]
    encoder = model.backbone.image_features()
    assert encoder is not None
    paths = list(asked.image_files())
    for seed, path in enumerate(paths):
        random_image((40 - 4 * seed, 36), seed).save(path)
    table = FeatureTable.encode(encoder, paths, batch_size=1, progress=False)

    def batch(draws: list[Draw], images: FeatureTable | None) -> Batch:
        collate = Collator.for_model(model, 6, max_source_length=32 + model.backbone.frame, images=images)
        made: Batch = collate(draws)
        return made

    with torch.no_grad():
        for some in (draws[:1], draws):
            live, cached = batch(some, None), batch(some, table)
            assert cached.processed is not None
            assert "pixel_values" not in cached.processed
            expected, found = (model(**one.training_inputs()).logits for one in (live, cached))
            if len(some) == 1:
                assert torch.equal(found, expected)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            options = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 2}
            answers = [model.generate(**one.inputs(), **options) for one in (live, cached)]
            assert torch.equal(*answers)
        other = batch(
            [replace(draws[0], example=replace(draws[0].example, images=draws[2].example.images))], table
        )
        assert not torch.allclose(model(**other.training_inputs()).logits, expected[:1], atol=1e-3)
    assert "get_image_features" not in vars(model.backbone.language)


@families(*ASKED, *SIZED)
def test_what_cannot_be_kept_is_refused_by_name(pretrained_folder: Folder, family: str) -> None:
    backbone = VisionLanguageModel.from_pretrained(pretrained_folder(family))
    reason = "qformer_input_ids" if family in ASKED else "size of the image"
    with pytest.raises(UsageError, match=rf"{type(backbone.language).__name__}.*{reason}"):
        backbone.image_features()


def test_features_are_known_by_what_makes_them(pretrained_folder: Folder) -> None:
    """Not by the language model: one that was tuned reads the same features."""
    backbone = VisionLanguageModel.from_pretrained(pretrained_folder("llava"))
    before = fingerprint(backbone.image_features())
    with torch.no_grad():
        backbone.language.get_input_embeddings().weight.add_(1)
        backbone.language.lm_head.weight.add_(1)
    assert fingerprint(backbone.image_features()) == before
    with torch.no_grad():
        backbone.language.model.multi_modal_projector.linear_1.bias.add_(1)
    changed = fingerprint(backbone.image_features())
    assert {name for name in before if changed[name] != before[name]} == {"weights"}


def test_what_is_trained_is_not_kept(pretrained_folder: Folder) -> None:
    backbone = VisionLanguageModel.from_pretrained(pretrained_folder("llava"))
    backbone.freeze(language=False)
    with pytest.raises(UsageError, match="trained"):
        backbone.image_features()


def test_what_reads_images_has_no_dropout(pretrained_folder: Folder) -> None:
    """The Q-Former's would make other vectors of an image in every step."""
    backbone = VisionLanguageModel.from_pretrained(pretrained_folder("blip2")).train()
    pixels = backbone.processor.process(["is it red ?"], [[random_image((40, 36), 0)]])["pixel_values"]
    first, second = (backbone.language.get_image_features(pixels).pooler_output for _ in range(2))
    assert torch.equal(first, second)
    backbone.language.qformer.train()
    assert not torch.equal(backbone.language.get_image_features(pixels).pooler_output, first)
    assert all(module.training for module in backbone.language.language_model.modules())


@pytest.fixture
def config(pretrained_folder: Folder, tmp_path: Path) -> RunConfig:
    data = DataOptions(data_dir=write_vqa(tmp_path / "vqa", images=5), dev_split="val", test_split="val")
    folder = pretrained_folder("blip2")
    made = tiny_run(data, vision=folder, language=folder, max_steps=4, eval_every=2, checkpoint_every=2)
    backbone = BackboneOptions(model=str(folder), backbone_dropout=True)
    return replace(made, backbone=backbone, output_dir=tmp_path / "run")


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_run_on_features_is_that_on_images(config: RunConfig, tmp_path: Path) -> None:
    """As is one that pauses; and what it learnt is scored on the same files."""
    extract(ExtractConfig(data=config.data, backbone=config.backbone, dtype="float32", shard_images=3))
    results = {}
    for choice in ("live", "cached", "auto"):
        reset_accelerate()
        run(with_(config, output_dir=tmp_path / choice, data={"features": choice}))
        results[choice] = [line["loss"] for line in log(tmp_path / choice) if "loss" in line]
    assert results["cached"] == results["auto"]
    assert results["cached"] == pytest.approx(results["live"], rel=1e-5)
    paused = with_(
        config,
        output_dir=tmp_path / "paused",
        resume="auto",
        train={"pause_at": 2},
        data={"features": "cached"},
    )
    for again in (paused, with_(paused, train={"pause_at": 0})):
        reset_accelerate()
        run(again)
    assert result_of(tmp_path / "paused") == result_of(tmp_path / "cached")
    reset_accelerate()
    scored = score_run(EvaluateConfig(run=tmp_path / "cached", features="cached"))
    assert scored is not None
