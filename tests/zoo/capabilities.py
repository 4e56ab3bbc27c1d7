"""What works with what: method x model x operation, found out by doing it on tiny models.

A cell says what was seen, not what is meant to be: a tick where the operation held, `refused` where the
package itself said that it does not do that, `-` where there is no such thing, and `FAILS` for all else.
"""

import tempfile
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from zoo.subjects import ANSWER, BASELINES, COMPOSED, NotThere, Subject
from zoo.vlm_subjects import CONTINUED, PRETRAINED

import dept_vl
from dept_vl._utils.errors import UsageError
from dept_vl._utils.tables import markdown_table
from dept_vl.config import OptimOptions
from dept_vl.prompts.base import METHODS as PROMPTS
from dept_vl.training.optim import build_optimizer

METHODS = (*PROMPTS, *BASELINES)
ARCHITECTURES = COMPOSED | PRETRAINED | CONTINUED
PACKAGE = Path(dept_vl.__file__).resolve().parent
HELD = "✓"
BEGIN, END = "<!-- capabilities -->", "<!-- /capabilities -->"
"""Around the table in tests/README.md."""
ATOL = 2e-4
"""Between logits computed in another order."""


def forward(one: Subject) -> None:
    """Logits are finite, and others than without what was trained."""
    logits = one.logits(one.inputs)
    check(bool(logits.isfinite().all()), "logits are not finite")
    check(not torch.allclose(logits, one.bare_logits, atol=1e-2), "what was trained changes nothing")


def training(one: Subject) -> None:
    """A step gives gradients to what is trained, and moves that and nothing else."""
    one.module.train()
    trained = [p for group in one.groups.values() for p in group]
    expected = {id(parameter) for parameter in trained}
    before = {id(p): p.detach().clone() for p in one.module.parameters()}
    one.loss().backward()  # type: ignore[no-untyped-call]
    reached = {id(p) for p in one.module.parameters() if p.grad is not None}
    check(reached == expected, f"{len(reached)} parameters have gradients, {len(expected)} are trained")
    check(any(bool(p.grad.any()) for p in trained if p.grad is not None), "all gradients are zero")
    build_optimizer(one.groups, OptimOptions()).step()
    moved = {id(p) for p in one.module.parameters() if not torch.equal(p, before[id(p)])}
    check(bool(moved) and moved <= expected, "frozen parameters were moved, or none")


def greedy(one: Subject) -> None:
    """Every token is the likeliest by the logits of `forward`."""
    answer = one.answer(one.inputs, max_new_tokens=ANSWER)
    logits = one.logits(one.inputs, answer)
    for row, tokens in enumerate(answer.tolist()):
        length = tokens.index(one.end) + 1 if one.end in tokens else len(tokens)
        for place in range(length):
            scores = logits[row, place]
            check(bool(scores[tokens[place]] >= scores.max() - ATOL), "a token is not the likeliest")


def beams(one: Subject) -> None:
    """Three beams give three different answers to every row."""
    options = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": ANSWER}
    answers = one.answer(one.inputs, **options)
    rows = answers.view(len(one.labels), 3, -1).tolist()
    check(all(len({tuple(tokens) for tokens in row}) == 3 for row in rows), "beams give the same answer")


def sampling(one: Subject) -> None:
    """Samples depend on the seed alone."""
    options = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": ANSWER, "top_k": 0}
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(one.answer(one.inputs, **options))
    check(len(drawn[0]) == 2 * len(one.labels), "num_return_sequences is not heeded")
    check(torch.equal(drawn[0], drawn[1]), "a seed does not repeat its samples")
    check(drawn[0].tolist() != drawn[2].tolist(), "another seed gives the same samples")


def saving(one: Subject) -> None:
    """Saved and loaded on a fresh base, it gives the same bits; saved again, the same bytes."""
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder) / "first", Path(folder) / "second"
        one.save(first)
        loaded = one.loaded(first)
        check(torch.equal(loaded.logits(one.inputs), one.logits(one.inputs)), "logits differ after loading")
        loaded.save(second)
        for path in first.glob("*.safetensors"):
            check(path.read_bytes() == (second / path.name).read_bytes(), f"{path.name} differs")


def padding(one: Subject) -> None:
    """A row alone gives what it gives in a batch with padding."""
    together = one.logits(one.inputs)
    for row in range(len(one.labels)):
        alone = one.logits(one.unpadded(row), one.labels[row : row + 1])
        check(torch.allclose(alone[0], together[row], atol=ATOL, rtol=1e-4), "padding changes logits")


def checkpointing(one: Subject) -> None:
    """Layers run a second time in the backward pass, and gradients stay the same."""
    found = []
    for recompute in (False, True):
        fresh = one.again()
        fresh.module.train()
        if recompute:
            fresh.checkpoint()
        torch.manual_seed(0)  # of dropout
        calls = counted(fresh)
        fresh.loss().backward()  # type: ignore[no-untyped-call]
        trained = [p for group in fresh.groups.values() for p in group]
        found.append((len(calls), [p.grad for p in trained]))
    (once, gradients), (again, others) = found
    check(again > once, "no layer was run again")
    for mine, other in zip(gradients, others, strict=True):
        same = mine is not None and other is not None and torch.allclose(mine, other, atol=1e-5, rtol=1e-4)
        check(same, "gradients differ")


def taking_off(one: Subject) -> None:
    """Switched or taken off, the base says what it said before, to the bit."""
    for logits in one.without():
        check(torch.equal(logits, one.bare_logits), "the base is not as it was")


def folding(one: Subject) -> None:
    """For inference: P as one tensor, an offset of tokens in the word table; or merged into the base."""
    check(torch.allclose(one.folded(), one.logits(one.inputs), atol=ATOL, rtol=1e-4), "logits differ")


def mixing(one: Subject) -> None:
    """In a batch, rows with the adapter and rows without give what they give alone."""
    mixed, on = one.mixed()
    alone, bare = one.logits(one.inputs), one.bare_logits
    for row, with_adapter in enumerate(on):
        expected = alone if with_adapter else bare
        check(torch.allclose(mixed[row], expected[row], atol=ATOL, rtol=1e-4), "rows disturb each other")


OPERATIONS: dict[str, Callable[[Subject], None]] = {
    "forward": forward,
    "train": training,
    "greedy": greedy,
    "beams": beams,
    "sample": sampling,
    "save, load": saving,
    "padding": padding,
    "checkpointing": checkpointing,
    "take off": taking_off,
    "fold": folding,
    "mixed rows": mixing,
}
"""By the column's name; each raises where it does not hold."""
CHANGING = (training, checkpointing, taking_off, folding)
"""These leave the model another one."""


class Wrong(Exception):
    """An operation ran and did not hold."""


def check(held: bool, otherwise: str) -> None:
    """Raise if something does not hold."""
    if not held:
        raise Wrong(otherwise)


def counted(one: Subject) -> list[int]:
    """Grows by one at every call of a linear layer."""
    calls: list[int] = []

    def note(module: nn.Module, inputs: object, output: object) -> None:
        calls.append(1)

    for module in one.module.modules():
        if type(module).__name__ in ("Linear", "Conv1D"):  # GPT-2 has the latter
            module.register_forward_hook(note)
    return calls


@dataclass(frozen=True)
class Cell:
    """What came of one probe.

    Attributes:
        seen: `HELD`, refused, FAILS or -.
        said: The message, where there is one.
    """

    seen: str
    said: str = ""


def probe(architecture: str, method: str) -> dict[str, Cell]:
    """All operations of one method on one model."""
    made = ARCHITECTURES[architecture]
    built = attempted(partial(made, method))
    if built.seen != HELD:
        return dict.fromkeys(OPERATIONS, built)
    shared = made(method)
    return {
        name: attempted(partial(operation, shared.again() if operation in CHANGING else shared))
        for name, operation in OPERATIONS.items()
    }


def attempted(action: Callable[[], object]) -> Cell:
    """Do it, and say how that went."""
    try:
        action()
    except NotThere:
        return Cell("-")
    except Exception as error:  # all that can go wrong is what is asked for
        said = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, ValueError) and ours(error):
            return Cell("refused", said)
        return Cell("FAILS", f"{type(error).__name__}: {said}")
    return Cell(HELD)


def ours(error: BaseException) -> bool:
    """Whether this package raised it, on purpose."""
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    return raised_in.is_relative_to(PACKAGE)


Found = dict[tuple[str, str], dict[str, Cell]]
"""Cells by column, by model and method."""


def probe_all(
    architectures: Iterable[str] = ARCHITECTURES,
    methods: Sequence[str] = METHODS,
    tell: Callable[[str], object] = lambda line: None,
) -> Found:
    """Probe every method on every model."""
    found = {}
    for architecture in architectures:
        tell(architecture)
        for method in methods:
            found[architecture, method] = probe(architecture, method)
    return found


def failures(found: Found) -> list[str]:
    """A line for everything that failed."""
    return [
        f"{architecture}, {method}, {operation}: {cell.said}"
        for (architecture, method), cells in found.items()
        for operation, cell in cells.items()
        if cell.seen == "FAILS"
    ]


def table(found: Found) -> str:
    """Markdown: a row for each model and the methods that fare alike on it, and the messages below."""
    said = list(dict.fromkeys(cell.said for cells in found.values() for cell in cells.values() if cell.said))
    rows: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (architecture, method), cells in found.items():
        if all(cell.seen == "-" for cell in cells.values()):
            continue
        shown = tuple(
            f"{cell.seen} [{said.index(cell.said) + 1}]" if cell.said else cell.seen
            for cell in cells.values()
        )
        rows.setdefault((architecture, shown), []).append(method)
    lines = [(architecture, " ".join(methods), *shown) for (architecture, shown), methods in rows.items()]
    notes = "\n".join(f"{number}. {message}" for number, message in enumerate(said, 1))
    return markdown_table(["model", "methods", *OPERATIONS], lines) + (f"\n\n{notes}" if notes else "")


def split_at_marks(text: str) -> tuple[str, str, str]:
    """What stands before, between and behind the marks of a table.

    Raises:
        UsageError: If the marks are not there.
    """
    before, begin, rest = text.partition(BEGIN)
    inside, end, behind = rest.partition(END)
    if not (begin and end):
        raise UsageError(f"expected a table between {BEGIN} and {END}, found no such marks")
    return before + BEGIN, inside, END + behind
