"""What a method is, and how large its prompt may be; this module imports no engine.

`METHODS` has every method by its name; `methods` holds the built-in ones.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from dept_vl._utils.registry import Registry

LARGEST_SIZE = 1_000_000
"""Of a prompt, in any dimension, that a file may ask for."""
GROUPS = ("prompt", "low_rank")
"""What a method trains, by learning rate: `prompt_lr`, and `offset_lr` for all else."""

Init = Literal["vocabulary", "text", "random"]
"""What a soft prompt starts from, see `initialise`."""
Shapes = Mapping[str, tuple[int, ...]]
"""Shape of each parameter, by its name in `DePT`."""


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A way to prompt, at given sizes. Each subclass is one method.

    Attributes:
        name: In commands, configurations and files.
        keeps_length: The prompt has the l vectors of the plain one; other methods have m < l of them and
            spend the rest of the budget on their rank.
        has_rank: There is a rank to choose. At rank 0 such a method is plain prompt tuning.
        seeded: Something random is frozen, and files keep its seed.
        needs_vectors: P is made of something, and cannot be empty.
        compressed: P is a product of a rank, which is not above its width.
        has_prompt: There is a P to choose the length of; other methods spend the whole budget on their rank.
        shifts_images: The offset can be applied to the visual tokens too (`visual_offset`).
        d_model: Width of the embeddings that are prompted (d).
        prompt_length: Vectors of P (m).
        rank: See the table in `methods` (r).
        max_source_length: Longest text in tokens (s).
        alpha: Of the offset by position, see `DePT`.
        seed: Of what is random and frozen.
        visual_offset: Shift each visual token by a function of itself too, of the same rank.
    """

    name: ClassVar[str]
    keeps_length: ClassVar[bool] = False
    has_rank: ClassVar[bool] = True
    seeded: ClassVar[bool] = False
    needs_vectors: ClassVar[bool] = False
    compressed: ClassVar[bool] = False
    has_prompt: ClassVar[bool] = True
    shifts_images: ClassVar[bool] = False

    d_model: int
    prompt_length: int
    rank: int
    max_source_length: int
    alpha: float = 8.0
    seed: int = 0
    visual_offset: bool = False

    @abstractmethod
    def shapes(self) -> dict[str, Shapes]:
        """Return what is trained, by group (see `GROUPS`); a shape of size zero is no parameter."""

    @abstractmethod
    def build(self) -> Any:
        """Return the untrained `DePT`, with the parameters of `shapes`."""

    @property
    def scale(self) -> float:
        """Factor of the offset by position; 0 without one."""
        return 0.0

    @property
    def largest_rank(self) -> int:
        """Rank from which on more adds nothing that P can be."""
        return LARGEST_SIZE

    @property
    def common(self) -> dict[str, Any]:
        """Sizes that every `DePT` is built with, whatever its rank."""
        names = ("d_model", "prompt_length", "max_source_length", "alpha")
        return {name: getattr(self, name) for name in names}

    def check(self) -> None:
        """Check the sizes.

        Raises:
            ValueError: If the method cannot be built with them.
        """
        check_sizes(self.d_model, self.prompt_length, self.rank, self.max_source_length)
        if self.rank and not self.has_rank:
            raise ValueError(f"{self.name} has no rank, and rank is {self.rank}; leave it out")
        if self.needs_vectors and self.prompt_length < 1:
            raise ValueError(
                f"{self.name} makes a prompt and needs prompt_length >= 1; got {self.prompt_length}"
            )
        if self.prompt_length and not self.has_prompt:
            raise ValueError(f"{self.name} has no prompt, and prompt_length is {self.prompt_length}; give 0")
        if self.visual_offset and not self.shifts_images:
            able = ", ".join(name for name in METHODS if METHODS[name].shifts_images)
            raise ValueError(f"{self.name} does not shift visual tokens; these methods can: {able}")
        if self.compressed and not 1 <= self.rank <= self.d_model:
            raise ValueError(f"{self.name} needs a rank of 1 to the width {self.d_model}; got {self.rank}")

    def trained(self) -> dict[str, Shapes]:
        """Return `shapes` of what exists, for each of `GROUPS`."""
        shapes = self.shapes()
        return {
            group: {name: shape for name, shape in shapes.get(group, {}).items() if 0 not in shape}
            for group in GROUPS
        }

    def parameter_count(self) -> int:
        """Return the number of trainable parameters."""
        return sum(math.prod(shape) for group in self.trained().values() for shape in group.values())

    def describe(self) -> dict[str, Any]:
        """Return what `adapter.json` says of a prompt: name, sizes, and the scale that follows from them."""
        return {
            "method": self.name,
            "prompt_length": self.prompt_length,
            "rank": self.rank,
            "max_source_length": self.max_source_length,
            "d_model": self.d_model,
            "alpha": self.alpha,
            "scale": self.scale,
            "seed": self.seed if self.seeded else 0,
            "visual_offset": self.visual_offset,
        }

    @classmethod
    def groups(cls) -> set[str]:
        """Return those of `GROUPS` of which the method trains anything."""
        length, rank = int(cls.has_prompt), int(cls.has_rank)
        smallest = cls(d_model=1, prompt_length=length, rank=rank, max_source_length=1)
        return {group for group, shapes in smallest.trained().items() if shapes}

    @classmethod
    def solve(
        cls,
        *,
        d_model: int,
        max_source_length: int,
        reference_prompt_length: int,
        prompt_length: int,
        rank: int | None = None,
        visual_offset: bool = False,
    ) -> tuple[int, int]:
        """Return the prompt length and rank with no more parameters than a plain prompt of l vectors.

        At T5-base (d=768, s=256) and l = 100, DePT has the table of the paper: (m, r) = (0, 75), (20, 60),
        (40, 45), (60, 30), (80, 15), (100, 0).

        Args:
            d_model: Width of the model (d).
            max_source_length: Longest text in tokens (s).
            reference_prompt_length: Vectors of the plain prompt (l), and of methods that keep its length.
            prompt_length: Vectors of the other methods (m); methods without a prompt have none.
            rank: Taken as it is; None solves for the largest.
            visual_offset: Spend the budget on the offset of visual tokens too.

        Raises:
            ValueError: If the prompt alone is over the budget, or the method has no rank and is given one.
        """
        length = reference_prompt_length if cls.keeps_length else prompt_length * cls.has_prompt

        def at(rank: int) -> Method:
            return cls(
                d_model=d_model,
                prompt_length=length,
                rank=rank,
                max_source_length=max_source_length,
                visual_offset=visual_offset,
            )

        if rank is not None or not cls.has_rank:
            at(rank or 0).check()
            return length, rank or 0
        budget = reference_prompt_length * d_model
        if not 0 <= length * d_model <= budget:
            raise ValueError(
                f"a prompt of {length} vectors of width {d_model} has {length * d_model:,} parameters; the "
                f"budget is {budget:,}, which admits 0 to {reference_prompt_length}"
            )
        one, two = (at(rank).parameter_count() for rank in (1, 2))
        # All counts are straight lines in the rank.
        solved = max(0, (budget - one) // (two - one) + 1)
        if solved == 0 and (cls.keeps_length or not cls.has_prompt):
            raise ValueError(
                f"a budget of {budget:,} parameters buys no rank of {cls.name} at width {d_model}; raise "
                "reference_prompt_length"
            )
        return length, min(solved, at(1).largest_rank)


METHODS: Registry[type[Method]] = Registry(
    "method",
    {
        "pt": "dept_vl.prompts.methods:PromptTuning",
        "dept": "dept_vl.prompts.methods:Decomposed",
        "adept": "dept_vl.prompts.methods:ADePT",
        "hybrid": "dept_vl.prompts.methods:Hybrid",
        "ulpt": "dept_vl.prompts.methods:ULPT",
        "lopt": "dept_vl.prompts.methods:LoPT",
        "residual": "dept_vl.prompts.methods:ResidualPrompt",
        "memory": "dept_vl.prompts.methods:MemoryOffset",
    },
)
"""Every method, by name."""

M = TypeVar("M", bound=type[Method])


def register_method(method: M) -> M:
    """Make a method known by its name, for training, files, rows with different adapters and comparisons.

    What it trains has to keep the names and shapes that `shapes` gives, because files are checked by them.

    Args:
        method: The class; returned as it is.

    Raises:
        ValueError: If another method has the name.

    Example:
        >>> import dept_vl
        >>> from dept_vl.prompts.base import METHODS, Method
        >>> @dept_vl.register_method
        ... class Shifted(Method):
        ...     name, has_rank = "shifted", False
        ...
        ...     def shapes(self):
        ...         return {"prompt": {"soft_prompt": (self.prompt_length, self.d_model)},
        ...                 "low_rank": {"token_offset.bias": (self.d_model,)}}
        ...
        ...     def build(self):
        ...         return dept_vl.DePT(**self.common, token_offset=Shift(self.d_model))  # E -> bias
        >>> METHODS.unregister("shifted")
    """
    METHODS.register(method.name, method)
    return method


def sized(method: str, **sizes: Any) -> Method:
    """Return a method at its sizes, as `Method` has them; at rank 0 that is plain prompt tuning.

    Raises:
        UnknownNameError: If there is no method of this name.
        ValueError: If the method cannot be built with these sizes.
    """
    chosen = METHODS[method](**sizes)
    chosen.check()
    if not chosen.has_rank or chosen.rank:
        return chosen
    return METHODS["pt"](**{**sizes, "visual_offset": False})


def check_sizes(d_model: int, prompt_length: int, rank: int, max_source_length: int) -> None:
    """Check the sizes of a prompt.

    Raises:
        ValueError: If one is negative, or there is no text position to offset.
    """
    if min(prompt_length, rank) < 0 or min(d_model, max_source_length) < 1:
        raise ValueError(
            "DePT needs prompt_length >= 0, rank >= 0, d_model >= 1 and max_source_length >= 1; "
            f"got prompt_length={prompt_length}, rank={rank}, d_model={d_model}, "
            f"max_source_length={max_source_length}"
        )
