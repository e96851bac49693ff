"""From decoded examples to arrays, checked: what an image and a label may be.

Every batch of the library has `"image"`, float32 `[batch, height, width, channels]` in [-1, 1], and
`"label"`, int32 `[batch]` in `[0, num_classes)`. Data that cannot be brought into this form is
refused with the index of the first example that is wrong. Data without labels gets label 0 =
num_classes, which networks read as "no class".
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Num

from genjax_lab.data.image_levels import DatasetInfo

Preprocess = Callable[[np.ndarray], np.ndarray]


def collect_examples(
    examples: Sequence[dict[str, Any]],
    indices: Int[np.ndarray, "batch"],
    info: DatasetInfo,
    preprocess: Preprocess | None,
) -> dict[str, np.ndarray]:
    """Stacks decoded TFDS examples into image and label arrays.

    Args:
        examples: Dicts with `"image"` and, if the data set has classes, `"label"`.
        indices: The examples' indices in the split, for messages.
        info: The data set.
        preprocess: Function of one image, or None.

    Returns:
        `{"image": uint8 or float32 [batch, height, width, channels], "label": int32 [batch]}`.

    Raises:
        ValueError: If the images differ in shape, or an image or label is not allowed.
    """
    images = [example["image"] for example in examples]
    if preprocess is not None:
        images = [np.asarray(preprocess(image)) for image in images]
    first = images[0]
    for image, index in zip(images, indices, strict=True):
        if image.shape != first.shape or image.dtype != first.dtype:
            raise ValueError(
                f"Example {index} of {info.name!r} is {image.dtype} {image.shape} while example "
                f"{indices[0]} is {first.dtype} {first.shape}; a batch needs equal images. Pass "
                "preprocess=functools.partial(center_crop, resolution=...)."
            )
    labels = [example["label"] for example in examples] if info.num_classes else [0] * len(images)
    arrays = {"image": np.stack(images), "label": np.asarray(labels)}
    value_range = None if info.max_value is None else (-1.0, 1.0)
    return check_examples(arrays, indices, info, value_range)


def check_examples(
    arrays: dict[str, np.ndarray],
    indices: Int[np.ndarray, "batch"],
    info: DatasetInfo,
    value_range: tuple[float, float] | None = (-1.0, 1.0),
) -> dict[str, np.ndarray]:
    """Checks images and labels, and brings them to uint8 or float32, and int32.

    Args:
        arrays: `"image"` `[batch, height, width, channels]`, `"label"` `[batch]`, and anything
            else.
        indices: The examples' indices, for messages.
        info: The data set: uint8 pixels must not exceed its `max_value`, labels must be below its
            `num_classes`.
        value_range: The range in which floating point pixels must lie; None for any finite value.

    Returns:
        The arrays, with images uint8 or float32 and labels int32.

    Raises:
        ValueError: Naming the first example that is wrong.
    """
    images = check_images(arrays["image"], indices, info, value_range)
    labels = np.asarray(arrays["label"])
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"Labels of {info.name!r} must be integers [{images.shape[0]}], one for each image, "
            f"got {labels.dtype} {labels.shape}."
        )
    if info.num_classes:
        _require(
            (labels >= 0) & (labels < info.num_classes),
            indices,
            lambda row: (
                f"of {info.name!r} has label {labels[row]}, outside [0, {info.num_classes}). A "
                "split without labels, such as a challenge's test split, cannot be used with "
                "classes."
            ),
        )
    return {**arrays, "image": images, "label": labels.astype(np.int32)}


def check_images(
    images: Num[np.ndarray, "batch height width channels"],
    indices: Int[np.ndarray, "batch"],
    info: DatasetInfo,
    value_range: tuple[float, float] | None,
) -> Num[np.ndarray, "batch height width channels"]:
    """`check_examples` for the images alone."""
    images = np.asarray(images)
    if images.ndim != 4:
        raise ValueError(
            f"Images of {info.name!r} must be [batch, height, width, channels], got shape "
            f"{images.shape}. Grey images need a channel axis of length 1: images[..., None]."
        )
    if images.dtype == np.uint8 and info.max_value is not None:
        _require(
            (images <= info.max_value).all(axis=(1, 2, 3)),
            indices,
            lambda row: (
                f"of {info.name!r} has pixel value {images[row].max()}, above max_value="
                f"{info.max_value}."
            ),
        )
        return images
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(
            f"Images of {info.name!r} must be uint8 or floating point, got {images.dtype} (example "
            f"{indices[0]})."
        )
    images = images.astype(np.float32, copy=False)
    _require(
        np.isfinite(images).all(axis=(1, 2, 3)),
        indices,
        lambda row: f"of {info.name!r} holds NaN or infinite pixels.",
    )
    if value_range is not None:
        low, high = value_range
        _require(
            ((images >= low) & (images <= high)).all(axis=(1, 2, 3)),
            indices,
            lambda row: (
                f"of {info.name!r} has pixels in [{images[row].min():g}, {images[row].max():g}], "
                f"outside [{low:g}, {high:g}]. Give uint8 images, or rescale them."
            ),
        )
    return images


def _require(
    good: np.ndarray, indices: Int[np.ndarray, "batch"], message: Callable[[int], str]
) -> None:
    """Raises about the first example for which `good` is False."""
    if not good.all():
        row = int(np.argmin(good))
        raise ValueError(f"Example {indices[row]} {message(row)}")
