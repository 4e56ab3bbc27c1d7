"""How fast visual features are read from files into batches.

    python scripts/bench_features.py --output_dir /tmp/features

Writes generated features of the shape of CLIP ViT-B/32 (49 x 768, float16), then reads batches of images
drawn at random, as a run does: by file, into one tensor. The files are read through once before, so that
they are in the system's page cache where that has room for them.
"""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from statistics import median

from dept_vl._utils.options import Count, Options, Positive
from dept_vl.cli import entry, parse_options
from dept_vl.tasks.options import Precision


@dataclass(frozen=True)
class BenchConfig(Options):
    """Sizes and places."""

    output_dir: Path
    """Folder for the generated features; those that are there are used again."""
    images: Positive = 16_384
    """Images with features; 16,384 take 1.15 GiB."""
    shard_images: Positive = 1024
    """Images in a file."""
    tokens: Positive = 49
    """Visual tokens of an image."""
    d_vision: Positive = 768
    """Width of a token."""
    dtype: Precision = "float16"
    """What features are stored in."""
    batch_size: Positive = 64
    """Images read at a time."""
    batches: Positive = 500
    """Batches of a round."""
    rounds: Positive = 5
    """Rounds, the median of which is given."""
    files: Count = 120_000
    """Image files whose size and time are looked at; 0 leaves this out."""
    json_out: Path | None = None
    """File for the figures."""


@dataclass(frozen=True)
class Reading:
    """What was measured.

    Attributes:
        rows_per_second: Images whose features were read a second, median of the rounds.
        slowest: Of the rounds.
        cores: Of the machine; one process reads.
        checksum_over_mapping: Time to compare checksums of the files as they are opened, over that of reading
            all rows once after mapping them; median of the rounds, both in turn.
        checksum_gib_per_second: Compared, median of the rounds.
        look_seconds: To look at size and time of the image files; the system may remember them.
    """

    rows_per_second: int
    slowest: int
    cores: int
    checksum_over_mapping: float
    checksum_gib_per_second: float
    look_seconds: float | None


def write(config: BenchConfig) -> list[Path]:
    """Write the generated features, unless they are there."""
    import torch
    from safetensors.torch import save_file

    from dept_vl.data.feature_store import DTYPES, shard_name

    config.output_dir.mkdir(parents=True, exist_ok=True)
    files = []
    for number, first in enumerate(range(0, config.images, config.shard_images)):
        count = min(config.shard_images, config.images - first)
        files.append(config.output_dir / shard_name(number))
        if not files[-1].is_file():
            drawn = torch.randn(count, config.tokens, config.d_vision).to(DTYPES[config.dtype])
            save_file({"features": drawn}, files[-1])
    return files


def checksums(files: list[Path], rounds: int) -> tuple[float, float]:
    """Ratio of comparing checksums to reading all rows once, and GiB compared a second."""
    from dept_vl._utils.checksums import checksum
    from dept_vl.data.feature_index import tensor_bytes
    from dept_vl.data.features import read_shard

    ratios, rates = [], []
    size = sum(file.stat().st_size for file in files)
    for _ in range(rounds):
        started = time.perf_counter()
        for file in files:
            read_shard(file).clone()
        read = time.perf_counter()
        for file in files:
            checksum(tensor_bytes(read_shard(file)))
        compared = time.perf_counter()
        ratios.append((compared - read) / (read - started))
        rates.append(size / 2**30 / (compared - read))
    return median(ratios), median(rates)


def look(folder: Path, count: int) -> float:
    """Seconds to look at size and time of so many files, made if they are not there.

    Raises:
        RuntimeError: If one was not found.
    """
    from dept_vl.data.feature_index import file_stats

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:012d}.jpg" for number in range(count)]
    for path in paths:
        if not path.exists():
            path.write_bytes(b"x")
    started = time.perf_counter()
    found = file_stats(paths)
    seconds = time.perf_counter() - started
    if not all(size for size, _ in found):
        raise RuntimeError(f"files in {folder} have gone")
    return seconds


def main(config: BenchConfig) -> Reading:
    """Write, warm up, read."""
    from dept_vl.data.features import FeatureTable

    files = write(config)
    for file in files:
        file.read_bytes()
    paths = [Path(f"{number:012d}.jpg") for number in range(config.images)]
    places = {path: divmod(row, config.shard_images) for row, path in enumerate(paths)}
    table = FeatureTable.map(files, places, {})
    random, rates = Random(0), []
    for _ in range(1 + config.rounds):
        drawn = [
            [[path] for path in random.choices(paths, k=config.batch_size)] for _ in range(config.batches)
        ]
        started = time.perf_counter()
        for batch in drawn:
            table(batch)
        rates.append(config.batches * config.batch_size / (time.perf_counter() - started))
    counted = rates[1:]  # the first maps the pages
    ratio, rate = checksums(files, config.rounds)
    seconds = look(config.output_dir / "images", config.files) if config.files else None
    reading = Reading(
        round(median(counted)),
        round(min(counted)),
        os.cpu_count() or 1,
        round(ratio, 3),
        round(rate, 2),
        None if seconds is None else round(seconds, 2),
    )
    print(
        f"{reading.rows_per_second:,} rows of {config.tokens} x {config.d_vision} {config.dtype} a second, "
        f"one process of a machine of {reading.cores} cores (slowest round {reading.slowest:,})"
    )
    print(f"checksums: {rate:.2f} GiB a second, {ratio:.2f} times reading all rows once")
    if seconds is not None:
        print(f"size and time of {config.files:,} files: {seconds:.2f} s")
    if config.json_out is not None:
        config.json_out.write_text(json.dumps(asdict(reading), indent=2) + "\n")
    return reading


if __name__ == "__main__":
    entry(lambda arguments: main(parse_options(BenchConfig, arguments, "bench_features.py", __doc__)))
