r"""Make the page of a finished run again, from what lies in its folder and the data that it was scored on.

python scripts/report.py --run runs/vqav2-...
python scripts/report.py --run runs/vqav2-... --picture report.png    (with Chromium: a picture of its top)
"""

from dept_vl.cli import entry, report

if __name__ == "__main__":
    entry(report)
