r"""A page on this machine to upload images, ask questions and pick among adapters of one backbone.

python scripts/demo.py --adapters runs/vqa runs/nlvr2 user/captions
"""

from dept_vl.cli import demo, entry

if __name__ == "__main__":
    entry(demo)
