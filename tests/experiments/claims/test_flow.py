"""The experiment on non-linear changes of parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats

from experiments.claims import flow
from tests.experiments.claims.helpers import run


@pytest.mark.long
def test_damping_is_found_out(monkeypatch):
    """λI is another matrix in other parameters, however short the steps."""
    monkeypatch.setattr(flow, "_DAMPING", 0.1)
    failed = [check for check in run(flow.FLOW).checks if not check.holds]
    assert len([check for check in failed if "Euler" in check.name]) == 2
    assert any("linear" in check.name for check in failed)


def test_kl_of_gammas_equals_its_integral():
    log_pdf = scipy.stats.gamma.logpdf

    def integrand(x: float) -> float:
        log_p, log_q = log_pdf(x, 3.0, scale=1 / 2.0), log_pdf(x, 1.5, scale=1 / 0.7)
        return float(np.exp(log_p) * (log_p - log_q))

    expected = scipy.integrate.quad(integrand, 0, np.inf)[0]
    with jax.enable_x64(True):
        kl = flow.gamma_kl(jnp.array([3.0, 2.0]), jnp.array([1.5, 0.7]))
    np.testing.assert_allclose(kl, expected, rtol=1e-7)


def test_exact_flow_solves_its_differential_equation():
    """dθ/dt = -F⁻¹g, with F and g of the Gamma distribution written out."""

    def velocity(_time: float, ab: np.ndarray) -> np.ndarray:
        (a, b), (c, d) = ab, flow._TARGET
        fisher = [[scipy.special.polygamma(1, a), -1 / b], [-1 / b, a / b**2]]
        log_mean = scipy.special.digamma(c) - np.log(d)
        gradient = [scipy.special.digamma(a) - np.log(b) - log_mean, c / d - a / b]
        return -np.linalg.solve(fisher, gradient)

    solution = scipy.integrate.solve_ivp(
        velocity, (0, 1.5), flow._START, rtol=1e-10, atol=1e-10
    )
    np.testing.assert_allclose(flow.exact_flow(1.5), solution.y[:, -1], rtol=1e-7)


@pytest.mark.parametrize("parameters", flow.PARAMETERS, ids=lambda p: p.name)
def test_parametrisations_decode_what_they_encode(parameters):
    ab = np.array([2.5, 0.7])
    with jax.enable_x64(True):
        decoded = parameters.decode(jnp.asarray(parameters.encode(ab)))
    np.testing.assert_allclose(decoded, ab, rtol=1e-12)
