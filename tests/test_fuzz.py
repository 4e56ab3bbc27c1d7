"""Damaged and hostile files: every loader takes one or refuses it with one clear line, and nothing else.

Each case is one mutation of a good file, drawn with a seed of its own, so that `test_mutated[KIND]` that
fails at case n fails there again. Most cases are in the slow test.
"""

import io
import json
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import random_image
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import forget_checksums, reset_accelerate
from safetensors.torch import save_file
from torch import nn
from transformers import get_linear_schedule_with_warmup

from dept_vl._utils.images import read_image
from dept_vl._utils.io import CHECKSUMS_FILE, read_object
from dept_vl._utils.tensors import read_tensors
from dept_vl.adapters import authors
from dept_vl.adapters.adapter import ADAPTER_FILE, TENSORS_FILE, Adapter
from dept_vl.config import RunConfig, read_config, to_json
from dept_vl.data.splits import read_candidates
from dept_vl.models.backbone import BACKBONE_FILE, BackboneFile
from dept_vl.models.language import load_language
from dept_vl.models.options import BEFORE_ORDER
from dept_vl.models.vision import VisionEncoder
from dept_vl.tasks import coco, gqa, nlvr2, vqav2
from dept_vl.tasks.gqa import GQA
from dept_vl.tasks.nlvr2 import NLVR2
from dept_vl.tasks.vqav2 import MINIVAL_FILE, VQAv2
from dept_vl.training import checkpoint as state
from dept_vl.training.checkpoint import TrainingState
from dept_vl.training.progress import Progress
from dept_vl.training.summary import Summary

FEW, MANY = 14, 90
"""Cases of each kind of file: of the default suite, and of the slow one (over 2,000 in all)."""
SECONDS = 10
"""That a loader may take for a file of a few kilobytes; a thousand times what it does take."""
GROWTH = 1 << 30
"""Bytes of memory that all cases of a kind may take: Pillow lets images of up to 256 MiB through."""
LONGEST = 1500
"""Characters of a message."""

# Mutations


def mutated(content: bytes, chance: Random) -> bytes:
    """One or a few random changes of a file."""
    if content[8:9] == b"{" and chance.random() < 0.5:
        return mutated_header(content, chance)
    if content[:1] in (b"{", b"[") and chance.random() < 0.7:
        return mutated_json(content, chance)
    changed = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 8])):
        chance.choice(BYTE_MUTATIONS)(changed, chance)
    return bytes(changed)


def flip(content: bytearray, chance: Random) -> None:
    if content:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)


def flip_at_start(content: bytearray, chance: Random) -> None:
    """Where headers are."""
    if content:
        content[chance.randrange(min(64, len(content)))] = chance.choice([0, 1, 0x7F, 0x80, 0xFF])


def cut(content: bytearray, chance: Random) -> None:
    del content[chance.randrange(len(content) + 1) :]


def insert(content: bytearray, chance: Random) -> None:
    place = chance.randrange(len(content) + 1)
    content[place:place] = chance.randbytes(chance.choice([1, 4, 100]))


def delete(content: bytearray, chance: Random) -> None:
    place = chance.randrange(len(content) + 1)
    del content[place : place + chance.choice([1, 4, 100])]


def duplicate(content: bytearray, chance: Random) -> None:
    place = chance.randrange(len(content) + 1)
    content[place:place] = content[place : place + chance.choice([4, 64, 1000])] * chance.choice([1, 20])


def enlarge(content: bytearray, chance: Random) -> None:
    """Four bytes that may be a size."""
    place = chance.randrange(len(content) + 1)
    content[place : place + 4] = chance.choice(
        [b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"]
    )


BYTE_MUTATIONS = (flip, flip_at_start, cut, insert, delete, duplicate, enlarge)

ODD = (
    *("null", "true", "false", "0", "-1", "1", "1.5", "-0.0", "1e308", "1e999", "NaN", "-Infinity"),
    *("2147483648", "9223372036854775808", "9" * 400, "9" * 5000, "[]", "{}", "[1, 2]", '{"a": 1}', '""'),
    *('"a\\nb"', '"\\u0000"', '"\\ud800"', '"../../x"', '"/x"', '"C:\\\\x"', '"x"', '[[["x"]]]'),
    f'"{"long " * 2000}"',
)
"""Values of JSON to put in a place of another."""
DEPTHS = (20, 400, 900, 940, 960, 980, 990, 100_000)
MARK = "the place of another value"


def mutated_json(content: bytes, chance: Random) -> bytes:
    """A value swapped, dropped, renamed or made odd; of JSON lines in one of them."""
    text = content.decode()
    try:
        tree = json.loads(text)
    except ValueError:
        lines = text.splitlines()
        number = chance.randrange(len(lines))
        lines[number] = mutated_json(lines[number].encode(), chance).decode()
        return "\n".join(lines).encode()
    places = list(places_of(tree))
    if not places or chance.random() < 0.03:
        return odd_value(chance).encode()
    holder, key = chance.choice(places)
    what = chance.choice(["odd", "odd", "odd", "swap", "drop", "rename", "double"])
    if what == "odd":
        holder[key] = MARK
    elif what == "swap":
        other, place = chance.choice(places)
        holder[key], other[place] = other[place], holder[key]
        if circular(tree):
            return content
    elif what == "drop":
        del holder[key]
    elif isinstance(holder, list):
        holder.insert(key, holder[key])
    else:
        holder[chance.choice(["x", "", "a\nb", "\ud800", *holder])] = holder.pop(key)
    return json.dumps(tree).replace(json.dumps(MARK), odd_value(chance)).encode()


def odd_value(chance: Random) -> str:
    if chance.random() < 0.15:
        depth = chance.choice(DEPTHS)
        return chance.choice(["[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth, "[" * depth])
    return chance.choice(ODD)


def places_of(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in lists and objects, with its holder."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield tree, key
        yield from places_of(tree[key])


def circular(tree: Any) -> bool:
    """Whether a value was put into itself."""
    try:
        json.dumps(tree)
    except ValueError:
        return True
    return False


def mutated_header(content: bytes, chance: Random) -> bytes:
    """A safetensors file with another header, of the length that it says or not."""
    length = int.from_bytes(content[:8], "little")
    header = mutated_json(content[8 : 8 + length], chance)
    said = len(header) if chance.random() < 0.9 else chance.choice([0, 1, 2**31, 2**63, 2**64 - 1])
    return said.to_bytes(8, "little") + header + content[8 + length :]


# Files


@dataclass(frozen=True)
class Kind:
    """A kind of file: a good one, and how a folder with it is read.

    Attributes:
        name: Of the file.
        content: Of a good one.
        load: Reads the file from a folder.
        beside: Other files of the folder.
    """

    name: str
    content: bytes
    load: Callable[[Path], object]
    beside: tuple[tuple[str, bytes], ...] = ()


def annotation_kinds(scenes: Path) -> dict[str, Kind]:
    questions, annotations = vqav2.question_names("val2014")[0], vqav2.annotation_names("val2014")[0]
    asked = (scenes / "vqav2" / questions).read_bytes()
    answered = (scenes / "vqav2" / annotations).read_bytes()
    minival = [{"question_id": row["question_id"]} for row in json.loads(asked)["questions"]]
    marker = "val2014/.keep"

    def read_vqa(folder: Path) -> object:
        return list(vqav2.read_rows(folder / questions, folder / annotations, "val2014"))

    def read_minival(folder: Path) -> object:
        return VQAv2().load(folder, "minival")[0]

    def file(task: str, name: str, load: Callable[[Path], object]) -> Kind:
        return Kind(name, (scenes / task / name).read_bytes(), lambda folder: load(folder / name))

    choices = next((scenes / "gqa").rglob("val_choices.json"), None)
    valid = {"1": {"valid": ["yes", "no"], "plausible": ["yes"]}, "2": {"valid": ["red"], "plausible": []}}
    return {
        "vqa questions": Kind(questions, asked, read_vqa, ((annotations, answered),)),
        "vqa annotations": Kind(annotations, answered, read_vqa, ((questions, asked),)),
        "minival": Kind(
            MINIVAL_FILE,
            json.dumps(minival).encode(),
            read_minival,
            ((questions, asked), (annotations, answered), (marker, b"")),
        ),
        "gqa questions": file("gqa", "val_balanced_questions.json", lambda path: list(gqa.read_rows(path))),
        "gqa choices": Kind(
            "val_choices.json",
            choices.read_bytes() if choices else json.dumps(valid).encode(),
            lambda folder: gqa.read_choices(folder / "val_choices.json"),
        ),
        "nlvr2": file("nlvr2", "dev.json", lambda path: list(nlvr2.read_rows(path))),
        "coco": file("coco", coco.KARPATHY_FILE, lambda path: coco.read_references(path, "val")),
    }


def answer_kinds() -> dict[str, Kind]:
    vqa = [{"question_id": number, "answer": "yes"} for number in range(20)]
    questions = [{"questionId": str(number), "prediction": "yes"} for number in range(20)]
    lines = "".join(f"dev-{number}-0-0,true\n" for number in range(20))
    words = ["yes", "no", "red", "two"]
    summary = {
        "scores": {"overall": 61.5},
        "trainable_parameters": {"total": 7},
        **{name: 1 for name in Summary.__annotations__ if name not in ("scores", "trainable_parameters")},
    }

    def kind(name: str, content: str, load: Callable[[Path], object]) -> Kind:
        return Kind(name, content.encode(), lambda folder: load(folder / name))

    return {
        "vqa predictions": kind("p.json", json.dumps(vqa), VQAv2.prediction_format.read),
        "gqa predictions": kind("p.json", json.dumps(questions), GQA.prediction_format.read),
        "nlvr2 predictions": kind("p.csv", lines, NLVR2.prediction_format.read),
        "candidates": kind("candidates.json", json.dumps(words), read_candidates),
        "config": kind("config.json", json.dumps(to_json(RunConfig())), read_config),
        "summary": kind("summary.json", json.dumps(summary), lambda path: read_object(path, Summary)),
    }


def image_kinds() -> dict[str, Kind]:
    def kind(form: str, mode: str = "RGB", **options: Any) -> Kind:
        file = io.BytesIO()
        random_image((40, 30), mode=mode).save(file, form, **options)
        return Kind(
            f"image.{form.lower()}", file.getvalue(), lambda at: read_image(at / f"image.{form.lower()}")
        )

    return {
        "jpeg": kind("JPEG"),
        "progressive jpeg": kind("JPEG", progressive=True),
        "png": kind("PNG"),
        "gif": kind("GIF", save_all=True, append_images=[random_image((40, 30), seed=1)]),
        "webp": kind("WEBP"),
        "tiff": kind("TIFF"),
        "deflated tiff": kind("TIFF", mode="L", compression="tiff_adobe_deflate"),
        "bmp": kind("BMP"),
    }


def small_adapter() -> Adapter:
    tensors = {
        "prompt.soft_prompt": torch.randn(2, 8),
        "prompt.offset_a": torch.randn(5, 4),
        "prompt.offset_b": torch.randn(4, 8),
        "visual_projection.linear.bias": torch.randn(8),
    }
    counts = {"prompt": 16, "low_rank": 52, "visual_projection": 8, "total": 76, "without_projection": 68}
    sizes = {"prompt_length": 2, "rank": 4, "max_source_length": 5, "d_model": 8, "alpha": 8.0, "scale": 4.0}
    sizes |= {"method": "dept", "seed": 0, "visual_offset": False}
    backbone = {"name": "tiny", "fingerprint": {"language": "0" * 16}, "visual_position_bias": "none"}
    return Adapter(sizes, backbone, "vqav2", {"overall": 61.5}, counts, tensors)


def model_kinds(folder: Path) -> dict[str, Kind]:
    small_adapter().save(folder / "adapter")
    save_file({"linear.weight": torch.randn(4, 3)}, folder / "projection.safetensors")
    sizes = {"num_virtual_tokens": 2, "token_dim": 8, "max_length": 5, "r": 4, "lora_alpha": 8}
    (folder / "official").mkdir()
    described = authors.DEFAULTS | sizes | {"base_model_name_or_path": "google-t5/t5-base"}
    (folder / "official" / authors.CONFIG_FILE).write_text(json.dumps(described))
    tensors = {name.removeprefix("prompt."): value for name, value in small_adapter().tensors.items()}
    named = {theirs: tensors[ours] for ours, theirs in authors.NAMES.items()}
    torch.save(named, folder / "official" / authors.TENSORS_FILE)
    backbone = {
        "name": "tiny",
        "visual_position_bias": "none",
        "vision": {"layer": -1, "class_token": False, "pooled_grid": 0},
    }
    (folder / BACKBONE_FILE).write_text(json.dumps(backbone))

    def one(path: Path, load: Callable[[Path], object]) -> Kind:
        return Kind(path.name, path.read_bytes(), lambda at: load(at / path.name))

    kinds = {
        "backbone": one(folder / BACKBONE_FILE, lambda path: read_object(path, BackboneFile, BEFORE_ORDER)),
        "projection": one(folder / "projection.safetensors", read_tensors),
    }
    whole = of_folder(folder / "adapter", Adapter.load)[CHECKSUMS_FILE]
    kinds[f"adapter, {CHECKSUMS_FILE}"] = whole
    forget_checksums(folder)  # which would find every other mutation before anything is read
    for part, load in (("adapter", Adapter.load), ("official", authors.read)):
        kinds |= {f"{part}, {name}": kind for name, kind in of_folder(folder / part, load).items()}
    return kinds


def of_folder(folder: Path, load: Callable[[Path], object]) -> dict[str, Kind]:
    """A kind for each file of a folder that is read as a whole."""
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    return {
        name: Kind(name, content, load, tuple((n, c) for n, c in files.items() if n != name))
        for name, content in files.items()
    }


def checkpoint_kinds(folder: Path) -> dict[str, Kind]:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    schedule = get_linear_schedule_with_warmup(optimizer, 1, 10)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    schedule.step()
    saved = TrainingState(folder, model, optimizer, schedule, Accelerator(cpu=True))
    progress = Progress(steps=1, best_step=1, best_scores={"overall": 3.5}, history=[(1, 3.5)])
    place = saved.save(progress)

    def load(at: Path) -> object:
        problem = state.check(at)
        if problem:
            raise ValueError(problem)
        saved.load_random_state(at)
        return saved.load(at)

    return {f"checkpoint, {name}": kind for name, kind in of_folder(place, load).items()}


@pytest.fixture(scope="module")
def kinds(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Kind]]:
    reset_accelerate()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("kinds")
        yield {
            **annotation_kinds(scenes),
            **answer_kinds(),
            **image_kinds(),
            **model_kinds(folder),
            **checkpoint_kinds(folder / "run"),
        }
    reset_accelerate()


NAMES = (
    *("vqa questions", "vqa annotations", "minival", "gqa questions", "gqa choices", "nlvr2", "coco"),
    *("vqa predictions", "gqa predictions", "nlvr2 predictions", "candidates", "config", "summary"),
    *("jpeg", "progressive jpeg", "png", "gif", "webp", "tiff", "deflated tiff", "bmp"),
    *("backbone", "projection", f"adapter, {ADAPTER_FILE}", f"adapter, {TENSORS_FILE}"),
    f"adapter, {CHECKSUMS_FILE}",
    *(f"official, {authors.CONFIG_FILE}", f"official, {authors.TENSORS_FILE}"),
    *("checkpoint, state.json", "checkpoint, tensors.safetensors", "checkpoint, rng-0.safetensors"),
    "checkpoint, manifest.json",
)


def test_all_kinds_are_named(kinds: dict[str, Kind]) -> None:
    assert set(NAMES) == set(kinds)
    assert len(NAMES) * FEW >= 400
    assert len(NAMES) * MANY >= 2000


# The property


class Hang(BaseException):
    """No loader catches it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    started = time.monotonic()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - started < seconds  # code that no signal interrupts


def loads(kind: Kind, folder: Path, content: bytes) -> bool:
    """Whether a file loads; if it does not, the message has to be in order."""
    for name, other in ((kind.name, content), *kind.beside):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(other)
    with time_limit(SECONDS):
        try:
            kind.load(folder)
        except (ValueError, OSError) as error:
            message = str(error)
        else:
            return True
    assert str(folder) in message
    assert len(message.splitlines()) == 1
    assert len(message) < LONGEST
    message.encode()  # it can be printed
    return False


def throw(kind: Kind, name: str, folder: Path, cases: int) -> None:
    before = peak_memory()
    assert loads(kind, folder / "whole", kind.content)
    refused = 0
    for case in range(cases):
        content = mutated(kind.content, Random(f"{name} {case}"))
        try:
            refused += not loads(kind, folder / str(case), content)
        except BaseException as error:
            error.add_note(f"{name}, case {case}: {content[:200]!r}")
            raise
    assert refused >= cases // 10
    assert peak_memory() - before < GROWTH


def peak_memory() -> int:
    """Bytes that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.mark.parametrize("name", NAMES)
def test_mutated(kinds: dict[str, Kind], tmp_path: Path, name: str) -> None:
    throw(kinds[name], name, tmp_path, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_mutated_many(kinds: dict[str, Kind], tmp_path: Path, name: str) -> None:
    throw(kinds[name], name, tmp_path, MANY)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_in_any_field_of_an_adapter(tmp_path: Path, data: st.DataObject) -> None:
    """What loads is the description as it was, but for metrics and names that mean nothing to the tensors."""
    adapter = small_adapter()
    path = tmp_path / ADAPTER_FILE
    if not path.is_file():
        adapter.save(tmp_path)
        forget_checksums(tmp_path)
        (tmp_path / "good.json").write_bytes(path.read_bytes())
    description = json.loads((tmp_path / "good.json").read_text())
    holder, key = data.draw(st.sampled_from(list(places_of(description))))
    holder[key] = data.draw(JSON_VALUES)
    path.write_text(json.dumps(description))
    try:
        loaded = Adapter.load(tmp_path)
    except ValueError as error:
        message = str(error)
        assert str(tmp_path) in message
        assert "\n" not in message
    else:
        assert loaded.trainable_parameters == adapter.trainable_parameters
        assert {**(loaded.prompt or {}), "seed": 0} == pytest.approx(adapter.prompt)  # DePT draws nothing


# No other way in

PACKAGE = Path(vqav2.__file__).parents[1]
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "scripts").rglob("*.py")])
UNSAFE = {
    "a pickle": r"\b(?:[pP]ickle|dill|joblib|shelve|marshal)\.(?:loads?|Unpickler|open)\b|\bimport pickle\b",
    "numpy's pickles": r"allow_pickle\s*=\s*True",
    "code": r"(?<![\w.])(?:eval|exec)\(|\byaml\.(?:unsafe_)?load\(",
    "remote code": r"trust_remote_code\s*=\s*(?!False)",
    "torch.load of more than weights": r"torch\.load\((?![^()]*weights_only=True)|weights_only\s*=\s*False",
    "models without saying that their code is not run": (
        r"\b(?:Auto\w+|kind)\.from_pretrained\((?![^()]*trust_remote_code=False)"
    ),
    "a bomb": r"MAX_IMAGE_PIXELS\s*=",
    "a shell": r"shell\s*=\s*True|\bos\.system\(",
}


@pytest.mark.parametrize("what", UNSAFE)
def test_nothing_unsafe_is_loaded(what: str) -> None:
    assert len(SOURCES) > 40
    found = [
        f"{path.name}: {match.group()}"
        for path in SOURCES
        for match in re.finditer(UNSAFE[what], path.read_text(encoding="utf-8"))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("a pickle", "pickle.load(file)"),
        ("numpy's pickles", "np.load(path, allow_pickle=True)"),
        ("code", "x = eval(text)"),
        ("remote code", "AutoModel.from_pretrained(name, trust_remote_code=True)"),
        ("torch.load of more than weights", 'torch.load(path, map_location="cpu")'),
        ("models without saying that their code is not run", "AutoConfig.from_pretrained(name)"),
        ("a bomb", "Image.MAX_IMAGE_PIXELS = None"),
        ("a shell", "subprocess.run(line, shell=True)"),
    ],
)
def test_what_is_unsafe_would_be_found(what: str, line: str) -> None:
    assert re.search(UNSAFE[what], line)


def test_code_of_a_model_is_neither_run_nor_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: object) -> str:
        raise AssertionError("asked at the terminal")

    monkeypatch.setattr("builtins.input", asked)
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass OwnConfig: pass\n")
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for load in (load_language, VisionEncoder.from_pretrained):
        with pytest.raises(ValueError, match="custom code"):
            load(tmp_path)
    assert not ran.exists()


def test_safetensors_of_huge_tensors_take_no_memory(tmp_path: Path) -> None:
    header = {"prompt.soft_prompt": {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}}
    content = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(len(content).to_bytes(8, "little") + content)
    before = peak_memory()
    with pytest.raises(ValueError, match=r"x\.safetensors is damaged"):
        read_tensors(tmp_path / "x.safetensors")
    assert peak_memory() - before < 1 << 24
