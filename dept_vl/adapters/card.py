"""Model card of an adapter (`README.md` on the Hub), with its description, metrics and usage."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from dept_vl._utils.io import read_object
from dept_vl._utils.printable import markdown_text, printable
from dept_vl._utils.run_files import CONFIG_FILE, is_hub_name
from dept_vl._utils.tables import markdown_table
from dept_vl.adapters.base_model import shown
from dept_vl.config import current_options, flat
from dept_vl.tasks import TASKS
from dept_vl.tasks.base import Task, scale_of, shown_metrics

CARD_FILE = "README.md"
TRAINING_FILE = "training.json"
"""Name of the training configuration of an adapter on the Hub."""

METRICS = {"overall": "accuracy", "em": "exact_match", "f1a": "f1", "macro_f1": "f1", "pearson": "pearsonr"}
METRICS |= {"matthews": "matthews_correlation", "ROUGE_L": "rouge"}
METRICS |= {f"Bleu_{n}": "bleu" for n in range(1, 5)}
"""Hub name of each metric whose Hub name is not its own name in lower case."""
LOCAL = (
    *("data_dir", "own", "features_dir", "shots_file", "init_from"),
    *("output_dir", "resume", "accept_changes", "wait", "log_with"),
)
"""Options that only apply to one machine and are not published."""
MODELS = ("backbone", "model", "vision", "language")
"""Options that name a model on the Hub or a local folder."""


def training_of(run: Path, task: str) -> dict[str, Any]:
    """Return the training configuration of a run, without local paths.

    Raises:
        FileNotFoundError: If `run` is not the folder of a run.
        ValueError: If the configuration is damaged, or the run was trained on another task.
    """
    config = read_object(run / CONFIG_FILE, dict)
    tasks = [str(options.get("task")) for options in (config.get("data", {}), *config.get("also", []))]
    if "+".join(tasks) != task:
        raise ValueError(f"the adapter was trained on {task}, and the run at {run} on {'+'.join(tasks)}")
    found: dict[str, Any] = _without_local(current_options(config))
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
    """Return the text of a model card, with YAML metadata for the Hub.

    `adapter` is the content of `adapter.json`, `training` that of `training_of`; `datasets` are Hub names.
    """
    templates = Environment(
        loader=PackageLoader(__package__, "."),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        # Adapters come from anybody, so all text is escaped unless it is `Markup`.
        finalize=markdown_text,
    )
    templates.filters |= {"code": _code, "literal": _literal}
    tasks = adapter["task"].split("+")
    fingerprint = shown(adapter["backbone"]["fingerprint"])
    counts = dict(adapter["trainable_parameters"])
    whole, without = counts.pop("total"), counts.pop("without_projection")
    parameters = {**counts, "in all": whole, "without the visual projection": without}
    return templates.get_template("card.md.j2").render(
        metadata=Markup(_metadata(name, adapter, images=images, datasets=datasets)),
        name=name,
        images=images,
        task=adapter["task"],
        tasks=tasks,
        known=_known(tasks[:1]),
        prompt=adapter["prompt"],
        base=adapter["backbone"],
        fingerprint=fingerprint,
        model_class=fingerprint["class"] if fingerprint.get("class", "").isidentifier() else None,
        counts=counts,
        parameters=[(part, f"{count:,}") for part, count in parameters.items()],
        figures=[
            (figure, scale_of(figure, _known(tasks)), f"{value:.2f}")
            for figure, value in shown_metrics(adapter["metrics"]).items()
        ],
        training=flat(dict(training or {})),
        training_file=TRAINING_FILE,
        table=lambda header, rows: Markup(markdown_table(header, rows)),
    )


def _code(text: object) -> str:
    """Return a Markdown code span, which is not escaped."""
    return Markup(f"`{printable(text).replace('`', chr(39))}`")


def _literal(text: object) -> str:
    """Return a Python string literal."""
    return Markup(json.dumps(printable(text), ensure_ascii=False))


def _metadata(name: str, adapter: Mapping[str, Any], *, images: bool, datasets: Sequence[str]) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    tasks = [task for task in adapter["task"].split("+") if task]
    figures = {printable(figure): value for figure, value in shown_metrics(adapter["metrics"]).items()}
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
    return str(data.to_yaml())


def _metric(figure: str) -> str:
    last = figure.rsplit("/", 1)[-1]
    return "accuracy" if "answer_type/" in figure else METRICS.get(last, last.lower())


def _pipeline(task: str, *, images: bool) -> str:
    """Return the Hub's pipeline tag of a task."""
    known = [one.pipeline for one in _known([task]) if bool(one.image_count) == images]
    return known[0] if known else "image-text-to-text" if images else "text-generation"


def _known(names: Sequence[str]) -> list[Task]:
    """Return the tasks of these names, without unknown names."""
    return [TASKS[name] for name in names if name in TASKS]


def _on_hub(name: str) -> bool:
    """Return whether `name` can be a model on the Hub and is not a local folder."""
    return "/" in name and is_hub_name(name) and not Path(name).exists()


def _without_local(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _without_local(value) for name, value in content.items() if name not in LOCAL}
    return [_without_local(value) for value in content] if isinstance(content, list) else content
