"""The published joint encoder, and the order of visual tokens, against fixtures of the released code."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import D_MODEL, random_features, random_labels, random_text
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from dept_vl._utils.tensors import under
from dept_vl.adapters.adapter import Adapter
from dept_vl.adapters.tensors import count_trainable
from dept_vl.models.backbone import Backbone
from dept_vl.models.language import EncoderDecoder
from dept_vl.models.projection import VisualProjection, new_projection
from dept_vl.models.prompted import PromptedModel

FIXTURES = Path(__file__).parents[1] / "fixtures"
ORDERS = ("none", "frozen", "trained")
LOGITS = [-0.223175, -1.711676, 2.124291, -0.252480, -0.281316]
"""What the older code computed, see the README beside the files."""


def published(case: dict[str, Tensor], language: str) -> PreTrainedModel:
    """The language model of a fixture."""
    width, layers = {"d_model": 32, "vocab_size": 400}, ("encoder", "decoder")
    model: PreTrainedModel
    if language == "t5":
        sizes = {"d_kv": 8, "d_ff": 64, "num_heads": 4, "num_layers": 3}
        model = T5ForConditionalGeneration(T5Config(**width, **sizes, decoder_start_token_id=0))
    else:
        sizes = {f"{part}_ffn_dim": 64 for part in layers} | {f"{part}_attention_heads": 4 for part in layers}
        sizes |= {"encoder_layers": 3, "decoder_layers": 2, "max_position_embeddings": 256}
        tokens = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 1}
        model = BartForConditionalGeneration(BartConfig(**width, **sizes, **tokens))
    missing, unexpected = model.load_state_dict(under("language.", case), strict=False)
    assert not unexpected
    tied = ("embed_tokens.weight", "lm_head.weight", "final_logits_bias")
    assert all(name.endswith(tied) for name in missing)
    model.tie_weights()
    return model.eval()


def published_projection(case: dict[str, Tensor], model: PreTrainedModel) -> VisualProjection:
    """Our projection with the weights of a fixture; the box term is constant, as the boxes are zero."""
    visual = under("visual.", case)
    projection = new_projection(model, d_vision=48, places=36)
    boxes = VisualProjection(5, 32, type(projection.norm)(32, eps=projection.norm.eps))
    for ours, name in ((projection, "feat_embedding"), (boxes, "absolute_vis_pos_embedding")):
        ours.linear.load_state_dict(under(f"{name}.0.", visual))
        ours.norm.load_state_dict(under(f"{name}.1.", visual))
    constant = boxes(torch.zeros(1, 1, 1, 5))[0]
    projection.image_order.weight.copy_(visual["img_order_embedding.weight"] + constant)
    assert projection.object_order is not None
    projection.object_order.weight.copy_(case["object_order_vectors"])
    return projection


@pytest.mark.parametrize("images", ["1_image", "2_images"])
@pytest.mark.parametrize("language", ["t5", "bart"])
@torch.no_grad()
def test_visual_tokens_and_encoder_are_the_published_ones(language: str, images: str) -> None:
    case = load_file(FIXTURES / "joint_encoder" / f"{language}_{images}.safetensors")
    model = published(case, language)
    visual = published_projection(case, model)(case["visual_features"])
    torch.testing.assert_close(visual, case["expected.visual_tokens"], rtol=0, atol=1e-5)
    wrapped = EncoderDecoder(model, language, "none", visual_normed=True)
    prompt = case["prompt"].expand(len(visual), -1, -1)
    embeddings = torch.cat([prompt, wrapped.embed(case["input_ids"])], dim=1)
    mask = torch.cat([torch.ones(prompt.shape[:2]), case["attention_mask"]], dim=1).bool()
    encoded, full_mask = wrapped.encode(embeddings, mask, visual, prompt.shape[1])
    assert torch.equal(full_mask, case["expected.mask"].bool())
    found, expected = encoded.last_hidden_state[full_mask], case["expected.encoder_output"][full_mask]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def ordered(make_backbone: Callable[..., Backbone], language: str, order: str) -> Backbone:
    """A backbone of the tests with another object order."""
    made = make_backbone(language)
    return Backbone(made.vision, made.language, made.tokenizer, name="x", object_order=order).eval()  # type: ignore[arg-type]


def text_states(backbone: Backbone, features: Tensor) -> Tensor:
    """What the encoder makes of the text beside an image."""
    text = random_text(backbone)
    with torch.no_grad():
        hidden, _ = PromptedModel(backbone).encode(**text, visual_features=features)
    return hidden.last_hidden_state[:, : text["input_ids"].shape[1]] * text["attention_mask"][..., None]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("language", ["t5", "bart"])
def test_shuffled_patches_change_the_text_where_places_have_vectors(
    make_backbone: Callable[..., Backbone], language: str, order: str
) -> None:
    backbone = ordered(make_backbone, language, order)
    features = random_features(backbone)
    moved = text_states(backbone, features.flip(2)) - text_states(backbone, features)
    assert (moved.abs().max() < 1e-5) == (order == "none")
    assert (moved.abs().max() > 1e-3) == (order != "none")


def test_two_images_share_the_places(t5: Backbone) -> None:
    projection = t5.visual_projection
    features = random_features(t5, 1, 1).expand(-1, 2, -1, -1)
    first, second = t5.project(visual_features=features)[0].chunk(2)  # type: ignore[index]
    difference = projection.image_order.weight[1] - projection.image_order.weight[0]  # type: ignore[union-attr]
    torch.testing.assert_close(second - first, difference.expand_as(first))
    nn.init.zeros_(projection.image_order.weight)  # type: ignore[union-attr]
    first, second = t5.project(visual_features=features)[0].chunk(2)  # type: ignore[index]
    assert torch.equal(first, second)


def test_vectors_are_as_large_as_those_of_new_words(make_backbone: Callable[..., Backbone]) -> None:
    for language, std in (("t5", 1.0), ("bart", 0.02)):
        weight = ordered(make_backbone, language, "frozen").visual_projection.object_order.weight  # type: ignore[union-attr]
        assert weight.shape == (16, D_MODEL)
        assert weight.std().item() == pytest.approx(std, rel=0.2)


@pytest.mark.parametrize("order", ORDERS)
def test_an_order_is_counted_where_it_is_trained_and_kept_where_it_is(
    make_backbone: Callable[..., Backbone], tmp_path: Path, order: str
) -> None:
    backbone = ordered(make_backbone, "bart", order)
    model = PromptedModel(backbone)
    projection = 24 * D_MODEL + D_MODEL + 2 * D_MODEL + 2 * D_MODEL
    assert count_trainable(model)["visual_projection"] == projection + 16 * D_MODEL * (order == "trained")
    model(
        **random_text(backbone), labels=random_labels(), visual_features=random_features(backbone)
    ).loss.backward()
    kept = backbone.visual_projection.object_order  # type: ignore[union-attr]
    assert (kept is None) == (order == "none")
    assert kept is None or (kept.weight.grad is not None) == (order == "trained")
    Adapter.of(model, task="vqav2", metrics={}).save(tmp_path / "adapter")
    backbone.save_pretrained(tmp_path / "backbone")
    before = text_states(backbone, random_features(backbone))
    again = Backbone.from_pretrained(tmp_path / "backbone").eval()
    assert (again.object_order, again.visual_norm, again.image_fit) == (order, "once", "squash")
    if kept is not None:  # the adapter brings its places along
        nn.init.zeros_(again.visual_projection.object_order.weight)  # type: ignore[union-attr]
    built = Adapter.load(tmp_path / "adapter").build(again).eval()
    assert torch.equal(text_states(built.backbone, random_features(again)), before)


def test_an_adapter_of_another_order_or_norm_is_rejected_with_both(
    make_backbone: Callable[..., Backbone],
) -> None:
    adapter = Adapter.of(PromptedModel(ordered(make_backbone, "bart", "trained")), task="vqav2", metrics={})
    other = ordered(make_backbone, "bart", "frozen")
    with pytest.raises(ValueError, match=r"object_order trained.*object_order frozen"):
        adapter.build(other)
    made = make_backbone("bart")
    twice = Backbone(
        made.vision, made.language, made.tokenizer, name="x", object_order="trained", visual_norm="twice"
    )
    with pytest.raises(ValueError, match=r"visual_norm once.*visual_norm twice"):
        adapter.build(twice)
    cropped = ordered(make_backbone, "bart", "trained")
    cropped.vision.image_fit = "crop"  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"image_fit squash.*image_fit crop"):
        adapter.build(cropped)
    # One from before it was recorded was trained with what CLIP's processor does.
    recorded = {name: value for name, value in adapter.backbone.items() if name != "image_fit"}
    replace(adapter, backbone=recorded).build(cropped)
    with pytest.raises(ValueError, match=r"image_fit crop.*image_fit squash"):
        replace(adapter, backbone=recorded).build(ordered(make_backbone, "bart", "trained"))


def test_files_from_before_there_was_an_order_answer_as_they_did(tmp_path: Path) -> None:
    folder = FIXTURES / "before_order"
    backbone = Backbone.from_pretrained(folder / "backbone")
    assert (backbone.object_order, backbone.visual_norm) == ("none", "twice")
    assert backbone.image_fit == "squash"  # as SigLIP's processor does it
    assert Backbone.from_pretrained(folder / "backbone", image_fit="pad").image_fit == "pad"
    adapter = Adapter.load(folder / "adapter")
    features = torch.arange(32.0).reshape(1, 1, 4, 8).sin()
    text = backbone.tokenizer(["what colour ?"], return_tensors="pt")

    def logits(model: PromptedModel) -> list[float]:
        labels = torch.tensor([[5, 1]])
        with torch.no_grad():
            model.eval()
            found = model(text.input_ids, text.attention_mask, labels, visual_features=features).logits
        return found[0, 0, :5].tolist()  # type: ignore[no-any-return]

    assert logits(adapter.build(backbone)) == pytest.approx(LOGITS, abs=1e-4)
    adapter.save(tmp_path / "adapter")
    backbone.save_pretrained(tmp_path / "backbone")
    again = Adapter.load(tmp_path / "adapter").build(Backbone.from_pretrained(tmp_path / "backbone"))
    assert logits(again) == pytest.approx(LOGITS, abs=1e-4)
