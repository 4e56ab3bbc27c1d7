"""Readers of conversations: TRL's `messages` or prompt with completion, and LLaVA's `conversations`."""

import re
from collections.abc import Sequence
from typing import Any

from dept_vl._utils.errors import UsageError
from dept_vl.tasks.io.records import brief

PLACEHOLDER = re.compile(r"\s*<image>\s*")
USER, MODEL = ("user", "human"), ("assistant", "gpt", "model")
Pair = tuple[str, str | None, list[Any]]
"""Question, answer or None, and the images in the turns up to the question; None for a placeholder."""


def turns_of(record: dict[str, Any]) -> list[Any] | None:
    """Return the turns of a conversation, or None if the record is not a conversation."""
    for name in ("messages", "conversations", "conversation"):
        if isinstance(record.get(name), list):
            turns: list[Any] = record[name]
            return turns
    prompt, completion = record.get("prompt"), record.get("completion")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], dict):
        return [*prompt, *(completion if isinstance(completion, list) else [])]
    return None


def pairs_of(turns: Sequence[Any], where: str) -> list[Pair]:
    """Return the questions with their answers and images. System prompts are skipped."""
    pairs: list[Pair] = []
    images: list[Any] = []
    for number, turn in enumerate(turns, start=1):
        role, content = _turn(turn, f"{where}, turn {number}")
        text = _text(content, images, f"{where}, turn {number}")
        if role in USER:
            pairs.append((text, None, list(images)))
        elif role in MODEL and pairs and pairs[-1][1] is None:
            pairs[-1] = (pairs[-1][0], text, pairs[-1][2])
        elif role in MODEL:
            raise UsageError(f"{where}, turn {number}: expected a question before each answer")
        elif role != "system":
            raise UsageError(
                f"{where}, turn {number}: expected user, assistant or system, found {role!r:.60}"
            )
    if not pairs:
        raise UsageError(f"{where}: expected a question of the user, found none")
    return pairs


def _turn(turn: Any, where: str) -> tuple[str, Any]:
    if isinstance(turn, dict):
        role = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        if isinstance(role, str):
            return role, content
    raise UsageError(f"{where}: expected role and content, or from and value, found {brief(turn)}")


def _text(content: Any, images: list[Any], where: str) -> str:
    if isinstance(content, str):
        images += [None] * len(PLACEHOLDER.findall(content))
        return PLACEHOLDER.sub(" ", content).strip()
    texts = []
    for part in content if isinstance(content, list) else [None]:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(part, dict) and part.get("type") in ("image", "image_url"):
            given = next(
                (part[name] for name in ("image", "path", "url", "image_url") if part.get(name)), None
            )
            images.append(given["url"] if isinstance(given, dict) and "url" in given else given)
        else:
            raise UsageError(
                f"{where}: expected text or parts of type text and image, found {brief(content)}"
            )
    return PLACEHOLDER.sub(" ", " ".join(texts)).strip()
