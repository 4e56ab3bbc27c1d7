"""The report of a GPU check: ratios of what was measured, and nothing where nothing was."""

from dept_vl.studies.gpu_check.report import markdown

RESULTS = {
    "machine": {"device": "a card"},
    "launches": {
        "entries": {
            "64/pt100/eager": {"ms": 100.0},
            "64/memory/eager": {"ms": 40.0},
            "256/memory/eager": {"ms": 80.0},
            "16/pt100/eager": {"skipped": "no time"},
        }
    },
    "florence": {
        "entries": {
            "bare": {"ms": 10.0, "peak_mib": 2.0, "generate_10_ms": 5.0},
            "dept40": {"ms": 12.5, "peak_mib": 2.0, "generate_10_ms": 6.0},
            "4-bit": {"skipped": "no library"},
        }
    },
    "runs": {"entries": {"main job": {"scores": {"overall": 99.5, "other": 1.0}, "seconds": 3.0}}},
}


def rows(text: str) -> list[list[str]]:
    lines = (line for line in text.splitlines() if line.startswith("|") and "---" not in line)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_ratios_are_of_what_was_measured() -> None:
    found = rows(markdown(RESULTS))
    assert ["64", "memory", "eager", "40.0", "0.400", "2.00"] in found
    assert ["256", "memory", "eager", "80.0", "", "1.00"] in found
    assert ["64", "pt100", "eager", "100.0", "1.000", ""] in found
    assert ["dept40", "12", "1.250", "2", "6"] in found
    assert ["main job", "scores 99.5, seconds 3"] in found
    assert not any(cell in ("16", "4-bit") for row in found for cell in row)


def test_nothing_measured_is_said() -> None:
    assert "launches: not measured" in markdown({})
