r"""Check a file of predictions as an evaluation server would, before it is uploaded.

python scripts/check_submission.py vqav2 --questions v2_OpenEnded_mscoco_test2015_questions.json \
        --predictions submission.json
python scripts/check_submission.py gqa --questions submission_all_questions.json --predictions submission.json
"""

from dept_vl.cli import check_submission, entry

if __name__ == "__main__":
    entry(check_submission)
