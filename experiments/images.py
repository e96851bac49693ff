"""Experiments on images: any Gaussian process, network and sampler of the library by name.

Beside the loop's fields (`genjax_lab.training.default_config`) a config has

  data        name, split, image_shape, num_classes; flip; resolution (crops and resizes), and what
              else `make_loader` takes
  process     name in genjax_lab.processes and its arguments
  network     name in genjax_lab.networks and its arguments
  augmentation
              probability of each of EDM's transforms, which need a network with augment_dim=9;
              None for no augmentation
  optimizer   learning_rate, warmup_steps, schedule, and Adam's arguments
  sampler     name in genjax_lab.samplers and its arguments
  guidance    scale (1: none) and interval of times or None of classifier-free guidance; or of
              autoguidance, where guide is the path of a worse model's run (guide_step: which step)
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
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections.config_dict import placeholder

from experiments.pictures import write_images
from genjax_lab import data, evaluation, networks, processes, samplers
from genjax_lab.objectives import Objective, augmented, denoising, edm_augmentation
from genjax_lab.objectives.augmentation import NUM_AUGMENT_LABELS
from genjax_lab.parallel import make_mesh, process_share
from genjax_lab.training import Experiment, TrainState, restore

# Keeps the keys of samples apart from those of training, which are children of the same seed.
_SAMPLING_STREAM = 2**31


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
            "augmentation": placeholder(float),
            "optimizer": {
                "learning_rate": 1e-3,
                "warmup_steps": 100,
                "schedule": "constant",
                "decay_steps": placeholder(int),
                "b1": 0.9,
                "b2": 0.999,
                "weight_decay": 0.0,
            },
            "sampler": {"name": "heun", "num_steps": 18},
            "guidance": {
                "scale": 1.0,
                "interval": placeholder(tuple),
                "guide": placeholder(str),
                "guide_step": placeholder(int),
            },
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
    judge = _Judge(config, network, process)
    return Experiment(
        init=lambda key: _init(network, config, key),
        objective=make_objective(config, network, process),
        optimizer=make_optimizer(config),
        batches=lambda state: _training_batches(config),
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


def make_objective(config: ml_collections.ConfigDict, network: Any, process: Any) -> Objective:
    """Denoising, with EDM2's uncertainty head where there is one, under `config.augmentation`."""
    log_variance = None
    if isinstance(network, networks.EDM2UNet):
        log_variance = functools.partial(network.apply, method="logvar")
    objective = denoising(network.apply, process, log_variance=log_variance)
    if not config.data.num_classes:
        objective = without_labels(objective)
    probability = config.get("augmentation")
    if probability is None:
        return objective
    if getattr(network, "augment_dim", 0) != NUM_AUGMENT_LABELS:
        raise ValueError(
            f"config.augmentation={probability} needs a network that is told of it: one "
            f"with augment_dim={NUM_AUGMENT_LABELS}, such as SongUNet; got {config.network.name} "
            f"with augment_dim={getattr(network, 'augment_dim', 'absent')}"
        )
    return augmented(objective, edm_augmentation(probability))


def make_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """Adam, or AdamW where there is weight decay, under the schedule of `config.optimizer`.

    Schedules: "constant", "cosine" (to 0 at decay_steps), or "inverse_sqrt" (arXiv 2312.02696,
    Eq. 67: rate / sqrt(max(step / decay_steps, 1))); all with linear warm-up.
    """
    fields = dict(config.optimizer)
    rate, warmup = fields.pop("learning_rate"), fields.pop("warmup_steps")
    schedule, decay_steps = fields.pop("schedule"), fields.pop("decay_steps", None)
    if schedule != "constant" and decay_steps is None:
        raise ValueError(f"config.optimizer.schedule={schedule!r} needs decay_steps")
    if schedule == "cosine":
        main = optax.cosine_decay_schedule(rate, max(decay_steps - warmup, 1))
    elif schedule == "constant":
        main = optax.constant_schedule(rate)
    elif schedule == "inverse_sqrt":

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


def without_labels(objective: Objective) -> Objective:
    """An unconditional network takes none, but every batch of the loader has them."""

    def unconditional(variables, batch, key):
        rest = {n: v for n, v in batch.items() if n not in ("label", "fake_label")}
        return objective(variables, rest, key)

    return unconditional


def _hashable(value: Any) -> Any:
    return tuple(_hashable(item) for item in value) if isinstance(value, list | tuple) else value


def _init(network: Any, config: ml_collections.ConfigDict, key: jax.Array) -> Any:
    shape = tuple(config.data.image_shape)
    labels = np.zeros((1,), np.int32) if config.data.num_classes else None
    return jax.jit(network.init)(
        key, np.zeros((1, *shape), np.float32), np.zeros((1,), np.float32), labels
    )


def _training_batches(config: ml_collections.ConfigDict) -> Any:
    index, count = process_share(make_mesh(**config.mesh))
    return make_batches(
        config, config.data.split, config.batch_size, shard_index=index, shard_count=count
    )


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


class _Judge:
    """Draws, evaluates and writes samples of a train state; what it reads of the data it keeps."""

    def __init__(self, config: ml_collections.ConfigDict, network: Any, process: Any):
        self._config, self._network, self._process = config, network, process
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
        config, denoise = self._config, self._denoiser(state)
        num_classes = config.data.num_classes
        drawn = samplers.sample_batches(
            construct(samplers, config.sampler, "sampler", denoise),
            jax.random.fold_in(jax.random.key(config.seed), _SAMPLING_STREAM),
            seeds=seeds,
            batch_size=_next_multiple(min(config.evaluation.batch_size, len(seeds)), self._mesh()),
            sample_shape=tuple(config.data.image_shape),
            condition_fn=(lambda seeds: data.balanced_labels(seeds, num_classes))
            if num_classes
            else None,
            mesh=self._mesh(),
            progress=progress,
        )
        for part, images in drawn:
            yield part, images if self._is_latent else data.quantize(images, self._info())

    def _denoiser(self, state: TrainState) -> samplers.Denoiser:
        """The network under the guidance of the config."""
        guidance = self._config.guidance
        denoise = self._unguided(
            self._network, state.variables(self._config.evaluation.ema), self._process
        )
        if guidance.scale == 1:
            return denoise
        if guidance.get("guide"):
            return samplers.autoguidance(
                denoise,
                self._guide,
                guidance_scale=guidance.scale,
                interval=guidance.interval,
            )
        return samplers.classifier_free(
            denoise,
            guidance_scale=guidance.scale,
            null_condition=np.int32(self._config.data.num_classes),
            interval=guidance.interval,
        )

    @functools.cached_property
    def _guide(self) -> samplers.Denoiser:
        guidance = self._config.guidance
        restored = restore(guidance.guide, guidance.get("guide_step"))
        config = ml_collections.ConfigDict(restored.config)
        return self._unguided(
            make_network(config),
            restored.state.variables(config.evaluation.ema),
            construct(processes, config.process, "process"),
        )

    def _unguided(self, network: Any, variables: Any, process: Any) -> samplers.Denoiser:
        if jax.process_count() == 1:  # once, not with every batch
            variables = jax.device_put(variables, NamedSharding(self._mesh(), PartitionSpec()))
        return samplers.denoiser(network, variables, process)

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
