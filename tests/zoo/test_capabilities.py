"""The table of tests/README.md: some cells are probed again, and the probes notice what is broken."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from zoo import capabilities, subjects
from zoo.capabilities import (
    ARCHITECTURES,
    HELD,
    OPERATIONS,
    Cell,
    attempted,
    failures,
    probe,
    probe_all,
    split_at_marks,
    table,
)
from zoo.subjects import Composed

from dept_vl.prompts.dept import DePT
from scripts import capabilities as script

PAGE = Path(__file__).parents[1] / "README.md"

Found = dict[tuple[str, str], dict[str, Cell]]


def read_table(text: str) -> Found:
    """The cells of a table, by model and method, each with its message."""
    lines = text.splitlines()
    said = {line.partition(". ")[0]: line.partition(". ")[2] for line in lines if line[:1].isdigit()}
    found: Found = {}
    for line in lines:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|") or cells[0] == "model" or set(cells[0]) == {"-"}:
            continue
        shown = {}
        for name, cell in zip(OPERATIONS, cells[2:], strict=True):
            seen, _, number = cell.partition(" [")
            shown[name] = Cell(seen, said[number.strip("]")] if number else "")
        found |= {(cells[0], method): shown for method in cells[1].split()}
    return found


@pytest.mark.parametrize(
    ("architecture", "method"),
    [
        ("CLIP + T5", "dept"),
        ("BART", "adept"),
        ("CLIP + Llama", "pt"),
        ("Florence-2, attached", "residual"),
        ("LLaVA", "lora"),
        ("Qwen2.5-VL", "adept"),
        ("GPT-2, --model", "memory"),
        ("GPT-2 in PEFT", "dept"),
    ],
)
def test_the_readme_says_what_is_seen(architecture: str, method: str) -> None:
    in_readme = read_table(split_at_marks(PAGE.read_text())[1])
    assert probe(architecture, method) == in_readme[architecture, method]


@pytest.mark.slow
def test_the_whole_table() -> None:
    found = probe_all()
    assert failures(found) == []
    assert split_at_marks(PAGE.read_text())[1].strip() == table(found)


def test_every_model_is_in_the_readme_and_nothing_failed() -> None:
    found = read_table(split_at_marks(PAGE.read_text())[1])
    assert {architecture for architecture, _ in found} == set(ARCHITECTURES)
    assert {method for _, method in found} == set(capabilities.METHODS)
    assert failures(found) == []


# -- what is broken is noticed


Broken = Callable[..., str]


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Broken:
    """What an operation says of T5 with a part of it replaced; empty if it holds."""

    def said(operation: str, method: str = "adept", **parts: object) -> str:
        kind = type("Broken", (Composed,), parts)
        cell = attempted(lambda: OPERATIONS[operation](kind(method, "t5", None, "none")))
        assert (cell.seen == HELD) == (cell.said == "")
        return cell.said

    return said


@pytest.mark.parametrize("operation", ["forward", "train", "save, load", "padding", "checkpointing", "fold"])
def test_nothing_is_broken_as_it_is(broken: Broken, operation: str) -> None:
    assert broken(operation) == ""


def test_a_prompt_that_does_nothing_is_noticed(broken: Broken, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subjects, "new_prompt", lambda *_: None)
    assert broken("forward") == "Wrong: what was trained changes nothing"


def test_a_base_that_is_trained_too_is_noticed(broken: Broken) -> None:
    def trained(self: Composed) -> torch.nn.Module:
        model = Composed.trained(self)
        model.backbone.language.get_input_embeddings().weight.requires_grad_(True)
        return model

    def groups(self: Composed) -> dict[str, list[torch.nn.Parameter]]:
        return {name: group for name, group in self.module.parameter_groups().items() if name != "backbone"}

    said = broken("train", trained=trained, groups=property(groups))
    assert said == "Wrong: 6 parameters have gradients, 5 are trained"


def test_an_answer_that_is_not_the_likeliest_is_noticed(broken: Broken) -> None:
    def answer(self: Composed, inputs: subjects.Inputs, **options: object) -> torch.Tensor:
        return (Composed.answer(self, inputs, **options) + 1) % 100

    assert broken("greedy", answer=answer) == "Wrong: a token is not the likeliest"


def test_options_that_are_not_passed_on_are_noticed(broken: Broken) -> None:
    def answer(self: Composed, inputs: subjects.Inputs, **options: object) -> torch.Tensor:
        tokens = Composed.answer(self, inputs, max_new_tokens=5)
        return tokens.repeat_interleave(int(options["num_return_sequences"]), 0)  # type: ignore[call-overload]

    assert broken("beams", answer=answer) == "Wrong: beams give the same answer"
    assert broken("sample", answer=answer) == "Wrong: another seed gives the same samples"


def test_a_loss_on_the_way_to_the_disk_is_noticed(broken: Broken) -> None:
    def save(self: Composed, folder: Path) -> None:
        adapter = subjects.Adapter.of(self.module, task="", metrics={})
        replace(adapter, tensors={name: t.half().float() for name, t in adapter.tensors.items()}).save(folder)

    assert broken("save, load", save=save) == "Wrong: logits differ after loading"


def test_padding_that_counts_is_noticed(broken: Broken, monkeypatch: pytest.MonkeyPatch) -> None:
    offset = DePT.offset

    def shifted(self: DePT, text_length: int) -> torch.Tensor | None:
        found = offset(self, text_length)
        return None if found is None else found * text_length  # of the longest row

    monkeypatch.setattr(DePT, "offset", shifted)
    assert broken("padding", "dept") == "Wrong: padding changes logits"


def test_checkpointing_that_does_nothing_is_noticed(broken: Broken) -> None:
    assert broken("checkpointing", checkpoint=lambda self: None) == "Wrong: no layer was run again"


def test_a_wrong_fold_is_noticed(broken: Broken) -> None:
    assert broken("fold", folded=lambda self: Composed.folded(self) + 0.1) == "Wrong: logits differ"


def test_a_base_that_stays_changed_is_noticed(broken: Broken) -> None:
    def without(self: Composed) -> list[torch.Tensor]:
        return [self.logits(self.inputs)]

    assert broken("take off", without=without) == "Wrong: the base is not as it was"


def test_rows_that_disturb_each_other_are_noticed(broken: Broken) -> None:
    def mixed(self: Composed) -> tuple[torch.Tensor, list[bool]]:
        return self.logits(self.inputs), [True, False, True]

    assert broken("mixed rows", mixed=mixed) == "Wrong: rows disturb each other"


def test_refusals_are_ours_and_the_rest_fails() -> None:
    def refuse() -> None:
        DePT(4, prompt_length=-1, rank=0, max_source_length=1)

    refused = attempted(refuse)
    assert refused.seen == "refused"
    assert "needs prompt_length >= 0" in refused.said
    assert attempted(lambda: int("no number")).seen == "FAILS"
    assert attempted(lambda: torch.zeros(2) @ torch.zeros(3)).said.startswith("RuntimeError: ")
    assert attempted(lambda: None) == Cell(HELD)


# -- the table


def test_a_table_gives_its_cells_back_and_methods_that_fare_alike_share_a_row() -> None:
    cells = dict.fromkeys(OPERATIONS, Cell(HELD))
    no = cells | {"fold": Cell("refused", "cannot be")}
    bad = cells | {"train": Cell("FAILS", "RuntimeError: no")}
    found: Found = {("A", "pt"): cells, ("A", "dept"): cells, ("A", "lora"): no, ("B", "pt"): bad}
    text = table(found | {("B", "lora"): dict.fromkeys(OPERATIONS, Cell("-"))})
    assert read_table(text) == found
    assert sum(line.startswith("| A ") for line in text.splitlines()) == 2
    assert failures(found) == ["B, pt, train: RuntimeError: no"]


def test_writing_and_checking(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = dict.fromkeys(OPERATIONS, Cell(HELD))
    monkeypatch.setattr(capabilities, "probe_all", lambda tell: {("A", "pt"): cells})
    page = tmp_path / "page.md"
    page.write_text(f"before\n{capabilities.BEGIN}\n{capabilities.END}\nbehind\n")
    assert script.main(check=page) == 1
    assert f"the table in {page} is another" in capsys.readouterr().err
    assert script.main(write=page) == 0
    assert script.main(check=page) == 0
    assert page.read_text().startswith("before\n")
    assert page.read_text().endswith("\nbehind\n")
    page.write_text("no marks")
    with pytest.raises(ValueError, match="expected a table between"):
        script.main(check=page)


def test_a_failure_is_a_failure_of_the_program(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = dict.fromkeys(OPERATIONS, Cell("FAILS", "no"))
    monkeypatch.setattr(capabilities, "probe_all", lambda tell: {("A", "pt"): cells})
    assert script.main() == 1
    assert "failed: A, pt, train: no" in capsys.readouterr().err
