r"""Score a finished run on any split; of a test split, write the file for its server.

accelerate launch scripts/evaluate.py --run runs/vqav2-... --split minival
accelerate launch scripts/evaluate.py --run runs/vqav2-... --split test-dev
"""

from dept_vl.cli import entry, evaluate

if __name__ == "__main__":
    entry(evaluate)
