"""What is minimised: functions (variables, batch, key) -> (loss, metrics)."""

from genjax_lab.objectives.augmentation import Augmentation, augmented, edm_augmentation
from genjax_lab.objectives.autoregressive import autoregressive
from genjax_lab.objectives.contrastive import (
    cca_loss,
    dpo_loss,
    extrapolate,
    kto_loss,
    spin_loss,
    unlikelihood_loss,
)
from genjax_lab.objectives.denoising import Objective, denoising
from genjax_lab.objectives.discriminative import (
    F_DIVERGENCES,
    adaptive_beta,
    calibrate_beta,
    ddo_loss,
    f_divergence_loss,
    jsd_from_loss,
    start_of_round_ratio,
    tilted_optimum,
)
from genjax_lab.objectives.discriminative_denoising import (
    ddo_denoising,
    ddo_denoising_grid,
    seeded_log_likelihoods,
)
from genjax_lab.objectives.discriminative_tokens import (
    LabelDropout,
    ddo_tokens,
    ddo_tokens_grid,
)
from genjax_lab.objectives.likelihood import (
    autoregressive_log_likelihood,
    diffusion_log_likelihood,
    draw_times_and_masks,
    draw_times_and_noise,
    masked_log_likelihood,
    seeded_times_and_noise,
    token_log_probabilities,
)
from genjax_lab.objectives.log_ratio import (
    log_ratio,
    member_log_likelihoods,
    paired_log_likelihoods,
)
from genjax_lab.objectives.masked import (
    block_diffusion_mask,
    draw_masks,
    masked_diffusion_loss,
)
from genjax_lab.objectives.noise_levels import NoiseLevelTable, log_ratios_by_noise_level
from genjax_lab.objectives.noisy_discriminator import noisy_discriminator
from genjax_lab.objectives.tokenizer import tokenizer_reconstruction

__all__ = [
    "F_DIVERGENCES",
    "Augmentation",
    "LabelDropout",
    "NoiseLevelTable",
    "Objective",
    "adaptive_beta",
    "augmented",
    "autoregressive",
    "autoregressive_log_likelihood",
    "block_diffusion_mask",
    "calibrate_beta",
    "cca_loss",
    "ddo_denoising",
    "ddo_denoising_grid",
    "ddo_loss",
    "ddo_tokens",
    "ddo_tokens_grid",
    "denoising",
    "diffusion_log_likelihood",
    "dpo_loss",
    "draw_masks",
    "draw_times_and_masks",
    "draw_times_and_noise",
    "edm_augmentation",
    "extrapolate",
    "f_divergence_loss",
    "jsd_from_loss",
    "kto_loss",
    "log_ratio",
    "log_ratios_by_noise_level",
    "masked_diffusion_loss",
    "masked_log_likelihood",
    "member_log_likelihoods",
    "noisy_discriminator",
    "paired_log_likelihoods",
    "seeded_log_likelihoods",
    "seeded_times_and_noise",
    "spin_loss",
    "start_of_round_ratio",
    "tilted_optimum",
    "token_log_probabilities",
    "tokenizer_reconstruction",
    "unlikelihood_loss",
]
