"""Caption scores against `COCOEvalCap` run on the same captions, and what may go wrong around it."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from dept_vl.tasks.metrics import caption as caption_module
from dept_vl.tasks.metrics.caption import Figures, check_meteor, score_captions

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no Java runtime on the PATH")

# Made up for these tests. Ids out of order, 1 to 5 references, an empty prediction first and last.
REFERENCES = {
    40: [
        "A brown dog runs across the wet grass.",
        "A dog is running in a field, its tongue out.",
        "The dog chases a ball over the lawn at 5 p.m.",
        "brown dog running outdoors",
        "There's a dog on the grass; it looks happy!",
    ],
    3: ["Two women sit at a table and drink coffee.", "Two ladies having a coffee", "A café table for two"],
    17: ["A man in a red shirt rides a wave.", "Surfer riding a large wave in the ocean"],
    8: ['A sign that says "STOP" ||| at a crossing', "A red stop sign on the corner | of a street"],
    21: ["A bowl with 1 1/2 oranges", "Oranges in a white bowl on a wooden table", "Some fruit (oranges)"],
    5: ["Three zebras graze on the dry plain."],
    1002: ["A cat sleeps on a laptop keyboard", "The cat's asleep on a computer.", "..."],
    33: ["A train at the station in the U.S.", "The train is about to leave the platform"],
    2: ["A child holds a striped umbrella in the rain", "A little girl under an umbrella"],
    60: ["A pizza with tomatoes and basil on a plate", "A whole pizza ☃ on a table", "A baked pizza"],
    61: ["People flying kites on the beach", "A crowd of people watches kites at the beach"],
    12: ["A bathroom with a white sink and a mirror", "A clean white bathroom", "A sink below a mirror"],
}
PREDICTIONS = {
    1002: "",
    61: "people fly kites on a sunny beach",
    40: "a brown dog running across a field",
    3: "Two women drinking coffee at a café table",
    17: "a surfer rides a large wave",
    8: "a stop sign ||| on the corner of a street",
    21: "a bowl of oranges on a wooden table",
    5: "a herd of zebras on the plain",
    33: "A train is at the station in the U.S.",
    12: "a white bathroom sink below a mirror",
    60: "a pizza on a plate with tomatoes ☃",
    2: "",
}

LINE_BREAKS = ["\n", "\r", "\r\n", "\v", "\f", "\x1c", "\x85", "\u2028", "\u2029"]

OFFICIAL = """
import json, sys
import pycocoevalcap.eval as evaluation
from pycocotools.coco import COCO

class Nothing:
    def method(self): return "nothing"
    def compute_score(self, references, predictions): return 0.0, []

evaluation.Spice = Nothing  # its models are not shipped
if sys.argv[4] == "False":
    evaluation.Meteor = Nothing
coco = COCO(sys.argv[1])
evaluator = evaluation.COCOEvalCap(coco, coco.loadRes(sys.argv[2]))
evaluator.evaluate()
with open(sys.argv[3], "w") as file:
    json.dump(evaluator.eval, file)
"""


def break_lines(text: str) -> str:
    """Every space another kind of line break."""
    first, *words = text.split(" ")
    breaks = [LINE_BREAKS[index % len(LINE_BREAKS)] for index in range(len(words))]
    return first + "".join(mark + word for mark, word in zip(breaks, words, strict=True))


def package_folder() -> Path:
    import pycocoevalcap.eval

    return Path(pycocoevalcap.eval.__file__).parent


def package_files() -> set[Path]:
    """All but Python's own caches."""
    return {path for path in package_folder().rglob("*") if "__pycache__" not in path.parts}


def java_children() -> list[psutil.Process]:
    """Those that have ended and were not waited for included."""
    return [child for child in psutil.Process().children(recursive=True) if "java" in child.name()]


@pytest.fixture(scope="module")
def opened() -> Iterator[Callable[[], set[Path]]]:
    """What this process opened for writing so far."""
    paths: set[Path] = set()
    listening = True

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if listening and event == "open" and isinstance(arguments[0], str):
            path, _, flags = arguments
            if flags & (os.O_WRONLY | os.O_RDWR):
                paths.add(Path(path))

    sys.addaudithook(note)
    yield lambda: set(paths)
    listening = False  # the hook itself cannot be taken out


@dataclasses.dataclass(frozen=True)
class Run:
    meteor: bool
    score: Figures
    official: dict[str, float]
    written: set[Path]
    left_over: set[Path]
    running: list[psutil.Process]


def odd_surroundings(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """A decimal comma, and a path with a space and what URLs and class paths write otherwise."""
    from pycocoevalcap.meteor import meteor
    from pycocoevalcap.tokenizer import ptbtokenizer

    for package in (meteor, ptbtokenizer):
        file = Path(package.__file__)
        odd = folder / "my environment, 50%20 #1: é+" / file.parent.name
        odd.parent.mkdir(exist_ok=True)
        odd.symlink_to(file.parent)
        patch.setattr(package, "__file__", str(odd / file.name))
    # As Java has it where LANG is de_DE.UTF-8 and that locale is installed.
    patch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE")
    patch.setenv("LC_ALL", "C")


@pytest.fixture(
    scope="module",
    params=[False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["without METEOR", "with METEOR"],
)
def run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, opened: Callable[[], set[Path]]
) -> Run:
    """The official evaluation of the captions, and at the same time ours of them broken into lines.

    Ours is made in odd surroundings, which must not matter. One run for many tests: METEOR takes time.
    """
    folder = tmp_path_factory.mktemp("coco")
    annotations, results, printed = (folder / name for name in ("captions.json", "results.json", "eval.json"))
    image_ids = sorted(REFERENCES)
    pairs = [(image_id, text) for image_id in image_ids for text in REFERENCES[image_id]]
    annotations.write_text(
        json.dumps(
            {
                "images": [{"id": image_id} for image_id in image_ids],
                "annotations": [
                    {"id": index, "image_id": image_id, "caption": text}
                    for index, (image_id, text) in enumerate(pairs)
                ],
                "info": {},
                "licenses": [],
                "type": "captions",
            }
        )
    )
    results.write_text(json.dumps([{"image_id": key, "caption": PREDICTIONS[key]} for key in image_ids]))
    files_before, opened_before = package_files(), opened()
    official = subprocess.Popen(
        [sys.executable, "-c", OFFICIAL, str(annotations), str(results), str(printed), str(request.param)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        with pytest.MonkeyPatch.context() as patch:
            odd_surroundings(folder, patch)
            score = score_captions(
                {key: [break_lines(text) for text in texts] for key, texts in REFERENCES.items()},
                {key: break_lines(text) for key, text in PREDICTIONS.items()},
                meteor=request.param,
            )
        written = opened() - opened_before
    finally:
        said, _ = official.communicate()
    assert official.returncode == 0, said
    return Run(
        meteor=request.param,
        score=score,
        official=json.loads(printed.read_text()),
        written=written,
        left_over=package_files() - files_before,
        running=java_children(),
    )


@pytest.fixture
def fake_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes a Python script the only `java` there is."""

    def make(script: str) -> None:
        folder = tmp_path / "bin"
        folder.mkdir()
        arguments = "sys.argv = [one for one in sys.argv if not one.startswith('-D')]"
        (folder / "java").write_text(f"#!{sys.executable}\nimport json, sys\n{arguments}\n{script}\n")
        (folder / "java").chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))

    return make


@pytest.fixture
def spice_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The package's module, as if installed elsewhere and its models not downloaded."""
    import pycocoevalcap.spice.spice as module

    (tmp_path / "spice" / "lib").mkdir(parents=True)
    monkeypatch.setattr(module, "__file__", str(tmp_path / "spice" / "spice.py"))
    return module


@needs_java
def test_scores_as_official(run: Run) -> None:
    """Times 100, for captions that the official evaluation gets on one line each."""
    figures = dict(run.score)
    assert figures.pop("scale") == 100
    assert figures.pop("n") == len(REFERENCES)
    expected = {key: 100 * value for key, value in run.official.items() if key != "SPICE"}
    if not run.meteor:
        del expected["METEOR"]
    assert figures == pytest.approx(expected, rel=1e-12)
    # Neither trivially right nor trivially nothing.
    assert all(5 < value < 250 for value in figures.values())
    figures.pop("METEOR", None)
    quick = score_captions(REFERENCES, PREDICTIONS, meteor=False)
    assert quick == figures | {"scale": 100, "n": len(REFERENCES)}


@needs_java
def test_package_folder_is_left_alone(run: Run, opened: Callable[[], set[Path]], tmp_path: Path) -> None:
    """Nothing is written into it, not even for a moment, so it may be read-only."""
    in_package = {path for path in run.written if path.resolve().is_relative_to(package_folder().resolve())}
    assert not {path for path in in_package if "__pycache__" not in path.parts}
    assert not run.left_over
    (tmp_path / "seen").write_text("the hook works")
    assert tmp_path / "seen" in opened()


@needs_java
def test_no_java_is_left(run: Run) -> None:
    """METEOR's process is waited for, not only killed."""
    assert run.running == []


@needs_java
def test_meteor_that_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    """One error that says so; no process and no lock is left, on which Python would wait for ever."""
    from pycocoevalcap.meteor.meteor import Meteor

    seen = []

    def die(self: Meteor, hypothesis: str, references: list[str]) -> str:
        seen.append(self)
        self.meteor_p.kill()
        return "no figures"

    monkeypatch.setattr(Meteor, "_stat", die)
    with pytest.raises(RuntimeError, match="METEOR failed, a Java program; it said: nothing"):
        caption_module._meteor({1: ["a dog"]}, {1: ["a dog"]})
    (meteor,) = seen
    assert not meteor.lock.locked()
    assert java_children() == []


@needs_java
def test_interrupted_meteor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control-C reaches the caller as it is, and stops Java too."""
    from pycocoevalcap.meteor.meteor import Meteor

    def interrupt(self: Meteor, hypothesis: str, references: list[str]) -> str:
        assert len(java_children()) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(Meteor, "_stat", interrupt)
    with pytest.raises(KeyboardInterrupt):
        caption_module._meteor({1: ["a dog"]}, {1: ["a dog"]})
    assert java_children() == []


@pytest.mark.slow
@needs_java
def test_meteor_is_tried_wherever_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd_surroundings(tmp_path, monkeypatch)
    check_meteor.cache_clear()
    check_meteor()


def test_a_meteor_that_does_not_run_is_found_beforehand(fake_java: Callable[[str], None]) -> None:
    fake_java("sys.exit('no memory')")
    check_meteor.cache_clear()
    with pytest.raises(RuntimeError, match=r"no memory.*--no_meteor"):
        check_meteor()


@needs_java
@pytest.mark.parametrize("position", [1, 2, 3])
def test_odd_caption_stays_with_its_image(position: int) -> None:
    """Whatever a caption holds, first, between or last: the others come out as without it."""
    odd = [f"a{mark}b" for mark in LINE_BREAKS]
    odd += ["", " ", "\n", "\n\n\n", "...", "a ||| b", " ||| ", "SCORE ||| a", "EVAL ||| 1 2", "\ud800", "\0"]
    odd += [
        "\ufeff",
        "a\u200bb",
        "<!-- ",
        "<b",
        "*NL*",
        "🐶",
        "e\u0301",
        "&#10;",
        "a\\",
        "a \\n b",
        "at 5 p.m.",
    ]
    plain = {1: ["A man in the U.S."], 2: ['The "big" cat', "It's 1 1/2"], 3: ["Dogs, two."]}
    expected = {1: ["a man in the u.s."], 2: ["the big cat", "it 's 1\xa01/2"], 3: ["dogs two"]}
    tokenised = caption_module._tokenise(plain | {position: odd})
    assert {key: len(captions) for key, captions in tokenised.items()} == {
        key: len(odd) if key == position else len(captions) for key, captions in plain.items()
    }
    for key in plain.keys() - {position}:
        assert tokenised[key] == expected[key]
    assert tokenised[position][: len(LINE_BREAKS)] == ["a b"] * len(LINE_BREAKS)
    # METEOR's line is split at "|||", and ends at these.
    assert not any(mark in text for text in tokenised[position] for mark in ("|||", "\n", "\r"))


@needs_java
def test_references_without_words() -> None:
    """Punctuation only, in all of them: nothing to compare with."""
    with pytest.raises(ValueError, match="references with words, found none in those of 2 images"):
        score_captions({1: ["...", "!"], 2: [""]}, {1: "a dog", 2: "a cat"})


def test_spice_appears_only_where_it_was_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every figure goes under its own name, times 100."""
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setattr(caption_module, "check_installed", lambda spice=False: None)
    monkeypatch.setattr(caption_module, "_tokenise", lambda captions: captions)
    monkeypatch.setattr(caption_module, "_meteor", lambda *_: 0.055)
    monkeypatch.setattr(caption_module, "_spice", lambda *_: 0.215)
    score = score_captions({1: ["a dog runs off"]}, {1: "a dog runs"})
    names = ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr", "scale", "n"]
    assert list(score) == names
    assert (score["METEOR"], score["scale"], score["n"]) == (5.5, 100, 1)
    with_spice = score_captions({1: ["a dog runs off"]}, {1: "a dog runs"}, spice=True)
    assert with_spice == score | {"SPICE": 21.5}
    assert list(with_spice) == [*names[:7], "SPICE", *names[7:]]
    assert json.loads(json.dumps(with_spice)) == with_spice


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Says what to install."""
    monkeypatch.setitem(sys.modules, "pycocoevalcap.spice.spice", None)
    with pytest.raises(ImportError, match=r'pip install "dept-vl\[caption\]"'):
        score_captions({1: ["a dog"]}, {1: "a dog"})


def test_missing_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Says how to get it on each system."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"default-jre-headless.*openjdk.*brew install openjdk"):
        score_captions({1: ["a dog"]}, {1: "a dog"})


def test_java_that_fails(fake_java: Callable[[str], None]) -> None:
    """A `java` that is no Java, as macOS has one: what it said, and how to get one."""
    fake_java("sys.exit('Unable to locate a Java Runtime.')")
    with pytest.raises(RuntimeError, match=r"status 1 .*the tokeniser.*Unable to locate.*brew install"):
        score_captions({1: ["a dog"]}, {1: "a dog"})


def test_tokeniser_that_loses_a_line(fake_java: Callable[[str], None]) -> None:
    """Captions are never given to another image."""
    fake_java("print('a dog')")
    with pytest.raises(RuntimeError, match="expected 2 lines from the tokeniser, found 1"):
        score_captions({1: ["a dog"], 2: ["a cat"]}, {1: "a dog", 2: "a cat"})


def test_spice_without_its_models(spice_module: ModuleType, fake_java: Callable[[str], None]) -> None:
    """Said before anything is run, with what to do; without SPICE nothing is said of it."""
    fake_java("sys.exit('started')")
    lib = Path(str(spice_module.__file__)).parent / "lib"
    (lib / "stanford-corenlp-3.6.0.jar").touch()
    expected = r"SPICE .*: stanford-corenlp-3.6.0-models.jar not found in .*lib\. .*get_stanford_models`"
    with pytest.raises(FileNotFoundError, match=expected):
        score_captions({1: ["a dog"]}, {1: "a dog"}, spice=True)
    with pytest.raises(RuntimeError, match="started"):
        score_captions({1: ["a dog"]}, {1: "a dog"})
    (lib / "stanford-corenlp-3.6.0-models.jar").touch()
    with pytest.raises(RuntimeError, match="started"):
        score_captions({1: ["a dog"]}, {1: "a dog"}, spice=True)


def test_spice(spice_module: ModuleType, fake_java: Callable[[str], None], tmp_path: Path) -> None:
    """What is asked of SPICE and how its answer is read; its files go elsewhere and are gone after."""
    fake_java(
        f"""
import os
rows = json.load(open(sys.argv[4]))
figures = [{{"All": {{"f": 0.25 * index}}}} for index in range(len(rows))]
scored = [{{"image_id": row["image_id"], "scores": each}} for row, each in zip(rows, figures)]
json.dump(scored, open(sys.argv[sys.argv.index("-out") + 1], "w"))
json.dump([sys.argv, rows, os.getcwd()], open({str(tmp_path / "log")!r}, "w"))"""
    )
    score = caption_module._spice({3: ["a dog", "a café"], 4: ["a cat"]}, {3: ["one dog"], 4: ["cat"]})
    assert score == 0.125
    (_, *arguments), rows, folder = json.loads((tmp_path / "log").read_text())
    assert rows == [
        {"image_id": 3, "test": "one dog", "refs": ["a dog", "a café"]},
        {"image_id": 4, "test": "cat", "refs": ["a cat"]},
    ]
    spice_folder = Path(str(spice_module.__file__)).parent
    assert Path(folder) == spice_folder
    assert arguments[:3] == ["-Xmx8G", "-jar", "spice-1.0.jar"]
    asked, scored = Path(arguments[3]), Path(arguments[5])
    assert asked.parent == scored.parent
    assert not asked.parent.exists()
    assert [path.name for path in spice_folder.iterdir()] == ["lib"]


def test_spice_that_fails(spice_module: ModuleType, fake_java: Callable[[str], None]) -> None:
    """Its jar wants an old Java, which its own message does not say."""
    fake_java("sys.exit('NullPointerException')")
    with pytest.raises(RuntimeError, match=r"SPICE \(which needs Java 8 to 14.*NullPointerException"):
        caption_module._spice({3: ["a dog"]}, {3: ["one dog"]})
