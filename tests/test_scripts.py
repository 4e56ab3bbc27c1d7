import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import write_vqa

from dept_vl.backbone import Backbone
from dept_vl.config import BackboneOptions, DataOptions, PromptOptions, RunConfig, to_json
from dept_vl.train import TrainOptions
from scripts import compare, pretrain_tiny

TINY = pretrain_tiny.PretrainConfig(
    vision_steps=2,
    vision_batch=4,
    scenes=12,
    language_steps=3,
    language_batch=6,
    d_model=32,
    encoder_layers=1,
    decoder_layers=1,
    evaluation_scenes=6,
)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained") / "tiny"
    pretrain_tiny.main(replace(TINY, output_dir=folder))
    return folder


def test_pretraining_writes_a_backbone_that_loads_like_any_other(pretrained: Path) -> None:
    backbone = Backbone.from_pretrained(pretrained)
    assert backbone.d_model == TINY.d_model
    assert backbone.vision is not None
    assert (backbone.vision.token_count, backbone.vision.d_vision) == (16, 128)
    record = json.loads((pretrained / "pretraining.json").read_text())
    assert {"config", "minutes", "vision_accuracy", "exact_match"} <= record.keys()
    assert {"exists", "kept out: is there", "kept out: many or few"} <= record["exact_match"].keys()


def test_pretraining_is_seeded(pretrained: Path, tmp_path: Path) -> None:
    pretrain_tiny.main(replace(TINY, output_dir=tmp_path / "again"))
    first, second = (Backbone.from_pretrained(f).state_dict() for f in (pretrained, tmp_path / "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_pretraining_goes_on_after_a_finished_first_stage(pretrained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "half-done"
    shutil.copytree(pretrained / "vision", folder / "vision")
    shutil.copy(pretrained / "pretraining.json", folder)
    vision = (folder / "vision" / "model.safetensors").read_bytes()
    pretrain_tiny.main(replace(TINY, output_dir=folder))
    assert (folder / "vision" / "model.safetensors").read_bytes() == vision
    first, second = (Backbone.from_pretrained(f).state_dict() for f in (pretrained, folder))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_pretraining_overwrites_nothing(pretrained: Path) -> None:
    with pytest.raises(FileExistsError, match="output_dir"):
        pretrain_tiny.main(replace(TINY, output_dir=pretrained))


def test_measuring_again_gives_the_record_again(pretrained: Path) -> None:
    before = (pretrained / "pretraining.json").read_text()
    pretrain_tiny.main(replace(TINY, output_dir=pretrained, evaluate_only=True))
    assert (pretrained / "pretraining.json").read_text() == before


def test_every_word_of_the_scenes_is_one_token(pretrained: Path) -> None:
    tokenizer = Backbone.from_pretrained(pretrained).tokenizer
    text = "is there not a teal rectangle present in the image?"
    assert len(tokenizer(text, add_special_tokens=False).input_ids) == len(text.split()) + 1
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def comparison(pretrained: Path, folder: Path) -> compare.CompareConfig:
    """Two steps of every method on a handful of questions."""
    base = RunConfig(
        data=DataOptions(data_dir=write_vqa(folder / "vqa"), holdout_images=1),
        backbone=BackboneOptions(backbone=pretrained),
        prompt=PromptOptions(prompt_length=2, reference_prompt_length=6),
        train=TrainOptions(max_steps=2, per_device_batch_size=4, eval_every=2),
    )
    (folder / "base.json").write_text(json.dumps(to_json(base)))
    return compare.CompareConfig(
        base=folder / "base.json", output_dir=folder / "runs", seeds=(1, 2), max_steps=2
    )


def test_comparison_runs_every_method_and_resumes(pretrained: Path, tmp_path: Path) -> None:
    config = comparison(pretrained, tmp_path)
    table = compare.main(config)
    for name in ("majority answer", "zero-shot", "projection only", "PT (l=6)", "DePT (m=2) + projection"):
        assert name in table
    assert table == (tmp_path / "runs" / "comparison.md").read_text().rstrip("\n")
    summaries = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("summary.json")}
    assert len(summaries) == 7 * 2
    half_done = next(iter(summaries))
    half_done.unlink()
    compare.main(config)
    assert half_done.exists()
    assert all(path.stat().st_mtime_ns == when for path, when in summaries.items() if path != half_done)


def test_compared_prompts_have_one_budget(pretrained: Path, tmp_path: Path) -> None:
    config = replace(comparison(pretrained, tmp_path), seeds=(1,), methods=("PT (l=6)", "DePT (m=2)"))
    compare.main(config)
    counts = [
        json.loads(path.read_text())["trainable_parameters"]["total"]
        for path in sorted((tmp_path / "runs").rglob("summary.json"))
    ]
    d_model, max_source_length = 32, 20
    assert max(counts) == 6 * d_model
    assert min(counts) > max(counts) - (d_model + max_source_length)


def test_unknown_method_is_named(pretrained: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="magic"):
        compare.main(replace(comparison(pretrained, tmp_path), methods=("magic",)))
