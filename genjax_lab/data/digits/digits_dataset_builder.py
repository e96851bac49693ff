"""scikit-learn's digits as a TFDS data set: 1797 handwritten digits, 8x8 pixels, 17 grey levels.

The pixels are stored as they come, integers 0..16, and the data set's metadata says so
(`max_value`), so that samples can be rounded to exactly these levels. The split is
`stratified_split`'s: 1442 examples for training and 355 for testing.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from genjax_lab.data.stratified_split import stratified_split


class Builder(tfds.core.GeneratorBasedBuilder):
    """Builds `digits`; registered with TFDS under that name once this module is imported."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: dict[str, str] = {"1.0.0": "First release."}  # noqa: RUF012 - TFDS's own form

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://scikit-learn.org/stable/modules/generated/sklearn.datasets.load_digits.html",
            metadata=tfds.core.MetadataDict(max_value=16),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        from sklearn.datasets import load_digits  # the package is large; only preparing needs it

        pixels, labels = load_digits(return_X_y=True)
        images = pixels.reshape(-1, 8, 8).astype(np.uint8)
        return {
            split: self._generate_examples(images[indices], labels[indices])
            for split, indices in stratified_split(labels).items()
        }

    def _generate_examples(self, images: np.ndarray, labels: np.ndarray) -> Iterator:
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            # A PIL image is encoded by PIL; TFDS would encode an array by TensorFlow.
            yield index, {"image": Image.fromarray(image), "label": int(label)}
