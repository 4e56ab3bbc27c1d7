"""The encoder against stock models, against references written out here, and against itself."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from backbone_parts import LENGTHS, MODES, PROMPT, encode, parts, stock
from conftest import D_MODEL, LANGUAGES, VOCABULARY, random_features, random_text
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    UMT5Config,
    UMT5ForConditionalGeneration,
)
from zoo.models import language_model

from dept_vl.models.backbone import Backbone
from dept_vl.models.padding import pack
from dept_vl.models.projection import VisualProjection
from dept_vl.models.prompted import PromptedModel
from dept_vl.prompts.dept import DePT

# -- against the stock encoder


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("language", LANGUAGES)
def test_text_alone_is_the_stock_encoder(
    make_backbone: Callable[..., Backbone], language_folders: dict[str, Path], language: str, mode: str
) -> None:
    backbone = make_backbone(language, None, visual_position_bias=mode)
    text = random_text(backbone, LENGTHS)
    hidden, mask = encode(
        backbone, backbone.embed(text["input_ids"]), text["attention_mask"].bool(), prompt_length=0
    )
    with torch.no_grad():
        expected = stock(language_folders[language]).get_encoder()(**text).last_hidden_state
    assert torch.equal(mask, text["attention_mask"].bool())
    torch.testing.assert_close(hidden[mask], expected[mask])


@pytest.mark.parametrize("language", LANGUAGES)
def test_relative_is_the_stock_encoder_on_concatenated_embeddings(
    make_backbone: Callable[..., Backbone], language_folders: dict[str, Path], language: str
) -> None:
    backbone = make_backbone(language, visual_position_bias="relative")
    embeddings, mask, visual = parts(backbone)
    hidden, full_mask = encode(backbone, embeddings, mask, visual)
    reference = stock(language_folders[language]).get_encoder()
    for row in range(len(LENGTHS)):
        alone = torch.cat([embeddings[row][mask[row]], visual[row]])
        with torch.no_grad():
            expected = reference(inputs_embeds=alone[None]).last_hidden_state[0]
        torch.testing.assert_close(hidden[row][full_mask[row]], expected)


# -- `none` against encoders written out from their papers, one sequence at a time


def heads(states: Tensor) -> Tensor:
    return states.unflatten(-1, (4, -1)).transpose(0, 1)


def t5_bucket(distance: int, buckets: int, longest: int) -> int:
    """Bucket of `key - query`: half for either direction, half of that exact, the rest logarithmic."""
    side = buckets // 2
    exact = side // 2
    size = abs(distance)
    if size >= exact:
        size = exact + int(math.log(size / exact) / math.log(longest / exact) * (side - exact))
    return min(size, side - 1) + (side if distance > 0 else 0)


def t5_encoder(model: PreTrainedModel, states: Tensor, positioned: int) -> Tensor:
    """T5's encoder, with a bias among the first `positioned` tokens alone and zero elsewhere."""
    weights = model.get_encoder().state_dict()
    table = weights["block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    bias = torch.zeros(4, len(states), len(states))
    for query in range(positioned):
        for key in range(positioned):
            bias[:, query, key] = table[t5_bucket(key - query, 8, 20)]

    def norm(states: Tensor, name: str) -> Tensor:
        return states / (states.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights[name]

    for block in range(2):
        name = f"block.{block}.layer.0"
        inputs = norm(states, f"{name}.layer_norm.weight")
        q, k, v = (heads(inputs @ weights[f"{name}.SelfAttention.{part}.weight"].T) for part in "qkv")
        mixed = ((q @ k.transpose(1, 2) + bias).softmax(-1) @ v).transpose(0, 1).flatten(1)
        states = states + mixed @ weights[f"{name}.SelfAttention.o.weight"].T
        name = f"block.{block}.layer.1"
        inner = norm(states, f"{name}.layer_norm.weight") @ weights[f"{name}.DenseReluDense.wi.weight"].T
        states = states + inner.relu() @ weights[f"{name}.DenseReluDense.wo.weight"].T
    return norm(states, "final_layer_norm.weight")


def bart_encoder(model: PreTrainedModel, states: Tensor, first: int, positioned: int) -> Tensor:
    """BART's encoder: positions on tokens `first` to `first + positioned`, no norm on what follows."""
    weights = model.get_encoder().state_dict()

    def norm(states: Tensor, name: str) -> Tensor:
        return functional.layer_norm(
            states, (D_MODEL,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5
        )

    def linear(states: Tensor, name: str) -> Tensor:
        return states @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    states = states.clone()
    for position in range(positioned):
        states[first + position] += weights["embed_positions.weight"][2 + position]
    read = first + positioned
    states = torch.cat([norm(states[:read], "layernorm_embedding"), states[read:]])
    for layer in range(2):
        name = f"layers.{layer}"
        q, k, v = (heads(linear(states, f"{name}.self_attn.{part}_proj")) for part in "qkv")
        mixed = ((q @ k.transpose(1, 2) / math.sqrt(8)).softmax(-1) @ v).transpose(0, 1).flatten(1)
        states = norm(states + linear(mixed, f"{name}.self_attn.out_proj"), f"{name}.self_attn_layer_norm")
        inner = functional.gelu(linear(states, f"{name}.fc1"))
        states = norm(states + linear(inner, f"{name}.fc2"), f"{name}.final_layer_norm")
    return states


@pytest.mark.parametrize("images", [1, 2])
def test_t5_gives_visual_tokens_no_position(
    t5: Backbone, language_folders: dict[str, Path], images: int
) -> None:
    model = stock(language_folders["t5"])
    embeddings, mask, visual = parts(t5, images)
    hidden, full_mask = encode(t5, embeddings, mask, visual)
    words = model.get_input_embeddings().weight
    text = random_text(t5, LENGTHS)["input_ids"]
    for row, length in enumerate(LENGTHS):
        states = torch.cat([embeddings[row, :PROMPT], words[text[row, :length]], visual[row]])
        expected = t5_encoder(model, states, PROMPT + length).detach()
        torch.testing.assert_close(hidden[row][full_mask[row]], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("images", [1, 2])
def test_bart_gives_prompt_and_visual_tokens_no_position(
    bart: Backbone, language_folders: dict[str, Path], images: int
) -> None:
    model = stock(language_folders["bart"])
    embeddings, mask, visual = parts(bart, images)
    hidden, full_mask = encode(bart, embeddings, mask, visual)
    words = model.get_input_embeddings().weight * math.sqrt(D_MODEL)
    text = random_text(bart, LENGTHS)["input_ids"]
    for row, length in enumerate(LENGTHS):
        states = torch.cat([embeddings[row, :PROMPT], words[text[row, :length]], visual[row]])
        expected = bart_encoder(model, states, PROMPT, length).detach()
        torch.testing.assert_close(hidden[row][full_mask[row]], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("language", LANGUAGES)
def test_modes_differ_once_there_is_an_image(make_backbone: Callable[..., Backbone], language: str) -> None:
    none, relative = (make_backbone(language, visual_position_bias=mode) for mode in MODES)
    relative.visual_projection.load_state_dict(none.visual_projection.state_dict())
    embeddings, mask, visual = parts(none)
    ours, ours_mask = encode(none, embeddings, mask, visual)
    theirs, theirs_mask = encode(relative, embeddings, mask, visual)
    assert not torch.allclose(ours[ours_mask], theirs[theirs_mask], atol=1e-2)


def shuffled_alike(backbone: Backbone) -> bool:
    """Whether visual tokens in another order give the same states in that order."""
    embeddings, mask, _ = parts(backbone)
    visual = torch.randn(len(LENGTHS), 6, D_MODEL)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    hidden, _ = encode(backbone, embeddings, mask, visual)
    moved, _ = encode(backbone, embeddings, mask, visual[:, order])
    return torch.allclose(hidden[:, -6:][:, order], moved[:, -6:], atol=1e-5)


@pytest.mark.parametrize("language", LANGUAGES)
def test_order_of_visual_tokens_is_told_in_relative_alone(
    make_backbone: Callable[..., Backbone], language: str
) -> None:
    assert shuffled_alike(make_backbone(language))
    assert not shuffled_alike(make_backbone(language, visual_position_bias="relative"))


def test_every_block_with_a_bias_of_its_own_is_kept_to_text(t5: Backbone) -> None:
    # UMT5 has a table in each block, not in the first alone.
    umt5 = UMT5ForConditionalGeneration(
        UMT5Config(
            vocab_size=VOCABULARY,
            d_model=D_MODEL,
            d_kv=8,
            d_ff=48,
            num_heads=4,
            num_layers=2,
            num_decoder_layers=1,
        )
    ).eval()
    for name, parameter in umt5.named_parameters():
        if "relative_attention_bias" in name:
            nn.init.normal_(parameter, std=2.0)
    assert shuffled_alike(Backbone(t5.vision, umt5, t5.tokenizer, name="umt5").eval())


# -- T5's relatives, as they come from the disk

RELATIVES = ("mt5", "longt5-local", "longt5-global")


@pytest.fixture(scope="module")
def relatives(tmp_path_factory: pytest.TempPathFactory, language_folders: dict[str, Path]) -> dict[str, Path]:
    """Folders of an mT5 and two LongT5, whose blocks are shorter than the texts of the tests."""
    root = tmp_path_factory.mktemp("relatives")
    torch.manual_seed(0)
    models = {name: language_model(name) for name in RELATIVES}
    for name, model in models.items():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.25)
        model.save_pretrained(root / name)
        AutoTokenizer.from_pretrained(language_folders["t5"]).save_pretrained(root / name)
    return {name: root / name for name in models}


def prompted_relative(folder: Path, tower: Path | None, mode: str) -> PromptedModel:
    backbone = Backbone.from_pretrained(language=folder, vision=tower, visual_position_bias=mode)  # type: ignore[arg-type]
    prompt = DePT(D_MODEL, prompt_length=PROMPT, rank=2, max_source_length=20)
    for parameter in prompt.parameters():
        nn.init.normal_(parameter)
    return PromptedModel(backbone, prompt).eval()


@pytest.mark.parametrize("with_image", [False, True])
@pytest.mark.parametrize("name", RELATIVES)
def test_a_relative_is_prompted_like_its_parts_by_hand(
    relatives: dict[str, Path], vision_folders: dict[str, Path], name: str, with_image: bool
) -> None:
    model = prompted_relative(relatives[name], vision_folders["clip"] if with_image else None, "relative")
    backbone, prompt, reference = model.backbone, model.prompt, stock(relatives[name])
    lengths = (19, 4, 9)
    text, labels = random_text(backbone, lengths), torch.randint(5, VOCABULARY, (3, 4))
    features = random_features(backbone, 3) if with_image else None
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 2}
    with torch.no_grad():
        logits = model(**text, labels=labels, visual_features=features).logits
        tokens = model.generate(**text, visual_features=features, **options)
        for row, length in enumerate(lengths):
            words = reference.get_input_embeddings()(text["input_ids"][row, :length])
            alone = [prompt.soft_prompt, words + prompt.scale * prompt.offset_a[:length] @ prompt.offset_b]
            if features is not None:
                alone.append(backbone.project(visual_features=features[row : row + 1])[0])
            inputs = {"inputs_embeds": torch.cat(alone)[None]}
            torch.testing.assert_close(
                logits[row],
                reference(**inputs, labels=labels[row : row + 1]).logits[0],
                rtol=1e-4,
                atol=1e-4,
            )
            assert torch.equal(tokens[row], reference.generate(**inputs, **options)[0])


@pytest.mark.parametrize("name", RELATIVES)
def test_a_relative_passes_gradients_on_to_the_prompt_alone(relatives: dict[str, Path], name: str) -> None:
    model = prompted_relative(relatives[name], None, "none")
    text = random_text(model.backbone, (19, 4, 9))
    model(**text, labels=torch.randint(5, VOCABULARY, (3, 4))).loss.backward()
    moved = {part for part, parameter in model.named_parameters() if parameter.grad is not None}
    assert moved == {"prompt.soft_prompt", "prompt.offset_a", "prompt.offset_b"}


def test_mt5_keeps_its_positions_to_the_text(relatives: dict[str, Path], t5: Backbone) -> None:
    mt5 = stock(relatives["mt5"])
    assert shuffled_alike(Backbone(t5.vision, mt5, t5.tokenizer, name="mt5").eval())


def test_longt5_cannot_keep_its_positions_to_the_text(
    relatives: dict[str, Path], vision_folders: dict[str, Path]
) -> None:
    for name in ("longt5-local", "longt5-global"):
        with pytest.raises(ValueError, match=r"reads in blocks .* --visual_position_bias relative"):
            Backbone.from_pretrained(language=relatives[name], vision=vision_folders["clip"])


# -- padding


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("with_image", [True, False])
@pytest.mark.parametrize("language", LANGUAGES)
def test_padding_changes_no_real_token(
    make_backbone: Callable[..., Backbone], language: str, with_image: bool, mode: str
) -> None:
    backbone = make_backbone(language, visual_position_bias=mode)
    embeddings, mask, visual = parts(backbone)
    hidden, full_mask = encode(backbone, embeddings, mask, *([visual] if with_image else []))
    for row, length in enumerate(LENGTHS):
        one = slice(row, row + 1)
        width = PROMPT + length
        alone, alone_mask = encode(
            backbone, embeddings[one, :width], mask[one, :width], *([visual[one]] if with_image else [])
        )
        assert alone_mask.all()
        torch.testing.assert_close(hidden[row][full_mask[row]], alone[0], rtol=1e-5, atol=1e-5)


def test_pack_moves_padding_to_the_end_and_keeps_order() -> None:
    values = torch.arange(8.0).reshape(2, 4, 1)
    mask = torch.tensor([[True, False, True, True], [False, False, True, False]])
    packed, packed_mask = pack(values, mask)
    assert packed[0, :, 0].tolist() == [0, 2, 3, 1]
    assert packed[1, 0, 0] == 6
    assert packed_mask.tolist() == [[True, True, True, False], [True, False, False, False]]


# -- limits and refusals


@pytest.mark.parametrize("mode", MODES)
def test_bart_refuses_more_tokens_than_positions(make_backbone: Callable[..., Backbone], mode: str) -> None:
    bart = make_backbone("bart", visual_position_bias=mode)
    visual = torch.randn(1, 16, D_MODEL)

    def source(text: int) -> tuple[Tensor, Tensor, Tensor]:
        return torch.randn(1, PROMPT + text, D_MODEL), torch.ones(1, PROMPT + text, dtype=torch.bool), visual

    hidden, _ = encode(bart, *source(64 - 16 - PROMPT))
    assert hidden.shape[1] == 64
    with pytest.raises(ValueError, match=r"64 positions.*needs 65: 3 prompt \+ 46 text \+ 16 visual"):
        encode(bart, *source(64 - 16 - PROMPT + 1))


def test_t5_has_no_limit(t5: Backbone) -> None:
    hidden, _ = encode(t5, torch.randn(1, 700, D_MODEL), torch.ones(1, 700, dtype=torch.bool))
    assert hidden.shape[1] == 700


@pytest.mark.parametrize("sources", [{}, {"backbone": "here", "language": "there"}])
def test_source_must_be_one(sources: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="give either a backbone folder"):
        Backbone.from_pretrained(**sources)


def test_missing_backbone_is_reported(tmp_path: Path, language_folders: dict[str, Path]) -> None:
    with pytest.raises(FileNotFoundError, match="nothing-here"):
        Backbone.from_pretrained(tmp_path / "nothing-here")
    # A folder with a model, but not with a backbone, is no backbone either.
    with pytest.raises(FileNotFoundError, match=r"backbone\.json"):
        Backbone.from_pretrained(language_folders["t5"])


@pytest.mark.parametrize("part", ["vision", "language"])
def test_a_backbone_that_lacks_a_part_is_named(t5: Backbone, tmp_path: Path, part: str) -> None:
    t5.save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / part)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}.*{part}"):
        Backbone.from_pretrained(tmp_path)


def test_missing_language_is_reported_by_transformers(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nothing-here"):
        Backbone.from_pretrained(language=tmp_path / "nothing-here")


def test_unknown_visual_position_bias_is_refused(t5: Backbone) -> None:
    # The annotation forbids it; a file or a flag may still bring it.
    unchecked = getattr(Backbone.__init__, "__wrapped__", Backbone.__init__)
    with pytest.raises(ValueError, match=r"none.*relative.*absolute"):
        unchecked(
            nn.Module.__new__(Backbone),
            t5.vision,
            t5.language,
            t5.tokenizer,
            name="x",
            visual_position_bias="absolute",
        )


def test_images_without_tower_are_refused(make_backbone: Callable[..., Backbone]) -> None:
    with pytest.raises(ValueError, match="no vision tower"):
        make_backbone("t5", None).project(pixel_values=torch.randn(1, 1, 3, 32, 32))


def test_nothing_to_project(t5: Backbone, make_backbone: Callable[..., Backbone]) -> None:
    assert t5.project() is None
    assert make_backbone("t5", None).project() is None


# -- visual tokens


def test_projection_is_norm_of_linear_plus_order(backbone: Backbone) -> None:
    projection = backbone.visual_projection
    nn.init.normal_(projection.linear.bias)
    nn.init.normal_(projection.norm.weight)
    features = random_features(backbone, 2, 2)
    projected = features @ projection.linear.weight.T + projection.linear.bias
    if "T5" in type(backbone.language).__name__:
        assert not hasattr(projection.norm, "bias")
        normed = projected / (projected.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        expected = normed * projection.norm.weight
    else:
        nn.init.normal_(projection.norm.bias)
        centred = projected - projected.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        expected = normed * projection.norm.weight + projection.norm.bias
    expected = expected + projection.image_order.weight[None, :, None] + projection.object_order.weight
    torch.testing.assert_close(
        backbone.project(visual_features=features), torch.cat([expected[:, 0], expected[:, 1]], dim=1)
    )


def test_order_of_two_images_matters(backbone: Backbone) -> None:
    embeddings, mask, _ = parts(backbone)
    features = random_features(backbone, len(LENGTHS), 2)

    def text_states() -> list[Tensor]:
        return [
            encode(backbone, embeddings, mask, backbone.project(visual_features=f))[0][
                :, : embeddings.shape[1]
            ]
            for f in (features, features.flip(1))
        ]

    first, second = text_states()
    assert not torch.allclose(first[mask], second[mask], atol=1e-3)
    # It is the order embedding that tells them apart.
    nn.init.zeros_(backbone.visual_projection.image_order.weight)
    first, second = text_states()
    torch.testing.assert_close(first[mask], second[mask], rtol=1e-5, atol=1e-5)


def test_new_projection_tells_no_order_yet() -> None:
    projection = VisualProjection(6, 4, nn.LayerNorm(4))
    assert projection.image_order.weight.abs().sum() == 0
    assert projection(torch.randn(2, 2, 5, 6)).shape == (2, 10, 4)


def test_third_image_is_refused(t5: Backbone) -> None:
    with pytest.raises(ValueError, match=r"3 images.*2 rows"):
        t5.project(visual_features=random_features(t5, 1, 3))


def test_pixels_of_two_images_are_read_in_order(t5: Backbone) -> None:
    pixels = torch.randn(2, 2, 3, 32, 32)
    features = torch.stack([t5.vision(pixels[:, 0]), t5.vision(pixels[:, 1])], dim=1)
    torch.testing.assert_close(t5.project(pixel_values=pixels), t5.project(visual_features=features))
