"""Feature extractors: from images to the vectors on which distances between sets are computed.

Two kinds. `classifier_features` trains a small classifier on the data set itself, which is what
small images such as 8x8 digits need, for which Inception features mean nothing; its distances can
be compared only with others made from the same weights, so the weights are cached in a file that
is named after everything that went into them. `inception_features` reads the public Inception
weights, for distances that can be compared with published ones (arXiv 1706.08500).

An extractor expects images in [-1, 1] that are quantised exactly as the data set is: a classifier
tells real-valued pixels from quantised ones, and the distance with them.
"""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from genjax_lab.evaluation.classifier_training import (
    ClassifierRecipe,
    check_labels,
    read_or_train,
)
from genjax_lab.networks.classifier import Classifier
from genjax_lab.networks.inception import FEATURE_DIM, InceptionV3, preprocess
from genjax_lab.pretrained import inception


class FeatureExtractor(NamedTuple):
    """A fixed function from images to feature vectors.

    Attributes:
        apply: images [num_images, height, width, channels] in [-1, 1], quantised as the data, any
            number of them -> float32 features [num_images, dim]. Raises ValueError for images of
            another shape, outside [-1, 1] or not finite.
        probabilities: features [num_images, dim] -> class probabilities [num_images, num_classes].
        dim: length of a feature vector.
        name: which kind of features.
        version: identifies the weights; distances of different versions must not be compared.
        metadata: what is known about the network, such as its accuracies.
    """

    apply: Callable[[ArrayLike], Float[np.ndarray, "num_images dim"]]
    probabilities: Callable[[ArrayLike], Float[np.ndarray, "num_images num_classes"]]
    dim: int
    name: str
    version: str
    metadata: dict[str, Any]


def classifier_features(
    images: Float[ArrayLike, "num_images height width channels"],
    labels: Int[ArrayLike, " num_images"],
    *,
    cache_dir: str | Path | None,
    seed: int = 0,
    recipe: ClassifierRecipe | None = None,
    held_out: tuple[ArrayLike, ArrayLike] | None = None,
) -> FeatureExtractor:
    """Return the last hidden layer of a small classifier trained on these images.

    Training is deterministic in (images, labels, recipe, seed) on one kind of machine and takes
    seconds (8x8 digits) to under a minute (5000 images of 28x28) on a CPU. Rounding differs between
    kinds of machine, so carry the cached file along where numbers are to be compared.

    Args:
        images: the whole data set in [-1, 1], the same that samples are compared with.
        labels: its classes, integers from 0.
        cache_dir: directory of the cached weights, made if needed; None trains anew each time. The
            file's name holds a version and a hash of architecture, recipe, data and seed.
        seed: initialisation, batches and augmentation.
        recipe: architecture and training; None chooses by the image size.
        held_out: images and labels that are not among `images`, on which the accuracy is measured;
            they do not influence the weights.

    Returns:
        The extractor. `metadata` holds `train_accuracy`, `held_out_accuracy` (None without
        `held_out`), `num_classes`, and `file`, the cached file or None.

    Raises:
        ValueError: if images or labels have wrong shapes, values or counts; or if the cached file
            is damaged or belongs to something else (the message names the file to delete).
    """
    images = _checked_images(images, name="images")
    labels = check_labels(labels, num_images=len(images), name="labels")
    if held_out is not None:
        held_out_images = _checked_images(held_out[0], name="held_out[0]", shape=images.shape[1:])
        held_out_labels = check_labels(
            held_out[1], num_images=len(held_out_images), name="held_out[1]"
        )
    trained = read_or_train(images, labels, cache_dir=cache_dir, seed=seed, recipe=recipe)
    module, variables = trained.module, trained.variables

    apply = _batched(
        partial(_classifier_features, module, variables), batch_size=512, shape=images.shape[1:]
    )
    probabilities = _in_batches(
        partial(_classifier_probabilities, module, variables), batch_size=512
    )

    held_out_accuracy = None
    if held_out is not None:
        predicted = probabilities(apply(held_out_images)).argmax(axis=-1)
        held_out_accuracy = float(np.mean(predicted == held_out_labels))
    return FeatureExtractor(
        apply=apply,
        probabilities=probabilities,
        dim=module.feature_dim,
        name="classifier",
        version=trained.version,
        metadata={
            "num_classes": module.num_classes,
            "train_accuracy": trained.train_accuracy,
            "held_out_accuracy": held_out_accuracy,
            "file": None if trained.file is None else str(trained.file),
        },
    )


def inception_features(path: str | Path, *, batch_size: int = 32) -> FeatureExtractor:
    """Return the 2048 pooled Inception features of which published Frechet distances are made.

    Images of any size, grey or RGB, are resized and scaled as in the original graph.
    `probabilities` leaves out the last layer's bias, as the original Inception score's code does.

    Args:
        path: .pth, .safetensors or .npz file of the 2015-12-05 weights; see
            `genjax_lab.pretrained.inception`.
        batch_size: images per evaluation of the network.

    Raises:
        ValueError: if the file cannot be read or is not this network.
        FileNotFoundError: if there is no such file.
    """
    module, variables = inception.from_state_dict(inception.read_state_dict(path))
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    kernel = variables["params"]["fc"]["kernel"]

    return FeatureExtractor(
        apply=_batched(
            partial(_inception_features, module, variables), batch_size=batch_size, shape=None
        ),
        probabilities=_in_batches(partial(_inception_probabilities, kernel), batch_size=512),
        dim=FEATURE_DIM,
        name="inception-2015-12-05",
        version=digest[:16],
        metadata={"file": str(path), "num_classes": kernel.shape[-1]},
    )


# Compiled once per architecture and shape, not once per set of weights.
@partial(jax.jit, static_argnums=0)
def _classifier_features(module: Classifier, variables: dict, images: Array) -> Array:
    return module.apply(variables, images, method="features")


@partial(jax.jit, static_argnums=0)
def _classifier_probabilities(module: Classifier, variables: dict, features: Array) -> Array:
    return jax.nn.softmax(module.apply(variables, features, method="logits"))


@partial(jax.jit, static_argnums=0)
def _inception_features(module: InceptionV3, variables: dict, images: Array) -> Array:
    return module.apply(variables, preprocess(images)).features


@jax.jit
def _inception_probabilities(kernel: Array, features: Array) -> Array:
    return jax.nn.softmax(jnp.matmul(features, kernel, precision=jax.lax.Precision.HIGHEST))


def _batched(
    function: Callable[[Array], Array], *, batch_size: int, shape: tuple[int, ...] | None
) -> Callable[[ArrayLike], np.ndarray]:
    """Check images and apply `function` in batches of one size, so that it compiles once."""
    in_batches = _in_batches(function, batch_size=batch_size)

    def apply(images: ArrayLike) -> np.ndarray:
        return in_batches(_checked_images(images, name="images", shape=shape))

    return apply


def _in_batches(
    function: Callable[[Array], Array], *, batch_size: int
) -> Callable[[ArrayLike], np.ndarray]:
    """Apply `function` to rows in batches of `batch_size`, the last one filled up with zeros."""

    def apply(rows: ArrayLike) -> np.ndarray:
        rows = np.asarray(rows, dtype=np.float32)
        if len(rows) == 0:
            raise ValueError("images is empty; expected at least one")
        outputs = []
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            padding = [(0, batch_size - len(batch))] + [(0, 0)] * (rows.ndim - 1)
            outputs.append(np.asarray(function(np.pad(batch, padding)))[: len(batch)])
        return np.concatenate(outputs)

    return apply


def _checked_images(
    images: ArrayLike, *, name: str, shape: tuple[int, ...] | None = None
) -> Float[np.ndarray, "num_images height width channels"]:
    """Return images as float32 after checking shape, finiteness and range."""
    images = np.asarray(images)
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(
            f"{name} has shape {images.shape}; expected [num_images, height, width, channels] with "
            "at least one image"
        )
    if shape is not None and images.shape[1:] != shape:
        raise ValueError(
            f"{name} has images of shape {images.shape[1:]}; these features are of images of shape "
            f"{shape}"
        )
    images = images.astype(np.float32)
    if not np.isfinite(images).all():
        raise ValueError(f"{name} has NaN or infinite pixels; expected finite values in [-1, 1]")
    if np.abs(images).max() > 1 + 1e-5:
        raise ValueError(
            f"{name} has values in [{images.min():.4g}, {images.max():.4g}]; expected [-1, 1], "
            "quantised as the data"
        )
    return images
