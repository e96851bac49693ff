"""From networks to denoisers: preconditioning, restatement in another process, guidance."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian_target import gaussian_denoiser
from jax.sharding import Mesh
from jax.tree_util import Partial

from genjax_lab import processes, samplers
from genjax_lab.samplers.denoising import one_evaluation

NUM_CLASSES = 3
EDM = processes.edm()
LABELS = np.array([0, 1, 2, 0, 1, 2, 3, 0], np.int32)
X = np.linspace(-3, 3, 8 * 4, dtype=np.float32).reshape(8, 2, 2, 1)


class TinyNetwork(nn.Module):
    """A network of the image networks' form."""

    @nn.compact
    def __call__(self, x, c_noise, labels=None, *, train=False):
        features = jnp.concatenate([x.reshape(len(x), -1), c_noise[:, None]], axis=1)
        hidden = nn.Dense(8)(features)
        if labels is not None:
            hidden = hidden + nn.Embed(NUM_CLASSES + 1, 8)(labels)
        return nn.Dense(4)(nn.tanh(hidden)).reshape(x.shape)


@pytest.fixture(scope="module")
def variables():
    return TinyNetwork().init(jax.random.key(0), jnp.asarray(X), jnp.ones(8), jnp.asarray(LABELS))


calls = []


def class_means(means, memory, x, t, condition):
    """Draws the iterate halfway to the mean of its class; counts the rows that it is run on."""
    jax.debug.callback(lambda rows: calls.append(len(rows)), x)
    labels = jnp.argmax(condition, 1) if condition.ndim == 2 else condition
    goal = means[labels].reshape((-1,) + (1,) * (x.ndim - 1))
    remembered = {"rows": memory["rows"] + goal} if memory else memory
    return (x + goal) / 2 + 0.1 * jnp.log(jnp.mean(t)), remembered


def conditional(means=(1.0, 2.0, 3.0, -1.0), memory=()):
    means = jnp.asarray(means)
    return samplers.Denoiser(Partial(class_means, means), EDM, memory, one_evaluation)


def guided(**kwargs):
    kwargs = {"guidance_scale": 2.5, "null_condition": NUM_CLASSES, **kwargs}
    return samplers.classifier_free(conditional(), **kwargs)


def predict(denoise, t=1.0, condition=LABELS, memory=None):
    memory = denoise.memory if memory is None else memory
    return denoise.predict(memory, jnp.asarray(X), jnp.asarray(t), condition)


def rows_evaluated(function):
    jax.effects_barrier()
    calls.clear()
    result = jax.block_until_ready(function())
    jax.effects_barrier()
    return result, sum(calls)


def test_denoiser_preconditions_the_network(variables):
    denoise = samplers.denoiser(TinyNetwork(), variables, EDM)
    t = np.linspace(0.1, 5, 8, dtype=np.float32)
    x0, memory = denoise.predict((), X, t, LABELS)
    # arXiv 2206.00364, Table 1.
    s = t[:, None, None, None]
    output = TinyNetwork().apply(variables, X / np.sqrt(s**2 + 0.25), np.log(t) / 4, LABELS)
    expected = 0.25 / (s**2 + 0.25) * X + s * 0.5 / np.sqrt(s**2 + 0.25) * output
    np.testing.assert_allclose(x0, expected, rtol=1e-4, atol=1e-5)
    assert memory == () and denoise.evaluations(t) == 1


def test_gradient_reaches_the_network_through_a_sampler(variables):
    def objective(variables):
        denoise = samplers.denoiser(TinyNetwork(), variables, EDM)
        sampler = samplers.heun(denoise, num_steps=3)
        x, _ = samplers.sample(
            sampler, jax.random.key(0), shape=X.shape, condition=LABELS, initial=10 * X
        )
        return jnp.mean(x**2)

    slope = jax.jit(jax.grad(objective))(variables)
    step = jax.tree.map(lambda leaf: 1e-3 * leaf / jnp.linalg.norm(leaf), slope)
    up, down = (
        objective(jax.tree.map(lambda v, s, sign=sign: v + sign * s, variables, step))
        for sign in (1, -1)
    )
    expected = sum(1e-3 * jnp.linalg.norm(leaf) for leaf in jax.tree.leaves(slope))
    np.testing.assert_allclose((up - down) / 2, expected, rtol=0.02)


@pytest.mark.parametrize("target", [processes.vp(), processes.flow()], ids=["vp", "flow"])
def test_restated_denoiser_is_the_denoiser_of_the_other_process(target):
    """The best estimate under one process is the best estimate under any other."""
    t = target.time_of_log_snr(jnp.linspace(-6, 8, 8))
    restated = samplers.change_process(gaussian_denoiser(EDM), target)
    x0, _ = restated.predict((), X, t[:, None, None, None], None)
    expected, _ = gaussian_denoiser(target).predict((), X, t[:, None, None, None], None)
    np.testing.assert_allclose(x0, expected, rtol=1e-4, atol=1e-5)
    back = samplers.change_process(restated, EDM)
    original, _ = gaussian_denoiser(EDM).predict((), X, jnp.float32(2), None)
    np.testing.assert_allclose(back.predict((), X, jnp.float32(2), None)[0], original, rtol=1e-5)


def test_restated_denoiser_counts_in_its_own_time():
    inner = guided(interval=(0.5, 2.0))
    restated = samplers.change_process(inner, processes.vp())
    t = processes.vp().time_of_log_snr(EDM.log_snr(jnp.array([0.4, 0.6, 1.9, 2.1])))
    assert [int(restated.evaluations(s)) for s in t] == [1, 2, 2, 1]


def test_another_denoiser_takes_over_at_a_noise_level():
    """In the first two of five steps of a sampler, the time of the second being the level."""
    memory = {"rows": jnp.zeros((8, 1, 1, 1))}
    first, second = conditional(memory=memory), conditional((0.0, 0.5, 1.0, 0.0))
    times = [8.0, 4.0, 2.0, 1.0, 0.4, 0.0]
    denoise = samplers.switch_by_noise(first, second, times[2])
    for t, alone in ((8.0, first), (4.0, first), (2.0, second), (1.0, second)):
        (x0, remembered), rows = rows_evaluated(lambda t=t: predict(denoise, t))
        assert rows == 8 == 8 * int(denoise.evaluations(jnp.float32(t)))
        np.testing.assert_allclose(x0, predict(alone, t)[0], rtol=1e-6)
        assert bool(jnp.any(remembered[0]["rows"])) == (alone is first)
    sampler = samplers.euler(denoise, num_steps=5, times=times)
    _, info = samplers.sample(sampler, jax.random.key(0), shape=X.shape, condition=LABELS)
    assert info.num_evaluations == 5

    t = np.array([3, 1, 5, 0.5, 2, 2.1, 9, 1], np.float32)
    both, rows = rows_evaluated(lambda: predict(denoise, t)[0])
    assert rows == 16 == 8 * int(denoise.evaluations(t))
    expected = [predict(alone, t)[0] for alone in (first, second)]
    np.testing.assert_allclose(both, np.where((t > 2)[:, None, None, None], *expected), rtol=1e-6)


def test_a_denoiser_that_takes_over_is_restated_and_its_noise_level_is_that_of_the_signal():
    flow = processes.flow()  # sigma(t) / alpha(t) = t / (1 - t)
    denoise = samplers.switch_by_noise(
        gaussian_denoiser(flow, 0.3), gaussian_denoiser(EDM, 0.1), jnp.float32(3)
    )
    for t, mean in ((1.0, 0.3), (0.76, 0.3), (0.74, 0.1)):
        expected, _ = gaussian_denoiser(flow, mean).predict((), X, jnp.float32(t), None)
        result, _ = predict(denoise, t)
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="sigma must be at least 0"):
        samplers.switch_by_noise(conditional(), conditional(), -1.0)


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 2.5])
def test_classifier_free_guidance_extrapolates(guidance_scale):
    null = np.full_like(LABELS, NUM_CLASSES)
    with_condition, without = (predict(conditional(), condition=c)[0] for c in (LABELS, null))
    result, _ = predict(guided(guidance_scale=guidance_scale))
    expected = without + guidance_scale * (with_condition - without)
    np.testing.assert_allclose(result, expected, rtol=1e-5)


def test_classifier_free_guidance_takes_label_vectors():
    vectors = np.eye(NUM_CLASSES + 1, dtype=np.float32)[LABELS]
    null = np.eye(NUM_CLASSES + 1, dtype=np.float32)[NUM_CLASSES]
    result, _ = predict(guided(null_condition=null), condition=vectors)
    np.testing.assert_allclose(result, predict(guided())[0], rtol=1e-6)


def test_classifier_free_guidance_is_one_call_of_twice_the_rows():
    (result, _), rows = rows_evaluated(lambda: predict(guided()))
    assert calls == [16] and rows == 16
    # Row order matters to nobody: each example still gets its own label.
    alone = [
        guided().predict(((), ()), X[i : i + 1], jnp.float32(1), LABELS[i : i + 1])[0]
        for i in (1, 6)
    ]
    np.testing.assert_allclose(result[jnp.array([1, 6])], np.concatenate(alone), rtol=1e-6)


def test_interval_limited_guidance_pays_only_inside():
    denoise = guided(interval=(0.5, 2.0))
    for t, cost in ((0.4, 1), (0.5, 2), (2.0, 2), (2.1, 1)):
        (x0, _), rows = rows_evaluated(lambda t=t: predict(denoise, t))
        assert rows == cost * 8 == int(denoise.evaluations(jnp.float32(t))) * 8
        reference = guided() if cost == 2 else conditional()
        np.testing.assert_allclose(x0, predict(reference, t)[0], rtol=1e-6)
    t = np.array([0.1, 1, 3, 1, 1, 1, 9, 1], np.float32)
    inside = ((t >= 0.5) & (t <= 2.0))[:, None, None, None]
    expected = np.where(inside, predict(guided(), t)[0], predict(conditional(), t)[0])
    np.testing.assert_allclose(predict(denoise, t)[0], expected, rtol=1e-6)


def test_sampler_counts_what_guidance_costs():
    times = [4.0, 2.0, 1.0, 0.4, 0.0]
    for denoise, count in (
        (conditional(), 4),
        (guided(), 8),
        (guided(interval=(0.5, 2.5)), 6),
        (samplers.autoguidance(conditional(), conditional(), guidance_scale=2.0), 8),
        (samplers.autoguidance(guided(), conditional(), guidance_scale=2.0), 12),
    ):
        sampler = samplers.euler(denoise, num_steps=4, times=times)
        (_, info), rows = rows_evaluated(
            lambda sampler=sampler: samplers.sample(
                sampler, jax.random.key(0), shape=X.shape, condition=LABELS
            )
        )
        assert info.num_evaluations == count
        assert rows == 8 * count


def test_guidance_scale_and_interval_do_not_recompile():
    results = []
    for scale, interval in ((1.5, (0.5, 2.0)), (3.0, (0.5, 2.0)), (3.0, (0.1, 20.0))):
        sampler = samplers.ddim(
            guided(guidance_scale=scale, interval=interval), num_steps=4, times=[4, 2, 1, 0.4, 0]
        )
        before = samplers.base._run._cache_size()
        results.append(
            samplers.sample(sampler, jax.random.key(0), shape=X.shape, condition=LABELS)[0]
        )
    assert samplers.base._run._cache_size() == before
    assert len({float(jnp.sum(result)) for result in results}) == 3


def test_guided_samples_do_not_depend_on_the_mesh():
    sampler = samplers.euler(guided(), num_steps=3)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    draw = lambda mesh: samplers.sample(  # noqa: E731
        sampler, jax.random.key(0), shape=X.shape, condition=LABELS, mesh=mesh
    )
    np.testing.assert_allclose(draw(mesh)[0], draw(None)[0], rtol=1e-5)


@pytest.mark.parametrize("memory_axis", [None, 0])
def test_guidance_remembers_for_both_networks(memory_axis):
    memory = {"rows": jnp.zeros((8, 1, 1, 1))}
    denoise = samplers.classifier_free(
        conditional(memory=memory),
        guidance_scale=2.0,
        null_condition=NUM_CLASSES,
        interval=(0.5, 2.0),
        memory_axis=memory_axis,
    )
    _, state = predict(denoise, 1.0)
    _, state = predict(denoise, 3.0, memory=state)
    means = np.array([1.0, 2.0, 3.0, -1.0])
    # Outside of the interval the network without condition neither runs nor remembers.
    np.testing.assert_allclose(state[0]["rows"].ravel(), 2 * means[LABELS])
    np.testing.assert_allclose(state[1]["rows"].ravel(), np.full(8, means[3]))
    reference, _ = predict(guided(guidance_scale=2.0))
    (result, _), _ = rows_evaluated(lambda: predict(denoise))
    assert calls == ([16] if memory_axis == 0 else [8, 8])
    np.testing.assert_allclose(result, reference, rtol=1e-6)


def test_memory_may_be_batched_along_a_later_axis():
    memory = {"rows": jnp.arange(16.0).reshape(2, 8, 1)}

    def predict_with_layers(memory, x, t, condition):
        value = memory["rows"].sum(0)[:, :, None, None] + condition[:, None, None, None]
        return x * 0 + value, {"rows": memory["rows"] + condition[None, :, None]}

    denoise = samplers.Denoiser(Partial(predict_with_layers), EDM, memory, one_evaluation)
    results = [
        predict(
            samplers.classifier_free(
                denoise, guidance_scale=3.0, null_condition=NUM_CLASSES, memory_axis=axis
            )
        )
        for axis in (None, 1)
    ]
    jax.tree.map(np.testing.assert_array_equal, *results)


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 2.0])
def test_autoguidance_extrapolates_from_the_guide(guidance_scale):
    good, bad = conditional(), conditional((0.0, 0.5, 1.0, 0.0))
    result, _ = predict(samplers.autoguidance(good, bad, guidance_scale=guidance_scale))
    better, worse = predict(good)[0], predict(bad)[0]
    np.testing.assert_allclose(result, worse + guidance_scale * (better - worse), rtol=1e-5)


def test_autoguidance_outside_of_its_interval_is_the_network_alone():
    good, bad = conditional(), conditional((0.0, 0.5, 1.0, 0.0))
    denoise = samplers.autoguidance(good, bad, guidance_scale=2.0, interval=(0.5, 2.0))
    (x0, _), rows = rows_evaluated(lambda: predict(denoise, 3.0))
    assert rows == 8
    np.testing.assert_allclose(x0, predict(good, 3.0)[0], rtol=1e-6)
    _, rows = rows_evaluated(lambda: predict(denoise, 1.0))
    assert rows == 16


def test_autoguidance_restates_a_guide_of_another_process():
    flow = processes.flow()
    good, bad = (gaussian_denoiser(EDM, mean) for mean in (0.3, 0.1))
    restated = samplers.autoguidance(good, gaussian_denoiser(flow, 0.1), guidance_scale=2.0)
    native = samplers.autoguidance(good, bad, guidance_scale=2.0)
    np.testing.assert_allclose(predict(restated)[0], predict(native)[0], rtol=1e-4, atol=1e-5)


def test_guided_gaussian_is_pushed_away_from_the_null_class():
    """Guidance of N(m, s^2) by N(m', s^2) ends at m' + w (m - m') on average."""

    def best(memory, x, t, condition):
        mean = jnp.asarray([0.5, 0.1])[condition].reshape(-1, 1)
        return mean + 0.25 / (0.25 + t**2) * (x - mean), memory

    denoise = samplers.classifier_free(
        samplers.Denoiser(Partial(best), EDM, (), one_evaluation),
        guidance_scale=3.0,
        null_condition=1,
    )
    sampler = samplers.heun(denoise, num_steps=40)
    x, _ = samplers.sample(
        sampler, jax.random.key(0), shape=(4096, 1), condition=np.zeros(4096, np.int32)
    )
    # The flow of the guided estimate is that of N(1.3, 0.5^2); 5 standard errors: 6e-7.
    assert abs(x.mean() - 1.3) < 5 * 0.5 / 64 + 0.005
    assert abs(x.std() - 0.5) < 5 * 0.5 / np.sqrt(8192) + 0.005


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: guided(interval=(2.0, 0.5)), "interval is"),
        (
            lambda: samplers.autoguidance(
                conditional(), conditional(), guidance_scale=2.0, interval=(1.0, 1.0)
            ),
            "interval is",
        ),
        (lambda: predict(guided(), condition=None), "structure"),
        (lambda: predict(guided(null_condition=np.zeros(5, np.int32))), "does not broadcast"),
    ],
)
def test_bad_guidance_is_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()
