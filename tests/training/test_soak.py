"""The soak script: what it damages, and a short soak."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import write_vqa
from runs import reset_accelerate, with_

from dept_vl.config import DataOptions, RunConfig
from dept_vl.training import checkpoint as state
from dept_vl.training.run import run
from scripts import soak


def test_a_damage_is_found_and_a_difference_too(tmp_path: Path, make_run: Callable[..., RunConfig]) -> None:
    config = make_run(
        DataOptions(data_dir=write_vqa(tmp_path / "vqa"), holdout_images=1),
        checkpoint_every=1,
    )
    found = []
    for name, seed in (("one", 5), ("same", 5), ("other", 6)):
        reset_accelerate()
        run(with_(config, output_dir=tmp_path / name, train={"seed": seed}))
        found.append(soak.left_by(tmp_path / name))
    assert found[0] == found[1] != found[2]
    before, newest = state.checkpoints(tmp_path / "one")
    assert state.newest(tmp_path / "one")[0] == newest
    rng = random.Random(0)
    assert soak.damage(newest, rng)
    assert state.newest(tmp_path / "one")[0] == before
    while soak.damage(newest, rng):
        pass
    assert not any(path.stat().st_size for path in newest.iterdir())
    reset_accelerate()


def test_growth_is_of_what_is_held_after_a_fifth_of_the_steps() -> None:
    opened = soak.held_by(os.getpid())
    assert min(opened["MiB"], opened["files"]) > 0
    with Path(__file__).open():
        assert soak.held_by(os.getpid())["files"] == opened["files"] + 1
    samples = [dict.fromkeys(soak.MOST_GROWTH, float(value)) for value in (0, 50, 90, 95, 93)]
    assert soak.grown(samples) == dict.fromkeys(soak.MOST_GROWTH, 45.0)


@pytest.mark.slow
def test_a_short_soak(tmp_path: Path) -> None:
    options = soak.SoakOptions(minutes=0.5, output_dir=tmp_path / "soak", tiny=True)
    result = soak.soak(options)
    assert result.identical
    assert result.kills + result.terms > 0
    assert json.loads((tmp_path / "soak" / "soak.json").read_text())["starts"] == result.starts
