"""Options of the models, by name; this module imports no engine."""

from typing import Literal

VisualPositionBias = Literal["none", "relative"]
"""What the language model's own position signal says of visual tokens.

`none`: nothing, as published. T5's relative bias is zero for every pair with a visual token; BART's
learned positions count the text alone (the prompt has none either).
`relative`: the stock Hugging Face encoder on `[prompt ; text ; visual]`, every position counted.
"""

ObjectOrder = Literal["frozen", "trained", "none"]
"""The vector that is added to each visual token for its place in the image.

`frozen`: random and never trained, as published. `trained`: with the visual projection, and counted with it.
`none`: no such vector; with `visual_position_bias` none the language model then reads a set of patches.
"""

VisualNorm = Literal["once", "twice"]
"""Whether visual tokens, which the projection has normed, pass through BART's `layernorm_embedding` as well.

`once`: they do not, as published. `twice`: they do, as in the stock encoder, in everything that was trained
before there was a choice, and always with `visual_position_bias` relative. T5 has no such norm.
"""

ImageFit = Literal["squash", "crop", "pad", "own"]
"""How an image gets the shape of the image encoder's pixels, which is square for most.

`squash`: both sides are resized, as published; nothing is lost, and shapes are distorted.
`crop`: the centre is cut out; of a photograph of 640 x 480 a quarter is never seen.
`pad`: the image keeps its shape between bars of the mean colour.
`own`: what the encoder's own processor does, which is one of these: CLIP's crops, SigLIP's squashes. All was
made with it before there was a choice. An image that has the shape already is always left to it.
"""
BEFORE_ORDER: dict[str, str] = {"object_order": "none", "visual_norm": "twice", "image_fit": "own"}
"""What older files leave out: what was built before there was a choice."""


TrainedPart = Literal["all", "biases", "lora"]
"""What of the language model is trained where it is not frozen."""


LARGEST_GRID = 256
"""Side of a pooled grid; towers have 50 or so at most."""
