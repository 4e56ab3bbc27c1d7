"""Generate data/samples: a few images and ten questions, as a minimal example of your own data.

python scripts/make_samples.py --output_dir data/samples
"""

import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from dept_vl._utils.options import Options
from dept_vl.cli import entry, parse_options

SIZE = 96
PICTURES = (
    ("red", "circle"),
    ("blue", "square"),
    ("green", "circle"),
    ("yellow", "square"),
    ("blue", "circle"),
)


@dataclass(frozen=True)
class SampleConfig(Options):
    """Configuration of the samples."""

    output_dir: Path = Path("data/samples")
    """Folder for the samples."""


def main(config: SampleConfig) -> None:
    """Write five images and ten rows."""
    images = config.output_dir / "images"
    images.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (color, shape) in enumerate(PICTURES):
        picture = Image.new("RGB", (SIZE, SIZE), "white")
        draw = ImageDraw.Draw(picture)
        box = (20 + 3 * number, 24, 68 + 3 * number, 72)
        (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=color)
        name = f"images/{color}-{shape}.png"
        picture.save(config.output_dir / name)
        rows += [
            {"image": name, "question": "what color is the shape?", "answer": color},
            {"image": name, "question": "which shape is it?", "answer": shape},
        ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (config.output_dir / "questions.jsonl").write_text(lines)


if __name__ == "__main__":
    entry(lambda arguments: main(parse_options(SampleConfig, arguments, "make_samples.py", __doc__)))
