"""Questions, captions and statements about scenes, with exact answers.

A family is a function `(scene, rng) -> Fact`: what goes into a wording's slots, and the answer (None
where the scene does not admit the question). Wordings are data: those of `PHRASINGS` are shown in
pretraining, those of `KEPT_OUT` never.
"""

from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple

from dept_vl.tasks.scenes.render import COLOURS, IMAGE_SIZE, SHAPES, SIZES, Object, Scene

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
NOUNS = ("shape", "object", "thing", "item")
"""Any object may be called so."""


class QA(NamedTuple):
    """A source text and the text to answer it with."""

    source_text: str
    target_text: str


class Fact(NamedTuple):
    """The words for a wording's slots, and the answer."""

    slots: tuple[str, ...]
    answer: str


Family = Callable[[Scene, Random], Fact | None]

PHRASINGS: dict[str, tuple[str, ...]] = {
    "colour": (
        "which color does the {} have?",
        "name the color of the {}",
        "the {} is painted in which color?",
        "in what color is the {} drawn?",
        "color of the {}?",
        "what is the {} painted in?",
        "tell me the color that the {} has",
    ),
    "shape": (
        "which shape does the {} have?",
        "name the shape of the {}",
        "the {} has what shape?",
        "what kind of shape is drawn as the {}?",
        "shape of the {}?",
        "what do you call the {}?",
    ),
    "only_shape": (
        "name the only shape in the image",
        "which shape do you see in the image?",
        "what can be seen in the image?",
        "what is drawn here?",
        "the image shows what shape?",
        "which shape is shown?",
        "what does the image show?",
    ),
    "size": (
        "how big is the {}?",
        "which size does the {} have?",
        "name the size of the {}",
        "is the {} small, medium or large?",
    ),
    "place": (
        "where is the {}?",
        "in which part of the image is the {}?",
        "name the place of the {}",
        "the {} is located where?",
    ),
    "exists": (
        "true or false: there is a {}",
        "there is a {}, true or false?",
        "a {} is present, true or false?",
        "true or false: the image contains a {}",
        "the image shows a {}, true or false?",
        "true or false: a {} can be seen",
        "true or false: there is a {} in the image",
    ),
    "absent": (
        "true or false: there is no {}",
        "there is not a {}, true or false?",
        "a {} is not present, true or false?",
        "true or false: the image does not contain a {}",
        "no {} is present, true or false?",
        "true or false: no {} can be seen",
        "true or false: there is not a {} in the image",
    ),
    "statement": (
        "true or false: {}",
        "{}, true or false?",
        "is this statement true? {}",
    ),
    "tag": ("{}, right?", "is it so that {}?", "would you say that {}?"),
    "count": (
        "how many {}s?",
        "count the {}s",
        "how many {}s does the image contain?",
        "what number of {}s is present?",
    ),
    "relation": (
        "is the {0} {2} the {1}?",
        "does the {0} lie {2} the {1}?",
        "{0} {2} {1}, yes or no?",
    ),
    "neighbour colour": ("which color is {1} the {0}?", "name the color {1} the {0}"),
    "neighbour": (
        "what is {1} the {0}?",
        "name the object {1} the {0}",
        "which object lies {1} the {0}?",
    ),
    "more": ("are there more {0}s than {1}s?", "do {0}s outnumber {1}s?"),
    "same": ("do the two objects have the same {}?", "is the {} of both objects the same?"),
    "extreme": ("name the object at the very {}", "which object is at the far {}?"),
    "distance": ("how far {0} is the {1}?", "the {1} is how far {0}?"),
    "further": (
        "which is at the far {0}, the {1} or the {2}?",
        "name the object at the far {0}: the {1} or the {2}",
        "the {1} or the {2}: which is {3} the other?",
        "which is {3} the other, the {1} or the {2}?",
    ),
    "describe": ("describe the object", "what object is in the image?", "name the object"),
}
"""The wordings of each family of pretraining."""


def name(item: Object, attributes: Sequence[str], rng: Random) -> str:
    """A noun phrase with these attributes: `red circle`, `large thing`."""
    words = [getattr(item, a) for a in ("size", "colour") if a in attributes]
    noun = item.shape if "shape" in attributes else rng.choice(NOUNS)
    return " ".join([*words, noun])


def matches(item: Object, wanted: dict[str, str]) -> bool:
    """Whether an object has all of these attributes."""
    return all(getattr(item, key) == value for key, value in wanted.items())


def referring(scene: Scene, item: Object, rng: Random, hide: str = "") -> str | None:
    """A phrase that fits this object alone and does not mention the attribute `hide`."""
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
    """A phrase that fits some object about half of the time, and its attributes.

    Half of those that fit none differ from an object in one attribute alone: the hard negatives.
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
"""Share of phrases that are changed; some fit another object, so about half fit none."""

VALUES: dict[str, Sequence[str]] = {"colour": list(COLOURS), "shape": SHAPES, "size": list(SIZES)}


def place(item: Object) -> str:
    """`top left`, `center`, `bottom`, ...: thirds of the image."""
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
"""Two centres nearer than this, in pixels, are in no clear relation."""


def clear(relation: str, a: Object, b: Object) -> bool:
    """Whether the relation, or its opposite, can be seen."""
    apart = abs(a.x - b.x) if relation in ("left of", "right of") else abs(a.y - b.y)
    return apart >= CLEAR_DISTANCE


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"


def _true(truth: bool) -> str:
    return "true" if truth else "false"


def _attribute(attribute: str, answer: str = "{}") -> Family:
    def ask_attribute(scene: Scene, rng: Random) -> Fact | None:
        item = rng.choice(scene.objects)
        phrase = referring(scene, item, rng, hide=attribute)
        return None if phrase is None else Fact((phrase,), answer.format(getattr(item, attribute)))

    return ask_attribute


def _only_shape(answer: str = "{}") -> Family:
    def ask_only_shape(scene: Scene, rng: Random) -> Fact | None:
        return Fact((), answer.format(scene.objects[0].shape)) if len(scene.objects) == 1 else None

    return ask_only_shape


def _place(scene: Scene, rng: Random) -> Fact | None:
    item = rng.choice(scene.objects)
    phrase = referring(scene, item, rng)
    return None if phrase is None else Fact((phrase,), place(item))


def _exists(words: Callable[[bool], str]) -> Family:
    def ask_exists(scene: Scene, rng: Random) -> Fact:
        phrase, wanted = random_phrase(scene, rng)
        return Fact((phrase,), words(any(matches(o, wanted) for o in scene.objects)))

    return ask_exists


def _absent(words: Callable[[bool], str]) -> Family:
    return _exists(lambda found: words(not found))


def statement(scene: Scene, rng: Random) -> tuple[str, bool]:
    """A sentence about a scene and whether it is true."""
    phrase, wanted = random_phrase(scene, rng)
    count = sum(matches(o, wanted) for o in scene.objects)
    kind = rng.randrange(5)
    if kind == 0:
        text = rng.choice(["there is a {}", "the image contains a {}", "a {} is present"])
        return text.format(phrase), count > 0
    if kind == 1:
        text = rng.choice(
            [
                "there is no {}",
                "the image does not contain a {}",
                "a {} is not present",
                "no {} is there",
            ]
        )
        return text.format(phrase), count == 0
    if kind == 2:
        said = count if rng.random() < 0.5 else rng.randint(0, 4)
        return f"there are {NUMBERS[said]} {phrase}s", said == count
    if kind == 3:
        item = rng.choice(scene.objects)
        said_place = place(rng.choice([item, _elsewhere(rng)]))
        return f"the {name(item, ['colour', 'shape'], rng)} is at the {said_place}", any(
            place(o) == said_place for o in scene.objects if o.colour == item.colour and o.shape == item.shape
        )
    said = len(scene.objects) if rng.random() < 0.5 else rng.randint(1, 4)
    return f"there are {NUMBERS[said]} objects in the image", said == len(scene.objects)


def _elsewhere(rng: Random) -> Object:
    return Object("", "", "", rng.uniform(0, IMAGE_SIZE - 1), rng.uniform(0, IMAGE_SIZE - 1), 0.0, 0.0)


def _statement(words: Callable[[bool], str]) -> Family:
    def ask_statement(scene: Scene, rng: Random) -> Fact:
        text, truth = statement(scene, rng)
        return Fact((text,), words(truth))

    return ask_statement


def _count(scene: Scene, rng: Random) -> Fact:
    phrase, wanted = random_phrase(scene, rng)
    if rng.random() < 0.4:
        phrase, wanted = rng.choice(NOUNS), {}
    return Fact((phrase,), NUMBERS[sum(matches(o, wanted) for o in scene.objects)])


def _two(scene: Scene, rng: Random, relation: str) -> tuple[Object, Object] | None:
    if len(scene.objects) < 2:
        return None
    a, b = rng.sample(scene.objects, 2)
    return (a, b) if clear(relation, a, b) else None


def _two_named(
    scene: Scene, rng: Random, relation: str
) -> tuple[tuple[Object, Object], tuple[str, str]] | None:
    """Draw two objects that a relation clearly holds of or not, with a phrase for each; None if it cannot."""
    pair = _two(scene, rng, relation)
    if pair is None:
        return None
    first, second = (referring(scene, o, rng) for o in pair)
    return None if first is None or second is None else (pair, (first, second))


def _relation(scene: Scene, rng: Random) -> Fact | None:
    relation = rng.choice(list(RELATIONS))
    named = _two_named(scene, rng, relation)
    if named is None:
        return None
    pair, phrases = named
    return Fact((*phrases, relation), _yes(RELATIONS[relation](*pair)))


def _beside(scene: Scene, rng: Random) -> tuple[tuple[str, str], Object | None] | None:
    """A phrase and a relation that at most one object is in, and that object."""
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
    return Fact(slots, f"{found.colour} {found.shape}" if found else "nothing")


def _neighbour_colour(scene: Scene, rng: Random) -> Fact | None:
    asked = _beside(scene, rng)
    return None if asked is None or asked[1] is None else Fact(asked[0], asked[1].colour)


def _more(scene: Scene, rng: Random) -> Fact:
    (first, wants), (second, wants_second) = random_phrase(scene, rng), random_phrase(scene, rng)
    difference = sum(matches(o, wants) - matches(o, wants_second) for o in scene.objects)
    return Fact((first, second), _yes(difference > 0))


def _same(scene: Scene, rng: Random) -> Fact | None:
    if len(scene.objects) != 2:
        return None
    attribute = rng.choice(list(VALUES))
    a, b = (getattr(o, attribute) for o in scene.objects)
    word = "color" if attribute == "colour" else attribute
    return Fact((word,), _yes(a == b))


def _extreme(scene: Scene, rng: Random) -> Fact | None:
    side = rng.choice(["left", "right", "top", "bottom"])
    ordered = sorted(scene.objects, key=lambda o: o.x if side in ("left", "right") else o.y)
    if side in ("right", "bottom"):
        ordered.reverse()
    relation = "left of" if side in ("left", "right") else "above"
    if len(ordered) > 1 and not clear(relation, ordered[0], ordered[1]):
        return None
    return Fact((side,), f"{ordered[0].colour} {ordered[0].shape}")


SIDES = {"left": "left of", "right": "right of", "top": "above", "bottom": "below"}
"""The relation of the object that lies further to a side."""


def _distance(scene: Scene, rng: Random) -> Fact | None:
    """In eighths of the image, from the other side: what relations compare."""
    item, side = rng.choice(scene.objects), rng.choice(list(SIDES))
    phrase = referring(scene, item, rng)
    if phrase is None:
        return None
    eighth = int((item.x if side in ("left", "right") else item.y) * 8 / IMAGE_SIZE)
    return Fact((side, phrase), NUMBERS[eighth if side in ("right", "bottom") else 7 - eighth])


def _further(scene: Scene, rng: Random) -> Fact | None:
    side, relation = rng.choice(list(SIDES.items()))
    named = _two_named(scene, rng, relation)
    if named is None:
        return None
    pair, phrases = named
    further = pair[0] if RELATIONS[relation](*pair) else pair[1]
    return Fact((side, *phrases, relation), f"{further.colour} {further.shape}")


def _describe(scene: Scene, rng: Random) -> Fact | None:
    item = scene.objects[0]
    return Fact((), f"{item.size} {item.colour} {item.shape}") if len(scene.objects) == 1 else None


FAMILIES: dict[str, tuple[Family, float]] = {
    "colour": (_attribute("colour", "it is {}"), 2.0),
    "shape": (_attribute("shape"), 2.0),
    "only_shape": (_only_shape("it is a {}"), 2.0),
    "size": (_attribute("size"), 0.7),
    "place": (_place, 1.0),
    "exists": (_exists(_true), 4.0),
    "absent": (_absent(_true), 4.0),
    "statement": (_statement(_true), 1.0),
    "tag": (_statement(_yes), 2.0),
    "count": (_count, 1.5),
    "relation": (_relation, 1.5),
    "neighbour": (_neighbour, 0.7),
    "neighbour colour": (_neighbour_colour, 1.0),
    "more": (_more, 0.5),
    "same": (_same, 0.7),
    "extreme": (_extreme, 0.7),
    "distance": (_distance, 1.0),
    "further": (_further, 1.0),
    "describe": (_describe, 0.7),
}
"""Questions about one image, and how often each is asked in pretraining."""


RELABELLED = dict(zip(SHAPES, NUMBERS, strict=False))
"""An arbitrary code for each shape."""
MANY = 3


def _odd_one_out(scene: Scene, rng: Random) -> Fact | None:
    shapes = [o.shape for o in scene.objects]
    lone = [shape for shape in shapes if shapes.count(shape) == 1]
    return Fact((), lone[0]) if len(shapes) > 2 and len(lone) == 1 else None


def _many_or_few(scene: Scene, rng: Random) -> Fact:
    return Fact((), "many" if len(scene.objects) >= MANY else "few")


def _relabelled(scene: Scene, rng: Random) -> Fact | None:
    return Fact((), RELABELLED[scene.objects[0].shape]) if len(scene.objects) == 1 else None


def _positive(found: bool) -> str:
    return "positive" if found else "negative"


KEPT_OUT: dict[str, tuple[Family, tuple[str, ...]]] = {
    # easy-VQA's own templates, in its own answer style: yes and no, and bare colours and shapes.
    "is there": (
        _exists(_yes),
        (
            "is there a {}?",
            "is there a {} in the image?",
            "does the image contain a {}?",
            "is a {} present?",
        ),
    ),
    "is there not": (
        _absent(_yes),
        (
            "is there not a {}?",
            "is there not a {} in the image?",
            "does the image not contain a {}?",
            "is no {} present?",
        ),
    ),
    "what color": (_attribute("colour"), ("what color is the {}?", "what is the color of the {}?")),
    "what is": (_attribute("shape"), ("what is the {}?",)),
    "what shape": (
        _only_shape(),
        (
            "what shape is in the image?",
            "what shape does the image contain?",
            "what shape is present?",
        ),
    ),
    # A new rule, a new judgement, new labels, a new answer style.
    "odd one out": (_odd_one_out, ("which shape is the odd one out?", "which shape is unlike the others?")),
    "many or few": (_many_or_few, ("many or few objects?", "are the objects many or few?")),
    "relabelled shapes": (_relabelled, ("which code does the shape have?", "code of the shape?")),
    "positive or negative": (_exists(_positive), ("test for a {}", "a {}: positive or negative?")),
}
"""Questions that pretraining never asks: what a prompt has to learn.

Their answer words are targets elsewhere: with tied embeddings no prompt can elicit a word that never was.
"""

CODES = dict(zip(SHAPES, ("left", "right", "top", "bottom", "small", "large"), strict=True))
"""An arbitrary code for each shape, of words that VQA's normalisation leaves as they are (numbers become
digits)."""


def ask_code(scene: Scene, rng: Random) -> QA:
    """Which code the first shape has; for scenes of one."""
    return QA(rng.choice(KEPT_OUT["relabelled shapes"][1]), CODES[scene.objects[0].shape])


def ask_many_or_few(scene: Scene, rng: Random) -> QA:
    """Whether there are many shapes or few."""
    return ask_kept_out(scene, rng, ("many or few",))


AFFIRMATIVE = ("colour", "shape", "only_shape", "size", "place", "exists", "count", "extreme", "describe")
"""Families without negation or comparison: where to start."""


def ask(scene: Scene, rng: Random, names: Sequence[str] = tuple(FAMILIES)) -> QA:
    """A question of a random family out of `names`, in a wording of pretraining."""
    weights = [FAMILIES[name][1] for name in names]
    while True:
        family = rng.choices(names, weights)[0]
        fact = FAMILIES[family][0](scene, rng)
        if fact is not None:
            return QA(rng.choice(PHRASINGS[family]).format(*fact.slots), fact.answer)


def caption(scene: Scene, rng: Random) -> QA:
    """All objects from left to right: `a small red circle at the top left and a ...`."""
    parts = [f"a {o.size} {o.colour} {o.shape} at the {place(o)}" for o in scene.objects]
    return QA(rng.choice(CAPTION_PHRASINGS), " and ".join(parts))


def pair_statement(left: Scene, right: Scene, rng: Random) -> tuple[str, bool]:
    """A sentence about two images and whether it is true."""
    phrase, wanted = random_phrase(rng.choice([left, right]), rng)
    counts = [sum(matches(o, wanted) for o in scene.objects) for scene in (left, right)]
    in_left, in_right = (count > 0 for count in counts)
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
            (f"there are {NUMBERS[rng.randint(0, 4)]} {{}}s in all", None),
        ]
    )
    if truth is None:
        truth = sentence.startswith(f"there are {NUMBERS[sum(counts)]} ")
    return sentence.format(phrase), truth


def ask_pair(left: Scene, right: Scene, rng: Random) -> QA:
    """A statement about two images, true or false."""
    sentence, truth = pair_statement(left, right, rng)
    return QA(rng.choice(PAIR_PHRASINGS).format(sentence), _true(truth))


def ask_kept_out(scene: Scene, rng: Random, names: Sequence[str] = tuple(KEPT_OUT)) -> QA:
    """A question that pretraining never asks."""
    while True:
        family, wordings = KEPT_OUT[rng.choice(names)]
        fact = family(scene, rng)
        if fact is not None:
            return QA(rng.choice(wordings).format(*fact.slots), fact.answer)


def listings(scene: Scene) -> list[str]:
    """Five captions in a style that pretraining never uses: what there is, without size or place."""
    things = [f"{o.colour} {o.shape}" for o in scene.objects]
    nouns = [f"a {thing}" for thing in things]
    return [
        " and ".join(nouns),
        f"a picture of {' and '.join(nouns)}",
        f"there is {', '.join(nouns)}",
        ", ".join(things),
        f"{NUMBERS[len(things)]} shapes: {', '.join(things)}",
    ]


CAPTION_PHRASINGS = ("caption:", "describe the image", "caption: describe every object")
PAIR_PHRASINGS = ("nlvr: {}", "true or false: {}", "{}, true or false?")
