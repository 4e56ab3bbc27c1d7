"""BLEU, METEOR, ROUGE-L, CIDEr and SPICE of image captions, as the COCO caption evaluation prints them.

The figures are those of `pycocoevalcap.eval.COCOEvalCap` (Chen et al. 2015, "Microsoft COCO Captions:
Data Collection and Evaluation Server"): its tokeniser and its scorers, with its settings. This module
starts and stops Java, keeps each caption on one line, writes nothing into the package's folder, which may
be read-only, and makes scores independent of the machine's locale and paths.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from threading import Lock

from dept_vl._utils.terminal import waiting

PERCENT = 100
REPORTED = ("CIDEr", "Bleu_4", "METEOR", "ROUGE_L", "Bleu_1", "Bleu_2", "Bleu_3")

SPICE_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
"""Files that SPICE needs and the package does not include."""

JAVA_HINT = (
    "install one: `apt install default-jre-headless` (Debian, Ubuntu), `conda install -c conda-forge "
    "openjdk`, or `brew install openjdk` (macOS)"
)

# Decimal points and UTF-8, independent of the machine's locale.
JAVA = (
    "java",
    "-Dfile.encoding=UTF-8",
    *(
        f"-Duser.{name}{use}={value}"
        for name, value in (("language", "en"), ("country", "US"))
        for use in ("", ".format")
    ),
)
METEOR_OPTIONS = ("-", "-", "-stdio", "-l", "en", "-norm")
NEUTRAL_LOCALE = {"LC_ALL": "C.UTF-8"}

Captions = dict[int, list[str]]
"""Captions by image id; a prediction has one."""


Figures = dict[str, float]
"""Scores by `pycocoevalcap`'s keys."""


def reported(figures: Figures) -> Figures:
    """Return the metrics that a task reports, CIDEr first."""
    return {name: float(figures[name]) for name in REPORTED if name in figures}


def score_captions(
    references: Mapping[int, Sequence[str]],
    predictions: Mapping[int, str],
    *,
    meteor: bool = True,
    spice: bool = False,
) -> Figures:
    """Score one predicted caption for each image against the captions people wrote for it.

    Captions are given as written: the Penn Treebank tokeniser of the COCO evaluation lower-cases them
    and drops punctuation. A line break of any kind within a caption counts as a space. An empty
    prediction is scored like any other. Images are taken in the order of their ids, so the order of the
    mappings does not matter.

    Args:
        references: Human captions by image id, at least one for each image; five in COCO.
        predictions: One caption by image id, for the same images.
        meteor: Whether to compute METEOR, a Java program that loads a large table on every call.
        spice: Whether to compute SPICE, which takes minutes for thousands of images and about 8 GB of memory.

    Returns:
        By `pycocoevalcap`'s keys, not rounded and times 100, as papers print them (its CIDEr of 1.125 is
        112.5 here): `Bleu_1` to `Bleu_4` and `METEOR` 1.5, over the whole set and not the mean over images;
        `ROUGE_L`, `CIDEr` (CIDEr-D) and `SPICE`, means over images; the `scale` (100), and the images as `n`.
        CIDEr weighs words by how few images have them among the references being scored, so that its figure
        for a subset does not compare with that for the whole; it may exceed 100, and is 0 of one image.

    Raises:
        ValueError: If no reference has a word.
        ImportError: If the package `pycocoevalcap` is not installed.
        FileNotFoundError: If Java is missing, or SPICE is selected and its models are missing.
        RuntimeError: If a Java program fails.
    """
    check_installed(spice)
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    image_ids = sorted(references)
    human = _tokenise({image_id: list(references[image_id]) for image_id in image_ids})
    predicted = _tokenise({image_id: [predictions[image_id]] for image_id in image_ids})
    if not any(caption for captions in human.values() for caption in captions):
        raise ValueError(f"expected references with words, found none in those of {len(human)} images")

    bleu, _ = Bleu(4).compute_score(human, predicted, verbose=0)
    rouge_l, _ = Rouge().compute_score(human, predicted)
    cider, _ = Cider().compute_score(human, predicted)
    fractions = {f"Bleu_{words}": figure for words, figure in enumerate(bleu, start=1)}
    if meteor:
        fractions["METEOR"] = _meteor(human, predicted)
    fractions |= {"ROUGE_L": rouge_l, "CIDEr": cider}
    if spice:
        fractions["SPICE"] = _spice(human, predicted)
    figures = {name: PERCENT * float(figure) for name, figure in fractions.items()}
    return figures | {"scale": PERCENT, "n": len(image_ids)}


def check_scorers(*, meteor: bool) -> None:
    """Raise the errors of `score_captions` before predictions are made; METEOR is tried if it is used."""
    check_installed()
    if meteor:
        check_meteor()


@cache
def check_meteor() -> None:
    """Score a caption with METEOR, once per process; raise RuntimeError if METEOR does not work."""
    if os.environ.get("RANK", "0") != "0":  # the main process alone scores
        return
    figure = _meteor({0: ["two dogs run"]}, {0: ["two dogs run"]})
    if not 0.9 < figure <= 1:
        raise RuntimeError(f"METEOR does not work here: of a caption and itself it says {figure}")


def check_installed(spice: bool = False) -> None:
    """Raise ImportError or FileNotFoundError if a requirement of the scorers is missing."""
    try:
        import pycocoevalcap.spice.spice as spice_module
    except ImportError as error:
        raise ImportError(
            'caption scores need the package pycocoevalcap; install it with `pip install "dept-vl[caption]"`'
        ) from error
    if shutil.which("java") is None:
        raise FileNotFoundError(
            f"caption scores need a Java runtime, and no `java` is on the PATH; {JAVA_HINT}"
        )
    library = Path(spice_module.__file__).parent / "lib"
    absent = [name for name in SPICE_MODELS if not (library / name).is_file()]
    if spice and absent:
        raise FileNotFoundError(
            f"SPICE needs the Stanford CoreNLP models: {', '.join(absent)} not found in {library}. Download "
            "them once, online and with write access to that folder, by `python -m "
            "pycocoevalcap.spice.get_stanford_models`, or score without SPICE"
        )


def _tokenise(captions: Captions) -> Captions:
    """Tokenise like the package's `PTBTokenizer`, but without writing files into its folder."""
    from pycocoevalcap.tokenizer import ptbtokenizer

    # The tokeniser reads one caption per line, and U+2028 and similar characters end a line too.
    lines = [" ".join(caption.splitlines()) for group in captions.values() for caption in group]
    jar = Path(ptbtokenizer.__file__).parent / ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR
    command = ["-cp", jar.name, "edu.stanford.nlp.process.PTBTokenizer"]
    command += ["-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    text = "".join(f"{line}\n" for line in lines)
    # Half a surrogate pair cannot be written in UTF-8; as "?" it is punctuation, and dropped.
    output = _run_java(command, text.encode("utf-8", errors="replace"), "the tokeniser", jar.parent)
    tokenised = output.decode("utf-8").split("\n")[:-1]
    if len(tokenised) != len(lines):
        raise RuntimeError(f"expected {len(lines)} lines from the tokeniser, found {len(tokenised)}")
    remaining = iter(tokenised)
    return {
        image_id: [_drop_punctuation(next(remaining), ptbtokenizer.PUNCTUATIONS) for _ in group]
        for image_id, group in captions.items()
    }


def _drop_punctuation(line: str, punctuation: Sequence[str]) -> str:
    # Not `split()`: tokens such as "1 1/2" hold a no-break space.
    return " ".join(token for token in line.rstrip().split(" ") if token not in punctuation)


def _meteor(references: Captions, predictions: Captions) -> float:
    """Return METEOR from 0 to 1. The Java process is always stopped, also after an error."""
    from pycocoevalcap.meteor import meteor as package

    meteor = package.Meteor.__new__(package.Meteor)  # without its constructor, which starts Java itself
    meteor.lock = Lock()
    folder = Path(package.__file__).parent
    # The table is passed explicitly, since METEOR does not find it in a path with a space. METEOR runs
    # in its own folder, since a colon in a path would end the class path.
    table = folder / "data" / "paraphrase-en.gz"
    process = meteor.meteor_p = subprocess.Popen(
        [*JAVA, "-Xmx2G", "-jar", package.METEOR_JAR, *METEOR_OPTIONS, "-a", str(table)],
        cwd=folder,
        env=os.environ | NEUTRAL_LOCALE,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        with waiting("computing METEOR"):
            score, _ = meteor.compute_score(references, predictions)
    except (OSError, ValueError) as error:  # a broken pipe, or no line where a figure should be
        process.kill()
        said = process.stderr.read().decode("utf-8", errors="replace").strip() if process.stderr else ""
        raise RuntimeError(
            f"METEOR failed, a Java program; it said: {said[-2000:] or 'nothing'}. --no_meteor leaves it out"
        ) from error
    finally:
        process.kill()
        process.communicate()  # closes the pipes, and waits for the end
        if meteor.lock.locked():
            meteor.lock.release()  # left locked by an error, on which its `__del__` would wait for ever
    return float(score)


def _spice(references: Captions, predictions: Captions) -> float:
    """Return SPICE from 0 to 1, like the package's `Spice`, but without writing into its folder."""
    from pycocoevalcap.spice import spice

    rows = [
        {"image_id": image_id, "test": predictions[image_id][0], "refs": captions}
        for image_id, captions in references.items()
    ]
    jar = Path(spice.__file__).parent / spice.SPICE_JAR
    with TemporaryDirectory() as folder:
        asked, scored = Path(folder) / "captions.json", Path(folder) / "scores.json"
        asked.write_text(json.dumps(rows), encoding="ascii")
        command = ["-Xmx8G", "-jar", jar.name, str(asked), "-out", str(scored), "-subset", "-silent"]
        program = "SPICE (which needs Java 8 to 14: later ones have no JavaScript engine)"
        _run_java(command, b"", program, jar.parent)
        results = json.loads(scored.read_text(encoding="utf-8"))
    return fmean(float(result["scores"]["All"]["f"]) for result in results)


def _run_java(arguments: list[str], text: bytes, program: str, folder: Path) -> bytes:
    """Return the output of a Java program in its folder; raise RuntimeError if it fails.

    The folder is the working directory, since a colon in the path of a class would end the class path.
    """
    with waiting(f"running {program}"):
        done = subprocess.run(
            [*JAVA, *arguments],
            cwd=folder,
            env=os.environ | NEUTRAL_LOCALE,
            input=text,
            capture_output=True,
            check=False,
        )
    if done.returncode != 0:
        said = done.stderr.decode("utf-8", errors="replace").strip()[-2000:]
        raise RuntimeError(
            f"`java` ended with status {done.returncode} while running {program}; it said: "
            f"{said or 'nothing'}. If that is for lack of a Java runtime, {JAVA_HINT}"
        )
    return done.stdout
