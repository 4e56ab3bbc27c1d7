"""Backbones: their files and fingerprints, what is trained, and that the language model stays as it was."""

import copy
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_parts import LENGTHS, MODES, PROMPT, encode, parts, stock
from conftest import D_MODEL, LANGUAGES, random_text
from torch import Tensor, nn
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
)

from dept_vl._utils.tensors import fingerprint
from dept_vl.models.backbone import Backbone
from dept_vl.models.vision import VisionEncoder

# -- files


def answers(backbone: Backbone) -> Tensor:
    embeddings, mask, visual = parts(backbone)
    return encode(backbone, embeddings, mask, visual)[0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("language", LANGUAGES)
def test_saved_and_loaded_alike(
    make_backbone: Callable[..., Backbone], tmp_path: Path, language: str, mode: str
) -> None:
    backbone = make_backbone(language, visual_position_bias=mode)
    backbone.save_pretrained(tmp_path / "saved")
    again = Backbone.from_pretrained(tmp_path / "saved").eval()
    assert again.name == backbone.name
    assert again.visual_position_bias == mode
    assert again.fingerprint == backbone.fingerprint
    assert again.vision.options() == backbone.vision.options()
    torch.manual_seed(1)
    expected = answers(backbone)
    torch.manual_seed(1)
    assert torch.equal(answers(again), expected)
    text = "what colour is the circle ?"
    assert again.tokenizer(text).input_ids == backbone.tokenizer(text).input_ids
    assert again.tokenizer.padding_side == "right"


def test_saved_and_loaded_alike_without_tower(make_backbone: Callable[..., Backbone], tmp_path: Path) -> None:
    backbone = make_backbone("t5", None)
    backbone.save_pretrained(tmp_path)
    again = Backbone.from_pretrained(tmp_path)
    assert again.vision is None
    assert again.visual_projection is None
    assert json.loads((tmp_path / "backbone.json").read_text())["vision"] is None
    assert not (tmp_path / "vision").exists()
    assert list(again.fingerprint) == ["language"]
    assert again.fingerprint == backbone.fingerprint


def test_options_of_the_tower_are_kept(
    language_folders: dict[str, Path], vision_folders: dict[str, Path], tmp_path: Path
) -> None:
    backbone = Backbone.from_pretrained(
        vision=vision_folders["clip"],
        language=language_folders["t5"],
        vision_layer=-2,
        class_token=True,
        pooled_grid=3,
    )
    backbone.save_pretrained(tmp_path)
    again = Backbone.from_pretrained(tmp_path)
    assert again.vision.options() == {"layer": -2, "class_token": True, "pooled_grid": 3}
    assert again.vision.token_count == 10


@pytest.mark.parametrize(
    "asked",
    [{"pooled_grid": 2}, {"class_token": True}, {"visual_position_bias": "relative"}, {"vision": "x/y"}],
)
def test_a_whole_backbone_keeps_its_options(
    backbone: Backbone, tmp_path: Path, asked: dict[str, Any]
) -> None:
    backbone.save_pretrained(tmp_path)
    assert backbone.vision is not None
    same = {
        f"{'vision_' * (name == 'layer')}{name}": value for name, value in backbone.vision.options().items()
    }
    Backbone.from_pretrained(tmp_path, **same, visual_position_bias=backbone.visual_position_bias)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"options of its own, in .*; got {next(iter(asked))}="):
        Backbone.from_pretrained(tmp_path, **asked)


def test_padding_goes_on_the_right_whatever_the_tokenizer_says(t5: Backbone) -> None:
    t5.tokenizer.padding_side = "left"
    assert Backbone(None, t5.language, t5.tokenizer, name="x").tokenizer.padding_side == "right"


# -- fingerprint


def test_fingerprint_is_alike_in_bfloat16(language_folders: dict[str, Path], t5: Backbone) -> None:
    half = AutoModelForSeq2SeqLM.from_pretrained(language_folders["t5"], dtype=torch.bfloat16)
    assert next(half.parameters()).dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(language_folders["t5"])
    again = Backbone(t5.vision, half, tokenizer, name="another name")
    assert again.fingerprint == t5.fingerprint
    assert all(len(digest) == 16 and int(digest, 16) >= 0 for digest in again.fingerprint.values())


def test_fingerprint_differs_with_any_tensor(language_folders: dict[str, Path]) -> None:
    state = stock(language_folders["t5"]).state_dict()
    seen = {fingerprint(state.items())}
    for name, tensor in state.items():
        changed = tensor.clone()
        changed.view(-1)[0] += 0.5
        seen.add(fingerprint((state | {name: changed}).items()))
    assert len(seen) == 1 + len(state)


def test_fingerprint_is_of_values_names_and_shapes() -> None:
    tensor = torch.randn(4, 6)
    digest = fingerprint([("a", tensor), ("b", -tensor)])
    assert fingerprint([("b", -tensor), ("a", tensor)]) == digest
    assert fingerprint([("a", -tensor), ("b", tensor)]) != digest
    assert fingerprint([("a", tensor.reshape(6, 4)), ("b", -tensor)]) != digest
    assert fingerprint([("a", tensor)]) != digest


def test_fingerprint_stays_through_training(t5: Backbone) -> None:
    before = dict(t5.fingerprint)
    with torch.no_grad():
        t5.visual_projection.linear.weight.add_(1.0)
    assert t5.fingerprint == before
    assert fingerprint(t5.language.state_dict().items()) == before["language"]


# -- what is trained


def trained(backbone: Backbone) -> set[str]:
    return {name.split(".")[0] for name, p in backbone.named_parameters() if p.requires_grad}


def test_only_the_projection_is_trained_unless_told(backbone: Backbone) -> None:
    assert trained(backbone) == {"visual_projection"}
    names = {name for name, p in backbone.visual_projection.named_parameters() if not p.requires_grad}
    assert names == {"object_order.weight"}


@pytest.mark.parametrize(
    ("frozen", "names"),
    [
        ({"language": True, "visual_projection": True}, set()),
        ({"language": False, "visual_projection": True}, {"language"}),
        ({"language": False}, {"language", "visual_projection"}),
        ({}, {"visual_projection"}),
    ],
)
def test_freeze(backbone: Backbone, frozen: dict[str, bool], names: set[str]) -> None:
    backbone.freeze(language=False)
    backbone.freeze(**frozen)
    assert trained(backbone) == names
    assert all(p.requires_grad == ("language" in names) for p in backbone.language.parameters())
    assert not any(p.requires_grad for p in backbone.vision.parameters())


def test_text_backbone_is_all_frozen(make_backbone: Callable[..., Backbone]) -> None:
    assert trained(make_backbone("t5", None)) == set()


# -- the language model is left as it was


def same_as_stock(backbone: Backbone, reference: PreTrainedModel, text: dict[str, Tensor]) -> None:
    tokens = {"max_new_tokens": 6, "do_sample": False}
    ours, theirs = (model.generate(**text, **tokens) for model in (backbone.language, reference))
    assert torch.equal(ours, theirs)
    with torch.no_grad():
        states = [model.get_encoder()(**text).last_hidden_state for model in (backbone.language, reference)]
    assert torch.equal(*states)


def test_language_model_is_still_stock_after_use(
    backbone: Backbone, language_folders: dict[str, Path]
) -> None:
    name = "t5" if "T5" in type(backbone.language).__name__ else "bart"
    reference = stock(language_folders[name])
    text = random_text(backbone, LENGTHS)
    # A text about as long as the visual tokens, so that leftovers would show in numbers, not in shapes.
    longer = random_text(backbone, (20, 25), seed=1)
    for _ in range(2):
        encode(backbone, *parts(backbone, images=1))
        for inputs in (text, longer):
            same_as_stock(backbone, reference, inputs)


def test_failed_call_leaves_nothing_behind(backbone: Backbone, language_folders: dict[str, Path]) -> None:
    name = "t5" if "T5" in type(backbone.language).__name__ else "bart"
    embeddings, mask, visual = parts(backbone)
    block = next(m for m in backbone.language.get_encoder().modules() if isinstance(m, nn.ModuleList))[-1]

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory, say")

    handle = block.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="say"):
        encode(backbone, embeddings, mask, visual)
    handle.remove()
    same_as_stock(backbone, stock(language_folders[name]), random_text(backbone, (20, 25)))


def test_two_backbones_may_share_a_language_model(
    backbone: Backbone, language_folders: dict[str, Path]
) -> None:
    embeddings, mask, visual = parts(backbone)
    expected, _ = encode(backbone, embeddings, mask, visual)
    Backbone(backbone.vision, backbone.language, backbone.tokenizer, name="again")
    ours, _ = encode(backbone, embeddings, mask, visual)
    assert torch.equal(ours, expected)


def without_dropout(module: nn.Module) -> nn.Module:
    """Training mode, in which gradients may be checkpointed, without its randomness."""
    for part in module.train().modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        for name in ("dropout", "activation_dropout"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)
    return module


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("between", ["nothing", "text alone", "stock call"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_recomputes_the_same(
    backbone: Backbone, between: str, reentrant: bool
) -> None:
    def gradient(backbone: Backbone) -> Tensor:
        without_dropout(backbone)
        torch.manual_seed(2)
        embeddings, mask, visual = parts(backbone)
        output, full_mask = backbone.encode(embeddings, mask, visual, prompt_length=PROMPT)
        loss = output.last_hidden_state[full_mask].pow(3).mean()
        if between == "text alone":
            output, _ = backbone.encode(embeddings, mask, prompt_length=PROMPT)
            loss = loss + output.last_hidden_state[mask].pow(3).mean()
        elif between == "stock call":
            backbone.language.get_encoder()(**random_text(backbone, (25,)))
        loss.backward()
        return backbone.visual_projection.linear.weight.grad

    checkpointed = copy.deepcopy(backbone)
    checkpointed.language.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.testing.assert_close(gradient(checkpointed), gradient(backbone), rtol=1e-4, atol=1e-6)


def test_any_tower_joins(language_folders: dict[str, Path], vision_folders: dict[str, Path]) -> None:
    for tower, folder in vision_folders.items():
        backbone = Backbone.from_pretrained(vision=folder, language=language_folders["t5"]).eval()
        assert isinstance(backbone.vision, VisionEncoder)
        visual = backbone.project(pixel_values=torch.randn(2, 1, 3, 32, 32))
        assert visual.shape == (2, backbone.vision.token_count, D_MODEL), tower


def test_threads_may_load_at_once(t5: Backbone, tmp_path: Path) -> None:
    t5.save_pretrained(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(Backbone.from_pretrained, [tmp_path] * 4))
    for one in loaded:
        assert one.fingerprint == t5.fingerprint


def test_threads_may_encode_at_once(make_backbone: Callable[..., Backbone]) -> None:
    backbone = make_backbone("t5", "clip", visual_position_bias="none")
    embeddings, mask, visual = parts(backbone)
    calls: list[tuple[Tensor, ...]] = [(embeddings, mask, visual), (embeddings, mask)]
    expected = [encode(backbone, *call)[0] for call in calls]
    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda call: encode(backbone, *call)[0], calls * 50))
    finally:
        sys.setswitchinterval(switching)
    for one, right in zip(found, expected * 50, strict=True):
        torch.testing.assert_close(one, right)
