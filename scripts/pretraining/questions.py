"""Questions that the shipped backbones are pretrained on.

They are families of questions about scenes, captions, pairs of scenes, and small tasks on words. A family is
a function `(scene, rng) -> Fact`, as in `study_data.questions`; `wordings.json` has the wordings.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

from study_data.questions import (
    NOUNS,
    NUMBERS,
    QA,
    TRUE,
    VALUES,
    YES,
    Fact,
    Family,
    about,
    absent,
    exists,
    judged,
    lone,
    matches,
    name,
    noun,
    pair_statement,
    random_phrase,
    referring,
)
from study_data.render import COLOURS, IMAGE_SIZE, SHAPES, SIZES, Object, Scene

WORDINGS = json.loads((Path(__file__).parent / "wordings.json").read_text(encoding="utf-8"))
PHRASINGS: dict[str, list[str]] = WORDINGS["shown"]
"""Wordings for pretraining, by family."""


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
    "colour": (about(lambda o: f"it is {o.colour}", "colour"), 2.0),
    "shape": (about(lambda o: o.shape, "shape"), 2.0),
    "only_shape": (lone(lambda o: f"it is a {o.shape}"), 2.0),
    "size": (about(lambda o: o.size, "size"), 0.7),
    "place": (about(place), 1.0),
    "exists": (judged(exists, TRUE), 4.0),
    "absent": (judged(absent, TRUE), 4.0),
    "statement": (judged(statement, TRUE), 1.0),
    "tag": (judged(statement, YES), 2.0),
    "count": (_count, 1.5),
    "relation": (_relation, 1.5),
    "neighbour": (_neighbour, 0.7),
    "neighbour colour": (_neighbour_colour, 1.0),
    "more": (_more, 0.5),
    "same": (_same, 0.7),
    "extreme": (_extreme, 0.7),
    "distance": (_distance, 1.0),
    "further": (_further, 1.0),
    "describe": (lone(lambda o: f"{o.size} {noun(o)}"), 0.7),
}
"""Families of questions about one image, with their weights in pretraining."""


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


CAPTION_PHRASINGS = tuple(WORDINGS["captions"])
PAIR_PHRASINGS = tuple(WORDINGS["pairs"])

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
    """Return a question without an image. Every word is a target somewhere, so that prompts can elicit it."""
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


def caption(scene: Scene, rng: Random) -> QA:
    """Return a caption of all objects, left to right: `a small red circle at the top left and a ...`."""
    parts = [f"a {o.size} {noun(o)} at the {place(o)}" for o in scene.objects]
    return QA(rng.choice(CAPTION_PHRASINGS), " and ".join(parts))


def ask_pair(left: Scene, right: Scene, rng: Random) -> QA:
    """Return a question whether a statement about two images is true."""
    sentence, truth = pair_statement(left, right, rng)
    return QA(rng.choice(PAIR_PHRASINGS).format(sentence), TRUE[truth])
