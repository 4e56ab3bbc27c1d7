"""Decoder-only language models with images against the formula on stock models, an example at a time.

`[P ; start ; V ; E(rest) ; E(answer)]`, where V is `norm(W x + b) + image order + object order`, written out;
the start token is in front where the tokenizer puts one (Llama). Comparisons are in float64.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_parts import (
    ANSWERS,
    LAYOUTS,
    Literal,
    M,
    S,
    answers_of,
    cut,
    laid_out,
    stock,
    texts_of,
    trained_prompt,
)
from conftest import D_MODEL, random_features, random_labels, random_text
from torch import Tensor, nn

from dept_vl.adapters.adapter import Adapter
from dept_vl.config import PromptOptions
from dept_vl.models.backbone import Backbone
from dept_vl.models.prompted import PromptedModel
from dept_vl.models.row_prompts import PromptTable, RowPrompts
from dept_vl.prompts.dept import DePT
from dept_vl.training.build import build_prompt

TOKENS = 16
"""Of an image."""


class SeeingLiteral(Literal):
    """The formula with images."""

    def __init__(self, backbone: Backbone, language: Any, parts: Any, starts: int) -> None:
        super().__init__(language, parts)
        assert backbone.visual_projection is not None
        self.weights = {n: p.detach().double() for n, p in backbone.visual_projection.state_dict().items()}
        self.starts, self.features = starts, torch.empty(0)

    def visual(self) -> Tensor:
        """V of the images of `features`."""
        w, tokens = self.weights, []
        for place, image in enumerate(self.features):
            x = image @ w["linear.weight"].T + w["linear.bias"]
            if "norm.bias" in w:
                centred = x - x.mean(-1, keepdim=True)
                x = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
                x = x * w["norm.weight"] + w["norm.bias"]
            else:
                x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w["norm.weight"]
            tokens.append(x + w["image_order.weight"][place] + w["object_order.weight"])
        return torch.cat(tokens)

    def source(self, tokens: Tensor) -> Tensor:
        read = super().source(tokens)
        front = self.starts + (0 if self.parts is None else M)
        return torch.cat([read[:front], self.visual(), read[front:]])


@pytest.fixture
def backbone(kind: str, make_backbone: Callable[..., Backbone]) -> Backbone:
    return make_backbone(kind)


@pytest.fixture
def pair(
    kind: str, backbone: Backbone, decoder_folders: dict[str, Path]
) -> tuple[PromptedModel, SeeingLiteral]:
    """Our model and the literal one, with the same trained parts on the same weights, in float64."""
    prompt = trained_prompt()
    ours = PromptedModel(backbone, prompt).eval().double()
    assert backbone.visual_projection is not None
    backbone.visual_projection.float()  # which it is computed in
    parts = tuple(part.detach().clone() for part in prompt.parameters())
    return ours, SeeingLiteral(backbone, stock(decoder_folders[kind]), parts, int(kind == "llama"))


def seen_by(backbone: Backbone, layout: str = LAYOUTS[0], images: int = 1) -> dict[str, Tensor]:
    text = laid_out(backbone, layout)
    return text | {"visual_features": random_features(backbone, 3, images).double()}


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_forward_is_the_formula(pair: tuple[PromptedModel, SeeingLiteral], layout: str, images: int) -> None:
    ours, literal = pair
    given, labels = seen_by(ours.backbone, layout, images), random_labels(ANSWERS)
    output, losses = ours(**given, labels=labels), []
    for row, (tokens, answer) in enumerate(zip(texts_of(given), answers_of(labels), strict=True)):
        literal.features = given["visual_features"][row]
        assert len(literal.visual()) == images * TOKENS
        expected = literal.logits(tokens, answer)
        torch.testing.assert_close(output.logits[row, : len(answer)], expected, atol=1e-5, rtol=0)
        losses.append(literal.loss(tokens, answer))
    torch.testing.assert_close(output.loss.double(), torch.stack(losses).mean(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("prompted", [True, False])
@torch.no_grad()
def test_answers_are_the_formulas(pair: tuple[PromptedModel, SeeingLiteral], prompted: bool) -> None:
    ours, literal = pair
    if not prompted:
        ours.prompt = literal.parts = None
    given = seen_by(ours.backbone, "padded on the left", 2)
    eos = ours.backbone.tokenizer.eos_token_id
    greedy = ours.generate(**given, max_new_tokens=6, do_sample=False).tolist()
    options = {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.5, "max_new_tokens": 5}
    beams, expected = ours.generate(**given, **options).tolist(), []
    for row, tokens in enumerate(texts_of(given)):
        literal.features = given["visual_features"][row]
        assert cut(greedy[row], eos) == literal.greedy(tokens, 6)
        expected += literal.generate(tokens, **options)
    assert [cut(tokens, eos) for tokens in beams] == expected


@torch.no_grad()
def test_images_and_their_order_are_told_apart(backbone: Backbone) -> None:
    model = PromptedModel(backbone, trained_prompt()).eval()
    given, labels = seen_by(backbone, images=2), random_labels(ANSWERS)
    given["visual_features"] = given["visual_features"].float()
    expected = model(**given, labels=labels).logits
    for other in (given["visual_features"].flip(1), given["visual_features"].flip(2)):
        logits = model(**given | {"visual_features": other}, labels=labels).logits
        assert ((logits - expected).abs().amax((1, 2)) > 1e-3).all()


@torch.no_grad()
def test_pixels_are_their_features(backbone: Backbone) -> None:
    model, labels = PromptedModel(backbone, trained_prompt()).eval(), random_labels(ANSWERS)
    pixels = torch.randn(3, 2, 3, 32, 32)
    assert backbone.vision is not None
    features = backbone.vision(pixels.flatten(0, 1)).unflatten(0, (3, 2))
    text = random_text(backbone)
    by_pixels = model(**text, pixel_values=pixels, labels=labels).logits
    assert torch.equal(by_pixels, model(**text, visual_features=features, labels=labels).logits)


def test_prompt_and_projection_are_trained_and_nothing_else(backbone: Backbone) -> None:
    model = PromptedModel(backbone, trained_prompt()).train()
    given = seen_by(backbone)
    given["visual_features"] = given["visual_features"].float()
    model(**given, labels=random_labels(ANSWERS)).loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    projection = {"linear.weight", "linear.bias", "norm.weight", "image_order.weight"}
    projection |= {"norm.bias"} if "norm.bias" in backbone.visual_projection.state_dict() else set()  # type: ignore[union-attr]
    expected = {f"backbone.visual_projection.{name}" for name in projection}
    assert reached == expected | {f"prompt.{name}" for name in ("soft_prompt", "offset_a", "offset_b")}


@torch.no_grad()
def test_rows_with_other_prompts_are_as_alone(backbone: Backbone) -> None:
    prompts = [None, trained_prompt(2), trained_prompt(5)]
    words = backbone.language_model.word_embeddings.weight
    table = PromptTable(prompts, words, padding_first=backbone.language_model.counts_text)
    rows = [2, 0, 1]
    mixed = PromptedModel(backbone, RowPrompts(table, torch.tensor(rows))).eval()
    given, labels = seen_by(backbone), random_labels(ANSWERS)
    given["visual_features"] = given["visual_features"].float()
    logits = mixed(**given, labels=labels).logits
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    answers = mixed.generate(**given, **options)
    for row, which in enumerate(rows):
        model = PromptedModel(backbone, prompts[which]).eval()
        real = given["attention_mask"][row].bool()
        alone = {
            n: t[row : row + 1, real] if n != "visual_features" else t[row : row + 1]
            for n, t in given.items()
        }
        expected = model(**alone, labels=labels[row : row + 1, : ANSWERS[row]]).logits[0]
        torch.testing.assert_close(logits[row, : ANSWERS[row]], expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(answers[row], model.generate(**alone, **options)[0])


@torch.no_grad()
def test_visual_tokens_begin_at_the_size_of_words(
    kind: str, decoder_folders: dict[str, Path], vision_folders: dict[str, Path]
) -> None:
    backbone = Backbone.from_pretrained(language=decoder_folders[kind], vision=vision_folders["clip"])
    projection = backbone.visual_projection
    assert projection is not None
    assert isinstance(projection.norm, nn.LayerNorm if kind == "gpt2" else nn.RMSNorm)
    words = backbone.language.get_input_embeddings().weight
    size = float(words.square().mean().sqrt())
    linear = projection.norm(projection.linear(torch.randn(200, backbone.vision.d_vision)))  # type: ignore[union-attr,operator]
    assert float(linear.square().mean().sqrt()) == pytest.approx(size, rel=0.02)
    assert float(projection.object_order.weight.square().mean().sqrt()) == pytest.approx(size, rel=0.15)  # type: ignore[union-attr,operator]


@torch.no_grad()
def test_backbone_and_adapter_come_back(backbone: Backbone, tmp_path: Path) -> None:
    model = PromptedModel(backbone, trained_prompt()).eval()
    given, labels = seen_by(backbone, images=2), random_labels(ANSWERS)
    given["visual_features"] = given["visual_features"].float()
    assert backbone.visual_position_bias == "relative"
    expected = model(**given, labels=labels).logits
    backbone.save_pretrained(tmp_path / "backbone")
    adapter = Adapter.of(model, task="nlvr2", metrics={})
    assert any(name.startswith("visual_projection.") for name in adapter.tensors)
    adapter.save(tmp_path / "adapter")
    again = Backbone.from_pretrained(tmp_path / "backbone")
    assert again.fingerprint == backbone.fingerprint
    loaded = Adapter.load(tmp_path / "adapter").build(again).eval()
    assert torch.equal(loaded(**given, labels=labels).logits, expected)


def test_visual_tokens_take_positions(backbone: Backbone) -> None:
    model = PromptedModel(backbone, DePT(D_MODEL, prompt_length=5, rank=0, max_source_length=99)).eval()
    with pytest.raises(
        ValueError, match=r"64 positions.*needs 65: 5 prompt \+ 41 text \+ 16 visual \+ 3 answer"
    ):
        backbone.language_model.check_length(5, 41, TOKENS, 3)
    text = random_text(backbone, (44,))
    with pytest.raises(ValueError, match=r"64 positions.*needs 65: 5 prompt \+ 44 text \+ 16 visual"):
        model.encode(**text, visual_features=random_features(backbone, 1))


def test_what_acts_on_an_encoder_is_refused(backbone: Backbone) -> None:
    prompt = build_prompt(PromptOptions(method="memory", max_source_length=S), backbone, 0)
    with pytest.raises(ValueError, match=r"method memory.*has no encoder"):
        PromptedModel(backbone, prompt)
