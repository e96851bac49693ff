"""Studies start, finish and write what they promise, at a meaningless size."""

import json

from started_programs import start


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


def test_study_of_exact_accuracy_compares_methods_and_reaches_the_policy_of_right_answers(tmp_path):
    start(
        "studies.nft_tabular",
        *("--seeds=2", "--num_steps=4", "--rates=0.06", "--methods=NFT,RFT", "--descent=3000"),
        f"--out={tmp_path}",
    )
    result = json.loads((tmp_path / "nft_tabular.json").read_text())
    assert set(result["methods"]) == {"NFT", "RFT"}
    assert all(row["0.06"]["error@4"] < result["base_error"] for row in result["methods"].values())
    assert all(row["total_variation"] < 1e-3 for row in result["theorem"]["hard"].values())
    assert (tmp_path / "nft_tabular.png").stat().st_size > 10_000


def test_study_of_a_decoder_compares_methods_at_equal_cost(tmp_path):
    start(
        "studies.nft",
        *("--seeds=1", "--rates=1e-3", "--methods=NFT", "--rollouts=2", "--pretraining=20"),
        *("--evaluations=1", "--answers=64", "--workers=0"),
        *(f"--out={tmp_path}", f"--workdir={tmp_path}/runs"),
    )
    result = json.loads((tmp_path / "nft.json").read_text())
    assert result["methods"]["NFT"]["0.001"]["ledger"]["answers"] == 2 * 64 * 8
    identity = result["gradient_identity"]["float64"]
    assert identity["Dr.GRPO, epsilon = 1.0"] < 1e-12 < 0.01 < identity["Dr.GRPO, epsilon = 2.0"]
    assert (tmp_path / "nft.png").stat().st_size > 10_000
