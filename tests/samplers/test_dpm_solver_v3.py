"""What model statistics promise DPM-Solver-v3: what they describe is solved without error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
from gaussian_target import exact_flow, gaussian_denoiser
from jax.tree_util import Partial

from genjax_lab import processes, samplers
from genjax_lab.samplers.denoising import one_evaluation

EDM = processes.edm()
L, S, B = 0.6, -0.3, 0.2


def constant_statistics(num_points, dims=()):
    grid = samplers.data_prediction_statistics(EDM, num_points=num_points)
    full = [np.full((num_points, *dims), value) for value in (L, S, B)]
    return samplers.ModelStatistics(grid.half_log_snr, *full)


def f_of(half_log_snr, slope):
    """f with df/dlambda = S f + B but for `slope`, which makes g linear and not constant."""
    delta = half_log_snr + np.log(80.0)
    return jnp.exp(S * delta) * (0.7 + slope * delta) + B * jnp.expm1(S * delta) / S


def described_denoiser(slope):
    """x_0_hat = (1 - l) y - f: the statistics are all there is to know of it."""

    def predict(memory, x, t, condition):
        return (1 - L) * x - f_of(-jnp.log(t), slope), memory

    return samplers.Denoiser(Partial(predict), EDM, (), one_evaluation)


def reference_solution(x, slope, half_log_snr):
    """The same ODE by an adaptive method of order 8."""
    solution = scipy.integrate.solve_ivp(
        lambda lam, y: -L * y - float(f_of(lam, slope)),
        (-np.log(80.0), half_log_snr),
        x,
        "DOP853",
        rtol=1e-12,
        atol=1e-12,
    )
    return solution.y[:, -1]


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def solve(denoise, x, num_steps, **kwargs):
    sampler = samplers.dpm_solver_v3(denoise, num_steps=num_steps, **kwargs)
    result, info = samplers.sample(
        sampler, jax.random.key(0), shape=x.shape, initial=x, trajectory=True
    )
    return np.asarray(result), np.asarray(info.trajectory)


@pytest.mark.parametrize("dims", [(), (3,)], ids=["scalar", "elementwise"])
def test_model_that_the_statistics_describe_is_solved_by_any_steps(dims):
    x = np.array([[-50.0, 0.0, 90.0]])
    statistics = constant_statistics(4000, dims)
    for num_steps in (1, 4):
        result, _ = solve(described_denoiser(0.0), x, num_steps, statistics=statistics)
        expected = reference_solution(x[0], 0.0, -np.log(0.002))
        # The integral of b is quadrature on the grid, of second order.
        np.testing.assert_allclose(result[0], expected, atol=2e-7)


@pytest.mark.parametrize("num_steps", [2, 5])
def test_linear_remainder_is_solved_but_for_the_first_step(num_steps):
    """g is extrapolated linearly, so only the first step, of first order, errs."""
    x = np.array([[-50.0, 0.0, 90.0]])
    statistics = constant_statistics(4000)
    result, trajectory = solve(
        described_denoiser(0.1), x, num_steps, statistics=statistics, lower_order_final=False
    )
    grid = -np.log(np.asarray(samplers.time_steps(EDM, num_steps + 1))[:-1])
    nodes = statistics.half_log_snr
    first = nodes[np.abs(nodes - grid[1]).argmin()]
    error = trajectory[0, 0] - reference_solution(x[0], 0.1, first)
    assert np.abs(error).min() > 1e-2
    # y' = -l y - f carries an error on by e^(-l h).
    carried = error * np.exp(-L * (nodes[-1] - first))
    expected = reference_solution(x[0], 0.1, -np.log(0.002)) + carried
    np.testing.assert_allclose(result[0], expected, atol=2e-7)


def test_corrector_uses_the_evaluation_at_the_predicted_point():
    """Data prediction, written out for two steps after the first by exact weights."""
    rates = np.array([0.3, -0.8, 0.5])

    def predict(memory, x, t, condition):
        return jnp.sin(rates * jnp.log(t)) + 0.1 * x / (1 + t), memory

    denoise = samplers.Denoiser(Partial(predict), EDM, (), one_evaluation)
    x = np.array([[-50.0, 0.0, 90.0]])
    statistics = samplers.data_prediction_statistics(EDM, num_points=64)
    result, _ = solve(denoise, x, 4, statistics=statistics)

    nodes = statistics.half_log_snr
    wanted = -np.log(np.asarray(samplers.time_steps(EDM, 5))[:-1])
    lam = nodes[np.abs(nodes - wanted[:, None]).argmin(1)]
    x0 = lambda x, i: np.asarray(predict((), x, np.exp(-lam[i]), None)[0])  # noqa: E731

    def step(x, i, value, slope):
        """int_0^h e^-(h-r) (value + slope r) dr beside what is left of x."""
        h = lam[i + 1] - lam[i]
        return np.exp(-h) * x - np.expm1(-h) * value + (h - 1 + np.exp(-h)) * slope

    slope = lambda b, a, i: (b - a) / (lam[i] - lam[i - 1])  # noqa: E731
    d0 = x0(x, 0)
    x1 = step(x, 0, d0, 0)
    d1 = x0(x1, 1)
    x2 = step(x1, 1, d1, slope(d1, d0, 1))
    d2 = x0(x2, 2)
    x2 = step(x1, 1, d1, slope(d2, d1, 2))
    x3 = step(x2, 2, d2, slope(d2, d1, 2))
    d3 = x0(x3, 3)
    x3 = step(x2, 2, d2, slope(d3, d2, 3))
    np.testing.assert_allclose(result, step(x3, 3, d3, 0), atol=1e-9)


def test_estimated_statistics_of_a_gaussian_are_exact_and_make_it_exact():
    mean, std = jnp.array([0.3, -0.5]), jnp.array([0.5, 1.5])
    denoise = gaussian_denoiser(EDM, mean, std)
    key, data_key = jax.random.split(jax.random.key(0))
    data = mean + std * jax.random.normal(data_key, (8, 2))
    statistics = samplers.estimate_statistics(denoise, data, key, num_points=400, batch_size=4)
    sigma = np.exp(-statistics.half_log_snr)[:, None]
    # The Jacobian is diagonal and the same everywhere: no sampling error.
    l_exact = sigma**2 / (np.asarray(std) ** 2 + sigma**2)
    np.testing.assert_allclose(statistics.l, l_exact, rtol=1e-10)
    # f = -l mean moves, but not with x.
    np.testing.assert_array_equal(statistics.s, 0)
    slope = -2 * l_exact * (1 - l_exact)
    # dl/dlambda is a difference on the grid, whose error y multiplies.
    np.testing.assert_allclose(statistics.b, -slope * np.asarray(mean), atol=1e-3)

    x = 80 * np.linspace(-2, 2, 10).reshape(5, 2)
    errors = {}
    for name, chosen in (("estimated", statistics), ("none", None)):
        result, _ = solve(denoise, x, 5, statistics=chosen)
        exact = exact_flow(EDM, x, 80.0, 0.002, np.asarray(mean), np.asarray(std))
        errors[name] = np.abs(result - exact).max()
    assert errors["estimated"] < 1e-3 < 0.1 < errors["none"]


@pytest.fixture(scope="module")
def mixture():
    """A denoiser whose f varies with x (two modes), data, and statistics estimated from them."""
    means = jnp.array([[-1.0], [0.7]])

    def predict(memory, x, t, condition):
        v = 0.04 + t**2
        weights = jax.nn.softmax(-((x[:, None] - means) ** 2) / (2 * v), axis=1)
        return jnp.sum(weights * (means + 0.04 / v * (x[:, None] - means)), axis=1), memory

    denoise = samplers.Denoiser(Partial(predict), EDM, (), one_evaluation)
    with jax.enable_x64(True):
        data = jnp.where(jnp.arange(4096)[:, None] % 2, 0.7, -1.0)
        data = data + 0.2 * jax.random.normal(jax.random.key(1), data.shape)
        statistics = samplers.estimate_statistics(
            denoise, data, jax.random.key(2), num_points=121, batch_size=1024
        )
    return denoise, data, statistics


def test_estimated_statistics_fit_by_least_squares(mixture):
    denoise, data, statistics = mixture
    index, h = 60, 1e-4
    lam = statistics.half_log_snr[index]
    t = np.exp(-lam)
    l_slope = np.gradient(statistics.l, statistics.half_log_snr, axis=0)[index]

    def predict(x, lam):
        return denoise.predict((), x, jnp.exp(-lam), None)[0]

    def f(x, lam_here):
        return (1 - statistics.l[index] - l_slope * (lam_here - lam)) * x - predict(x, lam_here)

    # df/dlambda by differences along the flow, at points that the estimate has not seen.
    x = data + t * jax.random.normal(jax.random.key(3), data.shape)
    flow = predict(x, lam) - x
    rate = (f(x + h * flow, lam + h) - f(x - h * flow, lam - h)) / (2 * h)
    s, b = np.polyfit(np.ravel(f(x, lam)), np.ravel(rate), 1)
    assert abs(s) > 0.1
    # The two samples of 4096 agree within a few per cent.
    np.testing.assert_allclose(statistics.s[index], s, rtol=0.1)
    np.testing.assert_allclose(statistics.b[index], b, atol=0.1 * abs(s) * np.std(f(x, lam)))


def test_estimated_statistics_pay_in_few_steps(mixture):
    denoise, _, statistics = mixture
    x = 80 * np.asarray(jax.random.normal(jax.random.key(4), (64, 1)))
    many_points = samplers.data_prediction_statistics(EDM, num_points=9000)
    fine, _ = solve(denoise, x, 400, statistics=many_points)
    with_statistics, without = (
        np.abs(solve(denoise, x, 8, statistics=chosen)[0] - fine).mean()
        for chosen in (statistics, None)
    )
    # Measured: 0.036 against 0.185.
    assert with_statistics < without / 3


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"statistics": constant_statistics(10)._replace(l=np.ones(9))}, r"statistics.l has"),
        ({"statistics": constant_statistics(10)._replace(s=np.full(10, np.nan))}, "statistics.s"),
        ({"statistics": constant_statistics(10)._replace(half_log_snr=np.ones(10))}, "increasing"),
        ({"times": [200.0, 1.0], "statistics": constant_statistics(10)}, "statistics cover"),
    ],
)
def test_bad_statistics_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        samplers.dpm_solver_v3(gaussian_denoiser(EDM), num_steps=1, **kwargs)


def test_data_must_divide_into_batches():
    with pytest.raises(ValueError, match="batch_size 3 does not divide the 8"):
        samplers.estimate_statistics(
            gaussian_denoiser(EDM), jnp.zeros((8, 1)), jax.random.key(0), batch_size=3
        )
