"""Ask a trained adapter about an image.

python scripts/predict.py street.jpg "what colour is the car?" --adapter runs/vqa
python scripts/predict.py left.jpg right.jpg "both show a dog" "one is asleep" --adapter runs/nlvr2
python scripts/predict.py beach.jpg --adapter user/captions
python scripts/predict.py "a fine film" --adapter runs/sst2

Images come first, as many as the adapter's task uses for one question. Each question is answered in one line.
"""

from dept_vl.cli import entry, predict

if __name__ == "__main__":
    entry(predict)
