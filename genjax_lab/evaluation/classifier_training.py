"""Train the classifier behind `classifier_features`, and keep its weights in a file.

One compiled loop: AdamW with a cosine schedule on cross-entropy, batches drawn with replacement,
each image shifted by a few pixels and given Gaussian noise of random strength. Noise keeps the
features from hanging on single pixel values, shifts make them smooth under small motions; both are
what a distance between image sets should see little of. Not meant for large data sets: all images
are held in memory.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Float, Int, Key
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from genjax_lab.networks.classifier import Classifier

# Raised whenever this file changes what is trained, so that old cached weights are not taken.
VERSION = 1


@dataclass(frozen=True)
class ClassifierRecipe:
    """Architecture and training of the classifier.

    Attributes:
        hidden: widths of the layers before the features.
        feature_dim: number of features, the last hidden layer's width.
        num_steps: optimiser steps.
        batch_size: images per step.
        learning_rate: peak of the cosine schedule.
        weight_decay: of AdamW.
        max_shift: largest shift in pixels, drawn uniformly for each axis; edges are repeated.
        max_noise: largest standard deviation of pixel noise, drawn uniformly for each image.
    """

    hidden: tuple[int, ...] = (128,)
    feature_dim: int = 32
    num_steps: int = 2000
    batch_size: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    max_shift: int = 1
    max_noise: float = 0.5


class TrainedClassifier(NamedTuple):
    """The module, its variables, its accuracy on the training images, version and cached file."""

    module: Classifier
    variables: dict
    train_accuracy: float
    version: str
    file: Path | None


def default_recipe(image_shape: tuple[int, int, int]) -> ClassifierRecipe:
    """Return the recipe for images [height, width, channels]: wider where there are more pixels."""
    height, width, channels = image_shape
    if height * width * channels <= 256:
        return ClassifierRecipe()
    return ClassifierRecipe(
        hidden=(512, 256),
        feature_dim=64,
        num_steps=1500,
        learning_rate=1e-3,
        max_shift=max(1, min(height, width) // 12),
    )


def read_or_train(
    images: Float[np.ndarray, "num_images height width channels"],
    labels: Int[np.ndarray, " num_images"],
    *,
    cache_dir: str | Path | None,
    seed: int,
    recipe: ClassifierRecipe | None,
) -> TrainedClassifier:
    """Return the classifier from its cached file, or train it and write the file.

    Raises:
        ValueError: if the cached file is damaged or belongs to something else.
    """
    recipe = default_recipe(images.shape[1:]) if recipe is None else recipe
    module = Classifier(
        num_classes=int(labels.max()) + 1, hidden=recipe.hidden, feature_dim=recipe.feature_dim
    )
    identity = _identity(images, labels, recipe=recipe, seed=seed)
    version = f"v{VERSION}-{identity[:16]}"
    file = None if cache_dir is None else Path(cache_dir) / f"classifier-{version}.safetensors"
    if file is not None and file.exists():
        variables, train_accuracy = _read(file, module, images.shape[1:], identity=identity)
    else:
        key = jax.random.key(seed)
        variables, accuracy = train(key, images, labels, module=module, recipe=recipe)
        train_accuracy = float(accuracy)
        if file is not None:
            _write(file, variables, train_accuracy=train_accuracy, identity=identity)
    return TrainedClassifier(module, variables, train_accuracy, version, file)


def check_labels(labels: ArrayLike, *, num_images: int, name: str) -> Int[np.ndarray, " batch"]:
    """Return labels as int32 after checking their number, type and sign.

    Raises:
        ValueError: if they are not `num_images` integers from 0.
    """
    labels = np.asarray(labels)
    if labels.shape != (num_images,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{name} has shape {labels.shape} and dtype {labels.dtype}; expected {num_images} "
            "integers, one class per image"
        )
    if labels.min() < 0:
        raise ValueError(f"{name} has the class {labels.min()}; expected classes from 0")
    return labels.astype(np.int32)


def augment(
    key: Key[Array, ""],
    images: Float[Array, "batch height width channels"],
    *,
    max_shift: int,
    max_noise: float,
) -> Float[Array, "batch height width channels"]:
    """Return images shifted by whole pixels, edges repeated, with Gaussian noise added.

    Args:
        key: PRNG key.
        images: the batch, in [-1, 1].
        max_shift: shifts are uniform on {-max_shift, ..., max_shift} for each axis and image.
        max_noise: the noise's standard deviation is uniform on [0, max_noise] for each image.
    """
    # One draw of uniforms serves shifts and strength: each generator call adds to compile time.
    uniform_key, noise_key = jax.random.split(key)
    batch, height, width, channels = images.shape
    down, right, strength = jax.random.uniform(uniform_key, (3, batch))
    margin = (max_shift, max_shift)
    padded = jnp.pad(images, ((0, 0), margin, margin, (0, 0)), mode="edge")
    corners = jnp.floor(jnp.stack([down, right], axis=1) * (2 * max_shift + 1)).astype(jnp.int32)
    shifted = jax.vmap(
        lambda image, corner: jax.lax.dynamic_slice(
            image, (corner[0], corner[1], 0), (height, width, channels)
        )
    )(padded, corners)
    noise = jax.random.normal(noise_key, images.shape)
    return shifted + max_noise * strength[:, None, None, None] * noise


@partial(jax.jit, static_argnames=("module", "recipe"))
def train(
    key: Key[Array, ""],
    images: Float[Array, "num_images height width channels"],
    labels: Int[Array, " num_images"],
    *,
    module: Classifier,
    recipe: ClassifierRecipe,
) -> tuple[dict, Float[Array, ""]]:
    """Return trained variables and the accuracy on the images as they are.

    Args:
        key: initialisation, batches and augmentation.
        images: training images in [-1, 1].
        labels: their classes.
        module: the network to train.
        recipe: how to train it.
    """
    optimizer = optax.adamw(
        optax.cosine_decay_schedule(recipe.learning_rate, recipe.num_steps),
        weight_decay=recipe.weight_decay,
    )

    def step(carry, key):
        variables, opt_state = carry
        draw_key, augment_key = jax.random.split(key)
        index = jax.random.randint(draw_key, (recipe.batch_size,), 0, len(images))
        batch = augment(
            augment_key, images[index], max_shift=recipe.max_shift, max_noise=recipe.max_noise
        )

        def loss(variables):
            logits = module.apply(variables, batch)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels[index]).mean()

        gradient = jax.grad(loss)(variables)
        updates, opt_state = optimizer.update(gradient, opt_state, variables)
        return (optax.apply_updates(variables, updates), opt_state), None

    init_key, loop_key = jax.random.split(key)
    variables = module.init(init_key, images[:1])
    (variables, _), _ = jax.lax.scan(
        step,
        (variables, optimizer.init(variables)),
        jax.random.split(loop_key, recipe.num_steps),
    )
    predicted = module.apply(variables, images).argmax(axis=-1)
    return variables, jnp.mean(predicted == labels)


def _identity(
    images: np.ndarray, labels: np.ndarray, *, recipe: ClassifierRecipe, seed: int
) -> str:
    """Return the hash of everything that decides the weights."""
    description = {
        "version": VERSION,
        "recipe": asdict(recipe),
        "seed": seed,
        "shape": images.shape,
    }
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    digest.update(np.ascontiguousarray(images, dtype="<f4").tobytes())
    digest.update(np.ascontiguousarray(labels, dtype="<i4").tobytes())
    return digest.hexdigest()


def _checksum(tensors: Mapping[str, np.ndarray]) -> str:
    """Return the hash of named tensors, which detects altered bytes in a file of valid form."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()


def _write(file: Path, variables: dict, *, train_accuracy: float, identity: str) -> None:
    """Write the weights so that the file appears whole or not at all."""
    tensors = {
        "/".join(path): np.asarray(value)
        for path, value in flax.traverse_util.flatten_dict(variables).items()
    }
    metadata = {
        "identity": identity,
        "checksum": _checksum(tensors),
        "train_accuracy": repr(train_accuracy),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.stem}-")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(save(tensors, metadata=metadata))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _read(
    file: Path, module: Classifier, image_shape: tuple[int, int, int], *, identity: str
) -> tuple[dict, float]:
    """Return variables and training accuracy from a cached file after checking all of it."""
    remedy = f"delete {file} and it is trained again"
    try:
        with safe_open(file, framework="numpy") as stream:
            metadata = stream.metadata() or {}
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"cache_dir has the damaged file {file} ({error}); {remedy}") from error
    if metadata.get("identity") != identity:
        raise ValueError(
            f"cache_dir has the file {file}, which was not made from these images, labels, recipe "
            f"and seed; {remedy}"
        )
    if metadata.get("checksum") != _checksum(tensors):
        raise ValueError(f"cache_dir has the damaged file {file} (wrong checksum); {remedy}")
    variables = flax.traverse_util.unflatten_dict(
        {tuple(name.split("/")): jnp.asarray(value) for name, value in tensors.items()}
    )
    example = jnp.zeros((1, *image_shape))
    expected = jax.eval_shape(module.init, jax.random.key(0), example)
    shapes = [jax.tree.map(lambda leaf: leaf.shape, tree) for tree in (variables, expected)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"cache_dir has the file {file} of another architecture; {remedy}")
    return variables, float(metadata["train_accuracy"])
