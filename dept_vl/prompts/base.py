"""Interface of prompt methods, their registry `METHODS` and their parameter budget; imports no torch."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from dept_vl._utils.registry import Registry

LARGEST_SIZE = 1_000_000
"""Largest size of a prompt, in any dimension, that is accepted from a file."""

Init = Literal["vocabulary", "text", "random"]
"""Initialisation of a soft prompt; see `initialise`."""
Shapes = Mapping[str, tuple[int, ...]]
"""Shape of each parameter by its name in `DePT`."""


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Prompt method with its sizes. Each subclass is one method.

    Attributes:
        name: Name of the method in commands, configurations and files.
        keeps_length: Whether P has the l vectors of the plain prompt that sets the budget. Other methods have
            m < l vectors and spend the rest of the budget on their rank.
        has_rank: Whether the method has a rank. With rank 0, it is plain prompt tuning.
        seeded: Whether the method has frozen random values, whose seed is saved.
        needs_vectors: Whether P is computed from other parameters and needs `prompt_length` >= 1.
        compressed: Whether P is a product of matrices, whose rank is at most `d_model`.
        has_prompt: Whether the method has a P. Other methods spend the whole budget on their rank.
        shifts_images: Whether the method supports `visual_offset`.
        d_model: Hidden size of the backbone's word embeddings (d).
        prompt_length: Number of vectors of P (m).
        rank: Rank (r); see the table in `methods`.
        max_source_length: Maximum text length in tokens (s).
        alpha: Scaling parameter of the offset by position; see `DePT`.
        seed: Random seed of the frozen random values.
        visual_offset: Whether to add an offset of the same rank to each visual token.
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
    def build(self) -> Any:
        """Return an untrained `DePT`."""

    @property
    def scale(self) -> float:
        """Factor of the offset by position; 0 without such an offset."""
        return 0.0

    @property
    def largest_rank(self) -> int:
        """Largest useful rank; a larger one adds parameters but no further values of P."""
        return LARGEST_SIZE

    @property
    def common(self) -> dict[str, Any]:
        """Arguments of `DePT` that do not depend on the rank."""
        names = ("d_model", "prompt_length", "max_source_length", "alpha")
        return {name: getattr(self, name) for name in names}

    def check(self) -> None:
        """Check the sizes.

        Raises:
            ValueError: If the method cannot be built with these sizes.
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
        """Return the shapes of the parameters of `build` by `DePT.parameter_groups`, without their memory.

        Raises:
            ValueError: If `build` returns something else, or a module with buffers that are saved.
        """
        import torch  # not at the top: the command line reads the registry without it

        from dept_vl.prompts.dept import DePT

        with torch.device("meta"):
            prompt = self.build()
        if not isinstance(prompt, DePT):
            raise ValueError(f"build() of method {self.name} returned a {type(prompt).__name__}, not a DePT")
        names = {parameter: name for name, parameter in prompt.named_parameters()}
        kept = {name for name, _ in prompt.named_parameters(remove_duplicate=False)}  # with shared ones
        if lost := sorted(prompt.state_dict().keys() - kept):
            raise ValueError(
                f"method {self.name} has the buffers {', '.join(lost)}, and adapters hold parameters only: "
                "make them parameters, or register them with persistent=False and fill them in build()"
            )
        return {
            group: {names[parameter]: tuple(parameter.shape) for parameter in parameters}
            for group, parameters in prompt.parameter_groups().items()
        }

    def parameter_count(self) -> int:
        """Return the number of trainable parameters."""
        return sum(math.prod(shape) for group in self.trained().values() for shape in group.values())

    def describe(self) -> dict[str, Any]:
        """Return the description of a prompt in `adapter.json`: the method's name, sizes and scale."""
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
        """Return the groups in which the method has trainable parameters."""
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
        """Return the prompt length and the largest rank within the budget of a plain prompt of l vectors.

        For T5-base (d=768, s=256) and l = 100, this gives the sizes of DePT in the paper: (m, r) = (0, 75),
        (20, 60), (40, 45), (60, 30), (80, 15), (100, 0).

        Args:
            d_model: Hidden size of the model (d).
            max_source_length: Maximum text length in tokens (s).
            reference_prompt_length: Length of the plain prompt (l), and of P in methods that keep its length.
            prompt_length: Length of P (m) in other methods; ignored by methods without a prompt.
            rank: Rank to return as it is; None to solve for the largest.
            visual_offset: Whether the method has an offset of visual tokens.

        Raises:
            ValueError: If the prompt alone exceeds the budget, the budget is too small for rank 1 where the
                method needs it, or the method cannot be built with a given `rank`.
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
        if one == two:
            raise ValueError(
                f"the parameters of {cls.name} do not depend on its rank; set has_rank = False in its class"
            )
        # The number of parameters is linear in the rank.
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
"""All methods by name."""

M = TypeVar("M", bound=type[Method])


def register_method(method: M) -> M:
    """Register a method under its name, so that it can be trained, saved, loaded and compared.

    Its budget, and the check of adapter files, follow from the parameters of the `DePT` that `build` returns.

    Args:
        method: Subclass of `Method`, which is returned unchanged.

    Raises:
        TypeError: If it is not such a class, or a method of it is missing.
        ValueError: If another one of this name is registered, or the name is no name of a folder.

    Example:
        >>> import dept_vl
        >>> from dept_vl.prompts.base import METHODS, Method
        >>> @dept_vl.register_method
        ... class Shifted(Method):
        ...     name, has_rank = "shifted", False
        ...
        ...     def build(self):
        ...         return dept_vl.DePT(**self.common, token_offset=Shift(self.d_model))  # E -> bias
        >>> METHODS.unregister("shifted")
    """
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise TypeError(f"expected a subclass of dept_vl.prompts.base.Method, found {method!r:.80}")
    if missing := sorted(getattr(method, "__abstractmethods__", ())):
        raise TypeError(f"{method.__name__} has no {' and no '.join(missing)}; write what is missing")
    METHODS.register(getattr(method, "name", None), method)
    return method


def sized(method: str, **sizes: Any) -> Method:
    """Return a method with its sizes (see `Method`). With rank 0, return plain prompt tuning.

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
        ValueError: If `prompt_length` or `rank` is negative, or `d_model` or `max_source_length` is below 1.
    """
    if min(prompt_length, rank) < 0 or min(d_model, max_source_length) < 1:
        raise ValueError(
            "DePT needs prompt_length >= 0, rank >= 0, d_model >= 1 and max_source_length >= 1; "
            f"got prompt_length={prompt_length}, rank={rank}, d_model={d_model}, "
            f"max_source_length={max_source_length}"
        )
