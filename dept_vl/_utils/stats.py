"""Mean, spread and 95% interval of a few seeds' scores."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

# fmt: off
T_975 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)
# fmt: on
"""Student's t below which 97.5% lie, by degrees of freedom from 1."""
Z_975 = 1.959964
"""The same of the normal distribution."""


@dataclass(frozen=True)
class Interval:
    """What several runs of one kind show.

    Attributes:
        mean: Of their scores.
        deviation: Sample standard deviation; None of a single run.
        half_width: Of the 95% interval of the mean, by the t distribution; None of a single run.
        count: Runs.
    """

    mean: float
    deviation: float | None
    half_width: float | None
    count: int

    def __str__(self) -> str:
        half_width = "" if self.half_width is None else f" ± {self.half_width:.2f}"
        return f"{self.mean:.2f}{half_width}"


def interval(scores: Sequence[float]) -> Interval:
    """Mean, sample standard deviation and 95% interval of the mean.

    Raises:
        ValueError: If there is no score.
    """
    if not scores:
        raise ValueError("expected one score or more, found none")
    if len(scores) == 1:
        return Interval(scores[0], None, None, 1)
    deviation = stdev(scores)
    half_width = quantile(len(scores) - 1) * deviation / math.sqrt(len(scores))
    return Interval(mean(scores), deviation, half_width, len(scores))


def quantile(freedom: int) -> float:
    """Student's t below which 97.5% lie: from the table, beyond it by Cornish and Fisher's expansion."""
    if freedom <= len(T_975):
        return T_975[freedom - 1]
    z = Z_975
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
