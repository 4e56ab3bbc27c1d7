"""Load an adapter with its backbone and task.

model = dept_vl.load("runs/vqa")
model.answer("street.jpg", "what colour is the car?")
"""

from dataclasses import replace
from pathlib import Path

import torch

from dept_vl._utils.errors import UsageError
from dept_vl._utils.io import one_line
from dept_vl._utils.printable import printable, warn
from dept_vl._utils.run_files import BEST, CONFIG_FILE, LAST, find_again
from dept_vl.adapters.adapter import Adapter
from dept_vl.adapters.hub import ADAPTER_FILE
from dept_vl.config import EvaluateConfig, read_config
from dept_vl.data.splits import data_options, informed, run_decoding
from dept_vl.inference.predictor import Predictor
from dept_vl.models.backbone import BACKBONE_FILE, Backbone
from dept_vl.models.base import FrozenBackbone
from dept_vl.models.pretrained_vlm import VisionLanguageModel, open_backbone
from dept_vl.tasks import TASKS
from dept_vl.tasks.base import Task

LONGEST_TEXT = 512
"""Maximum number of tokens of a text if neither a prompt nor a run specifies it."""


def load(
    source: str | Path,
    *,
    backbone: FrozenBackbone | str | Path | None = None,
    revision: str | None = None,
    task: str | None = None,
    device: str | torch.device | None = None,
) -> Predictor:
    """Load an adapter and its backbone, ready to answer questions.

    Args:
        source: Folder of a run or an adapter, or name of an adapter on the Hub (`user/adapter`).
        backbone: Backbone or where to load it from, see `find_backbone`. A loaded backbone can be shared by
            several adapters; it is frozen and put in evaluation mode, and its weights are not changed.
        revision: Branch, tag or commit of an adapter on the Hub.
        task: Task that determines how questions are asked. Defaults to the task that the adapter was trained
            on; required if that was several tasks, or a task that is not registered.
        device: Device to load the backbone on, see `find_backbone`.

    Raises:
        FileNotFoundError: If the adapter or the backbone is not found.
        ValueError: If the backbone is not the one that the adapter was trained on, is not supported or has
            too few positions for the prompt, or if the task is unknown.

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
    model = adapter.build(shared).to(shared.device).eval().folded()
    chosen, longest_answer = informed(chosen, adapter.answering, run)
    decoding, longest = chosen.decoding, LONGEST_TEXT
    if longest_answer:
        decoding = replace(decoding, max_new_tokens=longest_answer)
    if run is not None:
        trained = read_config(run / CONFIG_FILE)
        longest = trained.prompt.max_source_length + shared.frame
        if chosen.loaded_as in [TASKS[options.task].loaded_as for options in (trained.data, *trained.also)]:
            config = EvaluateConfig(run, task=chosen.loaded_as)
            options = data_options(config, trained)
            decoding = run_decoding(config, options, chosen, chosen, longest_answer)
    if model.prompt is not None:
        longest = model.prompt.max_source_length
    # Check this now instead of at the first question.
    shared.language_model.check_length(
        0 if model.prompt is None else model.prompt.prompt_length,
        1,
        0 if shared.vision is None else shared.vision.token_count * chosen.image_count,
        decoding.max_new_tokens,
    )
    return Predictor(model, adapter, chosen, decoding, longest, run)


def find_backbone(
    adapter: Adapter,
    run: Path | None,
    backbone: FrozenBackbone | str | Path | None = None,
    device: str | torch.device | None = None,
    place: Path = Path(),
) -> FrozenBackbone:
    """Load the backbone that an adapter was trained on.

    Args:
        adapter: Adapter whose backbone to load.
        run: Folder of the run that trained the adapter, if there is one.
        backbone: A loaded backbone, which is returned unchanged; a folder saved by
            `Backbone.save_pretrained`; or the name or folder of a model, or of two as `VISION+LANGUAGE`.
            Defaults to the backbone of the run, or else the one that the adapter names.
        device: Device such as "cuda". Defaults to the accelerator if there is one.
        place: Folder of the adapter; a relative path of the backbone is looked up there too.

    Raises:
        FileNotFoundError: If the backbone is not found.
        UsageError: If this machine has no such device.
        ValueError: If the backbone is not supported, or the adapter belongs to a model of `attach`.
    """
    if isinstance(backbone, FrozenBackbone):
        return backbone
    placed = _device(device)
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
    # transformers raises this for models that are neither on the disk nor on the Hub.
    except OSError as error:
        raise FileNotFoundError(
            f"the backbone of this adapter ({called}) cannot be loaded: {one_line(error)}. "
            "Say where it is: backbone=... (scripts: --backbone ...), the folder of a saved backbone, as "
            "data/tiny-clip-t5 is one, or VISION+LANGUAGE, two names of the Hub or folders"
        ) from None
    loaded = loaded.to(placed).eval()
    counts = (TASKS[task].image_count for task in adapter.task.split("+") if task in TASKS)
    loaded.probe(max(counts, default=1))
    return loaded


def _device(given: str | torch.device | None) -> torch.device:
    """Return a device of this machine, or raise UsageError. Default: the accelerator if there is one."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if given is None:
        return accelerator or torch.device("cpu")
    here = [torch.device("cpu")]
    if accelerator is not None:
        kind = accelerator.type
        here += [
            torch.device(kind),
            *(torch.device(kind, n) for n in range(torch.accelerator.device_count())),
        ]
    named = next((device for device in here if str(device) == str(given)), None)
    if named is None:
        raise UsageError(f"device: expected one of {', '.join(map(str, here))}; found {str(given)!r:.80}")
    return named


def _note_orientation(adapter: Adapter, exif: bool) -> None:
    """Warn if images were rotated by their EXIF orientation in training but are not now, or vice versa."""
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


def run_of(source: Path) -> Path | None:
    """Return the folder of the run that an adapter's folder belongs to, or None."""
    if (source / BEST / ADAPTER_FILE).is_file():
        run = source
    elif (folder := source.resolve()).name in (BEST, LAST) and folder.is_dir():
        run = folder.parent
    else:
        return None
    return run if (run / CONFIG_FILE).is_file() else None


def _choose_task(adapter: Adapter, task: str | None) -> Task:
    """Return the given task, or the adapter's; ValueError if it is unknown, or there are several."""
    name = adapter.task if task is None else task
    if name in TASKS:
        return TASKS[name]
    learnt = [part for part in name.split("+") if part in TASKS]
    if len(learnt) > 1:
        raise ValueError(
            f"the adapter was trained on several tasks: say task={' or '.join(map(repr, learnt))}"
        )
    raise ValueError(
        f"{name!r} is not a task of this package; say which of them asks alike, task=... "
        f"(scripts: --task ...): {', '.join(TASKS)}"
    )
