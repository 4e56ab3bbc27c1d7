"""Visual features of a whole set of images, each encoded once.

The tower is frozen, so an image's features never change: where they fit in memory they are computed
before training and looked up from then on.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dept_vl.images import read_image
from dept_vl.vision import VisionEncoder


def load_pixels(vision: VisionEncoder, path: Path) -> Float[Tensor, "3 height width"]:
    """Read and preprocess one image file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no readable image.
    """
    return vision.preprocess([read_image(path)])[0]


class _Pixels(Dataset[tuple[Tensor, str]]):
    """Pixels with an empty message, or zeros with what is wrong with the file."""

    def __init__(self, vision: VisionEncoder, paths: Sequence[Path]) -> None:
        self.vision, self.paths = vision, paths
        self.blank = torch.zeros(vision.pixel_shape)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        try:
            return load_pixels(self.vision, self.paths[index]), ""
        except (ValueError, FileNotFoundError) as error:
            return self.blank, str(error)


class FeatureTable:
    """Features of a set of images in memory, looked up by file.

    Args:
        vision: The frozen encoder.
        paths: The images; each is encoded once however often it is named.
        batch_size: Images encoded at a time.
        num_workers: Processes that read and preprocess images; 0 uses this one.
        progress: Show a bar.

    Attributes:
        errors: What is wrong with the files that could not be read.
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
        self.errors: dict[Path, str] = {}
        device = next(vision.parameters()).device
        loader = DataLoader(_Pixels(vision, distinct), batch_size=batch_size, num_workers=num_workers)
        self.features = torch.empty(len(distinct), vision.token_count, vision.d_vision)
        start = 0
        for pixels, errors in tqdm(
            loader, desc="encoding images", disable=None if progress else True, leave=False
        ):
            stop = start + len(pixels)
            self.features[start:stop] = vision(pixels.to(device)).cpu()
            self.errors |= {distinct[start + place]: error for place, error in enumerate(errors) if error}
            start = stop

    def __call__(self, paths: Sequence[Path]) -> Float[Tensor, "images tokens d_vision"]:
        """Features of one example's images.

        Raises:
            ValueError: If one of them could not be read.
        """
        for path in paths:
            if path in self.errors:
                raise ValueError(self.errors[path])
        return self.features[torch.tensor([self.rows[path] for path in paths])]


def table_bytes(vision: VisionEncoder, image_count: int) -> int:
    """Memory that a `FeatureTable` of so many images takes."""
    return image_count * vision.token_count * vision.d_vision * 4
