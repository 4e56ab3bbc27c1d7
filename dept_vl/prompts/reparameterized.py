"""Modules of the methods in `methods`: sources of P, and offsets that depend on the token."""

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from dept_vl.prompts.dept import PromptSource


class Bottleneck(nn.Module):
    """Offset of a vector, f(x) = ReLU(x A' + a) B' + b, which is zero before training."""

    def __init__(self, d_model: int, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.down = nn.Linear(d_model, rank)
        self.up = nn.Linear(rank, d_model)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, vectors: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Return the offset of each vector, in the data type of `vectors`."""
        shifts: Tensor = self.up(torch.relu(self.down(vectors.to(self.down.weight.dtype))))
        return shifts.to(vectors.dtype)


class Residual(PromptSource):
    """Source P = P' + f(P'). Unlike the published f, this f has no final norm, so it starts at zero."""

    as_prompt = ("soft_prompt",)

    def __init__(self, d_model: int, prompt_length: int, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.soft_prompt = nn.Parameter(torch.empty(prompt_length, d_model).uniform_(-0.5, 0.5))
        self.residual = Bottleneck(d_model, rank)

    def forward(self) -> Float[Tensor, "prompt d_model"]:
        """Return the soft prompt P."""
        vectors: Tensor = self.soft_prompt + self.residual(self.soft_prompt)
        return vectors

    @torch.no_grad()
    def start_from(self, vectors: Float[Tensor, "prompt d_model"]) -> None:
        """Set P' to `vectors` and leave f unchanged; see `PromptSource.start_from`."""
        self.soft_prompt.copy_(vectors)


class LowRank(PromptSource):
    """Source P = U V. V is scaled so that a step of U changes P by about as much."""

    as_prompt = ("u",)

    def __init__(self, d_model: int, prompt_length: int, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.u = nn.Parameter(torch.empty(prompt_length, rank).uniform_(-0.5, 0.5))
        v = torch.empty(rank, d_model)
        # On the meta device only the shape is needed, and drawing there would import more of torch.
        self.v = nn.Parameter(v if v.is_meta else v.normal_() / math.sqrt(rank))

    def forward(self) -> Float[Tensor, "prompt d_model"]:
        """Return the soft prompt P."""
        return self.u @ self.v

    @torch.no_grad()
    def start_from(self, vectors: Float[Tensor, "prompt d_model"]) -> None:
        """Set U V to the matrix of this rank that is nearest to `vectors` (Eckart & Young)."""
        rank, size = self.rank, math.sqrt(vectors.shape[1] / self.rank)
        left, values, right = torch.linalg.svd(vectors.float(), full_matrices=False)
        self.u.copy_(left[:, :rank] * values[:rank] / size)
        self.v.copy_(right[:rank] * size)


class ScaledRandom(PromptSource):
    """Source P = (Z P~) * scale + shift, with a frozen random P~, of which only the seed is saved."""

    as_prompt = ("z", "shift")
    random: Tensor

    def __init__(self, d_model: int, prompt_length: int, rank: int, seed: int) -> None:
        super().__init__()
        self.rank, self.seed = rank, seed
        self.z = nn.Parameter(torch.empty(prompt_length, rank).uniform_(-0.5, 0.5))
        self.scale = nn.Parameter(torch.ones(d_model))
        self.shift = nn.Parameter(torch.zeros(d_model))
        random = torch.empty(rank, d_model)
        if not random.is_meta:
            # NumPy has frozen this generator, so a seed gives the same P~ in every version.
            drawn = np.random.RandomState(seed).standard_normal((rank, d_model)) / math.sqrt(rank)
            random = torch.from_numpy(drawn.astype(np.float32))
        self.register_buffer("random", random, persistent=False)

    def forward(self) -> Float[Tensor, "prompt d_model"]:
        """Return the soft prompt P."""
        return self.z @ self.random * self.scale + self.shift

    @torch.no_grad()
    def start_from(self, vectors: Float[Tensor, "prompt d_model"]) -> None:
        """Set `shift` to the mean of `vectors`, and Z by least squares to fit the remainder."""
        self.scale.fill_(1.0)
        self.shift.copy_(vectors.mean(0))
        solved = torch.linalg.lstsq(self.random.T, (vectors.float() - self.shift).T).solution
        self.z.copy_(solved.T)
