"""The DDO loss and its relatives on enumerable and Gaussian models, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from genjax_lab import objectives
from genjax_lab.objectives import (
    F_DIVERGENCES,
    calibrate_beta,
    cca_loss,
    ddo_loss,
    dpo_loss,
    extrapolate,
    f_divergence_loss,
    jsd_from_loss,
    kto_loss,
    spin_loss,
    start_of_round_ratio,
    tilted_optimum,
    unlikelihood_loss,
)

LOG2 = np.log(2)
K = 7
P_DATA = np.random.default_rng(0).dirichlet(np.full(K, 2.0))
P_REF = np.random.default_rng(1).dirichlet(np.full(K, 3.0))


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def deltas(seed=0, size=64, scale=2.0):
    rng = np.random.default_rng(seed)
    return (scale * rng.standard_normal((2, size))).astype(np.float32)


def expected_loss(loss, ratio, *args, **options):
    """The loss with every state once and its probabilities as weights (K mean(p x) = sum p x)."""
    return loss(ratio, ratio, *args, real_weight=K * P_DATA, fake_weight=K * P_REF, **options)[0]


def population_f_loss(name, ratio, alpha, beta):
    """E_data and E_ref of an f-divergence loss, one state at a time."""
    one = lambda r, a: f_divergence_loss(name, r[None], r[None], a, beta)[0]  # noqa: E731
    real = jax.vmap(one, (0, None))(ratio, 0.0)
    fake = jax.vmap(one, (0, None))(ratio, 1.0) - real
    return jnp.sum(P_DATA * real) + alpha * jnp.sum(P_REF * fake)


def minimise(loss):
    """The minimiser over all densities of p -> loss(log p), by its logits."""
    value = jax.jit(jax.value_and_grad(lambda logits: loss(jax.nn.log_softmax(logits))))

    def numpy_value(logits):
        value_, gradient = value(logits)
        return float(value_), np.asarray(gradient, float)

    found = scipy.optimize.minimize(
        numpy_value, np.log(P_REF), jac=True, method="BFGS", options={"gtol": 1e-9}
    )
    return np.asarray(jax.nn.softmax(found.x))


# Values


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (4.0, 0.05), (0.0, 0.5)])
def test_equal_networks_have_the_loss_of_a_coin(alpha, beta):
    loss, metrics = ddo_loss(jnp.zeros(8), jnp.zeros(8), alpha, beta)
    np.testing.assert_allclose(loss, (1 + alpha) * LOG2, atol=1e-6)
    assert metrics["accuracy"] == 0.5
    assert metrics["margin"] == metrics["saturation"] == 0
    np.testing.assert_allclose(metrics["js_estimate"], 0, atol=1e-7)


def test_the_loss_is_the_formula_in_float64(float64):
    real, fake = deltas().astype(float)
    weight = np.arange(64.0)
    sigmoid = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731
    data_term = -np.log(sigmoid(0.3 * real))
    fake_term = -np.log(1 - sigmoid(0.3 * fake))
    plain = np.mean(data_term) + 2 * np.mean(fake_term)
    np.testing.assert_allclose(ddo_loss(real, fake, 2.0, 0.3)[0], plain, rtol=1e-12)
    found = ddo_loss(real, fake, 2.0, 0.3, normalize_by_alpha=True)[0]
    np.testing.assert_allclose(found, plain / 2, rtol=1e-12)
    small = ddo_loss(real, fake, 0.5, 0.3, normalize_by_alpha=True)[0]
    np.testing.assert_allclose(small, ddo_loss(real, fake, 0.5, 0.3)[0], rtol=1e-12)
    found = ddo_loss(real, fake, 2.0, 0.3, real_weight=weight, fake_weight=1 + weight)[0]
    expected = np.mean(weight * data_term) + 2 * np.mean((1 + weight) * fake_term)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_saturated_rows_have_finite_losses_and_gradients():
    # log(1 - sigmoid(z)) would be -inf from z = 17 on in float32.
    for size in (100.0, 1e4):
        gradient = jax.value_and_grad(lambda r: ddo_loss(-r, r, 1.0, 1.0)[0])
        loss, slope = gradient(jnp.full(4, size))
        np.testing.assert_allclose(loss, 2 * size, rtol=1e-6)
        np.testing.assert_allclose(slope, 0.5, rtol=1e-6)


def test_metrics_are_those_of_the_sign_classifier_and_the_log_ratios():
    real, fake = jnp.array([1.0, 0.0, -2.0, 8.0]), jnp.array([-1.0, 3.0, 0.0, -0.5])
    _, metrics = ddo_loss(real, fake, 3.0, 0.5)
    # Right: 1, 8 | -1, -0.5; ties: two; of eight.
    np.testing.assert_allclose(metrics["accuracy"], (4 + 2 / 2) / 8)
    np.testing.assert_allclose(metrics["saturation"], 1 / 8)  # 0.5 * 8 > 3 alone
    np.testing.assert_allclose(metrics["delta_real_mean"], 1.75)
    np.testing.assert_allclose(metrics["delta_fake_mean"], 0.375)
    np.testing.assert_allclose(metrics["margin"], 1.375)
    np.testing.assert_allclose(metrics["delta_real_std"], np.std(real), rtol=1e-6)
    np.testing.assert_allclose(metrics["delta_fake_std"], np.std(fake), rtol=1e-6)
    bound = ddo_loss(real, fake, 1.0, 0.5)[0]
    np.testing.assert_allclose(metrics["js_estimate"], (2 * LOG2 - bound) / 2, rtol=1e-6)


def test_half_precision_log_ratios_are_not_summed_in_half_precision():
    loss, _ = ddo_loss(*(jnp.asarray(x, jnp.bfloat16) for x in deltas()), 1.0, 1.0)
    assert loss.dtype == jnp.float32


# The optimum


def test_the_loss_at_the_data_law_is_two_log_two_minus_twice_the_js_divergence(float64):
    loss = expected_loss(ddo_loss, np.log(P_DATA / P_REF), 1.0, 1.0)
    middle = (P_DATA + P_REF) / 2
    js = np.sum(P_DATA * np.log(P_DATA / middle) + P_REF * np.log(P_REF / middle)) / 2
    np.testing.assert_allclose(loss, 2 * LOG2 - 2 * js, rtol=0, atol=1e-10)
    np.testing.assert_allclose(jsd_from_loss(loss), js, atol=1e-10)


def test_unlimited_capacity_finds_the_data_law(float64):
    found = minimise(lambda log_p: expected_loss(ddo_loss, log_p - np.log(P_REF), 1.0, 1.0))
    np.testing.assert_allclose(found, P_DATA, atol=1e-5)


@pytest.mark.parametrize("beta", [0.5, 0.2, 0.7])
def test_small_beta_overshoots_to_the_tilted_law_at_its_own_alpha(float64, beta):
    p, alpha = tilted_optimum(P_DATA, P_REF, beta)
    unnormalised = P_REF ** (1 - 1 / beta) * P_DATA ** (1 / beta)
    np.testing.assert_allclose(p, unnormalised / unnormalised.sum(), rtol=1e-10)
    np.testing.assert_allclose(alpha, unnormalised.sum() ** beta, rtol=1e-10)
    found = minimise(lambda log_p: expected_loss(ddo_loss, log_p - np.log(P_REF), alpha, beta))
    np.testing.assert_allclose(found, p, atol=1e-5)


@pytest.mark.parametrize(("alpha", "beta"), [(3.0, 0.5), (0.4, 0.3), (1.0, 2.0)])
def test_the_normalised_minimiser_has_one_lagrange_multiplier(float64, alpha, beta):
    p = minimise(lambda log_p: expected_loss(ddo_loss, log_p - np.log(P_REF), alpha, beta))
    u = (p / P_REF) ** beta
    q = (beta * P_DATA / (1 + u) - alpha * beta * P_REF * u / (1 + u)) / p
    assert np.ptp(q) < 1e-3 * np.abs(q).mean()


# Gradients


def mixture_family():
    """log-ratios of a Gaussian N(m, s^2) to N(0, 1) at fixed points, by (m, log s)."""
    real, fake = np.random.default_rng(3).normal([[0.5], [0.0]], 1.0, (2, 40))

    def log_p(w, x):
        return -(((x - w[0]) / jnp.exp(w[1])) ** 2) / 2 - w[1]

    return real, fake, log_p, jnp.array([0.3, -0.2])


def test_autodiff_gives_the_gradient_of_the_paper_for_a_gaussian(float64):
    alpha, beta = 2.5, 0.7
    real, fake, log_p, w = mixture_family()
    ratio = lambda w, x: log_p(w, x) - log_p(jnp.zeros(2), x)  # noqa: E731
    found = jax.grad(lambda w: ddo_loss(ratio(w, real), ratio(w, fake), alpha, beta)[0])(w)
    sigmoid = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731
    score_real, score_fake = jax.jacobian(log_p)(w, real), jax.jacobian(log_p)(w, fake)
    expected = -beta * sigmoid(-beta * ratio(w, real)) @ score_real / 40
    expected += alpha * beta * sigmoid(beta * ratio(w, fake)) @ score_fake / 40
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 4.0, 50.0])
def test_a_round_starts_along_maximum_likelihood_whatever_alpha_is(float64, alpha):
    # E_fake[s] = 0 for samples enumerated with their exact probabilities.
    beta, logits = 0.3, jnp.log(P_REF)
    log_p = lambda z: jax.nn.log_softmax(z)  # noqa: E731
    gradient = jax.grad(lambda z: expected_loss(ddo_loss, log_p(z) - np.log(P_REF), alpha, beta))(
        logits
    )
    likelihood = jax.grad(lambda z: -P_DATA @ log_p(z))(logits)
    np.testing.assert_allclose(gradient, beta / 2 * likelihood, atol=1e-9)
    # Samples that are not the reference's change the direction.
    biased = np.roll(P_REF, 1)
    other = jax.grad(
        lambda z: ddo_loss(
            *(2 * [log_p(z) - np.log(P_REF)]),
            alpha,
            beta,
            real_weight=K * P_DATA,
            fake_weight=K * biased,
        )[0]
    )(logits)
    difference = np.abs(other - gradient).max()
    assert difference > 1e-2 * alpha if alpha else difference == 0


# A Gaussian fitted by maximum likelihood to two modes: the reference is an exact stationary point.
GRID = np.linspace(-12, 14, 1601)


def two_modes():
    """(probabilities of the data and of the fitted Gaussian on a grid, its parameters)."""
    normal = lambda m, s: np.exp(-(((GRID - m) / s) ** 2) / 2) / s  # noqa: E731
    data = 0.8 * normal(0.0, 0.6) + 0.2 * normal(3.0, 0.6)
    data /= data.sum()
    mean = data @ GRID
    std = np.sqrt(data @ (GRID - mean) ** 2)
    ref = normal(mean, std)
    return data, ref / ref.sum(), jnp.array([mean, np.log(std)])


def misspecified_loss(w, alpha, beta):
    data, ref, w_ref = two_modes()
    log_p = lambda w: -(((GRID - w[0]) * jnp.exp(-w[1])) ** 2) / 2 - w[1]  # noqa: E731
    ratio = log_p(w) - log_p(w_ref)
    size = len(GRID)
    return ddo_loss(ratio, ratio, alpha, beta, real_weight=size * data, fake_weight=size * ref)[0]


@pytest.mark.parametrize(
    ("alpha", "beta", "eigenvalues"),
    [
        (1.0, 1.0, (0.228, 1.089)),
        (4.0, 1.0, (-0.556, -0.043)),
        (4.0, 0.1, (-0.27, -0.076)),
    ],
)
def test_at_the_likelihood_optimum_ddo_has_no_gradient_and_a_large_alpha_makes_it_unstable(
    float64, alpha, beta, eigenvalues
):
    data, ref, w_ref = two_modes()
    gradient = jax.grad(misspecified_loss)(w_ref, alpha, beta)
    np.testing.assert_allclose(gradient, 0, atol=1e-10)
    hessian = jax.hessian(misspecified_loss)(w_ref, alpha, beta)
    # H = beta^2/4 (G + alpha F) + beta/2 (A - alpha F), from the scores of (m, log s).
    z = (GRID - w_ref[0]) * np.exp(-w_ref[1])
    score = np.stack([z * np.exp(-w_ref[1]), z**2 - 1])
    second = -np.array(
        [[np.full_like(z, np.exp(-2 * w_ref[1])), 2 * z * np.exp(-w_ref[1])],
         [2 * z * np.exp(-w_ref[1]), 2 * z**2]]
    )  # fmt: skip
    g, f, a = (score * data) @ score.T, (score * ref) @ score.T, -second @ data
    expected = beta**2 / 4 * (g + alpha * f) + beta / 2 * (a - alpha * f)
    np.testing.assert_allclose(hessian, expected, rtol=1e-6, atol=1e-8)
    # A minimum for alpha = 1 and a maximum for alpha = 4, to the printed digits of the derivation.
    np.testing.assert_allclose(np.linalg.eigvalsh(hessian), eigenvalues, rtol=0.02)


def test_rounds_at_the_likelihood_optimum_do_not_move_or_diverge(float64):
    # alpha = 1 stays where it is; with alpha = 4 the smallest deviation grows at every step.
    _, _, w_ref = two_modes()
    step = jax.jit(lambda w, alpha: w - 0.2 * jax.grad(misspecified_loss)(w, alpha, 1.0))
    distances = {}
    for alpha in (1.0, 4.0):
        w = w_ref + 1e-3
        for _ in range(60):
            w = step(w, alpha)
        distances[alpha] = np.linalg.norm(w - w_ref)
    assert distances[1.0] < 1e-3
    assert distances[4.0] > 0.1


# Rows and roles


def test_rows_without_fake_weight_have_no_gradient_by_their_samples():
    real, fake = deltas()
    kept = np.arange(64) % 3 > 0
    loss = lambda real, fake: ddo_loss(  # noqa: E731
        real, fake, 4.0, 0.5, fake_weight=kept.astype(np.float32)
    )[0]
    by_real, by_fake = jax.grad(loss, argnums=(0, 1))(real, fake)
    assert np.all(by_fake[~kept] == 0)
    assert np.all(by_fake[kept] > 0)
    assert np.all(by_real < 0)


def test_swapping_the_roles_and_the_sign_leaves_the_loss_at_alpha_one():
    real, fake = deltas()
    for loss in (ddo_loss, kto_loss):
        options = {"reference_point": 0.0} if loss is kto_loss else {}
        one = loss(real, fake, 1.0, 0.5, **options)[0]
        np.testing.assert_allclose(loss(-fake, -real, 1.0, 0.5, **options)[0], one, rtol=1e-6)
        other = loss(-fake, -real, 2.0, 0.5, **options)[0]
        assert abs(other - loss(real, fake, 2.0, 0.5, **options)[0]) > 1e-3


def test_alpha_and_beta_may_be_arrays_of_a_grid():
    real, fake = deltas()
    alpha, beta = jnp.array([0.5, 4.0]), jnp.array([1.0, 0.1])
    grid = jax.jit(jax.vmap(lambda a, b: ddo_loss(real, fake, a, b, normalize_by_alpha=True)[0]))
    expected = [
        ddo_loss(real, fake, a, b, normalize_by_alpha=True)[0] for a, b in ((0.5, 1.0), (4.0, 0.1))
    ]
    np.testing.assert_allclose(grid(alpha, beta), expected, rtol=1e-6)


# f-divergences

DIVERGENCES = {
    "kl": lambda u: u * np.log(u),
    "reverse_kl": lambda u: -np.log(u),
    "gan": lambda u: u * np.log(u) - (u + 1) * np.log(u + 1),
    "chi2": lambda u: (u - 1) ** 2,
    "squared_hellinger": lambda u: (np.sqrt(u) - 1) ** 2,
}


@pytest.mark.parametrize("name", F_DIVERGENCES)
def test_every_divergence_is_reached_at_the_data_law_alone(float64, name):
    loss = lambda log_p: population_f_loss(name, log_p - jnp.log(P_REF), 1.0, 1.0)  # noqa: E731
    divergence = np.sum(P_REF * DIVERGENCES[name](P_DATA / P_REF))
    np.testing.assert_allclose(loss(jnp.log(P_DATA)), -divergence, atol=1e-10)
    np.testing.assert_allclose(minimise(loss), P_DATA, atol=1e-5)


def test_the_kl_loss_has_the_gradient_of_maximum_likelihood(float64):
    logits = jnp.log(P_REF) + np.linspace(-1, 1, K)
    log_p = lambda z: jax.nn.log_softmax(z)  # noqa: E731
    found = jax.grad(lambda z: population_f_loss("kl", log_p(z) - np.log(P_REF), 1.0, 1.0))(logits)
    expected = jax.grad(lambda z: -P_DATA @ log_p(z))(logits)
    np.testing.assert_allclose(found, expected, atol=1e-10)


def test_the_gan_divergence_is_ddo_and_beta_and_alpha_act_alike():
    real, fake = deltas()
    found, metrics = f_divergence_loss("gan", real, fake, 3.0, 0.4)
    np.testing.assert_allclose(found, ddo_loss(real, fake, 3.0, 0.4)[0], rtol=1e-6)
    assert metrics["clipped"] == 0
    scaled = f_divergence_loss("chi2", 0.4 * real, 0.4 * fake, 3.0, 1.0)[0]
    np.testing.assert_allclose(
        f_divergence_loss("chi2", real, fake, 3.0, 0.4)[0], scaled, rtol=1e-5
    )


@pytest.mark.parametrize("name", F_DIVERGENCES)
def test_exponents_are_clipped_before_they_overflow(name):
    gradient = jax.value_and_grad(
        lambda r: f_divergence_loss(name, r, r, 1.0, 1.0, max_exponent=20.0), has_aux=True
    )
    (loss, metrics), slope = gradient(jnp.array([-1e4, -1.0, 1.0, 1e4]))
    assert jnp.isfinite(loss)
    assert jnp.all(jnp.isfinite(slope))
    assert metrics["clipped"] == (0 if name == "gan" else 0.5)


# The losses it is compared with


def test_spin_with_samples_equal_to_data_is_a_coin_without_gradient():
    real, _ = deltas()
    loss, metrics = spin_loss(real, real, 0.7)
    np.testing.assert_allclose(loss, LOG2, rtol=1e-6)
    assert metrics["margin"] == 0
    slope = jax.grad(lambda w: spin_loss(w * real, w * real, 0.7)[0])(1.0)
    np.testing.assert_allclose(slope, 0, atol=1e-7)


def test_spin_and_dpo_are_the_logistic_loss_of_pairs():
    real, fake = deltas()
    expected = np.mean(np.log1p(np.exp(-0.7 * (real.astype(float) - fake))))
    np.testing.assert_allclose(spin_loss(real, fake, 0.7)[0], expected, rtol=1e-6)
    np.testing.assert_allclose(dpo_loss(real, fake, 0.7)[0], expected, rtol=1e-6)
    # Unlike DDO, pairing matters.
    assert abs(spin_loss(real, np.roll(fake, 1), 0.7)[0] - expected) > 1e-3


def test_cca_is_ddo_with_mismatched_conditions_as_samples():
    real, fake = deltas()
    assert cca_loss(real, fake, 2.0, 0.3)[0] == ddo_loss(real, fake, 2.0, 0.3)[0]


def test_kto_is_its_formula_and_takes_no_gradient_of_its_reference_point():
    real, fake = deltas(scale=1.0)
    real = real + 2
    sigmoid = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731
    point = (real.mean() + fake.mean()) / 2
    expected = np.mean(1 - sigmoid(0.5 * (real - point)))
    expected += 3 * np.mean(1 - sigmoid(0.5 * (point - fake)))
    np.testing.assert_allclose(kto_loss(real, fake, 3.0, 0.5)[0], expected, rtol=1e-5)
    free = jax.grad(lambda r: kto_loss(r, fake, 3.0, 0.5)[0])(real)
    fixed = jax.grad(lambda r: kto_loss(r, fake, 3.0, 0.5, reference_point=point)[0])(real)
    np.testing.assert_allclose(free, fixed, rtol=1e-5)
    np.testing.assert_allclose(kto_loss(0 * real, 0 * fake, 3.0, 0.5)[0], 2.0)


def test_unlikelihood_is_its_formula_and_finite_near_certainty():
    real = np.log(np.array([[0.5, 0.9], [0.1, 0.2]], np.float32))
    fake = np.log(np.array([[0.3, 0.99999], [1e-8, 0.7]], np.float32))
    expected = -np.mean(real) - 2 * np.mean(np.log1p(-np.exp(fake.astype(float))))
    np.testing.assert_allclose(unlikelihood_loss(real, fake, 2.0)[0], expected, rtol=1e-5)
    loss, slope = jax.value_and_grad(lambda x: unlikelihood_loss(real, x, 1.0)[0])(
        jnp.array([[0.0, -1e-30], [-200.0, -1.0]])
    )
    assert jnp.isfinite(loss)
    assert jnp.all(jnp.isfinite(slope))


def test_extrapolation_goes_the_other_way_by_the_gain():
    reference, own = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, -2.0])}
    np.testing.assert_allclose(extrapolate(reference, own, 0.5)["w"], [0.0, 4.0])
    np.testing.assert_allclose(extrapolate(reference, own, 0.0)["w"], reference["w"])
    np.testing.assert_allclose(extrapolate(reference, own, -1.0)["w"], own["w"])


# Calibration


def test_beta_gives_the_scaled_log_ratios_the_target_deviation():
    probe = np.stack(deltas(scale=30.0)) + 5
    beta = calibrate_beta(probe, target=1.5)
    np.testing.assert_allclose(np.std(beta * probe), 1.5, rtol=1e-5)


def test_the_start_of_round_ratio_compares_norms_over_whole_trees():
    fake = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    data = {"a": jnp.array([6.0]), "b": jnp.array([8.0])}
    np.testing.assert_allclose(start_of_round_ratio(fake, data), 0.5, rtol=1e-6)


# Bad input

ONES = np.ones(3, np.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ddo_loss(ONES, np.ones(4, np.float32), 1, 1), r"delta_fake.*\[3\].*\[4\]"),
        (lambda: ddo_loss(ONES[:, None], ONES[:, None], 1, 1), "vectors"),
        (lambda: ddo_loss(np.ones(0, np.float32), np.ones(0, np.float32), 1, 1), "vectors"),
        (lambda: ddo_loss(np.ones(3, int), ONES, 1, 1), "delta_real.*int"),
        (lambda: ddo_loss(ONES, ONES, -1, 1), "alpha.*-1"),
        (lambda: ddo_loss(ONES, ONES, 1, 0), "beta.*0"),
        (lambda: ddo_loss(ONES, ONES, np.nan, 1), "alpha.*nan"),
        (lambda: ddo_loss(ONES, ONES, 1, 1, fake_weight=ONES[:2]), "fake_weight.*3"),
        (lambda: ddo_loss(ONES, ONES, 1, 1, real_weight=np.ones(3, int)), "real_weight.*int"),
        (lambda: f_divergence_loss("tv", ONES, ONES, 1, 1), "tv.*reverse_kl"),
        (lambda: f_divergence_loss("kl", ONES, ONES, 1, 1, max_exponent=100), "max_exponent"),
        (lambda: spin_loss(ONES, ONES, -1), "beta"),
        (lambda: dpo_loss(ONES, ONES[:2], 1), "delta_rejected"),
        (lambda: cca_loss(ONES, ONES, -1, 1), "weight.*-1"),
        (lambda: kto_loss(ONES, ONES, -1, 1), "alpha"),
        (lambda: unlikelihood_loss(-ONES, ONES, 1), "densities"),
        (lambda: unlikelihood_loss(-ONES, -ONES[:2], 1), "shape"),
        (lambda: extrapolate({"a": ONES}, {"b": ONES}, 1), "self_trained.*structure"),
        (lambda: extrapolate({"a": ONES}, {"a": ONES[:2]}, 1), r"self_trained\['a'\].*\[3\]"),
        (lambda: tilted_optimum(ONES / 3, ONES / 3, 0), "beta"),
        (lambda: tilted_optimum(ONES, ONES[:2], 1), "p_ref"),
        (lambda: calibrate_beta(np.zeros(5, np.float32)), "deviation 0"),
        (lambda: calibrate_beta(np.arange(3)), "probe_deltas.*int"),
        (lambda: calibrate_beta(np.arange(3.0), target=-1), "target"),
        (lambda: start_of_round_ratio({"a": ONES}, {"a": ONES[:2]}), "fake_gradient"),
    ],
)
def test_refuses_bad_input_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_every_public_name_exists():
    assert all(hasattr(objectives, name) for name in objectives.__all__)
