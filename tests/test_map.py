"""The map in `dept_vl/README.md` is true: its folders, its import rule, and its recipes."""

import ast
import importlib
import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import write_vqa
from runs import with_

import dept_vl
from dept_vl.config import DataOptions, RunConfig
from dept_vl.models.backbone import Backbone
from dept_vl.tasks import TASKS, register_task
from dept_vl.tasks.io.predictions import ExampleId
from dept_vl.tasks.vqav2 import VQAv2
from dept_vl.training.run import run

PACKAGE = Path(dept_vl.__file__).parent
MAP = (PACKAGE / "README.md").read_text()
ROOMS = sorted(path for path in PACKAGE.iterdir() if (path / "__init__.py").is_file())
PACKAGES = sorted(path.parent for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE)


def section(title: str) -> str:
    return re.split(r"^## ", MAP.split(f"\n## {title}\n")[1], flags=re.MULTILINE)[0]


def test_the_top_of_the_package_is_small() -> None:
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    assert modules == {"__init__", "__main__", "api", "config", "presets", "cli"}
    assert len([room for room in ROOMS if not room.name.startswith("_")]) <= 8


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_package_says_what_is_in_it(package: Path) -> None:
    tree = ast.parse((package / "__init__.py").read_text())
    assert ast.get_docstring(tree)
    module = importlib.import_module(".".join(("dept_vl", *package.relative_to(PACKAGE).parts)))
    modules = {path.stem for path in package.glob("*.py")} - {"__init__"}
    modules |= {path.parent.name for path in package.glob("*/__init__.py")}
    if module.__name__ == "dept_vl.tasks":  # its public names are the registry's
        assert all(getattr(module, name) for name in module.__all__)
    else:
        assert set(module.__all__) == modules


def test_the_map_names_every_room_and_links_to_what_exists() -> None:
    for room in ROOMS:
        assert f"[`{room.name}/`]({room.name})" in MAP
    for link in re.findall(r"\]\(([^)]+)\)", MAP):
        assert (PACKAGE / link).exists(), link
    for room, names in re.findall(r"^\| \[`(\w+)/`\]\(\w+\) \| (.*) \|$", MAP, flags=re.MULTILINE):
        for name in re.findall(r"`([a-z_]+)(?:\.py)?`", names):
            assert (PACKAGE / room / f"{name}.py").exists(), f"{room}/{name}"


def test_documents_link_to_what_exists() -> None:
    root = PACKAGE.parent
    documents = [*root.glob("*.md"), *(root / "data").rglob("README.md"), *PACKAGE.rglob("README.md")]
    documents += [root / "scripts" / "README.md", root / "tests" / "README.md"]
    for document in documents:
        for link in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            assert link.startswith("http") or (document.parent / link).exists(), f"{document.name}: {link}"


def test_the_import_rule_is_the_one_that_is_checked() -> None:
    contract = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = [set(re.split(r"\s*[|:]\s*", layer)) for layer in contract["contracts"][0]["layers"]]
    (written,) = re.findall(r"^    (_utils, .*)$", MAP, flags=re.MULTILINE)
    assert layers.pop(0) == {"__main__"}
    assert [set(level.split(", ")) for level in written.split("  <-  ")] == layers[::-1]
    assert len(layers) <= 8


def test_recipes_and_glossary_are_short() -> None:
    for title in ("Add a task", "Add a method", "Add a backbone", "Add a metric"):
        assert 0 < len(section(title).strip().splitlines()) <= 10
    words = re.findall(r"^\| (?!word|-)", section("Words"), flags=re.MULTILINE)
    assert 0 < len(words) <= 20


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_backbone_is_added_as_the_map_says(
    make_run: Callable[..., RunConfig],
    vision_folders: dict[str, Path],
    language_folders: dict[str, Path],
    tmp_path: Path,
) -> None:
    backbone = Backbone.from_pretrained(vision=vision_folders["siglip"], language=language_folders["bart"])
    backbone.save_pretrained(tmp_path / "my-backbone")
    config = make_run(DataOptions(data_dir=write_vqa(tmp_path / "vqa"), holdout_images=1))
    options = {"backbone": tmp_path / "my-backbone", "vision": None, "language": None}
    result = run(with_(config, backbone=options, output_dir=tmp_path / "run"))
    assert result.trainable["visual_projection"] == sum(
        p.numel() for p in backbone.visual_projection.parameters() if p.requires_grad
    )
    assert isinstance(dept_vl.load(tmp_path / "run").answer(write_image(tmp_path), "what colour?"), str)


def write_image(folder: Path) -> Path:
    return next((folder / "vqa" / "val2014").iterdir())


@dataclass(frozen=True)
class WithLength(VQAv2):
    """VQAv2 with the mean length of an answer, in characters, beside the accuracy."""

    name = "vqa-with-length"
    scales = {"length": "characters"}  # noqa: RUF012

    def metrics(self, predictions: Mapping[ExampleId, str]) -> dict[str, float]:
        mean = sum(map(len, predictions.values())) / len(predictions)
        return super().metrics(predictions) | {"length": mean}


@pytest.fixture
def with_length() -> Iterator[None]:
    register_task(WithLength())
    yield
    TASKS.unregister(WithLength.name)


@pytest.mark.usefixtures("fresh_accelerate", "with_length")
def test_a_metric_is_added_as_the_map_says(make_run: Callable[..., RunConfig], tmp_path: Path) -> None:
    data = DataOptions(WithLength.name, write_vqa(tmp_path / "vqa"), holdout_images=1)
    result = run(with_(make_run(data), output_dir=tmp_path / "run"))
    answers = [row["answer"] for row in json.loads((tmp_path / "run" / "predictions.json").read_text())]
    assert result.scores["length"] == pytest.approx(sum(map(len, answers)) / len(answers))
    assert "length (characters)" in (tmp_path / "run" / "summary.md").read_text()
