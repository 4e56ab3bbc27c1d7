"""A prompt on ready-made models: against their parts called by hand, and taken off without trace."""

import copy
import json
import math
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import D_MODEL, VOCABULARY
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    Blip2Processor,
    BlipImageProcessor,
    PreTrainedModel,
    T5EncoderModel,
    T5Gemma2ForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutput
from zoo.ready_made import (
    FAMILIES,
    FENCES,
    IMAGE,
    IMAGE_TOKENS,
    PIXELS,
    TEXTS,
    inputs_of,
    ready_made,
)

from dept_vl._utils.errors import UsageError
from dept_vl.adapters.adapter import Adapter
from dept_vl.adapters.attach import Attached, attach, new_prompt
from dept_vl.adapters.families import SUPPORTED
from dept_vl.api import build_prompt
from dept_vl.config import OptimOptions
from dept_vl.models.backbone import Backbone
from dept_vl.models.padding import insert
from dept_vl.models.prompted import PromptedModel
from dept_vl.prompts.dept import DePT
from dept_vl.training.optim import build_optimizer

RELATIVE = ("blip2", "instructblip", "t5gemma2")
"""Their encoders do not mind where padding is; BART's counts it as positions."""
SIZES = {"prompt_length": 3, "rank": 2, "max_source_length": 7}


@pytest.fixture(scope="session")
def _built() -> dict[str, PreTrainedModel]:
    torch.manual_seed(0)
    return {family: ready_made(family) for family in FAMILIES}


@pytest.fixture
def make(_built: dict[str, PreTrainedModel]) -> Callable[[str], PreTrainedModel]:
    """Makes a fresh model that a test may change as it likes."""
    return lambda family: copy.deepcopy(_built[family])


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def model(family: str, make: Callable[[str], PreTrainedModel]) -> PreTrainedModel:
    return make(family)


def trained_prompt(**sizes: int) -> DePT:
    """A prompt far from where training starts."""
    prompt = DePT(D_MODEL, **{**SIZES, **sizes})
    for parameter in prompt.parameters():
        nn.init.normal_(parameter)
    return prompt


def labels_of(batch: int = len(TEXTS), *, seed: int = 0) -> Tensor:
    return torch.randint(5, 140, (batch, 4), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**inputs, labels=labels_of(len(inputs["input_ids"]))).logits
    return out


# -- the same by hand, of a model that nothing is attached to


def answerer(model: PreTrainedModel) -> PreTrainedModel:
    """The part that answers from what the encoder gave."""
    return model.language_model if hasattr(model, "language_model") else model


def read_by_hand(
    model: PreTrainedModel, prompt: DePT, inputs: dict[str, Tensor], row: int
) -> BaseModelOutput:
    """`[P ; E + offset]` of one row, a token after the other, through the stock encoder."""
    ids = inputs["input_ids"][row][inputs["attention_mask"][row] == 1]
    looked_at = {"pixel_values": inputs["pixel_values"][row : row + 1]}
    if "qformer_input_ids" in inputs:
        looked_at["qformer_input_ids"] = inputs["qformer_input_ids"][row : row + 1]
    with torch.no_grad():
        features = iter(model.get_image_features(**looked_at, return_dict=True).pooler_output[0])
        states, position = [], 0
        for token in ids.tolist():
            state = model.get_input_embeddings()(torch.tensor([[token]]))[0, 0]
            if token == IMAGE:
                state = next(features)
            elif token not in FENCES:
                if prompt.offset_a is not None and prompt.offset_b is not None:
                    state = state + prompt.scale * (prompt.offset_a[position] @ prompt.offset_b)
                position += 1
            states.append(state)
        first = [] if prompt.soft_prompt is None else list(prompt.soft_prompt)
        read: BaseModelOutput = model.get_encoder()(inputs_embeds=torch.stack(first + states)[None])
    return read


def logits_by_hand(model: PreTrainedModel, read: BaseModelOutput, labels: Tensor) -> Tensor:
    start = 2 if isinstance(model, T5Gemma2ForConditionalGeneration) else answer_start(model)
    before = torch.cat([torch.full((1, 1), start), labels[:, :-1]], dim=1)
    with torch.no_grad():
        out: Tensor = answerer(model)(encoder_outputs=read, decoder_input_ids=before).logits
    return out


def answer_start(model: PreTrainedModel) -> int:
    start: int = model.config.text_config.decoder_start_token_id
    return start


@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_are_those_of_the_parts_by_hand(
    make: Callable[[str], PreTrainedModel], family: str, side: str
) -> None:
    if side == "left" and family not in RELATIVE:
        pytest.skip("this encoder itself counts padding on the left as positions")
    prompt, inputs, stock = trained_prompt(), inputs_of(family, side=side), make(family)
    out = logits(attach(make(family), prompt), inputs)
    for row in range(len(TEXTS)):
        expected = logits_by_hand(stock, read_by_hand(stock, prompt, inputs, row), labels_of()[row : row + 1])
        torch.testing.assert_close(out[row : row + 1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"]
)
def test_generate_is_that_of_the_parts_by_hand(
    make: Callable[[str], PreTrainedModel], family: str, options: dict[str, Any]
) -> None:
    options = {**options, "max_new_tokens": 5, "min_new_tokens": 5}
    prompt, inputs, stock, model = trained_prompt(), inputs_of(family), make(family), make(family)
    before = model.generate(**inputs, **options)
    with attach(model, prompt):
        tokens = model.generate(**inputs, **options)
    assert not torch.equal(tokens, before)
    for row, found in enumerate(tokens.chunk(len(TEXTS))):
        read = read_by_hand(stock, prompt, inputs, row)
        mask = torch.ones(read.last_hidden_state.shape[:2], dtype=torch.long)
        expected = answerer(stock).generate(encoder_outputs=read, attention_mask=mask, **options)
        assert torch.equal(found, expected)


def test_samples_are_those_of_the_parts_by_hand(make: Callable[[str], PreTrainedModel], family: str) -> None:
    options = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 5, "top_k": 0}
    prompt, stock = trained_prompt(), make(family)
    inputs = inputs_of(family, texts=TEXTS[:1])
    attached = attach(make(family), prompt)
    torch.manual_seed(3)
    tokens = attached.generate(**inputs, **options)
    read = read_by_hand(stock, prompt, inputs, 0)
    mask = torch.ones(read.last_hidden_state.shape[:2], dtype=torch.long)
    torch.manual_seed(3)
    assert torch.equal(tokens, answerer(stock).generate(encoder_outputs=read, attention_mask=mask, **options))


def test_the_mask_may_be_left_out(model: PreTrainedModel, family: str) -> None:
    inputs = inputs_of(family, texts=TEXTS[:1])
    attached = attach(model, trained_prompt())
    expected, tokens = logits(attached, inputs), attached.generate(**inputs, max_new_tokens=4)
    del inputs["attention_mask"]
    torch.testing.assert_close(logits(attached, inputs), expected)
    assert torch.equal(attached.generate(**inputs, max_new_tokens=4), tokens)


def test_what_the_encoder_gives_is_m_longer_and_may_be_given_back(
    make: Callable[[str], PreTrainedModel], family: str
) -> None:
    inputs = inputs_of(family)
    attached = attach(make(family), trained_prompt())
    out = attached(**inputs, labels=labels_of())
    states = getattr(out, "language_model_outputs", out).encoder_last_hidden_state
    assert states.shape == (len(TEXTS), inputs["input_ids"].shape[1] + SIZES["prompt_length"], D_MODEL)
    if family in ("florence2", "t5gemma2"):
        again = attached(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=inputs["attention_mask"],
            labels=labels_of(),
        )
        torch.testing.assert_close(again.logits, out.logits)


def test_given_positions_make_room_for_the_prompt(make: Callable[[str], PreTrainedModel]) -> None:
    attached = attach(make("t5gemma2"), trained_prompt())
    for side in ("right", "left"):
        inputs = inputs_of("t5gemma2", side=side)
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        torch.testing.assert_close(
            logits(attached, {**inputs, "position_ids": positions}), logits(attached, inputs)
        )


# -- the offset, and where it goes


def encoder_of(attached: Attached) -> nn.Module:
    encoder = attached.model.get_encoder()
    text_model: nn.Module = getattr(encoder, "text_model", encoder)
    return text_model


def test_offsets_touch_text_alone(make: Callable[[str], PreTrainedModel], family: str) -> None:
    inputs, read = inputs_of(family), []
    for prompt in (trained_prompt(prompt_length=0, rank=0), trained_prompt(prompt_length=0)):
        attached = attach(make(family), prompt)
        # Comes after the prompt's own hook.
        encoder_of(attached).register_forward_pre_hook(
            lambda module, given, named: read.append(named["inputs_embeds"]), with_kwargs=True
        )
        logits(attached, inputs)
    bare, shifted = read
    words = (inputs["input_ids"] < IMAGE) & (inputs["attention_mask"] == 1)
    assert torch.equal(bare[~words], shifted[~words])
    assert ((bare - shifted)[words].abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_prompt_of_nothing_is_the_model_itself(
    make: Callable[[str], PreTrainedModel], family: str, side: str
) -> None:
    # Frozen, as `attach` does it: convolutions have another kernel for weights that ask for gradients.
    inputs, stock = inputs_of(family, side=side), make(family).requires_grad_(False)
    expected = logits(stock, inputs)
    for sizes in ({"prompt_length": 0}, {"prompt_length": 0, "rank": 0}):  # B starts at zero
        prompt = new_prompt(stock, **{**SIZES, **sizes})
        with attach(make(family), prompt) as attached:
            assert torch.equal(logits(attached, inputs), expected)


def test_a_new_prompt_starts_from_words(model: PreTrainedModel) -> None:
    prompt = new_prompt(model, **SIZES)
    assert prompt.soft_prompt is not None
    words = model.get_input_embeddings()(torch.arange(VOCABULARY))
    found = (prompt.soft_prompt[:, None] == words).all(-1)
    assert found.any(1).all()
    special = [0, 1, IMAGE]
    assert not found[:, special].any()
    other = new_prompt(model, **SIZES, seed=1)
    assert not torch.equal(other.soft_prompt, prompt.soft_prompt)  # type: ignore[arg-type]
    assert build_prompt("dept", model, **SIZES, alpha=16.0).alpha == 16.0
    for option in ({"visual_offset": True}, {"init_text": "red"}, {"init": "random"}):
        with pytest.raises(UsageError):
            build_prompt("dept", model, **SIZES, **option)


def test_inserting_keeps_the_padding_in_front() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]])
    row = torch.arange(12).view(3, 4)
    front = torch.tensor([[-1, -2]]).expand(3, -1)
    assert insert(front, row, mask).tolist() == [
        [0, 1, -1, -2, 2, 3],
        [-1, -2, 4, 5, 6, 7],
        [8, 9, 10, 11, -1, -2],
    ]
    assert torch.equal(insert(front[:, :0], row, mask), row)


# -- without trace


def hooks_of(model: nn.Module) -> list[tuple[str, int]]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    kinds += tuple(f"{kind}_with_kwargs" for kind in kinds[:2])
    return [
        (f"{name}.{kind}", len(getattr(module, kind)))
        for name, module in model.named_modules()
        for kind in kinds
        if len(getattr(module, kind))
    ]


def test_detach_leaves_no_trace(model: PreTrainedModel, family: str) -> None:
    inputs = inputs_of(family)
    model.get_input_embeddings().weight.requires_grad_(False)  # a choice of its owner
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    hooks, flags = hooks_of(model), [p.requires_grad for p in model.parameters()]
    state = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    before, tokens = logits(model, inputs), model.generate(**inputs, max_new_tokens=4)

    attached = attach(model, trained_prompt())
    assert len(hooks_of(model)) > len(hooks)
    assert not torch.equal(logits(model, inputs), before)
    model.generate(**inputs, max_new_tokens=4)
    attached.detach()

    assert hooks_of(model) == hooks
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert [p.requires_grad for p in model.parameters()] == flags
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(
        after[name].data_ptr() == place and torch.equal(after[name], value)
        for name, (place, value) in state.items()
    )
    assert torch.equal(logits(model, inputs), before)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4), tokens)


def test_detached_at_the_end_of_a_with_whatever_happens(model: PreTrainedModel) -> None:
    hooks = hooks_of(model)
    with pytest.raises(KeyboardInterrupt), attach(model, trained_prompt()):
        raise KeyboardInterrupt
    assert hooks_of(model) == hooks
    assert all(p.requires_grad for p in model.parameters())


def test_disabled_is_the_model_itself(model: PreTrainedModel, family: str) -> None:
    inputs = inputs_of(family)
    model.requires_grad_(False)  # see above
    before, tokens = logits(model, inputs), model.generate(**inputs, max_new_tokens=4)
    attached = attach(model, trained_prompt())
    prompted = logits(attached, inputs)
    with attached.disabled():
        assert torch.equal(logits(model, inputs), before)
        assert torch.equal(model.generate(**inputs, max_new_tokens=4), tokens)
    with pytest.raises(KeyboardInterrupt), attached.disabled():
        raise KeyboardInterrupt
    assert torch.equal(logits(model, inputs), prompted)


# -- training


def test_training_moves_the_prompt_alone(model: PreTrainedModel, family: str) -> None:
    inputs, labels = inputs_of(family), labels_of()
    frozen = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    attached = attach(model, new_prompt(model, **SIZES))
    optimizer = build_optimizer(attached.parameter_groups(), OptimOptions(prompt_lr=0.1, offset_lr=0.01))
    assert [group["name"] for group in optimizer.param_groups] == ["prompt", "low_rank"]
    started = {name: parameter.detach().clone() for name, parameter in attached.prompt.named_parameters()}
    losses = []
    for _ in range(6):
        loss = attached(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        with_gradient = {name for name, p in attached.named_parameters() if p.grad is not None}
        optimizer.step()
        losses.append(loss.item())
    assert with_gradient == {"prompt.soft_prompt", "prompt.offset_a", "prompt.offset_b"}
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters())
    assert not any(torch.equal(p, started[name]) for name, p in attached.prompt.named_parameters())


def test_gradient_checkpointing_gives_the_same_gradients(
    make: Callable[[str], PreTrainedModel], family: str
) -> None:
    inputs, gradients = inputs_of(family), []
    for checkpointing in (False, True):
        model = make(family).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(5)
        attached = attach(model, trained_prompt())
        torch.manual_seed(5)  # BART's dropout is no module
        attached(**inputs, labels=labels_of(), use_cache=False).loss.backward()
        gradients.append([p.grad for p in attached.prompt.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_half_precision(model: PreTrainedModel, family: str) -> None:
    inputs = inputs_of(family)
    attached = attach(model.to(torch.bfloat16), trained_prompt())
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    out = attached(**inputs, labels=labels_of())
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in attached.prompt.parameters())
    assert attached.generate(**inputs, max_new_tokens=3).shape[0] == len(TEXTS)


def test_model_and_prompt_are_moved_together(model: PreTrainedModel, family: str) -> None:
    inputs = inputs_of(family)
    attached = attach(model, trained_prompt())
    expected = logits(attached, inputs)
    attached.double()
    assert all(p.dtype == torch.float64 for p in attached.parameters())
    inputs["pixel_values"] = inputs["pixel_values"].double()
    torch.testing.assert_close(logits(attached, inputs).float(), expected, rtol=1e-3, atol=1e-3)


def readme_example(*words: str) -> str:
    """The one block of Python in the README that has these words."""
    readme = (Path(__file__).parents[2] / "dept_vl" / "adapters" / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    (block,) = [block for block in blocks if all(word in block for word in words)]
    return block


def test_the_readme_trains_and_answers(
    make: Callable[[str], PreTrainedModel],
    language_folders: dict[str, Path],
    images: list[Image.Image],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size = {"height": PIXELS["blip2"], "width": PIXELS["blip2"]}
    processor = Blip2Processor(
        BlipImageProcessor(size=size),
        AutoTokenizer.from_pretrained(language_folders["t5"]),
        num_query_tokens=IMAGE_TOKENS["blip2"],
    )
    model = make("blip2")
    model.config.image_token_index = processor.tokenizer.convert_tokens_to_ids("<image>")
    model.resize_token_embeddings(len(processor.tokenizer))
    monkeypatch.chdir(tmp_path)
    for part in (model, processor):
        part.save_pretrained("blip2")
    questions, answers = ["how many ?", "what colour is the circle ?"], ["two", "green"]
    found = {"batches": [(images[:2], questions, answers)] * 2, "image": images[0], "question": "how many ?"}
    for block in (readme_example("Blip2Processor", "build_optimizer"), readme_example("Attached.load")):
        exec(block.replace("Salesforce/blip2-flan-t5-xl", "blip2"), found)
    assert Adapter.load("runs/blip2").trainable_parameters["total"] == 60 * D_MODEL + (64 + D_MODEL) * 30
    assert isinstance(found["answer"], str)


def test_wrappers_find_the_prompt(make: Callable[[str], PreTrainedModel], tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1
    )
    try:
        attached = attach(make("blip2"), trained_prompt())
        wrapped = nn.parallel.DistributedDataParallel(attached)
        wrapped(**inputs_of("blip2"), labels=labels_of()).loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    assert all(p.grad is not None for p in attached.prompt.parameters())


@pytest.mark.slow
def test_compiled(make: Callable[[str], PreTrainedModel]) -> None:
    inputs = inputs_of("blip2")
    attached = attach(make("blip2"), trained_prompt())
    expected = logits(attached, inputs)
    compiled = torch.compile(attached, backend="eager")
    torch.testing.assert_close(logits(compiled, inputs), expected)
    with attached.disabled():
        assert not torch.allclose(logits(compiled, inputs), expected)


# -- the files


def test_saved_and_loaded_it_says_the_same(
    make: Callable[[str], PreTrainedModel], family: str, tmp_path: Path
) -> None:
    inputs = inputs_of(family)
    attached = attach(make(family), trained_prompt())
    with pytest.raises(UsageError, match="accuracy is nan"):
        attached.save(tmp_path, metrics={"accuracy": math.nan})
    assert not list(tmp_path.iterdir())
    attached.save(tmp_path, task="vqa", metrics={"accuracy": 61.5})
    again = Attached.load(tmp_path, make(family))
    mine, theirs = dict(attached.prompt.named_parameters()), dict(again.prompt.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) and theirs[name].requires_grad for name in mine)
    assert torch.equal(logits(attached, inputs), logits(again, inputs))
    options = {"num_beams": 2, "max_new_tokens": 5}
    assert torch.equal(attached.generate(**inputs, **options), again.generate(**inputs, **options))
    description = json.loads((tmp_path / "adapter.json").read_text())
    assert (description["task"], description["metrics"]) == ("vqa", {"accuracy": 61.5})
    m, r, s = SIZES.values()
    low_rank = (s + D_MODEL) * r
    assert description["trainable_parameters"] == {
        "prompt": m * D_MODEL,
        "low_rank": low_rank,
        "total": m * D_MODEL + low_rank,
        "without_projection": m * D_MODEL + low_rank,
    }


def test_another_base_is_refused(make: Callable[[str], PreTrainedModel], tmp_path: Path) -> None:
    attached = attach(make("blip2"), trained_prompt())
    attached.save(tmp_path)
    mine = Adapter.load(tmp_path).backbone["fingerprint"]["embeddings"]
    other = make("blip2")
    nn.init.normal_(other.get_input_embeddings().weight)
    hooks = hooks_of(other)
    with pytest.raises(ValueError, match=mine) as error:
        Attached.load(tmp_path, other)
    theirs = re.findall(r"'embeddings': '(\w+)'", str(error.value))
    assert len(set(theirs)) == 2
    assert hooks_of(other) == hooks
    with pytest.raises(ValueError, match=r"Blip2ForConditional.*Instruct"):
        Attached.load(tmp_path, make("instructblip"))


def test_other_weights_elsewhere_are_warned_of(
    make: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    attach(make("blip2"), trained_prompt()).save(tmp_path)
    other = make("blip2")
    nn.init.normal_(other.language_projection.weight)
    with pytest.warns(UserWarning, match="same word embeddings, but other weights"):
        Attached.load(tmp_path, other)


def test_adapters_of_the_two_kinds_are_told_apart(
    make: Callable[[str], PreTrainedModel], t5: Backbone, tmp_path: Path
) -> None:
    attach(make("blip2"), trained_prompt()).save(tmp_path / "attached")
    with pytest.raises(ValueError, match="does not fit"):
        Adapter.load(tmp_path / "attached").build(t5)
    Adapter.of(PromptedModel(t5, trained_prompt()), task="vqav2", metrics={}).save(tmp_path / "own")
    with pytest.raises(ValueError, match="does not fit"):
        Attached.load(tmp_path / "own", make("blip2"))


# -- bad input


def test_an_unsupported_model_is_refused_with_those_that_are(t5: Backbone) -> None:
    with pytest.raises(ValueError, match="cannot be attached to a T5EncoderModel") as error:
        attach(T5EncoderModel(t5.language.config), trained_prompt())
    assert all(name in str(error.value) for name in SUPPORTED)


def test_a_configuration_without_placeholder_is_refused(make: Callable[[str], PreTrainedModel]) -> None:
    model = make("blip2")
    model.config.image_token_index = None
    with pytest.raises(ValueError, match="no image_token_id"):
        attach(model, trained_prompt())


def test_a_prompt_of_another_width_is_refused(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=f"16 wide and .* is {D_MODEL} wide"):
        attach(model, DePT(16, **SIZES))
    assert hooks_of(model) == []


def test_a_prompt_longer_than_the_positions_is_refused(make: Callable[[str], PreTrainedModel]) -> None:
    model = make("florence2")
    with pytest.raises(ValueError, match=r"24 positions .* 24 prompt"):
        attach(model, trained_prompt(prompt_length=24))
    attached = attach(model, trained_prompt(prompt_length=16))
    assert logits(attached, inputs_of("florence2", texts=((0, 6),))).shape[0] == 1
    with pytest.raises(
        ValueError, match=r"24 positions and the input needs 25: 16 prompt \+ 9 image and text"
    ):
        logits(attached, inputs_of("florence2", texts=((0, 7),)))


def test_a_text_longer_than_the_prompt_was_built_for_is_refused(model: PreTrainedModel, family: str) -> None:
    attached = attach(model, trained_prompt())
    logits(attached, inputs_of(family, texts=((3, 4),)))
    with pytest.raises(ValueError, match=r"8 tokens .* max_source_length=7"):
        logits(attached, inputs_of(family, texts=((3, 5),)))
    # Nothing of the failed call is left.
    logits(attached, inputs_of(family))


def test_embeddings_of_unknown_tokens_are_refused(make: Callable[[str], PreTrainedModel]) -> None:
    attached = attach(make("t5gemma2"), trained_prompt())
    inputs = inputs_of("t5gemma2")
    embedded = torch.randn(*inputs.pop("input_ids").shape, D_MODEL)
    del inputs["pixel_values"]
    with pytest.raises(ValueError, match="input_ids"):
        attached(**inputs, inputs_embeds=embedded, labels=labels_of())


def test_a_mask_of_another_shape_is_refused(model: PreTrainedModel, family: str) -> None:
    inputs = inputs_of(family)
    inputs["attention_mask"] = inputs["attention_mask"][:, :-1]
    with pytest.raises(ValueError, match="attention_mask of the shape of its tokens"):
        logits(attach(model, trained_prompt()), inputs)


def test_a_second_prompt_is_refused(model: PreTrainedModel, family: str) -> None:
    first = attach(model, trained_prompt())
    with pytest.raises(ValueError, match="detach that one first"):
        attach(model, trained_prompt())
    first.detach()
    second, inputs = attach(model, trained_prompt()), inputs_of(family)
    expected, tokens = logits(second, inputs), model.generate(**inputs, max_new_tokens=4)
    first.detach()  # again, as at the end of a `with`
    assert torch.equal(logits(model, inputs), expected)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4), tokens)


def test_threads_may_share_an_attached_model(model: PreTrainedModel, family: str) -> None:
    attached = attach(model, trained_prompt())
    several = [inputs_of(family, seed=seed) for seed in range(3)]
    expected = [logits(attached, inputs) for inputs in several]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda inputs: logits(attached, inputs), several * 20))
    for logits_found, logits_expected in zip(found, expected * 20, strict=True):
        torch.testing.assert_close(logits_found, logits_expected)
