"""Mean, spread and 95% interval of a few seeds' scores."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev


@dataclass(frozen=True)
class Interval:
    """Scores of so many runs: mean, and of several sample deviation and half of the 95% interval (t)."""

    mean: float
    deviation: float | None
    half_width: float | None
    count: int

    def __str__(self) -> str:
        half_width = "" if self.half_width is None else f" ± {self.half_width:.2f}"
        return f"{self.mean:.2f}{half_width}"


def interval(scores: Sequence[float]) -> Interval:
    """Mean, sample standard deviation and 95% interval of the mean; raise ValueError without scores."""
    if not scores:
        raise ValueError("expected one score or more, found none")
    if len(scores) == 1:
        return Interval(scores[0], None, None, 1)
    deviation = stdev(scores)
    half_width = quantile(len(scores) - 1) * deviation / math.sqrt(len(scores))
    return Interval(mean(scores), deviation, half_width, len(scores))


def quantile(freedom: int) -> float:
    """Student's t below which 97.5% lie."""
    # What scipy.stats.t.ppf computes, imported a second faster, and only where an interval is asked for.
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.975))
