"""The authors' adapter files: read, put on a backbone, written back, refused."""

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import D_MODEL, random_labels, random_text
from torch import Tensor

from dept_vl.adapters.adapter import Adapter
from dept_vl.adapters.authors import CONFIG_FILE, NAMES, TENSORS_FILE
from dept_vl.models.backbone import Backbone
from dept_vl.models.prompted import PromptedModel
from dept_vl.presets import PAPER
from dept_vl.prompts.dept import DePT

RELEASED = Path(__file__).parents[1] / "fixtures" / "official_adapters"
SIZES = {"prompt_length": 4, "rank": 3, "max_source_length": 12}


def read_raw(folder: Path) -> dict[str, Tensor]:
    raw: dict[str, Tensor] = torch.load(folder / TENSORS_FILE, weights_only=True, map_location="cpu")
    return raw


def same_bits(one: Tensor, other: Tensor) -> bool:
    alike = one.dtype == other.dtype and one.shape == other.shape
    return alike and one.view(torch.uint8).equal(other.view(torch.uint8))


def tiny_tensors() -> dict[str, Tensor]:
    m, r, s = SIZES["prompt_length"], SIZES["rank"], SIZES["max_source_length"]
    shapes = {"soft_prompt": (m, D_MODEL), "offset_a": (s, r), "offset_b": (r, D_MODEL)}
    return {NAMES[name]: torch.randn(shape) for name, shape in shapes.items()}


def write_tiny(folder: Path, tensors: Any = None, **changes: Any) -> Path:
    """A small adapter in the authors' files, on a backbone named t5, with changes to its configuration."""
    config = json.loads((RELEASED / "sst2" / CONFIG_FILE).read_text()) | {
        "base_model_name_or_path": "google-t5/t5",
        "num_virtual_tokens": SIZES["prompt_length"],
        "r": SIZES["rank"],
        "max_length": SIZES["max_source_length"],
        "token_dim": D_MODEL,
        "hidden_size": D_MODEL,
    }
    folder.mkdir(exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(config | changes))
    torch.save(tiny_tensors() if tensors is None else tensors, folder / TENSORS_FILE)
    return folder


def trained(backbone: Backbone, **changes: int) -> PromptedModel:
    model = PromptedModel(backbone, DePT(backbone.d_model, **(SIZES | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model.eval()


def logits(model: PromptedModel) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**random_text(model.backbone), labels=random_labels()).logits
    return out


# -- the released ones


@pytest.mark.parametrize("task", ["cola", "sst2"])
def test_released_adapter_is_read_exactly(task: str) -> None:
    adapter = Adapter.from_authors(RELEASED / task, task=task)
    preset = PAPER[task]
    assert adapter.prompt == {
        **{"method": "dept", "seed": 0, "visual_offset": False},
        "prompt_length": preset["prompt_length"],
        "rank": preset["rank"],
        "max_source_length": 256,
        "d_model": 768,
        "alpha": 8.0,
        "scale": 8 / preset["rank"] ** 0.5,
    }
    assert adapter.trainable_parameters == {
        "prompt": preset["prompt_length"] * 768,
        "low_rank": (256 + 768) * preset["rank"],
        "total": 76_800,
        "without_projection": 76_800,
    }
    assert (adapter.task, adapter.metrics, adapter.backbone["name"]) == (task, {}, "t5-base")
    raw = read_raw(RELEASED / task)
    assert adapter.tensors.keys() == {"prompt." + name for name in NAMES}
    assert all(same_bits(adapter.tensors["prompt." + ours], raw[theirs]) for ours, theirs in NAMES.items())
    # Trained, not initial: B starts at zero.
    assert adapter.tensors["prompt.offset_b"].abs().max() > 0.1


@pytest.mark.parametrize("through_our_files", [False, True])
@pytest.mark.parametrize("task", ["cola", "sst2"])
def test_released_adapter_is_written_back_bit_for_bit(
    tmp_path: Path, task: str, through_our_files: bool
) -> None:
    # By the earlier names of `from_authors` and `to_authors`.
    adapter = Adapter.from_official(RELEASED / task, task=task)
    if through_our_files:
        adapter.save(tmp_path / "ours")
        adapter = Adapter.load(tmp_path / "ours")
    adapter.to_official(tmp_path / "theirs")
    before, after = read_raw(RELEASED / task), read_raw(tmp_path / "theirs")
    assert list(before) == list(after)
    assert all(same_bits(before[name], after[name]) for name in before)
    assert (tmp_path / "theirs" / CONFIG_FILE).read_bytes() == (RELEASED / task / CONFIG_FILE).read_bytes()
    assert {path.name for path in (tmp_path / "theirs").iterdir()} == {TENSORS_FILE, CONFIG_FILE}


# -- ours in their files


def test_our_adapter_in_their_files_is_the_same_model(
    make_backbone: Callable[..., Backbone], tmp_path: Path
) -> None:
    model = trained(make_backbone("t5", None))
    Adapter.of(model, task="rte", metrics={}).to_authors(tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    theirs = json.loads((RELEASED / "cola" / CONFIG_FILE).read_text())
    assert config.keys() == theirs.keys()
    own = {
        "num_virtual_tokens": 4,
        "r": 3,
        "max_length": 12,
        "token_dim": D_MODEL,
        "hidden_size": D_MODEL,
        "base_model_name_or_path": model.backbone.name,
        "tokenizer_name_or_path": model.backbone.name,
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "num_attention_heads": None,
        "num_layers": None,
    }
    assert config == theirs | own
    with pytest.warns(UserWarning, match="only the name and the width"):
        built = Adapter.from_authors(tmp_path, task="rte").build(make_backbone("t5", None)).eval()
    assert torch.equal(logits(built), logits(model))


@pytest.mark.parametrize(("alpha", "written"), [(5.0, "5"), (2.5, "2.5")])
def test_alpha_is_kept(
    make_backbone: Callable[..., Backbone], tmp_path: Path, alpha: float, written: str
) -> None:
    backbone = make_backbone("t5", None)
    model = PromptedModel(backbone, DePT(backbone.d_model, **SIZES, alpha=alpha))
    Adapter.of(model, task="rte", metrics={}).to_authors(tmp_path)
    assert f'"lora_alpha": {written},' in (tmp_path / CONFIG_FILE).read_text()
    read = Adapter.from_authors(tmp_path, task="rte").prompt
    assert read is not None
    assert (read["alpha"], read["scale"]) == (alpha, alpha / 3**0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in tiny_tensors().items()}
    adapter = Adapter.from_authors(write_tiny(tmp_path / "in", tensors), task="rte")
    adapter.to_authors(tmp_path / "out")
    after = read_raw(tmp_path / "out")
    assert all(same_bits(tensors[name], after[name]) for name in tensors)


@pytest.mark.parametrize(
    ("tower", "changes"), [("clip", {}), (None, {"rank": 0}), (None, {"prompt_length": 0})]
)
def test_what_their_files_have_no_place_for_is_refused(
    make_backbone: Callable[..., Backbone], tmp_path: Path, tower: str | None, changes: dict[str, int]
) -> None:
    adapter = Adapter.of(trained(make_backbone("t5", tower), **changes), task="vqav2", metrics={})
    with pytest.raises(ValueError, match="nothing else; this adapter has"):
        adapter.to_authors(tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- the backbone, of which their files tell the name


def test_a_backbone_of_the_same_name_is_taken_with_a_warning(
    make_backbone: Callable[..., Backbone], tmp_path: Path
) -> None:
    adapter = Adapter.from_authors(write_tiny(tmp_path / "theirs"), task="rte")
    adapter.save(tmp_path / "ours")
    backbone = make_backbone("t5", None)
    assert backbone.name != "google-t5/t5"
    for known in (adapter, Adapter.load(tmp_path / "ours")):
        assert known.backbone["fingerprint"] is None
        with pytest.warns(UserWarning, match=r"weights of google-t5/t5.*only the name and the width"):
            model = known.build(backbone)
    raw = read_raw(tmp_path / "theirs")
    assert model.prompt is not None
    assert {NAMES[name] for name, _ in model.prompt.named_parameters()} == raw.keys()
    assert all(torch.equal(p.detach(), raw[NAMES[name]]) for name, p in model.prompt.named_parameters())
    # Copied out of the model, it knows the weights it was run on.
    assert Adapter.of(model, task="rte", metrics={}).backbone["fingerprint"] == backbone.fingerprint


def test_another_backbone_is_refused(make_backbone: Callable[..., Backbone], tmp_path: Path) -> None:
    adapter = Adapter.from_authors(write_tiny(tmp_path / "t5"), task="rte")
    other = make_backbone("bart", None)
    with pytest.raises(ValueError, match=r"google-t5/t5 and does not fit.*bart.*set backbone\.name"):
        adapter.build(other)
    with pytest.raises(ValueError, match=r"text alone.*vision tower"):
        adapter.build(make_backbone("t5"))
    renamed = make_backbone("t5", None)
    renamed.name = "t5-base"
    wide = Adapter.from_authors(RELEASED / "cola", task="cola")
    with (
        pytest.warns(UserWarning, match="only the name"),
        pytest.raises(ValueError, match=f"768 wide and t5-base is {D_MODEL} wide"),
    ):
        wide.build(renamed)


def test_an_adapter_of_ours_is_still_held_to_the_weights(make_backbone: Callable[..., Backbone]) -> None:
    backbone = make_backbone("t5", None)
    adapter = Adapter.of(trained(backbone), task="rte", metrics={})
    other = {**adapter.backbone, "fingerprint": {"language": "0" * 16}}
    with pytest.raises(ValueError, match="load the backbone it was trained on"):
        replace(adapter, backbone=other).build(backbone)


# -- P alone


def test_the_prompt_alone_is_refused_with_the_reason(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    prompt = {"prompt_embeddings": tensors["prompt_embeddings"]}
    with pytest.raises(ValueError, match=r"P alone: A and B.*not saved.*prompt_only=True"):
        Adapter.from_authors(write_tiny(tmp_path, prompt), task="rte")


@pytest.mark.parametrize("complete", [False, True])
def test_the_prompt_alone_is_plain_prompt_tuning_if_asked_for(
    make_backbone: Callable[..., Backbone], tmp_path: Path, complete: bool
) -> None:
    tensors = tiny_tensors()
    prompt = {"prompt_embeddings": tensors["prompt_embeddings"]}
    write_tiny(tmp_path, tensors if complete else prompt)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    del config["r"]
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    adapter = Adapter.from_authors(tmp_path, task="rte", prompt_only=True)
    assert adapter.trainable_parameters == {"prompt": 128, "total": 128, "without_projection": 128}
    with pytest.warns(UserWarning, match="only the name"):
        model = adapter.build(make_backbone("t5", None)).eval()
    plain = trained(make_backbone("t5", None), rank=0)
    with torch.no_grad():
        plain.prompt.soft_prompt.copy_(prompt["prompt_embeddings"])  # type: ignore[union-attr]
    assert torch.equal(logits(model), logits(plain))
    with pytest.raises(ValueError, match="nothing else; this adapter has"):
        adapter.to_authors(tmp_path / "out")


# -- files that are not as they should be


class Trap:
    """A pickle that writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("save", [torch.save, lambda what, path: path.write_bytes(pickle.dumps(what, 2))])
def test_code_in_the_pickle_is_never_run(tmp_path: Path, save: Callable[[Any, Path], object]) -> None:
    sprung = tmp_path / "sprung"
    write_tiny(tmp_path)
    save(tiny_tensors() | {"trap": Trap(sprung)}, tmp_path / TENSORS_FILE)
    with pytest.raises(ValueError, match="more than tensors"):
        Adapter.from_authors(tmp_path, task="rte")
    assert not sprung.exists()


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\xff" * 64])
@pytest.mark.parametrize("name", [TENSORS_FILE, CONFIG_FILE])
def test_damaged_file_is_named(tmp_path: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    path = write_tiny(tmp_path) / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        Adapter.from_authors(tmp_path, task="rte")


@pytest.mark.parametrize("name", [TENSORS_FILE, CONFIG_FILE])
def test_missing_file_is_named(tmp_path: Path, name: str) -> None:
    (write_tiny(tmp_path) / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"expected .*{name}"):
        Adapter.from_authors(tmp_path, task="rte")


@pytest.mark.parametrize("tensors", [[1, 2], {"prompt_embeddings": [1.0]}, torch.zeros(2)])
def test_what_is_no_dictionary_of_tensors_is_refused(tmp_path: Path, tensors: Any) -> None:
    with pytest.raises(ValueError, match="more than tensors"):
        Adapter.from_authors(write_tiny(tmp_path, tensors), task="rte")


@pytest.mark.parametrize("prompt_only", [False, True])
def test_other_tensors_are_listed(tmp_path: Path, prompt_only: bool) -> None:
    extra = tiny_tensors() | {"classifier": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"expected \['prompt_embeddings'.*found \['classifier'"):
        Adapter.from_authors(write_tiny(tmp_path, extra), task="rte", prompt_only=prompt_only)
    unprompted = {name: tensor for name, tensor in tiny_tensors().items() if name != "prompt_embeddings"}
    with pytest.raises(ValueError, match=r"found \['prompt_encoder"):
        Adapter.from_authors(write_tiny(tmp_path, unprompted), task="rte", prompt_only=prompt_only)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_virtual_tokens": 5}, r"'soft_prompt': \(5, 32\).*found .*'soft_prompt': \(4, 32\)"),
        ({"max_length": 13}, r"'offset_a': \(13, 3\).*found .*'offset_a': \(12, 3\)"),
        ({"r": 2}, r"'offset_a': \(12, 2\).*found .*'offset_a': \(12, 3\)"),
        ({"token_dim": 31}, r"'soft_prompt': \(4, 31\).*found .*'soft_prompt': \(4, 32\)"),
        ({"peft_type": "LORA"}, "expected peft_type PROMPT_TUNING_LORA, found 'LORA'"),
        ({"r": None}, "r is None"),
        ({"r": 0}, "r is 0"),
        ({"max_length": "12"}, "max_length is '12'"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path is None"),
    ],
)
def test_configuration_that_does_not_fit_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Adapter.from_authors(write_tiny(tmp_path, **change), task="rte")


def test_configuration_that_is_no_object_is_refused(tmp_path: Path) -> None:
    (write_tiny(tmp_path) / CONFIG_FILE).write_text("[]")
    with pytest.raises(ValueError, match=r"expected peft_type PROMPT_TUNING_LORA, found \[\]"):
        Adapter.from_authors(tmp_path, task="rte")
