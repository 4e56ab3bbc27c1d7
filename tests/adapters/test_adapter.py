"""The adapter: written, read, put on its backbone and on no other."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import D_MODEL, D_VISION, random_features, random_labels, random_text
from runs import forget_checksums
from safetensors.torch import load_file

from dept_vl.adapters.adapter import ADAPTER_FILE, FORMAT_VERSION, TENSORS_FILE, Adapter
from dept_vl.adapters.fingerprint import check_backbone, describe_backbone
from dept_vl.adapters.tensors import count_trainable
from dept_vl.inference.loading import load
from dept_vl.models.backbone import Backbone
from dept_vl.models.prompted import PromptedModel
from dept_vl.prompts.dept import DePT

SIZES = {"prompt_length": 4, "rank": 3, "max_source_length": 12}


def trained(backbone: Backbone, sizes: dict[str, int] | None = SIZES) -> PromptedModel:
    """A model whose trained parts are far from where training starts."""
    prompt = None if sizes is None else DePT(backbone.d_model, **sizes, alpha=5.0)
    model = PromptedModel(backbone, prompt)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model.eval()


def adapter_of(model: PromptedModel) -> Adapter:
    return Adapter.of(model, task="vqav2", metrics={"overall": 61.5})


def logits(model: PromptedModel) -> torch.Tensor:
    inputs = random_text(model.backbone)
    with torch.no_grad():
        out: torch.Tensor = model(
            **inputs, labels=random_labels(), visual_features=random_features(model.backbone)
        ).logits
    return out


def generated(model: PromptedModel) -> torch.Tensor:
    return model.generate(
        **random_text(model.backbone),
        visual_features=random_features(model.backbone),
        max_new_tokens=6,
        min_new_tokens=6,
    )


def changed(adapter: Adapter, **tensors: torch.Tensor | None) -> Adapter:
    """The adapter with tensors replaced, added or (None) taken out; `__` stands for a dot."""
    new = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    kept = {name: tensor for name, tensor in {**adapter.tensors, **new}.items() if tensor is not None}
    return replace(adapter, tensors=kept)


@pytest.mark.parametrize(
    "sizes",
    [SIZES, {**SIZES, "prompt_length": 0}, {**SIZES, "rank": 0}, None],
    ids=["both", "offset alone", "prompt alone", "no prompt"],
)
@pytest.mark.parametrize("language", ["t5", "bart"])
def test_round_trip_is_exact(
    make_backbone: Callable[..., Backbone], tmp_path: Path, language: str, sizes: dict[str, int] | None
) -> None:
    model = trained(make_backbone(language), sizes)
    adapter_of(model).save(tmp_path)
    loaded = Adapter.load(tmp_path)
    assert loaded.tensors.keys() == adapter_of(model).tensors.keys()
    built = loaded.build(make_backbone(language)).eval()
    mine, theirs = dict(model.named_parameters()), dict(built.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert torch.equal(logits(model), logits(built))
    assert torch.equal(generated(model), generated(built))
    if sizes is not None:
        assert built.prompt is not None
        assert (built.prompt.scale, built.prompt.alpha) == (model.prompt.scale, 5.0)  # type: ignore[union-attr]


def test_the_adapter_changes_what_the_backbone_says(backbone: Backbone) -> None:
    bare = PromptedModel(backbone).eval()
    logits_before, tokens_before = logits(bare), generated(bare)
    model = adapter_of(trained(backbone)).build(backbone).eval()
    assert not torch.allclose(logits(model), logits_before, atol=1e-2)
    assert not torch.equal(generated(model), tokens_before)


def test_full_fine_tuning_is_kept(make_backbone: Callable[..., Backbone], tmp_path: Path) -> None:
    backbone = make_backbone("t5")
    backbone.freeze(language=False)
    model = trained(backbone)
    adapter_of(model).save(tmp_path)
    built = Adapter.load(tmp_path).build(make_backbone("t5")).eval()
    assert torch.equal(logits(model), logits(built))


@pytest.mark.parametrize("part", ["biases", "lora", "prompt"])
def test_adapters_share_a_backbone(make_backbone: Callable[..., Backbone], part: str) -> None:
    adapters, shared = [], make_backbone("t5")
    bare = logits(PromptedModel(shared, None))
    for seed in range(2):
        torch.manual_seed(seed)
        backbone = make_backbone("t5")
        if part == "lora":
            backbone.add_lora(2)
        backbone.freeze(language=part == "prompt", but="lora" if part == "lora" else "biases")
        adapters.append(adapter_of(trained(backbone)))
    models = [adapter.build(shared).eval() for adapter in adapters]
    for model, adapter in zip(models, adapters, strict=True):
        assert torch.equal(logits(model), logits(adapter.build(make_backbone("t5")).eval()))
    assert torch.equal(logits(PromptedModel(shared, None)), bare)


@pytest.mark.parametrize("part", ["all", "biases", "lora", "prompt", "prompt alone"])
@pytest.mark.parametrize("language", ["t5", "bart"])
def test_what_was_trained_is_trained_on_and_saved_again(
    make_backbone: Callable[..., Backbone], tmp_path: Path, language: str, part: str
) -> None:
    backbone = make_backbone(language)
    if part == "lora":
        backbone.add_lora(2)
    elif part in ("all", "biases"):
        backbone.freeze(language=False, but=part)  # type: ignore[arg-type]
    elif part == "prompt alone":
        backbone.freeze(visual_projection=True)
    model = trained(backbone, SIZES if part.startswith("prompt") else None)
    adapter_of(model).save(tmp_path / "first")
    built = Adapter.load(tmp_path / "first").build(make_backbone(language))
    assert count_trainable(built) == count_trainable(model)
    adapter_of(built).save(tmp_path / "second")
    for name in (TENSORS_FILE, ADAPTER_FILE):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_a_frozen_projection_is_kept(make_backbone: Callable[..., Backbone], tmp_path: Path) -> None:
    # It belongs to no model of the Hub, so nothing else could bring it back.
    backbone = make_backbone("t5")
    torch.nn.init.normal_(backbone.visual_projection.linear.weight)  # type: ignore[union-attr]
    backbone.freeze(visual_projection=True)
    model = trained(backbone)
    adapter_of(model).save(tmp_path)
    built = Adapter.load(tmp_path).build(make_backbone("t5")).eval()
    assert torch.equal(logits(model), logits(built))


def test_text_alone(make_backbone: Callable[..., Backbone], tmp_path: Path) -> None:
    model = trained(make_backbone("bart", None))
    adapter_of(model).save(tmp_path)
    built = Adapter.load(tmp_path).build(make_backbone("bart", None)).eval()
    inputs = random_text(built.backbone)
    with torch.no_grad():
        ours, theirs = (m(**inputs, labels=random_labels()).logits for m in (model, built))
    assert torch.equal(ours, theirs)
    assert set(Adapter.load(tmp_path).tensors) == {"prompt.soft_prompt", "prompt.offset_a", "prompt.offset_b"}


def test_an_adapter_is_a_copy(t5: Backbone) -> None:
    model = trained(t5)
    adapter = adapter_of(model)
    before = {name: tensor.clone() for name, tensor in adapter.tensors.items()}
    trained(t5)
    with torch.no_grad():
        model.prompt.soft_prompt.zero_()  # type: ignore[union-attr]
    assert all(torch.equal(adapter.tensors[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("language", "tower", "bias"),
    [("bart", "clip", "none"), ("t5", "siglip", "none"), ("t5", None, "none"), ("t5", "clip", "relative")],
)
def test_another_backbone_is_refused(
    make_backbone: Callable[..., Backbone], language: str, tower: str | None, bias: str
) -> None:
    backbone = make_backbone("t5")
    adapter = adapter_of(trained(backbone))
    other = make_backbone(language, tower, visual_position_bias=bias)
    with pytest.raises(ValueError, match="load the backbone it was trained on") as error:
        adapter.build(other)
    for one in (backbone, other):
        for part in (one.name, str(one.fingerprint), one.visual_position_bias):
            assert part in str(error.value)


def test_a_backbone_of_the_same_name_and_other_weights_is_refused(
    make_backbone: Callable[..., Backbone],
) -> None:
    backbone = make_backbone("t5")
    adapter = adapter_of(trained(backbone))
    with torch.no_grad():
        backbone.language.shared.weight[3, 4] += 1.0
    other = Backbone(backbone.vision, backbone.language, backbone.tokenizer, name=backbone.name)
    with pytest.raises(ValueError, match="does not fit"):
        adapter.build(other)


def test_a_backbone_with_another_tokenizer_is_refused(
    t5: Backbone, bart: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = describe_backbone(t5)
    check_backbone(recorded, t5)
    monkeypatch.setattr(t5, "tokenizer", bart.tokenizer)
    with pytest.raises(ValueError, match=recorded["tokenizer"]):
        check_backbone(recorded, t5)
    del recorded["tokenizer"]  # as in older files
    check_backbone(recorded, t5)


def test_tensors_of_other_shapes_are_named(make_backbone: Callable[..., Backbone]) -> None:
    adapter = adapter_of(trained(make_backbone("t5")))
    wrong = changed(adapter, prompt__soft_prompt=torch.zeros(5, D_MODEL))
    with pytest.raises(ValueError, match=r"prompt\.soft_prompt: expected \(4, 32\), found \(5, 32\)"):
        wrong.build(make_backbone("t5"))
    assert adapter.prompt is not None
    described = replace(adapter, prompt={**adapter.prompt, "rank": 2})
    with pytest.raises(ValueError, match=r"offset_a: expected \(12, 2\), found \(12, 3\)"):
        described.build(make_backbone("t5"))


def test_missing_and_extra_tensors_are_named(make_backbone: Callable[..., Backbone]) -> None:
    adapter = adapter_of(trained(make_backbone("t5")))
    backbone = make_backbone("t5")
    with pytest.raises(ValueError, match=r"missing \['offset_a'\], extra \[\]"):
        changed(adapter, prompt__offset_a=None).build(backbone)
    with pytest.raises(ValueError, match=r"missing \[\], extra \['lora_c'\]"):
        changed(adapter, prompt__lora_c=torch.zeros(1)).build(backbone)
    with pytest.raises(ValueError, match=r"missing \['linear\.bias'\]"):
        changed(adapter, visual_projection__linear__bias=None).build(backbone)
    with pytest.raises(ValueError, match=r"tensors of unknown parts: \['head\.weight'\]"):
        changed(adapter, head__weight=torch.zeros(1)).build(backbone)


@pytest.mark.parametrize("name", [TENSORS_FILE, ADAPTER_FILE])
def test_missing_file_is_named(t5: Backbone, tmp_path: Path, name: str) -> None:
    adapter_of(trained(t5)).save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing") as error:
        Adapter.load(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("name", [TENSORS_FILE, ADAPTER_FILE])
@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\xff" + b[1:]])
def test_damaged_file(t5: Backbone, tmp_path: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    adapter_of(trained(t5)).save(tmp_path)
    path = tmp_path / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="is damaged") as error:
        Adapter.load(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda description: description.pop("backbone"),
        lambda description: description.update(colour="red"),
    ],
)
def test_a_description_of_other_fields_is_damaged(
    t5: Backbone, tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    adapter_of(trained(t5)).save(tmp_path)
    description = json.loads((tmp_path / ADAPTER_FILE).read_text())
    forget_checksums(tmp_path)
    change(description)
    (tmp_path / ADAPTER_FILE).write_text(json.dumps(description))
    with pytest.raises(ValueError, match="is damaged"):
        Adapter.load(tmp_path)
    (tmp_path / ADAPTER_FILE).write_text("[]")
    with pytest.raises(ValueError, match="is damaged"):
        Adapter.load(tmp_path)


def test_another_format_version_is_refused(t5: Backbone, tmp_path: Path) -> None:
    replace(adapter_of(trained(t5)), format_version=FORMAT_VERSION + 1).save(tmp_path)
    with pytest.raises(ValueError, match=f"format version {FORMAT_VERSION + 1}; this dept_vl reads"):
        Adapter.load(tmp_path)


def test_files_are_small_and_alone(backbone: Backbone, tmp_path: Path) -> None:
    model = trained(backbone)
    adapter_of(model).save(tmp_path / "deep" / "adapter")
    files = {path.name: path.stat().st_size for path in (tmp_path / "deep" / "adapter").iterdir()}
    assert files.keys() == {TENSORS_FILE, ADAPTER_FILE, ".checksums.json"}
    order = backbone.visual_projection.object_order.weight.numel()  # type: ignore[union-attr]
    assert files[TENSORS_FILE] < 4 * (count_trainable(model)["total"] + order) + 2048
    assert files[ADAPTER_FILE] < 2048
    assert all(
        name.startswith(("prompt.", "visual_projection."))
        for name in Adapter.of(model, task="vqav2", metrics={}).tensors
    )


@pytest.mark.parametrize("call", [0, 1], ids=[TENSORS_FILE, ADAPTER_FILE])
def test_a_failed_write_leaves_the_old_files_whole(
    t5: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    adapter_of(trained(t5)).save(tmp_path)
    name = (TENSORS_FILE, ADAPTER_FILE)[call]
    before = (tmp_path / name).read_bytes()
    calls: list[int] = []

    def full_disk(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > call:
            raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        replace(adapter_of(trained(t5)), task="another").save(tmp_path)
    assert (tmp_path / name).read_bytes() == before
    assert Adapter.load(tmp_path).task == "vqav2"


def test_trainable_parameters_are_counted_with_and_without_the_projection(t5: Backbone) -> None:
    model = trained(t5)
    prompt, low_rank = 4 * D_MODEL, (12 + D_MODEL) * 3
    # Linear with bias, RMSNorm, two rows of image order.
    projection = (D_VISION + 1) * D_MODEL + D_MODEL + 2 * D_MODEL
    assert count_trainable(model) == {
        "prompt": prompt,
        "low_rank": low_rank,
        "visual_projection": projection,
        "total": prompt + low_rank + projection,
        "without_projection": prompt + low_rank,
    }
    t5.freeze(visual_projection=True)
    assert (
        count_trainable(model)["total"] == count_trainable(model)["without_projection"] == prompt + low_rank
    )
    t5.freeze(language=False, visual_projection=True)
    language = sum(p.numel() for p in t5.language.parameters())
    assert count_trainable(model)["without_projection"] == prompt + low_rank + language
    assert count_trainable(PromptedModel(t5))["backbone"] == language


def test_the_description_says_all_there_is_to_know(t5: Backbone, tmp_path: Path) -> None:
    model = trained(t5)
    adapter_of(model).save(tmp_path)
    assert json.loads((tmp_path / ADAPTER_FILE).read_text()) == {
        "prompt": {
            **{"method": "dept", "seed": 0},
            **{**SIZES, "d_model": D_MODEL, "alpha": 5.0, "scale": 5.0 / 3**0.5, "visual_offset": False},
        },
        "backbone": {
            "name": t5.name,
            "fingerprint": t5.fingerprint,
            "visual_position_bias": "none",
            "object_order": "frozen",
            "visual_norm": None,
            "image_fit": "squash",
            "vision": {"layer": -1, "class_token": False, "pooled_grid": 0},
            "exif": True,
            "tokenizer": describe_backbone(t5)["tokenizer"],
        },
        "task": "vqav2",
        "metrics": {"overall": 61.5},
        "trainable_parameters": count_trainable(model),
        "format_version": FORMAT_VERSION,
        "question_case": "lower",
    }
    assert t5.fingerprint.keys() == {"language", "vision"}
    tensors = load_file(tmp_path / TENSORS_FILE)
    assert tensors["prompt.soft_prompt"].shape == (4, D_MODEL)
    order = tensors.pop("visual_projection.object_order.weight")
    assert order.shape == (16, D_MODEL)
    assert sum(tensor.numel() for tensor in tensors.values()) == count_trainable(model)["total"]


def test_whole_numbers_among_the_figures_are_read(t5: Backbone, tmp_path: Path) -> None:
    adapter_of(trained(t5)).save(tmp_path)
    description = json.loads((tmp_path / "adapter.json").read_text())
    description["metrics"] = {"overall": 71}
    (tmp_path / "adapter.json").write_text(json.dumps(description))
    forget_checksums(tmp_path)
    loaded = Adapter.load(tmp_path)
    assert loaded.metrics == {"overall": 71.0}
    assert isinstance(loaded.metrics["overall"], float)


def odd_ones(content: Any) -> Iterator[Any]:
    """The same content with one text or name in it that steers a terminal, for each of them."""
    odd = "\x1b]0;x\x07\n"
    if isinstance(content, dict):
        for name, value in content.items():
            yield from ({**content, name: changed} for changed in odd_ones(value))
            yield {odd + key if key == name else key: kept for key, kept in content.items()}
    elif isinstance(content, str):
        yield odd + content


def test_errors_show_what_strangers_wrote_as_it_is_written(t5: Backbone, tmp_path: Path) -> None:
    adapter_of(trained(t5)).save(tmp_path)
    forget_checksums(tmp_path)
    texts = []
    for changed in odd_ones(json.loads((tmp_path / ADAPTER_FILE).read_text())):
        (tmp_path / ADAPTER_FILE).write_text(json.dumps(changed))
        named = changed.get("backbone", {}).get("name", t5.name)
        try:
            # A backbone of the odd name is nowhere.
            load(tmp_path, backbone=t5 if named == t5.name else None)
        except (ValueError, FileNotFoundError) as error:
            texts.append(str(error))
    assert all(text.isprintable() for text in texts)
    assert sum("\\x1b" in text for text in texts) > 20
