"""Visual features of a whole set of images, each encoded once.

The tower is frozen, so an image's features never change: where they fit in memory they are computed
before training and looked up from then on.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dept_vl.vision import VisionEncoder


def load_pixels(vision: VisionEncoder, path: Path) -> Float[Tensor, "3 height width"]:
    """Read and preprocess one image file.

    Raises:
        ValueError: If the file is no readable image.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return vision.preprocess([image])[0]
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a readable image: {error}") from error


class _Pixels(Dataset[Tensor]):
    def __init__(self, vision: VisionEncoder, paths: Sequence[Path]) -> None:
        self.vision, self.paths = vision, paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return load_pixels(self.vision, self.paths[index])


class FeatureTable:
    """Features of a set of images in memory, looked up by file.

    Args:
        vision: The frozen encoder.
        paths: The images; each is encoded once however often it is named.
        batch_size: Images encoded at a time.
        num_workers: Processes that read and preprocess images; 0 uses this one.
        progress: Show a bar.
    """

    def __init__(
        self,
        vision: VisionEncoder,
        paths: Iterable[Path],
        *,
        batch_size: int = 64,
        num_workers: int = 0,
        progress: bool = True,
    ) -> None:
        distinct = list(dict.fromkeys(paths))
        self.rows = {path: row for row, path in enumerate(distinct)}
        device = next(vision.parameters()).device
        loader = DataLoader(_Pixels(vision, distinct), batch_size=batch_size, num_workers=num_workers)
        self.features = torch.empty(len(distinct), vision.token_count, vision.d_vision)
        start = 0
        for pixels in tqdm(loader, desc="encoding images", disable=None if progress else True, leave=False):
            stop = start + len(pixels)
            self.features[start:stop] = vision(pixels.to(device)).cpu()
            start = stop

    def __call__(self, images: Sequence[Sequence[Path]]) -> Float[Tensor, "batch images tokens d_vision"]:
        """Features of each example's images."""
        return self.features[torch.tensor([[self.rows[path] for path in paths] for paths in images])]


def table_bytes(vision: VisionEncoder, image_count: int) -> int:
    """Memory that a `FeatureTable` of so many images takes."""
    return image_count * vision.token_count * vision.d_vision * 4
