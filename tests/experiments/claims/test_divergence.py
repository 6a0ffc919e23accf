"""The experiment on KL as a distance: its figures, and that they can fail."""

import jax

import ngd_jax as ngd
from experiments.claims import divergence
from tests.experiments.claims.helpers import run


def test_another_metric_is_found_out(monkeypatch):
    class Doubled(ngd.Categorical):
        def fisher_vp(self, outputs, tangents):
            return 2 * super().fisher_vp(outputs, tangents)

        def sqrt_fisher_tvp(self, outputs, tangents):
            return 2**0.5 * super().sqrt_fisher_tvp(outputs, tangents)

        def sqrt_fisher_vp(self, outputs, coefficients):
            return 2**0.5 * super().sqrt_fisher_vp(outputs, coefficients)

    monkeypatch.setattr(divergence, "_LIKELIHOOD", Doubled())
    failed = [check for check in run(divergence.DIVERGENCE).checks if not check.holds]
    assert "its Hessian against F, relative" in [check.name for check in failed]


def test_permuted_network_is_another_point_and_the_same_function():
    params = divergence.mlp_params(jax.random.key(0), [4, 3, 2])
    permuted = divergence._permute(params)
    x = jax.random.normal(jax.random.key(1), (5, 4))
    batch = {"x": x}
    assert (params[0]["w"] != permuted[0]["w"]).any()
    before, after = (divergence.model_fn(p, batch) for p in (params, permuted))
    assert abs(before - after).max() < 1e-6
