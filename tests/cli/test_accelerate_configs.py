"""The configurations for accelerate are ones that it reads; no machine for them is at hand."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.utils import DistributedType

FOLDER = Path(__file__).parents[2] / "data" / "accelerate"


@pytest.mark.parametrize(
    ("name", "kind", "machines"),
    [
        ("multi_node", DistributedType.MULTI_GPU, 2),
        ("fsdp", DistributedType.FSDP, 1),
        ("deepspeed_zero3", DistributedType.DEEPSPEED, 1),
    ],
)
def test_accelerate_reads_them(name: str, kind: DistributedType, machines: int) -> None:
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert isinstance(config, ClusterConfig)
    assert (config.distributed_type, config.num_machines) == (kind, machines)
    assert config.num_processes == 8 * machines
    assert not config.use_cpu
