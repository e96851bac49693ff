"""Networks as flax linen modules: EDM U-Nets, EDM2, DiT; attention is injected as a function."""
