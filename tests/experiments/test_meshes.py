"""Real configs on other meshes and in other processes: `config.mesh` is all that changes."""

import signal
import socket
import time

import jax
import numpy as np
import pytest
from started_programs import Program

import experiments
from configs import digits_edm, mnist5k_dit, mnist5k_edm
from genjax_lab.parallel import global_batch, make_mesh
from genjax_lab.training import make_train_step, read_metrics, restore, train

# Wide enough for the rules to split the kernels, which have 2^14 elements.
SETTINGS = {
    "num_steps": 24,
    "steps_per_call": 4,
    "log_every": 1,
    "eval_every": 8,
    "checkpoint_every": 8,
    "best_metric": "frechet",
    "batch_size": 16,
    "network.width": 128,
    "network.num_blocks": 1,
    "sampler.num_steps": 3,
    "evaluation.num_samples": 40,
    "evaluation.batch_size": 16,
    "tensorboard": False,
}
ONE = {"data": 1, "fsdp": 1, "tensor": 1}


def digits_config(cache, mesh):
    config = digits_edm.get_config()
    config.update_from_flattened_dict(
        SETTINGS | {"progress": False, "evaluation.cache_dir": str(cache)}
    )
    config.mesh.update(mesh)
    return config


@pytest.fixture(scope="module")
def one_device(tmp_path_factory, cache):
    workdir = tmp_path_factory.mktemp("one_device")
    config = digits_config(cache, ONE)
    state = train(experiments.build(config), workdir=workdir, config=config)
    return workdir, jax.device_get(state.params)


def losses(directory):
    rows = [row for row in read_metrics(directory) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 25))
    return np.array([row["loss"] for row in rows])


def distances(directory):
    rows = [row for row in read_metrics(directory) if "eval/frechet" in row]
    assert [row["step"] for row in rows] == [8, 16, 24]
    return np.array([row["eval/frechet"] for row in rows])


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 4, 1)])
def test_run_on_eight_devices_is_that_on_one(tmp_path, cache, one_device, sizes):
    workdir, params = one_device
    config = digits_config(cache, dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    state = train(experiments.build(config), workdir=tmp_path, config=config)
    np.testing.assert_allclose(losses(tmp_path), losses(workdir), atol=1e-5)
    # A value on the border of two grey levels may fall to either side.
    np.testing.assert_allclose(distances(tmp_path), distances(workdir), rtol=1e-2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), state.params, params)
    spread = {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(state.params)}
    assert spread == {8}
    if sizes != (8, 1, 1):
        assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(state.params))
    # The best checkpoint is that of the lowest distance.
    assert restore(tmp_path, "best").metrics["frechet"] == distances(tmp_path).min()


def start(workdir, cache, *arguments):
    flags = [f"--config.{name}={value}" for name, value in SETTINGS.items()]
    return Program(
        *("train", "--config=configs/digits_edm.py"),
        *(f"--workdir={workdir}", f"--config.evaluation.cache_dir={cache}", *flags),
        *arguments,
    )


def test_two_processes_give_the_losses_of_one(tmp_path, cache, one_device):
    workdir, params = one_device
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    both = [
        start(
            tmp_path,
            cache,
            *("--distributed", f"--coordinator=127.0.0.1:{port}", "--num_processes=2"),
            f"--process_id={index}",
        )
        for index in range(2)
    ]
    for process in both:
        process.end()
    np.testing.assert_allclose(losses(tmp_path), losses(workdir), atol=1e-5)
    np.testing.assert_allclose(distances(tmp_path), distances(workdir), rtol=1e-2)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
        restore(tmp_path).state.params,
        params,
    )


def test_killed_run_goes_on_to_the_same_bits(tmp_path, cache):
    """With the data loader, the real network and evaluation, killed between two checkpoints."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    start(whole, cache).end()
    process = start(broken, cache)
    while not (broken / "checkpoints/8").exists() and process.is_running():
        time.sleep(0.001)
    process.kill()
    process.end(-signal.SIGKILL)
    assert not (broken / "checkpoints/24").exists()
    start(broken, cache).end()

    a, b = restore(whole), restore(broken)
    assert a.iterators == b.iterators
    for tree in ("params", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(a.state, tree), getattr(b.state, tree))
    np.testing.assert_array_equal(losses(whole), losses(broken))
    np.testing.assert_array_equal(distances(whole), distances(broken))


SIDE = 14  # of images; no kernel depends on it


def small(config, **fields):
    config.network.update(fields)
    config.data.image_shape = (SIDE, SIDE, 1)
    config.batch_size = 8
    return config


NETWORKS = {
    "DiT": small(mnist5k_dit.get_config(), width=64, depth=1, num_heads=2),
    "SongUNet": small(mnist5k_edm.get_config(), model_channels=48, channel_mult=(1,)),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_train_step_of_other_networks_on_every_axis_is_that_on_one_device(network):
    config = NETWORKS[network]
    experiment = experiments.build(config)
    key = jax.random.key(0)
    variables = jax.device_get(experiment.init(key))
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.normal(size=(1, 8, SIDE, SIDE, 1)).astype(np.float32),
        "label": rng.integers(10, size=(1, 8)),
    }
    results = []
    for sizes in ((1, 1, 1), (2, 2, 2)):
        mesh = make_mesh(*sizes)
        step = make_train_step(experiment.objective, experiment.optimizer, batch_size=8, mesh=mesh)
        state, seen = step.init(variables, key), []
        for _ in range(2):
            state, metrics = step.step(state, global_batch(batch, mesh, batch_axis=1))
            seen.append([float(metrics[name][0]) for name in ("loss", "grad_norm")])
        results.append(np.array(seen))
    assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(state.params))
    np.testing.assert_allclose(*results, rtol=1e-5)
