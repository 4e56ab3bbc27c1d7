"""Tasks without images: runs on them, presets, and snippets."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import DECODERS, LANGUAGES
from text_samples import SPLITS, write_lines, write_splits

import dept_vl.training.loop
from dept_vl._utils.errors import UnknownNameError
from dept_vl.adapters.adapter import Adapter
from dept_vl.cli import call, parse
from dept_vl.config import (
    BackboneOptions,
    DataOptions,
    EvaluateConfig,
    OptimOptions,
    PromptOptions,
    RunConfig,
    TrainOptions,
)
from dept_vl.data.sampling import TrainingBatches
from dept_vl.models.backbone import Backbone
from dept_vl.presets import PAPER
from dept_vl.tasks import load_task
from dept_vl.training.run import run as main
from dept_vl.training.score_run import score_run
from scripts.train_nlp import DEFAULTS
from study_data import snippets
from study_data.commands import COMMANDS

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


# Runs.


def tiny(language: Path, data_dir: Path, output_dir: Path, task: str) -> RunConfig:
    return replace(
        DEFAULTS,
        # The tiny tokenizer cannot write all answers.
        data=DataOptions(task=task, data_dir=data_dir, max_lost_answers=1.0),
        backbone=BackboneOptions(language=str(language), backbone_dropout=False),
        prompt=PromptOptions(prompt_length=3, rank=2, max_source_length=40, reference_prompt_length=6),
        train=replace(DEFAULTS.train, max_steps=3, per_device_batch_size=4, eval_every=2),
        optim=OptimOptions(prompt_lr=0.05, warmup_steps=0),
        output_dir=output_dir,
    )


@pytest.mark.parametrize("language", [*LANGUAGES, *DECODERS])
@pytest.mark.parametrize("task", ["rte", "newsqa"])
def test_a_run_without_images(
    language: str,
    task: str,
    language_folders: dict[str, Path],
    decoder_folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = (language_folders | decoder_folders)[language]
    data_dir = write_splits(tmp_path / "data", task)
    config = tiny(folder, data_dir, tmp_path / "run", task)
    if language in DECODERS:  # whose context holds prompt, text and answer
        config = replace(config, prompt=replace(config.prompt, max_source_length=24))
    result = main(config)
    assert result.training is not None
    assert result.training.steps == 3
    test = load_task(task, data_dir, "test")
    predictions = test.prediction_format.read(tmp_path / "run" / "predictions.json")
    assert result.scores == test.score(predictions)
    assert next(iter(result.scores)) == test.primary
    if test.decoding.candidates:
        assert set(predictions.values()) <= set(test.decoding.candidates)
    adapter = Adapter.load(tmp_path / "run" / "best")
    assert adapter.tensors.keys() == {"prompt.soft_prompt", "prompt.offset_a", "prompt.offset_b"}
    assert adapter.tensors["prompt.offset_b"].abs().max() > 0
    adapter.build(Backbone.from_pretrained(language=folder))
    dev = score_run(EvaluateConfig(run=tmp_path / "run", split="validation")).evaluation
    assert dev.scores == result.training.best_scores
    shown = capsys.readouterr().out
    assert f"{task} test: {test.primary} (0-100)" in shown
    # The texts are longer than s for these tokenizers, which know few words.
    for split in ("train", "dev", "test"):
        assert f"texts ({task} {split}); the longest has" in shown


def test_a_run_is_scored_on_another_text_task(
    language_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data_dir = write_splits(tmp_path / "data" / "rte", "rte")
    write_splits(tmp_path / "data" / "mrpc", "mrpc")
    main(tiny(language_folders["t5"], data_dir, tmp_path / "run", "rte"))
    found = score_run(EvaluateConfig(run=tmp_path / "run", task="mrpc"))
    assert found.evaluation.scores.keys() == {"accuracy", "f1"}
    assert found.output_dir == tmp_path / "run" / "mrpc-test"


def test_training_is_grouped_by_the_lengths_of_the_cut_texts(
    language_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    class Noting(TrainingBatches):
        def __init__(self, *args: Any, **options: Any) -> None:
            given.append(options["lengths"])
            super().__init__(*args, **options)

    monkeypatch.setattr(dept_vl.training.loop, "TrainingBatches", Noting)
    data_dir = tmp_path / "data"
    texts = ["red", "a small red circle", "how many red shapes are there ? " * 20]
    for split in SPLITS:
        rows = [{"sentence": texts[n % 3], "label": n % 2, "rating": 1.0} for n in range(12)]
        write_lines(data_dir / f"{split}.jsonl", rows)
    config = tiny(language_folders["t5"], data_dir, tmp_path / "grouped", "snippets")
    main(config)
    main(replace(config, output_dir=tmp_path / "mixed", train=replace(config.train, group_by_length=False)))
    tokenizer = Backbone.from_pretrained(language=language_folders["t5"]).tokenizer
    counted = [len(tokenizer(f"snippets sentence: {text}".strip()).input_ids) for text in texts]
    assert counted[0] < counted[1] < 40 < counted[2]
    (lengths,), off = given
    assert lengths.tolist() == [*counted[:2], 40] * 4
    assert off is None


# Presets.


def parsed(*flags: str, defaults: RunConfig = DEFAULTS) -> RunConfig:
    return parse(defaults, "Train.", flags)


def test_a_preset_is_laid_over_the_defaults() -> None:
    config = parsed("--task", "newsqa", "--preset", "paper")
    preset = PAPER["newsqa"]
    assert (config.prompt.prompt_length, config.prompt.rank, config.prompt.max_source_length) == (60, 24, 512)
    assert (config.optim.prompt_lr, config.optim.offset_lr) == (preset["prompt_lr"], preset["offset_lr"])
    assert config.optim.warmup_steps == preset["warmup_steps"]
    assert config.optim.adam_eps == 1e-6
    assert config.prompt.prompt_init == "text"
    assert (config.train.max_steps, config.train.per_device_batch_size) == (200_000, 16)
    assert config.train.gradient_accumulation_steps == 2
    assert (config.backbone, config.train.group_by_length) == (DEFAULTS.backbone, True)
    assert config.data == DataOptions(task="newsqa", dev_limit=0, max_answer_tokens=20, choose_by="em_first")


def test_flags_go_before_the_file_and_the_file_before_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    content = {
        "data": {"task": "cola"},
        "optim": {"prompt_lr": 0.7},
        "prompt": {"rank": None, "prompt_length": 7},
    }
    file.write_text(json.dumps(content))
    config = parsed("--preset", "paper", "--config", str(file), "--prompt_length", "9", "--max_steps", "5")
    assert config.data.task == "cola"
    assert (config.prompt.prompt_length, config.prompt.rank, config.optim.prompt_lr) == (9, None, 0.7)
    assert (config.optim.offset_lr, config.train.max_steps) == (PAPER["cola"]["offset_lr"], 5)
    # The file stands for the script's defaults, as without a preset.
    assert config.backbone.language is None
    assert config.train.eval_every == TrainOptions().eval_every


def test_a_preset_without_the_task_is_refused() -> None:
    with pytest.raises(ValueError, match="'paper' has no hyper-parameters for 'paws'; it has them for cola"):
        parsed("--task", "paws", "--preset", "paper")
    with pytest.raises(UnknownNameError, match="unknown preset 'best'"):
        parsed("--preset", "best")


# Snippets.

RATED = (
    "1\t2.5\tA joy throughout.\r\n2\t-0.4\tNeither good nor bad.\r\n3\t-3\tDull \r\n4\t0.5\tFair\r\n"
    + "".join(f"{n}\t{1 if n % 2 else -1}.5\tSentence {n}.\r\n" for n in range(5, 105))
)


def archive_of(text: str, folder: Path, inner_name: str = snippets.RATED) -> Path:
    """A source distribution as published, with this file."""

    def pack(name: str, content: bytes) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        return buffer.getvalue()

    path = folder / "vaderSentiment-3.3.2.tar.gz"
    path.write_bytes(pack(f"vaderSentiment-3.3.2/{snippets.INNER}", pack(inner_name, text.encode())))
    return path


def test_snippets_are_written_and_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive = archive_of(RATED, tmp_path)
    output_dir = tmp_path / "data" / "snippets"
    call(COMMANDS, "data", "", ["snippets", "--output_dir", str(output_dir), "--archive", str(archive)])
    assert "validation" in capsys.readouterr().out
    tasks = {split: load_task("snippets", output_dir, split) for split in SPLITS}
    sizes = [len(task) for task in tasks.values()]
    assert sum(sizes) == 103
    assert sizes[0] > 70
    assert min(sizes) > 2
    answers = {task[n].source_text: task[n].answer for task in tasks.values() for n in range(len(task))}
    assert len(answers) == 103
    assert answers["snippets sentence: A joy throughout."] == "positive"
    assert answers["snippets sentence: Dull"] == "negative"
    assert answers["snippets sentence: Fair"] == "positive"
    with pytest.raises(FileExistsError, match="already holds snippets"):
        snippets.write(output_dir, archive)


def test_the_split_of_a_snippet_depends_on_its_text_alone() -> None:
    texts = [f"Sentence {n}." for n in range(1000)]
    splits = [snippets.split_of(text) for text in texts]
    assert splits == [snippets.split_of(text) for text in texts]
    for split, share in (("train", 0.8), ("validation", 0.1), ("test", 0.1)):
        assert splits.count(split) / len(splits) == pytest.approx(share, abs=0.05)


def test_another_archive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected the source distribution of vaderSentiment"):
        snippets.write(tmp_path / "a", archive_of(RATED, tmp_path, "elsewhere.txt"))
    (tmp_path / "no.tar.gz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="expected the source distribution of vaderSentiment"):
        snippets.write(tmp_path / "b", tmp_path / "no.tar.gz")
    with pytest.raises(ValueError, match="line 2: expected an id, a rating and a sentence"):
        snippets.write(tmp_path / "c", archive_of("1\t2\tGood\n2\tBad\n", tmp_path))
    assert not any((tmp_path / name).exists() for name in "abc")
