"""Test whether prompts are slow because they change every input alike: a constant against a function.

    python scripts/why_slow.py

Nothing else differs: no prompt, the same budget, the same tries of learning rates. At the encoder's input
every word and visual token is shifted by a vector of its position, or by a function of itself (`adept` with
visual tokens, m = 0). At its output every vector is shifted by one of its position, or by a function of
itself (`memory`). Finished runs are kept, and the tables are those of `scripts/compare.py`.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

import dept_vl
from benchmarks.options import CompareConfig
from dept_vl.cli import entry, parse_options
from dept_vl.prompts.base import Method
from dept_vl.prompts.dept import DePT


class ByPosition(nn.Module):
    """One vector for each position, initially zero. Later positions use the last vector."""

    def __init__(self, positions: int, d_model: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(positions, d_model))

    def forward(self, vectors: Float[Tensor, "batch length d_model"]) -> Float[Tensor, "length d_model"]:
        """Return the shift of each position."""
        places = torch.arange(vectors.shape[1], device=vectors.device)
        return self.table[places.clamp(max=len(self.table) - 1)].to(vectors.dtype)


@dept_vl.register_method
class ConstantInput(Method):
    """Method that shifts each text position and each visual token. The rank is the number of positions."""

    name = "constant-input"
    has_prompt = False

    def build(self) -> DePT:
        """See `Method.build`."""
        tables = {name: ByPosition(self.rank, self.d_model) for name in ("token_offset", "visual_offset")}
        return DePT(**self.common, **tables)


@dept_vl.register_method
class ConstantOutput(Method):
    """Method that shifts each position of the encoder's output. The rank is the number of positions."""

    name = "constant-output"
    has_prompt = False

    def build(self) -> DePT:
        """See `Method.build`."""
        return DePT(**self.common, memory_offset=ByPosition(self.rank, self.d_model))


PAIRS = ("constant-input", "adept + images, m = 0", "constant-output", "memory")


@dataclass(frozen=True)
class WhyConfig(CompareConfig):
    """Configuration of the comparison."""

    tasks: tuple[str, ...] = ("relabelled", "scenes-vqav2")
    """Names of tasks, or configuration files."""
    methods: tuple[str, ...] = PAIRS
    """Names of methods."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Random seeds, with one run of each method per seed. Learning rates are searched with the first one."""
    output_dir: Path = Path("runs/why")
    """Folder of all runs. Finished runs are not repeated, stopped ones are resumed."""


def main(options: WhyConfig) -> None:
    """Run everything that is not finished, and write the tables."""
    from benchmarks.compare import compare

    compare(options)


if __name__ == "__main__":
    entry(lambda arguments: main(parse_options(WhyConfig, arguments, "why_slow.py", __doc__)))
