"""A noisy linear auto-encoder on generated rows: the smallest thing that uses all of the loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from genjax_lab.training import Experiment, default_config

FEATURES = 8
HIDDEN = 2048  # 8 * 2048 weights are just enough for the sharding rules to split them


class Rows:
    """Batch i is a pure function of (seed, i); each process takes its contiguous part of it."""

    def __init__(self, batch_size, *, index=0, count=1):
        self.position = 0
        self._batch_size = batch_size
        self._part = slice(index * batch_size // count, (index + 1) * batch_size // count)

    def __next__(self):
        rows = np.random.default_rng([7, self.position]).normal(size=(self._batch_size, FEATURES))
        self.position += 1
        return {"x": rows.astype(np.float32)[self._part]}

    def get_state(self):
        return {"position": self.position}

    def set_state(self, state):
        self.position = state["position"]


def config(**changes):
    result = default_config()
    result.update(
        batch_size=16,
        num_steps=24,
        steps_per_call=2,
        log_every=4,
        eval_every=8,
        checkpoint_every=8,
        tensorboard=False,
        mesh={"data": 1, "fsdp": 1, "tensor": 1},
        ema={"ema": {"half_life_images": 100.0}, "power": {"sigma_rel": 0.1}},
    )
    result.update(changes)
    return result


def init(key):
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))

    def kernel(*shape):
        return rng.normal(size=shape).astype(np.float32) * shape[0] ** -0.5

    return {
        "params": {
            "encoder": {"kernel": kernel(FEATURES, HIDDEN), "bias": np.zeros(HIDDEN, np.float32)},
            "decoder": {"kernel": kernel(HIDDEN, FEATURES)},
        },
        "buffers": {"scale": np.full(FEATURES, 0.5, np.float32)},
    }


def reconstruct(variables, x):
    params = variables["params"]
    hidden = jnp.tanh(x @ params["encoder"]["kernel"] + params["encoder"]["bias"])
    return hidden @ params["decoder"]["kernel"] * variables["buffers"]["scale"]


def objective(variables, batch, key):
    noisy = batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)
    error = jnp.mean((reconstruct(variables, noisy) - batch["x"]) ** 2, axis=-1)
    return jnp.mean(error), {"worst": jnp.max(error)}


def evaluate(state):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(32, FEATURES)), jnp.float32)
    return {"error": jnp.mean((reconstruct(state.variables("ema"), x) - x) ** 2)}


def experiment(config, *, index=0, count=1, **changes):
    fields = {
        "init": init,
        "objective": objective,
        "optimizer": optax.adam(3e-3),
        "batches": lambda state: Rows(config.batch_size, index=index, count=count),
        "evaluate": jax.jit(evaluate),
    }
    return Experiment(**(fields | changes))
