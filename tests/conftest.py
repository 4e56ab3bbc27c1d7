"""Tiny random models of the real classes in a temporary folder, and what most tests start from."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
# Models are so small that threads wait for each other more than they work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import copy
import gc
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import early  # noqa: F401
import jaxtyping

# Before dept_vl: what its modules are the first to import, jaxtyping's hook compiles anew.
import peft  # noqa: F401
import pytest
import torch
import torchvision  # noqa: F401
from PIL import Image
from runs import reset_accelerate, tiny_run
from torch import Tensor
from zoo.models import (  # noqa: F401  tests take them from here
    CORPUS,
    D_MODEL,
    D_VISION,
    IMAGE_SIZE,
    TOWERS,
    VOCABULARY,
    language_model,
    spread_out,
    timm_processor,
    timm_tower,
    tokenizer,
    tower,
)
from zoo.vlms import saved

import dept_vl.models.precision
from dept_vl.config import RunConfig
from dept_vl.models.backbone import Backbone
from dept_vl.models.prompted import IGNORE_INDEX
from dept_vl.models.vision import VisionEncoder
from study_data.official import write_tasks

gc.freeze()
gc.enable()

os.fsync = lambda descriptor: None  # a test has no power cut to survive
LANGUAGES = ("t5", "bart")
DECODERS = ("gpt2", "llama")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with few tests first: these make whole runs, and short files last keep workers even."""
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: tests[item.path])


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> None:
    """Every run collects garbage; it need not look through all that was there before the file."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test draws the same random numbers, alone or in company."""
    torch.manual_seed(0)


@pytest.fixture
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions of a GPU in all bits of float32; torch computes them in TF32 unless told."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models lose time to more threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its state for the life of a process."""
    reset_accelerate()
    yield
    reset_accelerate()


@pytest.fixture(scope="session")
def language_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a T5 and a BART, each with its tokenizer."""
    return _saved(LANGUAGES, tmp_path_factory.mktemp("languages"))


@pytest.fixture(scope="session")
def decoder_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a GPT-2 and a Llama, each with a tokenizer of its kind, which has no padding token."""
    return _saved(DECODERS, tmp_path_factory.mktemp("decoders"))


def _saved(names: tuple[str, ...], root: Path) -> dict[str, Path]:
    torch.manual_seed(0)
    models = {name: language_model(name) for name in names}
    for name, model in models.items():
        spread_out(model).save_pretrained(root / name)
        tokenizer(name).save_pretrained(root / name)
    return {name: root / name for name in names}


@pytest.fixture(scope="session")
def pretrained_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of tiny pretrained models by their names in `zoo.vlms`, each written when first asked for."""
    root = tmp_path_factory.mktemp("pretrained")

    @cache
    def folder_of(name: str) -> Path:
        if name == "smolvlm":
            pytest.importorskip("num2words")  # its processor needs it
        return saved(name, root / name)

    return folder_of


@pytest.fixture(scope="session")
def vision_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of image encoders by the names of `TOWERS`."""
    root = tmp_path_factory.mktemp("towers")
    torch.manual_seed(1)
    for name in TOWERS:
        for part in tower(name):
            part.save_pretrained(root / name)
    return {name: root / name for name in TOWERS}


@pytest.fixture(scope="session")
def _loaded(
    language_folders: dict[str, Path], decoder_folders: dict[str, Path], vision_folders: dict[str, Path]
) -> Callable[[str, str | None, str], Backbone]:
    """Backbones as first loaded; tests get copies."""
    folders = language_folders | decoder_folders
    loaded: dict[tuple[str, str | None, str], Backbone] = {}

    def load(language: str, tower: str | None, visual_position_bias: str) -> Backbone:
        key = (language, tower, visual_position_bias)
        if key not in loaded:
            torch.manual_seed(0)  # whichever test comes first
            loaded[key] = Backbone.from_pretrained(
                language=folders[language],
                vision=None if tower is None else vision_folders[tower],
                visual_position_bias=visual_position_bias,  # type: ignore[arg-type]
            ).eval()
            projection = loaded[key].visual_projection
            if projection is not None:
                # As after training: the order of the images is told.
                torch.nn.init.normal_(projection.image_order.weight)
        return loaded[key]

    return load


@pytest.fixture(scope="session")
def make_backbone(_loaded: Callable[[str, str | None, str], Backbone]) -> Callable[..., Backbone]:
    """Makes a fresh backbone, in evaluation mode, that a test may change as it likes."""

    def make(language: str, tower: str | None = "clip", *, visual_position_bias: str = "none") -> Backbone:
        return copy.deepcopy(_loaded(language, tower, visual_position_bias))

    return make


@pytest.fixture(params=LANGUAGES)
def backbone(request: pytest.FixtureRequest, make_backbone: Callable[..., Backbone]) -> Backbone:
    """T5, then BART, each with the CLIP tower."""
    return make_backbone(request.param)


@pytest.fixture(params=DECODERS)
def kind(request: pytest.FixtureRequest) -> str:
    """GPT-2, then Llama."""
    name: str = request.param
    return name


@pytest.fixture
def t5(make_backbone: Callable[..., Backbone]) -> Backbone:
    """T5 with the CLIP tower."""
    return make_backbone("t5")


@pytest.fixture
def bart(make_backbone: Callable[..., Backbone]) -> Backbone:
    """BART with the CLIP tower."""
    return make_backbone("bart")


@pytest.fixture
def vision(vision_folders: dict[str, Path]) -> VisionEncoder:
    """The CLIP tower."""
    return VisionEncoder.from_pretrained(vision_folders["clip"])


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Images of two splits, which have files of one name."""
    modes = ["RGB", "L", "RGB", "RGBA", "RGB"]
    found = [
        tmp_path / f"{'train' if number < 3 else 'val'}/{number % 3}.png" for number in range(len(modes))
    ]
    for seed, (path, mode) in enumerate(zip(found, modes, strict=True)):
        path.parent.mkdir(exist_ok=True)
        random_image((40 + seed, 36), seed, mode).save(path)
    return found


@pytest.fixture
def images() -> list[Image.Image]:
    """Three different photographs, so to speak."""
    return [random_image(size, seed) for seed, size in enumerate([(40, 36), (64, 48), (32, 32)])]


def random_image(size: tuple[int, int], seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Noise of (width, height)."""
    generator = torch.Generator().manual_seed(seed)
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = torch.randint(256, (size[0] * size[1] * bands,), generator=generator, dtype=torch.uint8)
    return Image.frombytes(mode, size, pixels.numpy().tobytes())


def random_text(
    backbone: Backbone, lengths: tuple[int, ...] = (7, 4, 5), *, side: str = "right", seed: int = 0
) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` of random ordinary tokens, padded on the side named.

    The tokens of a text depend on the seed and its row alone, not on the padding.
    """
    pad: int = backbone.tokenizer.pad_token_id
    input_ids = torch.full((len(lengths), max(lengths)), pad)
    mask = torch.zeros_like(input_ids)
    for row, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(1000 * seed + row)
        start = max(lengths) - length if side == "left" else 0
        input_ids[row, start : start + length] = torch.randint(5, VOCABULARY, (length,), generator=generator)
        mask[row, start : start + length] = 1
    return {"input_ids": input_ids, "attention_mask": mask}


def random_features(backbone: Backbone, batch: int = 3, images: int = 1, *, seed: int = 0) -> Tensor:
    """Visual features, (batch, images, tokens, d_vision), as the tower might give them."""
    assert backbone.vision is not None
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(
        batch, images, backbone.vision.token_count, backbone.vision.d_vision, generator=generator
    )


def random_labels(lengths: tuple[int, ...] = (4, 2, 3), *, seed: int = 0) -> Tensor:
    """Target tokens, `IGNORE_INDEX` on padding."""
    labels = torch.full((len(lengths), max(lengths)), IGNORE_INDEX)
    generator = torch.Generator().manual_seed(seed)
    for row, length in enumerate(lengths):
        labels[row, :length] = torch.randint(5, VOCABULARY, (length,), generator=generator)
    return labels


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Converted annotation files go where pytest cleans up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEPT_VL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders vqav2, gqa, nlvr2 and coco in the official form; a test that damages one copies it first."""
    folder = tmp_path_factory.mktemp("scenes") / "official"
    write_tasks(folder, train=12, val=6, test=6)
    return folder


@pytest.fixture(scope="session")
def make_run(language_folders: dict[str, Path], vision_folders: dict[str, Path]) -> Callable[..., RunConfig]:
    """Makes a run of a few steps of CLIP and T5; see `runs.tiny_run`."""
    return partial(tiny_run, vision=vision_folders["clip"], language=language_folders["t5"])


@pytest.fixture(scope="session", autouse=True)
def _no_trial_of_meteor() -> Iterator[None]:
    """Runs on captions do not start METEOR beforehand, which takes seconds; its own tests do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dept_vl.tasks.metrics.caption.check_meteor", lambda: None)
        yield


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """Graphs since the test began, run as they are; shapes go unchecked: the checker cannot be compiled."""
    monkeypatch.setattr(dept_vl.models.precision, "BACKEND", "eager")
    checking = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    shapes = torch.fx.experimental._config
    with (
        torch._dynamo.config.patch(
            recompile_limit=dept_vl.models.precision.RECOMPILES,
            fail_on_recompile_limit_hit=False,
            skip_nnmodule_hook_guards=True,
            optimize_ddp=True,
        ),
        shapes.patch(use_duck_shape=shapes.use_duck_shape),
    ):
        yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    jaxtyping.config.update("jaxtyping_disable", checking)
