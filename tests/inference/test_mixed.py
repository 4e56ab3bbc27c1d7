"""Many adapters in one batch: every row as if it were alone."""

import copy
import gc
import itertools
import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_features, random_image, random_labels, random_text
from PIL import Image
from torch import Tensor

from dept_vl.adapters.adapter import Adapter
from dept_vl.inference.loading import load
from dept_vl.inference.mixed import ManyAdapters, load_many
from dept_vl.inference.predictor import Predictor
from dept_vl.models.backbone import Backbone
from dept_vl.models.prompted import PromptedModel
from dept_vl.models.row_prompts import PromptTable
from dept_vl.prompts.base import sized
from dept_vl.prompts.dept import DePT
from dept_vl.prompts.methods import build
from scripts import bench_adapters

SIZES: dict[str, dict[str, Any] | None] = {
    "short": {"method": "dept", "prompt_length": 2, "rank": 3, "max_source_length": 9},
    "long": {"method": "dept", "prompt_length": 7, "rank": 1, "max_source_length": 12},
    "plain": {"method": "pt", "prompt_length": 4, "rank": 0, "max_source_length": 20},
    "offset": {"method": "dept", "prompt_length": 0, "rank": 2, "max_source_length": 10},
    "by token": {"method": "adept", "prompt_length": 3, "rank": 2, "max_source_length": 9},
    "both": {"method": "hybrid", "prompt_length": 5, "rank": 2, "max_source_length": 11},
    "compressed": {"method": "lopt", "prompt_length": 6, "rank": 2, "max_source_length": 9},
    "images": {
        "method": "adept",
        "prompt_length": 1,
        "rank": 2,
        "max_source_length": 9,
        "visual_offset": True,
    },
    "memory": {"method": "memory", "prompt_length": 0, "rank": 2, "max_source_length": 9},
    "projection": None,
}
"""Of each adapter's prompt; None trains the visual projection alone."""
ALWAYS: list[tuple[str, str | None, str]] = [
    ("t5", "clip", "none"),
    ("bart", "clip", "relative"),
    ("t5", None, "none"),
    ("llama", None, "none"),
]
MODELS = [
    *ALWAYS,
    *(
        pytest.param(model, marks=pytest.mark.slow)
        for model in (
            *itertools.product(("t5", "bart"), ("clip", None), ("none", "relative")),
            ("gpt2", None, "none"),
        )
        if model not in ALWAYS
    ),
]
ROWS: list[tuple[str | None, ...]] = [
    ("short", "long", None, "plain", "short"),
    ("by token", "both", "offset", "compressed", "projection"),
    ("offset", None, "projection"),
    ("long", "long"),
    ("memory", "images", None, "memory", "short"),
]
LENGTHS = (9, 4, 7, 2, 5)


def train(backbone: Backbone, sizes: dict[str, Any] | None, seed: int) -> PromptedModel:
    """A model whose trained parts are far from where training starts, and from each other's."""
    own = backbone.with_projection(copy.deepcopy(backbone.visual_projection))
    prompt = None if sizes is None else build(sized(d_model=backbone.d_model, **sizes))
    model = PromptedModel(own, prompt)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(generator=generator)
    return model.eval()


def predictors(
    backbone: Backbone, folder: Path, tasks: dict[str, str] | None = None, **sizes: dict[str, Any] | None
) -> dict[str, Predictor]:
    """Adapters of these sizes, trained, saved, and loaded on the backbone."""
    usual = "vqav2" if backbone.vision is not None else "sst2"
    loaded = {}
    for seed, (name, wanted) in enumerate((sizes or SIZES).items()):
        if backbone.vision is None and (wanted is None or wanted.get("visual_offset")):
            continue  # nothing would be trained
        if wanted and wanted["method"] == "memory" and not backbone.language.config.is_encoder_decoder:
            continue
        model = train(backbone, wanted, seed)
        Adapter.of(model, task=(tasks or {}).get(name, usual), metrics={}).save(folder / name)
        loaded[name] = load(folder / name, backbone=backbone)
    return loaded


def alone(many: ManyAdapters, name: str | None) -> PromptedModel:
    return many.predictors[name].model


def cut(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row, without the padding that it needs in company."""
    there = inputs["attention_mask"][row].bool()
    one = {name: inputs[name][row : row + 1, there] for name in ("input_ids", "attention_mask")}
    return one | {name: x[row : row + 1] for name, x in inputs.items() if name == "visual_features"}


def batch_of(backbone: Backbone, rows: Sequence[str | None], side: str = "right") -> dict[str, Tensor]:
    inputs = random_text(backbone, LENGTHS[: len(rows)], side=side)
    if backbone.vision is not None:
        inputs["visual_features"] = random_features(backbone, len(rows))
    return inputs


@pytest.mark.parametrize("model", MODELS, ids=lambda model: "-".join(map(str, model)))
@torch.no_grad()
def test_a_row_is_as_if_alone(
    make_backbone: Callable[..., Backbone], tmp_path: Path, model: tuple[str, str | None, str]
) -> None:
    language, tower, bias = model
    backbone = make_backbone(language, tower, visual_position_bias=bias)
    many = ManyAdapters(backbone, predictors(backbone, tmp_path))
    for rows in ROWS:
        rows = tuple(name for name in rows if name in many.predictors)
        labels = random_labels((4, 2, 3, 4, 1)[: len(rows)])
        expected = []
        for row, name in enumerate(rows):
            one, given = alone(many, name), cut(batch_of(backbone, rows), row)
            answer = one.generate(**given, max_new_tokens=5, min_new_tokens=5)
            expected.append((one(**given, labels=labels[row : row + 1]).logits, answer))
        for side in ("right", "left"):
            inputs = batch_of(backbone, rows, side)
            mixed = many.model(rows)
            logits = mixed(**inputs, labels=labels).logits
            # Beams are not compared: those of models with random weights are a hair apart.
            tokens = mixed.generate(**inputs, max_new_tokens=5, min_new_tokens=5)
            for row, (name, (scores, answer)) in enumerate(zip(rows, expected, strict=True)):
                torch.testing.assert_close(logits[row : row + 1], scores, atol=2e-4, rtol=1e-4)
                assert torch.equal(tokens[row : row + 1], answer), (rows, name)


@torch.no_grad()
def test_rows_of_different_adapters_differ(backbone: Backbone, tmp_path: Path) -> None:
    """Else the comparison above would say nothing."""
    many = ManyAdapters(backbone, predictors(backbone, tmp_path))
    places = [0] * len(many.predictors)
    inputs = {name: tensor[places] for name, tensor in batch_of(backbone, [None]).items()}
    labels = random_labels((4,))[places]
    logits = many.model(list(many.predictors))(**inputs, labels=labels).logits
    distances = torch.cdist(logits.flatten(1), logits.flatten(1)) + 10 * torch.eye(len(logits))
    assert distances.min() > 0.1


@torch.no_grad()
def test_adapters_that_leave_the_encoder_alone_share_its_pass(backbone: Backbone, tmp_path: Path) -> None:
    backbone.freeze(visual_projection=True)  # else they differ there
    sizes = dict.fromkeys(("one", "other", "third"), SIZES["memory"])
    many = ManyAdapters(backbone, predictors(backbone, tmp_path, None, **sizes, prompt=SIZES["short"]))
    rows = ("one", "other", "one", "third", "prompt", "one")
    inputs = {name: tensor[[0, 0, 1, 0, 0, 1]] for name, tensor in batch_of(backbone, rows).items()}
    widths: list[int] = []
    encoder = backbone.language.get_encoder()
    with taken(
        encoder.register_forward_pre_hook(lambda *given: widths.append(width(given)), with_kwargs=True)
    ):
        logits = many.model(rows)(**inputs, labels=(labels := random_labels((4,) * len(rows)))).logits
    # Of three with the first question one, the prompt's, and one of two that are the same in all.
    assert widths == [3]
    for row, name in enumerate(rows):
        expected = alone(many, name)(**cut(inputs, row), labels=labels[row : row + 1]).logits
        torch.testing.assert_close(logits[row : row + 1], expected, atol=2e-4, rtol=1e-4)


def width(given: tuple[Any, ...]) -> int:
    """Rows that an encoder is given."""
    count: int = given[-1]["inputs_embeds"].shape[0]
    return count


@contextmanager
def taken(handle: Any) -> Iterator[None]:
    """Remove a hook in the end."""
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def test_many_leave_the_backbone_and_each_other_as_they_were(t5: Backbone, tmp_path: Path) -> None:
    before = copy.deepcopy(t5.state_dict())
    many = ManyAdapters(t5, predictors(t5, tmp_path))
    inputs = batch_of(t5, ["short"])
    first = alone(many, "short").generate(**inputs, max_new_tokens=5)
    many.model(["long"]).generate(**inputs, max_new_tokens=5)
    assert torch.equal(alone(many, "short").generate(**inputs, max_new_tokens=5), first)
    assert all(torch.equal(before[name], tensor) for name, tensor in t5.state_dict().items())


@torch.no_grad()
def test_a_table_of_prompts_keeps_none_of_them() -> None:
    prompt = DePT(8, prompt_length=2, rank=2, max_source_length=4)
    kept = weakref.ref(prompt)
    table = PromptTable([prompt], torch.zeros(9, 8))
    del prompt
    gc.collect()
    assert kept() is None
    assert table.vectors.shape == (1, 2, 8)


def test_a_text_longer_than_its_own_prompt_reads_is_refused(t5: Backbone, tmp_path: Path) -> None:
    many = ManyAdapters(t5, predictors(t5, tmp_path))
    inputs = batch_of(t5, [None, None])
    inputs |= random_text(t5, (4, 10))
    many.model(["short", "long"]).generate(**inputs, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"row 1 has 10 tokens .*max_source_length=9"):
        many.model(["long", "short"]).generate(**inputs, max_new_tokens=2)


def test_longer_prompts_than_positions_are_refused(bart: Backbone, tmp_path: Path) -> None:
    sizes = {"method": "pt", "prompt_length": 30, "rank": 0, "max_source_length": 40}
    loaded = predictors(bart, tmp_path, long=sizes)
    inputs = batch_of(bart, [None]) | random_text(bart, (40,))
    with pytest.raises(ValueError, match=r"has 64 positions and the input needs 86: 30 prompt \+ 40 text"):
        ManyAdapters(bart, loaded).model(["long"]).generate(**inputs)


@pytest.fixture
def tasks(backbone: Backbone, tmp_path: Path) -> ManyAdapters:
    """One adapter for each kind of question."""
    sizes = {"method": "dept", "rank": 2, "max_source_length": 20}
    wanted = {
        name: sizes | {"prompt_length": n} for n, name in enumerate(("vqa", "gqa", "nlvr", "caption"), 2)
    }
    named = {"vqa": "vqav2", "gqa": "gqa", "nlvr": "nlvr2", "caption": "coco"}
    return ManyAdapters(backbone, predictors(backbone, tmp_path, named, **wanted))


def test_many_tasks_are_answered_together_as_apart(tasks: ManyAdapters) -> None:
    pictures = [random_image((40, 30), seed) for seed in range(6)]
    shown: list[Any] = [
        *(pictures[0], pictures[1], (pictures[2], pictures[3]), pictures[4], pictures[5], pictures[0])
    ]
    questions = ["what colour?", "how many?", "both hold shapes", "", "is it red", "what colour is it?"]
    names = ["vqa", "gqa", "nlvr", "caption", None, "gqa"]
    together = tasks.answer(shown, questions, adapters=names)
    assert together == [
        tasks.predictors[name].answer(image, question)
        for image, question, name in zip(shown, questions, names, strict=True)
    ]
    assert together[2] in ("true", "false")
    assert tasks.answer(shown, questions, adapters=names, batch_size=1) == together


def test_one_image_question_or_adapter_goes_with_every_other(tasks: ManyAdapters) -> None:
    one, two = (random_image((40, 30), seed) for seed in range(2))
    asked = tasks.answer(one, "what colour?", adapters="vqa")
    assert isinstance(asked, str)
    assert tasks.answer(one, "what colour?", adapters=["vqa"]) == [asked]
    by_adapter = tasks.answer(one, "what colour?", adapters=["vqa", "gqa", None])
    assert by_adapter == [tasks.answer(one, "what colour?", adapters=name) for name in ("vqa", "gqa", None)]
    assert by_adapter[0] == asked
    assert tasks.answer([one, two], "what colour?", adapters="vqa")[0] == asked
    pair = tasks.answer((one, two), "both hold shapes", adapters="nlvr")
    assert isinstance(pair, str)
    assert tasks.answer([(one, two)], ["both hold shapes"], adapters="nlvr") == [pair]


def test_what_does_not_fit_together_is_refused(tasks: ManyAdapters) -> None:
    image = random_image((40, 30))
    with pytest.raises(ValueError, match="no adapter 'vqq'; there are 'vqa', 'gqa', 'nlvr', 'caption', None"):
        tasks.answer(image, "what?", adapters="vqq")
    with pytest.raises(ValueError, match="found 1 images and 2 questions and 3 adapters"):
        tasks.answer(image, ["what?", "who?"], adapters=["vqa", "gqa", None])
    with pytest.raises(ValueError, match="images of nlvr2: expected 2 for each question, found 1"):
        tasks.answer(image, "what?", adapters=["vqa", "nlvr"])
    with pytest.raises(ValueError, match="a caption answers no question"):
        tasks.answer(image, "what?", adapters="caption")


def test_adapters_of_unlike_backbones_are_refused(
    make_backbone: Callable[..., Backbone], tmp_path: Path
) -> None:
    t5, other = make_backbone("t5"), make_backbone("t5")
    loaded = predictors(t5, tmp_path, one=SIZES["short"])
    with pytest.raises(ValueError, match=r"'one' is on a language model of its own.*backbone=backbone"):
        ManyAdapters(other, loaded)
    with pytest.raises(ValueError, match="found none"):
        ManyAdapters(t5, {})
    with pytest.raises(ValueError, match="found None"):
        ManyAdapters(t5, {**loaded, None: loaded["one"]})  # type: ignore[dict-item]
    bart = make_backbone("bart")
    Adapter.of(train(bart, SIZES["short"], 0), task="vqav2", metrics={}).save(tmp_path / "bart")
    with pytest.raises(ValueError) as refused:
        load_many({"one": tmp_path / "one", "bart": tmp_path / "bart"}, backbone=t5)
    assert str(t5.fingerprint) in str(refused.value)
    assert str(bart.fingerprint) in str(refused.value)


def test_an_adapter_with_a_language_model_of_its_own_does_not_share_it(
    make_backbone: Callable[..., Backbone], tmp_path: Path
) -> None:
    t5 = make_backbone("t5")
    tuned = make_backbone("t5")
    tuned.freeze(language=False)
    Adapter.of(train(tuned, None, 0), task="vqav2", metrics={}).save(tmp_path / "tuned")
    before = copy.deepcopy(t5.state_dict())
    predictor = load(tmp_path / "tuned", backbone=t5)
    assert all(torch.equal(before[name], tensor) for name, tensor in t5.state_dict().items())
    assert predictor.answer(Image.new("RGB", (8, 8)), "what?") is not None
    with pytest.raises(ValueError, match="trained the language model itself"):
        ManyAdapters(t5, {"tuned": predictor})


def test_many_are_loaded_on_one_backbone(
    language_folders: dict[str, Path], vision_folders: dict[str, Path], tmp_path: Path
) -> None:
    base = Backbone.from_pretrained(language=language_folders["t5"], vision=vision_folders["clip"])
    alone = predictors(base.eval(), tmp_path, one=SIZES["short"], two=SIZES["long"])
    many = load_many({"one": tmp_path / "one", "two": tmp_path / "two"}, device="cpu")
    image = random_image((40, 30))
    expected = [predictor.answer(image, "what colour?") for predictor in alone.values()]
    assert many.answer(image, "what colour?", adapters=["one", "two"]) == expected


def test_throughput_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = bench_adapters.BenchConfig(
        model="tiny",
        prompt_length=2,
        unequal=(1, 3),
        batch_size=3,
        new_tokens=2,
        rounds=2,
        json_out=tmp_path / "figures.json",
    )
    figures = bench_adapters.main(config)
    assert figures.keys() == {"(2, 2)", "(1, 3)"}
    for found in figures.values():
        assert 0 < found.processor.low <= found.processor.median <= found.processor.high
    printed = capsys.readouterr().out
    assert str(figures["(1, 3)"].clock) in printed
    assert ("NOT met" in printed) == (figures["(2, 2)"].processor.median < bench_adapters.BAR)
    written = json.loads((tmp_path / "figures.json").read_text())
    assert written["(2, 2)"]["processor"]["median"] == figures["(2, 2)"].processor.median
