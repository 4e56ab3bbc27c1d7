"""Commands of `dept-vl data`: convert data to the official files that the tasks read, and check them."""

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from dept_vl._utils.io import write_json
from dept_vl._utils.printable import printable, say
from dept_vl.tasks.io.files import find
from dept_vl.tasks.io.records import brief, field, read_list
from dept_vl.tasks.metrics.vqa import normalise_answer

if TYPE_CHECKING:  # Help imports no task: these cost as much as all else.
    from dept_vl.tasks.prepare.check import Finding

USUAL_FROM = 9
"""Minimum number of questions in train and val with a usual answer for it to be in the published list."""
SHOWN = 20
"""Maximum number of missing or broken files to print, for each status; --report names them all."""


def print_findings(findings: Iterable["Finding"], report: Path | None) -> bool:
    """Print the first findings of each status, write all to a file, and return whether all are good."""
    lines: list[str] = []
    counts: Counter[str] = Counter()
    good = True
    for finding in findings:
        line = f"{finding.status:<8} {finding.what}"
        lines.append(printable(line))
        counts[finding.status] += 1
        good &= finding.good
        if finding.good or counts[finding.status] <= SHOWN:
            say(line)
    for status, count in counts.items():
        if status in ("missing", "broken", "differs") and count > SHOWN:
            say(f"{status:<8} {count - SHOWN:,} more; --report FILE names them all")
    if report is not None:
        report.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return good


def answer_list(root: Path, floor: int = USUAL_FROM, output: Path | None = None) -> None:
    """Rebuild the answer list for `--answer_labels published` from VQAv2's annotations.

    Args:
        root: Folder with the annotations of train and val.
        floor: Minimum number of questions with the same usual answer; 9 is published.
        output: File to write. Default: answer_list.json in the folder, which runs on it then use.
    """
    from dept_vl.tasks.vqav2 import ANSWER_LIST, PUBLISHED_LIST, read_answer_list

    answers = usual_answers(root, floor)
    published = set(read_answer_list(PUBLISHED_LIST))
    output = output or root / ANSWER_LIST
    write_json(output, answers, indent=0)
    say(
        f"{len(answers):,} answers in {output}: {len(published & set(answers)):,} of the {len(published):,} "
        f"published ones, {len(set(answers) - published):,} others"
    )


def usual_answers(root: Path, floor: int = USUAL_FROM) -> list[str]:
    """Return the sorted answers that are the usual answer of at least `floor` questions of train and val.

    As in the published list (Teney et al. 2018, as in LXMERT), usual answers are those named in the
    annotation files (`multiple_choice_answer`), normalised. Raises ValueError if there is no such answer.
    """
    from dept_vl.tasks.vqav2 import ANSWERED, SOURCE, annotation_names

    counts: Counter[str] = Counter()
    for subtype in ANSWERED:
        path = find(root, annotation_names(subtype), "VQAv2", SOURCE)
        for row in read_list(path, "annotations", SOURCE):
            where = f"{path}, question {brief(row.get('question_id'))}"
            counts[normalise_answer(field(row, "multiple_choice_answer", str, where))] += 1
    chosen = sorted(answer for answer, count in counts.items() if count >= floor)
    if not chosen:
        raise ValueError(
            f"no answer in {root} is the usual one of {floor} questions or more; the commonest is that of "
            f"{max(counts.values(), default=0)}: lower --floor"
        )
    return chosen


def from_hub(task: str, split: str, output_dir: Path, source: str = "") -> None:
    """Write a split's official files and images from a parquet copy on the Hub, or in a folder.

    Args:
        task: vqav2, gqa, nlvr2 or coco.
        split: Name of the split in the task's own terms; all for coco, whose one file holds every split.
        output_dir: Folder to write, or to add to.
        source: Name on the Hub, or folder with the copy. Default: the task's usual copy.
    """
    from dept_vl.tasks.prepare.copies import fetch

    for kind, count in fetch(task, source, output_dir, split=split).items():
        say(f"{kind:<22}{count:>9,}")


COMMANDS: dict[str, Callable[..., None]] = {
    "answer-list": answer_list,
    "from-hub": from_hub,
}
"""Commands by name; their arguments are flags. `cli` adds `check`."""
