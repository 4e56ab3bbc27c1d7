"""What a step costs, measured for several configurations in turn."""

from collections.abc import Callable
from pathlib import Path

from helpers import write_vqa
from runs import reset_accelerate, with_

from benchmarks.costs import measure_steps
from dept_vl.config import DataOptions, RunConfig
from dept_vl.training.build import build_model


def test_steps_of_a_task_are_measured_in_turn(tmp_path: Path, make_run: Callable[..., RunConfig]) -> None:
    data = DataOptions(data_dir=write_vqa(tmp_path / "vqa"), holdout_images=1)
    short = make_run(data)
    bare = {"prompt_length": 0, "rank": 0}
    behind = with_(
        short, prompt={"method": "memory", "prompt_length": 0}, backbone={"train_projection": False}
    )
    reset_accelerate()
    costs = measure_steps(
        {
            "nothing": with_(short, prompt=bare, backbone={"train_projection": False}),
            "short": short,
            "long": with_(short, prompt={"prompt_length": 60}),
            "language model": with_(short, prompt=bare, backbone={"train_backbone": True}),
            "memory": behind,
            "memory, encoded": with_(behind, data={"features": "encoded"}),
        },
        rounds=3,
    )
    reset_accelerate()
    assert costs.keys() == {"short", "long", "language model", "memory", "memory, encoded"}
    for cost in costs.values():
        assert len(cost.seconds) == 3
        assert min(cost.seconds) > 0
    assert costs["memory"].bytes == costs["memory, encoded"].bytes  # the encoder keeps nothing either way
    model = build_model(with_(short, prompt=bare, backbone={"train_backbone": True}))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # Activations besides: the whole language model needs them for its weights' gradients too.
    assert costs["language model"].bytes > 12 * trained
    assert costs["long"].bytes > 2 * costs["short"].bytes
