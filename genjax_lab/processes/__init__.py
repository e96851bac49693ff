"""How data is destroyed: noise schedules, what a network predicts, loss weights."""

from genjax_lab.processes import gaussian, masked
from genjax_lab.processes.gaussian import GaussianProcess, edm, flow, ve, vp, vp_from_betas

__all__ = ["GaussianProcess", "edm", "flow", "gaussian", "masked", "ve", "vp", "vp_from_betas"]
