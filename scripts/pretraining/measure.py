"""Evaluation of a small backbone on scenes."""

from random import Random

import numpy as np
import torch
from torch import Tensor

from dept_vl.models.backbone import Backbone
from dept_vl.models.prompted import PromptedModel
from pretraining.batches import Pixels, Sample, encoded, loader, on_device, with_prefix
from pretraining.options import PretrainConfig
from pretraining.questions import FAMILIES, PHRASINGS, ask_pair, ask_text, caption
from study_data.questions import KEPT_OUT, QA
from study_data.render import Scene, sample_scene

LONGEST_ANSWER = 48  # tokens


def measure(config: PretrainConfig) -> dict[str, float]:
    """Return the scores of the saved backbone on new scenes."""
    backbone = Backbone.from_pretrained(config.output_dir).to(config.device)
    rng = Random(config.seed + 2)
    scenes = [sample_scene(rng) for _ in range(config.evaluation_scenes)]
    features = encode_scenes(backbone, scenes, config.num_workers)
    return evaluate(PromptedModel(backbone), scenes, features)


@torch.no_grad()
def encode_scenes(backbone: Backbone, scenes: list[Scene], workers: int) -> Tensor:
    """Return visual features of every scene, (scenes, 1, tokens, d_vision), in half precision."""
    assert backbone.vision is not None
    device = backbone.device
    drawn = loader(Pixels(scenes), workers)
    return torch.cat([backbone.vision(on_device(part, device)[0]).half() for part in drawn])[:, None]


def tensors(batch: dict[str, np.ndarray], features: Tensor) -> dict[str, Tensor | None]:
    """Return the model's inputs for an encoded batch."""
    found = {name: torch.from_numpy(part).to(features.device) for name, part in batch.items()}
    rows = found.pop("rows")
    return found | {"visual_features": features[rows].flatten(1, 2).float() if rows.numel() else None}


def evaluate(model: PromptedModel, scenes: list[Scene], features: Tensor) -> dict[str, float]:
    """Return the exact match by family of questions, including families that pretraining leaves out."""
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
    """Return the share of samples whose greedy prediction equals the target."""
    right = 0
    for start in range(0, len(samples), 1024):
        batch = samples[start : start + 1024]
        arguments = tensors(encoded(model.backbone.tokenizer, batch), features)
        del arguments["labels"]
        tokens = model.generate(**arguments, max_new_tokens=LONGEST_ANSWER)
        answers = model.backbone.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        right += sum(a == s.qa.target_text for a, s in zip(answers, batch, strict=True))
    return right / len(samples)
