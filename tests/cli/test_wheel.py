"""An installed wheel is enough: the command outside the clone, in an environment of its own."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def _output(*command: str | Path, cwd: Path) -> str:
    """What a program prints that ends well, without the clone in sight."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # Without hatchling here, pip fetches it into an environment of its own.
    own = ["--no-build-isolation"] if find_spec("hatchling") else []
    _output(sys.executable, "-m", "pip", "wheel", "--no-deps", *own, "-w", folder, ROOT, cwd=folder)
    (built,) = folder.glob("dept_vl-*.whl")
    return built


@pytest.fixture(scope="module")
def bin_folder(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Programs of a new environment with the wheel, which borrows all else from the tests' own."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python]
    _output(*pip, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    # Files *.pth of a folder that is named like this are not read: an editable install stays out.
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    found = _output(python, "-c", "import dept_vl, torch; print(dept_vl.__file__)", cwd=folder)
    assert Path(found.strip()).is_relative_to(packages)
    return folder / "bin"


def test_the_wheel_holds_what_is_not_code(wheel: Path) -> None:
    names = ZipFile(wheel).namelist()
    report = {f"dept_vl/training/report/{name}" for name in ("page.css", "parts.html.j2", "report.html.j2")}
    assert {"dept_vl/py.typed", "dept_vl/adapters/card.md.j2", *report} <= set(names)
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"dept_vl"}


def test_an_installed_wheel_trains_and_answers(
    bin_folder: Path,
    language_folders: dict[str, Path],
    vision_folders: dict[str, Path],
    scenes: Path,
    tmp_path: Path,
) -> None:
    def dept_vl(*arguments: str | Path) -> str:
        return _output(bin_folder / "dept-vl", *arguments, cwd=tmp_path)

    assert "train" in dept_vl("--help")
    dept_vl(
        *("train", "--data_dir", scenes / "vqav2", "--dev_split", "val", "--output_dir", "run"),
        *("--vision", vision_folders["clip"], "--language", language_folders["t5"]),
        *(
            "--prompt_length",
            "3",
            "--rank",
            "2",
            "--reference_prompt_length",
            "6",
            "--max_source_length",
            "16",
        ),
        *("--max_steps", "2", "--eval_every", "2", "--per_device_batch_size", "4", "--test_limit", "5"),
    )
    assert "scores" in json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "<style>" in (tmp_path / "run" / "report.html").read_text()
    image = next((scenes / "vqav2" / "val2014").iterdir())
    answers = dept_vl("predict", image, "what colour is the circle?", "--adapter", "run", "--device", "cpu")
    assert len(answers.splitlines()) == 1
