"""What is minimised: functions (variables, batch, key) -> (loss, metrics)."""

from genjax_lab.objectives.denoising import Objective, denoising

__all__ = ["Objective", "denoising"]
