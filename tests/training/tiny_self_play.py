"""A model of which every number is known, a Gaussian of unit variance, and its settings."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from genjax_lab.data import PairedLoader, make_loader_from_arrays
from genjax_lab.objectives import ddo_loss
from genjax_lab.training import SelfPlay, default_self_play_config

TRUE_MEAN = 0.3
MODEL_CONFIG = default_self_play_config().to_dict() | {"evaluation": {"ema": "ema"}}


def config(**changes):
    settings = default_self_play_config()
    settings.update(
        {
            **{"rounds": 2, "alpha": (1.0, 4.0), "beta": (0.5,), "num_fakes": 64},
            **{"selection_seeds": 50, "fresh_seeds": 50, "metric": "error", "batch_size": 8},
            **{"num_steps": 12, "steps_per_call": 2, "eval_every": 4, "checkpoint_every": 4},
            **{"tensorboard": False, "log_every": 4, "probe_steps": 10},
            "mesh": {"data": 1},
            "ema": {"ema": {"half_life_images": 10.0, "rampup_ratio": None}},
        }
    )
    settings.update(changes)
    return settings


def several_parts(**changes):
    """One short round with a probe, whose pool takes more than one file."""
    return config(rounds=1, beta=(), num_fakes=5000, **changes)


def deviation(row):
    """Of the log-ratios of data and samples together, by a row of the log."""
    real, fake = (
        (row[f"delta_{kind}_mean/0"], row[f"delta_{kind}_std/0"]) for kind in ("real", "fake")
    )
    # Within each kind, and between their means.
    variance = (real[1] ** 2 + fake[1] ** 2) / 2 + (real[0] - fake[0]) ** 2 / 4
    return math.sqrt(variance)


def normal(seeds):
    return np.stack([np.random.default_rng(seed).normal(size=(1, 1, 4)) for seed in seeds])


def log_likelihood(mean, x):
    return -0.5 * jnp.sum((x - mean) ** 2, axis=(1, 2, 3))


def gaussian(start=0.0, interrupt_after=None):
    """A model N(mean, 1); `interrupt_after` counts scores until somebody presses a key."""
    scores = []

    def draw(variables, seeds):
        samples = np.asarray(variables["params"]["mean"]) + normal(seeds)
        yield np.array(seeds), samples.astype(np.float32)

    def objective(alpha, beta, index):
        def of_member(params, alpha, beta, reference, batch):
            deltas = [
                log_likelihood(params["mean"], batch[name]) - log_likelihood(reference, batch[name])
                for name in ("image", "fake_image")
            ]
            return ddo_loss(*deltas, alpha, beta)

        def loss(variables, batch, key):
            reference = variables["reference"]["params"]["mean"]
            values, metrics = jax.vmap(of_member, (0, 0, 0, None, None))(
                variables["params"], jnp.array(alpha), jnp.array(beta), reference, batch
            )
            named = {
                f"{name}/{i}": value[i]
                for name, value in metrics.items()
                for i in range(len(alpha))
            }
            return jnp.sum(values), named

        return loss

    def batches(pool, seed, reference, index):
        data = (TRUE_MEAN + normal(range(64))).astype(np.float32)
        return PairedLoader(
            *(
                make_loader_from_arrays({"image": images}, 8, seed + i, value_range=None)
                for i, images in enumerate((data, pool["image"]))
            )
        )

    def score(variables, seeds):
        scores.append(seeds)
        if interrupt_after is not None and len(scores) > interrupt_after:
            raise KeyboardInterrupt
        noise = normal(seeds).mean() / 100
        return {"error": float(np.mean(np.abs(variables["params"]["mean"] - TRUE_MEAN))) + noise}

    return SelfPlay(
        variables={"params": {"mean": np.full((1, 1, 4), start, np.float32)}},
        draw=draw,
        label=None,
        provenance={"sampler": "exact"},
        objective=objective,
        optimizer=lambda: optax.adam(0.02),
        batches=batches,
        score=score,
    )
