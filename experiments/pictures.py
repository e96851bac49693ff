"""Images as files: a grid of samples under a row of real ones, or plain arrays."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # no display is needed to write a file

import matplotlib.pyplot as plt


def write_images(
    samples: np.ndarray,
    path: str | Path,
    *,
    real: np.ndarray | None = None,
    before: np.ndarray | None = None,
    max_value: int = 255,
    columns: int = 20,
) -> None:
    """Writes uint8 images [num, height, width, channels] to a .png grid or an .npz file ("images").

    Args:
      samples: generated images, values 0 .. max_value.
      path: ends in .png or .npz.
      real: real images for a first row of the grid.
      before: images of another model, to be compared with these: a grid above theirs, or the
        file's entry "before".
      max_value: the value shown as white.
      columns: images in a row.

    Raises:
      ValueError: if the path ends otherwise.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npz":
        others = {} if before is None else {"before": before}
        np.savez_compressed(path, images=samples, **others)
    elif path.suffix == ".png":
        titled = {"real": real, "before": before, "samples": samples}
        sheets = [(title, images) for title, images in titled.items() if images is not None]
        _draw(sheets, path, max_value, columns)
    else:
        raise ValueError(f"path is {str(path)!r}; it must end in .png or .npz")


def tile(images: np.ndarray, columns: int, *, margin: int = 1, fill: int = 0) -> np.ndarray:
    """Arranges images [num, height, width, channels] in rows of `columns`, row by row."""
    num, height, width, channels = images.shape
    rows = -(-num // columns)
    sheet = np.full(
        (rows * (height + margin) - margin, columns * (width + margin) - margin, channels),
        fill,
        images.dtype,
    )
    for index, image in enumerate(images):
        top, left = (index // columns) * (height + margin), (index % columns) * (width + margin)
        sheet[top : top + height, left : left + width] = image
    return sheet


def _draw(
    sheets: Sequence[tuple[str, np.ndarray]], path: Path, max_value: int, columns: int
) -> None:
    tiled = [(title, tile(images, columns, fill=max_value)) for title, images in sheets]
    heights = [sheet.shape[0] for _, sheet in tiled]
    width = 10.0
    scale = width / tiled[0][1].shape[1]
    figure, axes = plt.subplots(
        len(tiled),
        1,
        squeeze=False,
        figsize=(width, scale * sum(heights) + 0.45 * len(tiled)),
        height_ratios=heights,
        layout="constrained",
    )
    for axis, (title, sheet) in zip(axes[:, 0], tiled, strict=True):
        axis.imshow(sheet, cmap="gray", vmin=0, vmax=max_value, interpolation="nearest")
        axis.set_title(title, fontsize=10, loc="left")
        axis.axis("off")
    figure.savefig(path, dpi=150)
    plt.close(figure)
