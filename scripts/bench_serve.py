"""Load test of `dept-vl serve`: throughput and latency by clients and adapters, correct answers, memory.

    python scripts/bench_serve.py --json_out data/benchmarks/cpu/serve.json

Several servers with the same adapters run at once: one with batching, one without, and one for each of two
adapters. They are loaded in turn, starting with a different one each round. Ratios are the median over
rounds, with the lowest and the highest. Then the answers to mixed requests are compared with a predictor's.
"""

import asyncio
import base64
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dept_vl._utils.options import Options, Positive
from dept_vl._utils.tables import markdown_table
from dept_vl.cli import entry, parse_options

if TYPE_CHECKING:
    from benchmarks.measure import Ratio

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "data" / "tiny-clip-t5"
CLIENTS = (1, 8, 64)
QUESTIONS = ("what color is the shape?", "is there a circle?")
BARS = {"mixed": 0.9, "batched": 3.0, "growth": 0.05}
"""Minimum throughput of all adapters relative to one, and of batching to none; maximum memory growth."""
SEPARATE = 2
"""Number of adapters with their own server."""


@dataclass(frozen=True)
class BenchConfig(Options):
    """Configuration of the benchmark."""

    model: str = "shipped"
    """Backbone: shipped, or random weights in T5's size base; tiny is for tests."""
    adapters: Positive = 32
    """Number of adapters used in rotation, compared with a single one."""
    requests: Positive = 192
    """Requests per measurement with the most clients; measurements with fewer clients have fewer."""
    rounds: Positive = 5
    """Number of rounds. The first one warms up."""
    mixed: Positive = 10_000
    """Number of requests whose answers are compared."""
    max_batch_size: Positive = 32
    """Maximum batch size of the server."""
    json_out: Path | None = None
    """JSON file for the results."""


@dataclass
class Load:
    """Throughput and latency of one measurement.

    Attributes:
        rate: Requests per second.
        p50: Median latency in seconds.
        p99: 99th percentile of the latency in seconds.
    """

    rate: float
    p50: float
    p99: float


@dataclass
class Figures:
    """Results of the benchmark. Rates and latencies are medians over rounds."""

    loads: dict[str, Load] = field(default_factory=dict)
    ratios: dict[str, "Ratio"] = field(default_factory=dict)
    lost: int = 0
    swapped: int = 0
    compared: int = 0
    alike: float = 0.0
    """Probability that a swap of answers is not noticed, because both are the same."""
    mib_before: float = 0.0
    mib_after: float = 0.0
    mib_of_servers: dict[str, float] = field(default_factory=dict)
    load_average: tuple[float, float] = (0.0, 0.0)
    """Load average of the machine at the start and at the end."""
    cores: int = 0

    @property
    def growth(self) -> float:
        """Relative growth of memory over the mixed requests."""
        return self.mib_after / self.mib_before - 1

    def met(self) -> dict[str, bool]:
        """Return whether each bar is met."""
        return {
            f"{BARS['mixed']} of one adapter's throughput": self.ratios["mixed"].median >= BARS["mixed"],
            f"{BARS['batched']} times the throughput without batches": self.ratios["batched"].median
            >= BARS["batched"],
            "no answer lost or swapped": self.lost == self.swapped == 0,
            f"memory grows by less than {BARS['growth']:.0%}": self.growth < BARS["growth"],
        }


def prepare(config: BenchConfig, folder: Path) -> tuple[Path, list[str]]:
    """Return the backbone's folder, and the folders of adapters with random weights and different answers."""
    import copy

    import torch

    from dept_vl.adapters.adapter import Adapter
    from dept_vl.models.backbone import Backbone
    from dept_vl.models.prompted import PromptedModel
    from dept_vl.prompts.dept import DePT

    torch.manual_seed(0)
    place = SHIPPED
    if config.model != "shipped":
        from benchmarks.backbones import SIZES, build_backbone

        place = folder / "backbone"
        build_backbone(SIZES[config.model], SHIPPED / "language", vision=True).save_pretrained(place)
    backbone = Backbone.from_pretrained(place)
    sources = []
    for number in range(config.adapters):
        prompt = DePT(backbone.d_model, prompt_length=20, rank=8, max_source_length=32)
        for parameter in prompt.parameters():
            torch.nn.init.normal_(parameter, std=3.0)
        own = backbone.with_projection(copy.deepcopy(backbone.visual_projection))
        adapter = Adapter.of(PromptedModel(own, prompt), task="vqav2", metrics={})
        adapter.save(folder / f"adapter-{number}")
        sources.append(str(folder / f"adapter-{number}"))
    return place, sources


@contextmanager
def served(backbone: Path, sources: Sequence[str], *flags: str) -> Iterator[tuple[int, int]]:
    """Start a server, and yield its process id and port."""
    command = [sys.executable, "-m", "dept_vl", "serve", "--adapters", *sources, "--backbone", str(backbone)]
    command += ["--port", "0", "--timeout", "600", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r"http://127.0.0.1:(\d+)", process.stdout.readline())
        if found is None:
            raise RuntimeError("the server did not start")
        yield process.pid, int(found[1])
    finally:
        process.terminate()
        process.wait()


def mib(pid: int) -> float:
    """Return the memory of a server and its child processes in MiB."""
    import psutil

    process = psutil.Process(pid)
    return sum(each.memory_info().rss for each in [process, *process.children(True)]) / 2**20


Row = tuple[str, int, int]
"""Adapter, question and image of a request."""


def body_of(row: Row, images: Sequence[str]) -> bytes:
    """Return the body of a request."""
    name, question, image = row
    parts = [
        {"type": "text", "text": QUESTIONS[question]},
        {"type": "image_url", "image_url": {"url": images[image]}},
    ]
    return json.dumps({"model": name, "messages": [{"role": "user", "content": parts}]}).encode()


async def ask_all(
    ports: dict[str, int], rows: Sequence[Row], images: Sequence[str], clients: int
) -> tuple[float, list[tuple[Row, str | None, float]]]:
    """Send all requests; return the total seconds, and answer (None if missing) and seconds of each.

    Each client sends one request after the other, on its own connection to the server of each adapter.
    """
    waiting, answers = iter(rows), []

    async def client() -> None:
        connections: dict[int, Any] = {}
        for row in waiting:
            port = ports[row[0]]
            if port not in connections:
                connections[port] = await asyncio.open_connection("127.0.0.1", port)
            reader, writer = connections[port]
            body, started = body_of(row, images), time.perf_counter()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            headers = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", headers)
            content = json.loads(await reader.readexactly(int(length[1]))) if length else {}
            text = content["choices"][0]["message"]["content"] if "choices" in content else None
            answers.append((row, text, time.perf_counter() - started))
        for _, writer in connections.values():
            writer.close()

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - started, answers


def measure(config: BenchConfig, folder: Path) -> Figures:
    """Measure throughput, latency, memory and answers."""
    from benchmarks.measure import Ratio, in_turn

    figures = Figures(cores=os.cpu_count() or 0)
    started = os.getloadavg()[0]
    backbone, sources = prepare(config, folder)
    names = [Path(source).name for source in sources]
    files = sorted((ROOT / "data" / "samples" / "images").glob("*.png"))
    images = [f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" for path in files]
    size = str(config.max_batch_size)
    with ExitStack() as stack:
        batched, port = stack.enter_context(served(backbone, sources, "--max_batch_size", size))
        _, alone_port = stack.enter_context(served(backbone, sources, "--max_batch_size", "1"))
        own = [
            stack.enter_context(served(backbone, [source], "--max_batch_size", size))
            for source in sources[:SEPARATE]
        ]
        figures.mib_of_servers = {f"{len(sources)} adapters": mib(batched), "1 adapter": mib(own[0][0])}
        ways = {
            "batched": dict.fromkeys(names, port),
            "one by one": dict.fromkeys(names, alone_port),
            "a server each": {name: server[1] for name, server in zip(names, own, strict=False)},
        }

        def run(cell: tuple[str, int, int]) -> Load:
            way, clients, count = cell
            total = max(8, config.requests * clients // max(CLIENTS) // (1 + 2 * (way == "one by one")))
            asked = [
                (names[number % count], number // count % 2, number % len(images)) for number in range(total)
            ]
            seconds, answers = asyncio.run(ask_all(ways[way], asked, images, clients))
            took = sorted(took for _, _, took in answers)
            return Load(total / seconds, *(took[int(share * len(took))] for share in (0.5, 0.99)))

        cells = list(product(("batched", "one by one"), CLIENTS, (1, len(names))))
        cells += [(way, max(CLIENTS), SEPARATE) for way in ("batched", "a server each")]
        cells = list(dict.fromkeys(cells))  # the same twice if there are as many adapters as servers
        measured: dict[tuple[str, int, int], list[Load]] = {cell: [] for cell in cells}
        for number, order in enumerate(in_turn([str(place) for place in range(len(cells))], config.rounds)):
            for place in map(int, order):
                load = run(cells[place])
                if number or config.rounds == 1:
                    measured[cells[place]].append(load)
            print(f"round {number + 1} of {config.rounds}", flush=True)
        for way, clients, count in cells:
            loads = measured[way, clients, count]
            middle = {
                key: sorted(getattr(each, key) for each in loads)[len(loads) // 2] for key in asdict(loads[0])
            }
            figures.loads[f"{way}, {clients} clients, {count} adapters"] = Load(**middle)

        def ratio(ours: tuple[str, int, int], theirs: tuple[str, int, int]) -> Ratio:
            # `Ratio` expects seconds per request.
            return Ratio.of(*([1 / each.rate for each in measured[cell]] for cell in (ours, theirs)))

        most = max(CLIENTS)
        # Throughput of the second relative to the first.
        figures.ratios = {
            "mixed": ratio(("batched", most, 1), ("batched", most, len(names))),
            "batched": ratio(("one by one", most, len(names)), ("batched", most, len(names))),
            "shared": ratio(("a server each", most, SEPARATE), ("batched", most, SEPARATE)),
        }
        compare(config, figures, ways["batched"], batched, (backbone, sources, files, images))
    figures.load_average = (started, os.getloadavg()[0])
    return figures


def compare(
    config: BenchConfig,
    figures: Figures,
    ports: dict[str, int],
    server: int,
    known: tuple[Path, list[str], list[Path], list[str]],
) -> None:
    """Compare the answers to mixed requests with a predictor's, and measure memory before and after."""
    from dept_vl.inference.mixed import load_many

    backbone, sources, files, images = known
    many = load_many({Path(source).name: source for source in sources}, backbone=backbone, device="cpu")
    rows = list(product([Path(s).name for s in sources], range(len(QUESTIONS)), range(len(files))))
    # In an order in which neighbours are of different adapters, as after shuffling; the start warms up.
    asked = [rows[number * 7919 % len(rows)] for number in range(config.mixed)]
    rows = list(dict.fromkeys(asked))
    expected = {row: many.predictor(row[0]).answer(files[row[2]], QUESTIONS[row[1]]) for row in rows}
    del many
    counts = Counter(expected.values())
    figures.alike = sum(count**2 for count in counts.values()) / len(rows) ** 2
    print(f"{len(counts)} different answers to {len(rows)} questions", flush=True)
    asyncio.run(ask_all(ports, asked[: config.mixed // 10], images, max(CLIENTS)))
    figures.mib_before = mib(server)
    _, answers = asyncio.run(ask_all(ports, asked, images, max(CLIENTS)))
    figures.mib_after = mib(server)
    figures.compared = len(asked)
    figures.lost = len(asked) - sum(text is not None for _, text, _ in answers)
    figures.swapped = sum(text is not None and text != expected[row] for row, text, _ in answers)


def main(config: BenchConfig) -> Figures:
    """Measure, print and write the results."""
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(config, Path(folder))
    rows = [
        (name, f"{load.rate:.1f}", f"{1000 * load.p50:.0f}", f"{1000 * load.p99:.0f}")
        for name, load in figures.loads.items()
    ]
    print(
        markdown_table(
            [f"{config.model} backbone, {figures.cores} cores", "requests/s", "p50, ms", "p99, ms"], rows
        )
    )
    print()
    told = {
        f"{config.adapters} adapters to one": "mixed",
        "batches to one by one": "batched",
        f"one server to one for each of {SEPARATE} adapters": "shared",
    }
    ratios: list[tuple[str, object]] = [(name, figures.ratios[key]) for name, key in told.items()]
    print(markdown_table(["throughput relative", "median (least-largest)"], ratios))
    print(f"\n{figures.compared:,} mixed requests: {figures.lost} lost, {figures.swapped} swapped ", end="")
    print(f"(of which {1 - figures.alike:.0%} would be noticed); ", end="")
    print(f"memory {figures.mib_before:,.0f} -> {figures.mib_after:,.0f} MiB ({figures.growth:+.1%})")
    for name, met in figures.met().items():
        print(f"{'met' if met else 'NOT met'}: {name}")
    if config.json_out is not None:
        content = asdict(figures) | {
            "growth": figures.growth,
            "met": figures.met(),
            "options": asdict(config),
        }
        config.json_out.write_text(json.dumps(content, indent=2, default=str) + "\n")
    return figures


if __name__ == "__main__":
    entry(lambda arguments: main(parse_options(BenchConfig, arguments, "bench_serve.py", __doc__)))
