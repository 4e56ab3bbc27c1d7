"""Score a finished run on any split, and write the submission of a test split.

accelerate launch scripts/evaluate.py --run runs/vqav2-... --split minival
accelerate launch scripts/evaluate.py --run runs/vqav2-... --split test-dev
"""

from dept_vl.cli import entry, evaluate

if __name__ == "__main__":
    entry(evaluate)
