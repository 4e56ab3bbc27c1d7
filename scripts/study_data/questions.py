"""Questions about scenes, with exact answers.

A family is a function `(scene, rng) -> Fact`, which returns the words for a wording's slots and the answer,
or None if the question does not fit the scene. `wordings.json` has the wordings. No family of `KEPT_OUT` is
used in pretraining (`scripts/pretraining`), so that a prompt can learn it.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

from study_data.render import COLOURS, SHAPES, SIZES, Object, Scene

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
NOUNS = ("shape", "object", "thing", "item")
"""Nouns for any object."""


class QA(NamedTuple):
    """A source text and its target text."""

    source_text: str
    target_text: str


class Fact(NamedTuple):
    """Words for a wording's slots, and the answer."""

    slots: tuple[str, ...]
    answer: str


Family = Callable[[Scene, Random], Fact | None]

YES, TRUE, POSITIVE = ("no", "yes"), ("false", "true"), ("negative", "positive")
"""Answers by truth value."""


def name(item: Object, attributes: Sequence[str], rng: Random) -> str:
    """Return a noun phrase with these attributes, such as `red circle` or `large thing`."""
    words = [getattr(item, a) for a in ("size", "colour") if a in attributes]
    noun = item.shape if "shape" in attributes else rng.choice(NOUNS)
    return " ".join([*words, noun])


def noun(item: Object) -> str:
    """Return colour and shape."""
    return f"{item.colour} {item.shape}"


def matches(item: Object, wanted: dict[str, str]) -> bool:
    """Return whether an object has all of these attributes."""
    return all(getattr(item, key) == value for key, value in wanted.items())


def referring(scene: Scene, item: Object, rng: Random, hide: str = "") -> str | None:
    """Return a phrase that fits only this object and does not mention the attribute `hide`, or None."""
    usable = [a for a in ("colour", "shape", "size") if a != hide]
    choices = [[a] for a in usable] + [[a, b] for i, a in enumerate(usable) for b in usable[i + 1 :]]
    if len(scene.objects) == 1:
        choices.append([])
    rng.shuffle(choices)
    for attributes in sorted(choices, key=len) if rng.random() < 0.5 else choices:
        wanted = {a: getattr(item, a) for a in attributes}
        if sum(matches(other, wanted) for other in scene.objects) == 1:
            return name(item, attributes, rng)
    return None


def random_phrase(scene: Scene, rng: Random) -> tuple[str, dict[str, str]]:
    """Return a phrase that fits some object in about half of all cases, and its attributes.

    Half of the changed phrases differ from an object in at most one attribute, as hard negatives.
    """
    attributes = rng.choice([["colour"], ["shape"], ["shape"], ["colour", "shape"], ["size", "shape"]])
    item = rng.choice(scene.objects)
    wanted = {a: getattr(item, a) for a in attributes}
    if rng.random() < FALSE_PHRASES:
        for a in [rng.choice(attributes)] if rng.random() < 0.5 else attributes:
            wanted[a] = rng.choice(list(VALUES[a]))
    words = [wanted[a] for a in ("size", "colour") if a in wanted]
    return " ".join([*words, wanted.get("shape", rng.choice(NOUNS))]), wanted


FALSE_PHRASES = 0.6
"""Share of changed phrases. Some fit another object, so about half of all phrases fit no object."""

VALUES: dict[str, Sequence[str]] = {"colour": list(COLOURS), "shape": SHAPES, "size": list(SIZES)}


def about(answer: Callable[[Object], str], hide: str = "") -> Family:
    """Return a family that asks about an object by a phrase without the attribute `hide`."""

    def ask_about(scene: Scene, rng: Random) -> Fact | None:
        item = rng.choice(scene.objects)
        phrase = referring(scene, item, rng, hide)
        return None if phrase is None else Fact((phrase,), answer(item))

    return ask_about


def lone(answer: Callable[[Object], str]) -> Family:
    """Return a family that asks about the only object of a scene."""
    return lambda scene, rng: Fact((), answer(scene.objects[0])) if len(scene.objects) == 1 else None


def judged(sentence: Callable[[Scene, Random], tuple[str, bool]], words: Sequence[str]) -> Family:
    """Return a family that asks whether a sentence is true, with one of two words as the answer."""

    def ask_judged(scene: Scene, rng: Random) -> Fact:
        text, truth = sentence(scene, rng)
        return Fact((text,), words[truth])

    return ask_judged


def exists(scene: Scene, rng: Random) -> tuple[str, bool]:
    """Return a phrase, and whether it fits an object."""
    phrase, wanted = random_phrase(scene, rng)
    return phrase, any(matches(o, wanted) for o in scene.objects)


def absent(scene: Scene, rng: Random) -> tuple[str, bool]:
    """Return a phrase, and whether it fits no object."""
    phrase, found = exists(scene, rng)
    return phrase, not found


RELABELLED = dict(zip(SHAPES, NUMBERS, strict=False))
"""Arbitrary code for each shape."""
MANY = 3


def _odd_one_out(scene: Scene, rng: Random) -> Fact | None:
    shapes = [o.shape for o in scene.objects]
    single = [shape for shape in shapes if shapes.count(shape) == 1]
    return Fact((), single[0]) if len(shapes) > 2 and len(single) == 1 else None


def _many_or_few(scene: Scene, rng: Random) -> Fact:
    return Fact((), "many" if len(scene.objects) >= MANY else "few")


_NEW: dict[str, Family] = {
    # easy-VQA's templates and answer style: yes, no, and bare colours and shapes.
    "is there": judged(exists, YES),
    "is there not": judged(absent, YES),
    "what color": about(lambda o: o.colour, "colour"),
    "what is": about(lambda o: o.shape, "shape"),
    "what shape": lone(lambda o: o.shape),
    # A new rule, a new judgement, new labels, a new answer style.
    "odd one out": _odd_one_out,
    "many or few": _many_or_few,
    "relabelled shapes": lone(lambda o: RELABELLED[o.shape]),
    "positive or negative": judged(exists, POSITIVE),
}
_WORDINGS = json.loads((Path(__file__).parent / "wordings.json").read_text(encoding="utf-8"))
KEPT_OUT: dict[str, tuple[Family, list[str]]] = {
    name: (family, _WORDINGS[name]) for name, family in _NEW.items()
}
"""Families that are not used in pretraining, for prompts to learn. Their answer words are targets of other
families, since with tied embeddings no prompt can elicit a word that was never a target."""

CODES = dict(zip(SHAPES, ("left", "right", "top", "bottom", "small", "large"), strict=True))
"""Arbitrary code for each shape, of words that VQA's normalisation does not change (unlike number words)."""


def ask_code(scene: Scene, rng: Random) -> QA:
    """Return a question for the code of the first object's shape, for scenes with one object."""
    return QA(rng.choice(KEPT_OUT["relabelled shapes"][1]), CODES[scene.objects[0].shape])


def ask_kept_out(scene: Scene, rng: Random, names: Sequence[str] = tuple(KEPT_OUT)) -> QA:
    """Return a question that is not used in pretraining."""
    while True:
        family, wordings = KEPT_OUT[rng.choice(names)]
        fact = family(scene, rng)
        if fact is not None:
            return QA(rng.choice(wordings).format(*fact.slots), fact.answer)


def pair_statement(left: Scene, right: Scene, rng: Random) -> tuple[str, bool]:
    """Return a sentence about two images and whether it is true."""
    phrase, wanted = random_phrase(rng.choice([left, right]), rng)
    counts = [sum(matches(o, wanted) for o in scene.objects) for scene in (left, right)]
    in_left, in_right = (count > 0 for count in counts)
    said = rng.randint(0, 4)
    sentence, truth = rng.choice(
        [
            ("both images show a {}", in_left and in_right),
            ("a {} is in each image", in_left and in_right),
            ("neither image shows a {}", not (in_left or in_right)),
            ("exactly one image contains a {}", in_left != in_right),
            ("the left image contains a {}", in_left),
            ("the right image contains a {}", in_right),
            ("at least one image contains a {}", in_left or in_right),
            ("there are {}s in the left image only", in_left and not in_right),
            ("the left image has more {}s", counts[0] > counts[1]),
            (f"there are {NUMBERS[sum(counts)]} {{}}s in all", True),
            (f"there are {NUMBERS[said]} {{}}s in all", said == sum(counts)),
        ]
    )
    return sentence.format(phrase), truth


def listings(scene: Scene) -> list[str]:
    """Return five captions in a style not used in pretraining: the objects without size or place."""
    things = [noun(o) for o in scene.objects]
    nouns = [f"a {thing}" for thing in things]
    return [
        " and ".join(nouns),
        f"a picture of {' and '.join(nouns)}",
        f"there is {', '.join(nouns)}",
        ", ".join(things),
        f"{NUMBERS[len(things)]} shapes: {', '.join(things)}",
    ]
