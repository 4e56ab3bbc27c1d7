"""Mean, standard deviation and 95% confidence interval of scores over seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev


@dataclass(frozen=True)
class Interval:
    """Mean of `count` scores, with sample standard deviation and half of the 95% interval if count > 1."""

    mean: float
    deviation: float | None
    half_width: float | None
    count: int

    def __str__(self) -> str:
        return format(self)

    def __format__(self, sign: str) -> str:
        """Return mean and half of the interval; with `+` a positive mean has its sign."""
        half_width = "" if self.half_width is None else f" ± {self.half_width:.2f}"
        return f"{self.mean:{sign}.2f}{half_width}"


def interval(scores: Sequence[float]) -> Interval:
    """Return the mean, sample standard deviation and 95% interval; ValueError if there are no scores."""
    if not scores:
        raise ValueError("expected one score or more, found none")
    if len(scores) == 1:
        return Interval(scores[0], None, None, 1)
    deviation = stdev(scores)
    half_width = quantile(len(scores) - 1) * deviation / math.sqrt(len(scores))
    return Interval(mean(scores), deviation, half_width, len(scores))


def quantile(freedom: int) -> float:
    """Return the 97.5% quantile of Student's t with `freedom` degrees of freedom."""
    # Equals scipy.stats.t.ppf, which takes a second longer to import.
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.975))
