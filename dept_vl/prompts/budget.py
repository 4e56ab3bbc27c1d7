"""How large a prompt may be; this module imports no engine."""

from typing import Literal

LARGEST_SIZE = 1_000_000
"""Of a prompt, in any dimension, that a file may ask for."""


Method = Literal["pt", "dept", "adept", "hybrid", "ulpt", "lopt", "residual"]
