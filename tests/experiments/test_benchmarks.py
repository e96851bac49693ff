"""Benchmarks start, finish and write what they promise, at a meaningless size."""

import json

import pytest
from started_programs import start


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


@pytest.mark.oracle
def test_attention_benchmark_compares_with_the_bound(tmp_path):
    pytest.importorskip("torch")
    arguments = ("--cases=tiny", "--repeats=1", f"--out={tmp_path}/n.json")
    start("benchmarks.neighborhood_attention", *arguments)
    (case,) = json.loads((tmp_path / "n.json").read_text())["cases"].values()
    assert all(row["speed_up"] > 0 and row["bound"] >= 1 for row in case.values())
    assert (tmp_path / "n.png").stat().st_size > 5_000


def test_draw_benchmark_compares_with_a_plain_argmax(tmp_path):
    start(
        "benchmarks.first_hitting",
        *("--repeats=1", "--rows=2", "--vocabularies=50", "--length=4", "--batch_size=2"),
        f"--out={tmp_path}/f.json",
    )
    result = json.loads((tmp_path / "f.json").read_text())
    assert result["draws"][0]["over argmax"]["exact"] > 0
    assert result["sampling"]["draws alone"]["over first hitting"]["ancestral float64"] > 0


@pytest.mark.oracle
def test_decoder_benchmark_compares_with_transformers_and_with_itself(tmp_path):
    pytest.importorskip("transformers")
    start(
        "benchmarks.decoder",
        *("--repeats=1", "--sizes=tiny", "--batch_size=8", "--length=4", "--limit=8", "--queue=2"),
        *("--parts=transformers,losses,slots,prompts", f"--out={tmp_path}/d.json"),
    )
    result = json.loads((tmp_path / "d.json").read_text())["tiny"]
    assert result["transformers"]["generation_ratio"] > 0
    assert 0 < result["slots"]["utilisation_batches"] <= 1
    assert result["prompts"]["operations_ratio"] == pytest.approx(8, rel=0.2)
