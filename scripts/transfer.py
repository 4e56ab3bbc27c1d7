r"""Transfer a trained prompt to a task with few examples: from scratch, from P, from P and offset.

accelerate launch scripts/transfer.py --source runs/vqa --target vqav2 --k 4 16 32 --seeds 5
accelerate launch scripts/transfer.py --source vqav2 --source_config data/configs/scenes-vqav2.json \
        --target nlvr2 --config data/configs/scenes-nlvr2.json
"""

from dept_vl.cli import entry, transfer

if __name__ == "__main__":
    entry(transfer)
