"""The gallery: its figures, that they can fail, and the textbook versions."""

import ast
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
import sklearn.datasets
import sklearn.linear_model

import ngd_jax as ngd
from experiments.benchmarks.markdown import write_table
from experiments.claims.gallery import (
    GALLERY,
    adaptive,
    exponential_family,
    identity,
    kronecker,
    newton,
    policies,
    regression,
    wave_function,
)
from experiments.claims.steps import train
from tests.experiments.claims.helpers import assert_as_expected, run

PAIRS = {
    "least squares": (
        regression.one_step_of_regression,
        regression.ordinary_least_squares,
    ),
    "Newton": (newton.natural_newton, newton.reweighted_least_squares),
    "Levenberg-Marquardt": (
        regression.natural_levenberg_marquardt,
        regression.levenberg_marquardt,
    ),
    "TRPO": (policies.natural_trpo, policies.trpo_direction),
    "tabular": (policies.natural_policy_gradient, policies.advantage_step),
    "K-FAC": (kronecker.natural_layer, kronecker.factored_step),
    "Adam": (adaptive.natural_adam, adaptive.optax_adam),
    "reconfiguration": (
        wave_function.natural_reconfiguration,
        wave_function.reconfiguration_direction,
    ),
    "mirror": (
        exponential_family.natural_mirror,
        exponential_family.exponentiated_gradient,
    ),
    "variational": (
        exponential_family.natural_inference,
        exponential_family.exact_posterior,
    ),
}


@pytest.mark.slow
def test_figures_are_as_expected_and_the_report_shows_the_calls():
    evidence = run(GALLERY)
    assert_as_expected(evidence)
    assert [plot.name for plot in evidence.plots] == ["gallery"]
    table = write_table(evidence.tables[0])
    for ours, _ in PAIRS.values():
        assert identity.call_in(ours).replace("|", r"\|") in table
    notes = "\n".join(evidence.notes)
    for pair in PAIRS.values():
        assert identity.listing(*pair) in notes


def _with(monkeypatch, **changes):
    original = ngd.natural_gradient

    def changed(*args, **options):
        return original(*args, **{**options, **changes})

    monkeypatch.setattr(ngd, "natural_gradient", changed)


BREAKABLE = {
    "least squares": regression.least_squares,
    "mirror": functools.partial(exponential_family.mirror, quick=True),
    "tabular": functools.partial(policies.policy_gradient, quick=True),
    "K-FAC": functools.partial(kronecker.factored_layer, quick=True),
    "variational": functools.partial(exponential_family.variational, quick=True),
}
SLOW = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("tabular", "K-FAC", "variational")
]


@pytest.mark.parametrize("name", ["least squares", "mirror", *SLOW])
def test_a_little_damping_is_found_out(monkeypatch, x64, name):
    _with(monkeypatch, damping=1e-6)
    found = BREAKABLE[name]()
    assert not found.equality.holds
    assert found.equality.measured < 1e-2  # very little, and noticed all the same


@pytest.mark.slow
def test_other_breaks_are_found_out(monkeypatch, x64):
    with monkeypatch.context() as patch:
        _with(patch, metric=ngd.Metric())
        assert not adaptive.adam(quick=True).equality.holds
    with monkeypatch.context() as patch:
        _with(patch, metric=ngd.Metric())
        assert not wave_function.reconfiguration(quick=True).equality.holds
        assert not policies.policy_gradient(quick=True).equality.holds
    with monkeypatch.context() as patch:
        _with(patch, solver=ngd.CG(max_steps=9, rtol=0.0))
        assert not policies.trpo(quick=True).equality.holds
    with monkeypatch.context() as patch:
        _with(patch, likelihood=ngd.Categorical(), max_kl=None, learning_rate=1.0)
        assert not all(check.holds for check in policies.trpo(quick=True).others)


def test_relative_error_is_of_the_worst_leaf():
    truth = {"a": np.array([1.0, -2.0]), "b": np.array([1e-3])}
    ours = {"a": truth["a"] + 0.2, "b": truth["b"] + 1e-3}
    assert identity.relative_error(ours, truth) == pytest.approx(1.0)
    assert identity.relative_error(truth, truth) == 0.0
    with pytest.raises(ValueError, match="shape"):
        identity.relative_error(np.zeros(2), np.ones(3))


def test_what_is_not_finite_is_not_equal():
    ours = np.array([1.0, np.nan])
    assert not identity.equal("it", ours, np.ones(2), num_rounded=1).holds
    assert not identity.unequal("it", ours, np.ones(2), "").holds


def test_equal_allows_round_off_and_no_more():
    truth = np.ones(3)
    allowed = functools.partial(
        identity.equal, "it", truth=truth, num_rounded=10, condition=10.0
    )
    assert allowed(truth + 2e-14).holds
    assert not allowed(truth + 3e-14).holds
    assert not identity.unequal("it", truth + 3e-14, truth, "").holds


def test_call_has_its_constants_filled_in():
    call = identity.call_in(newton.natural_newton)
    assert call == (
        "ngd.natural_gradient(1.0, model_fn, ngd.Bernoulli(event_ndims=0), "
        "damping=0.01, solver=ngd.Cholesky())"
    )
    with pytest.raises(ValueError, match="assigns nothing"):
        identity.call_in(newton.reweighted_least_squares)


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_listing_is_the_code_that_runs_and_all_of_it(pair):
    module = vars(sys.modules[pair[0].__module__])
    here = {
        name
        for name, value in module.items()
        if getattr(value, "__module__", None) == pair[0].__module__
        or isinstance(value, int | float)
    }
    elsewhere = {name: value for name, value in module.items() if name not in here}
    text = identity.listing(*pair)
    exec(compile(text, "listing", "exec"), elsewhere)
    assert all(function.__name__ in elsewhere for function in pair)
    used = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    assert used & here <= set(elsewhere)


def test_textbook_regressions_agree_with_outsiders():
    x, y = sklearn.datasets.load_breast_cancer(return_X_y=True)
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    ours = newton.reweighted_least_squares(np.zeros(30), x, y)[-1]
    theirs = sklearn.linear_model.LogisticRegression(
        C=1 / (newton._PENALTY * len(x)), fit_intercept=False, tol=1e-10, max_iter=1000
    ).fit(x, y)
    np.testing.assert_allclose(ours, theirs.coef_[0], atol=1e-5)

    time = np.linspace(0, 4, 30)
    y = 2 * np.exp(-time) + 0.3 + 0.05 * np.random.default_rng(0).normal(size=30)
    path, _ = regression.levenberg_marquardt(regression._LM_START, time, y)
    theirs = scipy.optimize.least_squares(
        lambda p: p[0] * np.exp(-p[1] * time) + p[2] - y,
        regression._LM_START,
        method="lm",
    )
    np.testing.assert_allclose(path[-1], theirs.x, rtol=1e-3)


def test_textbook_trpo_direction_converges_to_the_dense_solution():
    weights, batch = policies._policy_problem(0)
    direction, length = policies.trpo_direction(weights, batch, num_steps=100)
    x, policy = batch["states"], policies.softmax(batch["states"] @ weights)
    metric = np.einsum("ni,na,ab,nj->iajb", x, policy, np.eye(4), x) - np.einsum(
        "ni,na,nb,nj->iajb", x, policy, policy, x
    )
    fisher = metric.reshape(64, 64) / len(x) + policies._DAMPING * np.eye(64)
    assert policies._largest_eigenvalue(weights, batch) == pytest.approx(
        np.linalg.eigvalsh(fisher)[-1] - policies._DAMPING
    )
    scores = np.eye(4)[batch["actions"]] - policy
    gradient = (x.T @ (scores * batch["advantages"][:, None]) / len(x)).ravel()
    truth = np.linalg.solve(fisher, gradient)
    np.testing.assert_allclose(direction.ravel(), truth, rtol=1e-7, atol=1e-9)
    assert length**2 * gradient @ truth / 2 == pytest.approx(policies._RADIUS)


def test_visits_and_advantages_are_those_of_the_process(x64):
    random = np.random.default_rng(3)
    process = {
        "transitions": random.dirichlet(np.ones(5), size=(5, 2)),
        "rewards": random.uniform(size=(5, 2)),
        "start": random.dirichlet(np.ones(5)),
    }
    policy = random.dirichlet(np.ones(2), size=5)
    advantages, visits = policies.advantages_and_visits(policy, process)
    np.testing.assert_allclose(np.sum(policy * advantages, axis=1), 0, atol=1e-12)
    assert visits.sum() == pytest.approx(1.0)
    gained = visits @ np.sum(policy * process["rewards"], axis=1)
    expected = float(policies.discounted_return(policy, process))
    assert gained / (1 - policies._DISCOUNT) == pytest.approx(expected)


def test_rmsprop_is_adam_without_the_first_moment(x64):
    x, y = sklearn.datasets.load_breast_cancer(return_X_y=True)
    x, y = jnp.asarray((x / x.std(axis=0))[:40, None]), jnp.asarray(y[:40, None], float)
    ours = ngd.natural_gradient(
        1e-2,
        adaptive.model_fn,
        ngd.Bernoulli(event_ndims=0),
        damping=1e-8,
        solver=adaptive.RootOfDiagonal(decay=0.9),
        metric=ngd.Metric(kind="empirical", targets_fn=lambda batch: batch["y"]),
    )
    theirs = optax.chain(
        optax.scale_by_rms(decay=0.9, eps_in_sqrt=False, bias_correction=True),
        optax.scale_by_learning_rate(1e-2),
    )
    found, truth = (
        train(tx, adaptive.loss_fn, jnp.zeros(30), {"x": x, "y": y}, lambda *_: None)[0]
        for tx in (ours, theirs)
    )
    np.testing.assert_allclose(found, truth, rtol=1e-12)


def test_energy_of_all_spins_along_x_is_minus_their_number(x64):
    params = {"a": np.zeros(3), "b": np.zeros(2), "w": np.zeros((3, 2))}
    batch = wave_function._configurations(3, params)
    np.testing.assert_allclose(batch["probabilities"], 1 / 8)
    assert float(wave_function.half_the_energy(params, batch)) == pytest.approx(-1.5)
    assert (batch["hamiltonian"] == batch["hamiltonian"].T).all()


def test_kl_of_the_family_is_that_of_gaussians(x64):
    random = np.random.default_rng(0)
    (m, n), (s, t) = random.normal(size=(2, 3)), random.uniform(0.5, 2, size=(2, 3))

    def natural(mean, scale):
        return {"linear": mean / scale**2, "quadratic": jnp.diag(-0.5 / scale**2)}

    def outputs(mean, scale):
        return {"mean": jnp.asarray(mean), "log_scale": jnp.log(scale)}

    found = exponential_family.kl_fn(natural(m, s), natural(n, t))
    truth = ngd.DiagonalGaussian().kl(outputs(m, s), outputs(n, t))
    assert float(found) == pytest.approx(float(truth))


def test_fisher_of_a_gaussian_is_the_covariance_of_its_samples():
    mean = np.array([0.5, -1.0])
    w = mean + np.random.default_rng(0).normal(size=(400_000, 2))
    statistics = np.c_[w, w[:, :1] ** 2, w[:, 0] * w[:, 1], w[:, 1:] ** 2]
    found = exponential_family._fisher_of_unit_gaussian(mean)
    np.testing.assert_allclose(found, np.cov(statistics.T), atol=0.05)


def test_complex_gradients_descend(x64):
    """`descend` hands over the steepest ascent, not JAX's conjugate of it."""
    start = jnp.array([1.0 + 2.0j])
    path, _ = identity.descend(
        optax.sgd(0.5), lambda z, _: jnp.sum(jnp.abs(z) ** 2), start, None
    )
    np.testing.assert_allclose(path[-1], 0, atol=1e-12)
    assert jax.numpy.iscomplexobj(path)
