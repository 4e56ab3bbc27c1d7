r"""Train a prompt for VQAv2, or any data in its official format.

accelerate launch scripts/train_vqa.py --data_dir data/vqav2 \
        --vision openai/clip-vit-base-patch32 --language google-t5/t5-base
accelerate launch scripts/train_vqa.py --config data/configs/easy-vqa.json

A mistake is one line of this program. What the launcher adds to it is its own: of one process nothing with
`accelerate launch --quiet`; of several a traceback and a table that torch prints in any case.
"""

from dept_vl.cli import entry, train

if __name__ == "__main__":
    entry(train)
