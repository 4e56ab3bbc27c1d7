"""Pretrained vision-language models: how they are asked, what the probe notices, and what is refused."""

import json
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForSeq2SeqLM
from transformers.image_utils import SizeDict
from zoo.vlm_parts import bart, model_of, words
from zoo.vlms import DECODER_ONLY, TEXT_ONLY

from dept_vl._utils.errors import UsageError
from dept_vl._utils.printable import Note
from dept_vl.config import BackboneOptions
from dept_vl.data.collate import Collator, Draw
from dept_vl.models import pretrained_vlm, reader
from dept_vl.models.pretrained_vlm import VisionLanguageModel, open_backbone
from dept_vl.models.prompted import PromptedModel
from dept_vl.models.tokens import target_ids, target_texts
from dept_vl.prompts.dept import DePT
from dept_vl.tasks.base import Example

Folder = Callable[[str], Path]


@pytest.fixture
def copied(pretrained_folder: Folder, tmp_path: Path) -> Callable[..., Path]:
    """A folder of a family with fields of its config.json changed."""

    def copy(family: str, **changed: Any) -> Path:
        folder = tmp_path / family
        shutil.copytree(pretrained_folder(family), folder)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))
        return folder

    return copy


@pytest.mark.parametrize(
    ("family", "asked"),
    [
        ("blip2", "Question: is it red? Answer:"),
        ("florence2", "<VQA>is it red?"),
        ("paligemma", "<image>answer en is it red?"),
    ],
)
def test_a_family_without_chat_template_is_asked_as_by_its_authors(
    pretrained_folder: Folder, family: str, asked: str
) -> None:
    backbone = VisionLanguageModel.from_pretrained(pretrained_folder(family))
    assert backbone.processor.written("is it red?", 1) == asked


def test_a_form_of_your_own_is_read_in_place_of_the_usual_one(pretrained_folder: Folder) -> None:
    backbone = VisionLanguageModel.from_pretrained(pretrained_folder("blip2"), text_form="ask {text} now")
    assert backbone.processor.written("is it red?", 1) == "ask is it red? now"
    backbone.probe()


@pytest.mark.parametrize("family", ["llava", "paligemma", "qwen2_5_vl"])
def test_a_form_with_a_place_for_the_image_keeps_it_without_a_question(
    pretrained_folder: Folder, family: str
) -> None:
    backbone = VisionLanguageModel.from_pretrained(pretrained_folder(family), text_form="{image}Q: {text}")
    ids = backbone.processor([""], [[Image.new("RGB", (64, 64))]], [64])["input_ids"]
    assert torch.isin(ids, backbone.processor.image_tokens).any()


def test_threads_may_share_a_model_with_different_prompts(pretrained_folder: Folder) -> None:
    backbone = VisionLanguageModel.from_pretrained(pretrained_folder("llava")).eval()
    source = backbone.processor(["is it red?"], [[Image.new("RGB", (64, 64))]], [64])
    ids, mask = source.pop("input_ids"), source.pop("attention_mask")
    prompts = [DePT(backbone.d_model, prompt_length=3, max_source_length=64).eval() for _ in range(2)]
    models = [PromptedModel(backbone, prompt).eval() for prompt in prompts] * 25

    @torch.no_grad()
    def logits(model: PromptedModel) -> torch.Tensor:
        found: torch.Tensor = model(ids, mask, torch.tensor([[5, 6]]), processed=source).logits
        return found

    expected = [logits(model) for model in models]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(logits, models))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("form", ["no place", "chat"])
def test_a_form_without_text_or_template_is_refused(pretrained_folder: Folder, form: str) -> None:
    with pytest.raises(UsageError, match="text_form"):
        VisionLanguageModel.from_pretrained(pretrained_folder("blip2"), text_form=form)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_question_with_an_image_token_is_an_error(pretrained_folder: Folder, family: str) -> None:
    backbone = open_backbone(model=pretrained_folder(family))
    token = backbone.tokenizer.decode(backbone.processor.image_tokens[-1:])
    blank = [Image.new("RGB", (64, 64))]
    with pytest.raises(ValueError, match=re.escape(f"what does {token} mean?")):
        backbone.processor(["is it red?", f"what does {token} mean?"], [blank, blank], [64, 64])


def test_a_long_question_is_cut_and_no_token_of_its_image(pretrained_folder: Folder) -> None:
    backbone = VisionLanguageModel.from_pretrained(pretrained_folder("qwen2_5_vl"))
    image = Image.new("RGB", (64, 64))
    long, short = (
        backbone.processor([text], [[image]], [backbone.frame + 6])
        for text in ("what colour is the star " * 9, "is it")
    )
    texts, images = (
        [int(count) for count in counts]
        for counts in zip(
            *(
                (
                    backbone.processor.is_text(one["input_ids"], one["attention_mask"].bool()).sum(),
                    torch.isin(one["input_ids"], backbone.processor.image_tokens).sum(),
                )
                for one in (long, short)
            ),
            strict=True,
        )
    )
    assert texts[0] == backbone.frame + 6 > texts[1]
    assert images[0] == images[1] > 0


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "t5gemma2"])
def test_answers_come_back_from_their_tokens(pretrained_folder: Folder, family: str) -> None:
    tokenizer = VisionLanguageModel.from_pretrained(pretrained_folder(family)).tokenizer
    answers = ["red", "two triangles", "no"]
    ids = target_ids(tokenizer, answers)
    assert [target_texts(tokenizer, torch.tensor([one]))[0] for one in ids] == answers
    chat = tokenizer.convert_tokens_to_ids("<|im_end|>") if family == "qwen2_5_vl" else tokenizer.eos_token_id
    assert {one[-1] for one in ids} == {chat}


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_images_are_bounded_by_what_they_become(
    pretrained_folder: Folder, family: str, tmp_path: Path
) -> None:
    backbone = VisionLanguageModel.from_pretrained(pretrained_folder(family)).eval()
    collate = Collator.for_model(PromptedModel(backbone, None), 6, max_source_length=40 + backbone.frame)
    Image.new("RGB", (1, 300)).save(tmp_path / "line.png")
    Image.new("RGB", (20, 30)).save(tmp_path / "image.png")
    draws = [Draw(Example(n, "is it red?", (tmp_path / n,), ()), "no") for n in ("line.png", "image.png")]
    with pytest.raises(ValueError, match="200 times the shorter"):
        collate(draws)
    assert replace(collate, on_bad_image="skip")(draws).skipped == ("line.png",)
    images = backbone.processor.processor.image_processor
    images.size = SizeDict(shortest_edge=600)
    with pytest.raises(ValueError, match="after resizing"):
        backbone.processor.check_image(Image.new("RGB", (200, 1)))
    images.size = SizeDict(shortest_edge=56 * 56, longest_edge=28 * 28 * 1280)  # numbers of pixels
    backbone.processor.check_image(Image.new("RGB", (200, 1)))


def test_a_text_is_cut_for_the_qformer_alone(pretrained_folder: Folder, tmp_path: Path) -> None:
    backbone = VisionLanguageModel.from_pretrained(pretrained_folder("instructblip")).eval()
    positions = backbone.language.config.qformer_config.max_position_embeddings
    model = PromptedModel(backbone, None).eval()
    collate = Collator.for_model(model, 6, max_source_length=300)
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    long = " ".join(["red"] * 100)
    with pytest.warns(Note, match=f"first {positions} tokens"):
        batch = collate([Draw(Example(0, long, (tmp_path / "a.png",), ()), "no")])
    assert batch.processed is not None
    assert batch.processed["qformer_input_ids"].shape == (1, positions)
    assert batch.processed["qformer_attention_mask"].shape == (1, positions)
    assert batch.input_ids.shape[1] > 100 > positions
    assert model(**batch.training_inputs()).loss.isfinite()


@pytest.mark.parametrize("family", ["blip2", "llava"])
def test_the_loss_is_of_the_answer_alone(pretrained_folder: Folder, family: str, tmp_path: Path) -> None:
    """The model's own loss with labels on the answer, of a row without prompt."""
    backbone = VisionLanguageModel.from_pretrained(pretrained_folder(family)).eval()
    model = PromptedModel(backbone, None).eval()
    collate = Collator.for_model(model, 6, max_source_length=40 + backbone.frame)
    Image.new("RGB", (32, 32), (10, 200, 30)).save(tmp_path / "green.png")
    batch = collate([Draw(Example(0, "vqa: is it red?", (tmp_path / "green.png",), ()), "no")])
    assert batch.labels is not None
    assert batch.processed is not None
    labels, ids = batch.labels, batch.input_ids
    if family == "llava":
        labels = torch.cat([torch.full_like(ids, -100), labels], dim=1)
        ids = torch.cat([ids, batch.labels], dim=1)
    expected = backbone.language(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=batch.processed["pixel_values"],
        labels=labels,
    ).loss
    torch.testing.assert_close(model(**batch.training_inputs()).loss, expected, rtol=1e-4, atol=1e-5)


def test_the_probe_notices_a_prompt_that_is_not_read(
    pretrained_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = VisionLanguageModel.from_pretrained(pretrained_folder("llava"))
    backbone.probe()
    monkeypatch.setattr(reader, "prompting", lambda *_: nullcontext())
    monkeypatch.setattr(pretrained_vlm, "place", lambda prompt, *args, **named: place(None, *args, **named))
    with pytest.raises(ValueError, match="does not change"):
        backbone.probe()


place = pretrained_vlm.place


def test_the_probe_notices_padding_that_is_read(
    pretrained_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = VisionLanguageModel.from_pretrained(pretrained_folder("llava"))
    forward = type(backbone.language).forward

    def blind(self: nn.Module, *args: Any, attention_mask: Any, **named: Any) -> Any:
        return forward(self, *args, attention_mask=torch.ones_like(attention_mask), **named)

    monkeypatch.setattr(type(backbone.language), "forward", blind)
    backbone.train()
    with pytest.raises(ValueError, match="padding"):
        backbone.probe()
    monkeypatch.setattr(type(backbone.language), "forward", None)
    with pytest.raises(ValueError, match="does not answer"):
        backbone.probe()
    assert backbone.training


@pytest.mark.parametrize("family", ["blip2", "florence2"])
def test_two_images_are_refused_where_one_is_taken(pretrained_folder: Folder, family: str) -> None:
    backbone = VisionLanguageModel.from_pretrained(pretrained_folder(family))
    with pytest.raises(ValueError, match=str(backbone.name)):
        backbone.probe(2)
    VisionLanguageModel.from_pretrained(pretrained_folder("llava")).probe(2)


def test_a_prompt_beyond_the_context_is_refused_with_the_limit(pretrained_folder: Folder) -> None:
    backbone = VisionLanguageModel.from_pretrained(pretrained_folder("llava"))
    limit = backbone.language_model.positions
    assert limit is not None
    with pytest.raises(ValueError, match=str(limit)):
        backbone.language_model.check_length(limit, 1, 0, 1)


def test_a_method_that_acts_elsewhere_is_refused(pretrained_folder: Folder) -> None:
    backbone = VisionLanguageModel.from_pretrained(pretrained_folder("llava"))
    prompt = DePT(backbone.d_model, prompt_length=2, rank=1, max_source_length=9, memory_offset=nn.Identity())
    with pytest.raises(ValueError, match="method"):
        PromptedModel(backbone, prompt)


def test_a_model_that_writes_nothing_is_refused(vision_folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=str(vision_folders["clip"])):
        open_backbone(model=vision_folders["clip"])


@pytest.mark.parametrize("name", DECODER_ONLY)
def test_decoder_only_models_behind_a_q_former(pretrained_folder: Folder, name: str) -> None:
    """A row answers alone as it does in a batch, with a prompt that changes its answer."""
    backbone = VisionLanguageModel.from_pretrained(pretrained_folder(name)).eval()
    assert not backbone.language_model.encoder_decoder
    backbone.probe()
    torch.manual_seed(0)
    prompt = DePT(backbone.d_model, prompt_length=3, rank=2, max_source_length=40)
    nn.init.normal_(prompt.soft_prompt)  # type: ignore[arg-type]
    image, answers = Image.new("RGB", (40, 32), (200, 60, 40)), []
    for texts in (["what colour is the star ?"], ["how many ?"], ["what colour is the star ?", "how many ?"]):
        made = backbone.processor(texts, [[image]] * len(texts), [40] * len(texts))
        inputs = {key: made.pop(key) for key in ("input_ids", "attention_mask")}
        model = PromptedModel(backbone, prompt).eval()
        answers.append(model.generate(**inputs, processed=made, max_new_tokens=4, min_new_tokens=4))
    assert torch.equal(answers[2], torch.cat(answers[:2]))
    bare = PromptedModel(backbone, None).eval()
    assert not torch.equal(
        bare.generate(**inputs, processed=made, max_new_tokens=4, min_new_tokens=4), answers[2]
    )


@pytest.mark.parametrize("name", TEXT_ONLY)
def test_models_of_text_go_the_same_way(pretrained_folder: Folder, name: str) -> None:
    """Their own loss of an answer; by the chat template where there is one."""
    backbone = VisionLanguageModel.from_pretrained(pretrained_folder(name)).eval()
    assert not backbone.reads_images
    backbone.probe(0)
    asked = backbone.processor.written("is it red ?", 0)
    assert ("<|turn|>user" in asked) == (name == "llama_text")
    prompt = DePT(backbone.d_model, prompt_length=2, rank=1, max_source_length=9 + backbone.frame)
    bare, model = PromptedModel(backbone, None).eval(), PromptedModel(backbone, prompt).eval()
    batch = Collator.for_model(model, 6)([Draw(Example(0, "is it red ?", (), ()), "no")])
    assert batch.labels is not None
    ids, labels = batch.input_ids, batch.labels
    if not backbone.language_model.encoder_decoder:
        ids, labels = (torch.cat([one, labels], 1) for one in (ids, torch.full_like(ids, -100)))
    expected = backbone.language(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
    torch.testing.assert_close(bare(**batch.training_inputs()).loss, expected, rtol=1e-4, atol=1e-5)
    model(**batch.training_inputs()).loss.backward()
    assert all(parameter.grad is not None for parameter in prompt.parameters())
    assert model.generate(**batch.inputs(), max_new_tokens=3).ndim == 2


def test_a_marian_writes_no_padding() -> None:
    tokens = words("$A </s>")
    marian = model_of("marian", AutoModelForSeq2SeqLM, **bart(tokens))
    backbone = VisionLanguageModel(marian, tokens, name="marian")
    assert backbone.language_model.special_tokens["bad_words_ids"] == [[tokens.pad_token_id]]
    assert backbone.language_model.special_tokens["eos_token_id"] == [tokens.eos_token_id]


def test_tokens_of_another_processor_are_refused(copied: Callable[..., Path]) -> None:
    folder = copied("llava", image_token_id=7, image_token_index=7)
    with pytest.raises(ValueError, match="7"):
        open_backbone(model=folder)


def test_code_of_a_repository_is_not_run(copied: Callable[..., Path], tmp_path: Path) -> None:
    code = {"AutoConfig": "own.Own", "AutoModelForImageTextToText": "own.Own", "AutoProcessor": "own.Own"}
    folder = copied("llava", model_type="own", auto_map=code)
    (folder / "own.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\nclass Own: pass\n")
    with pytest.raises(ValueError, match=str(folder)):
        open_backbone(model=folder)
    assert not (tmp_path / "run").exists()


def test_a_model_beside_the_parts_of_another_is_refused() -> None:
    with pytest.raises(UsageError, match="--vision"):
        BackboneOptions(model="some/model", vision="a/tower").loading()
    with pytest.raises(UsageError, match="--text_form"):
        BackboneOptions(language="google-t5/t5-base", text_form="chat").loading()
