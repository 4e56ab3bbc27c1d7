"""Options of the models, by name; this module imports no engine."""

from typing import Literal

VisualPositionBias = Literal["none", "relative"]
"""What the language model's own position signal says of visual tokens.

`none`: nothing, as published. T5's relative bias is zero for every pair with a visual token; BART's
learned positions count the text alone (the prompt has none either).
`relative`: the stock Hugging Face encoder on `[prompt ; text ; visual]`, every position counted.
"""


TrainedPart = Literal["all", "biases", "lora"]
"""What of the language model is trained where it is not frozen."""


LARGEST_GRID = 256
"""Side of a pooled grid; towers have 50 or so at most."""
