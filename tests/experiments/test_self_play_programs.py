"""Rounds of DDO from the command line, on the checkpoint of a run of images."""

import json
import signal
import time

import jax
import ml_collections
import numpy as np
import optax
import pytest
from started_programs import Program, start

import experiments
from configs import digits_ddo, digits_edm
from experiments import self_play
from experiments.recorded_reference import on_recorded_draws
from genjax_lab.training import restore, train

SMALL = {
    "rounds": 2,
    "num_fakes": 96,
    "batch_size": 32,
    "num_steps": 8,
    "steps_per_call": 4,
    "eval_every": 4,
    "checkpoint_every": 4,
    "log_every": 4,
    "selection_seeds": 48,
    "fresh_seeds": 48,
    "optimizer.learning_rate": 1e-2,
    "optimizer.warmup_steps": 0,
    "tensorboard": False,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory, cache):
    workdir = tmp_path_factory.mktemp("base")
    config = digits_edm.get_config()
    config.update_from_flattened_dict(
        {
            **{"num_steps": 20, "steps_per_call": 10, "checkpoint_every": 20, "progress": False},
            "tensorboard": False,
            **{"network.width": 16, "network.num_blocks": 1, "sampler.num_steps": 3},
            **{"evaluation.num_samples": 48, "evaluation.batch_size": 48},
            "evaluation.cache_dir": str(cache),
        }
    )
    config.mesh.data = 1
    train(experiments.build(config), workdir=workdir, config=config)
    return workdir


def play(base, workdir):
    flags = [f"--config.{name}={value}" for name, value in SMALL.items()]
    return Program(
        "train",
        *("--config=configs/digits_ddo.py", f"--config.base={base}", f"--workdir={workdir}"),
        *flags,
    )


def test_rounds_leave_a_run_that_is_evaluated_and_sampled_from_its_path(base, tmp_path):
    play(base, tmp_path).end()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["0", "1", "2"]
    result = json.loads((tmp_path / "round_2/result.json").read_text())
    assert len(result["table"]) == 2 * len(digits_ddo.get_config().alpha)
    first = restore(base).state.variables("ema")
    jax.tree.map(np.testing.assert_array_equal, restore(tmp_path, 0).state.variables("ema"), first)

    start("evaluate", f"--checkpoint={tmp_path}", "--step=best", "--num=48")
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    fresh = [restore(tmp_path, step).metrics["frechet"] for step in range(3)]
    assert evaluation["step"] == int(np.argmin(fresh))
    # Killed in the middle of a round, the same command ends with the same bits.
    broken = tmp_path / "broken"
    process = play(base, broken)
    while not (broken / "round_2/pool/manifest.json").exists() and process.is_running():
        time.sleep(0.01)
    process.kill()
    process.end(-signal.SIGKILL)
    assert not (broken / "checkpoints/2").exists()
    play(base, broken).end()
    trees = [restore(directory).state.params for directory in (tmp_path, broken)]
    jax.tree.map(np.testing.assert_array_equal, *trees)
    texts = [(directory / "round_2/result.json").read_text() for directory in (tmp_path, broken)]
    assert texts[0] == texts[1]


def test_the_ratios_are_exactly_zero_at_the_start_of_a_round(base, tmp_path):
    """On the first step of the real objective, in the compiled training step."""
    config = digits_ddo.get_config()
    config.base = str(base)
    once = {"rounds": 1, "num_steps": 1, "steps_per_call": 1, "log_every": 1}
    once |= {"eval_every": 1, "checkpoint_every": 1, "progress": False}
    config.update_from_flattened_dict(SMALL | once)
    config.mesh.data = 1
    experiments.run(config, tmp_path)
    first = json.loads((tmp_path / "round_1/grid/metrics.jsonl").open().readline())
    for member, alpha in enumerate(config.alpha):
        assert first[f"delta_real_mean/{member}"] == first[f"delta_fake_mean/{member}"] == 0
        assert first[f"delta_real_std/{member}"] == 0
        np.testing.assert_allclose(first[f"loss/{member}"], (1 + alpha) * np.log(2), rtol=1e-6)
        assert first[f"accuracy/{member}"] == 0.5


def test_late_rounds_may_widen_the_noise(base):
    """`process_from_round` changes the law of training times, and only that."""
    config = digits_ddo.get_config()
    config.base = str(base)
    config.process_from_round = {"2": {"log_sigma_std": 30.0}}
    play_config, _ = self_play.build(config)
    variables = jax.tree.map(lambda leaf: np.stack([leaf]), play_config.variables["params"])
    batch = {"image": np.zeros((256, 8, 8, 1), np.float32), "label": np.zeros(256, np.int32)}
    batch |= {f"fake_{name}": value for name, value in batch.items()}
    variables = {
        **play_config.variables,
        "params": variables,
        "reference": play_config.variables,
    }
    losses = [
        float(
            play_config.objective((1.0,), (1.0,), index)(variables, batch, jax.random.key(0))[1][
                "mle_loss/0"
            ]
        )
        for index in (1, 2)
    ]
    assert losses[0] != losses[1]


@pytest.mark.parametrize(("num_draws", "recorded", "dtype"), [(1, 3, None), (2, 1, "bfloat16")])
def test_recorded_terms_give_the_ratios_of_the_reference_at_the_recorded_draws(
    base, num_draws, recorded, dtype
):
    config = digits_ddo.get_config()
    config.update({"base": str(base), "num_draws": num_draws, "recorded_draws": recorded})
    config.update({"batch_size": 32, "compute_dtype": dtype})
    config.mesh.data = 1
    parts, _ = self_play.build(config)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 17, (40, 8, 8, 1), np.uint8), rng.integers(0, 10, 40)
    pool = {"image": images, "label": labels}
    batch = next(parts.batches(pool, 0, parts.variables, 1))
    assert batch["fake_reference_terms"].shape == (32, recorded, num_draws)
    seeds = np.concatenate([batch["seeds"], batch["fake_seeds"]])
    assert len(np.unique(seeds)) == seeds.size  # every image and sample has its own draws

    # The same draws, with the reference evaluated on them.
    seen = {}
    key = jax.random.key(3)
    on_recorded_draws(lambda variables, batch, key: seen.update(batch))({}, batch, key)
    columns = np.argwhere(batch["seeds"] == np.asarray(seen["seed"])[:, None])
    assert len(columns) == 32 and set(columns[:, 1]) == set(range(recorded))
    reference = jax.tree.map(np.asarray, optax.tree.cast(parts.variables, dtype))
    moved = jax.tree.map(lambda x: 1.1 * x[None], reference["params"])
    variables = {**reference, "params": moved, "reference": reference}
    loss, _ = jax.jit(parts.objective((2.0,), (0.5,), 1))(variables, batch, key)
    plain = {name: value for name, value in seen.items() if "reference" not in name}
    config.recorded_draws = 0
    objective = self_play.build(config)[0].objective((2.0,), (0.5,), 1)
    expected, _ = jax.jit(objective)(variables, plain, jax.random.key(4))
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_every_round_records_its_own_reference_under_its_own_process(base, tmp_path):
    """On two devices; else the ratios of the second round would not start at zero."""
    config = digits_ddo.get_config()
    config.base = str(base)
    short = {"num_steps": 1, "steps_per_call": 1, "log_every": 1, "eval_every": 1}
    config.update_from_flattened_dict(SMALL | short | {"checkpoint_every": 1, "progress": False})
    config.update({"recorded_draws": 2, "process_from_round": {"2": {"log_sigma_std": 3.0}}})
    config.alpha = (1.0,)
    config.ema.ema.half_life_images = 10.0
    config.mesh.data = 2
    experiments.run(config, tmp_path)
    kept = [restore(tmp_path, step).state.params for step in (0, 1)]
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), *kept)
    assert max(jax.tree.leaves(moved)) > 1e-3
    row = json.loads((tmp_path / "round_2/grid/metrics.jsonl").open().readline())
    for name in ("delta_real_mean/0", "delta_fake_mean/0", "delta_real_std/0"):
        assert abs(row[name]) < 1e-3


def test_recorded_draws_need_images_as_they_are(base):
    config = digits_ddo.get_config()
    config.recorded_draws = 2
    restored = restore(base)
    model = ml_collections.ConfigDict(restored.config)
    model.data.flip = True
    with pytest.raises(ValueError, match="flip"):
        self_play.of_model(config, model, restored.state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": None}, "config.base is missing"),
        ({"base": "/nonexistent"}, "is not a directory"),
        ({"loss": "beauty"}, r"config\.loss is 'beauty'"),
        ({"recorded_draws": -1}, "negative"),
    ],
)
def test_mistakes_are_named(base, tmp_path, changes, message):
    config = digits_ddo.get_config()
    config.update_from_flattened_dict(SMALL | {"base": str(base), "progress": False} | changes)
    with pytest.raises(ValueError, match=message):
        experiments.run(config, tmp_path)


def test_rounds_do_not_go_back(base, tmp_path):
    with pytest.raises(ValueError, match="restore_step"):
        experiments.run(digits_ddo.get_config(), tmp_path, restore_step=3)
