"""How answers are decoded: freely, or among a list of candidates held in a trie of tokens."""

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor

from dept_vl.models.tokens import start_tokens, target_ids, target_texts
from dept_vl.tasks.base import Decoding

Spelled = dict[str, tuple[tuple[int, ...], str]]
MOST_KNOWN = 1 << 17
"""Answers whose tokens are kept."""
_KNOWN: WeakKeyDictionary[Any, Spelled] = WeakKeyDictionary()


def tokens_of(tokenizer: Any, answers: Sequence[str]) -> list[tuple[tuple[int, ...], str]]:
    """Return the tokens of answers, as in training targets, and the text that they decode to; cache both."""
    known = _KNOWN.setdefault(tokenizer, {})
    found = {answer: known[answer] for answer in answers if answer in known}
    new = [answer for answer in dict.fromkeys(answers) if answer not in found]
    if new:
        for answer, ids in zip(new, target_ids(tokenizer, new), strict=True):
            found[answer] = tuple(ids), target_texts(tokenizer, torch.tensor([ids]))[0]
        if len(known) + len(new) > MOST_KNOWN:
            known.clear()
        known |= found
    return [found[answer] for answer in answers]


def generation_options(decoding: Decoding, tokenizer: Any) -> dict[str, Any]:
    """Return the generation settings of a decoding, without the token ids of the model.

    What is not said here is greedy search or plain beam search: a checkpoint's own settings do not count
    (see `models.generation`).

    Among candidates, greedy search walks down their trie, which for two words compares the logits of
    the first token in which they differ (NLVR2). With beams the candidate of the highest total
    log-probability wins among those that the beams reach: with as many beams as candidates, of all.
    """
    options: dict[str, Any] = {"num_beams": decoding.num_beams, "max_new_tokens": decoding.max_new_tokens}
    if decoding.candidates:
        trie = Trie(tokenizer, decoding.candidates)
        options |= {"prefix_allowed_tokens_fn": trie, "max_new_tokens": trie.depth}
        if decoding.num_beams > 1:
            # The plain sum, or long candidates would be favoured; and on while a better one may come.
            options |= {"length_penalty": 0.0, "early_stopping": False}
    return options


def choice_options(choices: Sequence[Sequence[str]], tokenizer: Any) -> dict[str, Any]:
    """Return the generation settings for rows that each choose from a list.

    As many beams as there are choices at most: so the one of the highest total log-probability wins.
    """
    tries = [Trie(tokenizer, of_row) for of_row in choices]

    def allowed(batch_id: int, tokens: Int[Tensor, " target"]) -> list[int]:
        return tries[batch_id](batch_id, tokens)

    return {
        "num_beams": max(map(len, choices)),
        "max_new_tokens": max(trie.depth for trie in tries),
        "prefix_allowed_tokens_fn": allowed,
        "length_penalty": 0.0,
        "early_stopping": False,
    }


class Trie:
    """The tokens that may follow those decoded so far; `generate`'s `prefix_allowed_tokens_fn`.

    Candidates are tokenised as training targets are.

    Attributes:
        depth: Tokens of the longest candidate.

    Raises:
        ValueError: If there is no candidate.
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
        self.start = start_tokens(tokenizer)

    def __call__(self, batch_id: int, tokens: Int[Tensor, " target"]) -> list[int]:
        """Return the token ids that may come next; padding after a finished candidate."""
        return self.following.get(tuple(tokens[self.start :].tolist()), self.padding)


def spellings(tokenizer: Any, candidates: Sequence[str]) -> dict[str, str]:
    """Decoded text -> the candidate that it stands for.

    A tokenizer that lacks a character, or puts spaces between the pieces of a word, does not give a
    candidate back as it was.
    """
    pairs = zip(tokens_of(tokenizer, candidates), candidates, strict=True)
    return {text: candidate for (_, text), candidate in pairs}
