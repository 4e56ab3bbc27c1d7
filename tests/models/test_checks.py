"""Folders of strangers: another tokenizer or none, damaged and hostile files; one clear error, quickly."""

import json
import pickle
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer
from zoo.models import language_model, tokenizer

from dept_vl._utils.errors import is_user_error
from dept_vl.models.backbone import Backbone
from dept_vl.models.vision import VisionEncoder

SECONDS = 3.0
KINDS = ("t5", "mt5", "bart", "gpt2", "llama")
Damage = Callable[[Path], object]


@pytest.fixture
def folder(language_folders: dict[str, Path], tmp_path: Path) -> Path:
    """A T5 with its tokenizer, to be damaged."""
    return Path(shutil.copytree(language_folders["t5"], tmp_path / "t5"))


@pytest.fixture
def clip(vision_folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(vision_folders["clip"], tmp_path / "clip"))


def refused(load: Callable[[], object], *words: str) -> None:
    """One error of the user's, soon, which says where."""
    start = time.process_time()
    with pytest.raises((ValueError, OSError)) as error:
        load()
    assert time.process_time() - start < SECONDS
    assert is_user_error(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_without_its_tokenizer_is_refused(kind: str, tmp_path: Path) -> None:
    language_model(kind).save_pretrained(tmp_path)
    refused(lambda: Backbone.from_pretrained(language=tmp_path), str(tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_added_to_the_tokenizer_alone_are_refused_with_both_numbers(kind: str, tmp_path: Path) -> None:
    model, words = language_model(kind), tokenizer(kind)
    rows = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    words.add_tokens([f"new{n}" for n in range(rows + 1 - len(words))])
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    refused(lambda: Backbone.from_pretrained(language=tmp_path), f"{rows:,}", f"id {rows:,}")
    model.resize_token_embeddings(len(words))
    model.save_pretrained(tmp_path)
    assert Backbone.from_pretrained(language=tmp_path).embed(torch.tensor([[rows]])).shape[1] == 1


def test_a_token_without_a_row_that_no_text_has_is_let_be(tmp_path: Path) -> None:
    """As `<mask>` of facebook/bart-large-cnn."""
    model, words = language_model("bart"), tokenizer("bart")
    model.resize_token_embeddings(len(words))
    words.add_special_tokens({"mask_token": "<mask>"})
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    assert Backbone.from_pretrained(language=tmp_path).tokenizer.mask_token_id == len(words) - 1


@pytest.mark.parametrize(("model", "other"), [("t5", "bart"), ("bart", "t5")])
def test_special_tokens_of_another_model_are_refused(model: str, other: str, tmp_path: Path) -> None:
    language_model(model).save_pretrained(tmp_path)
    tokenizer(other).save_pretrained(tmp_path)
    refused(lambda: Backbone.from_pretrained(language=tmp_path), "pad token")


def test_a_decoder_tuned_to_chat_may_end_with_another_special_token(tmp_path: Path) -> None:
    model, words = language_model("llama"), tokenizer("llama")
    words.add_special_tokens({"eos_token": "<|im_end|>"})
    model.resize_token_embeddings(len(words))
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    assert Backbone.from_pretrained(language=tmp_path).tokenizer.eos_token == "<|im_end|>"


def test_a_tokenizer_without_words_is_refused(t5: Backbone) -> None:
    made_up = AutoTokenizer.from_pretrained(t5.language.config._name_or_path)
    content = json.loads(made_up.backend_tokenizer.to_str())
    content["model"]["merges"] = []
    content["model"]["vocab"] = {token: n for n, token in enumerate(["<pad>", "</s>", "<unk>"])}
    made_up._tokenizer = type(made_up.backend_tokenizer).from_str(json.dumps(content))
    refused(lambda: Backbone(None, t5.language, made_up, name="x"), "knows no words")


def edit(file: str, **values: Any) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


def write(file: str, content: str | bytes) -> Damage:
    return lambda folder: (folder / file).write_bytes(
        content.encode() if isinstance(content, str) else content
    )


def cut(file: str) -> Damage:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:-60])


def header(length: int, content: bytes = b"") -> Damage:
    return write("model.safetensors", struct.pack("<Q", length) + content)


def million(folder: Path) -> None:
    tensor = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    content = ("{" + ",".join(f'"layer.{n}":{tensor}' for n in range(10**6)) + "}").encode()
    header(len(content), content)(folder)


class Evil:
    """Leaves a file where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def pickled(file: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / file).write_bytes(pickle.dumps(Evil(folder / "was-run")))

    return damage


def zipped(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Evil(folder / "was-run")}, folder / "pytorch_model.bin")


def index(target: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder.parent / "secret.safetensors")
        names = load_file(folder.parent / "secret.safetensors")
        content = {"metadata": {}, "weight_map": dict.fromkeys(names, target)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return damage


def without_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.block.1.layer.0.SelfAttention.q.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def odd_name(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors") | {"\x1b]0;owned\x07": torch.ones(1)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def code(folder: Path) -> None:
    edit("config.json", model_type="own", auto_map={"AutoConfig": "own.Own"})(folder)
    (folder / "own.py").write_text("import pathlib\npathlib.Path(__file__).with_name('was-run').touch()")


DAMAGES: dict[str, Damage] = {
    "a pickle named safetensors": pickled("model.safetensors"),
    "a pickle": pickled("pytorch_model.bin"),
    "a pickle of torch": zipped,
    "configuration cut": cut("config.json"),
    "configuration of nulls": write("config.json", b"\0" * 2000),
    "configuration a list": write("config.json", "[1, 2]"),
    "configuration nested": write("config.json", '{"a":' * 100_000 + "1" + "}" * 100_000),
    "tokenizer settings nested": write("tokenizer_config.json", '{"a":' * 100_000 + "1" + "}" * 100_000),
    "configuration empty": write("config.json", "{}"),
    "no configuration": lambda folder: (folder / "config.json").unlink(),
    "width a text": edit("config.json", d_model="wide"),
    "width a list": edit("config.json", d_model=[32]),
    "width negative": edit("config.json", d_model=-32),
    "no heads": edit("config.json", num_heads=0),
    "enormous width": edit("config.json", d_model=10**12),
    "digits": edit("config.json", d_model=10**400),
    "enormous vocabulary": edit("config.json", vocab_size=10**8),
    "enormous feed-forward": edit("config.json", d_ff=10**7),
    "wide": edit("config.json", d_model=10**6),
    "enormous depth": edit("config.json", num_layers=10**9),
    "type unknown": edit("config.json", model_type="\x1b[31mown"),
    "type a number": edit("config.json", model_type=7),
    "code": code,
    "index outside": index("../secret.safetensors"),
    "index of lists": write("model.safetensors.index.json", '{"weight_map": ["a"]}'),
    "missing shard": index("model-00001-of-00002.safetensors"),
    "million tensors": million,
    "header longer than the file": header(1 << 40, b"{}"),
    "header no JSON": header(4, b"{{{{"),
    "weights cut": cut("model.safetensors"),
    "weights empty": write("model.safetensors", b""),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "a tensor is missing": without_a_tensor,
    "control characters in a name": odd_name,
    "tokenizer a list": write("tokenizer.json", "[]"),
    "tokenizer cut": cut("tokenizer.json"),
    "tokenizer of another shape": write("tokenizer.json", '{"model": {"type": "BPE", "vocab": [1]}}'),
    "tokenizer class unknown": edit("tokenizer_config.json", tokenizer_class=["a"]),
    "generation settings cut": cut("generation_config.json"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_language_model_is_one_error(kind: str, folder: Path) -> None:
    DAMAGES[kind](folder)
    refused(lambda: Backbone.from_pretrained(language=folder), str(folder))
    assert not (folder / "was-run").exists()


SIZE = {"height": 10**7, "width": 10**7}
SEEN: dict[str, Damage] = {
    "no processor": lambda folder: [path.unlink() for path in folder.glob("*processor*")],
    "absurd size": edit("preprocessor_config.json", size={"shortest_edge": 10**7}, crop_size=SIZE),
    "negative size": edit("preprocessor_config.json", crop_size={"height": -3, "width": 32}),
    "size a text": edit("preprocessor_config.json", crop_size={"height": "high", "width": 32}),
    "one mean": edit("preprocessor_config.json", image_mean=[0.5]),
    "no spread": edit("preprocessor_config.json", image_std=[0.5, 0.0, 0.5]),
    "another size than the tower's": edit("preprocessor_config.json", crop_size={"height": 64, "width": 48}),
    "processor cut": cut("preprocessor_config.json"),
    "one channel": edit("config.json", vision_config={"num_channels": 1}),
    "weights cut": cut("model.safetensors"),
    "million tensors": million,
}


@pytest.mark.parametrize("kind", SEEN)
def test_a_damaged_image_encoder_is_one_error(kind: str, clip: Path) -> None:
    SEEN[kind](clip)
    refused(lambda: VisionEncoder.from_pretrained(clip), str(clip))


def test_a_name_in_a_backbone_cannot_steer_the_terminal(t5: Backbone, tmp_path: Path) -> None:
    t5.name = "tiny\x1b]0;owned\x07\n"
    t5.save_pretrained(tmp_path)
    assert Backbone.from_pretrained(tmp_path).name == r"tiny\x1b]0;owned\x07\n"
