"""How a sample is drawn: the `Sampler` contract, its compiled loop, and one file per method."""

from genjax_lab.samplers.base import (
    Denoiser,
    ExampleState,
    SampleInfo,
    Sampler,
    SamplerState,
    SharedState,
    sample,
)
from genjax_lab.samplers.denoising import change_process, denoiser
from genjax_lab.samplers.heun import euler, heun
from genjax_lab.samplers.schedules import time_steps

__all__ = [
    "Denoiser",
    "ExampleState",
    "SampleInfo",
    "Sampler",
    "SamplerState",
    "SharedState",
    "change_process",
    "denoiser",
    "euler",
    "heun",
    "sample",
    "time_steps",
]
