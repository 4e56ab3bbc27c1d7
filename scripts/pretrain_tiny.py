"""Pretrain small backbones, from scratch or from another one. The cards of shipped backbones have commands.

    python scripts/pretrain_tiny.py --vision_only --output_dir runs/tower
    python scripts/pretrain_tiny.py --vision_from runs/tower --output_dir runs/tiny-clip-t5
    python scripts/pretrain_tiny.py --vision_from runs/tower --language bart --output_dir runs/tiny-clip-bart

The vision tower is trained first, with labels for each cell of rendered scenes. Then a T5 or BART is trained
on the frozen tower's cached features, with questions, captions, statements about pairs, and text alone. All
parts are standard classes in the standard layout, so the result loads like any other backbone.
"""

import json
import shlex
import shutil
import time
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import nn

from dept_vl._utils.options import to_json
from dept_vl.cli import entry, parse_options
from dept_vl.models.backbone import Backbone
from dept_vl.models.options import ObjectOrder
from dept_vl.models.vision import VisionEncoder
from pretraining.convert import convert
from pretraining.language import (
    UNFINISHED,
    build_language,
    build_tokenizer,
    fit_projection,
    pretrain_language,
)
from pretraining.measure import measure
from pretraining.options import PretrainConfig
from pretraining.tower import pretrain_vision

RECORD_FILE = "pretraining.json"
"""Record of configuration and results, beside the weights."""
CARD = "README.md"


def main(config: PretrainConfig) -> None:
    """Pretrain the backbone, evaluate it, and write its card."""
    torch.set_float32_matmul_precision("high")
    record_file = config.output_dir / RECORD_FILE
    record = json.loads(record_file.read_text()) if config.evaluate_only else pretrain(config)
    if not config.vision_only:
        record["exact_match"] = measure(config)
        record_file.write_text(json.dumps(record, indent=2) + "\n")
        write_card(config.output_dir, record)
    print(json.dumps(record, indent=2))


def write_card(folder: Path, record: dict[str, Any]) -> None:
    """Write the card: what the backbone is, how it was made, and its scores."""
    backbone = Backbone.from_pretrained(folder)
    modules = {
        "vision": backbone.vision,
        "language": backbone.language,
        "projection": backbone.visual_projection,
    }
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items() if module}
    template = jinja2.Template(Path(__file__).with_suffix(".md.j2").read_text(), trim_blocks=True)
    families = sorted(
        record["exact_match"].items(), key=lambda pair: (pair[0].startswith("kept out"), pair[0])
    )
    # The options of an earlier version of this script are in its own card.
    earlier = record.get("earlier", [])
    own = [stage for stage in earlier if "language" in stage["config"]]
    card = template.render(
        name=folder.name,
        language=type(backbone.language).__name__,
        tower=type(backbone.vision.model).__name__ if backbone.vision else "",
        sizes=sizes,
        families=families,
        backbone=backbone,
        stages=[*(command(stage["config"], "runs") for stage in own), command(record["config"], "data")],
        legacy=next((stage for stage in earlier if stage not in own), None),
        before=[
            f"{s['config']['language_steps']:,} batches in {s['minutes']['language']} minutes"
            + (f" (stopped {s['stopped']})" if "stopped" in s else "")
            for s in own
        ],
        **record,
    )
    (folder / CARD).write_text(card.rstrip() + "\n")


def command(taken: dict[str, Any], root: str) -> str:
    """Return the options that a language stage was started with, except those of the tower."""
    usual = to_json(PretrainConfig()) | {"vision_from": None, "output_dir": None}
    taken = taken | {"output_dir": f"{root}/{taken['output_dir']}"}
    changed = {name: value for name, value in taken.items() if value != usual[name]}
    words = {n: shlex.join(map(str, v)) if isinstance(v, list) else v for n, v in changed.items()}
    return " ".join(f"--{name} {value}" for name, value in words.items())


def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Train the vision tower, unless it is finished, and the language model; save them in half precision.

    Returns:
        Record of configuration and results.
    """
    record = tower_of(config)
    if config.vision_only:
        return record
    started = time.perf_counter()
    torch.manual_seed(config.seed + 1)
    # The language model learns from the tower as it is stored.
    vision = VisionEncoder.from_pretrained(config.output_dir / "vision")
    # The position vectors are trained together with the language model.
    order: ObjectOrder = "none" if config.object_order == "none" else "trained"
    earlier = Backbone.from_pretrained(config.language_from) if config.language_from else None
    goes_on = earlier is not None and earlier.language.config.model_type == config.language
    language = earlier.language if earlier and goes_on else build_language(config)
    tokenizer = earlier.tokenizer if earlier else build_tokenizer()
    backbone = Backbone(vision, language, tokenizer, name=config.output_dir.name, object_order=order)
    places = backbone.visual_projection.object_order if backbone.visual_projection else None
    if isinstance(places, nn.Embedding):
        nn.init.normal_(places.weight)
    if earlier and goes_on:
        fit_projection(backbone, earlier, config)
    elif earlier:
        convert(earlier, backbone)
    steps = pretrain_language(config, backbone.to(config.device))
    backbone.object_order = config.object_order
    backbone.cpu().half().save_pretrained(config.output_dir)
    shutil.rmtree(config.output_dir / UNFINISHED, ignore_errors=True)
    record["minutes"]["language"] = minutes_since(started)
    taken = {"language_steps": steps, "language_minutes": 0.0, "output_dir": config.output_dir.name}
    record["config"] = to_json(config) | taken | {"vision_from": None}
    record["device"] = device_name(config)
    record["by_clock"] = bool(config.language_minutes)
    record["comparisons"] = True
    if config.language_from:
        before = json.loads((config.language_from / RECORD_FILE).read_text())
        kept = {name: before[name] for name in ("config", "minutes", "stopped") if name in before}
        record["earlier"] = [*before.get("earlier", []), kept]
    return record


def tower_of(config: PretrainConfig) -> dict[str, Any]:
    """Train the vision tower, or copy a finished one; return its record."""
    record_file = config.output_dir / RECORD_FILE
    if record_file.is_file() and not (config.output_dir / "language").exists():
        record: dict[str, Any] = json.loads(record_file.read_text())
        return record
    if config.output_dir.exists():
        raise FileExistsError(f"{config.output_dir} exists; choose another --output_dir or remove it")
    if config.vision_from is not None:
        shutil.copytree(config.vision_from / "vision", config.output_dir / "vision")
        shutil.copy(config.vision_from / RECORD_FILE, record_file)
        return tower_of(config)
    started = time.perf_counter()
    torch.manual_seed(config.seed)
    vision, scores = pretrain_vision(config)
    vision.cpu().half().save_pretrained(config.output_dir / "vision")
    record = {
        "vision_accuracy": {name: round(value, 4) for name, value in scores.items()},
        "vision_scenes": config.vision_steps * config.vision_batch,
        "minutes": {"vision": minutes_since(started)},
    }
    record_file.write_text(json.dumps(record, indent=2) + "\n")
    return record


def device_name(config: PretrainConfig) -> str:
    """Return the name of the training device, for the card."""
    if config.device.type == "cpu":
        return f"a CPU ({torch.get_num_threads()} threads)"
    return f"an {torch.cuda.get_device_name()}" if config.device.type == "cuda" else config.device.type


def minutes_since(started: float) -> float:
    """Return the minutes since a value of `time.perf_counter`."""
    return round((time.perf_counter() - started) / 60, 1)


if __name__ == "__main__":
    entry(lambda arguments: main(parse_options(PretrainConfig, arguments, "pretrain_tiny.py", __doc__)))
