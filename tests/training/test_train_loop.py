import json
import os
import shlex
import shutil
import signal
import sys
import threading

import jax
import numpy as np
import pytest
import tiny_experiment

from genjax_lab.training import read_metrics, restore, restore_posthoc, train
from genjax_lab.training.checkpoint import checkpoint_steps
from genjax_lab.training.preemption import preemption_notice


def run(workdir, config, *, experiment=None, **arguments):
    experiment = experiment or tiny_experiment.experiment(config)
    return train(experiment, workdir=workdir, config=config, **arguments)


def assert_same_parameters(a, b):
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of 24 steps, checkpoints at 8, 16 and 24, all kept; not to be changed."""
    workdir = tmp_path_factory.mktemp("finished")
    config = tiny_experiment.config(keep_checkpoints=9, best_metric="error")
    return workdir, config, run(workdir, config)


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run that a test may change."""
    workdir, config, _ = finished
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    return tmp_path, config.copy_and_resolve_references()


def test_directory_of_a_run_holds_what_describes_it(finished):
    workdir, _, state = finished
    assert int(state.step) == 24
    assert json.loads((workdir / "config.json").read_text()) == restore(workdir).config
    assert json.loads((workdir / "versions.json").read_text())["jax"] == jax.__version__
    assert shlex.join(sys.orig_argv) in (workdir / "command.txt").read_text()
    rows = read_metrics(workdir)
    assert [row["step"] for row in rows if "loss" in row] == [4, 8, 12, 16, 20, 24]
    assert [row["step"] for row in rows if "eval/error" in row] == [8, 16, 24]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]
    assert checkpoint_steps(workdir / "checkpoints") == [8, 16, 24]
    errors = [row["eval/error"] for row in rows if "eval/error" in row]
    assert restore(workdir, "best").metrics["error"] == min(errors)


def test_finished_run_returns_at_once_and_a_longer_one_goes_on(copy):
    workdir, config = copy

    def fail(state):
        raise AssertionError("there is nothing to evaluate")

    experiment = tiny_experiment.experiment(config, evaluate=fail)
    assert_same_parameters(run(workdir, config, experiment=experiment), restore(workdir).state)
    config.num_steps, config.eval_every, config.best_metric = 28, 0, None
    positions = []

    class Rows(tiny_experiment.Rows):
        def __next__(self):
            positions.append(self.position)
            return super().__next__()

    experiment = tiny_experiment.experiment(config, batches=lambda state: Rows(16))
    assert int(run(workdir, config, experiment=experiment).step) == 28
    # The next batches after the 24 that were used; and none is taken that no step uses.
    assert positions == [24, 25, 26, 27]
    config.num_steps = 10
    with pytest.raises(ValueError, match=r"stands at step 28.*num_steps=10 cannot be reached"):
        run(workdir, config)


def test_other_config_is_refused_unless_told(copy):
    workdir, config = copy
    config.seed, config.ema.ema.half_life_images, config.log_every = 1, 50.0, 5
    with pytest.raises(ValueError) as error:
        run(workdir, config)
    assert "ema.ema.half_life_images: 100.0 -> 50.0" in str(error.value)
    assert "seed: 0 -> 1" in str(error.value)
    assert "log_every" not in str(error.value)
    with pytest.raises(ValueError, match="half_life"):
        run(workdir, config, allow_changes=["seed"])
    assert int(run(workdir, config, allow_changes=["seed", "ema.*"]).step) == 24


def test_earlier_checkpoint_is_used_only_when_asked_and_gives_the_same_run(copy, finished):
    workdir, config = copy
    (workdir / "checkpoints" / "24" / "meta" / "metadata").unlink()
    with pytest.raises(ValueError, match="restore_step=16"):
        run(workdir, config)
    with pytest.raises(ValueError, match="step=10 is not in"):
        run(workdir, config, restore_step=10)
    state = run(workdir, config, restore_step=16)
    assert_same_parameters(state, finished[2])
    assert checkpoint_steps(workdir / "checkpoints") == [8, 16, 24]
    assert (workdir / "checkpoints_set_aside" / "24").exists()
    untimed = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(directory)]
        for directory in (workdir, finished[0])
    ]
    assert untimed[0] == untimed[1]


def test_restore_step_needs_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="restore_step=8, but"):
        run(tmp_path, tiny_experiment.config(), restore_step=8)


def test_posthoc_average_of_a_run_reproduces_the_one_it_stored(finished):
    workdir, _, state = finished
    variables = restore_posthoc(workdir, 0.1)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        variables,
        jax.device_get(state.variables("power")),
    )
    other = restore_posthoc(workdir, 0.12, step=16)["params"]["decoder"]["kernel"]
    assert other.shape == state.params["decoder"]["kernel"].shape
    with pytest.raises(ValueError, match="sigma_rel must"):
        restore_posthoc(workdir, 0.5)


def test_run_stops_after_too_many_steps_that_were_not_finite(tmp_path):
    class Rows(tiny_experiment.Rows):
        def __next__(self):
            batch = super().__next__()
            if self.position in (3, *range(10, 40)):  # steps 3 and 10, 11, ...
                batch["x"][:, 0] = np.nan
            return batch

    config = tiny_experiment.config(max_consecutive_skips=4, log_every=1)
    experiment = tiny_experiment.experiment(config, batches=lambda state: Rows(16))
    with pytest.raises(FloatingPointError, match="the last finite step was 9"):
        run(tmp_path, config, experiment=experiment)
    rows = {row["step"]: row for row in read_metrics(tmp_path) if "loss" in row}
    assert [step for step, row in rows.items() if row["skipped"]] == [3, 10, 11, 12, 13, 14]
    assert rows[3]["loss"] is None and rows[4]["num_skipped"] == 1
    assert checkpoint_steps(tmp_path / "checkpoints") == [8]
    assert np.all(np.isfinite(restore(tmp_path).state.params["decoder"]["kernel"]))


def test_data_that_end_or_have_another_size_are_errors(tmp_path):
    config = tiny_experiment.config()

    class Ending(tiny_experiment.Rows):
        def __next__(self):
            raise StopIteration

    for rows, message in ((Ending(16), "batches ended"), (tiny_experiment.Rows(8), "batch_size")):
        experiment = tiny_experiment.experiment(config, batches=lambda state, rows=rows: rows)
        with pytest.raises(ValueError, match=message):
            run(tmp_path, config, experiment=experiment)


def test_progress_bar_shows_the_loss_when_asked(tmp_path, capsys):
    config = tiny_experiment.config(progress=True, num_steps=4, eval_every=0)
    run(tmp_path, config)
    shown = capsys.readouterr().err
    assert "4/4" in shown and "loss=" in shown


def test_sigterm_is_noticed_once_and_the_old_handler_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with preemption_notice() as preempted:
        assert not preempted(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert preempted(2)
        # A second one would end the process.
        assert signal.getsignal(signal.SIGTERM) is before
    assert signal.getsignal(signal.SIGTERM) is before


def test_training_in_another_thread_leaves_signals_alone():
    results = []

    def body():
        with preemption_notice() as preempted:
            results.append(preempted(1))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert results == [False]
    assert signal.getsignal(signal.SIGTERM) is before
