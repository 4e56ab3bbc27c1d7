"""Check for training targets that the tokenizer cannot reproduce or that are truncated."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from dept_vl._utils.errors import UsageError
from dept_vl.data.splits import Splits
from dept_vl.models.tokens import target_ids, target_texts
from dept_vl.tasks.base import Task

EXAMPLES = 20_000
"""Approximate number of examples to check, spread over the training split."""
AT_ONCE = 5_000
SHOWN = 3
FEWEST = 10
"""Minimum number of answers for which the lost share is checked."""
LONGEST = 256
"""Maximum length of a target, in tokens, unless the options set another."""


@dataclass(frozen=True)
class Lost:
    """Statistics of lost answers."""

    answers: int  # number of checked answers, with repetitions
    unwritable: Counter[str]  # count by answer that tokenising changes, or whose tokens another candidate has
    cut: Counter[str]  # count by answer that is longer than the limit
    longest: int  # length of the longest answer in tokens, including the end token

    @property
    def share(self) -> float:
        """Share of the answers that are lost."""
        return (self.unwritable | self.cut).total() / max(1, self.answers)


def look_at_answers(task: Task, tokenizer: Any, limit: int) -> Lost:
    """Tokenise and decode the training targets, and return what is lost. A limit of 0 is `LONGEST`."""
    counts = task.target_counts(EXAMPLES)
    texts = list(counts)
    unwritable, cut = Counter[str](), Counter[str]()
    longest = 0
    for start in range(0, len(texts), AT_ONCE):
        some = texts[start : start + AT_ONCE]
        ids = target_ids(tokenizer, some)
        back = [target_texts(tokenizer, torch.tensor([one]))[0] for one in ids]
        for text, tokens, again in zip(some, ids, back, strict=True):
            longest = max(longest, len(tokens))
            if len(tokens) > (limit or LONGEST):
                cut[text] = counts[text]
            # Spaces are ignored, since some tokenizers add them around punctuation.
            elif "".join(again.split()) != "".join(text.split()):
                unwritable[text] = counts[text]
    return Lost(counts.total(), unwritable, cut, longest)


def look_at_candidates(task: Task, tokenizer: Any, candidates: Sequence[str], limit: int) -> Lost:
    """Return the lost candidates: those that are truncated or have the same tokens as another one."""
    counts = task.target_counts(EXAMPLES)
    tokens = dict(zip(candidates, map(tuple, target_ids(tokenizer, candidates)), strict=True))
    shared = Counter(tokens.values())
    known = {text: count for text, count in counts.items() if text in tokens}
    return Lost(
        counts.total(),
        Counter({text: count for text, count in known.items() if shared[tokens[text]] > 1}),
        Counter({text: count for text, count in known.items() if len(tokens[text]) > (limit or LONGEST)}),
        max(map(len, tokens.values())),
    )


def fit_answers(splits: Splits, tokenizer: Any) -> tuple[Splits, list[str]]:
    """Set the maximum prediction length of a task; UsageError if more than `max_lost_answers` are lost.

    Returns:
        The splits with the new length in their decoding, and lines about lost answers to print.
    """
    options, decoding, task = splits.options, splits.decoding, splits.train
    limit = options.max_answer_tokens
    if not limit and not task.fits_answers:
        limit = decoding.max_new_tokens
    if decoding.candidates:  # candidates are never decoded from tokens
        lost = look_at_candidates(task, tokenizer, decoding.candidates, limit)
        unwritable = "have the same tokens as others, from which they cannot be told apart"
    else:
        lost, unwritable = look_at_answers(task, tokenizer, limit), "cannot be written back by the tokenizer"
    if not limit:
        limit = min(lost.longest, LONGEST)
    lines = [
        f"warning: {counts.total():,} of {lost.answers:,} training answers of {task.name} looked at {what}, "
        f"such as {', '.join(repr(text)[:60] for text, _ in counts.most_common(SHOWN))}{cure}"
        for counts, what, cure in (
            (
                lost.cut,
                f"have more than {limit} tokens and are cut",
                "; --max_answer_tokens takes longer ones",
            ),
            (lost.unwritable, unwritable, ""),
        )
        if counts
    ]
    if lost.answers >= FEWEST and lost.share > options.max_lost_answers:
        raise UsageError(
            f"{lost.share:.0%} of the training answers of {task.name} are lost, more than "
            f"--max_lost_answers {options.max_lost_answers}: "
            f"{'; '.join(line.removeprefix('warning: ') for line in lines)}. Take a language "
            "model whose tokenizer knows them, raise --max_answer_tokens, or raise --max_lost_answers"
        )
    return replace(splits, decoding=replace(decoding, max_new_tokens=limit)), lines
