"""Markdown tables of scores."""

from collections.abc import Sequence

from dept_vl._utils.printable import markdown_text


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return an aligned Markdown table, readable as plain text too. Cells are escaped."""
    cells = [list(map(markdown_text, row)) for row in (header, *rows)]
    # Markdown needs at least three dashes.
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])])
