r"""Score a finished run on any split; of a test split, write the file for its server.

accelerate launch scripts/evaluate.py --run runs/vqav2-... --split minival
accelerate launch scripts/evaluate.py --run runs/vqav2-... --split test-dev
"""

import tyro

from dept_vl.config import EvaluateConfig
from dept_vl.training.score_run import Evaluated, score_run


def main(config: EvaluateConfig) -> Evaluated:
    """Answer, score and write."""
    return score_run(config)


if __name__ == "__main__":
    main(tyro.cli(EvaluateConfig, description=__doc__, use_underscores=True))
