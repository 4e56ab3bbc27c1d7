"""Options of the benchmark and of the GPU check."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from dept_vl._utils.options import Options, Positive


@dataclass(frozen=True)
class BenchConfig(Options):
    """Configuration of the benchmark of training steps."""

    output_dir: Path
    """Folder for bench.json, bench.md and bench.png."""
    models: str = "small,base,large"
    """Comma-separated: small, base and large with T5's widths and depths; blip2, florence2 and qwen2.5-vl,
    pretrained models at widths that fit a CPU; tiny is for tests."""
    shapes: str = "vl,glue,mrqa"
    """Comma-separated: vl (20 text and 49 visual tokens), glue (about 60 of text), mrqa (about 300)."""
    methods: str = ""
    """Methods of a training step, such as pt100,dept40,dept40+compiled. Default: those that bars and tables
    need."""
    rounds: Positive = 9
    """Rounds of every group. The long ones (large, mrqa, answers) have a third of them."""
    batch_size: Positive = 8
    """Batch size of a step: half of it at large, a quarter with mrqa, and eight times as many for answers."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Data type of the computation; auto is bfloat16 if the machine supports it in hardware."""
    device: str = ""
    """Device, such as cpu or cuda. Default: a GPU if there is one."""
    backbone_dropout: bool = False
    """Use dropout in the frozen backbone."""
    bars: bool = False
    """Print for each bar the measured ratio and whether the bar is met."""
    tiny: bool = False
    """Test that everything runs: a tiny model, and one round of every method. The figures mean nothing."""


@dataclass(frozen=True)
class GpuCheckConfig(Options):
    """Configuration of the GPU check."""

    output_dir: Path
    """Folder for gpu_check.json, .md and .log. Parts that are finished there are not repeated."""
    minutes: Annotated[float, Field(gt=0)] = 10.0
    """Minutes in total, shared among the parts."""
    dry_run: bool = False
    """Test that every part runs, with the smallest sizes, on any device. The figures mean nothing."""
    parts: tuple[str, ...] = ()
    """Parts to run. Default: all."""
    report_only: bool = False
    """Measure nothing, and write gpu_check.md from the results in output_dir."""
    part: str = ""
    """Measure this part in this process, with all the minutes. The script itself uses this."""
