"""The samplers against diffusers' schedulers: the same denoiser, times, start and noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from genjax_lab import processes, samplers
from genjax_lab.samplers.base import example_keys, normal_like, step_keys
from genjax_lab.samplers.denoising import one_evaluation

pytestmark = pytest.mark.oracle
SHAPE = (3, 2, 2, 1)
KEY = jax.random.key(7)


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def diffusers(torch):
    return pytest.importorskip("diffusers")


def estimate(xp, x, alpha, sigma):
    """A denoiser that is neither linear nor the same at all noise levels."""
    return xp.tanh(1.3 * alpha * x / (alpha**2 + sigma**2)) + 0.1 * alpha


def toy_denoiser(process):
    def predict(memory, x, t, condition):
        return estimate(jnp, x, process.alpha(t), process.sigma(t)), memory

    return samplers.Denoiser(Partial(predict), process, (), one_evaluation)


def start(scale):
    return scale * np.asarray(jax.random.normal(jax.random.key(1), SHAPE))


def noise_of_step(step, torch):
    """What our samplers add in the given transition."""
    keys = step_keys(example_keys(KEY, jnp.arange(SHAPE[0])), step + 1)
    return torch.from_numpy(np.array(normal_like(keys, jnp.zeros(SHAPE))))


def ours(sampler, x):
    return np.asarray(samplers.sample(sampler, KEY, shape=SHAPE, initial=x)[0])


def run_discrete(scheduler, torch, x, step):
    """diffusers' loop for a variance-preserving model that predicts noise."""
    x = torch.from_numpy(x.copy())
    for i, t in enumerate(scheduler.timesteps):
        alpha = scheduler.alphas_cumprod[t.long()].sqrt()
        sigma = (1 - scheduler.alphas_cumprod[t.long()]).sqrt()
        x0 = estimate(torch, x, alpha, sigma)
        x = step(i, (x - alpha * x0) / sigma, t, x).prev_sample
    return x.numpy()


def discrete_process(scheduler):
    return processes.vp_from_betas(scheduler.betas.double().numpy())


def discrete_times(scheduler, last=0.0):
    """Model step n is time n + 1."""
    return np.append(scheduler.timesteps.double().numpy() + 1, last)


@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("ends_clean", [True, False])
def test_ddim(diffusers, torch, eta, ends_clean):
    scheduler = diffusers.DDIMScheduler(
        clip_sample=False, set_alpha_to_one=ends_clean, steps_offset=0 if ends_clean else 1
    )
    scheduler.set_timesteps(20)
    x = start(1.0)
    theirs = run_discrete(
        scheduler,
        torch,
        x,
        lambda i, eps, t, x: scheduler.step(
            eps, t, x, eta=eta, variance_noise=noise_of_step(i, torch) if eta else None
        ),
    )
    sampler = samplers.ddim(
        toy_denoiser(discrete_process(scheduler)),
        num_steps=20,
        eta=eta,
        times=discrete_times(scheduler, 0.0 if ends_clean else 1.0),
    )
    np.testing.assert_allclose(ours(sampler, x), theirs, atol=1e-4)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm(diffusers, torch, variance, monkeypatch):
    scheduler = diffusers.DDPMScheduler(clip_sample=False, variance_type=f"fixed_{variance}")
    scheduler.set_timesteps(25)
    x = start(1.0)
    steps = iter(range(25))
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor",
        lambda *args, **kwargs: noise_of_step(next(steps), torch),
    )
    theirs = run_discrete(scheduler, torch, x, lambda i, eps, t, x: scheduler.step(eps, t, x))
    sampler = samplers.ddpm(
        toy_denoiser(discrete_process(scheduler)),
        num_steps=25,
        variance=variance,
        times=discrete_times(scheduler),
    )
    np.testing.assert_allclose(ours(sampler, x), theirs, atol=1e-4)


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
def test_dpm_solver_pp_2m(diffusers, torch, algorithm):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        algorithm_type=algorithm, solver_order=2, solver_type="midpoint"
    )
    scheduler.set_timesteps(20)
    x = start(1.0)
    is_sde = algorithm.startswith("sde")
    theirs = run_discrete(
        scheduler,
        torch,
        x,
        lambda i, eps, t, x: scheduler.step(
            eps, t, x, variance_noise=noise_of_step(i, torch) if is_sde else None
        ),
    )
    build = samplers.sde_dpm_solver_pp_2m if is_sde else samplers.dpm_solver_pp_2m
    sampler = build(
        toy_denoiser(discrete_process(scheduler)), num_steps=20, times=discrete_times(scheduler)
    )
    np.testing.assert_allclose(ours(sampler, x), theirs, atol=1e-4)


@pytest.mark.parametrize(
    ("scheduler_name", "name"),
    [("EDMEulerScheduler", "euler"), ("EDMDPMSolverMultistepScheduler", "dpm_solver_pp_2m")],
)
def test_edm(diffusers, torch, scheduler_name, name):
    scheduler = getattr(diffusers, scheduler_name)(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    scheduler.set_timesteps(18)
    process = processes.edm()
    x = start(80.0)
    theirs = torch.from_numpy(x.copy())
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas[:-1], strict=True):
        scheduler.scale_model_input(theirs, t)
        x0 = estimate(torch, theirs, torch.tensor(1.0), sigma)
        output = process.from_data(*(jnp.asarray(v.numpy()) for v in (x0, theirs, sigma)))
        theirs = scheduler.step(torch.from_numpy(np.array(output)), t, theirs).prev_sample
    # The same grid by our own formula, not theirs.
    sampler = getattr(samplers, name)(toy_denoiser(process), num_steps=18)
    # x_0_hat stands at 1e-5 of x = 80 in float32, and their output makes a detour by F.
    np.testing.assert_allclose(ours(sampler, x), theirs.numpy(), atol=2e-4)


def test_heun(diffusers, torch):
    scheduler = diffusers.HeunDiscreteScheduler(use_karras_sigmas=True)
    scheduler.set_timesteps(12)
    sigmas = scheduler.sigmas.double().numpy()
    sigmas = np.append(np.unique(sigmas[sigmas > 0])[::-1], 0.0)
    x = start(sigmas[0].astype(np.float32))
    theirs = torch.from_numpy(x.copy())
    for t in scheduler.timesteps:
        scheduler.scale_model_input(theirs, t)
        sigma = scheduler.sigmas[scheduler.step_index]
        noise = (theirs - estimate(torch, theirs, torch.tensor(1.0), sigma)) / sigma
        theirs = scheduler.step(noise, t, theirs).prev_sample
    sampler = samplers.heun(toy_denoiser(processes.edm()), num_steps=len(sigmas) - 1, times=sigmas)
    assert sampler.num_steps == len(scheduler.timesteps) == 23
    np.testing.assert_allclose(ours(sampler, x), theirs.numpy(), atol=1e-4)


def test_rectified_flow(diffusers, torch):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(20)
    x = start(1.0)
    theirs = torch.from_numpy(x.copy())
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas[:-1], strict=True):
        x0 = estimate(torch, theirs, 1 - sigma, sigma)
        theirs = scheduler.step((theirs - x0) / sigma, t, theirs).prev_sample
    sampler = samplers.euler(
        toy_denoiser(processes.flow()), num_steps=20, times=scheduler.sigmas.double().numpy()
    )
    assert scheduler.sigmas[0] == 1
    np.testing.assert_allclose(ours(sampler, x), theirs.numpy(), atol=1e-4)
