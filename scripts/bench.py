"""Step time, generation and memory of DePT, plain prompt tuning, PEFT and the backbone alone.

    python scripts/bench.py --bars --output_dir /tmp/bench
    python scripts/bench.py --models base --shapes vl --methods pt100,dept40 --rounds 20

Every group of methods is measured in rounds, each method once a round and another one first each time, so
that a busy machine disturbs all alike; a ratio is the median of the rounds' ratios. The backbones have T5's
sizes and random weights. Written after every round: bench.json; at the end bench.md and bench.png. The same
command continues with the group of methods where an earlier one ended.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from dept_vl._utils.tables import markdown_table
from dept_vl.cli import entry, parse_options
from dept_vl.studies.options import BenchConfig

TOKENIZER = Path(__file__).parents[1] / "data" / "tiny-clip-t5" / "language"


def main(config: BenchConfig) -> dict[str, Any]:
    """Measure, write, print; returns what bench.json holds."""
    from dept_vl.studies.bench.figures import bar_rows, draw, tables
    from dept_vl.studies.bench.methods import has_peft
    from dept_vl.studies.bench.steps import Bench, plan

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
