import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dept_vl.models.backbone import Backbone
from scripts import pretrain_tiny

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
