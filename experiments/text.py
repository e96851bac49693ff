"""Masked diffusion models of tokens (arXiv 2409.02908): fields of their configs and their builder.

Beside the loop's fields (`genjax_lab.training.default_config`) a config has

  data        name of a TFDS data set, its splits for training and testing, the feature that is
              text, length of a sequence; tokenizer: kind of `data.learn_tokenizer`, learned from
              the training split, and vocab_size, or path of a tokenizer.json. Of kind "levels" the
              feature is an image of image_shape, whose pixels are tokens 0 .. vocab_size - 1
  network     name in genjax_lab.networks and its arguments, beside vocab_size
  objective   arguments of `objectives.masked_diffusion_loss`; schedule by its name in
              `processes.masked`; block: tokens of a block, for block diffusion
  optimizer   as for images
  sampler     name in genjax_lab.samplers: first_hitting, ancestral, tau_leaping, confidence,
              remasking or block_diffusion, and its arguments
  evaluation  num_samples, batch_size, ema, metrics of METRICS, num_draws of masks for the bound

The judge of samples is a trigram model counted from the training split, which needs no weights.
"""

import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from ml_collections.config_dict import placeholder

from experiments.building import construct, default_optimizer, make_optimizer
from genjax_lab import data, evaluation, networks, objectives, samplers
from genjax_lab.parallel import make_mesh, process_share
from genjax_lab.processes import masked
from genjax_lab.training import Experiment, TrainState

SAMPLERS = (
    "first_hitting",
    "ancestral",
    "tau_leaping",
    "confidence",
    "remasking",
    "block_diffusion",
)
METRICS = ("nelbo", "perplexity", "entropy", "evaluations")

# Keeps the keys of samples apart from those of training, which are children of the same seed.
_SAMPLING_STREAM = 2**31


def default_config() -> ml_collections.ConfigDict:
    """The fields of this domain with their defaults; a config adds the loop's."""
    return ml_collections.ConfigDict(
        {
            "domain": "text",
            "data": {
                "name": "pydoc",
                "split": "train",
                "test_split": "test",
                "feature": "text",
                "length": 128,
                "tokenizer": {
                    "kind": "word",
                    "vocab_size": placeholder(int),
                    "path": placeholder(str),
                },
            },
            "network": {"name": "MaskedTransformer"},
            "objective": {
                "form": "count",
                "schedule": "linear",
                "time_conditioned": False,
                "max_rows": placeholder(int),
                "block": placeholder(int),
            },
            "optimizer": default_optimizer(),
            "sampler": {"name": "first_hitting"},
            "evaluation": {
                "num_samples": 128,
                "batch_size": 64,
                "ema": "ema",
                "metrics": METRICS,
                "num_draws": 8,
            },
        }
    )


def build(config: ml_collections.ConfigDict) -> Experiment:
    """Builds the experiment of a config.

    Raises:
      ValueError: if a name is unknown or its arguments do not fit.
    """
    text = Text(config)
    network = make_network(config, text)
    objective = make_objective(config, network)
    judge = TextJudge(config, network, objective, text)
    length = config.data.length
    return Experiment(
        init=lambda key: jax.jit(network.init)(key, jnp.zeros((1, length), jnp.int32)),
        objective=objective,
        optimizer=make_optimizer(config),
        batches=lambda state: text.batches(),
        evaluate=judge.evaluate,
        sample=judge.sample,
        write=judge.write,
    )


class Text:
    """The data of a config, read when they are first needed."""

    def __init__(self, config: ml_collections.ConfigDict):
        self._config = config

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        fields = self._config.data.tokenizer
        if fields.get("path") is not None:
            return data.read_tokenizer(fields.path)
        documents = self.documents(self._config.data.split)
        return data.learn_tokenizer(fields.kind, documents, vocab_size=fields.get("vocab_size"))

    def documents(self, split: str) -> list[str]:
        """The documents of a split."""
        fields = self._config.data
        return data.read_documents(
            fields.name, split, feature=fields.feature, data_dir=fields.get("data_dir")
        )

    @property
    def is_image(self) -> bool:
        """Whether tokens are pixels."""
        return self._config.data.tokenizer.kind == "levels"

    @functools.cache  # noqa: B019 - lives as long as the experiment
    def tokens(self, split: str) -> np.ndarray:
        """The sequences of a split."""
        if self.is_image:
            return self._levels(split)
        return data.to_sequences(self.tokenizer, self.documents(split), self._config.data.length)

    def _levels(self, split: str) -> np.ndarray:
        fields = self._config.data
        tokens = data.read_levels(
            fields.name, split, feature=fields.feature, data_dir=fields.get("data_dir")
        )
        size, length = fields.tokenizer.vocab_size, int(np.prod(fields.image_shape))
        if tokens.max() >= size or tokens.shape[1] != length or fields.length != length:
            raise ValueError(
                f"config.data has length={fields.length}, image_shape={fields.image_shape} and "
                f"vocab_size={size}, but images have {tokens.shape[1]} pixels up to {tokens.max()}"
            )
        return tokens

    def batches(self) -> data.Loader:
        """This process's part of the batches of the training split."""
        index, count = process_share(make_mesh(**self._config.mesh))
        return data.make_token_loader(
            self.tokens(self._config.data.split),
            self._config.batch_size,
            self._config.seed,
            shard_index=index,
            shard_count=count,
        )


def make_network(config: ml_collections.ConfigDict, text: Text) -> networks.MaskedTransformer:
    """The network of a config; its vocabulary is that of the text if the config has none."""
    fields = dict(config.network)
    if text.is_image:
        levels = config.data.tokenizer.get("vocab_size")
        if levels is None or not 1 < levels <= 256 or fields.get("vocab_size", levels) != levels:
            raise ValueError(
                f"config.data.tokenizer.vocab_size is {levels}; it must be the number of levels of "
                f"pixels, at most 256, and config.network.vocab_size, which is "
                f"{fields.get('vocab_size')}, none or the same"
            )
        fields["vocab_size"] = levels
    if fields.get("vocab_size") is None:
        fields["vocab_size"] = text.tokenizer.get_vocab_size()
    return construct(networks, fields, "network")


def make_objective(
    config: ml_collections.ConfigDict, network: networks.MaskedTransformer, **changes: Any
) -> objectives.Objective:
    """The objective of a config."""
    fields = {**config.objective, **changes}
    fields["schedule"] = schedule_of(fields["schedule"])
    try:
        return objectives.masked_diffusion_loss(network.apply, network.vocab_size, **fields)
    except TypeError as error:
        raise ValueError(f"config.objective does not fit: {error}") from error


def schedule_of(name: str) -> masked.MaskSchedule:
    """A schedule by its name; the polynomial one needs a number: "polynomial:2"."""
    name, _, number = name.partition(":")
    if name not in masked.SCHEDULES:
        raise ValueError(f"schedule is {name!r}, not in {sorted(masked.SCHEDULES)}")
    return masked.SCHEDULES[name](*([float(number)] if number else []))


def sampler_of(
    config: ml_collections.ConfigDict, network: networks.MaskedTransformer, variables: Any
) -> samplers.Sampler:
    """The sampler of `config.sampler`."""
    fields = dict(config.sampler)
    if fields["name"] not in SAMPLERS:
        raise ValueError(f"config.sampler.name is {fields['name']!r}, not in {SAMPLERS}")
    if config.objective.time_conditioned and fields["name"] != "confidence":
        fields.setdefault("time_conditioned", True)
        fields.setdefault("schedule", config.objective.schedule)
    if isinstance(fields.get("schedule"), str):
        fields["schedule"] = schedule_of(fields["schedule"])
    name = fields.pop("name")
    make, denoise = getattr(samplers, name), samplers.token_denoiser
    block = config.objective.get("block")  # older runs have none
    if (name == "block_diffusion") != (block is not None):
        raise ValueError(
            f"config.objective.block is {block}: block_diffusion samples, and samples only, models "
            f"of blocks; config.sampler.name is {name!r}"
        )
    if name == "block_diffusion":
        fields.setdefault("block", block)
        denoise = samplers.block_denoiser
    denoiser = denoise(network.apply, variables, network.vocab_size)
    try:
        return make(denoiser, config.data.length, **fields)
    except TypeError as error:
        raise ValueError(f"config.sampler does not fit {make.__name__}: {error}") from error


class TextJudge:
    """Draws, evaluates and writes samples of a train state."""

    def __init__(self, config, network, objective, text: Text):
        self._config, self._network, self._text = config, network, text
        self._objective = objective
        self._mesh = functools.cache(lambda: make_mesh(**config.mesh))

    def sample(
        self, state: TrainState, seeds: Sequence[int], *, progress: bool = False
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (seeds, tokens int32 [part, length]); each depends on its own seed only."""
        for part, tokens, _ in self._draw(state, seeds, progress):
            yield part, tokens

    def _draw(self, state, seeds, progress):
        mesh = self._mesh()
        parts = mesh.shape["data"] * mesh.shape["fsdp"]
        batch_size = min(self._config.evaluation.batch_size, len(seeds))
        variables = state.variables(self._config.evaluation.ema)
        return samplers.sample_batches(
            sampler_of(self._config, self._network, variables),
            sampling_key(self._config),
            seeds=seeds,
            batch_size=-(-batch_size // parts) * parts,
            sample_shape=(self._config.data.length,),
            mesh=mesh,
            progress=progress,
            with_info=True,
        )

    def evaluate(
        self,
        state: TrainState,
        *,
        seeds: Sequence[int] | None = None,
        metrics: Sequence[str] | None = None,
        progress: bool = False,
    ) -> dict[str, float]:
        """Metrics of the state on the test split and of samples drawn for `seeds`."""
        settings = self._config.evaluation
        metrics = tuple(metrics or settings.metrics)
        if unknown := sorted(set(metrics) - set(METRICS)):
            raise ValueError(f"metrics {unknown} are not in {METRICS}")
        result = {}
        if "nelbo" in metrics:
            result["nelbo"], _ = self._nelbo(state)
        if set(metrics) - {"nelbo"}:
            seeds = range(settings.num_samples) if seeds is None else seeds
            _, drawn, infos = zip(*self._draw(state, seeds, progress), strict=True)
            result |= self._judge_samples(np.concatenate(drawn), metrics)
            if "evaluations" in metrics:
                counts = [float(info.num_evaluations) for info in infos]
                result["evaluations"] = float(np.mean(counts))
        return result

    def _nelbo(self, state: TrainState) -> tuple[float, float]:
        settings = self._config.evaluation
        tokens = self._text.tokens(self._config.data.test_split)
        return evaluation.nelbo(
            self._bound,
            state.variables(settings.ema),
            tokens,
            sampling_key(self._config),
            batch_size=min(settings.batch_size, len(tokens)),
            num_draws=settings.num_draws,
        )

    @functools.cached_property
    def _bound(self) -> objectives.Objective:
        """Without dropout, of all masked tokens."""
        network = self._network.clone(dropout=0.0)
        return make_objective(self._config, network, max_rows=None)

    def _judge_samples(self, tokens: np.ndarray, metrics: tuple[str, ...]) -> dict[str, float]:
        whole = np.all(tokens < self._network.vocab_size, axis=1)
        if not np.any(whole):
            raise ValueError("every sample has masks left: the network gives no finite logits")
        found = evaluation.generative_perplexity(self._trigrams, tokens[whole])
        result = {"perplexity": found.perplexity, "entropy": found.entropy}
        result = {name: value for name, value in result.items() if name in metrics}
        result["share_with_masks"] = float(1 - np.mean(whole))
        return result

    @functools.cached_property
    def _trigrams(self) -> evaluation.TrigramJudge:
        tokens = self._text.tokens(self._config.data.split)
        return evaluation.TrigramJudge(tokens, self._network.vocab_size)

    def write(
        self, samples: np.ndarray, path: str | Path, *, before: np.ndarray | None = None
    ) -> None:
        """Writes samples: .npz as tokens, .txt or .jsonl as text, one after the other.

        Images are written as .png or .npz. With `before`, samples of another model, both are there
        to be compared.
        """
        path = Path(path)
        if self._text.is_image:
            from experiments import pictures  # it chooses how matplotlib draws

            shape = tuple(self._config.data.image_shape)
            levels = self._network.vocab_size - 1
            images, others = (
                None if x is None else np.minimum(x, levels).astype(np.uint8).reshape(-1, *shape)
                for x in (samples, before)
            )
            pictures.write_images(images, path, before=others, max_value=levels)
            return
        groups = {"samples": samples} | ({} if before is None else {"before": before})
        if path.suffix == ".npz":
            np.savez(path, **groups)
            return
        if path.suffix not in (".txt", ".jsonl"):
            raise ValueError(f"path is {str(path)!r}; text is written as .txt, .jsonl or .npz")
        texts = {name: self._decode(tokens) for name, tokens in groups.items()}
        if path.suffix == ".jsonl":
            rows = [
                {"group": name, "text": text} for name, group in texts.items() for text in group
            ]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            return
        blocks = [
            f"[{name} {i}]\n{text}" for name, group in texts.items() for i, text in enumerate(group)
        ]
        path.write_text("\n\n".join(blocks) + "\n")

    def _decode(self, tokens: np.ndarray) -> list[str]:
        return self._text.tokenizer.decode_batch(tokens.tolist(), skip_special_tokens=False)


def sampling_key(config: ml_collections.ConfigDict) -> jax.Array:
    """The key of a config's samples."""
    return jax.random.fold_in(jax.random.key(config.seed), _SAMPLING_STREAM)
