"""Tables of times and ratios from the results of a GPU check."""

from collections.abc import Mapping
from typing import Any

from dept_vl._utils.tables import markdown_table

Results = Mapping[str, Any]
"""Content of gpu_check.json."""


def markdown(results: Results) -> str:
    """Return all results as Markdown."""
    machine = ", ".join(f"{name} {value}" for name, value in results.get("machine", {}).items())
    parts = [
        f"Measured on: {machine}.",
        _launches(results),
        *(_model(results, part) for part in sorted(results)),
    ]
    for name in ("runs", "images", "tests"):
        entries = results.get(name, {}).get("entries", {})
        lines = [(entry, _short(measured)) for entry, measured in entries.items()]
        parts.append(markdown_table([name, "measured"], lines) if lines else f"{name}: not measured")
    return "\n\n".join(part for part in parts if part) + "\n"


def _launches(results: Results) -> str:
    """Return step times, also relative to a prompt of 100 vectors and to the largest batch."""
    entries = _entries(results, "launches") | _entries(results, "compiled")
    steps = {name: entry["ms"] for name, entry in entries.items() if "ms" in entry}
    largest = max((int(name.split("/")[0]) for name in steps), default=0)
    lines = []
    for name, milliseconds in steps.items():
        batch, method, way = name.split("/") if name.count("/") == 2 else (*name.split("/"), "eager")
        prompt = steps.get(f"{batch}/pt100/{way}")
        whole = steps.get(f"{largest}/{method}/{way}")
        lines.append(
            (
                batch,
                method,
                way,
                f"{milliseconds:.1f}",
                f"{milliseconds / prompt:.3f}" if prompt else "",
                f"{milliseconds / (whole * int(batch) / largest):.2f}" if whole else "",
            )
        )
    header = ["batch", "method", "way", "ms per step", "of pt100", f"of its share of batch {largest}"]
    return markdown_table(header, lines) if lines else "launches: not measured"


def _model(results: Results, part: str) -> str:
    """Return the results of a pretrained model, bare and adapted; empty for other parts."""
    entries = _entries(results, part)
    measured = {name: entry for name, entry in entries.items() if "generate_10_ms" in entry}
    bare = measured.get("bare")
    lines = [
        (
            name,
            f"{entry['ms']:.0f}",
            f"{entry['ms'] / bare['ms']:.3f}" if bare else "",
            f"{entry['peak_mib'] or 0:,.0f}",
            f"{entry['generate_10_ms']:.0f}",
        )
        for name, entry in measured.items()
    ]
    header = [
        part,
        "ms per step",
        "of the shorter bare model",
        "peak MiB",
        "ms for 10 tokens",
    ]
    equal = [
        (
            name,
            f"{entry['ratio']:.3f} ({entry['low']:.3f}-{entry['high']:.3f})",
            f"{entry['memory_ratio']:.3f}" if entry["memory_ratio"] else "",
        )
        for name, entry in entries.items()
        if "ratio" in entry
    ]
    tables = [markdown_table(header, lines)] if lines else []
    if equal:
        tables.append(
            markdown_table([part, "time of prompt and offset over the model alone", "memory"], equal)
        )
    return "\n\n".join(tables)


def _entries(results: Results, part: str) -> dict[str, Any]:
    return dict(results.get(part, {}).get("entries", {}))


def _short(measured: Mapping[str, Any]) -> str:
    """Return an entry in one line, with only its overall score."""
    values = {**measured, **({"scores": measured["scores"]["overall"]} if "scores" in measured else {})}
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in values.items()
        if value not in ([], None)
    )
