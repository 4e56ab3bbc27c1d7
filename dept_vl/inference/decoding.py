"""Decoding of answers: free generation, or a choice from a list of candidates held in a token trie."""

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor

from dept_vl.models.tokens import style_of, target_ids, target_texts
from dept_vl.tasks.base import Decoding

Spelled = dict[str, tuple[tuple[int, ...], str]]
MOST_KNOWN = 1 << 17
"""Maximum number of answers whose token ids are cached."""
PLAIN_SUMS = {"length_penalty": 0.0, "early_stopping": False}
"""Compare plain sums, or long candidates would be favoured; search while a better one is possible."""
_KNOWN: WeakKeyDictionary[Any, Spelled] = WeakKeyDictionary()


def tokens_of(tokenizer: Any, answers: Sequence[str]) -> list[tuple[tuple[int, ...], str]]:
    """Return the token ids of answers, tokenised like training targets, and the text that they decode to."""
    known = _KNOWN.setdefault(tokenizer, {})
    # Another thread may clear what is known meanwhile.
    found = {answer: spelled for answer in answers if (spelled := known.get(answer)) is not None}
    new = [answer for answer in dict.fromkeys(answers) if answer not in found]
    if new:
        for answer, ids in zip(new, target_ids(tokenizer, new), strict=True):
            found[answer] = tuple(ids), target_texts(tokenizer, torch.tensor([ids]))[0]
        if len(known) + len(new) > MOST_KNOWN:
            known.clear()
        known |= found
    return [found[answer] for answer in answers]


def generation_options(decoding: Decoding, tokenizer: Any) -> dict[str, Any]:
    """Return keyword arguments for `generate`, without special token ids.

    The generation settings of the checkpoint are not used, see `models.generation`.

    With candidates, greedy search follows their trie. For two words (NLVR2) it compares the logits of the
    first token in which they differ. Beam search returns the candidate with the highest total
    log-probability among those that the beams reach: all of them, with as many beams as candidates.
    """
    options: dict[str, Any] = {"num_beams": decoding.num_beams, "max_new_tokens": decoding.max_new_tokens}
    if decoding.candidates:
        trie = Trie(tokenizer, decoding.candidates)
        options |= {"prefix_allowed_tokens_fn": trie, "max_new_tokens": trie.depth}
        if decoding.num_beams > 1:
            options |= PLAIN_SUMS
    return options


def choice_options(choices: Sequence[Sequence[str]], tokenizer: Any) -> dict[str, Any]:
    """Return keyword arguments for `generate` if each row has a list of choices of its own.

    There are as many beams as the longest list has choices, so the most probable choice of a row wins.
    """
    tries = [Trie(tokenizer, of_row) for of_row in choices]

    def allowed(batch_id: int, tokens: Int[Tensor, " target"]) -> list[int]:
        return tries[batch_id](batch_id, tokens)

    return {
        "num_beams": max(map(len, choices)),
        "max_new_tokens": max(trie.depth for trie in tries),
        "prefix_allowed_tokens_fn": allowed,
        **PLAIN_SUMS,
    }


class Trie:
    """Trie of candidate answers, for the argument `prefix_allowed_tokens_fn` of `generate`.

    Candidates are tokenised like training targets; the longest has `depth` tokens. ValueError if there are
    none.
    """

    def __init__(self, tokenizer: Any, candidates: Sequence[str]) -> None:
        if not candidates:
            raise ValueError("expected at least one candidate answer, found none")
        sequences = [ids for ids, _ in tokens_of(tokenizer, candidates)]
        following: dict[tuple[int, ...], dict[int, None]] = {}
        for ids in sequences:
            for length in range(len(ids)):
                following.setdefault(ids[:length], {})[ids[length]] = None
        self.following = {prefix: list(tokens) for prefix, tokens in following.items()}
        self.depth = max(map(len, sequences))
        self.padding = [tokenizer.pad_token_id]
        self.start = style_of(tokenizer).start

    def __call__(self, batch_id: int, tokens: Int[Tensor, " target"]) -> list[int]:
        """Return the token ids that may follow; padding after a complete candidate."""
        return self.following.get(tuple(tokens[self.start :].tolist()), self.padding)


def spellings(tokenizer: Any, candidates: Sequence[str]) -> dict[str, str]:
    """Return candidates by the text that their token ids decode to.

    The two differ if the tokenizer lacks a character or adds spaces within a word.
    """
    pairs = zip(tokens_of(tokenizer, candidates), candidates, strict=True)
    return {text: candidate for (_, text), candidate in pairs}
