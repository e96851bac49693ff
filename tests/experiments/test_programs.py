"""The three programs, as a user starts them: train, evaluate and sample from the path alone."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from quick_compilation import program_environment
from started_programs import ROOT, start

SMALL = [
    "--config.num_steps=20",
    "--config.steps_per_call=10",
    "--config.checkpoint_every=10",
    "--config.log_every=10",
    "--config.network.width=16",
    "--config.network.num_blocks=1",
    "--config.sampler.num_steps=3",
    "--config.evaluation.num_samples=40",
    "--config.evaluation.batch_size=24",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache):
    workdir = tmp_path_factory.mktemp("run")
    arguments = ("--config=configs/digits_edm.py", f"--workdir={workdir}")
    arguments += (f"--config.evaluation.cache_dir={cache}", *SMALL)
    # In an interpreter of its own, in which nothing has been imported.
    subprocess.run(
        [sys.executable, "-m", "experiments.train", *arguments],
        cwd=ROOT,
        env=program_environment(),
        check=True,
        timeout=600,
    )
    return workdir


def test_run_directory_tells_what_was_run(run):
    config = json.loads((run / "config.json").read_text())
    assert config["network"]["width"] == 16
    assert "jax" in json.loads((run / "versions.json").read_text())
    assert "experiments.train" in (run / "command.txt").read_text()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [10, 20]
    assert all(np.isfinite(row["loss"]) for row in rows if "loss" in row)
    assert list((run / "tensorboard").iterdir())


def test_evaluation_separates_reported_from_fresh_seeds(run):
    result = start("evaluate", f"--checkpoint={run}", "--metrics=frechet,precision_recall")
    values = json.loads((run / "evaluation.json").read_text())
    assert values["step"] == 20
    assert values["num_samples"] == 40
    assert values["frechet_min_of_3"] <= values["frechet_mean"] <= values["frechet_max"]
    assert values["frechet_fresh"] > 0
    assert 0 <= values["precision_fresh"] <= 1
    assert f"{values['frechet_fresh']:.3f}" in result.stdout


def test_samples_are_a_picture_or_arrays_that_do_not_depend_on_how_they_were_drawn(run, tmp_path):
    start("sample", f"--checkpoint={run}", "--num=30", f"--out={tmp_path}/grid.png")
    with Image.open(tmp_path / "grid.png") as picture:
        shades = np.asarray(picture.convert("L"))
    assert min(shades.shape) > 100
    assert len(np.unique(shades)) > 10

    start("sample", f"--checkpoint={run}", "--num=30", f"--out={tmp_path}/all.npz")
    start("sample", f"--checkpoint={run}", "--num=9", "--first=20", f"--out={tmp_path}/part.npz")
    whole = np.load(tmp_path / "all.npz")["images"]
    part = np.load(tmp_path / "part.npz")["images"]
    assert whole.shape == (30, 8, 8, 1)
    assert whole.dtype == np.uint8
    assert whole.max() <= 16
    # Another batch size may round a value that lies on the border of two levels otherwise.
    assert np.mean(whole[20:29] != part) < 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "--checkpoint={tmp}"], "holds no checkpoint"),
        (["evaluate", "--checkpoint={run}", "--metrics=beauty"], "frechet"),
        (["sample", "--checkpoint={run}", "--step=7", "--out={tmp}/x.png"], "10, 20"),
        (["sample", "--checkpoint={run}", "--num=2", "--out={tmp}/x.bmp"], ".png or .npz"),
    ],
)
def test_mistakes_are_named(run, tmp_path, arguments, message):
    filled = [argument.format(run=run, tmp=tmp_path) for argument in arguments]
    result = start(*filled, check=False)
    assert result.returncode != 0
    assert message in result.stderr


def test_another_config_in_the_same_directory_is_refused(run, cache):
    arguments = [f"--workdir={run}", f"--config.evaluation.cache_dir={cache}", *SMALL]
    changed = "--config.optimizer.learning_rate=0.5"
    result = start("train", "--config=configs/digits_edm.py", *arguments, changed, check=False)
    assert result.returncode != 0
    assert "learning_rate" in result.stderr
