"""One of several processes that draw the same samples on one mesh; writes them to a file."""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from genjax_lab import networks, processes, samplers
from genjax_lab.parallel import make_mesh

index, count, port, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
jax.config.update("jax_platforms", "cpu")
if count > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", count, index)

network = networks.ResidualMLP(num_classes=3, width=8, num_blocks=1)
variables = jax.tree.map(
    lambda leaf: np.full(leaf.shape, 0.1, np.float32),
    jax.eval_shape(
        network.init,
        jax.random.key(0),
        jnp.zeros((1, 2, 2, 1)),
        jnp.zeros(1),
        jnp.zeros(1, jnp.int32),
    ),
)
sampler = samplers.heun(samplers.denoiser(network, variables, processes.edm()), num_steps=3)
drawn = samplers.sample_batches(
    sampler,
    jax.random.key(7),
    seeds=range(6),
    batch_size=4,
    sample_shape=(2, 2, 1),
    condition_fn=lambda seeds: (seeds % 3).astype(np.int32),
    mesh=make_mesh(),
)
samples = np.concatenate([part for _, part in drawn])
if index == 0:
    np.save(out, samples)
