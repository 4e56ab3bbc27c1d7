"""Questions about scenes, with exact answers.

A family is a function `(scene, rng) -> Fact`, which returns the words for a wording's slots and the answer,
or None if the question does not fit the scene. `wordings.json` has the wordings: those in `PHRASINGS` are
used in pretraining, those in `KEPT_OUT` are not.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

from dept_vl.tasks.scenes.render import COLOURS, IMAGE_SIZE, SHAPES, SIZES, Object, Scene

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

WORDINGS = json.loads((Path(__file__).parent / "wordings.json").read_text(encoding="utf-8"))
PHRASINGS: dict[str, list[str]] = WORDINGS["shown"]
"""Wordings for pretraining, by family."""
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


def place(item: Object) -> str:
    """Return the location in thirds of the image: `top left`, `center`, `bottom` and so on."""
    third = IMAGE_SIZE / 3
    row = ("top", "", "bottom")[min(2, int(item.y / third))]
    column = ("left", "", "right")[min(2, int(item.x / third))]
    return f"{row} {column}".strip() or "center"


RELATIONS: dict[str, Callable[[Object, Object], bool]] = {
    "left of": lambda a, b: a.x < b.x,
    "right of": lambda a, b: a.x > b.x,
    "above": lambda a, b: a.y < b.y,
    "below": lambda a, b: a.y > b.y,
}
CLEAR_DISTANCE = 8
"""Minimum distance in pixels between two centres for a clear relation."""


def clear(relation: str, a: Object, b: Object) -> bool:
    """Return whether the relation, or its opposite, is clearly visible."""
    apart = abs(a.x - b.x) if relation in ("left of", "right of") else abs(a.y - b.y)
    return apart >= CLEAR_DISTANCE


def _about(answer: Callable[[Object], str], hide: str = "") -> Family:
    """Return a family that asks about an object by a phrase without the attribute `hide`."""

    def ask_about(scene: Scene, rng: Random) -> Fact | None:
        item = rng.choice(scene.objects)
        phrase = referring(scene, item, rng, hide)
        return None if phrase is None else Fact((phrase,), answer(item))

    return ask_about


def _lone(answer: Callable[[Object], str]) -> Family:
    """Return a family that asks about the only object of a scene."""
    return lambda scene, rng: Fact((), answer(scene.objects[0])) if len(scene.objects) == 1 else None


def _judged(sentence: Callable[[Scene, Random], tuple[str, bool]], words: Sequence[str]) -> Family:
    """Return a family that asks whether a sentence is true, with one of two words as the answer."""

    def ask_judged(scene: Scene, rng: Random) -> Fact:
        text, truth = sentence(scene, rng)
        return Fact((text,), words[truth])

    return ask_judged


def _exists(scene: Scene, rng: Random) -> tuple[str, bool]:
    phrase, wanted = random_phrase(scene, rng)
    return phrase, any(matches(o, wanted) for o in scene.objects)


def _absent(scene: Scene, rng: Random) -> tuple[str, bool]:
    phrase, found = _exists(scene, rng)
    return phrase, not found


def statement(scene: Scene, rng: Random) -> tuple[str, bool]:
    """Return a sentence about a scene and whether it is true."""
    phrase, wanted = random_phrase(scene, rng)
    count = sum(matches(o, wanted) for o in scene.objects)
    kind = rng.randrange(5)
    if kind == 0:
        text = rng.choice(["there is a {}", "the image contains a {}", "a {} is present"])
        return text.format(phrase), count > 0
    if kind == 1:
        text = rng.choice(
            ["there is no {}", "the image does not contain a {}", "a {} is not present", "no {} is there"]
        )
        return text.format(phrase), count == 0
    if kind == 2:
        said = count if rng.random() < 0.5 else rng.randint(0, 4)
        return f"there are {NUMBERS[said]} {phrase}s", said == count
    if kind == 3:
        item = rng.choice(scene.objects)
        x, y = rng.uniform(0, IMAGE_SIZE - 1), rng.uniform(0, IMAGE_SIZE - 1)
        said_place = place(rng.choice([item, Object("", "", "", x, y, 0.0, 0.0)]))
        return f"the {name(item, ['colour', 'shape'], rng)} is at the {said_place}", any(
            place(o) == said_place for o in scene.objects if o.colour == item.colour and o.shape == item.shape
        )
    said = len(scene.objects) if rng.random() < 0.5 else rng.randint(1, 4)
    return f"there are {NUMBERS[said]} objects in the image", said == len(scene.objects)


def _count(scene: Scene, rng: Random) -> Fact:
    phrase, wanted = random_phrase(scene, rng)
    if rng.random() < 0.4:
        phrase, wanted = rng.choice(NOUNS), {}
    return Fact((phrase,), NUMBERS[sum(matches(o, wanted) for o in scene.objects)])


def _two(scene: Scene, rng: Random, relation: str) -> tuple[tuple[Object, Object], tuple[str, str]] | None:
    """Return two objects that are in a clear relation, and a phrase for each; None if there are none."""
    if len(scene.objects) < 2:
        return None
    a, b = rng.sample(scene.objects, 2)
    if not clear(relation, a, b):
        return None
    first, second = referring(scene, a, rng), referring(scene, b, rng)
    return None if first is None or second is None else ((a, b), (first, second))


def _relation(scene: Scene, rng: Random) -> Fact | None:
    relation = rng.choice(list(RELATIONS))
    named = _two(scene, rng, relation)
    if named is None:
        return None
    pair, phrases = named
    return Fact((*phrases, relation), YES[RELATIONS[relation](*pair)])


def _beside(scene: Scene, rng: Random) -> tuple[tuple[str, str], Object | None] | None:
    """Return a phrase and relation that hold for at most one object, and that object; None if impossible."""
    relation = rng.choice(list(RELATIONS))
    item = rng.choice(scene.objects)
    phrase = referring(scene, item, rng)
    others = [o for o in scene.objects if o is not item]
    if phrase is None or not all(clear(relation, o, item) for o in others):
        return None
    found = [o for o in others if RELATIONS[relation](o, item)]
    return None if len(found) > 1 else ((phrase, relation), found[0] if found else None)


def _neighbour(scene: Scene, rng: Random) -> Fact | None:
    asked = _beside(scene, rng)
    if asked is None or (asked[1] is None and rng.random() < 0.8):  # a lone object has four empty sides
        return None
    slots, found = asked
    return Fact(slots, noun(found) if found else "nothing")


def _neighbour_colour(scene: Scene, rng: Random) -> Fact | None:
    asked = _beside(scene, rng)
    return None if asked is None or asked[1] is None else Fact(asked[0], asked[1].colour)


def _more(scene: Scene, rng: Random) -> Fact:
    (first, wants), (second, wants_second) = random_phrase(scene, rng), random_phrase(scene, rng)
    difference = sum(matches(o, wants) - matches(o, wants_second) for o in scene.objects)
    return Fact((first, second), YES[difference > 0])


def _same(scene: Scene, rng: Random) -> Fact | None:
    if len(scene.objects) != 2:
        return None
    attribute = rng.choice(list(VALUES))
    a, b = (getattr(o, attribute) for o in scene.objects)
    word = "color" if attribute == "colour" else attribute
    return Fact((word,), YES[a == b])


SIDES = {"left": "left of", "right": "right of", "top": "above", "bottom": "below"}
"""Relation of the object that is further to a side, by side."""


def _extreme(scene: Scene, rng: Random) -> Fact | None:
    side = rng.choice(list(SIDES))
    ordered = sorted(scene.objects, key=lambda o: o.x if side in ("left", "right") else o.y)
    if side in ("right", "bottom"):
        ordered.reverse()
    if len(ordered) > 1 and not clear(SIDES[side], ordered[0], ordered[1]):
        return None
    return Fact((side,), noun(ordered[0]))


def _distance(scene: Scene, rng: Random) -> Fact | None:
    """Ask for the distance from the opposite side, in eighths of the image."""
    item, side = rng.choice(scene.objects), rng.choice(list(SIDES))
    phrase = referring(scene, item, rng)
    if phrase is None:
        return None
    eighth = int((item.x if side in ("left", "right") else item.y) * 8 / IMAGE_SIZE)
    return Fact((side, phrase), NUMBERS[eighth if side in ("right", "bottom") else 7 - eighth])


def _further(scene: Scene, rng: Random) -> Fact | None:
    side, relation = rng.choice(list(SIDES.items()))
    named = _two(scene, rng, relation)
    if named is None:
        return None
    pair, phrases = named
    further = pair[0] if RELATIONS[relation](*pair) else pair[1]
    return Fact((side, *phrases, relation), noun(further))


FAMILIES: dict[str, tuple[Family, float]] = {
    "colour": (_about(lambda o: f"it is {o.colour}", "colour"), 2.0),
    "shape": (_about(lambda o: o.shape, "shape"), 2.0),
    "only_shape": (_lone(lambda o: f"it is a {o.shape}"), 2.0),
    "size": (_about(lambda o: o.size, "size"), 0.7),
    "place": (_about(place), 1.0),
    "exists": (_judged(_exists, TRUE), 4.0),
    "absent": (_judged(_absent, TRUE), 4.0),
    "statement": (_judged(statement, TRUE), 1.0),
    "tag": (_judged(statement, YES), 2.0),
    "count": (_count, 1.5),
    "relation": (_relation, 1.5),
    "neighbour": (_neighbour, 0.7),
    "neighbour colour": (_neighbour_colour, 1.0),
    "more": (_more, 0.5),
    "same": (_same, 0.7),
    "extreme": (_extreme, 0.7),
    "distance": (_distance, 1.0),
    "further": (_further, 1.0),
    "describe": (_lone(lambda o: f"{o.size} {noun(o)}"), 0.7),
}
"""Families of questions about one image, with their weights in pretraining."""


RELABELLED = dict(zip(SHAPES, NUMBERS, strict=False))
"""Arbitrary code for each shape."""
MANY = 3


def _odd_one_out(scene: Scene, rng: Random) -> Fact | None:
    shapes = [o.shape for o in scene.objects]
    lone = [shape for shape in shapes if shapes.count(shape) == 1]
    return Fact((), lone[0]) if len(shapes) > 2 and len(lone) == 1 else None


def _many_or_few(scene: Scene, rng: Random) -> Fact:
    return Fact((), "many" if len(scene.objects) >= MANY else "few")


_NEW: dict[str, Family] = {
    # easy-VQA's templates and answer style: yes, no, and bare colours and shapes.
    "is there": _judged(_exists, YES),
    "is there not": _judged(_absent, YES),
    "what color": _about(lambda o: o.colour, "colour"),
    "what is": _about(lambda o: o.shape, "shape"),
    "what shape": _lone(lambda o: o.shape),
    # A new rule, a new judgement, new labels, a new answer style.
    "odd one out": _odd_one_out,
    "many or few": _many_or_few,
    "relabelled shapes": _lone(lambda o: RELABELLED[o.shape]),
    "positive or negative": _judged(_exists, POSITIVE),
}
KEPT_OUT: dict[str, tuple[Family, list[str]]] = {
    name: (family, WORDINGS["kept out"][name]) for name, family in _NEW.items()
}
"""Families that are not used in pretraining, for prompts to learn. Their answer words are targets of other
families, since with tied embeddings no prompt can elicit a word that was never a target."""

CODES = dict(zip(SHAPES, ("left", "right", "top", "bottom", "small", "large"), strict=True))
"""Arbitrary code for each shape, of words that VQA's normalisation does not change (unlike number words)."""


def ask_code(scene: Scene, rng: Random) -> QA:
    """Return a question for the code of the first object's shape, for scenes with one object."""
    return QA(rng.choice(KEPT_OUT["relabelled shapes"][1]), CODES[scene.objects[0].shape])


AFFIRMATIVE = ("colour", "shape", "only_shape", "size", "place", "exists", "count", "extreme", "describe")
"""Families without negation or comparison, for the start of pretraining."""


def ask(scene: Scene, rng: Random, names: Sequence[str] = tuple(FAMILIES)) -> QA:
    """Return a question of a random family among `names`, in a pretraining wording."""
    weights = [FAMILIES[name][1] for name in names]
    while True:
        family = rng.choices(names, weights)[0]
        fact = FAMILIES[family][0](scene, rng)
        if fact is not None:
            return QA(rng.choice(PHRASINGS[family]).format(*fact.slots), fact.answer)


def ask_kept_out(scene: Scene, rng: Random, names: Sequence[str] = tuple(KEPT_OUT)) -> QA:
    """Return a question that is not used in pretraining."""
    while True:
        family, wordings = KEPT_OUT[rng.choice(names)]
        fact = family(scene, rng)
        if fact is not None:
            return QA(rng.choice(wordings).format(*fact.slots), fact.answer)
