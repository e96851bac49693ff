"""What a draw costs, and what first hitting saves of sampling, beside the usual ways.

    python -m experiments.benchmarks.first_hitting [--repeats=5] [--length=1024] [--batch_size=8]

One draw for each of some rows of logits:

  argmax    the largest logit: what reading the logits costs at least
  exact     `samplers.exact_categorical`, with log-probability, entropy and margin
  highest   `jax.random.categorical(mode="highest")`: right as well, without the statistics
  default   `jax.random.categorical`: its noise ends at 16
  float64   Gumbel noise in float64

at several vocabularies and numbers of rows. Then sequences of GPT-2's vocabulary from a small
network, end to end: first hitting against ancestral sampling in as many steps as tokens, drawn in
float64 and with cached predictions, as published samplers do, and in two stages. The draws alone
are timed with a network that only looks up a bias. Programs take turns in one process, after
warm-up; the table has medians. Writes first_hitting.json.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.tree_util import Partial

from experiments.benchmarks.interleaved import Program, interleaved_seconds
from experiments.launch import quiet_libraries, shown_command
from genjax_lab import networks, samplers

_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed repetitions of each program.", lower_bound=1)
_SAMPLINGS = flags.DEFINE_integer("samplings", 1, "Timed samplings, end to end.", lower_bound=1)
_ROWS = flags.DEFINE_list("rows", ["32", "128"], "Rows that are drawn at once.")
_VOCABULARIES = flags.DEFINE_list("vocabularies", ["5753", "50257"], "Sizes of vocabularies.")
_LENGTH = flags.DEFINE_integer("length", 1024, "Tokens and steps, end to end.", lower_bound=2)
_BATCH = flags.DEFINE_integer("batch_size", 8, "Sequences, end to end.", lower_bound=1)
_OUT = flags.DEFINE_string("out", "experiments/results/first_hitting.json", "Where it goes.")

DRAWS = 20  # in a row, for one time
VOCABULARY = 50_257  # of GPT-2, end to end
NETWORK = {"width": 64, "depth": 1, "num_heads": 2, "condition_width": 0, "tied": True}


def draw_programs(rows: int, vocabulary: int) -> dict[str, Program]:
    logits = 3 * jax.random.normal(jax.random.key(0), (rows, vocabulary), jnp.float32)
    keys = jax.random.split(jax.random.key(1), rows)

    def float64(keys, logits):
        noise = jax.vmap(lambda key: jax.random.gumbel(key, (vocabulary,), jnp.float64))(keys)
        return jnp.argmax(logits + noise, axis=-1)

    functions: dict[str, Callable] = {
        "argmax": lambda keys, logits: jnp.argmax(logits, axis=-1),
        "exact": lambda keys, logits: samplers.exact_categorical(keys, logits),
        "highest": lambda keys, logits: jax.random.categorical(keys[0], logits, mode="highest"),
        "default": lambda keys, logits: jax.random.categorical(keys[0], logits),
        "float64": float64,
    }

    def program(function):
        def draw(number, carry):
            """One of several in a row, so that a call's own costs do not count."""
            fresh, taken, _ = jax.lax.optimization_barrier((keys, logits, number))
            fresh = jax.vmap(jax.random.fold_in, (0, None))(fresh, number)
            found = function(fresh, taken)
            return jax.tree.map(lambda old, new: old + new.astype(old.dtype), carry, found)

        empty = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(function, keys, logits)
        )
        compiled = jax.jit(lambda: jax.lax.fori_loop(0, DRAWS, draw, empty))
        return lambda: jax.block_until_ready(compiled())

    return {name: program(function) for name, function in functions.items()}


def looked_up(bias, tokens, t, condition, *, rows=None, train=False):
    """A network that costs nothing: the same logits everywhere."""
    del t, condition, train
    shape = tokens.shape if rows is None else rows.shape
    return jnp.broadcast_to(bias, (*shape, len(bias)))


def denoisers() -> dict[str, samplers.TokenDenoiser]:
    network = networks.MaskedTransformer(VOCABULARY, **NETWORK)
    variables = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    bias = jax.random.normal(jax.random.key(2), (VOCABULARY,), jnp.float32)
    return {
        "small network": samplers.token_denoiser(network.apply, variables, VOCABULARY),
        "draws alone": samplers.token_denoiser(Partial(looked_up), bias, VOCABULARY),
    }


def sampling_programs(denoiser: samplers.TokenDenoiser) -> dict[str, Program]:
    length = _LENGTH.value
    made = {
        "first hitting": samplers.first_hitting(denoiser, length),
        "ancestral float64": samplers.ancestral(
            denoiser, length, num_steps=length, draw="joint_float64"
        ),
        "ancestral two stages": samplers.ancestral(denoiser, length, num_steps=length),
        "ancestral asynchronous": samplers.ancestral(
            denoiser, length, num_steps=length, asynchronous=True
        ),
    }

    def program(sampler):
        def run():
            tokens, _ = samplers.sample(sampler, jax.random.key(1), shape=(_BATCH.value, length))
            jax.block_until_ready(tokens)

        return run

    return {name: program(sampler) for name, sampler in made.items()}


def relative(seconds: dict[str, float], base: str) -> dict[str, Any]:
    return {
        "milliseconds": {name: round(value * 1e3, 4) for name, value in seconds.items()},
        f"over {base}": {name: round(value / seconds[base], 2) for name, value in seconds.items()},
    }


def main(_: Sequence[str]) -> None:
    quiet_libraries()
    jax.config.update("jax_enable_x64", True)
    draws, sampling = [], {}
    for vocabulary in map(int, _VOCABULARIES.value):
        for rows in map(int, _ROWS.value):
            seconds = interleaved_seconds(
                draw_programs(rows, vocabulary), repeats=_REPEATS.value, warm_up=2
            )
            seconds = {name: value / DRAWS for name, value in seconds.items()}
            draws.append({"rows": rows, "vocabulary": vocabulary, **relative(seconds, "argmax")})
            print(draws[-1], flush=True)
    for name, denoiser in denoisers().items():
        seconds = interleaved_seconds(sampling_programs(denoiser), repeats=_SAMPLINGS.value)
        sampling[name] = relative(seconds, "first hitting")
        print(name, sampling[name], flush=True)
    result = {
        "command": shown_command("benchmarks.first_hitting"),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "length": _LENGTH.value,
        "batch_size": _BATCH.value,
        "draws": draws,
        "sampling": sampling,
    }
    out = Path(_OUT.value)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    app.run(main)
