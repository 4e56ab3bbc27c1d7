"""Modules of the methods around DePT: what P is made of, and what shifts a token by what it is."""

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from dept_vl.prompts.dept import PromptSource


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
