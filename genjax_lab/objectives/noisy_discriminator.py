"""Training a discriminator of noised data and noised samples of a model (arXiv 2211.17091).

Its best log-odds at time t are log p_data(x_t) / p_model(x_t), whose gradient is what the model's
score lacks; `genjax_lab.samplers.discriminator_guidance` adds it. One that has learnt the training
images by heart guides towards them and may take the samples away from the data (arXiv 2503.16117):
watch its accuracy on data and samples that it was not trained on.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from genjax_lab.objectives.denoising import Objective
from genjax_lab.objectives.discriminative_denoising import paired, paired_images
from genjax_lab.objectives.likelihood import draw_times_and_noise
from genjax_lab.processes.gaussian import GaussianProcess, expand


def noisy_discriminator(apply: Callable[..., Array], process: GaussianProcess) -> Objective:
    """The binary cross-entropy of a discriminator that is told the time.

    Args:
      apply: a linen `Module.apply` called as `apply(variables, c_in x_t, c_noise, label,
        train=True, rngs={"dropout": key})`, which returns [batch] logits log(d / (1 - d)), d being
        the probability of data; label is None for batches without labels.
      process: noise schedule, and the law of training times.

    Returns:
      An objective of batches {"image": [batch, ...] float32, "fake_image": the same shape, samples
      of the model, "label" and "fake_label": [batch] int32, both or neither, the samples' being
      their own}. Image i and sample i have the same time and noise. Metrics: "accuracy" of the sign
      of the logit, ties being half right, and "js_estimate" = log 2 - loss, which is in expectation
      a lower bound, reached by the best discriminator, of the mean over times of JS(p_data(x_t) ||
      p_model(x_t)) in nats. It raises ValueError for batches that are not as described, and if
      there is not one logit for each row.
    """

    def objective(variables, batch, key):
        real, fake, label = paired_images(batch)
        draw_key, dropout_key = jax.random.split(key)
        t, noise = draw_times_and_noise(process, draw_key, real.shape)
        t, noise = paired(t, t), paired(noise, noise).astype(real.dtype)
        noisy = process.diffuse(paired(real, fake), t, noise)
        logits = apply(
            variables,
            noisy * expand(process.c_in(t), noisy),
            process.c_noise(t),
            label,
            train=True,
            rngs={"dropout": dropout_key},
        )
        if logits.shape != t.shape:
            raise ValueError(
                f"the discriminator must give one logit for each of {len(t)} rows, got shape "
                f"{list(logits.shape)}"
            )
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32)).reshape(-1, 2)
        signed = logits * jnp.array([1, -1], logits.dtype)
        # -log(1 - sigmoid(z)) = -log_sigmoid(-z), finite for every z.
        loss = jnp.mean(-jax.nn.log_sigmoid(signed))
        accuracy = jnp.mean((jnp.sign(signed) + 1) / 2)
        return loss, {"accuracy": accuracy, "js_estimate": jnp.log(2.0) - loss}

    return objective
