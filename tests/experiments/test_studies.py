"""Studies and benchmarks start, finish and write what they promise, at a meaningless size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from quick_compilation import program_environment

ROOT = Path(__file__).parents[2]


def start(module, *arguments):
    subprocess.run(
        [sys.executable, "-m", f"experiments.{module}", *arguments],
        cwd=ROOT,
        env=program_environment(),
        check=True,
        timeout=900,
    )


def test_sampler_study_writes_its_table_and_figure(tmp_path):
    start(
        "studies.edm_digits",
        "--seeds=1",
        "--num_steps=50",
        "--num_blocks=1",
        "--budgets=3,5",
        "--num_samples=60",
        f"--out={tmp_path}",
        f"--workdir={tmp_path}/runs",
    )
    result = json.loads((tmp_path / "edm_digits.json").read_text())
    assert set(result["table"]) >= {"Heun", "DDIM", "DPM-Solver++(2M)"}
    assert {row["evaluations"] for row in result["rows"]} == {3, 5}
    assert (tmp_path / "edm_digits.png").stat().st_size > 10_000


def test_ddo_study_compares_every_alternative(tmp_path):
    start(
        "studies.ddo",
        *("--seeds=1", "--rounds=1", "--num_steps=100", "--round_steps=50", "--num_samples=60"),
        *(
            "--learning_rates=1e-3",
            "--gains=1",
            "--guidance=2",
            "--batch_size=32",
            "--num_blocks=1",
        ),
        *(f"--out={tmp_path}", f"--workdir={tmp_path}/runs"),
    )
    result = json.loads((tmp_path / "ddo.json").read_text())
    arms = {"base", "continued_mle", "spin", "neon", "autoguidance", "ddo"}
    assert set(result["summary"]["mean"]) == arms
    assert all(value > 0 for value in result["summary"]["mean"].values())
    assert (tmp_path / "ddo.png").stat().st_size > 10_000
    assert (tmp_path / "ddo_curves.png").stat().st_size > 10_000


def test_token_study_compares_every_alternative(tmp_path):
    start(
        "studies.ddo_tokens",
        *("--seeds=1", "--rounds=1", "--num_steps=50", "--round_steps=2", "--num_samples=60"),
        *(
            "--variants=hot roundtrip",
            "--learning_rates=1e-3",
            "--guidance=",
            "--batch_size=32",
            "--depth=1",
        ),
        *(f"--out={tmp_path}", f"--workdir={tmp_path}/runs"),
    )
    table = json.loads((tmp_path / "ddo_tokens.json").read_text())["summary"]["table"]
    assert set(table) == {"base", "continued_mle", "hot roundtrip"}
    assert all(row["fresh"] > 0 and row["nll"] > 0 for row in table.values())
    assert table["hot roundtrip"]["start_ratio"] > 0
    assert (tmp_path / "ddo_tokens.png").stat().st_size > 10_000


def test_tabular_study_reaches_both_optima(tmp_path):
    start("studies.ddo_tabular", "--num_steps=1000", f"--out={tmp_path}")
    table = json.loads((tmp_path / "ddo_tabular.json").read_text())["table"]
    assert table["alpha=beta=1"]["forward"] < 1e-4
    (tilted,) = [row for name, row in table.items() if name.startswith("beta=")]
    assert tilted["forward_kl_to_tilted_optimum"] < 1e-4
    assert (tmp_path / "ddo_tabular.png").stat().st_size > 10_000


@pytest.mark.oracle
def test_ddo_benchmark_prints_its_ratios(tmp_path):
    pytest.importorskip("torch")
    start(
        "benchmarks.ddo_step",
        *("--repeats=1", "--steps=2", "--batch_size=32", "--num_blocks=1"),
        f"--out={tmp_path}/d.json",
    )
    assert json.loads((tmp_path / "d.json").read_text())["table"]["ddo_over_mle"] > 0


@pytest.mark.oracle
def test_train_step_benchmark_prints_a_ratio(tmp_path):
    pytest.importorskip("torch")
    arguments = ("--cases=mlp", "--repeats=1", "--steps=2", f"--out={tmp_path}/t.json")
    start("benchmarks.train_step", *arguments)
    assert json.loads((tmp_path / "t.json").read_text())["table"]["mlp"]["ratio"] > 0


@pytest.mark.oracle
def test_sampler_benchmark_prints_a_ratio(tmp_path):
    pytest.importorskip("torch")
    start("benchmarks.sampler", "--cases=mlp", "--repeats=1", f"--out={tmp_path}/s.json")
    assert json.loads((tmp_path / "s.json").read_text())["table"]["mlp"]["ratio"] > 0


def test_windows_study_compares_windows_and_controls(tmp_path):
    start(
        "studies.gna",
        *("--seeds=1", "--num_steps=2", "--depth=1", "--windows=8", "--crop=64"),
        f"--out={tmp_path}",
    )
    result = json.loads((tmp_path / "gna.json").read_text())
    assert set(result["swapped"]["8"]) == {
        *("stride 1", "stride w/4", "stride w/2", "blocks", "flat", "random")
    }
    assert result["trained_with_windows"]["processor_seconds_over_dense"][0] > 0
    assert (tmp_path / "gna.png").stat().st_size > 10_000


@pytest.mark.oracle
def test_attention_benchmark_compares_with_the_bound(tmp_path):
    pytest.importorskip("torch")
    arguments = ("--cases=tiny", "--repeats=1", f"--out={tmp_path}/n.json")
    start("benchmarks.neighborhood_attention", *arguments)
    (case,) = json.loads((tmp_path / "n.json").read_text())["cases"].values()
    assert all(row["speed_up"] > 0 and row["bound"] >= 1 for row in case.values())
    assert (tmp_path / "n.png").stat().st_size > 5_000


def test_masked_diffusion_study_compares_draws(tmp_path):
    start(
        "studies.mdm",
        *("--seeds=1", "--num_steps=2", "--length=8", "--num_samples=4", "--batch_size=2"),
        *("--sampling_steps=4", "--rates=1e-2", "--draws=10", "--depth=1", "--bound_draws=1"),
        *(f"--out={tmp_path}", f"--workdir={tmp_path}/runs"),
    )
    result = json.loads((tmp_path / "mdm.json").read_text())
    (model,) = result["models"]
    assert set(model["arms"]) == {"first hitting", "exact T=4", "float32 T=4"}
    assert all(row["nats"] > 0 and row["entropy"] > 0 for row in model["arms"].values())
    assert result["toy"]["distance_of_perfect_model"] < 1e-12
    assert (tmp_path / "mdm.png").stat().st_size > 10_000


def test_draw_benchmark_compares_with_a_plain_argmax(tmp_path):
    start(
        "benchmarks.first_hitting",
        *("--repeats=1", "--rows=2", "--vocabularies=50", "--length=4", "--batch_size=2"),
        f"--out={tmp_path}/f.json",
    )
    result = json.loads((tmp_path / "f.json").read_text())
    assert result["draws"][0]["over argmax"]["exact"] > 0
    assert result["sampling"]["draws alone"]["over first hitting"]["ancestral float64"] > 0
