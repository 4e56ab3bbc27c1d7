"""Table of supported combinations, tested on tiny random models. The exit status is 1 if a test fails.

python scripts/capabilities.py                    # prints the table
python scripts/capabilities.py --check tests/README.md  # compares it with the one between the marks there
python scripts/capabilities.py --write tests/README.md  # puts it there
"""

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

from dept_vl._utils.options import Options
from dept_vl.cli import entry, parse_options

TESTS = Path(__file__).parents[1] / "tests"


@dataclass(frozen=True)
class TableOptions(Options):
    """Options for the table."""

    check: Path | None = None
    """File whose table must be the same."""
    write: Path | None = None
    """File whose table to replace."""


def main(check: Path | None = None, write: Path | None = None) -> int:
    """Run all probes and print the table; return the exit status.

    Args:
        check: File whose table must be the same.
        write: File whose table to replace.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    sys.path.insert(0, str(TESTS))  # the probes are test code
    from zoo import capabilities as probes

    torch.set_num_threads(1)  # tiny models are slower with more
    warnings.simplefilter("ignore")
    disable_progress_bar()
    set_verbosity_error()
    found = probes.probe_all(
        tell=lambda architecture: print(f"{architecture} ...", file=sys.stderr, flush=True)
    )
    text = probes.table(found)
    print(text)
    failed = probes.failures(found)
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    if write is not None and not failed:
        before, _, behind = probes.split_at_marks(write.read_text())
        write.write_text(f"{before}\n\n{text}\n\n{behind}")
    if check is not None and probes.split_at_marks(check.read_text())[1].strip() != text:
        print(f"the table in {check} is another; make it anew by --write {check}", file=sys.stderr)
        return 1
    return 1 if failed else 0


if __name__ == "__main__":
    entry(lambda arguments: main(**vars(parse_options(TableOptions, arguments, "capabilities.py", __doc__))))
