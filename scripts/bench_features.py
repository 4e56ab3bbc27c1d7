"""Speed of reading stored visual features into batches.

    python scripts/bench_features.py --output_dir /tmp/features

Writes generated features of the shape of CLIP ViT-B/32 (49 x 768, float16), then reads batches of random
images file by file into one tensor, as a training run does. All files are read once before, so that they are
in the page cache if it has room.
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
    """Configuration of the benchmark."""

    output_dir: Path
    """Folder for the generated features. Existing files are reused."""
    images: Positive = 16_384
    """Number of images with features; 16,384 take 1.15 GiB."""
    shard_images: Positive = 1024
    """Images per file."""
    tokens: Positive = 49
    """Visual tokens per image."""
    d_vision: Positive = 768
    """Hidden size of the vision tower."""
    dtype: Precision = "float16"
    """Data type of the stored features."""
    batch_size: Positive = 64
    """Batch size."""
    batches: Positive = 500
    """Number of batches per round."""
    rounds: Positive = 5
    """Number of rounds; results are medians over rounds."""
    files: Count = 120_000
    """Number of image files whose size and time are read; 0 skips this."""
    json_out: Path | None = None
    """JSON file for the results."""


@dataclass(frozen=True)
class Reading:
    """Results of the benchmark.

    Attributes:
        rows_per_second: Images read per second, median over rounds.
        slowest: Images read per second in the slowest round.
        cores: Number of cores of the machine; one process reads.
        checksum_over_mapping: Time to verify checksums of the files, relative to reading all rows once after
            mapping; median over rounds.
        checksum_gib_per_second: GiB verified per second, median over rounds.
        look_seconds: Seconds to read size and time of the image files, which the system may have cached.
    """

    rows_per_second: int
    slowest: int
    cores: int
    checksum_over_mapping: float
    checksum_gib_per_second: float
    look_seconds: float | None


def write(config: BenchConfig) -> list[Path]:
    """Write the generated features, unless they exist."""
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
    """Return the time to verify checksums relative to reading all rows once, and GiB verified per second."""
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
    """Return the seconds to read size and time of a number of files, which are created if missing.

    Raises:
        RuntimeError: If a file is missing.
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
    """Write the features, read them, and return the results."""
    from dept_vl.data.features import FeatureTable

    files = write(config)
    for file in files:
        file.read_bytes()
    paths = [Path(f"{number:012d}.jpg") for number in range(config.images)]
    places = {path: divmod(row, config.shard_images) for row, path in enumerate(paths)}
    table = FeatureTable(files, places, {})
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
