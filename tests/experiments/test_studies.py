"""Studies and benchmarks start, finish and write what they promise, at a meaningless size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def start(module, *arguments):
    subprocess.run(
        [sys.executable, "-m", f"experiments.{module}", *arguments],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
        check=True,
        timeout=900,
    )


def test_sampler_study_writes_its_table_and_figure(tmp_path):
    start(
        "studies.edm_digits",
        "--seeds=1",
        "--num_steps=50",
        "--budgets=3,5",
        "--num_samples=60",
        f"--out={tmp_path}",
        f"--workdir={tmp_path}/runs",
    )
    result = json.loads((tmp_path / "edm_digits.json").read_text())
    assert set(result["table"]) >= {"Heun", "DDIM", "DPM-Solver++(2M)"}
    assert {row["evaluations"] for row in result["rows"]} == {3, 5}
    assert (tmp_path / "edm_digits.png").stat().st_size > 10_000


@pytest.mark.oracle
def test_train_step_benchmark_prints_a_ratio(tmp_path):
    pytest.importorskip("torch")
    start("benchmarks.train_step", "--cases=mlp", "--repeats=1", f"--out={tmp_path}/t.json")
    assert json.loads((tmp_path / "t.json").read_text())["table"]["mlp"]["ratio"] > 0


@pytest.mark.oracle
def test_sampler_benchmark_prints_a_ratio(tmp_path):
    pytest.importorskip("torch")
    start("benchmarks.sampler", "--cases=mlp", "--repeats=1", f"--out={tmp_path}/s.json")
    assert json.loads((tmp_path / "s.json").read_text())["table"]["mlp"]["ratio"] > 0
