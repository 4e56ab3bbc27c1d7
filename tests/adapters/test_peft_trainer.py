"""DePT under transformers' trainers, through PEFT; and the README's block, as it stands there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CORPUS
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

pytest.importorskip("peft", reason="the extra 'peft' is not installed")

from peft import PeftModel, get_peft_model

from dept_vl.adapters.peft.plugin import DeptConfig, create_dept_optimizer

README = Path(__file__).parents[2] / "dept_vl" / "adapters" / "README.md"
RATES = {"prompt_lr": 0.3, "offset_lr": 5e-3}


@pytest.fixture(params=["t5", "bart"])
def folder(request: pytest.FixtureRequest, language_folders: dict[str, Path]) -> Path:
    return language_folders[request.param]


def make(folder: Path, output: Path, **options: Any) -> Seq2SeqTrainer:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = DeptConfig(task_type="SEQ_2_SEQ_LM", prompt_length=4, rank=3, max_source_length=60)
    model = get_peft_model(AutoModelForSeq2SeqLM.from_pretrained(folder), config)
    optimizer = create_dept_optimizer(model, torch.optim.AdamW, **RATES, weight_decay=0.01)
    answers = ("yes", "no", "red", "blue")
    examples = [tokenizer(text, text_target=answer) for text, answer in zip(CORPUS, answers, strict=True)]
    arguments = Seq2SeqTrainingArguments(
        **{
            "output_dir": str(output),
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 3,
            "logging_steps": 1,
            "save_steps": 3,
            "save_strategy": "steps",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "predict_with_generate": True,
            "generation_max_length": 5,
            **options,
        }
    )
    return Seq2SeqTrainer(
        model=model,
        args=arguments,
        train_dataset=examples,
        eval_dataset=examples,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        optimizers=(optimizer, None),
    )


def prompt(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "dept_prompt" in name}


def test_training_moves_the_prompt_alone_at_two_rates(folder: Path, tmp_path: Path) -> None:
    trainer = make(folder, tmp_path, max_steps=12)
    base = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "dept_" not in name}
    before = prompt(trainer.model)
    result = trainer.train()
    after = dict(trainer.model.named_parameters())
    assert all(torch.equal(after[name], base[name]) for name in base)
    moved = {n.rpartition(".")[2]: (after[n] - before[n]).abs().max() for n in before}
    assert moved["soft_prompt"] > 20 * moved["offset_b"] > 0
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 12
    assert sum(losses[-3:]) < sum(losses[:3])
    assert result.metrics["train_loss"] > 0
    groups = {group["name"]: group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert groups == {"prompt": 0.3, "low_rank": 5e-3}


def test_resumed_training_is_that_of_one_run(folder: Path, tmp_path: Path) -> None:
    whole = make(folder, tmp_path / "whole")
    whole.train()
    resumed = make(folder, tmp_path / "again")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    mine, theirs = prompt(whole.model), prompt(resumed.model)
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name])


def test_the_best_checkpoint_is_loaded_at_the_end(folder: Path, tmp_path: Path) -> None:
    trainer = make(
        folder,
        tmp_path,
        eval_strategy="steps",
        eval_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # the worse one, which is not the last
        predict_with_generate=False,
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert best.name == f"checkpoint-{3 if losses[0] > losses[1] else 6}"
    stored = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(folder), best)
    mine, theirs = prompt(trainer.model), prompt(stored)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_evaluation_generates_with_the_prompt(folder: Path, tmp_path: Path) -> None:
    trainer = make(folder, tmp_path)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "dept_prompt" in name:
                parameter.normal_()
    predictions = trainer.predict(trainer.eval_dataset).predictions
    with trainer.model.disable_adapter():
        without = trainer.predict(trainer.eval_dataset).predictions
    assert predictions.shape[0] == without.shape[0] == 4
    assert predictions.tolist() != without.tolist()


def test_the_plain_trainer_and_gradient_checkpointing(folder: Path, tmp_path: Path) -> None:
    given = make(folder, tmp_path)
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        use_cpu=True,
        report_to="none",
        gradient_checkpointing=True,
        disable_tqdm=True,
        learning_rate=0.01,
    )
    trainer = Trainer(
        model=given.model,
        args=arguments,
        train_dataset=given.train_dataset,
        data_collator=given.data_collator,
    )
    before = prompt(trainer.model)
    trainer.train()
    after = prompt(trainer.model)
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_the_readme_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = [block.split("```")[0] for block in README.read_text().split("```python")[1:]]
    (block,) = [block for block in blocks if "adapters.peft" in block and "Seq2SeqTrainer" in block]
    assert block.count("google-t5/t5-base") == 1
    small = block.replace("google-t5/t5-base", str(folder)).replace("prompt_length=60", "prompt_length=20")
    names: dict[str, Any] = {}
    exec(compile(small, str(README), "exec"), names)
    assert names["tokens"].shape[0] == 2
    assert names["config"].rank == 80 * 32 // (256 + 32)
