"""Experiments on images: any Gaussian process, network and sampler of the library by name.

Beside the loop's fields (`genjax_lab.training.default_config`) a config has

  data        name, split, image_shape, num_classes, and what else `make_loader` takes
  process     name in genjax_lab.processes and its arguments
  network     name in genjax_lab.networks and its arguments
  optimizer   learning_rate, warmup_steps, schedule, and Adam's arguments
  sampler     name in genjax_lab.samplers and its arguments
  guidance    scale of classifier-free guidance (1: none), interval of times or None
  evaluation  num_samples, batch_size, ema, metrics, reference_split, features

Nothing is read or compiled before it is needed, so the experiments of data sets that are not at
hand can be built, too.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
import optax

from experiments.pictures import write_images
from genjax_lab import data, evaluation, networks, processes, samplers
from genjax_lab.objectives import denoising
from genjax_lab.parallel import make_mesh
from genjax_lab.training import Experiment, TrainState


def default_config() -> ml_collections.ConfigDict:
    """The fields of this domain with their defaults; a config adds the loop's."""
    return ml_collections.ConfigDict(
        {
            "domain": "images",
            "data": {
                "name": "digits",
                "split": "train",
                "image_shape": (8, 8, 1),
                "num_classes": 10,
            },
            "process": {"name": "edm"},
            "network": {"name": "DiT"},
            "optimizer": {
                "learning_rate": 1e-3,
                "warmup_steps": 100,
                "schedule": "constant",
                "b1": 0.9,
                "b2": 0.999,
                "weight_decay": 0.0,
            },
            "sampler": {"name": "heun", "num_steps": 18},
            "guidance": {"scale": 1.0, "interval": None},
            "evaluation": {
                "num_samples": 5000,
                "batch_size": 500,
                "ema": "ema",
                "metrics": ("frechet",),
                "reference_split": "train",
                "features": "classifier",
                "cache_dir": "~/.cache/genjax_lab",
            },
        }
    )


def build(config: ml_collections.ConfigDict) -> Experiment:
    """Builds the experiment of a config.

    Raises:
      ValueError: if a name is unknown or its arguments do not fit.
    """
    network = make_network(config)
    process = construct(processes, config.process, "process")
    log_variance = None
    if isinstance(network, networks.EDM2UNet):
        log_variance = functools.partial(network.apply, method="logvar")
    judge = _Judge(config, network, process)
    return Experiment(
        init=lambda key: _init(network, config, key),
        objective=denoising(network.apply, process, log_variance=log_variance),
        optimizer=make_optimizer(config),
        batches=lambda state: _batches(config),
        evaluate=judge.evaluate,
        sample=judge.sample,
        write=judge.write,
        project=networks.normalize_weights if isinstance(network, networks.EDM2UNet) else None,
    )


def construct(module: Any, fields: Mapping[str, Any], what: str, *arguments: Any) -> Any:
    """Calls `module.<name>(*arguments, **rest)` for fields {"name": name, **rest}."""
    rest = {key: _hashable(value) for key, value in fields.items()}
    name = rest.pop("name")
    constructor = getattr(module, name, None)
    if name not in module.__all__ or not callable(constructor):
        raise ValueError(f"config.{what}.name is {name!r}; {module.__name__} has {module.__all__}")
    try:
        return constructor(*arguments, **rest)
    except TypeError as error:
        raise ValueError(f"config.{what} does not fit {name}: {error}") from error


def make_network(config: ml_collections.ConfigDict) -> Any:
    """The network of a config, told the number of classes of its data."""
    fields = {"num_classes": config.data.num_classes, **config.network}
    return construct(networks, fields, "network")


def make_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """Adam, or AdamW where there is weight decay, under the schedule of `config.optimizer`.

    Schedules: "constant", "cosine" (to 0 at num_steps), or "inverse_sqrt" (arXiv 2312.02696,
    Eq. 67: rate / sqrt(max(step / decay_steps, 1))); all with linear warm-up.
    """
    fields = dict(config.optimizer)
    rate, warmup = fields.pop("learning_rate"), fields.pop("warmup_steps")
    schedule, decay_steps = fields.pop("schedule"), fields.pop("decay_steps", None)
    if schedule == "cosine":
        main = optax.cosine_decay_schedule(rate, max(config.num_steps - warmup, 1))
    elif schedule == "constant":
        main = optax.constant_schedule(rate)
    elif schedule == "inverse_sqrt":
        if decay_steps is None:
            raise ValueError("config.optimizer.schedule='inverse_sqrt' needs decay_steps")

        def main(step):
            return rate / jax.numpy.sqrt(jax.numpy.maximum((step + warmup) / decay_steps, 1.0))

    else:
        raise ValueError(
            f"config.optimizer.schedule is {schedule!r}; it must be constant, cosine or "
            "inverse_sqrt"
        )
    ramp = optax.linear_schedule(0.0, rate, warmup) if warmup else None
    joined = optax.join_schedules([ramp, main], [warmup]) if warmup else main
    if not fields.get("weight_decay"):
        fields.pop("weight_decay", None)
        return optax.adam(joined, **fields)
    return optax.adamw(joined, **fields)


def _hashable(value: Any) -> Any:
    return tuple(_hashable(item) for item in value) if isinstance(value, list | tuple) else value


def _init(network: Any, config: ml_collections.ConfigDict, key: jax.Array) -> Any:
    shape = tuple(config.data.image_shape)
    labels = np.zeros((1,), np.int32) if config.data.num_classes else None
    return jax.jit(network.init)(
        key, np.zeros((1, *shape), np.float32), np.zeros((1,), np.float32), labels
    )


def _batches(config: ml_collections.ConfigDict) -> Any:
    fields = config.data.to_dict()
    shape, num_classes = tuple(fields.pop("image_shape")), fields.pop("num_classes")
    info = data.dataset_info(fields["name"], fields.get("data_dir"))
    if (info.image_shape, info.num_classes) != (shape, num_classes) and num_classes:
        raise ValueError(
            f"config.data says image_shape={shape} and num_classes={num_classes}; the data set "
            f"{info.name!r} has {info.image_shape} and {info.num_classes}"
        )
    return data.make_loader(
        fields.pop("name"), fields.pop("split"), config.batch_size, config.seed, **fields
    )


class _Judge:
    """Draws, evaluates and writes samples of a train state; what it reads of the data it keeps."""

    def __init__(self, config: ml_collections.ConfigDict, network: Any, process: Any):
        self._config, self._network, self._process = config, network, process
        self._mesh = functools.cache(lambda: make_mesh(**config.mesh))
        self._info = functools.cache(lambda: data.dataset_info(config.data.name))

    def sample(
        self,
        state: TrainState,
        seeds: Sequence[int],
        *,
        key: jax.Array | None = None,
        progress: bool = False,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (seeds, uint8 images); a sample depends on weights, key and its seed only."""
        config = self._config
        denoise = samplers.denoiser(
            self._network, state.variables(config.evaluation.ema), self._process
        )
        if config.guidance.scale != 1:
            denoise = samplers.classifier_free(
                denoise,
                guidance_scale=config.guidance.scale,
                null_condition=np.int32(config.data.num_classes),
                interval=config.guidance.interval,
            )
        num_classes = config.data.num_classes
        drawn = samplers.sample_batches(
            construct(samplers, config.sampler, "sampler", denoise),
            jax.random.key(config.seed) if key is None else key,
            seeds=seeds,
            batch_size=min(config.evaluation.batch_size, _next_multiple(len(seeds), self._mesh())),
            sample_shape=tuple(config.data.image_shape),
            condition_fn=(lambda seeds: data.balanced_labels(seeds, num_classes))
            if num_classes
            else None,
            mesh=self._mesh(),
            progress=progress,
        )
        for part, images in drawn:
            yield part, data.quantize(images, self._info())

    def evaluate(
        self,
        state: TrainState,
        *,
        seeds: Sequence[int] | None = None,
        metrics: Sequence[str] | None = None,
        progress: bool = False,
    ) -> dict[str, float]:
        """Metrics of samples drawn for `seeds` against the reference split."""
        settings = self._config.evaluation
        seeds = range(settings.num_samples) if seeds is None else seeds
        drawn = self.sample(state, seeds, progress=progress)
        return evaluation.evaluate_samples(
            (data.dequantize(images, self._info()) for _, images in drawn),
            self._reference,
            self._extractor,
            quantize=None,
            metrics=tuple(metrics or settings.metrics),
        )

    def write(self, samples: np.ndarray, path: str | Path) -> None:
        """Writes uint8 samples: .npz as arrays, .png as a grid under a row of real images."""
        real = self._real_images[0][: 2 * self._config.data.num_classes or 20]
        write_images(
            samples,
            path,
            real=data.quantize(real, self._info()),
            max_value=self._info().max_value,
        )

    @functools.cached_property
    def _real_images(self) -> tuple[np.ndarray, np.ndarray]:
        settings = self._config.evaluation
        return data.read_split(self._config.data.name, settings.reference_split)

    @functools.cached_property
    def _extractor(self) -> evaluation.FeatureExtractor:
        settings = self._config.evaluation
        if settings.features != "classifier":
            return evaluation.inception_features(settings.features)
        images, labels = self._real_images
        cache_dir = Path(settings.cache_dir).expanduser()
        return evaluation.classifier_features(images, labels, cache_dir=cache_dir)

    @functools.cached_property
    def _reference(self) -> np.ndarray:
        return self._extractor.apply(self._real_images[0])


def _next_multiple(count: int, mesh: jax.sharding.Mesh) -> int:
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-count // parts) * parts
