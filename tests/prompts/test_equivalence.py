"""The whole model against the published formula, written out on a stock transformers model.

`Literal` is the method as its authors compute it: every batch padded to exactly s tokens, A @ B added
whole, padding included, P in front, and the stock encoder and `generate` on the result. It shares no
code with the package. Comparisons are in float64, where only rounding of the 15th digit may differ.
"""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import D_MODEL, VOCABULARY, random_labels, random_text
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from dept_vl.adapters.adapter import Adapter
from dept_vl.models.backbone import Backbone
from dept_vl.models.prompted import IGNORE_INDEX, PromptedModel
from dept_vl.prompts.dept import DePT

M, R, S, ALPHA = 4, 3, 12, 8.0
CASES = [("t5", "none"), ("t5", "relative"), ("bart", "none"), ("bart", "relative")]
LAYOUTS = ["padded to s", "padded to the batch", "padded on the left"]
DECODING = [{"num_beams": 1}, {"num_beams": 3, "length_penalty": 0.5}]
RELEASED = Path(__file__).parents[1] / "fixtures" / "official_adapters"

Text = dict[str, Tensor]


class Literal:
    """The published formula on a stock language model.

    Args:
        language: As transformers loads it.
        parts: P (m, d), A (s, r) and B (r, d).
        text_positions: Count BART's positions from the text on, as our default does; the published
            method is for T5 and says nothing of them.
    """

    def __init__(
        self, language: PreTrainedModel, parts: tuple[Tensor, Tensor, Tensor], *, text_positions: bool = False
    ) -> None:
        self.language, self.parts, self.text_positions = language.eval(), parts, text_positions

    def inputs(self, text: Text) -> Text:
        prompt, a, b = self.parts
        (m, d), (s, r), batch = prompt.shape, a.shape, len(text["input_ids"])
        input_ids = torch.full((batch, s), self.language.config.pad_token_id)
        mask = torch.zeros(batch, m + s, dtype=torch.long)
        mask[:, :m] = 1
        for row in range(batch):
            tokens = text["input_ids"][row][text["attention_mask"][row] == 1]
            input_ids[row, : len(tokens)] = tokens
            mask[row, m : m + len(tokens)] = 1
        embedded = self.language.get_input_embeddings()(input_ids)
        embedded = embedded + ALPHA / math.sqrt(r) * (a @ b)
        embedded = torch.cat([prompt.expand(batch, m, d), embedded], dim=1)
        if self.text_positions:
            table = self.language.get_encoder().embed_positions.weight[2:]  # BART reads from its third row on
            embedded = embedded - table[: m + s] + torch.cat([torch.zeros(m, d), table[:s]])
        return {"inputs_embeds": embedded, "attention_mask": mask}

    def forward(self, text: Text, labels: Tensor) -> tuple[Tensor, Tensor]:
        output = self.language(**self.inputs(text), labels=labels)
        return output.loss, output.logits

    def states(self, text: Text) -> Tensor:
        states: Tensor = self.language.get_encoder()(**self.inputs(text)).last_hidden_state
        return states

    def generate(self, text: Text, **options: float) -> Tensor:
        tokens: Tensor = self.language.generate(**self.inputs(text), **options)
        return tokens


def make_pair(
    backbone: Backbone, language_folder: Path, dtype: torch.dtype = torch.float64
) -> tuple[PromptedModel, Literal]:
    """Our model and the literal one, with the same trained parts on the same weights."""
    parts = (torch.randn(M, D_MODEL), torch.randn(S, R), torch.randn(R, D_MODEL))
    prompt = DePT(D_MODEL, prompt_length=M, rank=R, max_source_length=S)
    prompt.load_state_dict(dict(zip(("soft_prompt", "offset_a", "offset_b"), parts, strict=True)))
    ours = PromptedModel(backbone, prompt).eval().to(dtype)
    p, a, b = (part.to(dtype).requires_grad_() for part in parts)
    stock = AutoModelForSeq2SeqLM.from_pretrained(language_folder).to(dtype)
    shifted = language_folder.name == "bart" and backbone.visual_position_bias == "none"
    return ours, Literal(stock, (p, a, b), text_positions=shifted)


@pytest.fixture(params=CASES, ids="-".join)
def pair(
    request: pytest.FixtureRequest,
    make_backbone: Callable[..., Backbone],
    language_folders: dict[str, Path],
) -> tuple[PromptedModel, Literal]:
    language, bias = request.param
    return make_pair(make_backbone(language, None, visual_position_bias=bias), language_folders[language])


def laid_out(backbone: Backbone, layout: str) -> Text:
    """The same three texts in each layout."""
    text = random_text(backbone, side="left" if layout == "padded on the left" else "right")
    if layout != "padded to s":
        return text
    missing = S - text["input_ids"].shape[1]
    pad = torch.nn.functional.pad
    return {
        "input_ids": pad(text["input_ids"], (0, missing), value=backbone.tokenizer.pad_token_id),
        "attention_mask": pad(text["attention_mask"], (0, missing)),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_forward_is_the_formula(pair: tuple[PromptedModel, Literal], layout: str) -> None:
    ours, literal = pair
    text, labels = laid_out(ours.backbone, layout), random_labels((3, 3, 3))
    loss, logits = literal.forward(text, labels)
    output = ours(**text, labels=labels)
    torch.testing.assert_close(output.logits, logits, atol=1e-9, rtol=0)
    # Ours is computed in float32; with targets of one length it is the stock mean over tokens.
    torch.testing.assert_close(output.loss.double(), loss, atol=1e-6, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_encoder_is_the_formula_at_every_position_but_padding(
    pair: tuple[PromptedModel, Literal], layout: str
) -> None:
    ours, literal = pair
    text = laid_out(ours.backbone, layout)
    expected = literal.states(text)
    encoded, mask = ours.encode(**text)
    for row, length in enumerate(text["attention_mask"].sum(1)):
        used = M + int(length)
        assert mask[row].tolist() == [True] * used + [False] * (mask.shape[1] - used)
        torch.testing.assert_close(
            encoded.last_hidden_state[row, :used], expected[row, :used], atol=1e-9, rtol=0
        )


@torch.no_grad()
def test_batch_is_as_long_as_its_texts(pair: tuple[PromptedModel, Literal]) -> None:
    ours, literal = pair
    text = laid_out(ours.backbone, "padded to the batch")
    encoded, _ = ours.encode(**text)
    assert encoded.last_hidden_state.shape[1] == M + 7
    assert literal.states(text).shape[1] == M + S


@pytest.mark.parametrize("options", DECODING, ids=["greedy", "beams"])
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_generate_is_the_formula(
    pair: tuple[PromptedModel, Literal], layout: str, options: dict[str, float]
) -> None:
    ours, literal = pair
    text = laid_out(ours.backbone, layout)
    tokens = literal.generate(text, max_new_tokens=8, **options)
    assert torch.equal(ours.generate(**text, max_new_tokens=8, **options), tokens)
    assert len({tuple(row) for row in tokens.tolist()}) == 3  # the texts are told apart


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_is_the_formulas(pair: tuple[PromptedModel, Literal], layout: str) -> None:
    ours, literal = pair
    text, labels = laid_out(ours.backbone, layout), random_labels((3, 3, 3))
    ours(**text, labels=labels).loss.backward()
    literal.forward(text, labels)[0].backward()
    assert ours.prompt is not None
    trained = dict(ours.prompt.named_parameters())
    for name, part in zip(("soft_prompt", "offset_a", "offset_b"), literal.parts, strict=True):
        assert part.grad is not None
        assert part.grad.abs().max() > 1e-3
        torch.testing.assert_close(trained[name].grad, part.grad, atol=1e-6, rtol=0)


@torch.no_grad()
def test_loss_is_the_mean_over_examples_of_the_stock_loss(pair: tuple[PromptedModel, Literal]) -> None:
    # The stock loss of a batch weighs every token alike; ours weighs every example alike.
    ours, literal = pair
    text, labels = laid_out(ours.backbone, "padded to the batch"), random_labels((4, 2, 3))
    alone = []
    for row in range(3):
        one = {name: tensor[row : row + 1] for name, tensor in text.items()}
        alone.append(literal.forward(one, labels[row : row + 1])[0])
    loss = ours(**text, labels=labels).loss.double()
    torch.testing.assert_close(loss, torch.stack(alone).mean(), atol=1e-6, rtol=0)
    over_tokens, _ = literal.forward(text, labels)
    assert (labels == IGNORE_INDEX).any()
    assert abs(loss - over_tokens) > 1e-3


@pytest.mark.parametrize("part", [0, 1, 2], ids=["P", "A", "B"])
@torch.no_grad()
def test_every_part_counts(pair: tuple[PromptedModel, Literal], part: int) -> None:
    ours, literal = pair
    text, labels = laid_out(ours.backbone, "padded to s"), random_labels((3, 3, 3))
    literal.parts[part].copy_(literal.parts[part].roll(1, dims=1))
    _, logits = literal.forward(text, labels)
    assert (ours(**text, labels=labels).logits - logits).abs().max() > 1e-3


@pytest.mark.parametrize(("language", "bias"), [("t5", "none"), ("bart", "relative")])
@torch.no_grad()
def test_single_precision_is_the_formula_on_the_same_padding(
    make_backbone: Callable[..., Backbone], language_folders: dict[str, Path], language: str, bias: str
) -> None:
    backbone = make_backbone(language, None, visual_position_bias=bias)
    ours, literal = make_pair(backbone, language_folders[language], torch.float32)
    text, labels = laid_out(backbone, "padded to s"), random_labels((3, 3, 3))
    loss, logits = literal.forward(text, labels)
    output = ours(**text, labels=labels)
    torch.testing.assert_close(output.logits, logits, atol=1e-6, rtol=0)
    torch.testing.assert_close(output.loss, loss, atol=1e-6, rtol=0)
    tokens = literal.generate(text, max_new_tokens=8)
    assert torch.equal(ours.generate(**text, max_new_tokens=8), tokens)


@pytest.mark.parametrize("task", ["cola", "sst2"])
@pytest.mark.filterwarnings("ignore:the authors' files do not say")
@torch.no_grad()
def test_released_adapter_runs_as_its_authors_run_it(
    make_backbone: Callable[..., Backbone], task: str
) -> None:
    language = T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=768,
            d_kv=16,
            d_ff=32,
            num_heads=2,
            num_layers=2,
            decoder_start_token_id=0,
        )
    ).double()
    for parameter in language.parameters():
        if parameter.dim() == 2:
            parameter.normal_(std=0.2)
    backbone = Backbone(None, language, make_backbone("t5", None).tokenizer, name="google-t5/t5-base")
    ours = Adapter.from_authors(RELEASED / task, task=task).build(backbone).eval().double()
    raw = torch.load(RELEASED / task / "adapter_model.bin", weights_only=True, map_location="cpu")
    names = [
        "prompt_embeddings",
        "prompt_encoder.lora_embedding_A",
        "prompt_encoder.lora_embedding_B",
    ]
    p, a, b = (raw[name].double() for name in names)
    literal = Literal(language, (p, a, b))
    text, labels = random_text(backbone, (40, 12, 25)), random_labels((2, 2, 2))
    loss, logits = literal.forward(text, labels)
    output = ours(**text, labels=labels)
    torch.testing.assert_close(output.logits, logits, atol=1e-9, rtol=0)
    torch.testing.assert_close(output.loss.double(), loss, atol=1e-6, rtol=0)
    tokens = literal.generate(text, max_new_tokens=6)
    assert torch.equal(ours.generate(**text, max_new_tokens=6), tokens)
