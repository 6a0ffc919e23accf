"""Settings under names from the literature, as keyword arguments of `natural_gradient`.

    tx = ngd.natural_gradient(
        model_fn=model_fn, likelihood=ngd.Categorical(), **ngd.contrib.presets.trpo()
    )

Each call returns a new plain dict: print it, change an entry, pass it on. Each
docstring says what the preset takes from its source and what it does differently. λ is
in units of F as defined here, a mean over examples.
"""

from collections.abc import Callable
from typing import Any

from ngd_jax.contrib.backtracking import BacktrackingCG
from ngd_jax.contrib.jacobi import Jacobi
from ngd_jax.contrib.quadratic_model_rate import QuadraticModelRate
from ngd_jax.damping import LevenbergMarquardt
from ngd_jax.kfac import KFAC
from ngd_jax.metric import Metric
from ngd_jax.solvers.cg import CG
from ngd_jax.trust_region import SufficientDecrease
from ngd_jax.types import Batch

__all__ = ["hessian_free", "kfac", "pascanu_bengio", "trpo"]


def trpo() -> dict[str, Any]:
    """Trust region policy optimization: KL radius 0.01, 10 CG steps, λ = 1e-3.

    The gradient is that of the surrogate, and `update` needs the surrogate as
    `value_fn` too: as in the original, a step is halved, at most 10 times, until the
    surrogate gains a tenth of what its gradient promises. It starts from the measured
    radius; the original starts from the quadratic model's, and halves for the KL too.

    References:
      Schulman et al., Trust region policy optimization, 2015, appendix C, and its
      authors' code.
    """
    return {
        "learning_rate": None,
        "max_kl": 1e-2,
        "damping": 1e-3,
        "accept": SufficientDecrease(fraction=0.1, max_halvings=10),
        "solver": CG(max_steps=10, rtol=0.0),
    }


def hessian_free() -> dict[str, Any]:
    """Hessian-free optimization: λ₀ = 45 by Levenberg-Marquardt, up to 250 CG steps.

    λ·3/2 where ρ < 1/4, λ·2/3 where ρ > 3/4; CG from 0.95 times the last solution,
    until the model gains less than 5e-4 of its value in a step, with the diagonal to
    the power 3/4 as preconditioner, and backtracking over its iterates while the loss
    falls. `update` needs `value_fn`, unless `loss_fn` is given.

    The diagonal is that of the exact Fisher; the original takes the squared gradients
    of single examples. In place of its line search, a step that raises the loss is
    refused.

    References:
      Martens, Deep learning via Hessian-free optimization, 2010, section 4.
    """
    return {
        "learning_rate": 1.0,
        "damping": LevenbergMarquardt(initial=45.0),
        "solver": BacktrackingCG(
            max_steps=250,
            rtol=0.0,
            preconditioner=Jacobi(power=0.75),
            warm_start=0.95,
            progress_tol=5e-4,
            backtracking=True,
        ),
    }


def kfac() -> dict[str, Any]:
    """K-FAC: factored blocks of F give the direction, exact F the rate and momentum.

    λ₀ = 150 by Levenberg-Marquardt every 5 steps with ω = (19/20)⁵, factors averaged
    with a decay of 0.95, inverses every 5 steps. `update` needs `value_fn`, unless
    `loss_fn` is given. λ₀ = 150 was not tuned here: our own tuning ended at constants
    of 1e-6 to 0.1.

    The original adapts the λ of the factors separately from that of the model, and
    draws targets from the model where this preset takes random signs in the exact
    output metric.

    References:
      Martens and Grosse, Optimizing neural networks with Kronecker-factored approximate
      curvature, 2015, sections 5, 6.4, 6.5 and 7.
    """
    decay = (19 / 20) ** 5
    return {
        "learning_rate": QuadraticModelRate(),
        "damping": LevenbergMarquardt(
            initial=150.0, increase=1 / decay, decrease=decay, every=5
        ),
        "solver": KFAC(refresh_every=5, observe_every=1, exact_length=False),
    }


def pascanu_bengio(batch_fn: Callable[[Batch], Batch]) -> dict[str, Any]:
    """Natural gradient with the metric of another batch: λ₀ = 6 by Levenberg-Marquardt.

    `update` needs `value_fn`, unless `loss_fn` is given.

    Args:
      batch_fn: batch -> the batch of the metric, with examples other than those of the
        gradient; they need no labels.

    References:
      Pascanu and Bengio, Revisiting natural gradient for deep networks, 2014, section
      6, and its authors' code.
    """
    return {
        "learning_rate": 1.0,
        "damping": LevenbergMarquardt(initial=6.0),
        "metric": Metric(batch_fn=batch_fn),
    }
