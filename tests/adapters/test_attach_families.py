"""A prompt attached to any pretrained model gives what it gives behind `--model`, in training and answers."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    Trainer,
    TrainingArguments,
)
from zoo.vlm_subjects import joined
from zoo.vlms import FAMILIES, TEXT_ONLY

from dept_vl._utils.errors import UsageError
from dept_vl.adapters.attach import Attached, attach, new_prompt
from dept_vl.adapters.families import Parts
from dept_vl.models.pretrained_vlm import VisionLanguageModel
from dept_vl.models.prompted import PromptedModel
from dept_vl.prompts.base import METHODS
from dept_vl.prompts.dept import DePT
from dept_vl.prompts.methods import build

Folder = Callable[[str], Path]
QUESTIONS = ("what colour is the star ?", "how many ?")
ANSWER = 4
OPTIONS: dict[str, Any] = {"max_new_tokens": ANSWER, "min_new_tokens": ANSWER, "do_sample": False}


def trained(width: int, rank: int = 2) -> DePT:
    torch.manual_seed(1)
    prompt = DePT(width, prompt_length=3, rank=rank, max_source_length=40)
    for parameter in prompt.parameters():
        nn.init.normal_(parameter)
    return prompt


ALWAYS = ("florence2", "qwen2_5_vl", "gemma3")
"""In the default suite: an encoder-decoder, M-RoPE, and an image that is read both ways."""


@pytest.fixture(
    params=[name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def backbone(request: pytest.FixtureRequest, pretrained_folder: Folder) -> VisionLanguageModel:
    backbone = VisionLanguageModel.from_pretrained(pretrained_folder(request.param)).eval()
    # Of fences that no configuration names, `attach` knows nothing.
    backbone.processor.image_tokens = torch.tensor(Parts.of(backbone.language).image_tokens)
    return backbone


def read(backbone: VisionLanguageModel, *rows: int) -> dict[str, Tensor]:
    images = [[Image.new("RGB", (40 - 8 * row, 32), (200, 60 * row, 40))] for row in rows]
    return backbone.processor([QUESTIONS[row] for row in rows], images, [40] * len(rows))


def test_training_and_answers_are_those_of_the_pipeline(backbone: VisionLanguageModel) -> None:
    prompt = trained(backbone.d_model)
    whole, reader, start = PromptedModel(backbone, prompt).eval(), backbone.language_model, backbone.start
    labels = torch.tensor([[40, 50, 60, 41]])
    options, expected = OPTIONS | reader.special_tokens, []
    for row in (0, 1):
        inputs = read(backbone, row)
        ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
        expected.append(
            (
                whole(ids, mask, labels, processed=inputs).logits.detach(),
                whole.generate(ids, mask, processed=inputs, **options)[:, -ANSWER:],
            )
        )
    attached = attach(backbone.language, prompt)
    assert attached._parts.start in (None, start) or start is None
    for row, (logits, answer) in enumerate(expected):
        inputs = read(backbone, row)
        asked = attached.generate(**inputs, **options)
        assert torch.equal(asked[:, -ANSWER:], answer)
        if reader.encoder_decoder:
            found = attached(**inputs, labels=labels).logits
        else:
            assert torch.equal(asked[:, :-ANSWER], inputs["input_ids"])
            width = inputs["input_ids"].shape[1]
            together = joined(inputs, labels, reader.answer_type)
            spared = torch.cat([torch.full((1, width), -100), labels], 1)
            found = attached(**together, labels=spared).logits
            assert found.shape[1] == width + ANSWER
            found = found[:, width - 1 : -1]
        torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)
    both = read(backbone, 0, 1)
    if not reader.encoder_decoder:
        backbone.tokenizer.padding_side = "left"
        both = read(backbone, 0, 1)
    asked = attached.generate(**both, **options)[:, -ANSWER:]
    if backbone.language.config.model_type != "florence2":  # whose positions count padding on the left
        assert torch.equal(asked, torch.cat([answer for _, answer in expected]))


@pytest.mark.parametrize("name", TEXT_ONLY)
def test_models_of_text_take_a_prompt(pretrained_folder: Folder, name: str) -> None:
    opened = AutoModelForSeq2SeqLM if name in ("t5_text", "bart_text") else AutoModelForCausalLM
    model = opened.from_pretrained(pretrained_folder(name)).eval()
    inputs = AutoTokenizer.from_pretrained(pretrained_folder(name))([QUESTIONS[0]], return_tensors="pt")
    inputs.pop("token_type_ids", None)
    before = model.generate(**inputs, **OPTIONS)
    attached = attach(model, new_prompt(model, prompt_length=3, rank=2, max_source_length=20))
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    loss = attached(**inputs, labels=labels).loss
    loss.backward()
    assert {n for n, p in attached.prompt.named_parameters() if p.grad is None} == set()
    nn.init.normal_(attached.prompt.soft_prompt)  # type: ignore[arg-type]
    assert attached.generate(inputs["input_ids"], **OPTIONS).shape == before.shape
    if opened is AutoModelForCausalLM:
        with pytest.raises(ValueError, match="-100"):
            attached(**inputs, labels=inputs["input_ids"])
        total = inputs["input_ids"].shape[1] + 2
        limits: dict[str, Any] = {"min_length": total, "max_length": total}
        for limited in (limits, {"generation_config": GenerationConfig(**limits)}):
            assert attached.generate(**inputs, do_sample=False, **limited).shape[1] == total
    attached.detach()
    assert torch.equal(model.generate(**inputs, **OPTIONS), before)


def test_an_adapter_of_a_decoder_only_model_is_loaded(pretrained_folder: Folder, tmp_path: Path) -> None:
    backbone = VisionLanguageModel.from_pretrained(pretrained_folder("qwen2_5_vl")).eval()
    inputs = read(backbone, 0)
    with attach(backbone.language, trained(backbone.d_model)) as attached:
        attached.save(tmp_path)
        with torch.no_grad():
            expected = attached(**inputs).logits
    with Attached.load(tmp_path, backbone.language) as again, torch.no_grad():
        assert torch.equal(again(**inputs).logits, expected)


def test_an_answer_with_the_token_of_an_image_is_no_image(pretrained_folder: Folder) -> None:
    backbone = VisionLanguageModel.from_pretrained(pretrained_folder("qwen2_5_vl")).eval()
    inputs, fence = read(backbone, 0), backbone.language.config.vision_start_token_id
    answers = torch.tensor([[40, 50, 60]]), torch.tensor([[40, 50, fence]])
    width, found = inputs["input_ids"].shape[1], []
    attached = attach(backbone.language, trained(backbone.d_model))
    for answer in answers:
        labels = torch.cat([torch.full((1, width), -100), answer], 1)
        with torch.no_grad():
            logits = attached(**joined(inputs, answer, 0), labels=labels).logits
        found.append(logits[:, width - 1 : -1])  # in front of the last token
    torch.testing.assert_close(found[1], found[0])


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=64, **sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return LlamaForCausalLM(config).eval()


IDS = torch.arange(3, 21).view(2, 9)
MASKED = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS).index_fill(1, torch.tensor([0]), 0)}


def test_a_compiled_decoder_reads_the_prompt_once(llama: LlamaForCausalLM) -> None:
    with attach(llama, trained(16)) as attached, torch.no_grad():
        expected = attached(**MASKED).logits
        assert expected.shape == (2, 9, 64)
        for module in (attached, llama):
            torch.testing.assert_close(torch.compile(module, backend="eager")(**MASKED).logits, expected)
        llama.compile(backend="eager")  # in place
        torch.testing.assert_close(llama(**MASKED).logits, expected)


def test_logits_of_generated_tokens_are_whole(llama: LlamaForCausalLM) -> None:
    """A vocabulary is not taken for columns of a source."""
    asked = {"output_logits": True, "output_scores": True, "return_dict_in_generate": True}
    with attach(llama, trained(16)) as attached:
        made = attached.generate(**MASKED, **asked, max_new_tokens=2, do_sample=False)
    assert [tuple(step.shape) for step in (*made.logits, *made.scores)] == [(2, 64)] * 4
    assert [step.argmax(1).tolist() for step in made.logits] == made.sequences[:, 9:].T.tolist()


@pytest.mark.parametrize("beams", [1, 2])
def test_a_constraint_reads_no_placeholders(llama: LlamaForCausalLM, beams: int) -> None:
    def allowed(row: int, tokens: Tensor) -> list[int]:
        assert tokens[:9].tolist() == IDS[row].tolist()
        return [30 + len(tokens)]

    options = {"prefix_allowed_tokens_fn": allowed, "max_new_tokens": 2, "num_beams": beams}
    with attach(llama, trained(16)) as attached:
        made = attached.generate(**MASKED, **options, do_sample=False)
    assert made[:, 9:].tolist() == [[39, 40]] * 2


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 3}])
def test_functions_of_the_caller_read_no_placeholders(
    llama: LlamaForCausalLM, options: dict[str, Any]
) -> None:
    def checked(tokens: Tensor) -> int:
        assert tokens[:, :9].tolist() == IDS.repeat_interleave(len(tokens) // 2, 0).tolist()
        return tokens.shape[1]

    def only(tokens: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, 30 + checked(tokens)] = 0
        return forced

    def ended(tokens: Tensor, scores: Any) -> Tensor:
        return torch.full((len(tokens),), checked(tokens) == 11)

    functions = {"logits_processor": LogitsProcessorList([only]), "stopping_criteria": [ended]}
    shown: list[list[Any]] = []
    if "num_beams" not in options:
        functions["streamer"] = SimpleNamespace(put=lambda part: shown.append(part.tolist()), end=list)
    with attach(llama, trained(16)) as attached:
        made = attached.generate(**MASKED, **functions, max_new_tokens=5, **options)
    assert made[:, 9:].tolist() == [[39, 40]] * len(made)
    expected = IDS.repeat_interleave(len(made) // 2, 0).tolist()
    assert not shown or shown == [expected, [39] * len(made), [40] * len(made)]


def test_penalties_count_no_placeholders(llama: LlamaForCausalLM) -> None:
    asked: dict[str, Any] = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    asked |= {"max_new_tokens": 1, "repetition_penalty": 2.0, "do_sample": False}

    def penalised() -> list[list[int]]:
        made = llama.generate(**MASKED, **asked)
        return (made.scores[0] != made.logits[0]).nonzero().tolist()

    expected = penalised()
    assert expected == [[row, token] for row, ids in enumerate(IDS[:, 1:].tolist()) for token in ids]
    with attach(llama, trained(16)):
        assert penalised() == expected


def test_a_source_in_pieces_and_columns_by_index_are_refused(llama: LlamaForCausalLM) -> None:
    with attach(llama, trained(16)) as attached:
        with pytest.raises(UsageError, match="prefill_chunk_size"):
            attached.generate(**MASKED, prefill_chunk_size=4, max_new_tokens=2)
        with pytest.raises(ValueError, match="logits_to_keep"):
            attached(**MASKED, logits_to_keep=torch.tensor([8]))
        whole = attached(**MASKED).logits
        for count in (1, 3):
            torch.testing.assert_close(attached(**MASKED, logits_to_keep=count).logits, whole[:, -count:])


def test_trainer_shifts_the_labels_that_it_smooths(llama: LlamaForCausalLM, tmp_path: Path) -> None:
    def loss(smoothing: float) -> float:
        options = {"label_smoothing_factor": smoothing, "report_to": "none", "use_cpu": True}
        trainer = Trainer(attached, TrainingArguments(str(tmp_path), **options), train_dataset=[{}])
        labels = IDS.index_fill(1, torch.arange(4), -100)
        return float(trainer.compute_loss(attached, MASKED | {"labels": labels}))

    with attach(llama, trained(16, rank=0)) as attached, torch.no_grad():
        assert loss(1e-6) == pytest.approx(loss(0.0), rel=1e-4)


@pytest.mark.parametrize("method", ["pt", "dept", "adept"])
def test_training_with_an_offset_needs_labels(llama: LlamaForCausalLM, method: str) -> None:
    rank = 0 if method == "pt" else 2
    prompt = build(METHODS[method](d_model=16, prompt_length=3, max_source_length=40, rank=rank))
    with attach(llama.train(), prompt) as attached:
        attached(**MASKED, labels=IDS.index_fill(1, torch.arange(4), -100))
        with torch.no_grad():
            attached(**MASKED)
        refused = partial(pytest.raises, UsageError, match="label_smoothing_factor")
        with nullcontext() if method == "pt" else refused():
            attached(**MASKED)
        llama.eval()  # as from_pretrained returns it
        logits = attached(**MASKED).logits
        with nullcontext() if method == "pt" else refused():
            logits.sum().backward()


def test_padding_is_found_without_a_mask(llama: LlamaForCausalLM) -> None:
    padded = IDS.index_fill(1, torch.tensor([0]), llama.config.pad_token_id)
    with attach(llama, trained(16)) as attached:
        assert torch.equal(
            attached.generate(padded, **OPTIONS),
            attached.generate(padded, attention_mask=MASKED["attention_mask"], **OPTIONS),
        )


@pytest.mark.parametrize("interrupted", ["attached", "model"])
@pytest.mark.parametrize("then", ["attached", "model"])
def test_a_call_that_was_interrupted_leaves_nothing(
    llama: LlamaForCausalLM, interrupted: str, then: str
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with attach(llama, trained(16)) as attached, torch.no_grad():
        called = {"attached": attached, "model": llama}
        expected = attached(**MASKED).logits, attached.generate(**MASKED, **OPTIONS)
        for again in (
            lambda: torch.equal(called[then](**MASKED).logits, expected[0]),
            lambda: torch.equal(called[then].generate(**MASKED, **OPTIONS), expected[1]),
        ):
            handle = llama.model.layers[1].register_forward_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                called[interrupted](**MASKED)
            handle.remove()
            assert again()


def test_word_embeddings_that_were_exchanged_since_are_named(llama: LlamaForCausalLM) -> None:
    with attach(llama, trained(16)) as attached:
        llama.resize_token_embeddings(70)  # keeps the module
        assert attached(**MASKED).logits.shape == (2, 9, 70)
        llama.set_input_embeddings(nn.Embedding(70, 16))
        for call in (attached, attached.generate):
            with pytest.raises(UsageError, match="set_input_embeddings"):
                call(**MASKED)
    assert llama(**MASKED).logits.shape == (2, 9, 70)
