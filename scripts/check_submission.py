r"""Check a file of predictions as an evaluation server would, before it is uploaded.

python scripts/check_submission.py vqav2 --questions v2_OpenEnded_mscoco_test2015_questions.json \
        --predictions submission.json
python scripts/check_submission.py gqa --questions submission_all_questions.json --predictions submission.json
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from dept_vl.tasks import gqa as gqa_task
from dept_vl.tasks import vqav2 as vqav2_task
from dept_vl.tasks.gqa import GQA
from dept_vl.tasks.io.submission import check_submission
from dept_vl.tasks.vqav2 import VQAv2


def vqav2(questions: Path, predictions: Path) -> int:
    """EvalAI's VQA challenge: one answer for each question of test2015, for test-dev too.

    Args:
        questions: v2_OpenEnded_mscoco_test2015_questions.json.
        predictions: [{"question_id": int, "answer": str}].
    """
    ids = vqav2_task.read_rows(questions, None).column("question_id").to_pylist()
    return passed(check_submission(predictions, ids, VQAv2.prediction_format))


def gqa(questions: Path, predictions: Path) -> int:
    """EvalAI's GQA challenge: one answer for each question of the submission file.

    Args:
        questions: submission_all_questions.json.
        predictions: [{"questionId": str, "prediction": str}].
    """
    ids = gqa_task.read_rows(questions).column("question_id").to_pylist()
    return passed(check_submission(predictions, ids, GQA.prediction_format))


def passed(count: int) -> int:
    """Say so."""
    print(f"{count:,} predictions, one for each question")
    return count


def main(arguments: Sequence[str]) -> int:
    """Run one command, given as on the command line; returns the number of predictions."""
    count: int = tyro.extras.subcommand_cli_from_dict(
        {"vqav2": vqav2, "gqa": gqa},
        prog="check_submission.py",
        description=__doc__,
        args=arguments,
        use_underscores=True,
    )
    return count


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(str(error))
