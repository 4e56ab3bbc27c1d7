"""Targets, batches, and which example comes when."""

import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LANGUAGES, random_image
from helpers import task_of
from transformers import AutoTokenizer

from dept_vl.data import workers
from dept_vl.data.collate import Batch, Collator, Draw
from dept_vl.data.features import FeatureTable
from dept_vl.data.lengths import Lengths
from dept_vl.data.sampling import WINDOW, TrainingBatches, TrainingDraws
from dept_vl.models.prompted import IGNORE_INDEX
from dept_vl.models.tokens import tokenised
from dept_vl.models.vision import VisionEncoder
from dept_vl.tasks.base import Example
from dept_vl.tasks.vqav2 import VQAv2

TEXTS = ("vqa: what colour is the circle ?", "vqa: red ?", "vqa: how many large shapes are there ?")


@pytest.fixture(params=LANGUAGES)
def tokenizer(request: pytest.FixtureRequest, language_folders: dict[str, Path]) -> Any:
    return AutoTokenizer.from_pretrained(language_folders[request.param])


def draws(*targets: str | None, texts: tuple[str, ...] = TEXTS, images: tuple[Path, ...] = ()) -> list[Draw]:
    return [
        Draw(Example(number, text, images, ()), target, 0.3 * (number + 1))
        for number, (text, target) in enumerate(zip(texts, targets, strict=False))
    ]


def test_text_is_padded_on_the_right_to_the_longest(tokenizer: Any) -> None:
    tokenizer.padding_side = "right"
    batch = Collator(tokenizer, max_source_length=99, max_target_length=9)(draws(None, None, None))
    lengths = [len(tokenizer(text).input_ids) for text in TEXTS]
    assert batch.ids == (0, 1, 2)
    assert batch.input_ids.shape == (3, max(lengths))
    for row, length in enumerate(lengths):
        assert batch.input_ids[row, :length].tolist() == tokenizer(TEXTS[row]).input_ids
        assert batch.attention_mask[row].tolist() == [1] * length + [0] * (max(lengths) - length)
        assert set(batch.input_ids[row, length:].tolist()) <= {tokenizer.pad_token_id}


def test_labels_and_weights_are_those_of_the_draws(tokenizer: Any) -> None:
    targets = ("red", "yes no yes no", "two green circles")
    batch = Collator(tokenizer, max_source_length=99, max_target_length=99)(draws(*targets))
    assert batch.labels is not None
    assert batch.weights is not None
    expected = [tokenizer(text_target=target).input_ids for target in targets]
    width = max(map(len, expected))
    assert batch.labels.tolist() == [ids + [IGNORE_INDEX] * (width - len(ids)) for ids in expected]
    assert expected[0][-1] == tokenizer.eos_token_id
    torch.testing.assert_close(batch.weights, torch.tensor([0.3, 0.6, 0.9]))
    assert batch.weights.dtype == torch.float32


def test_long_texts_and_answers_are_cut(tokenizer: Any) -> None:
    collator = Collator(tokenizer, max_source_length=4, max_target_length=3)
    batch = collator(draws("red green blue yellow", "yes", "no no no"))
    assert batch.labels is not None
    assert batch.input_ids.shape == (3, 4)
    assert batch.labels.shape == (3, 3)
    # What is cut keeps the end of text.
    assert batch.input_ids[:, -1].tolist() == [tokenizer.eos_token_id] * 3


def test_threads_may_cut_the_texts_of_one_tokenizer_at_other_lengths(tokenizer: Any) -> None:
    text = "what color is the car? " * 5
    whole = len(tokenizer(text).input_ids)
    limits = (5, 9, None)
    assert whole > 9

    def length(limit: int | None) -> int:
        if limit is None:
            return len(tokenised(tokenizer, text).input_ids)
        batch = Collator(tokenizer, limit, max_target_length=4)(draws(None, None, texts=(text, "what?")))
        return batch.input_ids.shape[1]

    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(length, limits * 300))
    finally:
        sys.setswitchinterval(switching)
    assert found == [5, 9, whole] * 300


def test_padding_goes_on_to_a_multiple_but_not_past_the_prompts_last_position(tokenizer: Any) -> None:
    drawn = draws("red green blue yellow", "yes", "no no no")
    plain = Collator(tokenizer, max_source_length=20, max_target_length=9)(drawn)
    assert plain.labels is not None
    text, answer = plain.input_ids.shape[1], plain.labels.shape[1]
    for cut in (20, text + 1):
        padded = Collator(tokenizer, cut, 9, pad_to_multiple_of=8)(drawn)
        assert padded.labels is not None
        assert padded.input_ids.shape[1] == min(-(-text // 8) * 8, cut)
        assert padded.labels.shape[1] == -(-answer // 8) * 8
        assert torch.equal(padded.input_ids[:, :text], plain.input_ids)
        assert torch.equal(padded.labels[:, :answer], plain.labels)
        assert padded.attention_mask.shape == padded.input_ids.shape
        assert padded.attention_mask[:, text:].sum() == 0
        assert (padded.input_ids[:, text:] == tokenizer.pad_token_id).all()
        assert (padded.labels[:, answer:] == IGNORE_INDEX).all()


def test_no_targets_no_labels(tokenizer: Any) -> None:
    batch = Collator(tokenizer, max_source_length=20, max_target_length=9)(draws(None, None))
    assert (batch.labels, batch.weights, batch.pixel_values, batch.visual_features) == (None,) * 4


def test_a_text_without_image_needs_no_tower(
    language_folders: dict[str, Path], vision_folders: dict[str, Path]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(language_folders["t5"])
    vision = VisionEncoder.from_pretrained(vision_folders["clip"])
    batch = Collator(tokenizer, max_source_length=20, max_target_length=9, images=vision)(draws("red", "no"))
    assert batch.pixel_values is None


def test_pixels_are_stacked_by_example_and_image(
    tmp_path: Path, language_folders: dict[str, Path], vision_folders: dict[str, Path]
) -> None:
    paths = [tmp_path / f"{seed}.png" for seed in range(3)]
    for seed, path in enumerate(paths):
        random_image((40, 36), seed).save(path)
    vision = VisionEncoder.from_pretrained(vision_folders["clip"])
    tokenizer = AutoTokenizer.from_pretrained(language_folders["t5"])
    collator = Collator(tokenizer, max_source_length=20, max_target_length=9, images=vision)
    pairs = [(paths[0], paths[1]), (paths[2], paths[0])]
    batch = collator([Draw(Example(n, TEXTS[n], pair, ())) for n, pair in enumerate(pairs)])
    assert batch.pixel_values is not None
    assert batch.pixel_values.shape == (2, 2, 3, 32, 32)
    for row, pair in enumerate(pairs):
        for column, path in enumerate(pair):
            seed = paths.index(path)
            expected = vision.preprocess([random_image((40, 36), seed)])[0]
            assert torch.equal(batch.pixel_values[row, column], expected)


def test_batch_moves_every_tensor_and_nothing_else() -> None:
    batch = Batch(
        ids=(7, "eight"),
        input_ids=torch.ones(2, 3, dtype=torch.long),
        attention_mask=torch.ones(2, 3, dtype=torch.long),
        labels=torch.ones(2, 4, dtype=torch.long),
        weights=torch.ones(2),
        visual_features=torch.ones(2, 1, 5, 6),
    )
    moved = batch.to(torch.device("meta"))
    assert moved.ids is batch.ids  # not searched for tensors, which would take longer than a copy
    assert moved.pixel_values is None
    for name in ("input_ids", "attention_mask", "labels", "weights", "visual_features"):
        assert getattr(moved, name).device.type == "meta"
        assert getattr(moved, name).shape == getattr(batch, name).shape
        assert getattr(batch, name).device.type == "cpu"


def test_inputs_leave_the_targets_out() -> None:
    text = torch.ones(2, 3, dtype=torch.long)
    batch = Batch((0, 1), text, text.clone(), torch.zeros(2, 1, dtype=torch.long), torch.ones(2))
    assert batch.inputs().keys() == {"input_ids", "attention_mask", "pixel_values", "visual_features"}
    assert batch.inputs()["attention_mask"] is batch.attention_mask
    assert batch.training_inputs().keys() - batch.inputs().keys() == {"labels", "weights"}
    assert batch.training_inputs()["weights"] is batch.weights


def test_answers_are_drawn_in_proportion_to_their_scores() -> None:
    scores = {"p": 0.3, "q": 0.6, "r": 0.9, "s": 1.0}
    task = task_of(["p"] + ["q"] * 2 + ["r"] * 3 + ["s"] * 4)
    stream = TrainingDraws([task], seed=0)
    count = 4000
    drawn = [stream[0, number] for number in range(count)]
    shares = Counter(draw.target for draw in drawn)
    for answer, score in scores.items():
        # Five standard deviations of the share, at most.
        assert shares[answer] / count == pytest.approx(score / sum(scores.values()), abs=0.04)
    assert all(draw.weight == scores[str(draw.target)] for draw in drawn)


def test_a_draw_depends_on_seed_and_number_alone() -> None:
    task = task_of([*"ppqqrrssst"], [*"uuvvwwxxyz"])
    ahead = [TrainingDraws([task], seed=1)[0, number] for number in range(60)]
    assert [TrainingDraws([task], seed=1)[0, number] for number in reversed(range(60))] == ahead[::-1]
    assert [TrainingDraws([task], seed=2)[0, number] for number in range(60)] != ahead
    # The same example gets another answer in another epoch.
    assert {draw.example.example_id for draw in ahead[::2]} == {0}
    assert len({draw.target for draw in ahead[::2]}) > 1


def test_evaluation_sees_every_example_once_and_no_answer(tokenizer: Any) -> None:
    task = task_of(["yes"] * 10, ["no"] * 10)
    collator = Collator(tokenizer, max_source_length=20, max_target_length=5)
    loader = workers.load(task, 0, sampler=range(len(task)), batch_size=2, collate_fn=collator.of_examples)
    (batch,) = loader
    assert batch.ids == (0, 1)
    assert batch.labels is None


def numbers(count: int, batch_size: int, batches: int, **options: int) -> list[list[int]]:
    drawn = islice(TrainingBatches([count], [batch_size], **{"seed": 0, **options}), batches)
    found = []
    for batch in drawn:
        assert {task for task, _ in batch} == {0}
        found.append([number for _, number in batch])
    return found


def test_each_epoch_is_another_permutation() -> None:
    flat = [number for batch in numbers(10, 5, 6) for number in batch]
    epochs = [flat[start : start + 10] for start in range(0, 30, 10)]
    for epoch, order in enumerate(epochs):
        assert sorted(order) == list(range(10 * epoch, 10 * epoch + 10))
    assert len({tuple(number % 10 for number in order) for order in epochs}) == 3
    assert flat != [number for batch in numbers(10, 5, 6, seed=1) for number in batch]


def test_batches_are_full_across_the_end_of_an_epoch() -> None:
    batches = numbers(5, 3, 10)
    assert {len(batch) for batch in batches} == {3}
    assert sorted(number for batch in batches for number in batch) == list(range(30))
    # A batch larger than the data set is full too.
    assert len(numbers(2, 7, 1)[0]) == 7


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_batches_of_one(processes: int) -> None:
    whole = numbers(11, 6, 20)
    size = 6 // processes
    shares = [numbers(11, size, 20, process=p, processes=processes) for p in range(processes)]
    joined = [list(chain.from_iterable(parts)) for parts in zip(*shares, strict=True)]
    assert joined == whole


def test_accumulated_batches_are_the_parts_of_a_larger_one() -> None:
    small = numbers(11, 4, 20)
    assert [small[n] + small[n + 1] for n in range(0, 20, 2)] == numbers(11, 8, 10)


def mixed(batches: int, **options: Any) -> list[list[tuple[int, int]]]:
    """Batches of three tasks, their epochs 12, 4 and 2 batches long."""
    return list(islice(TrainingBatches([48, 8, 12], [4, 2, 6], **{"seed": 0, **options}), batches))


def test_a_batch_is_of_one_task_and_of_its_size() -> None:
    for batch in mixed(50):
        (task,) = {task for task, _ in batch}
        assert len(batch) == (4, 2, 6)[task]


def test_tasks_go_through_their_epochs_together() -> None:
    counts = Counter(batch[0][0] for batch in mixed(3600))
    for task, share in enumerate((12 / 18, 4 / 18, 2 / 18)):
        # Five standard deviations of a share, at most.
        assert counts[task] / 3600 == pytest.approx(share, abs=0.04)


def test_each_task_keeps_the_order_that_it_has_alone() -> None:
    for task, (count, size) in enumerate([(48, 4), (8, 2), (12, 6)]):
        among = [[number for _, number in batch] for batch in mixed(200) if batch[0][0] == task]
        assert among == numbers(count, size, len(among))


def test_processes_draw_the_same_tasks() -> None:
    whole = list(islice(TrainingBatches([48, 8], [4, 2], seed=0), 40))
    shares = [
        list(islice(TrainingBatches([48, 8], [2, 1], seed=0, process=p, processes=2), 40)) for p in range(2)
    ]
    assert [left + right for left, right in zip(*shares, strict=True)] == whole


def test_targets_in_turn_come_once_each_before_any_comes_again() -> None:
    task = InTurn(["a cat", "one cat", "the cat"])
    for epoch in range(0, 9, 3):
        drawn = [TrainingDraws([task], seed=epoch)[0, number] for number in range(3)]
        assert sorted(str(draw.target) for draw in drawn) == ["a cat", "one cat", "the cat"]
        assert {draw.weight for draw in drawn} == {1.0}
    orders = {tuple(TrainingDraws([task], seed=s)[0, n].target for n in range(3)) for s in range(20)}
    assert len(orders) > 1


class InTurn(VQAv2):
    """One example whose targets are learnt in turn."""

    def __init__(self, captions: list[str]) -> None:
        object.__setattr__(self, "captions", captions)

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Example:
        captions: list[str] = self.captions  # type: ignore[attr-defined]
        return Example(0, "caption:", (), tuple((caption, 1.0) for caption in captions), in_turn=True)


def bad_images(tmp_path: Path) -> list[Draw]:
    """Three draws; the second's image is damaged and the third's missing."""
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    random_image((40, 36), 0).save(paths[0])
    paths[1].write_bytes(b"no image")
    return [Draw(Example(7 + n, TEXTS[n], (path,), ()), "red", 0.3) for n, path in enumerate(paths)]


@pytest.mark.parametrize("table", [True, False])
def test_examples_without_readable_image_are_left_out_and_named(
    tmp_path: Path, language_folders: dict[str, Path], vision_folders: dict[str, Path], table: bool
) -> None:
    vision = VisionEncoder.from_pretrained(vision_folders["clip"])
    drawn = bad_images(tmp_path)
    files = [path for draw in drawn for path in draw.example.images]
    images = FeatureTable.encode(vision, files, progress=False) if table else vision
    tokenizer = AutoTokenizer.from_pretrained(language_folders["t5"])
    collator = Collator(tokenizer, 20, 9, images, on_bad_image="skip")
    batch = collator(drawn)
    assert (batch.ids, batch.skipped) == ((7,), (8, 9))
    alone = collator(drawn[:1])
    assert torch.equal(batch.input_ids, alone.input_ids)
    assert batch.weights is not None
    assert len(batch.weights) == 1
    none = collator(drawn[1:])
    assert (none.ids, none.skipped) == ((), (8, 9))
    for draw in drawn[1:]:
        with pytest.raises(
            ValueError, match=rf"example {draw.example.example_id}: .*--on_bad_image skip"
        ) as e:
            replace(collator, on_bad_image="raise")([drawn[0], draw])
        assert str(draw.example.images[0]) in str(e.value)


def sentence_lengths(count: int, mean: float, spread: float, seed: int = 0) -> Lengths:
    """Lengths as sentence pairs have them: log-normal about a mean, cut at 256 tokens."""
    drawn = np.random.default_rng(seed).lognormal(np.log(mean), spread, count)
    return drawn.clip(5, 256).astype(np.int32)


def grouped(lengths: Lengths, batch_size: int, batches: int, **options: Any) -> list[list[int]]:
    sampler = TrainingBatches([len(lengths)], [batch_size], **{"seed": 0, "lengths": [lengths], **options})
    return [[number for _, number in batch] for batch in islice(sampler, batches)]


def padded_share(batches: list[list[int]], lengths: Lengths) -> float:
    """Of the tokens that the encoder reads, those that are padding."""
    sizes = [lengths[np.array(batch) % len(lengths)] for batch in batches]
    whole = sum(int(size.max()) * len(size) for size in sizes)
    return 1 - sum(int(size.sum()) for size in sizes) / whole


@pytest.mark.parametrize(("mean", "spread"), [(38, 0.45), (27, 0.3), (14, 0.5), (30, 0.8)])
@pytest.mark.parametrize("count", [2_490, 20_000])
def test_texts_of_about_the_same_length_lose_little_to_padding(
    mean: float, spread: float, count: int
) -> None:
    """As long as MNLI's, QQP's and CoLA's texts, and more uneven."""
    lengths = sentence_lengths(count, mean, spread)
    batches = grouped(lengths, 32, 2 * count // 32)
    assert padded_share(batches, lengths) < 0.1
    assert padded_share(numbers(count, 32, 2 * count // 32), lengths) > 0.3


@pytest.mark.parametrize(("count", "batch_size"), [(64, 8), (101, 8), (5, 3), (2, 7), (1700, 16)])
def test_grouped_batches_hold_every_example_once_an_epoch(count: int, batch_size: int) -> None:
    lengths = sentence_lengths(count, 30, 0.6)
    epochs = 6
    flat = list(chain.from_iterable(grouped(lengths, batch_size, epochs * count // batch_size + 1)))
    assert len(set(flat)) == len(flat)
    for epoch in range(epochs):
        # Up to the batch that runs across the end of the epoch, all of it has come.
        end = -(-(epoch + 1) * count // batch_size) * batch_size
        assert set(range((epoch + 1) * count)) <= set(flat[:end])


def test_groups_are_mixed_and_differ_from_epoch_to_epoch() -> None:
    lengths = sentence_lengths(1600, 30, 0.6)
    batches = grouped(lengths, 16, 200)
    longest = [int(lengths[np.array(batch) % 1600].max()) for batch in batches]
    assert longest != sorted(longest)
    assert {frozenset(batch) for batch in batches[:100]}.isdisjoint(
        frozenset(number - 1600 for number in batch) for batch in batches[100:]
    )
    # Only so many batches are sorted together: short texts come in both halves of the epoch.
    assert WINDOW < 100
    assert min(longest[:50]) < np.median(longest) < max(longest[:50])
    assert grouped(lengths, 16, 50) == batches[:50]
    assert grouped(lengths, 16, 50, start=70) == batches[70:120]
    assert grouped(lengths, 16, 50, seed=1) != batches[:50]


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_grouped_batches_of_one(processes: int) -> None:
    lengths = sentence_lengths(101, 30, 0.6)
    whole = grouped(lengths, 8, 40)
    shares = [grouped(lengths, 8 // processes, 40, process=p, processes=processes) for p in range(processes)]
    assert [list(chain.from_iterable(parts)) for parts in zip(*shares, strict=True)] == whole


def test_each_task_is_grouped_by_its_own_lengths() -> None:
    lengths = [sentence_lengths(count, 30, 0.6, seed) for seed, count in enumerate((48, 8, 12))]
    drawn = mixed(300, lengths=lengths)
    assert [batch[0][0] for batch in drawn] == [batch[0][0] for batch in mixed(300)]
    for task, size in enumerate((4, 2, 6)):
        among = [[number for _, number in batch] for batch in drawn if batch[0][0] == task]
        assert among == grouped(lengths[task], size, len(among))
