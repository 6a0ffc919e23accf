"""Natural gradient as an Optax transformation.

    d = (F + λI)⁻¹ g,    θ ← θ - s d,    s = the learning rate or the KL radius

The only package that knows Optax's protocol.

* here: the two public functions;
* `arguments`: what they accept;
* `step`: one step, in four parts;
* `state`: what a step keeps and what it reports.
"""

from collections.abc import Callable

import optax

from ngd_jax.auto import Auto
from ngd_jax.likelihoods import Likelihood
from ngd_jax.metric import Metric
from ngd_jax.solvers.protocol import Solver
from ngd_jax.transform.arguments import Damping, Radius, Rate, Settings
from ngd_jax.transform.state import (
    NaturalGradientInfo,
    NaturalGradientState,
    StepStatus,
)
from ngd_jax.transform.step import NaturalGradientStep
from ngd_jax.trust_region import RadiusRule, SufficientDecrease
from ngd_jax.types import Batch, ModelFn, Outputs, Scalar, ScalarOrSchedule

__all__ = [
    "STATIC_ARGS",
    "NaturalGradientInfo",
    "NaturalGradientState",
    "StepStatus",
    "natural_gradient",
    "scale_by_natural_gradient",
]

STATIC_ARGS = ("model_fn", "likelihood", "solver", "loss_fn", "accept", "metric")
"""`static_args` of `optax.inject_hyperparams(natural_gradient, static_args=...)`."""

_SOLVER = Auto()


def natural_gradient(
    learning_rate: Rate,
    model_fn: ModelFn,
    likelihood: Likelihood,
    *,
    max_kl: Radius = None,
    damping: Damping = 1e-3,
    momentum: ScalarOrSchedule = 0.0,
    solver: Solver = _SOLVER,
    loss_fn: Callable[[Outputs, Batch], Scalar] | None = None,
    accept: SufficientDecrease | None = None,
    metric: Metric = Metric(),  # noqa: B008  # frozen
) -> optax.GradientTransformationExtraArgs:
    """Natural gradient descent: θ ← θ - s d with (F + λI) d = g.

    * Only `learning_rate`: s is the learning rate.
    * `learning_rate` and `max_kl`: the same, shortened if the measured KL of the step
      would exceed `max_kl`.
    * `learning_rate=None` and `max_kl`: the step always extends to the radius. This is
      the constant-KL step of natural gradient, and TRPO's.

    The promise: the mean KL(θ ‖ θ + update), measured on the batch at the parameters as
    `optax.apply_updates` will leave them, in their dtype, is at most `max_kl`; if no
    such step is found, the update is zero. An update that is not finite is never
    emitted. This covers the update that this transformation emits, not what the rest of
    a chain does to it (weight decay, clipping, another learning rate).

    The result's `update` needs the parameters and one extra argument, `batch`:
    `tx.update(grads, state, params, batch=batch)`. It also takes Optax's own `value`
    and `value_fn`, and ignores other extra arguments, as Optax asks.

    Args:
      learning_rate: a number, a schedule, None, or a rule such as
        `contrib.QuadraticModelRate`.
      model_fn: a pure function (params, batch) -> outputs, the same model that the loss
        uses. Whatever must not be differentiated (running statistics, dropout keys)
        belongs in `batch`.
      likelihood: what the outputs mean; see `ngd_jax.likelihoods`.
      max_kl: the radius in nats per example: a number, a schedule, None, or a rule such
        as `contrib.RelativeRadius`. TRPO uses 1e-2.
      damping: λ ≥ 0 in units of F, a mean over examples: a number, a schedule, a
        `RelativeDamping`, `LevenbergMarquardt`, or a `CovariantDamping` around one of
        them. F is singular for most networks, so 0 is for special cases.
      momentum: proximal momentum μ in [0, 1): (F + λI) d = g + λ μ d_previous, solved
        as a correction to μ d_previous. Where F is singular its effect does not vanish
        with λ: components that the batch does not determine are kept from the previous
        direction.
      solver: a solver for (F + λI) d = g: `CG`, `KFAC`, `LSMR`, `SampleSpace`,
        `Cholesky`, `Auto`, one of `contrib`, or your own `Solver`. The default solves
        exactly where that costs about as much as a dozen gradients. Otherwise it takes
        three steps of CG with Kronecker factors, which the state keeps, or one step
        along the factors (`KFAC`) where the batch has fewer than 0.1 outputs for each
        parameter: more steps would overfit the batch.
      loss_fn: (outputs, batch) -> loss, whose gradient is g. It gives solvers in output
        space (`SampleSpace`, `LSMR`) their right-hand side there, so that small damping
        does not lose it to round-off; and it is the loss for rules that need one
        (`LevenbergMarquardt`, `accept`, `contrib.RelativeRadius`), unless `update` is
        given a `value_fn`. A loss with the right gradient but another value (the
        covariance of an energy) needs that `value_fn` as well.
      accept: None, or `SufficientDecrease`: a step is halved, or refused, unless the
        loss falls by a large enough fraction of what the gradient promises; needs the
        loss, as `loss_fn` or as `value_fn` of `update`.
      metric: which kind of Fisher the metric is (exact, sampled or empirical) and which
        data it is computed from (weights; another batch or a part of this one;
        microbatches). See `Metric`.

    Returns:
      An `optax.GradientTransformationExtraArgs` with state `NaturalGradientState`.

    Raises:
      ValueError, TypeError: at construction, or when `update` is traced, naming the
        argument. Never at run time: a gradient, a model or a KL that is not finite
        gives a zero update and is reported in `info.status`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, ngd_jax as ngd
      >>> x = jax.random.normal(jax.random.key(0), (64, 3))
      >>> batch = {"x": x, "y": x @ jnp.array([1.0, -2.0, 0.5])}
      >>> def model_fn(params, batch):
      ...     return batch["x"] @ params["w"]
      >>> def loss_fn(params, batch):
      ...     return 0.5 * jnp.mean((model_fn(params, batch) - batch["y"]) ** 2)
      >>> tx = ngd.natural_gradient(
      ...     1.0, model_fn, ngd.Gaussian(event_ndims=0), damping=0.0
      ... )
      >>> params = {"w": jnp.zeros(3)}
      >>> grads = jax.grad(loss_fn)(params, batch)
      >>> updates, state = tx.update(grads, tx.init(params), params, batch=batch)
      >>> optax.apply_updates(params, updates)["w"].round(3)  # least squares: one step
      Array([ 1. , -2. ,  0.5], dtype=float32)
      >>> ngd.StepStatus(int(state.info.status)).name
      'TAKEN'

    References:
      Amari, Natural gradient works efficiently in learning, 1998; Schulman et al.,
      Trust region policy optimization, 2015; Martens, New insights and perspectives on
      the natural gradient method, 2020; for the momentum, Goldshlager, Abrahamsen and
      Lin, A Kaczmarz-inspired approach to accelerate the optimization of neural network
      wavefunctions, 2024, equation 15.

    Note:
      Inside `optax.inject_hyperparams`, pass `static_args=ngd.STATIC_ARGS`.
    """
    settings = Settings(
        learning_rate=learning_rate,
        model_fn=model_fn,
        likelihood=likelihood,
        max_kl=max_kl,
        damping=damping,
        momentum=momentum,
        solver=solver,
        loss_fn=loss_fn,
        accept=accept,
        metric=metric,
    )
    return NaturalGradientStep(settings).transformation()


def scale_by_natural_gradient(
    model_fn: ModelFn,
    likelihood: Likelihood,
    *,
    max_kl: Radius = None,
    damping: Damping = 1e-3,
    momentum: ScalarOrSchedule = 0.0,
    solver: Solver = _SOLVER,
    loss_fn: Callable[[Outputs, Batch], Scalar] | None = None,
    accept: SufficientDecrease | None = None,
    metric: Metric = Metric(),  # noqa: B008  # frozen
) -> optax.GradientTransformationExtraArgs:
    """Replaces a gradient g by the natural gradient d = (F + λI)⁻¹ g: no sign, no rate.

    For chains with their own sign and learning rate. With `max_kl` the result is s d,
    as long as the radius allows: KL(θ ‖ θ - s d) is at most `max_kl` and close to it.
    The KL is measured along -d, the direction of descent.

    Args:
      model_fn, likelihood, max_kl, damping, momentum, solver, loss_fn, accept, metric:
        as for `natural_gradient`.

    Returns:
      An `optax.GradientTransformationExtraArgs` with state `NaturalGradientState`.

    Raises:
      ValueError, TypeError: as `natural_gradient`.

    Example:
      >>> import optax, ngd_jax as ngd
      >>> model_fn = lambda params, batch: batch["x"] @ params["w"]
      >>> tx = optax.chain(
      ...     ngd.scale_by_natural_gradient(model_fn, ngd.Gaussian()),
      ...     optax.add_decayed_weights(1e-4),
      ...     optax.scale_by_learning_rate(0.5),
      ... )
    """
    goes_to_radius = max_kl is not None and not isinstance(max_kl, RadiusRule)
    settings = Settings(
        learning_rate=None if goes_to_radius else 1.0,
        model_fn=model_fn,
        likelihood=likelihood,
        max_kl=max_kl,
        damping=damping,
        momentum=momentum,
        solver=solver,
        loss_fn=loss_fn,
        accept=accept,
        metric=metric,
        sign=1.0,
    )
    return NaturalGradientStep(settings).transformation()
