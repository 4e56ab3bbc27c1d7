"""Time and memory to load annotation files of realistic size.

    python scripts/bench_loading.py --output_dir /tmp/vqav2-sized
    python scripts/bench_loading.py --output_dir /tmp/mnli-sized --text_pairs 400000
    python scripts/bench_loading.py --output_dir /tmp/own-sized --own_rows 1000000 --images 300000

Writes files of the size of VQAv2's training split (443,757 questions, 4.4 million answers, 82,783 image
names) and loads them in new processes, first without a cache, then from the converted columns. With the
option `--text_pairs` it reads and tokenizes text pairs in MNLI's format, stores their lengths, and measures
the padding in batches. With `--own_rows` it loads a table of your own data. Processor seconds, given beside
the times, exclude other programs.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Literal, TextIO

import psutil

from dept_vl._utils.options import Count, Options, Positive
from dept_vl._utils.tables import markdown_table
from dept_vl.cli import entry, parse_options
from dept_vl.tasks.base import Task
from dept_vl.tasks.vqav2 import VQAv2, annotation_names, question_names

SUBTYPE = "train2014"
PAIRS = "train.jsonl"
OWN = {"lines": "rows.jsonl", "list": "rows.json", "nested": "answers.json"}
"""Own data: JSON Lines, a list in one line, and such a list with ten answers as objects in each row."""
BATCH, BATCHES = 32, 1000
"""Batch size of text pairs, and the number of batches for which padding is measured."""
WORDS = [
    "man",
    "dog",
    "street",
    "red",
    "holding",
    "standing",
    "left",
    "behind",
    "people",
    "sign",
    "old",
    "train",
]
STARTS = ("what color is the", "is there a", "how many", "what is the", "where is the", "are these")


@dataclass(frozen=True)
class BenchConfig(Options):
    """Configuration of the benchmark."""

    output_dir: Path
    """Folder for the generated files. Existing files are reused."""
    questions: Positive = 443_757
    """Number of questions, with ten answers each. The default is that of VQAv2's training split."""
    images: Positive = 82_783
    """Number of different images."""
    text_pairs: Count = 0
    """Number of text pairs in MNLI's format to load instead of VQAv2's files."""
    own_rows: Count = 0
    """Number of rows of your own data to load instead."""
    own_form: Literal["lines", "list", "nested"] = "lines"
    """JSON Lines, a list in one line, or such a list with ten answers as objects in each row."""
    tokenizer: Path = Path("data/tiny-clip-t5/language")
    """Folder of the tokenizer for text pairs."""
    rounds: Count = 3
    """Number of loads from the converted columns."""
    json_out: Path | None = None
    """JSON file for the results."""
    load_only: bool = False
    """Load once in this process and print the results. The script itself uses this."""


@dataclass(frozen=True)
class Load:
    """Measurement of one load in one process.

    Attributes:
        seconds: Seconds to load the split and check that its images exist.
        processor_seconds: Processor time of this process.
        resident_gib: Memory of the process afterwards in GiB, including mapped file pages.
        peak_gib: Peak memory of the process in GiB.
        examples: Number of examples.
    """

    seconds: float
    processor_seconds: float
    resident_gib: float
    peak_gib: float
    examples: int


def write_files(config: BenchConfig) -> None:
    """Write questions, annotations and empty image files of the configured number."""
    folder = config.output_dir / SUBTYPE
    folder.mkdir(parents=True, exist_ok=True)
    rng = Random(0)
    common = [
        f"{rng.choice(WORDS)} {rng.choice(WORDS)} {n}" if n > 40 else WORDS[n % 12] for n in range(3000)
    ]
    questions = config.output_dir / question_names(SUBTYPE)[0]
    annotations = config.output_dir / annotation_names(SUBTYPE)[0]
    with questions.open("w") as asked, annotations.open("w") as answered:
        asked.write('{"info": {}, "questions": [')
        answered.write('{"info": {}, "annotations": [')
        for number in range(config.questions):
            _write_question(rng, number, config.images, common, asked, answered)
        asked.write("]}")
        answered.write("]}")
    for image_id in range(config.images):  # loading reads only the names
        (folder / f"COCO_{SUBTYPE}_{image_id:012d}.jpg").touch()


def _write_question(
    rng: Random, number: int, images: int, common: list[str], asked: TextIO, answered: TextIO
) -> None:
    separator = ", " if number else ""
    start = rng.choice(STARTS)
    ids = {"image_id": number % images, "question_id": 1000 * (number % images) + number // images}
    text = f"{start} {rng.choice(WORDS)} {rng.choice(WORDS)} the {rng.choice(WORDS)}?"
    asked.write(separator + json.dumps({**ids, "question": text}))
    usual = common[min(int(rng.expovariate(0.01)), 2999)]
    answers = [usual if rng.random() < 0.6 else rng.choice(common) for _ in range(10)]
    record = {
        "question_type": start,
        "multiple_choice_answer": usual,
        "answers": [
            {"answer": answer, "answer_confidence": "yes", "answer_id": n}
            for n, answer in enumerate(answers, 1)
        ],
        **ids,
        "answer_type": "other",
    }
    answered.write(separator + json.dumps(record))


def write_pairs(config: BenchConfig) -> None:
    """Write text pairs about as long as MNLI's, with about 20 and 10 words."""
    config.output_dir.mkdir(parents=True, exist_ok=True)
    rng = Random(0)

    def sentence(mean: float) -> str:
        return " ".join(rng.choices(WORDS, k=1 + min(int(rng.expovariate(1 / mean)), 80)))

    with (config.output_dir / PAIRS).open("w") as file:
        for number in range(config.text_pairs):
            pair = {"premise": sentence(19), "hypothesis": sentence(9), "label": number % 3, "idx": number}
            file.write(json.dumps(pair) + "\n")


def write_own(config: BenchConfig) -> None:
    """Write a table of your own data, and its images as empty files."""
    folder = config.output_dir / "photos"
    folder.mkdir(parents=True, exist_ok=True)
    rng = Random(0)
    in_list = config.own_form != "lines"
    with (config.output_dir / OWN[config.own_form]).open("w") as file:
        for number in range(config.own_rows):
            answer = f"{rng.choice(WORDS)} {rng.choice(WORDS)}"
            row = {
                "id": number,
                "image": f"photos/{number % config.images:06d}.jpg",
                "question": f"{rng.choice(STARTS)} {rng.choice(WORDS)} the {rng.choice(WORDS)}?",
            }
            if config.own_form == "nested":
                row["answers"] = [{"answer": answer, "answer_confidence": "yes"} for _ in range(10)]
            else:
                row["answer"] = answer
            file.write((", " if number else "[") * in_list + json.dumps(row) + "\n" * (not in_list))
        file.write("]" * in_list)
    for number in range(config.images):
        (folder / f"{number:06d}.jpg").touch()


def load_own(config: BenchConfig) -> Load:
    """Load all rows of your own data."""
    from dept_vl.data.splits import check_images
    from dept_vl.tasks import load_task

    started = time.perf_counter(), time.process_time()
    data = config.output_dir / OWN[config.own_form]
    return _measured(started, check_images(load_task("vqa", data=data, split="train"), "raise"))


def load_pairs(config: BenchConfig) -> Load:
    """Read the text pairs and count their tokens; print the share of padding in batches."""
    from transformers import AutoTokenizer

    from dept_vl.data.lengths import source_lengths
    from dept_vl.data.sampling import TrainingBatches
    from dept_vl.tasks.text.task import TextTask, read_rows

    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer, trust_remote_code=False)
    started = time.perf_counter(), time.process_time()
    task = TextTask("mnli", read_rows("mnli", config.output_dir, "train"))
    lengths = source_lengths(task, tokenizer)
    found = _measured(started, task)
    for name, grouping in (("mixed", None), ("grouped by length", [lengths])):
        batches = TrainingBatches([len(task)], [BATCH], seed=0, lengths=grouping)
        taken = [lengths[[number % len(task) for _, number in batch]] for batch in islice(batches, BATCHES)]
        padded = sum(len(batch) * int(batch.max()) for batch in taken)
        share = 1 - sum(int(batch.sum()) for batch in taken) / padded
        print(f"padding in batches of {BATCH}, {name}: {share:.1%}", file=sys.stderr)
    return found


def load(root: Path) -> Load:
    """Load the split."""
    from dept_vl.data.splits import check_images

    started = time.perf_counter(), time.process_time()
    return _measured(started, check_images(VQAv2().load(root, "train"), "raise"))


def _measured(started: tuple[float, float], task: Task) -> Load:
    seconds, processor = time.perf_counter() - started[0], time.process_time() - started[1]
    # Read as training does, all over the file, so that mapped pages are counted.
    for index in range(0, len(task), max(1, len(task) // 5000)):
        task[index]
    # Linux gives KiB, macOS bytes.
    unit = 1024 if sys.platform != "darwin" else 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    resident = psutil.Process().memory_info().rss / 2**30
    return Load(round(seconds, 2), round(processor, 2), round(resident, 2), round(peak, 2), len(task))


def main(config: BenchConfig) -> list[Load]:
    """Generate the files, load them without and then with cache, and return the loads in that order."""
    if config.load_only:
        if config.own_rows:
            found = load_own(config)
        else:
            found = load_pairs(config) if config.text_pairs else load(config.output_dir)
        print(json.dumps(asdict(found)))
        return [found]
    if config.own_rows:
        if not (config.output_dir / OWN[config.own_form]).is_file():
            write_own(config)
    elif config.text_pairs and not (config.output_dir / PAIRS).is_file():
        write_pairs(config)
    elif not config.text_pairs and not (config.output_dir / SUBTYPE).is_dir():
        print(f"writing {config.questions:,} questions to {config.output_dir}")
        write_files(config)
    cache = config.output_dir / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    loads = []
    for _ in range(1 + config.rounds):
        finished = subprocess.run(
            [
                *(sys.executable, __file__, "--output_dir", str(config.output_dir), "--load_only"),
                *("--text_pairs", str(config.text_pairs), "--tokenizer", str(config.tokenizer)),
                *("--own_rows", str(config.own_rows), "--own_form", config.own_form),
            ],
            env={**os.environ, "DEPT_VL_CACHE": str(cache)},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        loads.append(Load(**json.loads(finished.stdout.splitlines()[-1])))
    rows = [
        (name, *(f"{n:.2f}" for n in (one.seconds, one.processor_seconds, one.resident_gib, one.peak_gib)))
        for name, one in zip(
            ["cold", *[f"from its cache, {n}" for n in range(1, config.rounds + 1)]], loads, strict=True
        )
    ]
    tables = [OWN[config.own_form]] if config.own_rows else ["*.json*"]
    size = sum(path.stat().st_size for name in tables for path in config.output_dir.glob(name)) / 2**20
    what = "rows to train on" if config.own_rows else "text pairs" if config.text_pairs else "questions"
    about = f"{loads[0].examples:,} {what}, {size:.0f} MiB of JSON"
    header = [about, "s", "s of processor", "GiB resident", "GiB at most"]
    print(markdown_table(header, rows))
    if config.json_out is not None:
        config.json_out.write_text(json.dumps([asdict(one) for one in loads], indent=2) + "\n")
    return loads


if __name__ == "__main__":
    entry(lambda arguments: main(parse_options(BenchConfig, arguments, "bench_loading.py", __doc__)))
