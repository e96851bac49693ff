"""Images of a config's data set: their batches, and how samples are drawn, judged and shown.

What a model of images is, diffusion or tokens, only its `draw` knows.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from experiments.pictures import write_images
from genjax_lab import data, evaluation
from genjax_lab.parallel import make_mesh, process_share
from genjax_lab.training import TrainState

# (state, seeds, *, batch_size, mesh, progress) -> (seeds, float images or latents), in order; each
# depends on the state and on its own seed only.
Draw = Callable[..., Iterator[tuple[np.ndarray, np.ndarray]]]

# Keeps the keys of samples apart from those of training, which are children of the same seed.
_SAMPLING_STREAM = 2**31


def default_data() -> dict[str, Any]:
    """The fields of a config's "data" with their defaults."""
    return {"name": "digits", "split": "train", "image_shape": (8, 8, 1), "num_classes": 10}


def default_evaluation() -> dict[str, Any]:
    """The fields of a config's "evaluation" with their defaults."""
    return {
        "num_samples": 5000,
        "batch_size": 500,
        "ema": "ema",
        "metrics": ("frechet",),
        "reference_split": "train",
        "features": "classifier",
        "cache_dir": "~/.cache/genjax_lab",
    }


def make_batches(
    config: ml_collections.ConfigDict,
    split: str,
    batch_size: int,
    *,
    seed: int | None = None,
    **options: Any,
) -> data.Loader:
    """The batches of a split; checks that the data are those that the network is built for.

    Args:
      config: of the experiment.
      split: of its data set.
      batch_size: rows of the global batch.
      seed: of the order; that of the config if None.
      **options: what else `make_loader` takes.
    """
    seed = config.seed if seed is None else seed
    fields = config.data.to_dict()
    shape, num_classes = tuple(fields.pop("image_shape")), fields.pop("num_classes")
    resolution, flip = fields.pop("resolution", None), fields.pop("flip", False)
    name = fields.pop("name")
    fields.pop("split")
    info = data.dataset_info(name, fields.get("data_dir"))
    found = info.image_shape if resolution is None else shape
    if found != shape or (num_classes and info.num_classes != num_classes):
        raise ValueError(
            f"config.data says image_shape={shape} and num_classes={num_classes}; the data set "
            f"{info.name!r} has {info.image_shape} and {info.num_classes}"
        )
    crop = functools.partial(data.center_crop, resolution=resolution) if resolution else None
    fields["transforms"] = (data.horizontal_flip,) if flip else ()
    return data.make_loader(name, split, batch_size, seed, preprocess=crop, **(fields | options))


def training_batches(config: ml_collections.ConfigDict) -> data.Loader:
    """This process's part of the batches of the training split."""
    index, count = process_share(make_mesh(**config.mesh))
    return make_batches(
        config, config.data.split, config.batch_size, shard_index=index, shard_count=count
    )


def sampling_key(config: ml_collections.ConfigDict) -> jax.Array:
    """The key of a config's samples."""
    return jax.random.fold_in(jax.random.key(config.seed), _SAMPLING_STREAM)


def labels_of_seeds(
    config: ml_collections.ConfigDict,
) -> Callable[[Sequence[int]], np.ndarray] | None:
    """Seeds -> classes, as many of each as can be; None where the data have none."""
    num_classes = config.data.num_classes
    return (lambda seeds: data.balanced_labels(seeds, num_classes)) if num_classes else None


def replicated(variables: Any, mesh: jax.sharding.Mesh) -> Any:
    """Weights on all devices, put there once and not with every batch of samples."""
    if jax.process_count() > 1:
        return variables
    return jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))


class ImageJudge:
    """Draws, evaluates and writes samples of a train state; what it reads of the data it keeps."""

    def __init__(self, config: ml_collections.ConfigDict, draw: Draw):
        """Keeps its arguments.

        Args:
          config: with the fields "data", "evaluation" and "mesh".
          draw: what draws samples of a train state.
        """
        self._config, self._draw = config, draw
        self._mesh = functools.cache(lambda: make_mesh(**config.mesh))
        self._info = functools.cache(
            lambda: data.dataset_info(config.data.name, config.data.get("data_dir"))
        )

    def sample(
        self,
        state: TrainState,
        seeds: Sequence[int],
        *,
        progress: bool = False,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (seeds, uint8 images, or float latents); each depends on its own seed only."""
        batch_size = min(self._config.evaluation.batch_size, len(seeds))
        drawn = self._draw(
            state,
            seeds,
            batch_size=_next_multiple(batch_size, self._mesh()),
            mesh=self._mesh(),
            progress=progress,
        )
        for part, images in drawn:
            yield part, images if self._is_latent else data.quantize(images, self._info())

    @property
    def _is_latent(self) -> bool:
        return self._info().max_value is None

    def evaluate(
        self,
        state: TrainState,
        *,
        seeds: Sequence[int] | None = None,
        metrics: Sequence[str] | None = None,
        progress: bool = False,
    ) -> dict[str, float]:
        """Metrics of samples drawn for `seeds` against the reference split."""
        if self._is_latent:
            raise ValueError(
                f"data set {self._config.data.name!r} holds latents; draw samples as .npz and "
                "evaluate their decoded images"
            )
        settings = self._config.evaluation
        seeds = range(settings.num_samples) if seeds is None else seeds
        metrics = tuple(metrics or settings.metrics)
        drawn = self.sample(state, seeds, progress=progress)
        return evaluation.evaluate_samples(
            (data.dequantize(images, self._info()) for _, images in drawn),
            self._reference if "precision_recall" in metrics else self._statistics,
            self._extractor,
            quantize=None,
            metrics=metrics,
        )

    def write(
        self, samples: np.ndarray, path: str | Path, *, before: np.ndarray | None = None
    ) -> None:
        """Writes samples: .npz as arrays, .png as a grid under a row of real images.

        With `before`, samples of another model, both are there to be compared.
        """
        if self._is_latent and Path(path).suffix != ".npz":
            raise ValueError(f"path is {str(path)!r}; latents are written as .npz")
        if self._is_latent:
            write_images(samples, path, before=before)
            return
        real = next(iter(self._real_batches()))["image"][:20]
        info = self._info()
        write_images(
            samples,
            path,
            real=data.quantize(real, info),
            before=before,
            max_value=info.max_value,
        )

    def _real_batches(self) -> Iterator[dict[str, np.ndarray]]:
        """The reference split once, in order."""
        settings = self._config.evaluation
        return make_batches(
            self._config,
            settings.reference_split,
            settings.batch_size,
            num_epochs=1,
            shuffle=False,
            drop_remainder=False,
            transforms=(),
            shard_index=0,
            shard_count=1,
        )

    @functools.cached_property
    def _extractor(self) -> evaluation.FeatureExtractor:
        settings = self._config.evaluation
        if settings.features != "classifier":
            return evaluation.inception_features(settings.features)
        batches = list(self._real_batches())
        images, labels = (
            np.concatenate([batch[name] for batch in batches]) for name in ("image", "label")
        )
        cache_dir = Path(settings.cache_dir).expanduser()
        return evaluation.classifier_features(images, labels, cache_dir=cache_dir)

    @functools.cached_property
    def _statistics(self) -> evaluation.FeatureStatistics:
        statistics = evaluation.FeatureStatistics.empty(self._extractor.dim)
        for batch in self._real_batches():
            statistics = statistics.update(self._extractor.apply(batch["image"]))
        return statistics

    @functools.cached_property
    def _reference(self) -> np.ndarray:
        images = (batch["image"] for batch in self._real_batches())
        return evaluation.extract_features(images, self._extractor, quantize=None)


def _next_multiple(count: int, mesh: jax.sharding.Mesh) -> int:
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-count // parts) * parts
