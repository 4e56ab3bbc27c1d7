"""A prompt on a ready-made model under transformers' Trainer, and in TRL's SFTTrainer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CORPUS
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from zoo.ready_made import FAMILIES, inputs_of, ready_made

from dept_vl.adapters.attach import Attached, attach, new_prompt

ARGUMENTS = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "learning_rate": 0.05,
    "save_steps": 2,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def attached_to(family: str, max_source_length: int = 7) -> Attached:
    torch.manual_seed(0)
    model = ready_made(family)
    return attach(model, new_prompt(model, prompt_length=3, rank=2, max_source_length=max_source_length))


def rows_of(family: str) -> Dataset:
    """With a column that the model does not take."""
    columns = inputs_of(family) | {"labels": torch.arange(8, 24).view(4, 4)}
    return Dataset.from_dict(
        {k: v.tolist() for k, v in columns.items()} | {"question": list("abcd")}
    ).with_format("torch")


def trainer_of(model: Any, family: str, output: Path, **options: Any) -> Trainer:
    arguments = TrainingArguments(str(output), **{**ARGUMENTS, **options})
    rows = rows_of(family)
    return Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)


def prompt_of(attached: Attached) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in attached.prompt.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_training_evaluation_and_resume(family: str, tmp_path: Path) -> None:
    attached = attached_to(family)
    model = {name: p.detach().clone() for name, p in attached.model.named_parameters()}
    trainer = trainer_of(attached, family, tmp_path / "whole")
    before = trainer.evaluate()["eval_loss"]
    with torch.no_grad():
        pairs = [rows_of(family).remove_columns("question")[i : i + 2] for i in (0, 2)]
        expected = sum(float(attached.eval()(**pair).loss) for pair in pairs) / 2
    assert before == pytest.approx(expected, rel=1e-5)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    assert all(torch.equal(p, model[name]) for name, p in attached.model.named_parameters())
    again = attached_to(family)
    resumed = trainer_of(again, family, tmp_path / "again")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert same(prompt_of(again), prompt_of(attached))
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "model.safetensors").stat().st_size < 10_000
    attached.save(tmp_path / "adapter")
    assert same(prompt_of(Attached.load(tmp_path / "adapter", ready_made_again(family))), prompt_of(attached))


def ready_made_again(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return ready_made(family)


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    attached = attached_to("blip2")
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    # The worse one, which is the first.
    options |= {"metric_for_best_model": "loss", "greater_is_better": True}
    trainer = trainer_of(attached, "blip2", tmp_path, **options)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None
    again = attached_to("blip2")
    resumed = trainer_of(again, "blip2", tmp_path / "again")
    resumed._load_from_checkpoint(best)
    assert same(prompt_of(again), prompt_of(attached))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(family: str, tmp_path: Path, reentrant: bool) -> None:
    prompts = []
    for options in ({}, {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}):
        attached = attached_to(family)
        for module in attached.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        checkpointing = {"gradient_checkpointing": bool(options), **options}
        chosen = {"max_steps": 2, "save_strategy": "no", "optim": "sgd", **checkpointing}
        trainer = trainer_of(attached, family, tmp_path, **chosen)
        trainer.train()
        prompts.append(prompt_of(attached))
    for name, tensor in prompts[0].items():
        torch.testing.assert_close(prompts[1][name], tensor)


def test_a_step_is_the_same_however_it_is_divided(family: str, tmp_path: Path) -> None:
    """Two batches of one against one of two, with answers of different length."""
    rows = rows_of(family)
    labels = torch.tensor(rows["labels"][:].tolist())
    labels[0, 1:] = -100
    rows = rows.remove_columns("labels").add_column("labels", labels.tolist()).with_format("torch")
    steps = []
    for size, parts in ((2, 1), (1, 2)):
        attached = attached_to(family).eval()
        attached.train = lambda _=True, same=attached: same  # type: ignore[method-assign,assignment]  # no dropout
        before = prompt_of(attached)
        options: dict[str, Any] = {"optim": "sgd", "max_steps": 1, "save_strategy": "no", "max_grad_norm": 0}
        options |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts}
        options |= {"lr_scheduler_type": "constant"}
        trainer = trainer_of(attached, family, tmp_path, **options)
        trainer.train_dataset = rows
        trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(rows)  # type: ignore[method-assign]
        trainer.train()
        steps.append({name: p - before[name] for name, p in prompt_of(attached).items()})
    assert any(step.abs().max() > 1e-4 for step in steps[0].values())
    for name, step in steps[0].items():
        torch.testing.assert_close(steps[1][name], step, rtol=1e-3, atol=1e-6)


def test_a_state_is_the_prompt_alone_and_is_taken_strictly() -> None:
    attached, other = attached_to("blip2"), attached_to("blip2")
    state = attached.state_dict()
    assert state.keys() == {"prompt.soft_prompt", "prompt.offset_a", "prompt.offset_b"}
    torch.nn.Sequential(other).load_state_dict({f"0.{name}": p + 1 for name, p in state.items()})
    assert same({f"prompt.{n}": p for n, p in prompt_of(other).items()}, {n: p + 1 for n, p in state.items()})
    with pytest.raises(RuntimeError, match=r"prompt\.offset_b"):
        other.load_state_dict({name: p for name, p in state.items() if "offset_b" not in name})


# -- TRL


def sft(model: Any, folder: Path, output: Path, plain: bool = False, **options: Any) -> Any:
    trl = pytest.importorskip("trl", reason="trl is not installed")

    class Seq2SeqSFTTrainer(trl.SFTTrainer):  # type: ignore[misc,name-defined]
        compute_loss = Trainer.compute_loss

    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers = ("yes", "no", "red", "blue")
    rows = Dataset.from_list(
        [dict(tokenizer(text, text_target=answer)) for text, answer in zip(CORPUS, answers, strict=True)]
    )
    arguments = {**ARGUMENTS, "bf16": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    return (trl.SFTTrainer if plain else Seq2SeqSFTTrainer)(
        model=model,
        args=trl.SFTConfig(str(output), **arguments),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        **options,
    )


def prompt_in(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def loss_of(trainer: Any) -> float:
    """The model's own loss over the evaluation set."""
    rows = [{k: row[k] for k in ("input_ids", "labels")} for row in trainer.eval_dataset]
    with torch.no_grad():
        batches = [trainer.data_collator(rows[i : i + 2]) for i in (0, 2)]
        return sum(float(trainer.model.eval()(**batch).loss) for batch in batches) / 2


@pytest.mark.parametrize("given", ["config", "model"])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_pefts_prompt_in_sft_trainer(
    name: str, given: str, language_folders: dict[str, Path], tmp_path: Path
) -> None:
    pytest.importorskip("peft", reason="the extra 'peft' is not installed")
    from peft import PeftModel, get_peft_model

    from dept_vl.adapters.peft.plugin import DeptConfig

    folder = language_folders[name]
    config = DeptConfig(task_type="SEQ_2_SEQ_LM", prompt_length=4, rank=3, max_source_length=60)
    base = AutoModelForSeq2SeqLM.from_pretrained(folder)
    if given == "config":
        trainer = sft(base, folder, tmp_path, peft_config=config)
    else:
        trainer = sft(get_peft_model(base, config), folder, tmp_path)
    frozen = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "dept_" not in n}
    before = prompt_in(trainer.model)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss_of(trainer), rel=1e-5)
    trainer.train()
    assert all(not torch.equal(p, before[n]) for n, p in prompt_in(trainer.model).items())
    assert all(torch.equal(p, frozen[n]) for n, p in trainer.model.named_parameters() if n in frozen)
    stored = PeftModel.from_pretrained(
        AutoModelForSeq2SeqLM.from_pretrained(folder), tmp_path / "checkpoint-4"
    )
    mine = dict(trainer.model.named_parameters())
    assert all(torch.equal(p, mine[n]) for n, p in stored.named_parameters() if "dept_" in n)


def test_attached_in_sft_trainer(language_folders: dict[str, Path], tmp_path: Path) -> None:
    attached = attached_to("florence2", 20)
    attached.model.name_or_path = str(tmp_path / "florence")
    frozen = {n: p.detach().clone() for n, p in attached.model.named_parameters()}
    trainer = sft(attached, language_folders["bart"], tmp_path)
    before = prompt_in(attached)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss_of(trainer), rel=1e-5)
    trainer.train()
    assert all(not torch.equal(p, before[n]) for n, p in prompt_in(attached).items())
    assert all(torch.equal(p, frozen[n]) for n, p in attached.model.named_parameters())


def test_a_loss_of_decoder_only_models_is_an_error(language_folders: dict[str, Path], tmp_path: Path) -> None:
    attached = attached_to("florence2")
    trainer = sft(attached, language_folders["bart"], tmp_path, plain=True)
    assert not hasattr(attached, "base_model")  # as integrations ask
    with pytest.raises(AttributeError, match="encoder-decoder"):
        trainer.train()
