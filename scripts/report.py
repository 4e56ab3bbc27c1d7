"""Write the report of a finished run again, from its folder and the data that it was scored on.

python scripts/report.py --run runs/vqav2-...
python scripts/report.py --run runs/vqav2-... --picture report.png    (a screenshot of its top, by Chromium)
"""

from dept_vl.cli import entry, report

if __name__ == "__main__":
    entry(report)
