"""Small tasks on words alone: pretraining without an image."""

from random import Random

from dept_vl.tasks.scenes.questions import NOUNS, NUMBERS, QA
from dept_vl.tasks.scenes.render import COLOURS, SHAPES, SIZES

OPPOSITES = {
    "left": "right",
    "top": "bottom",
    "small": "large",
    "yes": "no",
    "true": "false",
    "above": "below",
    "more": "fewer",
    "many": "few",
    "good": "bad",
    "positive": "negative",
}
OPPOSITES |= {opposite: word for word, opposite in OPPOSITES.items()}
KINDS = {
    **dict.fromkeys(COLOURS, "color"),
    **dict.fromkeys(SHAPES, "shape"),
    **dict.fromkeys(SIZES, "size"),
    **dict.fromkeys(NUMBERS, "number"),
}
WORDS = sorted({*OPPOSITES, *KINDS, *NOUNS, "center", "nothing", "object", "image"})


def ask_text(rng: Random) -> QA:
    """A task without an image. Every answer word is a target somewhere, or no prompt could elicit it."""
    words = [rng.choice(WORDS) for _ in range(rng.randint(1, 4))]
    listed = " ".join(words)
    kind = rng.randrange(6)
    if kind == 0:
        return QA(f"repeat: {listed}", listed)
    if kind == 1:
        end = rng.choice(["first", "last"])
        return QA(f"{end} word: {listed}", words[0] if end == "first" else words[-1])
    if kind == 2:
        word = rng.choice(list(OPPOSITES))
        return QA(rng.choice(["opposite of {}?", "not {} but"]).format(word), OPPOSITES[word])
    if kind == 3:
        word = rng.choice(list(KINDS))
        return QA(rng.choice(["what kind of word is {}?", "{} is a"]).format(word), KINDS[word])
    if kind == 4:
        return QA(f"how many words: {listed}", NUMBERS[len(words)])
    probe = rng.choice([rng.choice(WORDS), rng.choice(words)])
    return QA(f"is {probe} in: {listed}", "yes" if probe in words else "no")
