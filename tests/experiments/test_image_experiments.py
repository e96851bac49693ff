"""How the objective of image experiments follows from their config."""

import jax
import numpy as np
import pytest

from configs import cifar10_edm
from experiments import images

SONG = {
    "name": "SongUNet",
    "resolution": 8,
    "model_channels": 8,
    "channel_mult": (1,),
    "num_blocks": 1,
    "attn_resolutions": (),
}


def loss_shape(config):
    """Traces the objective on a batch as the loader yields it."""
    experiment = images.build(config)
    key = jax.random.key(0)
    batch = {"image": np.zeros((2, 8, 8, 1), np.float32), "label": np.zeros(2, np.int32)}
    variables = jax.eval_shape(experiment.init, key)
    return jax.eval_shape(experiment.objective, variables, batch, key)[0].shape


def small_config(network, **changes):
    config = images.default_config()
    config.network = network
    config.update(changes)
    return config


def test_augmentation_reaches_a_network_that_is_told_of_it(monkeypatch):
    asked = []
    original = images.edm_augmentation
    monkeypatch.setattr(
        images,
        "edm_augmentation",
        lambda probability: asked.append(probability) or original(probability),
    )
    images.build(small_config(SONG | {"augment_dim": 9}))
    assert asked == []
    assert loss_shape(small_config(SONG | {"augment_dim": 9}, augmentation=0.12)) == ()
    assert asked == [0.12]


@pytest.mark.parametrize("network", [SONG, {"name": "EDM2UNet", "resolution": 8}])
def test_augmentation_that_the_network_is_not_told_of_is_refused(network):
    with pytest.raises(ValueError, match=r"config\.augmentation=0\.12.*augment_dim=9"):
        images.build(small_config(network, augmentation=0.12))


def test_unconditional_networks_train_on_data_sets_with_labels():
    assert loss_shape(small_config({"name": "ResidualMLP"}, data={"num_classes": 0})) == ()


def test_the_paper_augments_cifar10():
    assert cifar10_edm.get_config().augmentation == 0.12
    assert images.default_config().augmentation is None
