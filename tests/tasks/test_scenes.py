"""Scenes are what they say, and the answers about them are right."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from random import Random

import pytest

from pretraining.questions import FAMILIES, PHRASINGS, RELATIONS, SIDES, ask, ask_pair, ask_text, caption
from study_data.questions import KEPT_OUT, NOUNS, NUMBERS, Fact
from study_data.render import (
    COLOURS,
    IMAGE_SIZE,
    SHAPES,
    SIZES,
    Object,
    Scene,
    render,
    sample_scene,
)

SCENES = 300
EASY_VQA_ANSWERS = {
    "yes", "no", "circle", "rectangle", "triangle",
    "red", "green", "blue", "black", "gray", "teal", "brown", "yellow",
}  # fmt: skip
WORDS_AS_DIGITS = {word: n for n, word in enumerate(("zero", "one", "two", "three", "four"))}


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    rng = Random(0)
    return [sample_scene(rng) for _ in range(SCENES)]


def facts(scenes: Sequence[Scene], name: str, turns: int = 2) -> Iterator[tuple[Scene, Fact]]:
    """What a family asks about the scenes that admit its question."""
    rng = Random(1)
    for scene in scenes:
        for _ in range(turns):
            fact = (FAMILIES | KEPT_OUT)[name][0](scene, rng)
            if fact is not None:
                yield scene, fact


def fitting(scene: Scene, phrase: str) -> list[Object]:
    """The objects that a phrase such as `large red thing` fits, word for word."""
    wanted = [word for word in phrase.split() if word not in NOUNS]
    return [item for item in scene.objects if all(w in (item.size, item.colour, item.shape) for w in wanted)]


def test_scenes_follow_from_the_seed() -> None:
    drawn = [sample_scene(Random(seed)) for seed in range(20)]
    assert drawn == [sample_scene(Random(seed)) for seed in range(20)]
    assert len(set(drawn)) == 20


def test_objects_lie_inside_the_image_apart_and_in_cells_of_their_own(scenes: list[Scene]) -> None:
    for scene in scenes:
        cells = []
        for item in scene.objects:
            assert item.width / 2 <= item.x <= IMAGE_SIZE - item.width / 2
            assert item.height / 2 <= item.y <= IMAGE_SIZE - item.height / 2
            smallest, largest = SIZES[item.size]
            assert smallest <= max(item.width, item.height) <= largest
            cells.append((int(item.x // 16), int(item.y // 16)))
        assert len(set(cells)) == len(cells)
        boxes = [
            (o.x - o.width / 2, o.y - o.height / 2, o.x + o.width / 2, o.y + o.height / 2)
            for o in scene.objects
        ]
        for place, one in enumerate(boxes):
            for other in boxes[place + 1 :]:
                assert one[2] < other[0] or other[2] < one[0] or one[3] < other[1] or other[3] < one[1]


def test_scenes_hold_one_to_four_objects_from_left_to_right(scenes: list[Scene]) -> None:
    assert {len(scene.objects) for scene in scenes} == {1, 2, 3, 4}
    for scene in scenes:
        assert [o.x for o in scene.objects] == sorted(o.x for o in scene.objects)
    assert {len(sample_scene(Random(seed), max_objects=1).objects) for seed in range(30)} == {1}


def test_every_shape_colour_and_size_occurs(scenes: list[Scene]) -> None:
    items = [item for scene in scenes for item in scene.objects]
    assert {item.shape for item in items} == set(SHAPES)
    assert {item.colour for item in items} == set(COLOURS)
    assert {item.size for item in items} == set(SIZES)


def test_a_scene_always_gives_the_same_pixels(scenes: list[Scene]) -> None:
    pictures = [render(scene).tobytes() for scene in scenes[:50]]
    assert pictures == [render(scene).tobytes() for scene in scenes[:50]]
    assert len(set(pictures)) == 50
    assert render(scenes[0]).size == (IMAGE_SIZE, IMAGE_SIZE)


def test_objects_are_drawn_where_and_in_the_colour_they_say(scenes: list[Scene]) -> None:
    for scene in scenes:
        picture = render(scene)
        ground = picture.getpixel((0, 0))
        for item in scene.objects:
            # The centre of every shape is filled. Jitter moves a channel by 22 at most.
            pixel = picture.getpixel((int(item.x), int(item.y)))
            assert pixel != ground
            assert all(abs(a - b) <= 22 for a, b in zip(pixel, COLOURS[item.colour], strict=True))  # type: ignore[arg-type]
        left, top = (
            min(o.x - o.width / 2 for o in scene.objects),
            min(o.y - o.height / 2 for o in scene.objects),
        )
        # Nothing is drawn above or to the left of all boxes.
        for box in ((0, 0, int(left), IMAGE_SIZE), (0, 0, IMAGE_SIZE, int(top))):
            if box[2] and box[3]:
                assert len(picture.crop(box).getcolors()) == 1


def test_a_wide_scene_has_the_same_objects_further_apart(scenes: list[Scene]) -> None:
    for scene in scenes[:50]:
        picture = render(scene, 2)
        assert picture.size == (128, 64)
        for item in scene.objects:
            pixel = picture.getpixel((int(2 * item.x), int(item.y)))
            assert all(abs(a - b) <= 22 for a, b in zip(pixel, COLOURS[item.colour], strict=True))  # type: ignore[arg-type]
        # In their own shape: as many pixels, but for the rounding of edges.
        drawn = [
            sum(count for count, colour in p.getcolors(maxcolors=4096) if colour != p.getpixel((0, 0)))  # type: ignore[union-attr]
            for p in (picture, render(scene))
        ]
        assert drawn[0] == pytest.approx(drawn[1], rel=0.1)


def test_exists_and_absent_are_right(scenes: list[Scene]) -> None:
    families = {
        "exists": ("true", "false"),
        "absent": ("false", "true"),
        "is there": ("yes", "no"),
        "is there not": ("no", "yes"),
        "positive or negative": ("positive", "negative"),
    }
    for family, (there, missing) in families.items():
        for scene, fact in facts(scenes, family):
            (phrase,) = fact.slots
            assert fact.answer == (there if fitting(scene, phrase) else missing), (scene, fact)


def test_counts_are_right(scenes: list[Scene]) -> None:
    counted = set()
    for scene, fact in facts(scenes, "count"):
        (phrase,) = fact.slots
        assert WORDS_AS_DIGITS[fact.answer] == len(fitting(scene, phrase)), (scene, fact)
        counted.add(fact.answer)
    assert counted == set(WORDS_AS_DIGITS)


def test_relations_are_right(scenes: list[Scene]) -> None:
    asked = set()
    for scene, fact in facts(scenes, "relation"):
        first, second, relation = fact.slots
        # Each phrase names one object.
        ((one,), (other,)) = fitting(scene, first), fitting(scene, second)
        assert one is not other
        holds = {
            "left of": one.x < other.x,
            "right of": one.x > other.x,
            "above": one.y < other.y,
            "below": one.y > other.y,
        }[relation]
        assert (fact.answer == "yes") == holds, (scene, fact)
        apart = one.x - other.x if relation in ("left of", "right of") else one.y - other.y
        assert abs(apart) >= 8
        asked.add((relation, fact.answer))
    assert len(asked) == 8


def test_places_are_right(scenes: list[Scene]) -> None:
    places = set()
    for scene, fact in facts(scenes, "place"):
        ((item,),) = (fitting(scene, phrase) for phrase in fact.slots)
        words = [
            *(["top"] if item.y < 64 / 3 else ["bottom"] if item.y >= 128 / 3 else []),
            *(["left"] if item.x < 64 / 3 else ["right"] if item.x >= 128 / 3 else []),
        ]
        assert fact.answer == (" ".join(words) or "center"), (scene, fact)
        places.add(fact.answer)
    assert len(places) == 9


def test_comparisons_are_right(scenes: list[Scene]) -> None:
    for scene, fact in facts(scenes, "more"):
        first, second = (len(fitting(scene, phrase)) for phrase in fact.slots)
        assert (fact.answer == "yes") == (first > second), (scene, fact)


def test_attributes_are_right(scenes: list[Scene]) -> None:
    families = {
        "colour": "colour",
        "shape": "shape",
        "size": "size",
        "what color": "colour",
        "what is": "shape",
    }
    for family, attribute in families.items():
        for scene, fact in facts(scenes, family):
            ((item,),) = (fitting(scene, phrase) for phrase in fact.slots)
            value = getattr(item, attribute)
            assert fact.answer == (f"it is {value}" if family == "colour" else value), (scene, fact)
            # The question does not give the answer away.
            assert value not in fact.slots[0].split()


def test_neighbours_and_extremes_are_right(scenes: list[Scene]) -> None:
    sides = {
        "left of": lambda o: o.x,
        "right of": lambda o: -o.x,
        "above": lambda o: o.y,
        "below": lambda o: -o.y,
    }
    for scene, fact in facts(scenes, "neighbour"):
        phrase, relation = fact.slots
        (item,) = fitting(scene, phrase)
        beyond = [o for o in scene.objects if sides[relation](o) < sides[relation](item)]
        assert len(beyond) <= 1
        assert fact.answer == (f"{beyond[0].colour} {beyond[0].shape}" if beyond else "nothing"), (
            scene,
            fact,
        )
    for scene, fact in facts(scenes, "neighbour colour"):
        phrase, relation = fact.slots
        (item,) = fitting(scene, phrase)
        (beyond,) = [o for o in scene.objects if sides[relation](o) < sides[relation](item)]
        assert fact.answer == beyond.colour
    ends = {"left": "left of", "right": "right of", "top": "above", "bottom": "below"}
    for scene, fact in facts(scenes, "extreme"):
        last = min(scene.objects, key=sides[ends[fact.slots[0]]])
        assert fact.answer == f"{last.colour} {last.shape}", (scene, fact)


def test_distances_are_in_eighths_of_the_image_from_the_other_side(scenes: list[Scene]) -> None:
    told = set()
    for scene, fact in facts(scenes, "distance"):
        side, phrase = fact.slots
        (item,) = fitting(scene, phrase)
        off = {"left": 64 - item.x, "right": item.x, "top": 64 - item.y, "bottom": item.y}[side]
        assert 8 * NUMBERS.index(fact.answer) <= off <= 8 * NUMBERS.index(fact.answer) + 8, (scene, fact)
        told.add(fact.answer)
    assert told == set(NUMBERS[:8])


def test_of_two_objects_the_one_further_to_a_side_is_named(scenes: list[Scene]) -> None:
    asked = Counter[int]()
    for scene, fact in facts(scenes, "further"):
        side, *phrases, relation = fact.slots
        pair = [fitting(scene, phrase)[0] for phrase in phrases]
        off = [{"left": -o.x, "right": o.x, "top": -o.y, "bottom": o.y}[side] for o in pair]
        found = pair[0] if off[0] > off[1] else pair[1]
        assert relation == {"left": "left of", "right": "right of", "top": "above", "bottom": "below"}[side]
        assert fact.answer == f"{found.colour} {found.shape}", (scene, fact)
        assert abs(off[0] - off[1]) >= 8
        asked[pair.index(found)] += 1
    assert len(asked) == 2


def test_captions_name_every_object_in_order(scenes: list[Scene]) -> None:
    for scene in scenes[:100]:
        parts = caption(scene, Random(0)).target_text.split(" and ")
        assert len(parts) == len(scene.objects)
        for part, item in zip(parts, scene.objects, strict=True):
            assert part.startswith(f"a {item.size} {item.colour} {item.shape} at the ")


def test_statements_on_two_images_are_right(scenes: list[Scene]) -> None:
    rng, seen = Random(2), Counter[str]()
    for left, right in zip(scenes[::2], scenes[1::2], strict=True):
        qa = ask_pair(left, right, rng)
        found = re.search(
            r"(both images show|the (?:left|right) image contains|neither image shows) a ([a-z ]+)",
            qa.source_text,
        )
        if found is None:
            continue
        kind, phrase = found.groups()
        in_left, in_right = bool(fitting(left, phrase)), bool(fitting(right, phrase))
        truth = {
            "both images show": in_left and in_right,
            "the left image contains": in_left,
            "the right image contains": in_right,
            "neither image shows": not in_left and not in_right,
        }[kind]
        assert qa.target_text == str(truth).lower(), (left, right, qa)
        seen[kind] += 1
    assert len(seen) == 4


def pretraining_texts(scenes: Sequence[Scene]) -> list[str]:
    rng = Random(3)
    texts = [ask(scene, rng).source_text for scene in scenes for _ in range(8)]
    texts += [caption(scene, rng).source_text for scene in scenes]
    texts += [ask_pair(left, right, rng).source_text for left, right in pairwise(scenes)]
    return texts + [ask_text(rng).source_text for _ in scenes]


def asked_in(wordings: Sequence[str]) -> re.Pattern[str]:
    """Any of the wordings, about any phrase."""
    noun = "|".join([*SHAPES, *NOUNS])
    phrase = rf"((?:{'|'.join(SIZES)}) )?((?:{'|'.join(COLOURS)}) )?(?:{noun})"
    patterns = (re.escape(wording).replace(r"\{\}", phrase) for wording in wordings)
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns))


def test_wordings_kept_out_are_never_shown_in_pretraining(scenes: list[Scene]) -> None:
    shown = {wording for group in PHRASINGS.values() for wording in group}
    kept_out = [wording for _, group in KEPT_OUT.values() for wording in group]
    assert not shown & set(kept_out)
    pattern = asked_in(kept_out)
    texts = pretraining_texts(scenes)
    assert [text for text in texts if pattern.fullmatch(text)] == []
    # The pattern does find what is asked in these wordings.
    for family, (_, wordings) in KEPT_OUT.items():
        fact = next(fact for _, fact in facts(scenes, family))
        assert all(pattern.fullmatch(wording.format(*fact.slots)) for wording in wordings)


def test_every_family_has_wordings_for_its_slots(scenes: list[Scene]) -> None:
    assert FAMILIES.keys() == PHRASINGS.keys()
    for family in FAMILIES:
        fact = next(fact for _, fact in facts(scenes, family))
        for wording in PHRASINGS[family]:
            text = wording.format(*fact.slots)
            assert "{" not in text
            left_out = {slot for slot in fact.slots if slot not in text}
            # Which way two objects are compared is said as a side or as a relation.
            assert len(left_out) <= (family == "further")
            assert left_out <= {*SIDES, *RELATIONS}


def test_only_the_families_named_are_asked(scenes: list[Scene]) -> None:
    rng = Random(5)
    assert {ask(scene, rng, ["count"]).target_text for scene in scenes} <= set(WORDS_AS_DIGITS)


@pytest.mark.parametrize("family", ["exists", "absent", "tag", "relation", "is there", "is there not"])
def test_both_answers_are_about_as_frequent(scenes: list[Scene], family: str) -> None:
    answers = Counter(fact.answer for _, fact in facts(scenes, family, turns=4))
    assert answers.keys() in ({"yes", "no"}, {"true", "false"})
    assert 0.4 < (answers["yes"] + answers["true"]) / answers.total() < 0.6


def test_all_answers_of_easy_vqa_are_pretraining_targets(scenes: list[Scene]) -> None:
    rng = Random(6)
    targets = {ask(scene, rng).target_text for scene in scenes for _ in range(30)}
    assert len(EASY_VQA_ANSWERS) == 13
    assert targets >= EASY_VQA_ANSWERS


def test_questions_never_asked_have_answers_that_are_targets_elsewhere(scenes: list[Scene]) -> None:
    rng = Random(7)
    targets = {ask_text(rng).target_text for _ in range(4000)}
    targets |= {ask(scene, rng).target_text for scene in scenes for _ in range(10)}
    for family, wordings in KEPT_OUT.values():
        found = [fact for scene in scenes if (fact := family(scene, rng)) is not None]
        assert len({fact.answer for fact in found}) > 1
        assert {fact.answer for fact in found} <= targets
        assert all("{" not in wording.format(*found[0].slots) for wording in wordings)
