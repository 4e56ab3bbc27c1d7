"""Local web page to upload images, ask questions and choose among adapters of one backbone.

python scripts/demo.py --adapters runs/vqa runs/nlvr2 user/captions
"""

from dept_vl.cli import demo, entry

if __name__ == "__main__":
    entry(demo)
