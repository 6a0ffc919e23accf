"""`natural_gradient` and `scale_by_natural_gradient`: the arguments, explained."""

from collections.abc import Callable

import optax

from ngd_jax.acceptance import SufficientDecrease
from ngd_jax.fisher import Kind
from ngd_jax.likelihoods import Likelihood
from ngd_jax.preconditioners import Kronecker
from ngd_jax.relative_radius import RelativeRadius
from ngd_jax.solvers import CG, Auto, Solver
from ngd_jax.transform.step import Damping, NaturalGradientStep, Radius, Rate
from ngd_jax.types import (
    Batch,
    KeyArray,
    ModelFn,
    Outputs,
    PyTree,
    Scalar,
    ScalarOrSchedule,
)

__all__ = ["natural_gradient", "scale_by_natural_gradient"]

# Exact where that costs little, as on small models and small batches; on networks, more
# steps of CG fit the batch and not what its factors know of those before.
_SOLVER = Auto(cg=CG(max_steps=3, preconditioner=Kronecker()))


def natural_gradient(
    learning_rate: Rate,
    model_fn: ModelFn,
    likelihood: Likelihood,
    *,
    max_kl: Radius = None,
    damping: Damping = 1e-3,
    solver: Solver = _SOLVER,
    kind: Kind = "exact",
    momentum: ScalarOrSchedule = 0.0,
    warm_start: ScalarOrSchedule = 0.0,
    weights_fn: Callable[[Batch], PyTree] | None = None,
    targets_fn: Callable[[Batch], PyTree] | None = None,
    metric_batch_fn: Callable[[Batch], Batch] | None = None,
    output_loss_fn: Callable[[Outputs, Batch], Scalar] | None = None,
    microbatch_size: int | None = None,
    max_kl_evaluations: int = 10,
    acceptance: SufficientDecrease | None = None,
    key: KeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Natural gradient descent: θ ← θ - s d with (F + λI) d = g.

    * Only `learning_rate`: s is the learning rate.
    * `learning_rate` and `max_kl`: the same, shortened where the measured KL of the
      step would exceed `max_kl`.
    * `learning_rate=None` and `max_kl`: the step always goes to the radius. This is the
      constant-KL step of natural gradient, and TRPO's.

    The promise: the mean KL(θ ‖ θ + update), measured on the batch, is at most
    `max_kl`; without such a step the update is zero. It holds for the update that this
    transformation emits. What else a chain does to it (weight decay, clipping, another
    learning rate) is outside of the promise.

    The result's `update` needs the parameters and one extra argument, `batch`:
    `tx.update(grads, state, params, batch=batch)`. It also takes Optax's own `value`
    and `value_fn`, and ignores what it does not know, as Optax asks.

    Args:
      learning_rate: a number, a schedule, None, or `QuadraticModelRate`: rate and
        momentum from the exact quadratic model in two variables.
      model_fn: a pure function (params, batch) -> outputs, the same model that the loss
        is made of. What must not be differentiated (running statistics, dropout keys)
        goes through `batch`.
      likelihood: what the outputs mean; see `ngd_jax.likelihoods`.
      max_kl: the radius in nats per example: a number, a schedule, None, or
        `RelativeRadius`: a part of the loss, for losses that tend to zero. TRPO uses
        1e-2.
      damping: λ ≥ 0 in units of F, a mean over examples: a number, a schedule, a
        `RelativeDamping`, `LevenbergMarquardt`, or a `CovariantDamping` around one of
        them. F is singular for most networks, so 0 is for special cases.
      solver: `CG`, `ApproximateInverse`, `SampleSpace`, `LSMR`, `SVD`, `DampingSearch`,
        `Cholesky`, `Auto`, `Lineax` or any `Solver`. The default solves exactly where
        that costs about as much as a dozen gradients, or less, and else takes three
        steps of CG with Kronecker factors, which the state keeps:
        `Auto(cg=CG(3, preconditioner=Kronecker()))`. `CG()` has no state.
      kind: "exact", "sampled" (needs `key`) or "empirical" (needs `targets_fn`); see
        `linearize_fisher`.
      momentum: proximal momentum μ in [0, 1): (F + λI) d = g + λ μ d_previous, started
        from μ d_previous. Where F is singular its effect does not vanish with λ: what
        the batch says nothing of is taken over from the last direction.
      warm_start: decay ρ of the solver's first guess, ρ d_previous; 0 starts at zero.
        With momentum the start is μ d_previous whatever this says.
      weights_fn: batch -> weights (masks, importance weights) that broadcast against
        the examples; see `linearize_fisher`. Called with the batch of the metric.
      targets_fn: batch -> targets, for kind "empirical"; likewise.
      metric_batch_fn: batch -> the batch of the metric, a part of it or another one:
        `lambda batch: jax.tree.map(lambda x: x[:500], batch)`. The metric needs no
        labels. The KL of the step is measured on that batch too.
      output_loss_fn: (outputs, batch) -> loss, whose gradient is g. Gives solvers in
        the space of outputs (`SampleSpace`, `LSMR`, `SVD`, `DampingSearch`) their
        right-hand side there, so that small damping does not lose it to round-off; and
        those who weigh the loss (`LevenbergMarquardt`, `RelativeRadius`, `acceptance`,
        `DampingSearch`) what they weigh, where `update` is given no `value_fn`. A loss
        with the right gradient and another value (the covariance of an energy) takes
        that `value_fn` beside it.
      microbatch_size: examples in memory at once, for the metric and for the KL. Use
        this instead of `optax.MultiSteps`, which would take the metric from the last
        micro-batch only.
      max_kl_evaluations: forward passes at most in search of the radius. Two or three
        do for smooth models.
      acceptance: None, or `SufficientDecrease`: a step is halved, or refused, where the
        loss does not fall by enough of what the gradient promises; needs the loss, as
        `output_loss_fn` or as `value_fn` of `update`.
      key: for kind "sampled"; the draws of step n come from `fold_in(key, n)`.

    Returns:
      An `optax.GradientTransformationExtraArgs` with state `NaturalGradientState`.

    Raises:
      ValueError, TypeError: at construction, or when `update` is traced, naming the
        argument. Never at run time: a gradient, a model or a KL that is not finite
        gives a zero update, keeps the state, and is told in `info.status`.

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
      Inside `optax.inject_hyperparams`, list everything but `learning_rate`, `max_kl`,
      `damping` and `momentum` in `static_args`.
    """
    return NaturalGradientStep(
        model_fn=model_fn,
        likelihood=likelihood,
        learning_rate=learning_rate,
        sign=-1.0,
        max_kl=max_kl,
        damping=damping,
        solver=solver,
        kind=kind,
        momentum=momentum,
        warm_start=warm_start,
        weights_fn=weights_fn,
        targets_fn=targets_fn,
        metric_batch_fn=metric_batch_fn,
        output_loss_fn=output_loss_fn,
        microbatch_size=microbatch_size,
        max_kl_evaluations=max_kl_evaluations,
        acceptance=acceptance,
        key=key,
    ).transformation()


def scale_by_natural_gradient(
    model_fn: ModelFn,
    likelihood: Likelihood,
    *,
    max_kl: Radius = None,
    damping: Damping = 1e-3,
    solver: Solver = _SOLVER,
    kind: Kind = "exact",
    momentum: ScalarOrSchedule = 0.0,
    warm_start: ScalarOrSchedule = 0.0,
    weights_fn: Callable[[Batch], PyTree] | None = None,
    targets_fn: Callable[[Batch], PyTree] | None = None,
    metric_batch_fn: Callable[[Batch], Batch] | None = None,
    output_loss_fn: Callable[[Outputs, Batch], Scalar] | None = None,
    microbatch_size: int | None = None,
    max_kl_evaluations: int = 10,
    acceptance: SufficientDecrease | None = None,
    key: KeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Replaces a gradient g by the natural one, d = (F + λI)⁻¹ g: no sign, no rate.

    For chains that bring a sign and a learning rate of their own. With `max_kl` the
    direction comes out as long as its radius allows, s d with KL(θ ‖ θ - s d) at most
    `max_kl` and close to it: the KL is measured along -d, where a descent goes.

    Args:
      model_fn, likelihood, max_kl, damping, solver, kind, momentum, warm_start,
        weights_fn, targets_fn, metric_batch_fn, output_loss_fn, microbatch_size,
        max_kl_evaluations, acceptance, key: as for `natural_gradient`.

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
    return NaturalGradientStep(
        model_fn=model_fn,
        likelihood=likelihood,
        learning_rate=(
            1.0 if max_kl is None or isinstance(max_kl, RelativeRadius) else None
        ),
        sign=1.0,
        max_kl=max_kl,
        damping=damping,
        solver=solver,
        kind=kind,
        momentum=momentum,
        warm_start=warm_start,
        weights_fn=weights_fn,
        targets_fn=targets_fn,
        metric_batch_fn=metric_batch_fn,
        output_loss_fn=output_loss_fn,
        microbatch_size=microbatch_size,
        max_kl_evaluations=max_kl_evaluations,
        acceptance=acceptance,
        key=key,
    ).transformation()
