"""How a sample is drawn: the `Sampler` contract, its compiled loop, and one file per method."""

from genjax_lab.samplers.ancestral import AncestralReport, ancestral, remasking, tau_leaping
from genjax_lab.samplers.autoregressive import (
    AnswerReport,
    Generation,
    TokenDecoder,
    autoregressive,
    generate,
    token_decoder,
)
from genjax_lab.samplers.base import (
    Denoiser,
    ExampleState,
    SampleInfo,
    Sampler,
    SamplerState,
    SharedState,
    sample,
)
from genjax_lab.samplers.batches import sample_batches, to_host
from genjax_lab.samplers.block_diffusion import (
    BlockDenoiser,
    BlockReport,
    block_denoiser,
    block_diffusion,
)
from genjax_lab.samplers.categorical import exact_categorical, logit_floor
from genjax_lab.samplers.confidence import ConfidenceReport, confidence
from genjax_lab.samplers.ddim import ddim
from genjax_lab.samplers.ddpm import ddpm
from genjax_lab.samplers.denoising import change_process, denoiser, switch_by_noise
from genjax_lab.samplers.dpm_solver import dpm_solver_pp_2m, sde_dpm_solver_pp_2m
from genjax_lab.samplers.dpm_solver_v3 import dpm_solver_v3
from genjax_lab.samplers.first_hitting import FirstHittingReport, first_hitting
from genjax_lab.samplers.guidance import (
    autoguidance,
    classifier_free,
    discriminator_guidance,
    log_odds,
)
from genjax_lab.samplers.heun import euler, heun
from genjax_lab.samplers.model_statistics import (
    ModelStatistics,
    data_prediction_statistics,
    estimate_statistics,
)
from genjax_lab.samplers.next_scale import next_scale
from genjax_lab.samplers.schedules import time_steps
from genjax_lab.samplers.tokens import (
    DrawOptions,
    TokenDenoiser,
    guide_tokens,
    suppress_tokens,
    token_denoiser,
)

__all__ = [
    "AncestralReport",
    "AnswerReport",
    "BlockDenoiser",
    "BlockReport",
    "ConfidenceReport",
    "Denoiser",
    "DrawOptions",
    "ExampleState",
    "FirstHittingReport",
    "Generation",
    "ModelStatistics",
    "SampleInfo",
    "Sampler",
    "SamplerState",
    "SharedState",
    "TokenDecoder",
    "TokenDenoiser",
    "ancestral",
    "autoguidance",
    "autoregressive",
    "block_denoiser",
    "block_diffusion",
    "change_process",
    "classifier_free",
    "confidence",
    "data_prediction_statistics",
    "ddim",
    "ddpm",
    "denoiser",
    "discriminator_guidance",
    "dpm_solver_pp_2m",
    "dpm_solver_v3",
    "estimate_statistics",
    "euler",
    "exact_categorical",
    "first_hitting",
    "generate",
    "guide_tokens",
    "heun",
    "log_odds",
    "logit_floor",
    "next_scale",
    "remasking",
    "sample",
    "sample_batches",
    "sde_dpm_solver_pp_2m",
    "suppress_tokens",
    "switch_by_noise",
    "tau_leaping",
    "time_steps",
    "to_host",
    "token_decoder",
    "token_denoiser",
]
