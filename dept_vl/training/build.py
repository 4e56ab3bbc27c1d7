"""Build the model of a configuration: backbone, prompt, and which parameters are trained."""

import os
from operator import attrgetter

import torch

from dept_vl.adapters.warm_start import inherit
from dept_vl.config import PromptOptions, RunConfig
from dept_vl.models.base import FrozenBackbone
from dept_vl.models.pretrained_vlm import open_backbone
from dept_vl.models.prompted import PromptedModel
from dept_vl.prompts.base import METHODS, sized
from dept_vl.prompts.dept import DePT
from dept_vl.prompts.initialise import initialise
from dept_vl.prompts.methods import build
from dept_vl.tasks import TASKS
from dept_vl.tasks.base import Task
from dept_vl.training.optim import relative_size

GROUPS = attrgetter("data", "prompt", "train", "backbone", "optim")
"""The options of a run whose effect depends on others."""
OF_IMAGES = ("visual_offset", "image_fit", "features", "feature_memory", "on_bad_image")
"""Options that have no effect without images."""


def build_model(config: RunConfig) -> PromptedModel:
    """Build the backbone with its prompt (if it has any parameters), and unfreeze the trained parameters."""
    options = config.backbone
    if options.train_only != "all" and not options.train_backbone:
        raise ValueError(
            f"--train_only {options.train_only} says what --train_backbone trains; give both, or neither"
        )
    backbone = open_backbone(**options.loading())
    if options.train_backbone and options.train_only == "lora":
        backbone.add_lora(options.lora_rank)
    backbone.freeze(
        language=not options.train_backbone,
        visual_projection=not options.train_projection,
        but=options.train_only,
    )
    size = relative_size(backbone) if config.optim.rates == "relative" else 1.0
    prompt = build_prompt(config.prompt, backbone, config.train.seed, size)
    model = PromptedModel(backbone, prompt, backbone_dropout=options.backbone_dropout)
    if config.prompt.init_from:
        inherit(model, config.prompt.init_from, config.prompt.init_parts)
    return model


def budget_line(options: PromptOptions, prompt: DePT) -> str:
    """Describe the prompt's sizes and how many parameters of its budget are left or exceeded."""
    budget = options.reference_prompt_length * prompt.d_model
    sizes = prompt.describe()
    remainder = budget - sum(parameter.numel() for parameter in prompt.parameters())
    spent = f"{remainder:,} left over" if remainder >= 0 else f"warning: {-remainder:,} over it"
    ignored = options.prompt_length not in (PromptOptions.prompt_length, prompt.prompt_length)
    unused = f"; prompt_length={options.prompt_length} is not used by {options.method}" if ignored else ""
    return (
        f"prompt: {sizes['method']}, m={prompt.prompt_length}, r={sizes['rank']}; of the {budget:,} "
        f"parameters of a {options.reference_prompt_length}-vector prompt {spent}{unused}"
    )


def build_prompt(
    options: PromptOptions, backbone: FrozenBackbone, seed: int, size: float = 1.0
) -> DePT | None:
    """Build and initialise the prompt; return None if its length and rank are both 0.

    `size` is the size of the word embeddings, see `relative_size`. It scales random initial values.
    """
    widths = {"d_model": backbone.d_model, "max_source_length": options.max_source_length + backbone.frame}
    prompt_length, rank = METHODS[options.method].solve(
        reference_prompt_length=options.reference_prompt_length,
        prompt_length=options.prompt_length,
        rank=options.rank,
        visual_offset=options.visual_offset,
        **widths,
    )
    if prompt_length == 0 and rank == 0:
        return None
    sizes = widths | {"prompt_length": prompt_length, "rank": rank, "visual_offset": options.visual_offset}
    prompt = build(sized(options.method, **sizes, alpha=options.alpha, seed=seed))
    if size != 1.0:
        prompt.resize(size)
    initialise(
        prompt,
        options.prompt_init,
        lambda ids: backbone.embed(ids[None])[0],
        vocabulary_size=len(backbone.tokenizer),
        special_tokens=backbone.tokenizer.all_special_ids,
        generator=torch.Generator().manual_seed(seed),
        tokenizer=backbone.tokenizer,
        text=options.init_text,
    )
    return prompt


def without_effect(config: RunConfig) -> list[str]:
    """Return a note for each option that is set but has no effect beside the other options."""
    data, prompt, train, backbone, optim = GROUPS(config)
    given, usual = (
        {name: value for part in GROUPS(one) for name, value in vars(part).items()}
        for one in (config, RunConfig())
    )
    dev_split = data.splits()[1]
    shots = data.shots or data.shots_file
    on_shots = "--shots_dev is shots" if shots and data.shots_dev == "shots" else ""
    no_prompt = "" if "prompt" in METHODS[prompt.method].groups() else f"{prompt.method} has no prompt"
    read = any(TASKS[one.task].image_count for one in (data, *config.also))
    no_images = "" if read else f"{data.task} has no images"
    reasons = {
        **dict.fromkeys(OF_IMAGES, no_images),
        "dev_split": on_shots,
        "holdout_images": on_shots or (f"the dev split is {dev_split}" if dev_split else ""),
        "shots_seed": "" if data.shots else "no --shots are drawn",
        "shots_per": "" if data.shots else "no --shots are drawn",
        "shots_dev": "" if shots else "there are no --shots and no --shots_file",
        "features_dir": no_images or ("--features is live" if data.features == "live" else ""),
        "init_parts": "" if prompt.init_from else "there is no --init_from",
        "prompt_init": no_prompt,
        "prompt_lr": no_prompt,
        "projection_lr": "" if backbone.train_projection else "the projection is not trained",
        "backbone_lr": "" if backbone.train_backbone else "the backbone is not trained",
        "lora_rank": "" if backbone.train_only == "lora" else "no LoRA is trained",
        "max_steps": "--num_epochs is given" if train.num_epochs else "",
        "warmup_steps": "--warmup_ratio is given" if optim.warmup_ratio else "",
        "init_text": "" if prompt.prompt_init == "text" else "--prompt_init is not text",
    }
    found = [
        f"note: --{name} {given[name]} has no effect: {reason}"
        for name, reason in reasons.items()
        if reason and given[name] != usual[name]
    ]
    if train.pause_at > train.max_steps and not train.num_epochs:
        found.append(f"note: --pause_at {train.pause_at} has no effect: the run has {train.max_steps} steps")
    return found


def only_deterministic() -> None:
    """Make torch use deterministic algorithms only, and raise an error for operations that have none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def visual_tokens(model: PromptedModel, task: Task) -> int:
    """Return the number of visual tokens of an example."""
    vision = model.backbone.vision
    return 0 if vision is None else vision.token_count * len(task[0].images)
