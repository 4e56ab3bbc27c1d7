"""Initialisation of a prompt from trained prompts, for transfer between tasks."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from dept_vl._utils.printable import printable
from dept_vl._utils.tensors import load_exactly, under
from dept_vl.adapters.adapter import Adapter
from dept_vl.adapters.fingerprint import check_backbone
from dept_vl.config import InitParts
from dept_vl.models.prompted import PromptedModel
from dept_vl.prompts.dept import DePT


def inherit(model: PromptedModel, paths: Sequence[Path], parts: InitParts) -> None:
    """Initialise the prompt of a model with the mean of trained prompts.

    A single source with a trained visual projection also sets the model's visual projection. Offsets are
    averaged as the mean of A B, reduced to their rank.

    Raises:
        FileNotFoundError: If a source does not exist.
        ValueError: If a source was trained on another backbone, its prompt has other sizes, or the offsets of
            several sources depend on the token, so that they have no mean.
    """
    adapters = [Adapter.from_pretrained(path) for path in paths]
    for path, adapter in zip(paths, adapters, strict=True):
        _check(model, adapter, path, parts, len(adapters))
    prompt = model.prompt
    assert prompt is not None
    sources = [adapter.build_prompt() for adapter in adapters]
    if parts == "all" and len(sources) == 1:
        model.prompt = sources[0].train(prompt.training)
    else:
        vectors = [cast(Tensor, source.vectors()) for source in sources]
        prompt.init_prompt(torch.stack(vectors).mean(0))
        if parts == "all":
            _take_mean_offset(prompt, sources)
    projection = model.backbone.visual_projection
    only = adapters[0]
    if len(adapters) == 1 and projection is not None and "visual_projection" in only.trainable_parameters:
        prefix = "visual_projection."
        load_exactly(projection, under(prefix, only.tensors), "the source's", prefix)


@torch.no_grad()
def _take_mean_offset(prompt: DePT, sources: Sequence[DePT]) -> None:
    """Set A B to the matrix of its rank nearest to the mean of the sources' products (Eckart & Young)."""
    if prompt.offset_a is None or prompt.offset_b is None:
        return
    products = [s.offset_a @ s.offset_b for s in sources if s.offset_a is not None and s.offset_b is not None]
    left, values, right = torch.linalg.svd(torch.stack(products).mean(0), full_matrices=False)
    rank, roots = len(values[: prompt.rank]), values.sqrt()
    prompt.offset_a.zero_()
    prompt.offset_b.zero_()
    prompt.offset_a[:, :rank] = left[:, :rank] * roots[:rank]
    prompt.offset_b[:rank] = roots[:rank, None] * right[:rank]


def _check(model: PromptedModel, adapter: Adapter, path: Path, parts: InitParts, sources: int) -> None:
    """Raise a `ValueError` if the model's prompt cannot be initialised from a source."""
    backbone, trained_on = model.backbone, adapter.backbone
    # P depends on the language model's word embeddings; the vision tower may be another one.
    language = (trained_on["fingerprint"] or {}).get("language")
    if language != backbone.fingerprint["language"]:
        raise ValueError(
            f"the source at {path} was trained on {printable(trained_on['name'])} (fingerprint "
            f"{trained_on['fingerprint']}), and this is {backbone.name} (fingerprint {backbone.fingerprint}"
            "); a prompt goes from task to task, not from language model to language model"
        )
    trained_projection = "visual_projection" in adapter.trainable_parameters
    if backbone.visual_projection is not None and trained_projection:
        check_backbone(trained_on, backbone)
    if adapter.prompt is None or model.prompt is None:
        whose = f"the source at {path}" if adapter.prompt is None else "the model"
        raise ValueError(f"{whose} has no prompt, and init_from starts a prompt from a trained one")
    sizes = model.prompt.describe()
    names = ["prompt_length", "d_model"]
    alone = parts == "all" and sources == 1
    if parts == "all":
        names += ["method", "rank", "max_source_length", "alpha", "visual_offset"]
        names += () if alone else ("seed",)  # a single source brings its frozen values along
    differing = [
        f"{name}={adapter.prompt[name]} there, {sizes[name]} here"
        for name in names
        if adapter.prompt[name] != sizes[name]
    ]
    if parts == "all" and not alone and model.prompt.offset_modules:
        differing.append(f"offsets of method {sizes['method']} cannot be averaged")
    if differing or (sizes["prompt_length"] == 0 and not alone):
        why = ", ".join(differing) or "it has no P, whose mean could be taken"
        raise ValueError(
            f"the prompt at {path} differs from the one to start: {why}; give the run the same sizes"
            + (", or take P alone (--init_parts prompt)" if parts == "all" else "")
        )
