"""Image transforms for the input pipeline, in NumPy and PIL.

Two kinds, for two arguments of `make_loader`. `preprocess` takes one uint8 image and returns one,
deterministically: `center_crop`, with which images of different sizes become equal. `transforms`
take a finished float batch together with random bits, one 64-bit word for each example, and change
it at
random: `horizontal_flip`.
"""

import numpy as np
from jaxtyping import Float32, UInt8, UInt64
from PIL import Image

Batch = dict[str, np.ndarray]


def horizontal_flip(batch: Batch, bits: UInt64[np.ndarray, "batch"]) -> Batch:
    """Mirrors each image left to right with probability one half.

    Args:
        batch: A batch with `"image"` float32 `[batch, height, width, channels]`.
        bits: Random bits, `[batch]`; the lowest decides.

    Returns:
        The batch with a new `"image"`; labels and other entries are untouched.
    """
    images: Float32[np.ndarray, "batch height width channels"] = batch["image"]
    flip = (bits & np.uint64(1)).astype(bool)[:, None, None, None]
    return {**batch, "image": np.where(flip, images[:, :, ::-1], images)}


def center_crop(
    image: UInt8[np.ndarray, "height width channels"], *, resolution: int
) -> UInt8[np.ndarray, "resolution resolution channels"]:
    """Scales the shorter side to `resolution` and cuts out the central square.

    The way of ADM (arXiv:2105.05233, public code), which ImageNet results are compared under:
    halved with a box filter as long as the shorter side is at least twice the resolution, then
    scaled bicubically, then cropped.

    Args:
        image: uint8 image `[height, width, channels]` with 1 or 3 channels.
        resolution: Side of the result in pixels.

    Returns:
        uint8 `[resolution, resolution, channels]`.

    Raises:
        ValueError: If the image is not such an array, or `resolution < 1`.
    """
    if resolution < 1:
        raise ValueError(f"resolution must be at least 1, got {resolution}.")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] not in (1, 3):
        raise ValueError(
            "image must be uint8 [height, width, channels] with 1 or 3 channels, got "
            f"{image.dtype} {image.shape}."
        )
    channels = image.shape[-1]
    picture = Image.fromarray(image[..., 0] if channels == 1 else image)
    while min(picture.size) >= 2 * resolution:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = resolution / min(picture.size)
    picture = picture.resize(
        (round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC
    )
    left, top = (picture.width - resolution) // 2, (picture.height - resolution) // 2
    picture = picture.crop((left, top, left + resolution, top + resolution))
    return np.asarray(picture).reshape(resolution, resolution, channels)
