"""Rated movie-review snippets, as a task like SST-2 that needs only the Python package index.

The source distribution of `vaderSentiment` (C.J. Hutto, MIT licence; Hutto & Gilbert 2014) has 10,605
sentences of reviews on rottentomatoes.com (Pang & Lee), each with the mean of 20 or more ratings from -4 to
4:

    3	-0.6	Effective but too tepid biopic

The sign of the mean decides whether a snippet is positive or negative. The 533 snippets with a mean closer to
zero than `NEUTRAL` are left out, which leaves 4,996 positive and 5,076 negative ones. The split of a sentence
only depends on its hash, so no sentence is in two splits; validation and test have a tenth each. Which
sentences are from the same review is not published. SST-2 has the same sentences, so do not train on one and
score on the other.
"""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

REQUIREMENT = "vaderSentiment==3.3.2"
INNER = "additional_resources/hutto_ICWSM_2014.tar.gz"
RATED = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
NEUTRAL = 0.5
"""Minimum absolute mean rating; ratings closer to zero are neutral."""
SPLITS = ("train", "validation", "test")


def download(folder: Path) -> Path:
    """Download the source distribution with pip; raise OSError if that fails."""
    command = ["download", "--no-binary", ":all:", "--no-deps", "--dest", str(folder), REQUIREMENT]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *command], capture_output=True, text=True, check=False
    )
    found = list(folder.glob("*.tar.gz"))
    if done.returncode or not found:
        raise OSError(
            f"pip could not download {REQUIREMENT}: {done.stderr.strip()[-300:]}; "
            f"fetch its source distribution yourself and name it with --archive"
        )
    return found[0]


def write(output_dir: Path, archive: Path | None = None) -> dict[str, int]:
    """Write `train.jsonl`, `validation.jsonl` and `test.jsonl`; return the number of examples of each.

    Args:
        output_dir: Folder to write to.
        archive: Source distribution; None downloads it.

    Raises:
        FileExistsError: If the folder already has such files.
        OSError: If the download fails.
        ValueError: If the distribution has another content than expected.
    """
    paths = {split: output_dir / f"{split}.jsonl" for split in SPLITS}
    if any(path.exists() for path in paths.values()):
        raise FileExistsError(f"{output_dir} already holds snippets; nothing was changed there")
    with TemporaryDirectory() as folder:
        text = read(archive or download(Path(folder)))
    lines: dict[str, list[str]] = {split: [] for split in SPLITS}
    for sentence, rating in parse(text):
        if abs(rating) >= NEUTRAL:
            record = {"sentence": sentence, "label": int(rating > 0), "rating": rating}
            lines[split_of(sentence)].append(json.dumps(record, ensure_ascii=False))
    output_dir.mkdir(parents=True, exist_ok=True)
    for split, path in paths.items():
        path.write_text("\n".join([*lines[split], ""]), encoding="utf-8")
    return {split: len(lines[split]) for split in SPLITS}


def read(archive: Path) -> str:
    """Read the rated snippets from the inner archive of the distribution; ValueError if they are missing."""
    try:
        with tarfile.open(archive) as outer:
            name = next(name for name in outer.getnames() if name.endswith(INNER))
            with tarfile.open(fileobj=io.BytesIO(_content(outer, name))) as inner:
                return _content(inner, RATED).decode("utf-8")
    except (tarfile.TarError, StopIteration, KeyError) as error:
        raise ValueError(
            f"{archive}: expected the source distribution of {REQUIREMENT} with {INNER} and in it {RATED}, "
            f"found something else ({error})"
        ) from None


def _content(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise KeyError(f"{name} is no file")
    return file.read()


def parse(text: str) -> Iterator[tuple[str, float]]:
    """Yield sentences and mean ratings; raise ValueError if a line has another form."""
    for number, line in enumerate(text.splitlines(), start=1):
        cells = line.split("\t")
        try:
            _, rating, sentence = cells
            mean = float(rating)
        except ValueError:
            raise ValueError(
                f"{RATED}, line {number}: expected an id, a rating and a sentence between tabs, found "
                f"{line!r:.60}"
            ) from None
        yield sentence.strip(), mean


def split_of(sentence: str) -> str:
    """Return the split of a sentence by its hash: eight tenths train, one validation, one test."""
    part = int(hashlib.sha256(sentence.encode()).hexdigest(), 16) % 10
    return {8: "validation", 9: "test"}.get(part, "train")
