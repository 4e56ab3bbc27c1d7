"""An adapter, its backbone and its task found and put together, ready to answer.

model = dept_vl.load("runs/vqa")
model.answer("street.jpg", "what colour is the car?")
"""

import copy
from dataclasses import replace
from pathlib import Path

import torch

from dept_vl._utils.io import one_line
from dept_vl._utils.printable import printable, warn
from dept_vl._utils.run_files import BEST, CONFIG_FILE, LAST, find_again
from dept_vl.adapters.adapter import Adapter
from dept_vl.adapters.hub import ADAPTER_FILE
from dept_vl.config import EvaluateConfig, RunConfig, read_config
from dept_vl.data.splits import data_options, informed, run_decoding
from dept_vl.inference.predictor import Predictor
from dept_vl.models.backbone import BACKBONE_FILE, Backbone
from dept_vl.models.base import FrozenBackbone
from dept_vl.models.vlm import VisionLanguageModel, open_backbone
from dept_vl.tasks import TASKS
from dept_vl.tasks.base import Task

LONGEST_TEXT = 512
"""Tokens of a text where neither a prompt nor a run says how long it may be."""


def load(
    source: str | Path,
    *,
    backbone: FrozenBackbone | str | Path | None = None,
    revision: str | None = None,
    task: str | None = None,
    device: str | torch.device | None = None,
) -> Predictor:
    """Load an adapter on its backbone, ready to answer.

    Args:
        source: The folder of a run or of an adapter, or an adapter's name on the Hub (`user/adapter`).
        backbone: See `find_backbone`. One that is loaded is shared by any number of adapters: it is frozen
            and put in evaluation mode, its weights stay as they are.
        revision: Of a name on the Hub.
        task: How questions are asked; None takes the adapter's. It has to be said where that was several,
            or is none of this package's.
        device: See `find_backbone`.

    Raises:
        FileNotFoundError: If there is no adapter, or no backbone.
        ValueError: If the backbone is another one than the adapter's or of no kind that is supported, the
            prompt is longer than it has positions, or the task is unknown.

    Example:
        >>> import dept_vl
        >>> predictor = dept_vl.load("runs/vqa")
        >>> answer = predictor.answer("street.jpg", "what colour is the car?")
    """
    adapter = Adapter.from_pretrained(source, revision=revision)
    run = run_of(Path(source))
    chosen = _choose_task(adapter, task).reading(adapter.question_case)
    shared = find_backbone(adapter, run, backbone, device, Path(source))
    if chosen.image_count and not shared.reads_images:
        raise ValueError(
            f"{chosen.name} asks about images, and {shared.name} has no vision tower; load one that has"
        )
    if shared.exif is not None and chosen.image_count:
        _note_orientation(adapter, shared.exif)
    base = _copy_changed(shared, adapter)
    model = adapter.build(base).to(base.device).eval().folded()
    chosen, longest_answer = informed(chosen, adapter.answering, run)
    decoding, longest = chosen.decoding, LONGEST_TEXT
    if longest_answer:
        decoding = replace(decoding, max_new_tokens=longest_answer)
    if run is not None:
        trained = read_config(run / CONFIG_FILE)
        longest = trained.prompt.max_source_length + base.frame
        if chosen.loaded_as in _tasks_of(trained):
            config = EvaluateConfig(run, task=chosen.loaded_as)
            options = data_options(config, trained)
            decoding = run_decoding(config, options, chosen, chosen, longest_answer)
    if model.prompt is not None:
        longest = model.prompt.max_source_length
    # Now, rather than at the first question.
    base.check_length(
        0 if model.prompt is None else model.prompt.prompt_length,
        1,
        0 if base.vision is None else base.vision.token_count * chosen.image_count,
        decoding.max_new_tokens,
    )
    return Predictor(model, adapter, chosen, decoding, longest)


def find_backbone(
    adapter: Adapter,
    run: Path | None,
    backbone: FrozenBackbone | str | Path | None = None,
    device: str | torch.device | None = None,
    place: Path = Path(),
) -> FrozenBackbone:
    """Load the backbone that an adapter was trained on.

    Args:
        adapter: Not yet on it.
        run: Folder of the run that it is of, which knows the backbone; None if there is none.
        backbone: A loaded one is returned, where it is. Or a folder of `Backbone.save_pretrained`, or
            names or folders of two models, `VISION+LANGUAGE`, or of the `LANGUAGE` model alone. None takes
            that of the run, else the one that the adapter names.
        device: Such as `cuda`; None takes the accelerator if there is one.
        place: Of the adapter, beside which a relative path that it names is looked for too.

    Raises:
        FileNotFoundError: If it cannot be found; the message says what may be given.
        ValueError: If it is of no kind that is supported, or the adapter is of another kind.
    """
    if isinstance(backbone, FrozenBackbone):
        return backbone
    known = adapter.backbone
    fingerprint, called = known["fingerprint"] or {}, printable(known["name"])
    if "class" in fingerprint:
        raise ValueError(
            f"this adapter was put on a ready-made {printable(fingerprint['class'])} ({called}); load it "
            "with dept_vl.adapters.attach.Attached.load"
        )
    name = known["name"] if backbone is None else str(backbone)
    if backbone is None:
        name = "+".join(find_again(part, place) for part in name.split("+"))
    loaded: FrozenBackbone
    try:
        if backbone is None and run is not None:
            loaded = open_backbone(**read_config(run / CONFIG_FILE).backbone.loading())
        elif "text_form" in known:
            loaded = VisionLanguageModel.from_pretrained(
                name,
                text_form=known["text_form"],
                exif=bool(known.get("exif")),
                load_in=known.get("load_in", "") if backbone is None else "",
            )
        elif (Path(name) / BACKBONE_FILE).is_file():
            loaded = Backbone.from_pretrained(
                name, exif=bool(known.get("exif")), image_fit=known.get("image_fit")
            )
        else:
            vision, language = _two(name) if "vision" in fingerprint else (None, name)
            options = {
                f"{'vision_' * (key == 'layer')}{key}": v for key, v in (known["vision"] or {}).items()
            }
            loaded = Backbone.from_pretrained(
                vision=vision,
                language=language,
                visual_position_bias=known["visual_position_bias"] or "none",
                exif=bool(known.get("exif")),
                object_order=known.get("object_order"),
                visual_norm=known.get("visual_norm"),
                image_fit=known.get("image_fit"),
                **options,
            )
    # transformers says so of models that are neither on the disk nor on the Hub.
    except OSError as error:
        raise FileNotFoundError(
            f"the backbone of this adapter ({called}) cannot be loaded: {one_line(error)}. "
            "Say where it is: backbone=... (scripts: --backbone ...), the folder of a saved backbone, as "
            "data/tiny-clip-t5 is one, or VISION+LANGUAGE, two names of the Hub or folders"
        ) from None
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    loaded = loaded.to(device or accelerator or "cpu").eval()
    loaded.probe(_images(adapter))
    return loaded


def _images(adapter: Adapter) -> int:
    """Return the number of images that a question of the adapter's task is about."""
    return max((TASKS[name].image_count for name in adapter.task.split("+") if name in TASKS), default=1)


def _note_orientation(adapter: Adapter, exif: bool) -> None:
    """Warn where images are turned, or left, that the training left, or turned."""
    trained = bool(adapter.backbone.get("exif"))
    if adapter.backbone["fingerprint"] is not None and trained != exif:
        read = {True: "turned as their EXIF orientation says", False: "as they are stored"}
        warn(
            f"this adapter was trained on images {read[trained]}, and this backbone reads them {read[exif]}: "
            f"load the backbone with exif={trained} where that matters",
            stacklevel=3,
        )


def _two(name: str) -> tuple[str, str]:
    parts = name.split("+")
    if len(parts) != 2:
        raise FileNotFoundError(f"there is no backbone folder {printable(name)}, and it names no two models")
    return parts[0], parts[1]


def _copy_changed(backbone: FrozenBackbone, adapter: Adapter) -> FrozenBackbone:
    """Return the backbone with a copy of the parts that the adapter changes."""
    if any(name.startswith("language.") for name in adapter.tensors):
        return copy.deepcopy(backbone)
    return backbone.with_projection(copy.deepcopy(backbone.visual_projection))


def run_of(source: Path) -> Path | None:
    """Return the folder of the run that an adapter belongs to; None if there is none."""
    if (source / BEST / ADAPTER_FILE).is_file():
        run = source
    elif source.name in (BEST, LAST) and source.is_dir():
        run = source.resolve().parent
    else:
        return None
    return run if (run / CONFIG_FILE).is_file() else None


def _tasks_of(config: RunConfig) -> list[str]:
    return [options.task for options in (config.data, *config.also)]


def _choose_task(adapter: Adapter, task: str | None) -> Task:
    """Return the task that says how questions are asked.

    Raises:
        ValueError: If there is no such task, or the adapter does not say which.
    """
    name = adapter.task if task is None else task
    if name not in TASKS:
        learnt = [part for part in name.split("+") if part in TASKS]
        several = f"several tasks: say task={' or '.join(map(repr, learnt))}" if len(learnt) > 1 else ""
        raise ValueError(
            f"the adapter was trained on {several}"
            if several
            else f"{name!r} is no task of this package; say which of them asks alike, task=... "
            f"(scripts: --task ...): {', '.join(TASKS)}"
        )
    return TASKS[name]
