"""DDO where everything can be computed: a table of probabilities, and a Gaussian that cannot fit.

    python -m experiments.studies.ddo_tabular [--out=experiments/results]

Data are two rings on a 40 x 40 grid, the reference is a blurred copy of them; the model has one
logit for each cell, its gradient is exact. Under test (arXiv 2503.01103): with alpha = beta = 1 the
optimum is the data (Theorem 3.1); with beta < 1 and the alpha that belongs to it, the optimum is
tilted beyond the data, p_ref^(1 - 1/beta) p_data^(1/beta) / Z (Theorem 3.3). And a warning: for a
model that already is its own best fit, the first gradient of a round vanishes whatever alpha is;
whether the reference is a minimum or a saddle depends on alpha. Writes ddo_tabular.json and .png.
"""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from absl import app, flags

from experiments.launch import quiet_libraries, shown_command
from genjax_lab.objectives import ddo_loss, tilted_optimum

matplotlib.use("Agg")  # no display is needed to write a file

import matplotlib.pyplot as plt

_OUT = flags.DEFINE_string("out", "experiments/results", "Where table and figure go.")
_STEPS = flags.DEFINE_integer("num_steps", 3_000, "Gradient steps.", lower_bound=10)

SIDE = 40
BETA = 0.5
ALPHAS = (0.25, 0.5, 1.0, 1.5, 2.0, 4.0, 8.0)
# A mixture of two Gaussians, which one Gaussian fits badly.
WEIGHTS, MEANS, DEVIATION = np.array([0.8, 0.2]), np.array([0.0, 3.0]), 0.6


def rings() -> tuple[np.ndarray, np.ndarray]:
    """(data, reference), both [SIDE^2] and positive."""
    axis = np.linspace(-1, 1, SIDE)
    radius = np.hypot(*np.meshgrid(axis, axis))
    data = sum(np.exp(-0.5 * ((radius - r) / 0.05) ** 2) for r in (0.35, 0.8)) + 1e-3
    data /= data.sum()
    kernel = np.exp(-0.5 * (np.subtract.outer(axis, axis) / 0.12) ** 2)
    reference = kernel @ data @ kernel
    return data.ravel(), (reference / reference.sum()).ravel()


def loss(logits: jax.Array, data: jax.Array, reference: jax.Array, alpha: Any, beta: Any):
    """The exact DDO loss: sums over all cells in place of means over samples."""
    ratio = jax.nn.log_softmax(logits) - jnp.log(reference)
    count = ratio.size
    return ddo_loss(
        ratio, ratio, alpha, beta, real_weight=count * data, fake_weight=count * reference
    )[0]


@functools.partial(jax.jit, static_argnames="num_steps")
def descend(data: jax.Array, reference: jax.Array, alpha: Any, beta: Any, num_steps: int):
    """Adam from the reference; (final log-probabilities, divergences after every step)."""
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, num_steps))

    def step(carry, _):
        logits, state = carry
        gradient = jax.grad(loss)(logits, data, reference, alpha, beta)
        updates, state = optimizer.update(gradient, state)
        logits = optax.apply_updates(logits, updates)
        return (logits, state), divergences(jax.nn.log_softmax(logits), jnp.log(data))

    start = jnp.log(reference)
    (logits, _), trace = jax.lax.scan(step, (start, optimizer.init(start)), length=num_steps)
    return jax.nn.log_softmax(logits), trace


def divergences(log_model: jax.Array, log_data: jax.Array) -> dict[str, jax.Array]:
    """Forward KL(data || model), reverse KL(model || data) and Jensen-Shannon, in nats."""

    def kl(a, b):
        return jnp.sum(jnp.exp(a) * (a - b))

    middle = jnp.logaddexp(log_model, log_data) - jnp.log(2)
    return {
        "forward": kl(log_data, log_model),
        "reverse": kl(log_model, log_data),
        "jensen_shannon": (kl(log_data, middle) + kl(log_model, middle)) / 2,
    }


def start_of_round(alpha: float, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """Gradient and Hessian eigenvalues at the best-fitting Gaussian, by quadrature over x."""
    x = jnp.linspace(-12, 16, 20_001)
    mixture = sum(
        w * jax.scipy.stats.norm.pdf(x, m, DEVIATION) for w, m in zip(WEIGHTS, MEANS, strict=True)
    )
    mean = float(WEIGHTS @ MEANS)
    deviation = float(np.sqrt(DEVIATION**2 + WEIGHTS @ (MEANS - mean) ** 2))
    best = jnp.array([mean, np.log(deviation)])

    def log_model(theta):
        return jax.scipy.stats.norm.logpdf(x, theta[0], jnp.exp(theta[1]))

    frozen = log_model(best)

    def total(theta):
        ratio = log_model(theta) - frozen
        width = x.size * (x[1] - x[0])
        weights = {"real_weight": width * mixture, "fake_weight": width * jnp.exp(frozen)}
        return ddo_loss(ratio, ratio, alpha, beta, **weights)[0]

    return np.asarray(jax.grad(total)(best)), np.linalg.eigvalsh(jax.hessian(total)(best))


def study(num_steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(table for the JSON, arrays for the figure)."""
    data, reference = (jnp.asarray(values) for values in rings())
    tilt, alpha_star = tilted_optimum(data, reference, BETA)
    plain, plain_trace = descend(data, reference, 1.0, 1.0, num_steps)
    tilted, tilted_trace = descend(data, reference, alpha_star, BETA, num_steps)
    hessian = {}
    for alpha in ALPHAS:
        gradient, eigenvalues = start_of_round(alpha, BETA)
        hessian[alpha] = {
            "gradient_norm": float(np.linalg.norm(gradient)),
            "eigenvalues": eigenvalues.tolist(),
        }
    table = {
        "start": jax.tree.map(float, divergences(jnp.log(reference), jnp.log(data))),
        "alpha=beta=1": {name: float(values[-1]) for name, values in plain_trace.items()},
        f"beta={BETA}, alpha={float(alpha_star):.4f}": {
            "forward_kl_to_tilted_optimum": float(divergences(tilted, jnp.log(tilt))["forward"]),
            "largest_error": float(jnp.max(jnp.abs(jnp.exp(tilted) - tilt))),
            "forward_kl_to_data": float(tilted_trace["forward"][-1]),
            "least_forward_kl_on_the_way": float(tilted_trace["forward"].min()),
        },
        "best_gaussian_at_start_of_round": hessian,
    }
    pictures = {
        "data": np.asarray(data),
        "reference": np.asarray(reference),
        "alpha = beta = 1": np.exp(plain),
        f"beta = {BETA}": np.exp(tilted),
    }
    traces = jax.device_get({"alpha = beta = 1": plain_trace, f"beta = {BETA}": tilted_trace})
    return table, {"pictures": pictures, "traces": traces, "hessian": hessian}


def draw(arrays: dict[str, Any], path: Path) -> None:
    """Tables above; below divergences during descent, and Hessian eigenvalues against alpha."""
    figure = plt.figure(figsize=(9, 6), layout="constrained")
    upper, lower = figure.subfigures(2, 1)
    axes = upper.subplots(1, 4)
    top = max(float(picture.max()) for picture in arrays["pictures"].values())
    for axis, (name, picture) in zip(axes, arrays["pictures"].items(), strict=True):
        axis.imshow(np.sqrt(picture.reshape(SIDE, SIDE)), vmin=0, vmax=top**0.5, cmap="magma")
        axis.set_title(name)
        axis.axis("off")
    left, right = lower.subplots(1, 2)
    for index, (name, trace) in enumerate(arrays["traces"].items()):
        for style, divergence in (("-", "forward"), (":", "reverse")):
            left.plot(
                np.arange(1, len(trace[divergence]) + 1),
                np.maximum(trace[divergence], 1e-9),
                style,
                color=f"C{index}",
                label=f"{divergence} KL, {name}",
            )
    left.set(xscale="log", yscale="log", xlabel="gradient step", ylabel="divergence from data")
    left.legend(frameon=False, fontsize=7)
    alphas = list(arrays["hessian"])
    for index in (0, 1):
        right.plot(
            alphas,
            [arrays["hessian"][alpha]["eigenvalues"][index] for alpha in alphas],
            marker="o",
            markersize=3,
            label=("smaller", "larger")[index] + " eigenvalue",
        )
    right.axhline(0, color="gray", linewidth=0.8)
    right.set(
        xscale="log",
        xlabel="alpha",
        ylabel="Hessian at the reference",
        title="below 0 the reference is no minimum",
    )
    right.set_xticks(alphas, [f"{alpha:g}" for alpha in alphas])
    right.minorticks_off()
    right.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str]) -> None:
    quiet_libraries()
    with jax.enable_x64(True):
        table, arrays = study(_STEPS.value)
    out = Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    command = shown_command("studies.ddo_tabular")
    result = {"command": command, "num_steps": _STEPS.value, "table": table}
    (out / "ddo_tabular.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(arrays, out / "ddo_tabular.png")
    print(json.dumps(table, indent=1))
    print(f"written to {out}/ddo_tabular.json and .png")


if __name__ == "__main__":
    app.run(main)
