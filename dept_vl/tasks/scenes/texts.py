"""Captions of scenes, statements about pairs of scenes, and small tasks on words without images."""

from random import Random

from dept_vl.tasks.scenes.questions import (
    NOUNS,
    NUMBERS,
    QA,
    TRUE,
    WORDINGS,
    matches,
    noun,
    place,
    random_phrase,
)
from dept_vl.tasks.scenes.render import COLOURS, SHAPES, SIZES, Scene

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


def ask_pair(left: Scene, right: Scene, rng: Random) -> QA:
    """Return a question whether a statement about two images is true."""
    sentence, truth = pair_statement(left, right, rng)
    return QA(rng.choice(PAIR_PHRASINGS).format(sentence), TRUE[truth])


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
