"""Pretrain the small backbone that the project ships, from nothing, on 2 CPU cores in under an hour.

    python scripts/pretrain_tiny.py --output_dir data/tiny-clip-t5

First the vision tower, supervised cell by cell on rendered scenes; then, with the tower frozen and
its features cached, a T5 on questions, captions, statements about pairs and text alone. Both parts
are stock classes saved in the standard layout, so the result loads like any other backbone.
"""

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor, nn
from transformers import (
    Adafactor,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    TimmWrapperConfig,
    TimmWrapperModel,
    get_cosine_schedule_with_warmup,
)
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

from dept_vl._utils.options import Options, Positive, Rate, Seed
from dept_vl.cli import entry, parse_options
from dept_vl.models.backbone import Backbone
from dept_vl.models.prompted import IGNORE_INDEX, PromptedModel
from dept_vl.models.vision import VisionEncoder
from dept_vl.tasks.scenes.questions import (
    AFFIRMATIVE,
    CAPTION_PHRASINGS,
    FAMILIES,
    KEPT_OUT,
    PAIR_PHRASINGS,
    PHRASINGS,
    QA,
    ask,
    ask_pair,
    caption,
)
from dept_vl.tasks.scenes.render import (
    COLOURS,
    GRID,
    IMAGE_SIZE,
    SHAPES,
    SIZES,
    Scene,
    render,
    sample_scene,
)
from dept_vl.tasks.scenes.texts import WORDS, ask_text


@dataclass(frozen=True)
class PretrainConfig(Options):
    """How the small backbone is made."""

    output_dir: Path = Path("data/tiny-clip-t5")
    """Folder the backbone is written to; must not exist yet."""
    evaluate_only: bool = False
    """Measure the backbone in output_dir again instead of making one."""
    seed: Seed = 0
    """Of scenes, questions and weights."""
    vision_steps: Positive = 2500
    """Steps of the vision tower."""
    vision_batch: Positive = 80
    """Scenes per vision step, each drawn afresh."""
    vision_lr: Rate = 3e-3
    """Peak learning rate of the vision tower."""
    scenes: Positive = 60_000
    """Scenes whose features are cached for the language stage."""
    language_steps: Positive = 5000
    """Steps of the language model."""
    language_batch: Positive = 64
    """Questions per step (fewer captions and pairs, which are longer)."""
    language_lr: Rate = 1e-2
    """Peak rate of language model and visual projection, relative to each tensor's own scale
    (Adafactor): AdamW stayed on the first plateau for far longer."""
    affirmative_share: Rate = 0.2
    """Share of the steps, at the start, without negated and comparing questions. Yes and no mean the
    opposite in the two, and learning both at once from nothing stays at chance for long."""
    bf16: bool = True
    """Train the language model under bfloat16 autocast; 1.5 times as fast where the CPU has it."""
    d_model: Positive = 256
    """Width of the language model."""
    encoder_layers: Positive = 3
    """Layers of its encoder."""
    decoder_layers: Positive = 2
    """Layers of its decoder."""
    evaluation_scenes: Positive = 1500
    """Fresh scenes that the record's figures are measured on."""


WATCHED_SCENES = 200
"""Scenes that progress is measured on."""
RECORD_FILE = "pretraining.json"
"""What was done and measured, beside the weights."""
VISION_ARCHITECTURE = "resnet10t"
VISION_ARGS = {"channels": (32, 64, 96, 128), "stem_width": 16, "output_stride": 16}
"""A ResNet of timm, narrowed; stride 16 makes 4 x 4 visual tokens of a 64-pixel image."""
PIXELS = {
    "input_size": (3, IMAGE_SIZE, IMAGE_SIZE),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 1.0,
    "interpolation": "bilinear",
}
CELL_CLASSES = {"shape": [*SHAPES, "nothing"], "colour": list(COLOURS), "size": list(SIZES)}


def main(config: PretrainConfig) -> None:
    """Make the backbone, then measure what was written."""
    record_file = config.output_dir / RECORD_FILE
    record = json.loads(record_file.read_text()) if config.evaluate_only else pretrain(config)
    record["exact_match"] = measure(config)
    record_file.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Both stages, the weights stored in half precision; a finished first stage is kept.

    Returns:
        What to keep on record.
    """
    record_file, vision_dir = config.output_dir / RECORD_FILE, config.output_dir / "vision"
    started = time.perf_counter()
    if record_file.is_file() and not (config.output_dir / "language").exists():
        record: dict[str, Any] = json.loads(record_file.read_text())
    elif config.output_dir.exists():
        raise FileExistsError(f"{config.output_dir} exists; choose another --output_dir or remove it")
    else:
        torch.manual_seed(config.seed)
        vision, scores = pretrain_vision(config)
        vision.half().save_pretrained(vision_dir)
        record = {
            "vision_accuracy": {name: round(value, 4) for name, value in scores.items()},
            "minutes": {"vision": minutes_since(started)},
        }
        record_file.write_text(json.dumps(record, indent=2) + "\n")
    started = time.perf_counter()
    torch.manual_seed(config.seed + 1)
    # The language model learns from the tower as it is stored.
    vision = VisionEncoder.from_pretrained(vision_dir)
    backbone = Backbone(vision, build_language(config), build_tokenizer(), name="tiny-clip-t5")
    pretrain_language(config, backbone)
    backbone.half().save_pretrained(config.output_dir)
    record["minutes"]["language"] = minutes_since(started)
    record["config"] = asdict(config) | {"output_dir": config.output_dir.name}
    return record


def minutes_since(started: float) -> float:
    """Minutes since a reading of `time.perf_counter`."""
    return round((time.perf_counter() - started) / 60, 1)


def measure(config: PretrainConfig) -> dict[str, float]:
    """Scores of the stored backbone on scenes that it never saw."""
    backbone = Backbone.from_pretrained(config.output_dir)
    rng = Random(config.seed + 2)
    scenes = [sample_scene(rng) for _ in range(config.evaluation_scenes)]
    return evaluate(PromptedModel(backbone), scenes, encode_scenes(backbone, scenes))


def pretrain_vision(config: PretrainConfig) -> tuple[VisionEncoder, dict[str, float]]:
    """Train the tower to name what has its centre in each cell, and the cell's own place."""
    rng = Random(config.seed)
    tower = TimmWrapperModel(
        TimmWrapperConfig(
            architecture=VISION_ARCHITECTURE,
            model_args=VISION_ARGS,
            do_pooling=False,
            num_labels=0,
            pretrained_cfg=PIXELS,
        )
    )
    sizes = [len(classes) for classes in CELL_CLASSES.values()]
    heads = nn.Linear(VISION_ARGS["channels"][-1], sum(sizes) + GRID**2)
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.vision_lr, weight_decay=0.05)
    schedule = get_cosine_schedule_with_warmup(optimizer, config.vision_steps // 10, config.vision_steps)
    # Most cells are empty.
    shape_weights = torch.tensor([1.0] * len(SHAPES) + [0.3])
    places = torch.arange(GRID**2)

    def logits(pixels: Tensor) -> list[Tensor]:
        tokens = tower(pixel_values=pixels).last_hidden_state.flatten(2).transpose(1, 2)
        return list(heads(tokens).split([*sizes, GRID**2], dim=-1))

    for step in range(config.vision_steps):
        pixels, targets = cells([sample_scene(rng) for _ in range(config.vision_batch)])
        *named, placed = logits(pixels)
        loss = nn.functional.cross_entropy(placed.flatten(0, 1), places.repeat(len(pixels)))
        for scores, target, weight in zip(named, targets.unbind(1), [shape_weights, None, None], strict=True):
            loss = loss + nn.functional.cross_entropy(
                scores.flatten(0, 1), target.flatten(), weight=weight, ignore_index=IGNORE_INDEX
            )
        take_step(loss, parameters, optimizer, schedule)
        if step % 250 == 0:
            print(f"vision {step}/{config.vision_steps} loss {loss.item():.3f}", flush=True)

    tower.eval()
    pixels, targets = cells([sample_scene(rng) for _ in range(config.evaluation_scenes)])
    with torch.no_grad():
        *named, _ = logits(pixels)
    filled = targets[:, 1] != IGNORE_INDEX
    scores = {
        attribute: (scores.argmax(-1) == target)[filled].float().mean().item()
        for attribute, scores, target in zip(CELL_CLASSES, named, targets.unbind(1), strict=True)
    }
    print(f"vision accuracy on fresh scenes: {scores}", flush=True)
    processor = TimmWrapperImageProcessor(pretrained_cfg=PIXELS, architecture=VISION_ARCHITECTURE)
    return VisionEncoder(tower, processor), scores


def cells(scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    """Pixels in -1..1 and, for each attribute and cell, the class of the object centred there."""
    pixels = torch.from_numpy(np.stack([np.asarray(render(scene)) for scene in scenes]))
    targets = torch.full((len(scenes), len(CELL_CLASSES), GRID**2), IGNORE_INDEX)
    targets[:, 0] = len(SHAPES)
    for row, scene in enumerate(scenes):
        for item in scene.objects:
            cell = item.cell[0] * GRID + item.cell[1]
            for column, (attribute, classes) in enumerate(CELL_CLASSES.items()):
                targets[row, column, cell] = classes.index(getattr(item, attribute))
    return pixels.permute(0, 3, 1, 2) / 127.5 - 1, targets


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A lower-casing BPE that keeps every word of the scenes' language whole and spells out others."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()]
    )
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        min_frequency=2,
        special_tokens=["<pad>", "</s>", "<unk>"],
        initial_alphabet=["▁", *(chr(code) for code in range(33, 127))],
        show_progress=False,
    )
    rng = Random(0)
    scenes = [sample_scene(rng) for _ in range(3000)]
    texts = [part for scene in scenes for part in (*ask(scene, rng), *caption(scene, rng))]
    texts += [part for pair in pairwise(scenes) for part in ask_pair(*pair, rng)]
    texts += [part for _ in range(3000) for part in ask_text(rng)]
    wordings = [w for group in PHRASINGS.values() for w in group]
    wordings += [w for _, group in KEPT_OUT.values() for w in group]
    texts += [w.replace("{}", "") for w in [*wordings, *CAPTION_PHRASINGS, *PAIR_PHRASINGS]] * 2
    texts += ["vqa: gqa: nlvr: caption:", " ".join(WORDS)] * 2
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def build_language(config: PretrainConfig) -> T5ForConditionalGeneration:
    """A small T5 with random weights."""
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=math.ceil(len(build_tokenizer()) / 8) * 8,
            d_model=config.d_model,
            d_kv=config.d_model // 4,
            d_ff=2 * config.d_model,
            num_heads=4,
            num_layers=config.encoder_layers,
            num_decoder_layers=config.decoder_layers,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
    )


@dataclass(frozen=True)
class Sample:
    """Text, target and the rows of the scenes that they are about."""

    qa: QA
    rows: tuple[int, ...]


def draw_batches(
    scenes: list[Scene], rng: Random, size: int, families: Sequence[str] = tuple(FAMILIES)
) -> Iterator[list[Sample]]:
    """Batches of one kind each, without end, so that long targets keep to themselves."""
    rows = range(len(scenes))
    while True:
        kind = rng.choices(["questions", "captions", "pairs", "text"], [74, 8, 12, 6])[0]
        if kind == "questions":
            yield [
                Sample(with_prefix(ask(scenes[row], rng, families), rng), (row,))
                for row in rng.choices(rows, k=size)
            ]
        elif kind == "captions":
            yield [Sample(caption(scenes[row], rng), (row,)) for row in rng.choices(rows, k=size // 3)]
        elif kind == "pairs":
            chosen = [(rng.choice(rows), rng.choice(rows)) for _ in range(size // 2)]
            yield [Sample(ask_pair(*(scenes[row] for row in pair), rng), pair) for pair in chosen]
        else:
            yield [Sample(ask_text(rng), ()) for _ in range(size)]


def with_prefix(qa: QA, rng: Random) -> QA:
    """Half of the questions carry a task prefix, as the tasks' own source texts do."""
    prefix = rng.choices(["", "vqa: ", "gqa: "], [5, 4, 1])[0]
    return QA(prefix + qa.source_text, qa.target_text)


def pretrain_language(config: PretrainConfig, backbone: Backbone) -> None:
    """Train language model and visual projection on cached features."""
    rng = Random(config.seed + 1)
    scenes = [sample_scene(rng) for _ in range(config.scenes + config.evaluation_scenes)]
    features = encode_scenes(backbone, scenes)
    scenes, watched = scenes[: config.scenes], scenes[config.scenes :][:WATCHED_SCENES]
    model = PromptedModel(backbone)
    backbone.freeze(language=False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = Adafactor(parameters, lr=config.language_lr, scale_parameter=True, relative_step=False)
    schedule = get_cosine_schedule_with_warmup(optimizer, config.language_steps // 30, config.language_steps)
    first = draw_batches(scenes, rng, config.language_batch, AFFIRMATIVE)
    later = draw_batches(scenes, rng, config.language_batch)
    started = time.perf_counter()
    for step in range(config.language_steps):
        batch = next(first if step < config.affirmative_share * config.language_steps else later)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
            loss = model(**tensors(backbone, batch, features)).loss
        take_step(loss, parameters, optimizer, schedule)
        if step % 250 == 0:
            seconds = time.perf_counter() - started
            print(
                f"language {step}/{config.language_steps} loss {loss.item():.3f} {seconds:.0f}s", flush=True
            )
        if step % 1000 == 999:
            print(evaluate(model, watched, features[config.scenes :]), flush=True)


def take_step(
    loss: Tensor,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    """One clipped step."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    schedule.step()


@torch.no_grad()
def encode_scenes(backbone: Backbone, scenes: list[Scene], batch: int = 500) -> Tensor:
    """Visual features of every scene, (scenes, 1, tokens, d_vision), in half precision."""
    assert backbone.vision is not None
    parts = [
        backbone.vision(cells(scenes[start : start + batch])[0]).half()
        for start in range(0, len(scenes), batch)
    ]
    return torch.cat(parts)[:, None]


def tensors(backbone: Backbone, batch: list[Sample], features: Tensor) -> dict[str, Tensor | None]:
    """The model's arguments for a batch."""
    source = backbone.tokenizer([s.qa.source_text for s in batch], padding=True, return_tensors="pt")
    target = backbone.tokenizer([s.qa.target_text for s in batch], padding=True, return_tensors="pt")
    labels = target.input_ids.masked_fill(target.attention_mask == 0, IGNORE_INDEX)
    rows = torch.tensor([s.rows for s in batch])
    visual = features[rows].flatten(1, 2).float() if rows.numel() else None
    return {
        "input_ids": source.input_ids,
        "attention_mask": source.attention_mask,
        "labels": labels,
        "visual_features": visual,
    }


def evaluate(model: PromptedModel, scenes: list[Scene], features: Tensor) -> dict[str, float]:
    """Share answered exactly, by family: as pretraining asks, and what it never asks."""
    rng = Random(0)
    samples: dict[str, list[Sample]] = {}
    rows = range(len(scenes))
    for row in rows:
        for family, (function, _) in FAMILIES.items():
            fact = function(scenes[row], rng)
            if fact is not None:
                text = rng.choice(PHRASINGS[family]).format(*fact.slots)
                samples.setdefault(family, []).append(Sample(QA(text, fact.answer), (row,)))
        for family, (function, wordings) in KEPT_OUT.items():
            fact = function(scenes[row], rng)
            if fact is not None:
                qa = QA(rng.choice(wordings).format(*fact.slots), fact.answer)
                samples.setdefault(f"kept out: {family}", []).append(Sample(with_prefix(qa, rng), (row,)))
        samples.setdefault("caption", []).append(Sample(caption(scenes[row], rng), (row,)))
        pair = (row, rng.choice(rows))
        samples.setdefault("pair", []).append(Sample(ask_pair(*(scenes[r] for r in pair), rng), pair))
        samples.setdefault("text", []).append(Sample(ask_text(rng), ()))
    model.eval()
    scores = {family: round(exact_match(model, group, features), 4) for family, group in samples.items()}
    model.train()
    return scores


def exact_match(model: PromptedModel, samples: list[Sample], features: Tensor) -> float:
    """Share of samples whose greedy answer equals the target."""
    right = 0
    for start in range(0, len(samples), 256):
        batch = samples[start : start + 256]
        arguments = tensors(model.backbone, batch, features)
        del arguments["labels"]
        tokens = model.generate(**arguments, max_new_tokens=48)
        answers = model.backbone.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        right += sum(a == s.qa.target_text for a, s in zip(answers, batch, strict=True))
    return right / len(samples)


if __name__ == "__main__":
    entry(lambda arguments: main(parse_options(PretrainConfig, arguments, "pretrain_tiny.py", __doc__)))
