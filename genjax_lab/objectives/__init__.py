"""What is minimised: functions (variables, batch, key) -> (loss, metrics)."""

from genjax_lab.objectives.augmentation import Augmentation, augmented, edm_augmentation
from genjax_lab.objectives.denoising import Objective, denoising

__all__ = ["Augmentation", "Objective", "augmented", "denoising", "edm_augmentation"]
