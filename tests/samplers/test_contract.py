"""What holds of every sampler: purity, one compilation, honest counts, the last step's meaning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian_target import PROCESSES, SAMPLERS, best_estimate, gaussian_denoiser, traces
from jax.sharding import Mesh

from genjax_lab import processes, samplers
from genjax_lab.samplers.base import example_keys, step_keys

SHAPE = (8, 2, 2, 1)
# The variants left out run no line that these do not.
EVERY = pytest.mark.parametrize("name", [n for n in SAMPLERS if n not in ("ddim", "ddpm_small")])
# One of each structure: stages, randomness, history, weights of every step.
SOME = pytest.mark.parametrize(
    "name", ["heun_churn", "ddim_eta_1", "dpm_solver_pp_2m", "dpm_solver_v3"]
)


def make(name, process_name="edm", num_steps=5, t_max=None, mean=0.3):
    """A sampler whose time grid, like everybody's, ends with clean data."""
    build, settings, _ = SAMPLERS[name]
    process = PROCESSES[process_name]
    times = samplers.time_steps(process, num_steps, t_max=t_max)
    return build(gaussian_denoiser(process, mean), num_steps=num_steps, times=times, **settings)


@EVERY
def test_trajectory_leads_from_the_given_iterate_to_the_last_prediction(name):
    sampler = make(name, "edm" if "churn" in name else "vp", t_max=0.7)
    x = np.full(SHAPE, 2.0, np.float32)
    result, info = samplers.sample(
        sampler, jax.random.key(0), shape=SHAPE, initial=x, trajectory=True
    )
    num_evaluations = 9 if "heun" in name else 5
    assert sampler.num_steps == info.num_steps == num_evaluations
    assert info.num_evaluations == num_evaluations
    assert info.trajectory.shape == info.predictions.shape == (num_evaluations, *SHAPE)
    process = PROCESSES["edm" if "churn" in name else "vp"]
    estimate, _ = best_estimate(process, (0.3, 0.5), (), 2.0, jnp.float32(0.7), None)
    np.testing.assert_allclose(info.predictions[0], estimate, rtol=1e-5)
    np.testing.assert_array_equal(info.trajectory[-1], result)
    # A step to sigma = 0 returns what the network takes for clean.
    np.testing.assert_allclose(result, info.predictions[-1], atol=1e-6)


@EVERY
def test_one_compilation_serves_all_variables_and_times(name):
    results, counts = [], []
    for mean, t_max in ((0.3, None), (-0.4, None), (0.3, 40.0)):
        sampler = make(name, mean=mean, t_max=t_max)
        results.append(samplers.sample(sampler, jax.random.key(0), shape=SHAPE)[0])
        counts.append(len(traces))
    assert counts[0] == counts[1] == counts[2] > 0
    assert np.abs(results[0] - results[1]).max() > 0.1
    assert np.abs(results[0] - results[2]).max() > 1e-4


@SOME
def test_vmap_over_keys_is_a_loop_over_keys(name):
    sampler = make(name)
    keys = jax.random.split(jax.random.key(3), 2)
    together = jax.vmap(lambda key: samplers.sample(sampler, key, shape=SHAPE)[0])(keys)
    apart = [samplers.sample(sampler, key, shape=SHAPE)[0] for key in keys]
    np.testing.assert_allclose(together, np.stack(apart), atol=1e-6)
    assert np.abs(apart[0] - apart[1]).max() > 0.1


@SOME
def test_gradient_with_respect_to_variables(name):
    def mean_sample(mean):
        sampler = make(name, mean=mean)
        return samplers.sample(sampler, jax.random.key(0), shape=SHAPE)[0].mean()

    value, slope = jax.value_and_grad(mean_sample)(0.3)
    # Every sampler is affine in the network's output and that in the mean.
    np.testing.assert_allclose(slope, mean_sample(1.3) - value, rtol=1e-4)
    assert slope > 0.5


@SOME
def test_mesh_changes_nothing(name):
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "fsdp"))
    sampler = make(name)
    single, _ = samplers.sample(sampler, jax.random.key(0), shape=SHAPE)
    sharded, _ = samplers.sample(sampler, jax.random.key(0), shape=SHAPE, mesh=mesh)
    assert len(sharded.sharding.device_set) == 8
    assert sharded.addressable_shards[0].data.shape == (1, 2, 2, 1)
    np.testing.assert_allclose(sharded, single, atol=1e-6)


@EVERY
def test_transition_is_pure(name):
    """A wrapper may draw several moves from one prediction and repeat any of them."""
    sampler = make(name)
    keys = example_keys(jax.random.key(0), jnp.arange(4))
    state = sampler.init(keys, (4, 1), None)
    state = sampler.transition(keys, *reversed(sampler.predict(state)))
    state = state._replace(shared=state.shared._replace(step=jnp.int32(1)))
    prediction, state = sampler.predict(state)
    assert state.shared.evaluations == 2
    moves = [
        sampler.transition(step_keys(keys, number), state, prediction).sample
        for number in (1, 1, 2)
    ]
    np.testing.assert_array_equal(moves[0], moves[1])
    if SAMPLERS[name][2] is None:
        assert np.abs(moves[0] - moves[2]).min() > 0
    else:
        np.testing.assert_array_equal(moves[0], moves[2])


@EVERY
def test_sampler_is_built_and_run_within_a_compiled_function(name):
    def draw(mean, seeds):
        return samplers.sample(make(name, mean=mean), jax.random.key(0), shape=SHAPE, seeds=seeds)

    with jax.enable_x64(True):
        result, info = jax.eval_shape(draw, jnp.float64(0.3), jnp.arange(8))
    # The state has the precision of the platform.
    assert (result.shape, result.dtype) == (SHAPE, jnp.float64)
    assert info.num_steps.shape == ()
    if name == "ddpm_large":
        compiled, _ = jax.jit(draw)(0.3, jnp.arange(8))
        np.testing.assert_allclose(compiled, draw(0.3, None)[0], atol=1e-6)


def test_ddim_with_all_noise_fresh_is_ddpm_with_the_small_variance():
    draws = [
        samplers.sample(make(name), jax.random.key(0), shape=SHAPE)[0]
        for name in ("ddim_eta_1", "ddpm_small")
    ]
    np.testing.assert_allclose(draws[0], draws[1], atol=1e-5)


@pytest.mark.parametrize("name", ["ddim", "dpm_solver_pp_2m", "dpm_solver_v3"])
def test_samplers_of_the_log_snr_do_not_depend_on_the_process(name):
    edm, vp = PROCESSES["edm"], PROCESSES["vp"]
    build, settings, _ = SAMPLERS[name]
    times = {"vp": np.asarray(samplers.time_steps(vp, 6))}
    times["edm"] = np.append(edm.time_of_log_snr(vp.log_snr(times["vp"][:-1])), 0.0)
    denoise = {"vp": gaussian_denoiser(vp)}
    denoise["edm"] = samplers.change_process(denoise["vp"], edm)
    noise = np.linspace(-2, 2, 8, dtype=np.float32).reshape(2, 4)
    results = []
    for process in ("vp", "edm"):
        sampler = build(denoise[process], num_steps=6, times=times[process], **settings)
        # With alpha = 1 the initial noise is the noise-to-signal ratio.
        start = noise * PROCESSES[process].sigma(times[process][0])
        results.append(samplers.sample(sampler, jax.random.key(0), shape=(2, 4), initial=start)[0])
    # VP starts from alpha(1) = 0.0066 of the data; EDM from a ratio of 152.
    np.testing.assert_allclose(results[0], results[1], atol=2e-4)


def test_a_sampler_that_finishes_early_stops():
    sampler = make("euler")._replace(finished=lambda state: state.step >= 3)
    _, info = samplers.sample(sampler, jax.random.key(0), shape=SHAPE)
    assert info.num_steps == info.num_evaluations == 3
    with pytest.raises(ValueError, match="fixed number of steps"):
        samplers.sample(sampler, jax.random.key(0), shape=SHAPE, trajectory=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": ()}, "positive batch size"),
        ({"condition": np.zeros(3)}, r"\['condition'\] has shape \(3,\)"),
        ({"seeds": np.arange(7)}, r"\['seeds'\] has shape \(7,\)"),
        ({"seeds": np.arange(8) - 1}, "seeds must be"),
        ({"seeds": np.arange(8) + 2**32}, "seeds must be"),
        ({"seeds": np.arange(8.0)}, "seeds must be"),
        ({"initial": np.zeros((8, 2, 2, 3))}, "initial has shape"),
        ({"shape": (6, 1), "mesh": True}, "not divisible"),
    ],
)
def test_bad_arguments_of_sample_are_named(arguments, message):
    if "mesh" in arguments:
        arguments["mesh"] = Mesh(np.array(jax.devices()[:4]), ("data",))
    with pytest.raises(ValueError, match=message):
        samplers.sample(make("euler"), jax.random.key(0), **{"shape": SHAPE, **arguments})


@pytest.mark.parametrize(
    ("name", "process", "arguments", "message"),
    [
        ("euler", "edm", {"num_steps": 0}, "num_steps is 0"),
        ("euler", "edm", {"num_steps": 2, "spacing": "cosine"}, "spacing is 'cosine'"),
        ("euler", "flow", {"num_steps": 2, "spacing": "karras"}, "finite signal-to-noise ratio"),
        ("euler", "edm", {"num_steps": 2, "times": [2.0, 1.0]}, r"times has shape \(2,\)"),
        ("euler", "edm", {"num_steps": 2, "times": [2.0, 1.0, 1.0]}, "decrease strictly"),
        ("euler", "edm", {"num_steps": 1, "times": [1.0, -1.0]}, "not fall below 0"),
        ("heun", "edm", {"num_steps": 2, "churn": -1.0}, "churn is -1"),
        ("heun", "vp", {"num_steps": 2, "churn": 1.0}, "alpha = 1"),
        ("ddim", "edm", {"num_steps": 2, "eta": 1.5}, "eta is 1.5"),
        ("ddpm_small", "edm", {"num_steps": 2, "variance": "learned"}, "variance is 'learned'"),
        ("dpm_solver_v3", "edm", {"num_steps": 249}, "two times upon one"),
        ("dpm_solver_v3", "flow", {"num_steps": 2, "spacing": "time"}, "finite signal-to-noise"),
    ],
)
def test_bad_arguments_of_samplers_are_named(name, process, arguments, message):
    with pytest.raises(ValueError, match=message):
        SAMPLERS[name][0](gaussian_denoiser(PROCESSES[process]), **arguments)


@pytest.mark.parametrize("spacing", ["karras", "log_snr", "time"])
def test_time_steps_are_spaced_as_named(spacing):
    process = processes.edm()
    times = np.asarray(samplers.time_steps(process, 10, spacing=spacing), np.float64)
    assert times[-1] == 0
    np.testing.assert_allclose(times[0], 80, rtol=1e-6)
    axis = {"karras": times ** (1 / 7), "log_snr": -np.log(times[:-1]), "time": times}[spacing]
    gaps = np.diff(axis if spacing == "time" else axis[:10])
    np.testing.assert_allclose(gaps, gaps[0], rtol=1e-4)
    if spacing != "time":
        np.testing.assert_allclose(times[-2], 0.002, rtol=1e-5)


def test_published_heun_grid():
    """arXiv 2206.00364, Eq. 5, with the settings of its Table 1 for CIFAR-10."""
    ramp = np.arange(18) / 17
    expected = (80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(samplers.time_steps(processes.edm(), 18)[:-1], expected, rtol=5e-6)
    assert samplers.heun(gaussian_denoiser(processes.edm()), num_steps=18).num_steps == 35
