"""Sampling by ranges of seeds: batches, resumption, meshes."""

import jax
import numpy as np
import pytest
from gaussian_target import gaussian_denoiser, traces
from jax.sharding import Mesh

from genjax_lab import processes, samplers

SHAPE = (3, 2)


@pytest.fixture(scope="module")
def sampler():
    return samplers.ddpm(gaussian_denoiser(processes.edm()), num_steps=6)


def draw(sampler, seeds, batch_size, **kwargs):
    batches = list(
        samplers.sample_batches(
            sampler,
            jax.random.key(5),
            seeds=seeds,
            batch_size=batch_size,
            sample_shape=SHAPE,
            **kwargs,
        )
    )
    assert all(len(seeds) == len(x) for seeds, x in batches)
    if not batches:
        return [], np.zeros((0, *SHAPE))
    return [np.concatenate(part) for part in zip(*batches, strict=True)]


def test_a_sample_depends_on_key_and_seed_alone(sampler):
    seeds, x = draw(sampler, range(10), 4)
    np.testing.assert_array_equal(seeds, np.arange(10))
    assert x.shape == (10, *SHAPE) and isinstance(x, np.ndarray)
    # Elementwise arithmetic is the same in any batch but for the contraction of products and sums.
    np.testing.assert_allclose(draw(sampler, range(10), 5)[1], x, atol=1e-6)
    resumed = np.concatenate([draw(sampler, range(3, 7), 4)[1], draw(sampler, range(7, 10), 4)[1]])
    np.testing.assert_array_equal(resumed, x[3:])
    np.testing.assert_array_equal(draw(sampler, [8, 2], 4)[1], x[[8, 2]])
    assert np.unique(x).size == x.size


def test_one_compilation_serves_a_last_batch_that_is_not_full(sampler):
    draw(sampler, range(4), 4)
    before = len(traces)
    seeds, x = draw(sampler, range(20, 29), 4)
    assert len(traces) == before
    assert len(seeds) == len(x) == 9


def test_samples_do_not_depend_on_the_mesh(sampler):
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "fsdp"))
    _, sharded = draw(sampler, range(10), 8, mesh=mesh)
    np.testing.assert_allclose(sharded, draw(sampler, range(10), 4)[1], atol=1e-6)


def test_conditions_belong_to_seeds():
    def follow(memory, x, t, condition):
        return x * 0 + condition["label"][:, None, None], memory

    denoise = gaussian_denoiser(processes.edm())._replace(predict=jax.tree_util.Partial(follow))
    sampler = samplers.euler(denoise, num_steps=2)
    asked = []

    def condition_fn(seeds):
        asked.append(list(seeds))
        return {"label": (seeds % 3).astype(np.float32)}

    seeds, x = draw(sampler, range(4, 11), 4, condition_fn=condition_fn)
    np.testing.assert_allclose(x, np.broadcast_to((seeds % 3)[:, None, None], x.shape), atol=1e-6)
    # The last batch is filled up with a seed that was asked for.
    assert asked == [[4, 5, 6, 7], [8, 9, 10, 10]]


def test_next_batch_is_launched_before_the_present_one_is_handed_over(sampler, monkeypatch):
    launched = []
    original = samplers.batches.sample
    monkeypatch.setattr(
        samplers.batches, "sample", lambda *a, **k: launched.append(1) or original(*a, **k)
    )
    batches = samplers.sample_batches(
        sampler, jax.random.key(0), seeds=range(12), batch_size=4, sample_shape=SHAPE
    )
    counts = [len(launched) for _ in batches]
    assert counts == [2, 3, 3]


def test_no_seeds_give_no_batches(sampler, capsys):
    assert draw(sampler, range(0), 4)[0] == []
    draw(sampler, range(5), 4, progress=True)
    assert "5/5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seeds": [0.5]}, "sequence of integers"),
        ({"seeds": [[1]]}, "sequence of integers"),
    ],
)
def test_bad_arguments_are_named_before_the_first_batch(sampler, kwargs, message):
    kwargs = {"seeds": range(4), "batch_size": 4, "sample_shape": SHAPE, **kwargs}
    with pytest.raises(ValueError, match=message):
        samplers.sample_batches(sampler, jax.random.key(0), **kwargs)
