import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from genjax_lab.parallel import make_mesh, parameter_shardings
from genjax_lab.training import Checkpoints, checksum, default_config, restore, restore_config
from genjax_lab.training.checkpoint import checkpoint_steps, set_aside_later_steps
from genjax_lab.training.checksum import tree_checksums
from genjax_lab.training.config import resolve_config
from genjax_lab.training.state import TrainState


def make_state(value=0.0, *, width=128, mesh=None):
    """A state as a run has it, without the compilation of a step."""
    rng = np.random.default_rng(0)
    params = {
        "dense": {
            "kernel": (rng.normal(size=(128, width)) + value).astype(np.float32),
            "bias": np.full(width, value, np.float32),
        }
    }
    state = TrainState(
        step=np.int32(value),
        params=params,
        constants={"buffers": {"scale": np.float32([1.0, value])}},
        opt_state=optax.adamw(1e-3).init(params),
        ema={"ema": jax.tree.map(lambda leaf: leaf + 1, params)},
        key=jax.random.key(5),
        num_skipped=np.int32(2),
        consecutive_skips=np.int32(1),
    )
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    return jax.device_put(state, parameter_shardings(state, mesh))


def config(**changes):
    return resolve_config(default_config().to_dict() | {"note": [1, "two"]} | changes)


def save_steps(directory, steps, *, metrics=None, **changes):
    with Checkpoints(directory, config(**changes)) as checkpoints:
        for step in steps:
            checkpoints.save(
                step,
                make_state(step),
                iterator_state={"position": step},
                metrics=metrics and metrics.get(step),
                log={"sums": {"loss": [0.1, 3]}},
            )


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def plain(state):
    return state.replace(key=jax.random.key_data(state.key))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three checkpoints of one run; not to be changed."""
    directory = tmp_path_factory.mktemp("run")
    metrics = {10: {"error": 2.0}, 20: {"error": 1.0}, 30: {"error": 3.0}}
    save_steps(
        directory / "checkpoints",
        (10, 20, 30),
        metrics=metrics,
        keep_checkpoints=3,
        best_metric="error",
        eval_every=1000,
    )
    return directory


def test_everything_comes_back_from_the_path_alone(run):
    restored = restore(run)
    state = make_state(30)
    assert restored.step == 30
    assert restored.config["note"] == [1, "two"] == restore_config(run)["note"]
    assert restored.iterators == [{"position": 30}]
    assert restored.metrics == {"error": 3.0}
    assert restored.log == {"sums": {"loss": [0.1, 3]}}
    assert restored.versions["jax"] == jax.__version__
    assert restored.state.opt_state is None
    assert_same(plain(restored.state), plain(state).replace(opt_state=None))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(restored.state.params))
    assert_same(restored.state.variables("ema")["params"], state.ema["ema"])
    assert jax.random.key_impl(restored.state.key) == jax.random.key_impl(state.key)
    assert restore(run / "checkpoints", 10).state.step == 10
    assert restore(run, "best").step == 20


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 4, 2)])
def test_state_is_restored_onto_any_mesh(run, sizes):
    target = make_state(mesh=make_mesh(*sizes))
    state = restore(run, 20, target=target).state
    assert_same(plain(state), plain(make_state(20)))
    jax.tree.map(lambda a, b: None if a.sharding == b.sharding else pytest.fail(), state, target)
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), target
    )
    assert_same(plain(restore(run, 20, target=abstract).state), plain(state))


def test_saving_is_not_disturbed_by_what_happens_to_the_state_afterwards(tmp_path):
    next_state = jax.jit(
        lambda params: jax.tree.map(lambda leaf: leaf * 2 + 1, params), donate_argnums=0
    )
    # Buffers that XLA may reuse, as a step returns them; those of numpy arrays it would not.
    state = jax.jit(lambda state: jax.tree.map(jnp.copy, state))(make_state(4))
    with Checkpoints(tmp_path, config()) as checkpoints:
        checkpoints.save(4, state, iterator_state={})
        params = state.params
        for _ in range(20):
            params = next_state(params)
        jax.block_until_ready(params)
    assert_same(restore(tmp_path).state.params, make_state(4).params)


def test_latest_periodic_and_best_checkpoints_are_kept(tmp_path):
    metrics = {step: {"error": float(abs(step - 20))} for step in range(10, 80, 10)}
    # A checkpoint at which nothing was evaluated, as SIGTERM leaves, and one that is not a number.
    del metrics[50]
    metrics[10]["error"] = float("nan")
    save_steps(
        tmp_path,
        range(10, 80, 10),
        metrics=metrics,
        keep_checkpoints=2,
        keep_every=30,
        checkpoint_every=10,
        best_metric="error",
        eval_every=10,
    )
    assert checkpoint_steps(tmp_path) == [20, 30, 60, 70]
    assert restore(tmp_path, "best").step == 20
    assert checkpoint_steps(tmp_path / "..") == []


def test_remains_of_a_save_that_was_killed_are_cleared_away(tmp_path):
    save_steps(tmp_path, (1,))
    (tmp_path / "1").rename(tmp_path / "1.orbax-checkpoint-tmp")
    save_steps(tmp_path, (2,))
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


def test_steps_are_never_overwritten(tmp_path):
    save_steps(tmp_path, (10,))
    with pytest.raises(ValueError, match="step 10"):
        save_steps(tmp_path, (10,))
    with pytest.raises(ValueError, match="already holds step 10"):
        save_steps(tmp_path, (5,))


def test_going_back_sets_later_steps_aside_without_loss(tmp_path):
    save_steps(tmp_path / "checkpoints", (10, 20), keep_checkpoints=5)
    assert set_aside_later_steps(tmp_path / "checkpoints", 10) == [20]
    save_steps(tmp_path / "checkpoints", (20,), keep_checkpoints=5)
    assert set_aside_later_steps(tmp_path / "checkpoints", 10) == [20]
    assert set_aside_later_steps(tmp_path / "checkpoints", 10) == []
    aside = sorted(path.name for path in (tmp_path / "checkpoints_set_aside").iterdir())
    assert aside == ["20", "20.1"]


def largest_file(directory):
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_a_bit(step):
    path = largest_file(step / "state")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def shorten_the_data(step):
    path = largest_file(step / "state")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lose_the_array_list(step):
    (step / "state" / "_METADATA").unlink()


def shorten_the_metadata(step):
    path = step / "meta" / "metadata"
    path.write_text(path.read_text()[:100])


def replace_by_a_foreign_one(step):
    import orbax.checkpoint as ocp

    shutil.rmtree(step)
    args = ocp.args.Composite(state=ocp.args.PyTreeSave({"w": jnp.ones(3)}))
    with ocp.CheckpointManager(step.parent) as manager:
        manager.save(int(step.name), args=args)


def claim_another_format(step):
    path = step / "meta" / "metadata"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": "other 3"}))


def empty(step):
    shutil.rmtree(step)
    step.mkdir()


DAMAGES = [
    flip_a_bit,
    shorten_the_data,
    lose_the_array_list,
    shorten_the_metadata,
    replace_by_a_foreign_one,
    claim_another_format,
    empty,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_or_foreign_checkpoint_is_an_error_that_names_the_intact_ones(
    run, tmp_path, damage
):
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "checkpoints" / "30")
    with pytest.raises(ValueError) as error:
        restore(tmp_path, target=make_state())
    message = str(error.value)
    assert str(tmp_path / "checkpoints" / "30") in message
    assert "pass step=20 (training: restore_step=20)" in message
    assert "[10]" in message
    # The earlier one is used when asked for, and what is said of it is true.
    assert restore(tmp_path, 20, target=make_state()).step == 20


def test_advice_skips_earlier_checkpoints_that_are_damaged_too(run, tmp_path):
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    flip_a_bit(tmp_path / "checkpoints" / "30")
    empty(tmp_path / "checkpoints" / "20")
    with pytest.raises(ValueError, match=r"pass step=10 .*damaged too: \[20\]"):
        restore(tmp_path)
    with pytest.raises(ValueError, match="cannot be compared"):
        restore(tmp_path, "best")
    empty(tmp_path / "checkpoints" / "10")
    with pytest.raises(ValueError, match=r"\[10, 20\] are damaged too"):
        restore(tmp_path)


def test_target_of_another_network_is_an_error_that_lists_the_difference(run):
    with pytest.raises(ValueError) as error:
        restore(run, target=make_state(width=64))
    assert "params/dense/kernel: ((128, 128), 'float32') stored" in str(error.value)
    other = make_state()
    other = other.replace(ema={"other": other.ema["ema"]})
    with pytest.raises(ValueError, match=r"Lacking: ema/other/.*not in the target: ema/ema/"):
        restore(run, target=other)


def test_missing_checkpoints_are_errors(run, tmp_path):
    with pytest.raises(ValueError, match="not a directory"):
        restore(tmp_path / "absent")
    with pytest.raises(ValueError, match="holds no checkpoint"):
        restore(tmp_path)
    with pytest.raises(ValueError, match=r"step=15 is not in .*\[10, 20, 30\]"):
        restore(run, 15)
    save_steps(tmp_path, (1,))
    with pytest.raises(ValueError, match="needs a best_metric"):
        restore(tmp_path, "best")


def test_state_of_the_iterator_must_be_json(tmp_path):
    with (
        Checkpoints(tmp_path, config()) as checkpoints,
        pytest.raises(ValueError, match="iterator_state must be a dict of JSON"),
    ):
        checkpoints.save(1, make_state(), iterator_state={"rng": object()})


def test_best_metric_must_be_evaluated(tmp_path):
    changes = {"best_metric": "error", "eval_every": 1000}
    with pytest.raises(ValueError, match=r"best_metric='error' is not a metric.*\['fid'\]"):
        save_steps(tmp_path, (1,), metrics={1: {"fid": 1.0}}, **changes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool", "complex64"])
def test_checksums_are_the_same_for_every_sharding_and_see_every_change(dtype):
    values = jnp.asarray(np.random.default_rng(0).integers(0, 2, size=(8, 16)), dtype)
    (found,) = tree_checksums(np.asarray(values)).values()
    for sizes in ((8, 1, 1), (2, 2, 2)):
        mesh = make_mesh(*sizes)
        split = jax.device_put(values, parameter_shardings(values, mesh, min_size=1))
        assert tree_checksums(split) == {"": found}
    changed = values.at[3, 5].set(1 - values[3, 5]) if dtype != "bool" else ~values
    swapped = values[:, ::-1]
    for other in (changed, swapped, values.reshape(16, 8).T, values[:4]):
        assert tree_checksums(other) != {"": found}


@pytest.mark.parametrize("dtype", ["float64", "int64", "complex128", "float32", "float16"])
def test_checksums_of_small_and_of_large_arrays_are_the_same(dtype, monkeypatch):
    """The small ones are summed by numpy, the large ones by a compiled program."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        values = [jnp.asarray(1e3 * rng.normal(size=s)).astype(dtype) for s in ((), (0, 3), (5, 7))]
        small = tree_checksums(values)
        monkeypatch.setattr(checksum, "_SMALL", -1)
        assert tree_checksums(values) == small
