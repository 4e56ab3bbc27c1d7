"""Measurement of training steps, generation and memory, in rounds over all methods."""

import copy
import gc
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.backbones import SHAPES, SIZES, build_backbone, draw_batch
from benchmarks.measure import encoder_flops, in_turn, peak_bytes, saved_bytes
from benchmarks.methods import (
    COMPILED,
    METHODS,
    Runner,
    build_runners,
    generating,
    has_peft,
    needs_peft,
    seeing,
    write_images,
)
from benchmarks.options import BenchConfig
from benchmarks.pretrained import MODELS as PRETRAINED
from benchmarks.pretrained import (
    Width,
    build_pretrained,
    build_pretrained_runners,
    draw_pretrained,
    of_pretrained,
)
from dept_vl._utils.errors import UsageError
from dept_vl._utils.io import read_json, write_json
from dept_vl._utils.printable import say
from dept_vl.models.backbone import Backbone
from dept_vl.models.precision import choose_attention, hold_frozen_in_bfloat16, prepare_step

RESULTS_FILE = "bench.json"
MORE_ANSWERS = 8
"""Examples to answer together for each of a training step; evaluation keeps nothing for a backward pass."""
IMAGES = 16
"""Number of different image files, from which every batch takes some."""
PAIR = ("pt100", "dept40")
DEPTHS = ("dept0", "dept20", "dept40", "dept60", "dept80")
PLAN: dict[tuple[str, str, str], tuple[str, ...]] = {
    ("base", "vl", "train"): (
        *("pt100", *DEPTHS, "floor", "constant"),
        *("peft100", "peft100held", "peft40", "lora8"),
    ),
    ("base", "vl", "generate4"): (*PAIR, "floor"),
    ("base", "vl", "generate20"): (*PAIR, "floor"),
    ("base", "vl", "images"): ("cached", "live"),
    ("base", "glue", "train"): (*PAIR, "padded", "peft100", "peft100held", "lora8"),
    ("base", "mrqa", "train"): (*PAIR, "padded"),
    ("small", "vl", "train"): PAIR,
    ("large", "vl", "train"): PAIR,
}
"""Methods by (model, shape, work), measured in this order unless the options say otherwise."""
PLAN |= {(model, *key): methods for model in PRETRAINED for key, methods in of_pretrained(model).items()}


@dataclass(frozen=True)
class Group:
    """Methods that are measured in the same rounds."""

    model: str
    shape: str
    work: str
    methods: tuple[str, ...]
    batch_size: int
    rounds: int

    @property
    def key(self) -> str:
        """Name of the group in the results."""
        return f"{self.model}/{self.shape}/{self.work}"


def plan(config: BenchConfig) -> list[Group]:
    """Return the groups to measure, ordered by model so that each model is built once.

    Raises:
        ValueError: If a name is unknown, or nothing is left to measure.
    """
    models = _names(config.models, SIZES | PRETRAINED, "models")
    shapes = _names(config.shapes, SHAPES, "shapes")
    methods = _names(config.methods, METHODS, "methods")
    entries = PLAN
    if config.tiny:
        models = [model for model in models if model in PRETRAINED] or ["tiny"]
    if "tiny" in models:
        entries = PLAN | {("tiny", *key[1:]): names for key, names in PLAN.items() if key[0] == "base"}
    if methods:
        entries = {(model, shape, "train"): tuple(methods) for model in models for shape in shapes}
    groups = []
    for (model, shape, work), names in entries.items():
        if model in models and shape in shapes:
            answers = work.startswith("generate") and model not in PRETRAINED
            long = model == "large" or shape == "mrqa" or answers
            rounds = max(1, config.rounds // 3) if long else config.rounds
            share = 4 if shape == "mrqa" else 2 if model == "large" else 1
            size = max(1, config.batch_size // share) * (MORE_ANSWERS if answers else 1)
            if installed := _installed(names):
                groups.append(Group(model, shape, work, installed, size, rounds))
    if not groups:
        raise UsageError(f"nothing to measure for --models {config.models} --shapes {config.shapes}")
    return sorted(groups, key=lambda group: models.index(group.model))


def _names(given: str, known: dict[str, Any], option: str) -> list[str]:
    names = [name for name in given.split(",") if name]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"--{option}: expected some of {','.join(known)}; found {','.join(unknown)}")
    return names


def _installed(methods: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in methods if has_peft() or not needs_peft(name))


class Bench:
    """Benchmark that measures groups and saves the results.

    Groups that an earlier call with the same options on this machine has finished are not repeated.

    Args:
        config: Configuration of the benchmark.
        tokenizer: Folder of any T5 tokenizer.

    Attributes:
        results: Content of bench.json.
    """

    def __init__(self, config: BenchConfig, tokenizer: Path) -> None:
        self.config, self.tokenizer = config, tokenizer
        name = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.device = torch.device(name)
        self.bfloat16 = config.dtype == "bf16" or (config.dtype == "auto" and computes_bfloat16(self.device))
        self.results: dict[str, Any] = {
            "machine": describe_machine(self.device),
            "dtype": "bf16" if self.bfloat16 else "fp32",
            "config": {name: value for name, value in asdict(config).items() if name != "output_dir"},
            "groups": {},
        }
        config.output_dir.mkdir(parents=True, exist_ok=True)
        if (path := config.output_dir / RESULTS_FILE).is_file():
            self._take_up(read_json(path), path)

    def _take_up(self, before: dict[str, Any], path: Path) -> None:
        """Continue with earlier results.

        Raises:
            ValueError: If they were measured with other options or on another machine.
        """
        old, new = map(_conditions, (before, self.results))
        changed = [
            f"{name}={old.get(name)!r} -> {new.get(name)!r}" for name in new if old.get(name) != new[name]
        ]
        if changed:
            raise UsageError(
                f"{path} holds what was measured otherwise ({'; '.join(changed)}); choose another "
                "--output_dir"
            )
        self.results["groups"] = before["groups"]

    def measure(self, groups: Sequence[Group]) -> None:
        """Measure all groups. Each model is built before its first group and released after its last."""
        for model in dict.fromkeys(group.model for group in groups):
            mine = [group for group in groups if group.model == model and not self._has(group)]
            if not mine:
                continue
            torch.manual_seed(0)
            if model in PRETRAINED:
                self._measure_pretrained(model, mine)
                continue
            images = any(SHAPES[group.shape].image for group in mine)
            backbone = build_backbone(SIZES[model], self.tokenizer, vision=images).to(self.device)
            stock = None
            if any(needs_peft(name) for group in mine for name in group.methods):
                stock = copy.deepcopy(backbone.language).train(self.config.backbone_dropout)
            compiled = None
            if any(name.endswith(COMPILED) for group in mine for name in group.methods):
                compiled = self._compiled(backbone)
            gc.freeze()  # so that collecting before every step is fast
            with tempfile.TemporaryDirectory() as folder:
                paths = write_images(Path(folder), IMAGES) if images else []
                for group in mine:
                    self._measure_group(group, backbone, stock, compiled, paths)
            del backbone, stock, compiled
            gc.unfreeze()
            gc.collect()

    def _has(self, group: Group) -> bool:
        record = self.results["groups"].get(group.key, {})
        measured = [len(one["seconds"]) for one in record.get("measured", {}).values()]
        return (
            measured == [group.rounds] * len(group.methods)
            and list(group.methods) == record["methods"]
            and group.batch_size == record["batch_size"]
        )

    def _compiled(self, backbone: Backbone) -> Backbone:
        """Return a copy of the backbone with compiled layers."""
        backbone = copy.deepcopy(backbone).train(self.config.backbone_dropout)
        prepare_step(backbone.language, self.device, bfloat16=self.bfloat16, compiled=True)
        return backbone

    def _measure_group(
        self,
        group: Group,
        backbone: Backbone,
        stock: torch.nn.Module | None,
        compiled: Backbone | None,
        paths: list[Path],
    ) -> None:
        shape = SHAPES[group.shape]
        backbone.train(self.config.backbone_dropout)
        backbone.language.set_attn_implementation("sdpa")
        if group.work == "images":
            assert backbone.vision is not None
            runners = seeing(build_runners(["dept40"], backbone, shape)["dept40"], backbone.vision, paths)
        else:
            runners = build_runners(group.methods, backbone, shape, stock=stock, compiled=compiled)
        if self.bfloat16:
            hold_frozen_in_bfloat16(backbone.language)
        if group.work.startswith("generate"):
            runners = generating(runners, int(group.work.removeprefix("generate")))
        else:
            choose_attention(backbone.language, self.device, bfloat16=self.bfloat16)
        multiple = 8 if self.device.type == "cuda" else 1  # as in training

        def draw(number: int) -> dict[str, Any]:
            batch = draw_batch(backbone, shape, group.batch_size, number, multiple=multiple)
            return {name: tensor.to(self.device) for name, tensor in batch.items()}

        self._measure_rounds(group, runners, [draw(number) for number in range(group.rounds + 1)])

    def _measure_pretrained(self, model: str, groups: list[Group]) -> None:
        """Measure all groups of a pretrained model; see `bench.pretrained`."""
        width: Width = "tiny" if self.config.tiny else "small"
        backbone = build_pretrained(model, width, self.tokenizer, self.device)
        if self.bfloat16:
            hold_frozen_in_bfloat16(backbone.language)
            choose_attention(backbone.language, self.device, bfloat16=True)
        for group in groups:
            cached, numbers = group.work == "cached", range(group.rounds + 1)
            with self._autocast():
                runners = build_pretrained_runners(group.methods, backbone, group.work)
                batches = [draw_pretrained(backbone, group.batch_size, n, cached=cached) for n in numbers]
            self._measure_rounds(group, runners, batches)

    def _measure_rounds(
        self, group: Group, runners: dict[str, Runner], batches: list[dict[str, Any]]
    ) -> None:
        """Measure sizes and memory of every method on the first batch, then one round on each other batch."""
        record = {**asdict(group), "methods": list(group.methods), "measured": {}}
        self.results["groups"][group.key] = record
        for name, runner in runners.items():  # also warms up
            given = runner.prepare(batches[0])
            record["measured"][name] = {
                **self._sizes(group, runner, batches[0], given),
                "memory": self._memory(group, runner, given),
                "seconds": [],
                "wall_seconds": [],
            }
        for number, order in enumerate(in_turn(list(runners), group.rounds), 1):
            for name in order:
                seconds, wall = self._time(group, runners[name], batches[number])
                record["measured"][name]["seconds"].append(seconds)
                record["measured"][name]["wall_seconds"].append(wall)
            self.save()
        say(f"{group.key}: {len(runners)} methods, {group.rounds} rounds")

    def _sizes(
        self, group: Group, runner: Runner, batch: dict[str, Any], given: dict[str, Any]
    ) -> dict[str, int]:
        """Return trained parameters, encoder tokens of the first batch, and operations of the encoder."""
        text = given.get("input_ids", batch["input_ids"]).shape[1]
        trained = sum(parameter.numel() for parameter in runner.trained)
        if group.model in PRETRAINED:
            tokens = runner.prompt_length + batch["input_ids"].shape[1]
            return {"trained": trained, "tokens": tokens, "encoder_flops": 0}
        size = SIZES[group.model]
        visual = batch["visual_features"].shape[1:3].numel() if "visual_features" in batch else 0
        tokens = runner.prompt_length + text + visual
        return {
            "trained": trained,
            "tokens": tokens,
            "encoder_flops": encoder_flops(
                batch=group.batch_size,
                tokens=tokens,
                d_model=size.d_model,
                d_inner=size.d_inner,
                d_ff=size.d_ff,
                layers=size.layers,
            ),
        }

    def _step(self, group: Group, runner: Runner) -> Callable[[dict[str, Any]], object]:
        return runner.forward if group.work.startswith("generate") else runner.train_step

    def _memory(self, group: Group, runner: Runner, given: dict[str, Any]) -> int | None:
        """Return the bytes that a step adds: on a GPU the allocator's peak, on a CPU those that are saved."""
        if self.device.type == "cuda":
            self._run(group, runner, given)  # the first call loads kernels and allocates workspaces
            gc.collect()
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            self._run(group, runner, given)
            return torch.cuda.max_memory_allocated(self.device) - before
        self._run(group, runner, given)
        if group.model in PRETRAINED:
            return peak_bytes(lambda: self._run(group, runner, given))
        if group.work.startswith("generate"):
            return None
        known = [tensor for module in runner.modules for tensor in (*module.parameters(), *module.buffers())]
        with self._autocast():
            return saved_bytes(lambda: runner.forward(given), known)

    def _time(self, group: Group, runner: Runner, batch: dict[str, Any]) -> tuple[float, float]:
        """Return the seconds of a step, and the wall-clock seconds.

        On a CPU the first is the processor time of this process, which excludes other programs.
        """
        given = runner.prepare(batch)
        if self.device.type == "cuda" or runner.compiled:
            self._run(group, runner, given)  # a new length costs time once, to choose kernels and allocate
        gc.collect()
        gc.disable()
        self._synchronize()
        cpu, clock = time.process_time(), time.perf_counter()
        self._run(group, runner, given)
        self._synchronize()
        cpu, clock = time.process_time() - cpu, time.perf_counter() - clock
        gc.enable()
        return cpu if self.device.type == "cpu" else clock, clock

    def _run(self, group: Group, runner: Runner, given: dict[str, Any]) -> None:
        with self._autocast():
            self._step(group, runner)(given)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def save(self) -> None:
        """Write bench.json."""
        write_json(self.config.output_dir / RESULTS_FILE, self.results)


def _conditions(results: dict[str, Any]) -> dict[str, Any]:
    """Return the conditions that all results of a file share; the groups may differ."""
    free = ("bars", "models", "shapes")
    options = {name: value for name, value in results["config"].items() if name not in free}
    return {**results["machine"], "dtype": results["dtype"], **options}


def computes_bfloat16(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 in hardware, so that it is faster than full precision."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    known: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return the properties of the machine that the results depend on."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
