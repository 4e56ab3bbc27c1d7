"""The model card of an adapter, `README.md` on the Hub: what it is, how good it is, and how to run it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dept_vl._utils.io import read_object
from dept_vl._utils.run_files import CONFIG_FILE
from dept_vl._utils.tables import markdown_table
from dept_vl.config import current_names
from dept_vl.tasks import TASKS
from dept_vl.tasks.base import Task, scale_of, shown_metrics

CARD_FILE = "README.md"
TRAINING_FILE = "training.json"
"""The configuration of the run that made an adapter, beside it on the Hub."""
PAPER = "https://arxiv.org/abs/2309.05173"

METRICS = {"overall": "accuracy", "em": "exact_match", "f1a": "f1", "macro_f1": "f1", "pearson": "pearsonr"}
METRICS |= {"matthews": "matthews_correlation", "ROUGE_L": "rouge"}
METRICS |= {f"Bleu_{n}": "bleu" for n in range(1, 5)}
"""The Hub's name of a figure, where it is another than the figure's own in small letters."""
LOCAL = ("data_dir", "features_dir", "shots_file", "output_dir", "resume", "log_with", "init_from")
"""Options that tell of one machine alone."""
MODELS = ("backbone", "vision", "language")
"""Options that name a model of the Hub, or a folder of this machine."""


def training_of(run: Path, task: str) -> dict[str, Any]:
    """What the folder of a run tells of its training: its configuration without this machine's paths.

    Args:
        run: The folder.
        task: Of the adapter.

    Raises:
        FileNotFoundError: If it is no run's.
        ValueError: If its configuration is damaged, or it was trained on another task.
    """
    config = read_object(run / CONFIG_FILE, dict)
    tasks = _tasks_of(config)
    if "+".join(tasks) != task:
        raise ValueError(f"the adapter was trained on {task}, and the run at {run} on {'+'.join(tasks)}")
    found: dict[str, Any] = _without_local(current_names(config))
    backbone = found.get("backbone", {})
    folders = {name for name in MODELS if backbone.get(name) and not _on_hub(str(backbone[name]))}
    return found | {"backbone": {name: v for name, v in backbone.items() if name not in folders}}


def model_card(
    name: str,
    adapter: Mapping[str, Any],
    *,
    images: bool,
    datasets: Sequence[str] = (),
    training: Mapping[str, Any] | None = None,
) -> str:
    """A card: metadata in YAML for the Hub's search, then text for people.

    Args:
        name: Of the repository.
        adapter: What `adapter.json` says.
        images: Whether the model reads images.
        datasets: Names on the Hub of what it was trained on; a task may have been learnt on other data in
            its form.
        training: As `training_of` gives it, if the run is known.
    """
    prompt, base = adapter["prompt"], adapter["backbone"]
    sections = {
        "Use": _usage(name, adapter, images=images),
        "Figures": _figures(adapter),
        "Trained parameters": _parameters(adapter["trainable_parameters"]),
        "Prompt": "" if prompt is None else _sizes(prompt),
        "Training": "" if training is None else _training(training),
        "Base model": _base(base),
    }
    method = "no prompt" if prompt is None else f"a soft prompt (`{prompt['method']}`)"
    frozen = "is frozen" if "backbone" not in adapter["trainable_parameters"] else "was trained in part"
    title = (
        f"# {name}\n\nAn adapter of `dept_vl`: {method} for **{base['name']}**, trained "
        f"on the task **{adapter['task'] or 'unnamed'}**. The base model {frozen} and is loaded apart. "
        f"Decomposed Prompt Tuning is by [Shi & Lipani, ICLR 2024]({PAPER})."
    )
    body = "\n\n".join(f"## {heading}\n\n{text}" for heading, text in sections.items() if text)
    return f"---\n{_metadata(name, adapter, images=images, datasets=datasets)}\n---\n\n{title}\n\n{body}\n"


def _metadata(name: str, adapter: Mapping[str, Any], *, images: bool, datasets: Sequence[str]) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    tasks = [task for task in adapter["task"].split("+") if task]
    figures = shown_metrics(adapter["metrics"])
    results = []
    for figure, value in figures.items():
        task = figure.split("/")[0] if len(tasks) > 1 else adapter["task"]
        results.append(
            EvalResult(
                task_type=_pipeline(task, images=images),
                dataset_type=datasets[0] if len(datasets) == 1 else task or "unknown",
                dataset_name=task or "unknown",
                metric_type=_metric(figure),
                metric_name=f"{figure} ({scale_of(figure, _known(tasks))})",
                metric_value=round(value, 2),
            )
        )
    method = "" if adapter["prompt"] is None else adapter["prompt"]["method"]
    bases = [part for part in adapter["backbone"]["name"].split("+") if _on_hub(part)]
    data = ModelCardData(
        base_model=bases[0] if len(bases) == 1 else bases or None,
        base_model_relation="adapter" if bases else None,
        library_name="dept_vl",
        pipeline_tag=_pipeline(tasks[0] if tasks else "", images=images),
        tags=[tag for tag in ("dept", "prompt-tuning", method) if tag],
        datasets=list(datasets) or None,
        metrics=sorted(set(map(_metric, figures))) or None,
        model_name=name,
        eval_results=results or None,
    )
    text: str = data.to_yaml()
    return text


def _usage(name: str, adapter: Mapping[str, Any], *, images: bool) -> str:
    """Code that runs it."""
    base = adapter["backbone"]
    ready_made = (base["fingerprint"] or {}).get("class")
    if ready_made:
        return _python(
            f"from transformers import {ready_made}\n\nfrom dept_vl.adapters.attach import Attached\n\n"
            f'model = {ready_made}.from_pretrained("{base["name"]}")\n'
            f'attached = Attached.load("{name}", model.eval())\n'
            "tokens = attached.generate(**inputs)  # of the model's own processor"
        )
    tasks = adapter["task"].split("+")
    known = _known(tasks[:1])
    if known:
        # Of several tasks one is chosen.
        task = f', task="{tasks[0]}"' if len(tasks) > 1 else ""
        call = f"print(model.answer({known[0].example_call}))"
        return _python(f'import dept_vl\n\nmodel = dept_vl.load("{name}"{task})\n{call}')
    if images:
        return _python(
            "from dept_vl import Adapter, Backbone\n\n"
            "backbone = Backbone.from_pretrained(vision=..., language=...)  # see below\n"
            f'model = Adapter.from_pretrained("{name}").build(backbone).eval()'
        )
    return _python(
        "from dept_vl import Adapter, Backbone\n\n"
        f'backbone = Backbone.from_pretrained(language="{base["name"]}")\n'
        f'model = Adapter.from_pretrained("{name}").build(backbone).eval()\n'
        'text = backbone.tokenizer(["..."], return_tensors="pt")\n'
        "tokens = model.generate(**text, max_new_tokens=10)\n"
        "print(backbone.tokenizer.batch_decode(tokens, skip_special_tokens=True))"
    )


def _python(code: str) -> str:
    return f"```python\n{code}\n```"


def _figures(adapter: Mapping[str, Any]) -> str:
    known = _known(adapter["task"].split("+"))
    rows = [
        (figure, scale_of(figure, known), f"{value:.2f}")
        for figure, value in shown_metrics(adapter["metrics"]).items()
    ]
    return markdown_table(["figure", "scale", "value"], rows) if rows else "None are on record."


def _parameters(counts: Mapping[str, int]) -> str:
    groups = {name: count for name, count in counts.items() if name not in ("total", "without_projection")}
    rows = [*groups.items(), ("in all", counts["total"])]
    rows.append(("without the visual projection", counts["without_projection"]))
    return markdown_table(["part", "parameters"], [(name, f"{count:,}") for name, count in rows])


def _sizes(prompt: Mapping[str, Any]) -> str:
    said = {
        "method": prompt["method"],
        "vectors of the prompt (m)": prompt["prompt_length"],
        "rank (r)": prompt["rank"],
        "longest text in tokens (s)": prompt["max_source_length"],
        "width (d)": prompt["d_model"],
        "alpha": f"{prompt['alpha']:g}",
        "scale of the offset": f"{prompt['scale']:.4g}",
    }
    return markdown_table(["size", "value"], list(said.items()))


def _training(training: Mapping[str, Any]) -> str:
    said = {
        "learning rate of the prompt (`--prompt_lr`)": ("optim", "prompt_lr"),
        "of the low-rank part (`--offset_lr`)": ("optim", "offset_lr"),
        "of the visual projection (`--projection_lr`)": ("optim", "projection_lr"),
        "steps (`--max_steps`)": ("train", "max_steps"),
        "examples in a batch, per process": ("train", "per_device_batch_size"),
        "seed": ("train", "seed"),
    }
    rows = [(label, training.get(part, {}).get(option)) for label, (part, option) in said.items()]
    return (
        markdown_table(["option", "value"], [(label, value) for label, value in rows if value is not None])
        + f"\n\nThe options stand in `{TRAINING_FILE}`, but those that name files of the machine it was "
        "trained on: the data (`--data_dir`), models from a folder (`--backbone`, `--vision`, `--language`), "
        "adapters that it began from (`--init_from`) and lists of examples (`--shots_file`). With these in "
        "place, again:"
        f"\n\n```\naccelerate launch -m dept_vl train --config {TRAINING_FILE}\n```"
    )


def _base(base: Mapping[str, Any]) -> str:
    fingerprint = ", ".join(f"{part} `{value}`" for part, value in (base["fingerprint"] or {}).items())
    bias = base["visual_position_bias"]
    return (
        f"`{base['name']}`; fingerprint of its weights: {fingerprint or 'not on record'}; "
        f"`visual_position_bias`: {bias or 'not on record'}. The adapter is refused by any other."
    )


def _metric(figure: str) -> str:
    last = figure.rsplit("/", 1)[-1]
    return "accuracy" if "answer_type/" in figure else METRICS.get(last, last.lower())


def _pipeline(task: str, *, images: bool) -> str:
    """The Hub's name for what the model does."""
    known = [one.pipeline for one in _known([task]) if bool(one.image_count) == images]
    return known[0] if known else "image-text-to-text" if images else "text-generation"


def _known(names: Sequence[str]) -> list[Task]:
    """The tasks of these names; an adapter may be of others."""
    return [TASKS[name] for name in names if name in TASKS]


def _on_hub(name: str) -> bool:
    """Whether this may be the name of a model on the Hub, and not a folder."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def _tasks_of(config: Mapping[str, Any]) -> list[str]:
    return [str(options.get("task")) for options in (config.get("data", {}), *config.get("also", []))]


def _without_local(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _without_local(value) for name, value in content.items() if name not in LOCAL}
    return [_without_local(value) for value in content] if isinstance(content, list) else content
