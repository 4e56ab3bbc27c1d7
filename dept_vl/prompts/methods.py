"""The methods around DePT: where P comes from, and what shifts the text, at one budget.

The encoder reads `[P ; E + g]` in all of them:

| method   | P                     | g                            | source                              |
|----------|-----------------------|------------------------------|-------------------------------------|
| pt       | free, m = l           | 0                            | Lester et al., EMNLP 2021           |
| dept     | free, m < l           | scale * A[pos] @ B           | Shi & Lipani, ICLR 2024             |
| adept    | free, m < l           | f(E) = ReLU(E A' + a) B' + b | Tang et al., ICLR 2025              |
| hybrid   | free, m < l           | both, each of rank r         | the two above                       |
| ulpt     | (Z P~) * s + b, m = l | 0; P~ is random and frozen   | Wu et al., 2025                     |
| lopt     | U V, m = l            | 0                            | Xiao et al., 2023; Guo et al., 2024 |
| residual | P' + f(P'), m < l     | 0; f as ADePT's              | Razdaibiedina et al., 2023          |

r is the rank of A B, of A' B', of U V, of Z P~, or the width of the residual's hidden layer. `prompt_lr`
trains what moves P by about its own step (P, Z, b, U), `offset_lr` all that multiplies or shifts the text.
A', a, B' and b, like A and B, start so that the method is plain prompt tuning with m vectors.
"""

import math
from collections.abc import Mapping
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from dept_vl.prompts.budget import Method
from dept_vl.prompts.dept import DePT, PromptSource

METHODS: tuple[Method, ...] = get_args(Method)
LONG: tuple[Method, ...] = ("pt", "ulpt", "lopt")
"""Methods whose prompt keeps the l vectors of the plain one; the others have fewer, and spend the rest."""

Shape = tuple[int, ...]


class Bottleneck(nn.Module):
    """f(x) = ReLU(x A' + a) B' + b, a function of one vector; zero until it is trained."""

    def __init__(self, d_model: int, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.down = nn.Linear(d_model, rank)
        self.up = nn.Linear(rank, d_model)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, vectors: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The shift of each vector, in the vectors' own type."""
        shifts: Tensor = self.up(torch.relu(self.down(vectors.to(self.down.weight.dtype))))
        return shifts.to(vectors.dtype)


class Residual(PromptSource):
    """P = P' + f(P'). The published f ends in a norm, without which it can start at zero."""

    def __init__(self, d_model: int, prompt_length: int, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.soft_prompt = nn.Parameter(torch.empty(prompt_length, d_model).uniform_(-0.5, 0.5))
        self.residual = Bottleneck(d_model, rank)

    def forward(self) -> Float[Tensor, "prompt d_model"]:
        """P."""
        vectors: Tensor = self.soft_prompt + self.residual(self.soft_prompt)
        return vectors

    @torch.no_grad()
    def start_from(self, vectors: Float[Tensor, "prompt d_model"]) -> None:
        """P' takes the vectors; f stays."""
        self.soft_prompt.copy_(vectors)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """P' is trained as P is; f as an offset."""
        return {"prompt": [self.soft_prompt], "low_rank": list(self.residual.parameters())}


class LowRank(PromptSource):
    """P = U V, with V of the size at which a step in U moves P as far."""

    def __init__(self, d_model: int, prompt_length: int, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.u = nn.Parameter(torch.empty(prompt_length, rank).uniform_(-0.5, 0.5))
        self.v = nn.Parameter(torch.randn(rank, d_model) / math.sqrt(rank))

    def forward(self) -> Float[Tensor, "prompt d_model"]:
        """P."""
        return self.u @ self.v

    @torch.no_grad()
    def start_from(self, vectors: Float[Tensor, "prompt d_model"]) -> None:
        """The nearest matrix of this rank (Eckart & Young)."""
        rank, size = self.rank, math.sqrt(vectors.shape[1] / self.rank)
        left, values, right = torch.linalg.svd(vectors.float(), full_matrices=False)
        self.u.copy_(left[:, :rank] * values[:rank] / size)
        self.v.copy_(right[:rank] * size)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """U is trained as P is; V multiplies."""
        return {"prompt": [self.u], "low_rank": [self.v]}


class ScaledRandom(PromptSource):
    """P = (Z P~) * scale + shift, with P~ random and never trained: its seed stands for it in files."""

    random: Tensor

    def __init__(self, d_model: int, prompt_length: int, rank: int, seed: int) -> None:
        super().__init__()
        self.rank, self.seed = rank, seed
        self.z = nn.Parameter(torch.empty(prompt_length, rank).uniform_(-0.5, 0.5))
        self.scale = nn.Parameter(torch.ones(d_model))
        self.shift = nn.Parameter(torch.zeros(d_model))
        # NumPy has frozen this generator, so a seed gives the same P~ in every version.
        drawn = np.random.RandomState(seed).standard_normal((rank, d_model)) / math.sqrt(rank)
        self.register_buffer("random", torch.from_numpy(drawn.astype(np.float32)), persistent=False)

    def forward(self) -> Float[Tensor, "prompt d_model"]:
        """P."""
        return self.z @ self.random * self.scale + self.shift

    @torch.no_grad()
    def start_from(self, vectors: Float[Tensor, "prompt d_model"]) -> None:
        """Shift is their mean, and Z the least squares of what is left."""
        self.scale.fill_(1.0)
        self.shift.copy_(vectors.mean(0))
        solved = torch.linalg.lstsq(self.random.T, (vectors.float() - self.shift).T).solution
        self.z.copy_(solved.T)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Z and shift are trained as P is; scale multiplies."""
        return {"prompt": [self.z, self.shift], "low_rank": [self.scale]}


def tensors(
    method: Method, d_model: int, max_source_length: int, prompt_length: int, rank: int
) -> dict[str, dict[str, Shape]]:
    """What a method trains: shapes by name, by learning rate (`prompt`, `low_rank`)."""
    d, s, m, r = d_model, max_source_length, prompt_length, rank
    vectors = {"soft_prompt": (m, d)}
    position = {"offset_a": (s, r), "offset_b": (r, d)}

    def bottleneck(name: str) -> dict[str, Shape]:
        down = {f"{name}.down.weight": (r, d), f"{name}.down.bias": (r,)}
        return down | {f"{name}.up.weight": (d, r), f"{name}.up.bias": (d,)}

    if r == 0:
        method = "pt"
    token = bottleneck("token_offset")
    by_method: dict[str, tuple[Mapping[str, Shape], Mapping[str, Shape]]] = {
        "pt": (vectors, {}),
        "dept": (vectors, position),
        "adept": (vectors, token),
        "hybrid": (vectors, position | token),
        "ulpt": ({"source.z": (m, r), "source.shift": (d,)}, {"source.scale": (d,)}),
        "lopt": ({"source.u": (m, r)}, {"source.v": (r, d)}),
        "residual": ({"source.soft_prompt": (m, d)}, bottleneck("source.residual")),
    }
    prompt, low_rank = by_method[method]
    groups = {"prompt": prompt, "low_rank": low_rank}
    return {name: {k: v for k, v in group.items() if 0 not in v} for name, group in groups.items()}


def parameter_count(
    method: Method, d_model: int, max_source_length: int, prompt_length: int, rank: int
) -> int:
    """Trainable parameters of a method.

    pt m*d; dept m*d + (s + d)*r; adept m*d + (2*d + 1)*r + d; hybrid m*d + (s + 3*d + 1)*r + d; ulpt
    m*r + 2*d; lopt (m + d)*r; residual as adept.
    """
    groups = tensors(method, d_model, max_source_length, prompt_length, rank).values()
    return sum(math.prod(shape) for group in groups for shape in group.values())


def solve_sizes(
    method: Method,
    d_model: int,
    max_source_length: int,
    reference_prompt_length: int,
    prompt_length: int,
    rank: int | None = None,
) -> tuple[int, int]:
    """Prompt length and rank of a method with no more parameters than a plain prompt of l vectors.

    Args:
        method: Of the table.
        d_model: Width of the model (d).
        max_source_length: Longest text in tokens (s).
        reference_prompt_length: Vectors of the plain prompt (l). pt, ulpt and lopt have as many.
        prompt_length: Vectors of the other methods (m).
        rank: Taken as it is if given; None solves for the largest.

    Raises:
        ValueError: If the prompt alone is over the budget, or plain prompt tuning is given a rank.
    """
    if method == "pt":
        if rank:
            raise ValueError(f"plain prompt tuning has no rank, and rank is {rank}; leave it out")
        return reference_prompt_length, 0
    length = reference_prompt_length if method in LONG else prompt_length
    if rank is not None:
        return length, rank
    budget = reference_prompt_length * d_model
    if length * d_model > budget:
        raise ValueError(
            f"a prompt of {length} vectors of width {d_model} has {length * d_model:,} parameters; the "
            f"budget is {budget:,}, which admits 0 to {reference_prompt_length}"
        )
    one, two = (parameter_count(method, d_model, max_source_length, length, r) for r in (1, 2))
    # All counts are straight lines in the rank.
    solved = max(0, (budget - one) // (two - one) + 1)
    # More would add nothing that P can be.
    largest = {"ulpt": d_model, "lopt": min(length, d_model)}.get(method, solved)
    if solved == 0 and method in LONG:
        raise ValueError(
            f"a budget of {budget:,} parameters buys no rank of {method} at width {d_model}; raise "
            "reference_prompt_length"
        )
    return length, min(solved, largest)


def impossible(method: Method, d_model: int, prompt_length: int, rank: int) -> str:
    """What a method cannot be made with; empty if nothing."""
    if method in ("ulpt", "lopt", "residual") and prompt_length < 1:
        return f"{method} makes a prompt and needs prompt_length >= 1; got {prompt_length}"
    if method in ("ulpt", "lopt") and not 1 <= rank <= d_model:
        return f"{method} needs a rank of 1 to the width {d_model}; got {rank}"
    return ""


def build(
    method: Method,
    d_model: int,
    *,
    prompt_length: int,
    rank: int,
    max_source_length: int,
    alpha: float = 8.0,
    seed: int = 0,
) -> DePT:
    """The untrained prompt of a method.

    Args:
        method: Of the table.
        d_model: Width of the embeddings that are prompted.
        prompt_length: Vectors of P (m).
        rank: See the table (r); 0 is plain prompt tuning.
        max_source_length: Longest text in tokens (s).
        alpha: Of the positions' offset, see `DePT`.
        seed: Of ULPT's frozen matrix.

    Raises:
        ValueError: If a size is negative, or a compressed prompt has no rank or more than the width.
    """
    source: PromptSource | None = None
    problem = impossible(method, d_model, prompt_length, rank)
    if problem:
        raise ValueError(problem)
    if method == "ulpt":
        source = ScaledRandom(d_model, prompt_length, rank, seed)
    elif method == "lopt":
        source = LowRank(d_model, prompt_length, rank)
    elif method == "residual" and rank > 0:
        source = Residual(d_model, prompt_length, rank)
    by_token = method in ("adept", "hybrid") and rank > 0
    return DePT(
        d_model,
        prompt_length=prompt_length,
        rank=min(rank, 0) if method in ("adept", "residual", "ulpt", "lopt") else rank,
        max_source_length=max_source_length,
        alpha=alpha,
        source=source,
        token_offset=Bottleneck(d_model, rank) if by_token else None,
    )


def describe(prompt: DePT) -> dict[str, Any]:
    """Method and sizes: what `build` needs to make the prompt again, and `scale`."""
    method: Method = "dept" if prompt.rank else "pt"
    rank, seed = prompt.rank, 0
    if isinstance(prompt.token_offset, Bottleneck):
        method, rank = "hybrid" if prompt.rank else "adept", prompt.token_offset.rank
    if isinstance(prompt.source, ScaledRandom):
        method, rank, seed = "ulpt", prompt.source.rank, prompt.source.seed
    elif isinstance(prompt.source, LowRank):
        method, rank = "lopt", prompt.source.rank
    elif isinstance(prompt.source, Residual):
        method, rank = "residual", prompt.source.rank
    return {
        "method": method,
        "prompt_length": prompt.prompt_length,
        "rank": rank,
        "max_source_length": prompt.max_source_length,
        "d_model": prompt.d_model,
        "alpha": prompt.alpha,
        "scale": prompt.scale,
        "seed": seed,
    }


@torch.no_grad()
def fold(
    prompt: DePT, word_embeddings: Float[Tensor, "words d_model"]
) -> tuple[DePT, Float[Tensor, "words d_model"]]:
    """The same prompt for inference alone: P as one tensor, and a word table with the token offset in it.

    Args:
        prompt: Of any method.
        word_embeddings: Of the whole vocabulary; not changed.
    """
    folded = DePT(
        prompt.d_model,
        prompt_length=prompt.prompt_length,
        rank=prompt.rank,
        max_source_length=prompt.max_source_length,
        alpha=prompt.alpha,
    ).to(word_embeddings.device)
    for ours, theirs in (
        (folded.soft_prompt, prompt.vectors()),
        (folded.offset_a, prompt.offset_a),
        (folded.offset_b, prompt.offset_b),
    ):
        if ours is not None and theirs is not None:
            ours.copy_(theirs)
    if prompt.token_offset is not None:
        word_embeddings = word_embeddings + prompt.token_offset(word_embeddings)
    return folded.requires_grad_(False).eval(), word_embeddings
