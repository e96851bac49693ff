"""What is minimised: functions (variables, batch, key) -> (loss, metrics)."""

from genjax_lab.objectives.aggregation import (
    AGGREGATIONS,
    aggregate,
    aggregation_weights,
)
from genjax_lab.objectives.answer_diagnostics import (
    means_by_rate,
    ratio_quantiles,
    split_gradient,
)
from genjax_lab.objectives.answers import answer_batch, answer_likelihood, answer_objective
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
from genjax_lab.objectives.groups import (
    Groups,
    correctness_rate,
    group_statistics,
    overlong_penalty,
    prompt_weight,
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
from genjax_lab.objectives.negative_aware import (
    implicit_negative_ratio,
    likelihood_log_ratio,
    nft_loss,
    rft_loss,
    straight_through_max,
)
from genjax_lab.objectives.noise_levels import NoiseLevelTable, log_ratios_by_noise_level
from genjax_lab.objectives.noisy_discriminator import noisy_discriminator
from genjax_lab.objectives.policy_gradient import (
    clipped_policy_loss,
    dapo_loss,
    dr_grpo_loss,
    group_advantage,
    grpo_loss,
    gspo_loss,
    importance_weights,
    kl_estimate,
    online_dpo_loss,
    reinforce_loss,
    rloo_loss,
    signed_likelihood_loss,
)
from genjax_lab.objectives.tokenizer import tokenizer_reconstruction

__all__ = [
    "AGGREGATIONS",
    "F_DIVERGENCES",
    "Augmentation",
    "Groups",
    "LabelDropout",
    "NoiseLevelTable",
    "Objective",
    "adaptive_beta",
    "aggregate",
    "aggregation_weights",
    "answer_batch",
    "answer_likelihood",
    "answer_objective",
    "augmented",
    "autoregressive",
    "autoregressive_log_likelihood",
    "block_diffusion_mask",
    "calibrate_beta",
    "cca_loss",
    "clipped_policy_loss",
    "correctness_rate",
    "dapo_loss",
    "ddo_denoising",
    "ddo_denoising_grid",
    "ddo_loss",
    "ddo_tokens",
    "ddo_tokens_grid",
    "denoising",
    "diffusion_log_likelihood",
    "dpo_loss",
    "dr_grpo_loss",
    "draw_masks",
    "draw_times_and_masks",
    "draw_times_and_noise",
    "edm_augmentation",
    "extrapolate",
    "f_divergence_loss",
    "group_advantage",
    "group_statistics",
    "grpo_loss",
    "gspo_loss",
    "implicit_negative_ratio",
    "importance_weights",
    "jsd_from_loss",
    "kl_estimate",
    "kto_loss",
    "likelihood_log_ratio",
    "log_ratio",
    "log_ratios_by_noise_level",
    "masked_diffusion_loss",
    "masked_log_likelihood",
    "means_by_rate",
    "member_log_likelihoods",
    "nft_loss",
    "noisy_discriminator",
    "online_dpo_loss",
    "overlong_penalty",
    "paired_log_likelihoods",
    "prompt_weight",
    "ratio_quantiles",
    "reinforce_loss",
    "rft_loss",
    "rloo_loss",
    "seeded_log_likelihoods",
    "seeded_times_and_noise",
    "signed_likelihood_loss",
    "spin_loss",
    "split_gradient",
    "start_of_round_ratio",
    "straight_through_max",
    "tilted_optimum",
    "token_log_probabilities",
    "tokenizer_reconstruction",
    "unlikelihood_loss",
]
