"""Folders that hold no vision-language model for a prompt: one line says what, where and what to take."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from zoo.vlm_parts import Q_FORMER, SQUARE, model_of, words
from zoo.vlms import blip_parts

from dept_vl._utils.errors import UsageError
from dept_vl.adapters.adapter import Adapter
from dept_vl.config import PromptOptions
from dept_vl.models.pretrained_vlm import open_backbone
from dept_vl.models.prompted import PromptedModel
from dept_vl.training.build import build_prompt

FolderOf = Callable[[str], Path]
OF_MODEL = ("config.json", "generation_config.json", "model.safetensors")


def line_of(folder: Path) -> str:
    """What is said of a folder, as it is loaded or probed."""
    with pytest.raises(ValueError) as caught:
        open_backbone(model=folder).probe()
    said = str(caught.value)
    assert str(folder) in said
    assert "\n" not in said
    return said


@pytest.mark.parametrize("kind", ["whisper", "qwen2_audio", "vjepa2", "clip"])
def test_a_model_that_hears_or_answers_nothing(tmp_path: Path, kind: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    line = line_of(tmp_path)
    assert kind in line
    assert "supported are" in line


@pytest.mark.parametrize("name", ["gpt2_text", "t5_text"])
def test_a_model_that_reads_text_alone(pretrained_folder: FolderOf, name: str) -> None:
    folder = pretrained_folder(name)
    assert "images" in line_of(folder)
    backbone = open_backbone(model=folder)
    backbone.probe(0)
    with pytest.raises(UsageError, match="reads no images"):
        backbone.image_features()


def test_a_model_of_films(tmp_path: Path) -> None:
    tokens, q_former = words("$A </s>", ["<image>"]), words("<s> $A </s>")
    parts = blip_parts(tokens, Q_FORMER | {"vocab_size": len(q_former)})
    parts["video_token_index"] = parts.pop("image_token_index")
    model_of("instructblipvideo", **parts).save_pretrained(tmp_path)
    videos = transformers.InstructBlipVideoVideoProcessor(size=SQUARE)
    processor = transformers.InstructBlipVideoProcessor(videos, tokens, q_former, num_query_tokens=4)
    processor.save_pretrained(tmp_path)
    assert "image" in line_of(tmp_path)


def with_processor_of(model: Path, other: Path | None, folder: Path) -> Path:
    """A folder with the weights of one and the processor of another, or none."""
    folder.mkdir()
    for path in model.iterdir():
        if path.name in OF_MODEL:
            shutil.copy(path, folder)
    for path in [] if other is None else other.iterdir():
        if path.name not in OF_MODEL:
            shutil.copy(path, folder)
    return folder


@pytest.mark.parametrize(
    ("model", "other"),
    [
        ("llava", None),
        ("qwen2_vl", "llava"),
        ("llava", "qwen2_vl"),
        ("gemma3", "internvl"),
    ],
)
def test_the_processor_of_another_model(
    pretrained_folder: FolderOf, tmp_path: Path, model: str, other: str | None
) -> None:
    theirs = None if other is None else pretrained_folder(other)
    line_of(with_processor_of(pretrained_folder(model), theirs, tmp_path / "mixed"))


def test_an_adapter_of_another_model(pretrained_folder: FolderOf, tmp_path: Path) -> None:
    trained, other = (open_backbone(model=pretrained_folder(name)) for name in ("llava", "llava_next"))
    prompt = build_prompt(PromptOptions(prompt_length=2, rank=1, max_source_length=9), trained, 0)
    Adapter.of(PromptedModel(trained, prompt), task="vqav2", metrics={}).save(tmp_path)
    adapter = Adapter.load(tmp_path)
    adapter.build(trained)
    with pytest.raises(ValueError, match=other.name):
        adapter.build(other)


@pytest.mark.parametrize("file", ["config.json", "processor_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("model_type", ["", "of_its_own"])
def test_code_of_a_repository_is_never_run(
    pretrained_folder: FolderOf, tmp_path: Path, file: str, model_type: str
) -> None:
    folder = tmp_path / "repository"
    shutil.copytree(pretrained_folder("llava"), folder)
    told = json.loads((folder / file).read_text())
    autos = ("AutoConfig", "AutoModelForImageTextToText", "AutoProcessor", "AutoImageProcessor")
    told["auto_map"] = {auto: f"theirs.{auto}" for auto in autos} | {"AutoTokenizer": ["theirs.Tokens", None]}
    (folder / file).write_text(json.dumps(told))
    classes = "\n".join(f"class {auto}: pass" for auto in (*autos, "Tokens"))
    (folder / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n{classes}\n")
    if model_type:
        config = json.loads((folder / "config.json").read_text()) | {"model_type": model_type}
        (folder / "config.json").write_text(json.dumps(config))
        line_of(folder)
    else:
        open_backbone(model=folder).probe()
    assert not (tmp_path / "ran").exists()
