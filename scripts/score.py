r"""Score a file of predictions as the official servers do, without a model.

python scripts/score.py vqav2 --questions v2_OpenEnded_mscoco_val2014_questions.json \
        --annotations v2_mscoco_val2014_annotations.json --predictions predictions.json
python scripts/score.py gqa --questions val_all_questions.json --choices val_choices.json \
        --predictions predictions.json
python scripts/score.py nlvr2 --examples dev.json --predictions predictions.csv
python scripts/score.py coco --references captions_val2014.json --predictions predictions.json

With --json FILE every command writes its scores under the keys of the official scorers. Predictions are
compared exactly as they are in the file.
"""

from dept_vl.cli import entry, score

if __name__ == "__main__":
    entry(score)
