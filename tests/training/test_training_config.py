import ml_collections
import numpy as np
import pytest
from ml_collections.config_dict import FieldReference

from genjax_lab.training import default_config
from genjax_lab.training.config import config_differences, resolve_config


def test_default_config_resolves_to_json_values():
    resolved = resolve_config(default_config())
    assert resolved["max_grad_norm"] is None
    assert resolved["mesh"] == {"data": -1, "fsdp": 1, "tensor": 1}
    assert resolve_config(resolved) == resolved


def test_references_and_tuples_are_resolved():
    config = default_config()
    width = FieldReference(64)
    config.network = ml_collections.ConfigDict({"width": width, "mults": (1, 2), "out": width * 2})
    assert resolve_config(config)["network"] == {"width": 64, "mults": [1, 2], "out": 128}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch_size": 0}, "config.batch_size must be a positive integer, got 0"),
        ({"num_steps": 1.5}, "config.num_steps must be a positive integer"),
        ({"eval_every": -1}, "config.eval_every"),
        ({"steps_per_call": 3}, "config.num_steps=10000 must be a multiple of"),
        ({"keep_every": 1500}, "config.keep_every=1500 must be a multiple of"),
        (
            {"best_metric": "fid"},
            "config.best_metric='fid' needs an evaluation at every checkpoint",
        ),
        ({"mesh": {"model": 2}}, "config.mesh must have the fields"),
        ({"network": {"dtype": np.float32}}, "config.network.dtype is .*float32"),
        ({"rate": float("nan")}, "config.rate is nan"),
        ({"table": {3: 1}}, r"config.table has keys that are not strings: \[3\]"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        resolve_config(default_config().to_dict() | changes)


def test_missing_fields_are_named():
    config = default_config().to_dict()
    del config["checkpoint_every"]
    with pytest.raises(ValueError, match=r"config lacks \['checkpoint_every'\]"):
        resolve_config(config | {"chekpoint_every": 100})


def test_differences_are_listed_unless_free():
    old = resolve_config(default_config().to_dict() | {"optimizer": {"rate": 1e-3}})
    new = resolve_config(
        default_config().to_dict()
        | {"optimizer": {"rate": 2e-3, "decay": 0.1}, "num_steps": 20_000, "seed": 1}
        | {"mesh": {"data": 2, "fsdp": 4, "tensor": 1}}
    )
    assert config_differences(old, old) == []
    assert config_differences(old, new) == [
        "optimizer.decay: '(absent)' -> 0.1",
        "optimizer.rate: 0.001 -> 0.002",
        "seed: 0 -> 1",
    ]
    assert config_differences(old, new, free=("optimizer.*", "num_steps", "mesh.*")) == [
        "seed: 0 -> 1"
    ]
