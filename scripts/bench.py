"""Step time, generation and memory of DePT, plain prompt tuning, PEFT and the bare backbone.

    python scripts/bench.py --bars --output_dir /tmp/bench
    python scripts/bench.py --models base --shapes vl --methods pt100,dept40 --rounds 20

The methods of a group take turns in rounds, starting with a different one each round, so that other load
affects all equally. Ratios are the median over rounds. The backbones have T5's sizes and random weights.
bench.json is written after every round, bench.md and bench.png at the end. The same command continues with
the next group.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.options import BenchConfig
from dept_vl._utils.tables import markdown_table
from dept_vl.cli import entry, parse_options

TOKENIZER = Path(__file__).parents[1] / "data" / "tiny-clip-t5" / "language"


def main(config: BenchConfig) -> dict[str, Any]:
    """Measure, write and print; return the content of bench.json."""
    from benchmarks.figures import bar_rows, draw, tables
    from benchmarks.methods import has_peft
    from benchmarks.steps import Bench, plan

    if config.tiny:
        config = replace(config, rounds=1, batch_size=min(config.batch_size, 2))
    groups = plan(config)
    if not has_peft():
        print('PEFT is not installed: its methods are left out (pip install -e ".[bench]")')
    bench = Bench(config, TOKENIZER)
    bench.measure(groups)
    results = bench.results
    results["bars"] = [
        dict(zip(("what", "asked", "measured", "met"), row, strict=True)) for row in bar_rows(results)
    ]
    bench.save()
    text = tables(results)
    if config.bars:
        text += "\n\n" + markdown_table(["bar", "asked", "measured", ""], bar_rows(results))
    (config.output_dir / "bench.md").write_text(text + "\n")
    print(text)
    try:
        draw(results, config.output_dir / "bench.png")
    except ImportError:
        print('matplotlib is not installed: no plot (pip install -e ".[bench]")')
    return results


if __name__ == "__main__":
    entry(lambda arguments: main(parse_options(BenchConfig, arguments, "bench.py", __doc__)))
