import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_experiment

from genjax_lab.parallel import global_batch, make_mesh, parameter_shardings
from genjax_lab.training import half_life_ema, make_train_step, power_ema

BATCH = 16
KEY = jax.random.key(3)


def variables():
    return tiny_experiment.init(jax.random.key(0))


def batches(steps, *, seed=0, batch_size=BATCH):
    rows = np.random.default_rng(seed).normal(size=(steps, batch_size, tiny_experiment.FEATURES))
    return {"x": rows.astype(np.float32)}


def numpy(tree):
    return jax.tree.map(np.array, tree)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def quadratic(variables, batch, key):
    """Half the squared distance of one weight vector from the mean row: gradients by hand."""
    distance = variables["params"]["w"] - jnp.mean(batch["x"], axis=0)
    return 0.5 * jnp.sum(distance**2), {"first": batch["x"][0, 0]}


def vector(value=0.0):
    return {"params": {"w": np.full(3, value, np.float32)}}


def rows(*values, repeat=4):
    """Batches [steps, repeat, 3] whose rows all equal one value per step."""
    return {"x": np.tile(np.float32(values)[:, None, None], (1, repeat, 3))}


@pytest.fixture(scope="module")
def single_device_losses():
    step = make_train_step(
        tiny_experiment.objective,
        optax.adam(3e-3),
        batch_size=BATCH,
        steps_per_call=3,
        max_grad_norm=0.3,
    )
    state, losses = step.init(variables(), KEY), []
    for seed in range(2):
        state, metrics = step.step(state, batches(3, seed=seed))
        losses.append(np.asarray(metrics["loss"]))
    return np.concatenate(losses), numpy(state.ema["ema"])


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2)])
def test_sharding_does_not_change_the_results(sizes, single_device_losses):
    mesh = make_mesh(*sizes)
    step = make_train_step(
        tiny_experiment.objective,
        optax.adam(3e-3),
        batch_size=BATCH,
        steps_per_call=3,
        max_grad_norm=0.3,
        mesh=mesh,
    )
    state, losses = step.init(variables(), KEY), []
    for seed in range(2):
        state, metrics = step.step(state, global_batch(batches(3, seed=seed), mesh, batch_axis=1))
        losses.append(np.asarray(metrics["loss"]))
    expected, average = single_device_losses
    np.testing.assert_allclose(np.concatenate(losses), expected, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), state.ema["ema"], average
    )
    if sizes != (8, 1, 1):
        kernel = state.params["encoder"]["kernel"]
        moment = state.opt_state[1][0].mu["encoder"]["kernel"]
        assert kernel.addressable_shards[0].data.size < kernel.size
        assert moment.sharding == state.ema["ema"]["encoder"]["kernel"].sharding == kernel.sharding


def test_several_steps_in_one_call_are_those_steps_one_by_one():
    data = batches(4)

    def run(steps_per_call):
        step = make_train_step(
            tiny_experiment.objective,
            optax.adam(3e-3),
            batch_size=BATCH,
            steps_per_call=steps_per_call,
        )
        state, losses = step.init(variables(), KEY), []
        for start in range(0, 4, steps_per_call):
            part = {"x": data["x"][start : start + steps_per_call]}
            state, metrics = step.step(state, part)
            assert metrics["loss"].shape == (steps_per_call,)
            losses.extend(np.asarray(metrics["loss"]))
        return np.array(losses), numpy(state.params)

    (losses, params), (one_by_one, expected) = run(4), run(1)
    np.testing.assert_allclose(losses, one_by_one, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params, expected)
    assert len(set(losses.tolist())) == 4


def test_nothing_is_compiled_again_and_the_old_state_is_reused():
    compiled = []

    def on_event(name, *arguments, **keywords):
        if name.endswith("backend_compile_duration"):
            compiled.append(name)

    traces = []

    def objective(*arguments):
        traces.append(None)
        return tiny_experiment.objective(*arguments)

    mesh = make_mesh(2, 2, 2)
    step = make_train_step(
        objective, optax.adam(3e-3), batch_size=BATCH, steps_per_call=2, mesh=mesh
    )
    state = step.init(variables(), KEY)
    jax.monitoring.register_event_duration_secs_listener(on_event)
    try:
        first, _ = step.step(state, batches(2))
        assert compiled
        compiled.clear()
        second, _ = step.step(first, batches(2, seed=1))
        step.step(second, batches(2, seed=2))
    finally:
        jax.monitoring.unregister_event_duration_listener(on_event)
    assert not compiled
    assert len(traces) == 1
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first.params))


def test_one_step_of_gradient_descent_by_hand():
    step = make_train_step(
        quadratic, optax.sgd(0.1), batch_size=4, ema={"half": half_life_ema(4, None)}
    )
    state, metrics = step.step(step.init(vector(), KEY), rows(2.0))
    # The gradient is w - 2 = -2; then w = 0.2, and the average, of one half-life, is half of it.
    np.testing.assert_allclose(state.params["w"], 0.2, rtol=1e-6)
    np.testing.assert_allclose(state.ema["half"]["w"], 0.1, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], [6.0], rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], [2.0 * 3**0.5], rtol=1e-6)
    np.testing.assert_allclose(metrics["first"], [2.0])
    assert (int(state.step), int(state.num_skipped)) == (1, 0)
    assert state.variables()["params"] is state.params
    assert state.variables("half")["params"] is state.ema["half"]
    with pytest.raises(ValueError, match="'other' names no average"):
        state.variables("other")


def test_gradients_are_clipped_to_the_global_norm():
    step = make_train_step(quadratic, optax.sgd(1.0), batch_size=4, max_grad_norm=0.5)
    state, metrics = step.step(step.init(vector(), KEY), rows(2.0))
    np.testing.assert_allclose(np.linalg.norm(state.params["w"]), 0.5, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], [2.0 * 3**0.5], rtol=1e-6)


def test_accumulated_gradient_is_that_of_the_whole_batch():
    def per_row_noise(variables, batch, key):
        error = tiny_experiment.reconstruct(variables, batch["x"] + batch["noise"]) - batch["x"]
        return jnp.mean(error**2), {"noise": jnp.mean(batch["noise"])}

    data = batches(2) | {"noise": 0.1 * batches(2, seed=5)["x"]}

    def run(accumulation_steps, mesh=None):
        step = make_train_step(
            per_row_noise,
            optax.sgd(0.1),
            batch_size=BATCH,
            steps_per_call=2,
            accumulation_steps=accumulation_steps,
            mesh=mesh,
        )
        state, metrics = step.step(step.init(variables(), KEY), data)
        return numpy(state.params), numpy(metrics)

    params, metrics = run(1)
    for accumulation_steps, mesh in ((4, None), (2, make_mesh(2, 4))):
        accumulated, accumulated_metrics = run(accumulation_steps, mesh)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), accumulated, params)
        for name in ("loss", "grad_norm", "noise"):
            np.testing.assert_allclose(accumulated_metrics[name], metrics[name], rtol=2e-5)


def test_microbatch_keys_are_folded_from_the_step_and_the_microbatch():
    def draw(variables, batch, key):
        value = jax.random.normal(key) * batch["x"][0, 0]
        return jnp.sum(variables["params"]["w"]) + value, {}

    def run(accumulation_steps):
        step = make_train_step(
            draw,
            optax.sgd(0.0),
            batch_size=4,
            steps_per_call=2,
            accumulation_steps=accumulation_steps,
        )
        _, metrics = step.step(step.init(vector(), KEY), data)
        return metrics["loss"]

    data = batches(2, batch_size=4)
    # Microbatch m of two holds rows m and m + 2, so its first row is row m.
    expected = [
        [
            jax.random.normal(jax.random.fold_in(jax.random.fold_in(KEY, step), micro))
            * data["x"][step, micro, 0]
            for micro in range(2)
        ]
        for step in range(2)
    ]
    np.testing.assert_allclose(run(2), np.mean(expected, axis=1), rtol=1e-5)
    np.testing.assert_allclose(run(1), np.array(expected)[:, 0], rtol=1e-5)


def test_steps_that_are_not_finite_change_nothing_but_the_counters():
    step = make_train_step(
        quadratic,
        optax.adam(0.1),
        batch_size=4,
        max_consecutive_skips=2,
        max_grad_norm=1.0,
        ema={"power": power_ema(0.1)},
    )
    state, metrics = step.step(step.init(vector(), KEY), rows(1.0))
    step.check(metrics, 1)
    for bad in (np.nan, np.inf):
        before = numpy((state.params, state.opt_state, state.ema))
        state, metrics = step.step(state, rows(bad))
        assert_same(numpy((state.params, state.opt_state, state.ema)), before)
        assert float(metrics["skipped"][0]) == 1.0
        assert not np.isfinite(metrics["loss"][0])
    assert (int(state.step), int(state.num_skipped), int(state.consecutive_skips)) == (3, 2, 2)
    with pytest.raises(FloatingPointError, match=r"2 optimiser steps.*the last finite step was 1"):
        step.check(metrics, 3)
    state, metrics = step.step(state, rows(1.0))
    step.check(metrics, 4)
    assert (int(state.num_skipped), int(state.consecutive_skips)) == (2, 0)
    assert np.all(np.asarray(state.params["w"]) != before[0]["w"])


def test_non_finite_gradient_of_a_finite_loss_is_skipped_too():
    def objective(variables, batch, key):
        # The square root's derivative at zero is infinite.
        return jnp.sum(jnp.sqrt(variables["params"]["w"])), {}

    step = make_train_step(objective, optax.sgd(0.1), batch_size=4)
    state, metrics = step.step(step.init(vector(0.0), KEY), rows(1.0))
    assert (float(metrics["loss"][0]), float(metrics["skipped"][0])) == (0.0, 1.0)
    np.testing.assert_array_equal(state.params["w"], 0.0)


def test_projection_is_applied_at_the_start_and_after_every_update():
    def project(params):
        return jax.tree.map(lambda w: w / jnp.linalg.norm(w), params)

    step = make_train_step(
        quadratic, optax.sgd(0.3), batch_size=4, project=project, ema={"ema": half_life_ema(1e9)}
    )
    state = step.init({"params": {"w": np.float32([3.0, 0.0, 4.0])}}, KEY)
    np.testing.assert_allclose(state.params["w"], [0.6, 0.0, 0.8], rtol=1e-6)
    state, _ = step.step(state, rows(2.0))
    moved = np.array([0.6, 0.0, 0.8]) - 0.3 * (np.array([0.6, 0.0, 0.8]) - 2.0)
    np.testing.assert_allclose(state.params["w"], moved / np.linalg.norm(moved), rtol=1e-6)
    # With the ramp the first average is the first updated vector: the projected one.
    assert_same(numpy(state.ema["ema"]), numpy(state.params))


def test_compute_dtype_is_what_the_objective_sees_and_float32_what_is_kept():
    seen = []

    def objective(variables, batch, key):
        seen.append((variables["params"]["w"].dtype, variables["buffers"]["b"].dtype))
        loss, metrics = quadratic(variables, batch, key)
        return loss, metrics | {"half": loss.astype(jnp.bfloat16)}

    step = make_train_step(
        objective, optax.adam(1e-4), batch_size=4, compute_dtype=jnp.bfloat16, steps_per_call=3
    )
    start = vector(1.0) | {"buffers": {"b": np.float32([1.0])}}
    state, metrics = step.step(step.init(start, KEY), rows(2.0, 2.0, 2.0))
    assert set(seen) == {(jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))}
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.ema))} == {
        jnp.dtype(jnp.float32)
    }
    assert {value.dtype for value in metrics.values()} == {jnp.dtype(jnp.float32)}
    # Three steps of 1e-4 are lost in bfloat16 (its next number after 1 is 1.0078), not in float32.
    np.testing.assert_allclose(state.params["w"], 1.0003, atol=1e-6)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch_size": 0}, "batch_size must be a positive integer, got 0"),
        ({"accumulation_steps": 3}, "batch_size=4 must be a multiple of accumulation_steps"),
        ({"steps_per_call": 1.5}, "steps_per_call must be a positive integer"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be positive or None"),
    ],
)
def test_bad_sizes_are_rejected(changes, message):
    with pytest.raises(ValueError, match=message):
        make_train_step(quadratic, optax.sgd(0.1), **({"batch_size": 4} | changes))


def test_batch_must_divide_among_the_devices():
    with pytest.raises(ValueError, match=r"data \* fsdp = 1 \* 4 \* 2"):
        make_train_step(quadratic, optax.sgd(0.1), batch_size=4, mesh=make_mesh(4, 2))


def test_bad_variables_and_batches_are_rejected_by_name():
    step = make_train_step(quadratic, optax.sgd(0.1), batch_size=4)
    with pytest.raises(ValueError, match='"params"'):
        step.init({"buffers": {"w": np.zeros(3)}}, KEY)
    with pytest.raises(ValueError, match=r"\['params'\]\['w'\] is float16"):
        step.init({"params": {"w": np.zeros(3, np.float16)}}, KEY)
    state = step.init(vector(), KEY)
    for bad in (rows(1.0, 2.0), rows(1.0, repeat=3), {"x": np.zeros(())}):
        with pytest.raises(ValueError, match=r"batches\['x'\] has shape"):
            step.step(state, bad)
    with pytest.raises(ValueError, match="at least one array"):
        step.step(state, {})


def test_objectives_that_break_the_contract_are_rejected():
    def per_row(variables, batch, key):
        return jnp.mean(batch["x"] - variables["params"]["w"], axis=-1), {}

    def named_loss(variables, batch, key):
        loss, _ = quadratic(variables, batch, key)
        return loss, {"loss": loss}

    for objective, message in ((per_row, r"scalar loss, got shape \(4,\)"), (named_loss, "'loss'")):
        step = make_train_step(objective, optax.sgd(0.1), batch_size=4)
        with pytest.raises(ValueError, match=message):
            step.step(step.init(vector(), KEY), rows(1.0))


def test_variables_on_the_mesh_stay_there_and_others_are_moved(monkeypatch):
    """A model's parts may be too many for the memory of a host."""
    mesh = make_mesh(data=2, fsdp=4)
    make = make_train_step(quadratic, optax.adam(1.0), batch_size=8, mesh=mesh)
    params = {"w": np.arange(2**15, dtype=np.float32).reshape(128, 256)}
    there = jax.device_put(params, parameter_shardings(params, mesh))
    assert not there["w"].is_fully_replicated
    elsewhere = jax.device_put(params, jax.devices()[3])
    expected = make.init({"params": params}, KEY).params
    assert_same(make.init({"params": elsewhere}, KEY).params, expected)

    class Numpy:
        """What the module has of numpy: small arrays only."""

        ndarray = np.ndarray

        @staticmethod
        def asarray(array):
            assert np.size(array) < 2**15, "the parameters came to the host"
            return np.asarray(array)

    monkeypatch.setattr("genjax_lab.training.step.np", Numpy)
    placed = make.init({"params": there}, KEY).params
    with pytest.raises(AssertionError, match="came to the host"):
        make.init({"params": elsewhere}, KEY)
    assert_same(placed, expected)
    assert placed["w"].sharding == there["w"].sharding
