"""The splits of a run: candidates, images that are missing or broken, and features that fit or do not."""

import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

import dept_vl.data.features
from dept_vl.config import DataOptions, OnBadImage
from dept_vl.data.feature_index import read_index, write_index
from dept_vl.data.feature_source import GIB, read_features
from dept_vl.data.feature_store import write_features
from dept_vl.data.features import FeatureTable, table_bytes
from dept_vl.data.splits import Splits, load_splits
from dept_vl.models.backbone import Backbone
from dept_vl.models.vision import VisionEncoder
from dept_vl.tasks import load_task
from dept_vl.tasks.base import Decoding, Task
from dept_vl.tasks.metrics.vqa import normalise_answer

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

SPLITS = {
    "vqav2": ("train", "val", "test"),
    "gqa": ("train", "val", "testdev"),
    "nlvr2": ("train", "dev", "test1"),
    "coco": ("train", "val", "test"),
}


@pytest.fixture
def vision(make_backbone: Callable[..., Backbone]) -> VisionEncoder:
    tower = make_backbone("t5").vision
    assert tower is not None
    return tower


@pytest.fixture
def data(scenes: Path, tmp_path: Path) -> DataOptions:
    """VQAv2 on a copy of the scenes, to be damaged."""
    return options("vqav2", shutil.copytree(scenes / "vqav2", tmp_path / "vqav2"))


def options(task: str, data_dir: Path) -> DataOptions:
    train, dev, test = SPLITS[task]
    return DataOptions(task=task, data_dir=data_dir, train_split=train, dev_split=dev, test_split=test)


def remove(task: Task, *indices: int) -> list[Path]:
    """Take the images of these examples away."""
    paths = [path for index in indices for path in task.images(index)]
    for path in paths:
        path.unlink(missing_ok=True)
    return paths


def read(vision: VisionEncoder, *splits: Splits, **of_first: Any) -> FeatureTable | VisionEncoder | None:
    first = replace(splits[0], options=replace(splits[0].options, **{"feature_memory": 1.0, **of_first}))
    backbone = Backbone.__new__(Backbone)  # nothing of it is asked for but its tower
    nn.Module.__init__(backbone)
    backbone.vision, backbone.exif = vision, None if vision is None else vision.exif
    return read_features(backbone, [first, *splits[1:]], num_workers=0, accelerator=Accelerator(cpu=True))


def write(vision: VisionEncoder, splits: Splits, **options: Any) -> Path:
    """Features of all images of the splits, in the default folder."""
    paths = [path for task in (splits.train, splits.dev, splits.test) for path in task.image_files()]
    root = splits.options.data_dir
    assert root is not None
    write_features(vision, root, paths, root / "features", Accelerator(cpu=True), shard_images=5, **options)
    return root / "features"


@pytest.mark.parametrize("task", SPLITS)
def test_every_task_has_its_splits(scenes: Path, task: str) -> None:
    data = options(task, scenes / task)
    splits = load_splits(data, seed=3)
    assert [part.name for part in (splits.train, splits.dev, splits.test)] == [task] * 3
    ids = [set(part.example_ids()) for part in (splits.train, splits.dev, splits.test)]
    assert ids == [set(load_task(task, data.data_dir, split).example_ids()) for split in SPLITS[task]]
    assert all(ids)
    assert splits.decoding == splits.train.decoding
    assert splits.options == data


def test_without_a_dev_split_images_are_held_out_of_the_training_split(scenes: Path) -> None:
    data = replace(options("gqa", scenes / "gqa"), dev_split="", holdout_images=3)
    splits = load_splits(data, seed=3)
    assert len(splits.dev.image_files()) == 3
    assert len(splits.train.image_files()) == 12 - 3
    assert not {*splits.dev.image_files()} & {*splits.train.image_files()}
    assert {*splits.dev.example_ids(), *splits.train.example_ids()} == {
        *load_task("gqa", data.data_dir, "train").example_ids()
    }


@pytest.mark.parametrize("task", SPLITS)
def test_limits_draw_examples_of_dev_and_test_with_the_seed(scenes: Path, task: str) -> None:
    data = replace(options(task, scenes / task), dev_limit=3, test_limit=4)
    splits, again, other = (load_splits(data, seed) for seed in (1, 1, 2))
    assert (len(splits.dev), len(splits.test)) == (3, 4)
    assert len(splits.train) == len(load_task(task, data.data_dir, "train"))
    assert splits.dev.example_ids() == again.dev.example_ids()
    drawn = [[*part.dev.example_ids(), *part.test.example_ids()] for part in (splits, other)]
    assert drawn[0] != drawn[1]


def test_candidates_are_the_usual_answers_of_the_training_split(scenes: Path) -> None:
    data = options("vqav2", scenes / "vqav2")
    train = load_task("vqav2", data.data_dir, "train")
    usual = [normalise_answer(train[index].answer) for index in range(len(train))]
    for floor in (1, 3):
        decoding = load_splits(replace(data, candidate_floor=floor), seed=0).decoding
        assert set(decoding.candidates) == {answer for answer in usual if usual.count(answer) >= floor}
        assert replace(decoding, candidates=()) == train.decoding
        counts = [usual.count(answer) for answer in decoding.candidates]
        assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize("task", ["gqa", "nlvr2", "coco"])
def test_only_vqav2_has_usual_answers(scenes: Path, task: str) -> None:
    data = replace(options(task, scenes / task), candidate_floor=9)
    with pytest.raises(ValueError, match=f"candidate_floor=9 .*; {task} has no such list"):
        load_splits(data, seed=0)


def test_a_floor_that_no_answer_reaches_is_refused(scenes: Path) -> None:
    with pytest.raises(ValueError, match="lower candidate_floor"):
        load_splits(replace(options("vqav2", scenes / "vqav2"), candidate_floor=1000), seed=0)


def test_beams_are_the_tasks_own_unless_said(scenes: Path) -> None:
    coco = options("coco", scenes / "coco")
    assert load_splits(coco, seed=0).decoding.num_beams == 5
    assert load_splits(replace(coco, num_beams=2), seed=0).decoding == Decoding(40, 2)
    nlvr2 = load_splits(replace(options("nlvr2", scenes / "nlvr2"), num_beams=2), seed=0).decoding
    assert (nlvr2.num_beams, nlvr2.candidates) == (2, ("true", "false"))


@pytest.mark.parametrize("on_bad_image", [None, "skip"])
def test_training_goes_on_without_missing_images_and_counts_them(
    data: DataOptions, capsys: pytest.CaptureFixture[str], on_bad_image: OnBadImage | None
) -> None:
    train = load_task("vqav2", data.data_dir, "train")
    remove(train, 0, 9)
    splits = load_splits(replace(data, on_bad_image=on_bad_image), seed=0)
    gone = {train.images(0), train.images(9)}
    kept = [index for index in range(len(train)) if train.images(index) not in gone]
    assert splits.train.example_ids() == [train[index].example_id for index in kept]
    said = capsys.readouterr().out
    assert "2 images of vqav2 are missing; 8 of 48 training examples are left out" in said
    assert len(splits.dev) == len(splits.test) == 24


def test_an_example_goes_if_one_of_its_two_images_is_missing(scenes: Path, tmp_path: Path) -> None:
    data = options("nlvr2", shutil.copytree(scenes / "nlvr2", tmp_path / "nlvr2"))
    train = load_task("nlvr2", data.data_dir, "train")
    train.images(4)[1].unlink()
    kept = load_splits(data, seed=0).train.example_ids()
    # Two sentences a pair.
    assert set(train.example_ids()) - set(kept) == {train[4].example_id, train[5].example_id}


def test_missing_images_are_not_held_out(data: DataOptions) -> None:
    """Or the run would depend on luck: the dev split must be whole."""
    data = replace(data, dev_split="", holdout_images=4)
    train = load_task("vqav2", data.data_dir, "train")
    gone = remove(train, *range(0, 32, 4))
    splits = load_splits(replace(data, holdout_images=3), seed=0)
    assert (len(splits.train.image_files()), len(splits.dev.image_files())) == (1, 3)
    assert not {*gone} & {*splits.train.image_files(), *splits.dev.image_files()}


def test_raise_names_the_first_missing_training_image(data: DataOptions) -> None:
    (path, *_) = remove(load_task("vqav2", data.data_dir, "train"), 0, 9)
    with pytest.raises(FileNotFoundError, match="2 of 12 images of vqav2 are missing from") as error:
        load_splits(replace(data, on_bad_image="raise"), seed=0)
    for part in (path.name, str(path.parent), "dept-vl data check", "--on_bad_image skip"):
        assert part in str(error.value)


def test_nothing_left_to_train_on_is_refused(data: DataOptions) -> None:
    for path in load_task("vqav2", data.data_dir, "train").image_files():
        path.unlink()
    with pytest.raises(FileNotFoundError, match="none of the images of vqav2 are there"):
        load_splits(data, seed=0)


@pytest.mark.parametrize("on_bad_image", [None, "raise"])
@pytest.mark.parametrize("split", ["dev", "test"])
def test_evaluation_refuses_missing_images(
    data: DataOptions, split: str, on_bad_image: OnBadImage | None
) -> None:
    data = replace(data, test_split="test", on_bad_image=on_bad_image)
    (path,) = remove(load_task("vqav2", data.data_dir, {"dev": "val", "test": "test"}[split]), 6)
    with pytest.raises(FileNotFoundError, match="1 of 6 images of vqav2 are missing") as error:
        load_splits(data, seed=0)
    assert path.name in str(error.value)


def test_evaluation_looks_for_the_images_of_its_examples_alone(data: DataOptions) -> None:
    dev = load_task("vqav2", data.data_dir, "val")
    limited = replace(data, dev_limit=2, test_split="test")
    asked = {*load_splits(limited, seed=0).dev.image_files()}
    for path in {*dev.image_files()} - asked:
        path.unlink()
    assert len(load_splits(limited, seed=0).dev) == 2


def test_evaluation_keeps_missing_images_if_they_may_be_skipped(data: DataOptions) -> None:
    remove(load_task("vqav2", data.data_dir, "val"), 6)
    splits = load_splits(replace(data, on_bad_image="skip"), seed=0)
    assert len(splits.dev) == 24


@pytest.mark.parametrize("option", ["train_split", "dev_split"])
def test_a_split_without_answers_is_refused(scenes: Path, option: str) -> None:
    data = options("vqav2", scenes / "vqav2")
    with pytest.raises(ValueError, match=f"{option}=test of vqav2 has no published answers"):
        load_splits(replace(data, **{option: "test"}), seed=0)  # type: ignore[arg-type]


def test_features_are_computed_once_where_they_fit(scenes: Path, vision: VisionEncoder) -> None:
    vqav2, nlvr2 = (load_splits(options(task, scenes / task), seed=0) for task in ("vqav2", "nlvr2"))
    files = {
        path
        for splits in (vqav2, nlvr2)
        for task in (splits.train, splits.dev, splits.test)
        for path in task.image_files()
    }
    needed = table_bytes(vision, len(files)) / GIB
    table = read(vision, vqav2, nlvr2, feature_memory=needed)
    assert isinstance(table, FeatureTable)
    assert table.places.keys() == files
    assert torch.isfinite(table([[path] for path in files])).all()
    assert read(vision, vqav2, nlvr2, feature_memory=0.99 * needed) is vision
    assert read(vision, vqav2, feature_memory=0.0) is vision
    assert read(vision, vqav2, features="live") is vision
    for folder in (scenes / "vqav2", scenes / "nlvr2"):
        assert not (folder / "features").exists()


def test_features_come_from_files_where_they_are_there(
    scenes: Path, tmp_path: Path, vision: VisionEncoder, capsys: pytest.CaptureFixture[str]
) -> None:
    vqav2, coco = (
        load_splits(options(task, shutil.copytree(scenes / task, tmp_path / task)), seed=0)
        for task in ("vqav2", "coco")
    )
    in_memory = read(vision, vqav2, coco)
    assert isinstance(in_memory, FeatureTable)
    assert not in_memory.files
    with pytest.raises(FileNotFoundError, match=r"no visual features at .*vqav2/features.*dept-vl features"):
        read(vision, vqav2, coco, features="cached")
    write(vision, vqav2, dtype="float32", batch_size=1)
    # Of one task alone they are no use.
    assert not read(vision, vqav2, coco).files  # type: ignore[union-attr]
    write(vision, coco, dtype="float32", batch_size=1)
    for choice in ("auto", "cached"):
        mapped = read(vision, vqav2, coco, features=choice, feature_memory=0.0)
        assert isinstance(mapped, FeatureTable)
        assert len({file.parent for file in mapped.files}) == 2
        assert mapped.places.keys() == in_memory.places.keys()
        examples = [[path] for path in mapped.places]
        # Files of one name in two folders.
        torch.testing.assert_close(mapped(examples), in_memory(examples))
    assert f"visual features: float32 from {tmp_path}/vqav2/features, " in capsys.readouterr().out
    assert read(vision, vqav2, coco, features="live") is vision


def test_features_of_several_precisions_are_not_mixed(
    scenes: Path, tmp_path: Path, vision: VisionEncoder
) -> None:
    parts = [
        load_splits(options(task, shutil.copytree(scenes / task, tmp_path / task)), seed=0)
        for task in ("vqav2", "coco")
    ]
    for part, dtype in zip(parts, ("float16", "float32"), strict=True):
        write(vision, part, dtype=dtype)
    with pytest.raises(ValueError, match="of one dtype, found float16, float32"):
        read(vision, *parts, features="cached")


@pytest.mark.parametrize("damage", ["encoder", "truncated", "unfinished", "lacking"])
def test_files_that_do_not_serve_are_refused_or_left_with_a_warning(
    data: DataOptions, vision: VisionEncoder, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    splits = load_splits(data, seed=0)
    if damage == "lacking":
        folder = write(vision, replace(splits, test=splits.dev, train=splits.dev))
    else:
        folder = write(vision, splits)
    if damage == "encoder":
        vision.layer = -2
    elif damage == "truncated":
        (folder / "features-00001.safetensors").write_bytes(b"short")
    elif damage == "unfinished":
        write_index(folder, read_index(folder) | {"shard_bytes": None})
    said = {
        "encoder": r"of another encoder.* differ in vision_layer",
        "truncated": r"features-00001\.safetensors is damaged: expected [\d,]+ bytes, found 5",
        "unfinished": r"are not finished; dept-vl features resumes",
        "lacking": r"images have no visual features in .*dept-vl features adds them",
    }[damage]
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        read(vision, splits, features="cached")
    table = read(vision, splits, features="auto")
    assert isinstance(table, FeatureTable)
    assert not table.files
    assert re.search(rf"warning: .*{said}", capsys.readouterr().out)


def test_only_images_that_have_changed_are_encoded_again(
    data: DataOptions,
    vision: VisionEncoder,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    splits = load_splits(data, seed=0)
    write(vision, splits, dtype="float32")
    changed = [splits.train.images(0)[0], splits.test.images(0)[0]]
    for path in changed:
        Image.new("RGB", (40, 32), (9, 200, 99)).save(path)
    expected = read(vision, splits, features="auto", features_dir=Path("none"))
    assert isinstance(expected, FeatureTable)
    assert not expected.files
    encoded: list[Path] = []
    encode = dept_vl.data.features.encode_images

    def noting(vision: VisionEncoder, paths: list[Path], *rest: Any) -> Any:
        encoded.extend(paths)
        return encode(vision, paths, *rest)

    monkeypatch.setattr(dept_vl.data.features, "encode_images", noting)
    with pytest.raises(ValueError, match=r"2 of .* images have changed"):
        read(vision, splits, features="cached")
    assert not encoded
    table = read(vision, splits, features="auto")
    assert isinstance(table, FeatureTable)
    assert set(encoded) == set(changed)
    assert "2 of" in capsys.readouterr().out
    examples = [[path] for path in table.places]
    assert table.places.keys() == expected.places.keys()
    for same in (table, pickle.loads(pickle.dumps(table)), FeatureTable.joined([table])):
        assert same.files
        torch.testing.assert_close(same(examples), expected(examples))
    # Not where there is no room for them.
    assert read(vision, splits, features="auto", feature_memory=0.0) is vision


def test_images_that_could_not_be_extracted_are_treated_as_any(
    data: DataOptions, vision: VisionEncoder
) -> None:
    splits = load_splits(data, seed=0)
    path = splits.dev.images(0)[0]
    path.write_bytes(b"no image")
    write(vision, splits, skip_unreadable=True)
    with pytest.raises(ValueError, match=rf"{path} is not a readable image.*--on_bad_image skip"):
        read(vision, splits, features="cached")
    table = read(vision, splits, features="cached", on_bad_image="skip")
    assert isinstance(table, FeatureTable)
    assert table.errors.keys() == {path}


def test_no_tower_no_features(scenes: Path) -> None:
    splits = load_splits(options("vqav2", scenes / "vqav2"), seed=0)
    assert read(None, splits) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("split", ["dev", "test"])
def test_a_broken_image_to_evaluate_is_found_before_training(
    data: DataOptions, vision: VisionEncoder, split: str
) -> None:
    splits = load_splits(replace(data, test_split="test"), seed=0)
    path = getattr(splits, split).images(7)[0]
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"is not a readable image.*--on_bad_image skip") as error:
        read(vision, splits)
    assert str(path) in str(error.value)
    skipping = load_splits(replace(data, test_split="test", on_bad_image="skip"), seed=0)
    table = read(vision, skipping)
    assert isinstance(table, FeatureTable)
    assert table.errors.keys() == {path}
    # The images of another task do not excuse it.
    with pytest.raises(ValueError, match="is not a readable image"):
        read(vision, skipping, splits)


def test_a_broken_image_to_learn_stops_nothing_unless_told_to(
    data: DataOptions, vision: VisionEncoder
) -> None:
    splits = load_splits(data, seed=0)
    path = splits.train.images(7)[0]
    path.write_bytes(b"")
    table = read(vision, splits)
    assert isinstance(table, FeatureTable)
    assert table.errors.keys() == {path}
    with pytest.raises(ValueError, match="is not a readable image") as error:
        read(vision, load_splits(replace(data, on_bad_image="raise"), seed=0))
    assert str(path) in str(error.value)
