"""Random damages to caches and features: the same values, or one clear error."""

from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pytest
import torch
from accelerate import Accelerator
from runs import damage

from dept_vl.data.feature_store import open_features, write_features
from dept_vl.models.vision import VisionEncoder
from dept_vl.tasks.io.rows import Rows, convert

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

SCHEMA = pa.schema({"id": pa.int64(), "kind": pa.string(), "answers": pa.list_(pa.string())})
RECORDS = [{"id": n, "kind": "abc"[n % 3], "answers": [f"a{n}"] * (n % 4)} for n in range(200)]


@pytest.mark.parametrize("count", [25, pytest.param(500, marks=pytest.mark.slow)])
def test_no_damage_gives_other_values(
    vision: VisionEncoder, paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setenv("DEPT_VL_CACHE", str(tmp_path / "cache"))
    source, folder, root = tmp_path / "source.json", tmp_path / "features", paths[0].parents[1]
    source.write_text("{}")
    (cache,) = convert("damaged", [source], SCHEMA, iter(RECORDS), unique="id").files
    options: dict[str, Any] = {"dtype": "float32", "shard_images": 2, "batch_size": 2}
    write_features(vision, root, paths, folder, Accelerator(cpu=True), **options)
    examples = [[path] for path in paths]
    features = open_features(vision, root, paths, folder)(examples)
    files = [cache, *sorted(folder.iterdir())]
    whole = {path: path.read_bytes() for path in files}
    found = 0
    for number in range(count):
        random = Random(number)
        path = random.choice(files)
        damage(path, [other for other in files if other != path], random)
        problem = ""
        try:
            if path == cache:
                assert list(Rows.open([cache])) == RECORDS
            else:
                assert torch.equal(open_features(vision, root, paths, folder)(examples), features)
        except (ValueError, FileNotFoundError) as error:
            problem = str(error)
        assert not problem or str(path if path == cache else folder) in problem, number
        found += bool(problem)
        assert list(convert("damaged", [source], SCHEMA, iter(RECORDS), unique="id")) == RECORDS
        for place, content in whole.items():
            place.write_bytes(content)
    assert found > 0.8 * count
