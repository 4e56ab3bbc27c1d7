"""Training of the tokenizer and the language model, on cached features of a frozen tower."""

import copy
import math
import multiprocessing
import time
from itertools import pairwise
from random import Random

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    Adafactor,
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from dept_vl.models.backbone import Backbone
from dept_vl.models.prompted import IGNORE_INDEX, PromptedModel, sequence_loss
from pretraining.batches import CELL_CLASSES, MOST, DrawnBatches, loader
from pretraining.measure import encode_scenes, evaluate, tensors
from pretraining.options import PretrainConfig
from pretraining.questions import (
    AFFIRMATIVE,
    CAPTION_PHRASINGS,
    PAIR_PHRASINGS,
    PHRASINGS,
    WORDS,
    ask,
    ask_pair,
    ask_text,
    caption,
)
from study_data.questions import KEPT_OUT
from study_data.render import Scene, sample_scene

EVALUATE_EVERY = 700
WATCHED_SCENES = 100
"""Number of scenes for evaluations during training."""
WARMUP_STEPS = 200
"""Warm-up steps of the language model."""
FITTED_SCENES = 1000
"""Number of scenes used to fit a projection to another tower."""
HEADS = [1 + MOST, *(len(classes) for classes in CELL_CLASSES.values()), 2, 2, 3]
"""Outputs predicted at the end of a phrase: number of objects that fit it; attribute classes if it is one;
for a comparison, which phrase it is and whether it lies further in that direction; centre, and how far."""
FORK = multiprocessing.get_context("fork")
UNFINISHED = "unfinished"
"""Folder with the backbone at the last evaluation, while it is trained."""
PHRASE_WEIGHT, COMPARISON_WEIGHT = 0.5, 1.0
"""Loss weights of the predictions about phrases and comparisons, relative to the answers."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train a lower-casing BPE tokenizer that keeps every word of the scenes' texts whole."""
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
    """Return a small T5 or BART with random weights."""
    vocabulary = math.ceil(len(build_tokenizer()) / 8) * 8
    if config.language == "bart":
        bart = BartForConditionalGeneration(
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
                activation_function="relu",
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
        for part in (bart.model.encoder, bart.model.decoder):
            # As large as the scaled words: BART's defaults are 16 times smaller, and word order is lost.
            part.embed_positions.weight.data.copy_(waves(*part.embed_positions.weight.shape))
        return bart
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


def waves(positions: int, width: int) -> Tensor:
    """Return sines and cosines with wavelengths from 6 to 600 positions, as initial position embeddings."""
    angles = torch.arange(positions)[:, None] * 0.01 ** torch.linspace(0, 1, width // 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


@torch.no_grad()
def fit_projection(backbone: Backbone, earlier: Backbone, config: PretrainConfig) -> None:
    """Fit a projection on a new tower to produce the visual tokens of an earlier one on its own tower."""
    new, old = backbone.visual_projection, earlier.visual_projection
    assert new is not None
    assert old is not None
    new.load_state_dict(old.state_dict(), strict=False)  # it may have no position vectors
    rng = Random(config.seed + 4)
    scenes = [sample_scene(rng) for _ in range(FITTED_SCENES)]
    found, wanted = (
        encode_scenes(b, scenes, config.num_workers).float().flatten(0, 2) for b in (backbone, earlier)
    )
    if torch.equal(found, wanted):
        return
    ones = torch.ones(len(found), 1)
    solution = torch.linalg.lstsq(torch.cat([found, ones], 1), old.linear(wanted)).solution
    new.linear.weight.copy_(solution[:-1].T)
    new.linear.bias.copy_(solution[-1])


class Course:
    """State that the processes of a language stage share: weights, gradients and progress."""

    def __init__(
        self,
        config: PretrainConfig,
        model: PromptedModel,
        heads: nn.Linear,
        scenes: list[Scene],
        features: Tensor,
    ) -> None:
        self.config, self.model, self.heads, self.features = config, model, heads, features
        self.scenes, self.watched = scenes[: config.scenes], scenes[config.scenes :][:WATCHED_SCENES]
        self.parameters = [*(p for p in model.parameters() if p.requires_grad), *heads.parameters()]
        self.steps, self.done = FORK.Value("i", 0), FORK.Value("d", 0.0)
        self.meeting = FORK.Barrier(config.processes)
        self.gradients = torch.empty(0)
        if config.processes > 1:
            model.share_memory()
            heads.share_memory()
            size = sum(p.numel() for p in self.parameters)
            self.gradients = torch.zeros(config.processes, size).share_memory_()

    def average(self, place: int) -> None:
        """Give the first process the mean of the gradients of all processes."""
        if not len(self.gradients):
            return
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        torch.cat([part.flatten() for part in own], out=self.gradients[place])
        self.meeting.wait()
        if place == 0:
            parts = self.gradients.mean(0).split([p.numel() for p in self.parameters])
            for parameter, part in zip(self.parameters, parts, strict=True):
                parameter.grad = part.view_as(parameter)


def pretrain_language(config: PretrainConfig, backbone: Backbone) -> int:
    """Train language model and visual projection on cached features; return the number of steps."""
    rng = Random(config.seed + 1)
    scenes = [sample_scene(rng) for _ in range(config.scenes + config.evaluation_scenes)]
    features = encode_scenes(backbone, scenes, config.num_workers)
    backbone.freeze(language=False)
    heads = nn.Linear(backbone.d_model, sum(HEADS)).to(config.device)
    course = Course(config, PromptedModel(backbone), heads, scenes, features)
    others = [
        FORK.Process(target=teach, args=(course, place), daemon=True) for place in range(1, config.processes)
    ]
    for process in others:
        process.start()
    teach(course, 0)
    return course.steps.value


def teach(course: Course, place: int) -> None:
    """Train on batches until the end; the first process takes the optimizer steps for all."""
    config = course.config
    optimizer = Adafactor(course.parameters, lr=config.language_lr, scale_parameter=True, relative_step=False)
    asked = (course.scenes, course.model.backbone.tokenizer, config.seed + 1 + 1000 * place)
    size = config.language_batch // config.processes
    first = DrawnBatches(*asked, size, AFFIRMATIVE)
    later = DrawnBatches(*asked, size, spatial_share=config.spatial_share, spatial=config.spatial)
    batches, alone = iter(loader(first, config.num_workers)), True
    started = time.perf_counter()
    while course.done.value < 1:
        if alone and course.done.value >= config.affirmative_share:
            batches, alone = iter(loader(later, config.num_workers)), False
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16 and config.device.type == "cpu"):
            loss = loss_of(course.model, course.heads, next(batches), course.features)
        loss.backward()
        course.average(place)
        if place == 0:
            lead(course, optimizer, loss.item(), time.perf_counter() - started)
        course.meeting.wait()


def lead(course: Course, optimizer: Adafactor, loss: float, seconds: float) -> None:
    """Take an optimizer step, and print the progress."""
    config, step = course.config, course.steps.value
    for group in optimizer.param_groups:
        group["lr"] = config.language_lr * rate(step, course.done.value)
    nn.utils.clip_grad_norm_(course.parameters, 1.0)
    optimizer.step()
    step += 1
    if step % 100 == 1:
        print(f"language {step} ({course.done.value:.0%}) loss {loss:.3f} {seconds:.0f}s", flush=True)
    if step % EVALUATE_EVERY == 0:
        backbone = course.model.backbone
        print(evaluate(course.model, course.watched, course.features[config.scenes :]), flush=True)
        copy.deepcopy(backbone).cpu().half().save_pretrained(config.output_dir / UNFINISHED)
    course.steps.value = step
    by_clock = seconds / (60 * config.language_minutes) if config.language_minutes else 0.0
    course.done.value = by_clock or step / config.language_steps


def loss_of(model: PromptedModel, heads: nn.Linear, batch: dict[str, np.ndarray], features: Tensor) -> Tensor:
    """Return the loss of the answers plus that of predictions about phrases from the encoder's states.

    The second loss teaches in hundreds of steps what the answers alone teach in thousands.
    """
    arguments = tensors(batch, features)
    ends, classes, places = (arguments.pop(name) for name in ("ends", "classes", "places"))
    labels = arguments.pop("labels")
    encoded_source, mask = model.encode(**arguments)
    loss = sequence_loss(model.backbone.language_model.logits(encoded_source, mask, labels), labels)
    if not len(ends):
        return loss
    # The text is padded on the right and comes first.
    states = encoded_source.last_hidden_state[ends[:, 0], ends[:, 1]]
    *named, found = heads(states.float()).float().split(HEADS, dim=-1)
    compared = ~places[:, -1].isnan()
    # Comparisons are rare, so they have a separate weight.
    weights = [PHRASE_WEIGHT / len(ends)] * (1 + len(CELL_CLASSES))
    weights += [COMPARISON_WEIGHT / max(1, int(compared.sum()))] * 2
    for scores, target, weight in zip(named, classes.unbind(1), weights, strict=True):
        wrong = nn.functional.cross_entropy(scores, target, ignore_index=IGNORE_INDEX, reduction="sum")
        loss = loss + weight * wrong
    for column, weight in ((slice(2), weights[0]), (slice(2, 3), weights[-1])):
        known = ~places[:, column].isnan()
        off = nn.functional.smooth_l1_loss(
            found[:, column][known], places[:, column][known], beta=0.1, reduction="sum"
        )
        loss = loss + weight * off
    return loss


def rate(step: int, done: float) -> float:
    """Return the learning-rate factor: linear warm-up, times a cosine decay to zero."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
