"""Pretrain the small backbones that the project ships, from nothing.

    python scripts/pretrain_tiny.py --vision_only --output_dir runs/tower
    python scripts/pretrain_tiny.py --vision_from runs/tower --output_dir data/tiny-clip-t5
    python scripts/pretrain_tiny.py --vision_from runs/tower --language bart --output_dir data/tiny-clip-bart

First the vision tower, supervised cell by cell on rendered scenes; then, with the tower frozen and
its features cached, a T5 or BART on questions, captions, statements about pairs and text alone. All parts
are stock classes saved in the standard layout, so the result loads like any other backbone.
"""

import copy
import json
import math
import shutil
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any, Literal

import jinja2
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
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    TimmWrapperConfig,
    TimmWrapperModel,
    get_cosine_schedule_with_warmup,
)
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

from dept_vl._utils.options import Options, Positive, Rate, Seed, Workers, to_json
from dept_vl.cli import entry, parse_options
from dept_vl.models.backbone import Backbone
from dept_vl.models.options import ObjectOrder
from dept_vl.models.prompted import IGNORE_INDEX, PromptedModel
from dept_vl.models.vision import VisionEncoder
from dept_vl.tasks.scenes.batches import (
    CELL_CLASSES,
    DrawnBatches,
    DrawnCells,
    Pixels,
    Sample,
    cells,
    encoded,
    loader,
    on_device,
    with_prefix,
)
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
    GRID,
    IMAGE_SIZE,
    SHAPES,
    Scene,
    sample_scene,
)
from dept_vl.tasks.scenes.texts import WORDS, ask_text


@dataclass(frozen=True)
class PretrainConfig(Options):
    """How a small backbone is made."""

    output_dir: Path = Path("data/tiny-clip-t5")
    """Folder the backbone is written to, and its name; must not exist yet."""
    language: Literal["t5", "bart"] = "t5"
    """What the language model is."""
    object_order: ObjectOrder = "frozen"
    """Of the backbone that is written; frozen: the places are learnt here, and frozen from then on."""
    vision_only: bool = False
    """Make the vision tower alone, for backbones to start from."""
    vision_from: Path | None = None
    """Folder with a finished vision tower (--vision_only)."""
    evaluate_only: bool = False
    """Measure the backbone in output_dir again instead of making one."""
    seed: Seed = 0
    """Of scenes, questions and weights."""
    num_workers: Workers = 0
    """Processes that draw scenes and questions."""
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
    language_minutes: Rate = 0.0
    """Instead take as many steps as this time is enough for, by the speed of the first; 0 takes the steps."""
    language_batch: Positive = 64
    """Questions per step (fewer captions and pairs, which are longer)."""
    language_lr: Rate = 1e-2
    """Peak rate of language model and visual projection, relative to each tensor's own scale
    (Adafactor): AdamW stayed on the first plateau for far longer."""
    spatial_share: Rate = 0.5
    """Share of the questions that are about places and comparisons of them."""
    affirmative_share: Rate = 0.15
    """Share of the steps, at the start, without negated and comparing questions. Yes and no mean the
    opposite in the two, and learning both at once from nothing stays at chance for long."""
    bf16: bool = True
    """Train the language model under bfloat16 autocast on a CPU; 1.5 times as fast where it has that."""
    d_model: Positive = 256
    """Width of the language model."""
    encoder_layers: Positive = 3
    """Layers of its encoder."""
    decoder_layers: Positive = 2
    """Layers of its decoder."""
    evaluation_scenes: Positive = 1500
    """Fresh scenes that the record's figures are measured on."""

    @property
    def device(self) -> torch.device:
        """A GPU if there is one."""
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


EVALUATE_EVERY = 2000
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
WARMUP_STEPS = 200
"""Of the language model; then its speed is known."""
UNFINISHED = "unfinished"
"""Folder with the backbone as it was at the last evaluation, while it is trained."""
CARD = "README.md"
OFFSET_WEIGHT = 5.0
"""Of the error of the offset in a cell, in cells."""


def main(config: PretrainConfig) -> None:
    """Make the backbone, then measure what was written, and write its card."""
    torch.set_float32_matmul_precision("high")
    record_file = config.output_dir / RECORD_FILE
    record = json.loads(record_file.read_text()) if config.evaluate_only else pretrain(config)
    if not config.vision_only:
        record["exact_match"] = measure(config)
        record_file.write_text(json.dumps(record, indent=2) + "\n")
        write_card(config.output_dir, record)
    print(json.dumps(record, indent=2))


def write_card(folder: Path, record: dict[str, Any]) -> None:
    """Write what the backbone is, how it was made and what it scores."""
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
    card = template.render(
        name=folder.name,
        language=type(backbone.language).__name__,
        tower=type(backbone.vision.model).__name__ if backbone.vision else "",
        sizes=sizes,
        families=families,
        backbone=backbone,
        **record,
    )
    (folder / CARD).write_text(card.rstrip() + "\n")


def pretrain(config: PretrainConfig) -> dict[str, Any]:
    """Both stages, the weights stored in half precision; a finished first stage is kept.

    Returns:
        What to keep on record.
    """
    record = tower_of(config)
    if config.vision_only:
        return record
    started = time.perf_counter()
    torch.manual_seed(config.seed + 1)
    # The language model learns from the tower as it is stored.
    vision = VisionEncoder.from_pretrained(config.output_dir / "vision")
    # While the language model learns, so do the places.
    order: ObjectOrder = "none" if config.object_order == "none" else "trained"
    backbone = Backbone(
        vision, build_language(config), build_tokenizer(), name=config.output_dir.name, object_order=order
    )
    places = backbone.visual_projection.object_order if backbone.visual_projection else None
    if isinstance(places, nn.Embedding):
        nn.init.normal_(places.weight)
    steps = pretrain_language(config, backbone.to(config.device))
    backbone.object_order = config.object_order
    backbone.cpu().half().save_pretrained(config.output_dir)
    shutil.rmtree(config.output_dir / UNFINISHED, ignore_errors=True)
    record["minutes"]["language"] = minutes_since(started)
    taken = {"language_steps": steps, "language_minutes": 0.0, "output_dir": config.output_dir.name}
    record["config"] = to_json(config) | taken | {"vision_from": None}
    record["device"] = device_name(config)
    return record


def tower_of(config: PretrainConfig) -> dict[str, Any]:
    """Make the vision tower, or take a finished one; return what to keep on record of it."""
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
    """What it was trained on, for the card."""
    if config.device.type == "cpu":
        return f"a CPU ({torch.get_num_threads()} threads)"
    return f"an {torch.cuda.get_device_name()}" if config.device.type == "cuda" else config.device.type


def minutes_since(started: float) -> float:
    """Minutes since a reading of `time.perf_counter`."""
    return round((time.perf_counter() - started) / 60, 1)


def measure(config: PretrainConfig) -> dict[str, float]:
    """Scores of the stored backbone on scenes that it never saw."""
    backbone = Backbone.from_pretrained(config.output_dir).to(config.device)
    rng = Random(config.seed + 2)
    scenes = [sample_scene(rng) for _ in range(config.evaluation_scenes)]
    features = encode_scenes(backbone, scenes, config.num_workers)
    return evaluate(PromptedModel(backbone), scenes, features)


def pretrain_vision(config: PretrainConfig) -> tuple[VisionEncoder, dict[str, float]]:
    """Train the tower to name what has its centre in each cell and where in it, and the cell's own place."""
    device = config.device
    tower = TimmWrapperModel(
        TimmWrapperConfig(
            architecture=VISION_ARCHITECTURE,
            model_args=VISION_ARGS,
            do_pooling=False,
            num_labels=0,
            pretrained_cfg=PIXELS,
        )
    ).to(device)
    sizes = [len(classes) for classes in CELL_CLASSES.values()]
    heads = nn.Linear(VISION_ARGS["channels"][-1], sum(sizes) + GRID**2 + 2).to(device)
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.vision_lr, weight_decay=0.05)
    schedule = get_cosine_schedule_with_warmup(optimizer, config.vision_steps // 10, config.vision_steps)
    # Most cells are empty.
    shape_weights = torch.tensor([1.0] * len(SHAPES) + [0.3], device=device)
    places = torch.arange(GRID**2, device=device)

    def logits(pixels: Tensor) -> list[Tensor]:
        tokens = tower(pixel_values=pixels).last_hidden_state.flatten(2).transpose(1, 2)
        return list(heads(tokens).split([*sizes, GRID**2, 2], dim=-1))

    drawn = iter(loader(DrawnCells(config.seed, config.vision_batch), config.num_workers))
    started = time.perf_counter()
    for step in range(config.vision_steps):
        pixels, targets, offsets = on_device(next(drawn), device)
        *named, placed, found = logits(pixels)
        loss = nn.functional.cross_entropy(placed.flatten(0, 1), places.repeat(len(pixels)))
        filled = targets[:, 1] != IGNORE_INDEX
        # The offset in the cell, without which a third of the image or a comparison cannot be told.
        loss = loss + OFFSET_WEIGHT * nn.functional.smooth_l1_loss(found[filled], offsets[filled], beta=0.1)
        for scores, target, weight in zip(named, targets.unbind(1), [shape_weights, None, None], strict=True):
            loss = loss + nn.functional.cross_entropy(
                scores.flatten(0, 1), target.flatten(), weight=weight, ignore_index=IGNORE_INDEX
            )
        take_step(loss, parameters, optimizer)
        schedule.step()
        if step % 250 == 0:
            seconds = time.perf_counter() - started
            print(f"vision {step}/{config.vision_steps} loss {loss.item():.3f} {seconds:.0f}s", flush=True)

    tower.eval()
    rng = Random(config.seed + 3)
    fresh = [sample_scene(rng) for _ in range(config.evaluation_scenes)]
    pixels, targets, offsets = on_device(cells(fresh), device)
    with torch.no_grad():
        *named, _, found = logits(pixels)
    filled = targets[:, 1] != IGNORE_INDEX
    scores = {
        attribute: (scores.argmax(-1) == target)[filled].float().mean().item()
        for attribute, scores, target in zip(CELL_CLASSES, named, targets.unbind(1), strict=True)
    }
    scores["pixels off"] = (found - offsets)[filled].abs().mean().item() * IMAGE_SIZE / GRID
    print(f"vision accuracy on fresh scenes: {scores}", flush=True)
    processor = TimmWrapperImageProcessor(pretrained_cfg=PIXELS, architecture=VISION_ARCHITECTURE)
    return VisionEncoder(tower.cpu(), processor), scores


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


def build_language(config: PretrainConfig) -> PreTrainedModel:
    """A small T5 or BART with random weights."""
    vocabulary = math.ceil(len(build_tokenizer()) / 8) * 8
    if config.language == "bart":
        return BartForConditionalGeneration(
            BartConfig(
                vocab_size=vocabulary,
                d_model=config.d_model,
                max_position_embeddings=256,
                encoder_layers=config.encoder_layers,
                decoder_layers=config.decoder_layers,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=2 * config.d_model,
                decoder_ffn_dim=2 * config.d_model,
                dropout=0.0,
                # As large as T5's are when new; steps are relative to a tensor's own scale.
                init_std=config.d_model**-0.5,
                scale_embedding=True,
                pad_token_id=0,
                bos_token_id=0,
                eos_token_id=1,
                decoder_start_token_id=0,
                forced_eos_token_id=None,
            )
        )
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=vocabulary,
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


def pretrain_language(config: PretrainConfig, backbone: Backbone) -> int:
    """Train language model and visual projection on cached features; return how many steps were taken."""
    rng = Random(config.seed + 1)
    scenes = [sample_scene(rng) for _ in range(config.scenes + config.evaluation_scenes)]
    features = encode_scenes(backbone, scenes, config.num_workers)
    scenes, watched = scenes[: config.scenes], scenes[config.scenes :][:WATCHED_SCENES]
    model = PromptedModel(backbone)
    backbone.freeze(language=False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = Adafactor(parameters, lr=config.language_lr, scale_parameter=True, relative_step=False)
    asked = (scenes, backbone.tokenizer, config.seed + 1, config.language_batch)
    first = DrawnBatches(*asked, AFFIRMATIVE)
    later = DrawnBatches(*asked, spatial_share=config.spatial_share)
    batches, alone = iter(loader(first, config.num_workers)), True
    started, steps, step = time.perf_counter(), config.language_steps, 0
    while step < steps:
        if alone and step >= config.affirmative_share * steps:
            batches, alone = iter(loader(later, config.num_workers)), False
        arguments = tensors(next(batches), features)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16 and config.device.type == "cpu"):
            loss = model(**arguments).loss
        for group in optimizer.param_groups:
            group["lr"] = config.language_lr * rate(step, steps)
        take_step(loss, parameters, optimizer)
        step += 1
        seconds = time.perf_counter() - started
        if step == WARMUP_STEPS // 2:
            halfway = seconds
        if config.language_minutes and step == WARMUP_STEPS:
            per_step = (seconds - halfway) / (WARMUP_STEPS - WARMUP_STEPS // 2)
            steps = step + max(1, int((60 * config.language_minutes - seconds) / per_step))
        if step % 250 == 1:
            print(f"language {step}/{steps} loss {loss.item():.3f} {seconds:.0f}s", flush=True)
        if step % EVALUATE_EVERY == 0:
            print(evaluate(model, watched, features[config.scenes :]), flush=True)
            copy.deepcopy(backbone).cpu().half().save_pretrained(config.output_dir / UNFINISHED)
    return steps


def rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < WARMUP_STEPS < steps:
        return (step + 1) / WARMUP_STEPS
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def take_step(
    loss: Tensor,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> None:
    """One clipped step."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


@torch.no_grad()
def encode_scenes(backbone: Backbone, scenes: list[Scene], workers: int) -> Tensor:
    """Visual features of every scene, (scenes, 1, tokens, d_vision), in half precision."""
    assert backbone.vision is not None
    device = backbone.device
    drawn = loader(Pixels(scenes), workers)
    return torch.cat([backbone.vision(on_device(part, device)[0]).half() for part in drawn])[:, None]


def tensors(batch: dict[str, np.ndarray], features: Tensor) -> dict[str, Tensor | None]:
    """The model's arguments for an encoded batch."""
    found = {name: torch.from_numpy(part).to(features.device) for name, part in batch.items()}
    rows = found.pop("rows")
    return found | {"visual_features": features[rows].flatten(1, 2).float() if rows.numel() else None}


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
    for start in range(0, len(samples), 1024):
        batch = samples[start : start + 1024]
        arguments = tensors(encoded(model.backbone.tokenizer, batch), features)
        del arguments["labels"]
        tokens = model.generate(**arguments, max_new_tokens=48)
        answers = model.backbone.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        right += sum(a == s.qa.target_text for a, s in zip(answers, batch, strict=True))
    return right / len(samples)


if __name__ == "__main__":
    entry(lambda arguments: main(parse_options(PretrainConfig, arguments, "pretrain_tiny.py", __doc__)))
