r"""Train a prompt for VQAv2, or for any data in its official format.

accelerate launch scripts/train_vqa.py --data_dir data/vqav2 \
        --vision openai/clip-vit-base-patch32 --language google-t5/t5-base
accelerate launch scripts/train_vqa.py --config data/configs/easy-vqa.json

Errors in the options are reported in one line. The launcher may add its own output: with one process none if
`accelerate launch --quiet` is used, with several always a traceback and torch's table.
"""

from dept_vl.cli import entry, train

if __name__ == "__main__":
    entry(train)
