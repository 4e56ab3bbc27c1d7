"""DePT as a PEFT method on decoder-only models and on models with images: the numbers of `--model`."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from PIL import Image
from test_attach_trainer import ARGUMENTS as OF_ATTACHED
from test_peft_files import loaded_as_the_card_says
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from zoo.vlm_subjects import joined
from zoo.vlms import FAMILIES

peft = pytest.importorskip("peft", reason="the extra 'peft' is not installed")

from peft import (  # noqa: E402
    AutoPeftModelForCausalLM,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)

from dept_vl.adapters.adapter import Adapter  # noqa: E402
from dept_vl.adapters.attach import attach  # noqa: E402
from dept_vl.adapters.calls import PromptedCalls  # noqa: E402
from dept_vl.adapters.families import Parts  # noqa: E402
from dept_vl.adapters.peft.files import from_peft, to_peft  # noqa: E402
from dept_vl.adapters.peft.plugin import DeptConfig, DeptWords, create_dept_optimizer  # noqa: E402
from dept_vl.models.pretrained_vlm import VisionLanguageModel  # noqa: E402
from dept_vl.models.prompted import PromptedModel  # noqa: E402
from dept_vl.prompts.dept import DePT  # noqa: E402

Folder = Callable[[str], Path]
SIZES: dict[str, Any] = {"prompt_length": 3, "rank": 2, "max_source_length": 40}
QUESTIONS = ("what colour is the star ?", "how many ?")
ANSWER = 4
OPTIONS: dict[str, Any] = {"max_new_tokens": ANSWER, "min_new_tokens": ANSWER, "do_sample": False}
ALWAYS = ("qwen2_5_vl", "blip2", "gpt2_text")
"""In the default suite."""
TEXT = ("gpt2_text", "llama_text")
CHAT = "llava_onevision"
"""With a chat template, as TRL asks for."""
README = Path(__file__).parents[2] / "dept_vl" / "adapters" / "README.md"
LABELS = torch.tensor([[40, 50, 60, 41]])


def config(family: str, **changes: Any) -> DeptConfig:
    # PEFT's classes pass on what a model of images does not take.
    task = None if family in ("blip2", "instructblip", "florence2", "t5gemma2") else "CAUSAL_LM"
    return DeptConfig(**{"task_type": task, **SIZES, **changes})


def opened(pretrained_folder: Folder, family: str) -> VisionLanguageModel:
    backbone = VisionLanguageModel.from_pretrained(pretrained_folder(family)).eval()
    # Of fences that no configuration names, `calls` knows nothing.
    backbone.processor.image_tokens = torch.tensor(Parts.of(backbone.language).image_tokens, dtype=torch.long)
    return backbone


def trained(model: Any, seed: int = 1) -> None:
    """As after training: every tensor is far from where it starts."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, DePT):
            for parameter in module.parameters():
                nn.init.normal_(parameter)


def read(backbone: VisionLanguageModel, *rows: int) -> dict[str, Tensor]:
    images = [[Image.new("RGB", (40 - 8 * row, 32), (200, 60 * row, 40))] for row in rows]
    if not backbone.reads_images:
        images = [[] for _ in rows]
    return backbone.processor([QUESTIONS[row] for row in rows], images, [40] * len(rows))


def answered(backbone: VisionLanguageModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is trained on: source and answer in one sequence, or the answer as labels."""
    reader, answer = backbone.language_model, LABELS.repeat(len(inputs["input_ids"]), 1)
    if reader.encoder_decoder:
        return inputs | {"labels": answer}
    whole = joined(inputs, answer, reader.answer_type)
    return whole | {"labels": torch.cat([torch.full_like(inputs["input_ids"], -100), answer], 1)}


def answer_logits(backbone: VisionLanguageModel, model: Any, *rows: int) -> Tensor:
    given = answered(backbone, read(backbone, *rows))
    with torch.no_grad():
        logits: Tensor = model(**given).logits
    if backbone.language_model.encoder_decoder:
        return logits
    assert logits.shape[1] == given["input_ids"].shape[1]
    return logits[:, -ANSWER - 1 : -1]


def hooks_on(model: nn.Module) -> list[Any]:
    hooks = [*model._forward_pre_hooks.values(), *model._forward_hooks.values()]
    return [hook for hook in hooks if isinstance(getattr(hook, "__self__", None), PromptedCalls)]


@pytest.mark.parametrize(
    "family",
    [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in (*TEXT, *FAMILIES)],
)
def test_peft_gives_what_the_pipeline_gives(pretrained_folder: Folder, family: str, tmp_path: Path) -> None:
    backbone = opened(pretrained_folder, family)
    reader = backbone.language_model
    options = OPTIONS | reader.special_tokens
    prompt = DePT(backbone.d_model, **SIZES)
    trained(prompt)
    whole = PromptedModel(backbone, prompt).eval()
    expected, answers, bare = [], [], []
    for row in (0, 1):
        inputs = read(backbone, row)
        ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
        expected.append(whole(ids, mask, LABELS, processed=inputs).logits.detach())
        answers.append(whole.generate(ids, mask, processed=inputs, **options)[:, -ANSWER:])
        bare.append(answer_logits(backbone, backbone.language, row))

    model = get_peft_model(backbone.language, config(family)).eval()
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in names} == {"soft_prompt", "offset_a", "offset_b"}
    assert len(names) == 3
    trained(model)
    for row in (0, 1):
        torch.testing.assert_close(answer_logits(backbone, model, row), expected[row], atol=1e-5, rtol=1e-5)
        inputs = read(backbone, row)
        asked = model.generate(**inputs, **options)
        assert torch.equal(asked[:, -ANSWER:], answers[row])
        if not reader.encoder_decoder:
            assert torch.equal(asked[:, :-ANSWER], inputs["input_ids"])
    if not reader.encoder_decoder:
        backbone.tokenizer.padding_side = "left"
    both = model.generate(**read(backbone, 0, 1), **options)[:, -ANSWER:]
    assert torch.equal(both, torch.cat(answers))
    if family != "gpt2_text":  # which counts padding too, where no positions are given
        logits = answer_logits(backbone, model, 0, 1)
        torch.testing.assert_close(logits, torch.cat(expected), atol=1e-4, rtol=1e-4)

    model(**answered(backbone, read(backbone, 0))).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and bool(parameter.grad.any())) == (name in names), name
    with model.disable_adapter():
        assert torch.equal(answer_logits(backbone, model, 0), bare[0])
    model.save_pretrained(tmp_path)
    before = answer_logits(backbone, model, 0)
    unloaded = model.unload()
    assert not hooks_on(unloaded)
    assert "generate" not in vars(unloaded)
    assert torch.equal(answer_logits(backbone, unloaded, 0), bare[0])
    again = PeftModel.from_pretrained(unloaded, tmp_path)
    assert torch.equal(answer_logits(backbone, again, 0), before)


@pytest.fixture
def llava(pretrained_folder: Folder) -> VisionLanguageModel:
    return opened(pretrained_folder, "llava")


def several(backbone: VisionLanguageModel) -> PeftModel:
    model = get_peft_model(backbone.language, config("llava"), adapter_name="a").eval()
    model.add_adapter("b", config("llava", prompt_length=5, rank=0))
    trained(model)
    return model


def test_adapters_are_switched_and_deleted(llava: VisionLanguageModel) -> None:
    model = several(llava)
    a = answer_logits(llava, model, 0)
    model.set_adapter("b")
    b = answer_logits(llava, model, 0)
    assert not torch.allclose(a, b, atol=1e-2)
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert torch.equal(answer_logits(llava, model, 0), b)
    model.set_adapter("a")
    assert torch.equal(answer_logits(llava, model, 0), a)
    with pytest.warns(UserWarning, match="Setting active adapter to b"):
        model.delete_adapter("a")
    assert torch.equal(answer_logits(llava, model, 0), b)
    model.delete_adapter("b")
    unprompted = answer_logits(llava, model.base_model, 0)
    model.unload()
    assert torch.equal(answer_logits(llava, llava.language, 0), unprompted)


def test_copies_and_pickles_are_models_of_their_own(llava: VisionLanguageModel) -> None:
    model = several(llava)
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]  # before a call: transformers' own
    before = answer_logits(llava, model, 0)
    answer = model.generate(**read(llava, 0), **OPTIONS)
    for other in others:
        assert torch.equal(answer_logits(llava, other, 0), before)
        assert torch.equal(other.generate(**read(llava, 0), **OPTIONS), answer)
        with torch.no_grad():
            other.get_base_model().get_input_embeddings().dept_prompt["a"].soft_prompt.zero_()
        assert not torch.allclose(answer_logits(llava, other, 0), before, atol=1e-3)
        assert not hooks_on(other.unload())
    assert torch.equal(answer_logits(llava, model, 0), before)


def test_injection_needs_no_peft_model(llava: VisionLanguageModel, pretrained_folder: Folder) -> None:
    model = several(llava)
    state = get_peft_model_state_dict(model, adapter_name="a")
    before = answer_logits(llava, model, 0)
    bare = inject_adapter_in_model(config("llava"), opened(pretrained_folder, "llava").language)
    set_peft_model_state_dict(bare, state)
    assert torch.equal(answer_logits(llava, bare, 0), before)
    again = opened(pretrained_folder, "llava").language
    inject_adapter_in_model(config("llava"), again, state_dict=get_peft_model_state_dict(bare))
    assert isinstance(again.get_input_embeddings(), DeptWords)


def test_what_peft_cannot_do_is_refused(llava: VisionLanguageModel) -> None:
    model = several(llava)
    before = answer_logits(llava, model, 0)
    given = read(llava, 0)
    with pytest.raises(ValueError, match="adapter_names"):
        model(**given, adapter_names=["a"])
    with pytest.raises(ValueError, match="adapter_names"):
        model.generate(**given, adapter_names=["b"])
    with pytest.raises(ValueError, match="one prompt is active"):
        model.base_model.set_adapter(["a", "b"])
    for merge in (
        model.merge_adapter,
        model.merge_and_unload,
        model.get_base_model().get_input_embeddings().merge,
    ):
        with pytest.raises(ValueError, match="cannot be merged"):
            merge()
    embeddings = llava.embed(given["input_ids"])
    with pytest.raises(ValueError, match="inputs_embeds"):
        model(inputs_embeds=embeddings, attention_mask=given["attention_mask"])
    with pytest.raises(ValueError, match="position_ids"):
        model(**given, position_ids=torch.zeros_like(given["input_ids"]))
    with pytest.raises(ValueError, match="-100"):
        model(**given, labels=given["input_ids"])
    with pytest.raises(ValueError, match="256 positions"):
        model.add_adapter("long", config("llava", prompt_length=256))
    with pytest.raises(ValueError, match="has a prompt already"):
        attach(llava.language, DePT(llava.d_model, **SIZES))
    assert list(model.peft_config) == ["a", "b"]
    assert torch.equal(answer_logits(llava, model, 0), before)


def test_an_attached_prompt_is_not_read_beside_pefts(llava: VisionLanguageModel) -> None:
    attached = attach(llava.language, DePT(llava.d_model, **SIZES))
    with pytest.raises(ValueError, match="has a prompt already"):
        get_peft_model(attached.model, config("llava"))
    attached.detach()
    assert hooks_on(get_peft_model(llava.language, config("llava")).get_base_model())


def test_another_base_is_refused(
    llava: VisionLanguageModel, pretrained_folder: Folder, tmp_path: Path
) -> None:
    several(llava).save_pretrained(tmp_path)
    other = opened(pretrained_folder, "llava").language
    with torch.no_grad():
        other.get_input_embeddings().weight[5] += 1.0
    with pytest.raises(ValueError, match="trained on another base"):
        PeftModel.from_pretrained(other, tmp_path / "a")
    assert not hooks_on(other)


@pytest.mark.parametrize("family", ["llava", "gpt2_text"])
def test_our_files_and_pefts(
    pretrained_folder: Folder, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = opened(pretrained_folder, family)
    whole = PromptedModel(backbone, DePT(backbone.d_model, **SIZES)).eval()
    trained(whole)
    adapter = Adapter.of(whole, task="vqav2", metrics={})
    to_peft(adapter, backbone, tmp_path / "theirs")
    again = from_peft(tmp_path / "theirs", backbone, task="vqav2")
    assert again.tensors.keys() == adapter.tensors.keys()
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in adapter.tensors.items())
    inputs = read(backbone, 0)
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
    expected = whole(ids, mask, LABELS, processed=inputs).logits.detach()
    model = PeftModel.from_pretrained(backbone.language, tmp_path / "theirs")
    torch.testing.assert_close(answer_logits(backbone, model, 0), expected, atol=1e-5, rtol=1e-5)
    if family == "gpt2_text":
        auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
        torch.testing.assert_close(answer_logits(backbone, auto, 0), expected, atol=1e-5, rtol=1e-5)
    auto = "" if family == "gpt2_text" else "AutoModelForImageTextToText"
    card = loaded_as_the_card_says(tmp_path / "theirs", monkeypatch, auto)
    torch.testing.assert_close(answer_logits(backbone, card, 0), expected, atol=1e-5, rtol=1e-5)


# -- trainers


ARGUMENTS: dict[str, Any] = OF_ATTACHED | {"max_steps": 2, "bf16": False}


def conversations() -> Dataset:
    """TRL's vision format: images, a question and its answer."""
    return Dataset.from_list(
        [
            {
                "images": [Image.new("RGB", (32, 32), (200, 90 * row, 40))],
                "prompt": [{"role": "user", "content": QUESTIONS[row]}],
                "completion": [{"role": "assistant", "content": answer}],
            }
            for row, answer in enumerate(("red and blue", "no"))
        ]
    )


@pytest.mark.parametrize("given", ["config", pytest.param("model", marks=pytest.mark.slow), "attached"])
def test_sft_trainer_trains_the_prompt_on_images(
    pretrained_folder: Folder, given: str, tmp_path: Path
) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    folder = pretrained_folder(CHAT)
    backbone = opened(pretrained_folder, CHAT)
    base, processor = backbone.language, backbone.processor.processor
    torch.manual_seed(0)
    dept = config(CHAT, max_source_length=60)
    model: Any = base
    if given == "model":
        model = get_peft_model(base, dept)
    elif given == "attached":
        model = attach(base, DePT(backbone.d_model, **SIZES | {"max_source_length": 60}))
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(str(tmp_path), max_length=None, completion_only_loss=True, **ARGUMENTS),
        train_dataset=conversations(),
        eval_dataset=conversations(),
        processing_class=processor,
        peft_config=dept if given == "config" else None,
    )
    trained(trainer.model)
    frozen = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert len(before) == 3
    batch = trainer.data_collator([*trainer.eval_dataset])
    with torch.no_grad():
        expected = float(trainer.model.eval()(**batch).loss)
        without = float(opened(pretrained_folder, CHAT).language(**batch).loss)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)
    assert abs(without - expected) > 1e-2
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert all(not torch.equal(after[name], p) for name, p in before.items())
    assert all(torch.equal(after[name], p) for name, p in frozen.items())
    if given != "attached":
        other = VisionLanguageModel.from_pretrained(folder).language
        stored = dict(PeftModel.from_pretrained(other, tmp_path / "checkpoint-2").named_parameters())
        assert all(torch.equal(stored[name], after[name]) for name in before)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gpt2_text"])
def test_trainer_trains_the_prompt_at_two_rates(
    pretrained_folder: Folder, family: str, tmp_path: Path
) -> None:
    backbone = opened(pretrained_folder, family)

    model = get_peft_model(backbone.language, config(family))
    optimizer = create_dept_optimizer(model, torch.optim.AdamW, prompt_lr=0.3, offset_lr=5e-3)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = Trainer(
        model=model,
        args=TrainingArguments(str(tmp_path), **ARGUMENTS | {"max_steps": 8}),
        train_dataset=[{"row": 0}, {"row": 1}],  # type: ignore[arg-type]
        data_collator=lambda rows: answered(backbone, read(backbone, *(one["row"] for one in rows))),
        optimizers=(optimizer, None),  # type: ignore[arg-type]
    )
    trainer.args.remove_unused_columns = False
    backbone.tokenizer.padding_side = "left"
    trainer.train()
    moved = {n: float((p - before[n]).abs().max()) for n, p in model.named_parameters()}
    by_name = {n.rpartition(".")[2]: size for n, size in moved.items() if "dept_prompt" in n}
    assert by_name["soft_prompt"] > 20 * by_name["offset_b"] > 0
    assert {n for n, size in moved.items() if size} == {n for n in moved if "dept_prompt" in n}


def test_the_readme_trains_on_images(
    pretrained_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl", reason="trl is not installed")
    monkeypatch.chdir(tmp_path)
    blocks = [block.split("```")[0] for block in README.read_text().split("```python")[1:]]
    (block,) = [block for block in blocks if "SFTTrainer(" in block]
    name, options = "Qwen/Qwen2.5-VL-3B-Instruct", "max_length=None, "
    assert block.count(name) == block.count(options) == 1
    small = block.replace(name, str(pretrained_folder(CHAT)))
    small = small.replace(options, f"{options}use_cpu=True, bf16=False, max_steps=1, report_to='none', ")
    given: dict[str, Any] = {"examples": [(Image.new("RGB", (32, 32)), "is it red ?", "no")]}
    exec(compile(small, str(README), "exec"), given)
    assert {path.name for path in (tmp_path / "sft-adapter").iterdir()} > {"adapter_config.json"}
