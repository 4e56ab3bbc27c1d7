"""From a configuration to the model: backbone, prompt, and what is trained set free."""

import torch

from dept_vl.adapters.warm_start import inherit
from dept_vl.config import PromptOptions, RunConfig
from dept_vl.models.backbone import Backbone
from dept_vl.models.prompted import PromptedModel
from dept_vl.prompts import methods as family
from dept_vl.prompts.dept import COMMON_TOKENS, DePT, sample_vocabulary


def build_model(config: RunConfig) -> PromptedModel:
    """The backbone, with a prompt where one has any size, and what is trained set free."""
    options = config.backbone
    if options.train_only != "all" and not options.train_backbone:
        raise ValueError(
            f"--train_only {options.train_only} says what --train_backbone trains; give both, or neither"
        )
    backbone = Backbone.from_pretrained(**options.loading())
    if options.train_backbone and options.train_only == "lora":
        backbone.add_lora(options.lora_rank)
    backbone.freeze(
        language=not options.train_backbone,
        visual_projection=not options.train_projection,
        but=options.train_only,
    )
    prompt = build_prompt(config.prompt, backbone, config.train.seed)
    model = PromptedModel(backbone, prompt, backbone_dropout=options.backbone_dropout)
    if config.prompt.init_from:
        inherit(model, config.prompt.init_from, config.prompt.init_parts)
    return model


def budget_line(options: PromptOptions, prompt: DePT) -> str:
    """The prompt's sizes, and what of its budget is left over or overshot."""
    budget = options.reference_prompt_length * prompt.d_model
    sizes = family.describe(prompt)
    left = budget - sum(parameter.numel() for parameter in prompt.parameters())
    spent = f"{left:,} left over" if left >= 0 else f"warning: {-left:,} over it"
    return (
        f"prompt: {sizes['method']}, m={prompt.prompt_length}, r={sizes['rank']}; of the {budget:,} "
        f"parameters of a {options.reference_prompt_length}-vector prompt {spent}"
    )


def build_prompt(options: PromptOptions, backbone: Backbone, seed: int) -> DePT | None:
    """The prompt with its initial vectors; None if both its parts are of size zero."""
    prompt_length, rank = family.solve_sizes(
        options.method,
        backbone.d_model,
        options.max_source_length,
        options.reference_prompt_length,
        options.prompt_length,
        options.rank,
    )
    if prompt_length == 0 and rank == 0:
        return None
    prompt = family.build(
        options.method,
        backbone.d_model,
        prompt_length=prompt_length,
        rank=rank,
        max_source_length=options.max_source_length,
        alpha=options.alpha,
        seed=seed,
    )
    if options.prompt_init != "random":
        tokenizer = backbone.tokenizer
        if options.prompt_init == "text":
            ids = tokenizer(options.init_text, add_special_tokens=False, return_tensors="pt").input_ids[0]
        else:
            ids = sample_vocabulary(
                min(COMMON_TOKENS, len(tokenizer)),
                prompt_length,
                torch.Generator().manual_seed(seed),
                exclude=tokenizer.all_special_ids,
            )
        prompt.init_prompt(backbone.embed(ids.long()[None])[0])
    return prompt
