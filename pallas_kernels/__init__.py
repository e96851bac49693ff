"""Pallas kernels, each beside a plain-jnp reference; knows jax and nothing of genjax_lab."""
