"""Curve fitting: weighted nonlinear least squares by damped natural gradient.

    min_θ  Σₙ rₙ²,    rₙ = (f(xₙ, θ) - yₙ) / sigmaₙ

For a Gaussian likelihood F is JᵀJ / M, and natural gradient is Gauss-Newton. The steps
are those of `DampingSearch`, in coordinates in which all parameters count alike.
"""

import enum
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import jax.scipy.linalg
import numpy as np
from jax.flatten_util import ravel_pytree

from ngd_jax import tree
from ngd_jax.contrib.damping_search import DampingSearch
from ngd_jax.contrib.svd import decompose
from ngd_jax.dense import dense_root
from ngd_jax.fisher import Fisher, linearize_fisher
from ngd_jax.likelihoods import Gaussian
from ngd_jax.metric import check_count
from ngd_jax.solvers.protocol import (
    RightHandSide,
    SolverStatus,
    first_cause,
    forward_only,
    solve_scaled,
)
from ngd_jax.types import Array, ArrayLike, PyTree, Scalar

__all__ = ["CurveFitResult", "CurveFitStatus", "curve_fit"]

# Round-off of a sum of squares or of a curve, in units of ε.
_ROUND_OFF = 64.0
# Steps in a row that lower the sum by no more than round-off. The first of them still
# improve the parameters, whose error is the square root of what the sum can show.
_MAX_IDLE = 20


class CurveFitStatus(enum.IntEnum):
    """How a fit ended; `message` puts it into words.

    Example:
      >>> print(CurveFitStatus(1).message)
      The step budget was used before the sum of squares was stationary; the parameters
      are those of the last step.
    """

    CONVERGED = 0
    MAX_STEPS = 1
    STALLED = 2
    NON_FINITE = 3
    UNDETERMINED = 4

    @property
    def message(self) -> str:
        """The status as a sentence."""
        return _MESSAGES[self]


_MESSAGES = {
    CurveFitStatus.CONVERGED: (
        "The sum of squares is stationary: what is left of the way is negligible "
        "beside the residuals or the round-off of the curve."
    ),
    CurveFitStatus.MAX_STEPS: (
        "The step budget was used before the sum of squares was stationary; the "
        "parameters are those of the last step."
    ),
    CurveFitStatus.STALLED: (
        "No step lowers the sum of squares, or only negligible ones do, and it is not "
        "stationary: `relative_offset` says by how much. Another start may help, or "
        "float64."
    ),
    CurveFitStatus.NON_FINITE: (
        "At the start the curve or its derivative, the data or `sigma` are not finite; "
        "the parameters are those of the start."
    ),
    CurveFitStatus.UNDETERMINED: (
        "The sum of squares is stationary, but the data do not determine all "
        "parameters there, and `covariance` is infinite."
    ),
}


class CurveFitResult(NamedTuple):
    """The result of a fit.

    Attributes:
      params: θ, in the structure of `p0`.
      covariance: of θ, `[P, P]` in the order of `ravel_pytree(params)`; infinite where
        it cannot be estimated.
      residual_sum: Σ r², with r in units of `sigma`.
      relative_offset: ‖Uᵀ r‖ / ‖r‖, with U an orthonormal basis of the columns of J:
        the length of the remaining step in units of the residuals; 0 where the sum of
        squares is stationary.
      num_steps: int32, steps that were tried.
      status: int32, a `CurveFitStatus`.
    """

    params: PyTree
    covariance: Array
    residual_sum: Array
    relative_offset: Array
    num_steps: Array
    status: Array

    @property
    def standard_errors(self) -> Array:
        """√ of the diagonal of the covariance, `[P]`."""
        return jnp.sqrt(jnp.diagonal(self.covariance, axis1=-2, axis2=-1))


def curve_fit(
    f: Callable[..., Any],
    xdata: PyTree,
    ydata: Any,
    p0: Any,
    sigma: Any = None,
    absolute_sigma: bool = False,
    *,
    max_steps: int = 200,
    rtol: float | None = None,
) -> CurveFitResult:
    """Fits `f(xdata, *params)` to ydata, as `scipy.optimize.curve_fit` does.

        min_θ Σ r²,    r = (f(xdata, θ) - ydata) / sigma

    Each step is one of `DampingSearch`: many λ and lengths are tried, along paths bent
    by the second derivative of f, and no step that raises Σ r² by more than round-off
    is taken. λ damps parameter i in units of

        √(|θᵢ| / ‖∂r/∂θᵢ‖)

    evaluated at each step, so that no scales need to be given: the geometric mean of
    |θᵢ|, with which a parameter runs away if the curve is too sensitive to it, and of
    MINPACK's 1 / ‖∂r/∂θᵢ‖, with which one runs away if it hardly affects the curve. For
    a parameter at 0, rms(r) / ‖∂r/∂θᵢ‖ stands for |θᵢ|.

    The fit stops after a step that changes each parameter by less than `rtol` |θᵢ|, or
    moves the curve through each by less than `rtol` rms(r); if no step lowers Σ r², or
    twenty only by round-off; or after `max_steps`. `status` says how good the result
    is: it is CONVERGED only if the remaining Gauss-Newton step moves the curve by less
    than ε^⅓ of the residuals (6e-6 in float64, and so each parameter by less than 6e-6
    √(M - P) standard errors), or by less than its round-off.

    Works under `jax.jit` and `jax.vmap`, over data, starts and weights. The program is
    compiled once for a function f and the shapes of its arguments. Dense: O(M P²)
    operations for each step, some dozen passes through f, and M·P memory.

    Args:
      f: a JAX function `f(xdata, *params)` -> `[...]` like `ydata`; hashable.
      xdata: any tree of arrays, passed to f unchanged.
      ydata: M real numbers, in an array of any shape.
      p0: the start, a list or tuple with one entry for each further argument of f: a
        number, an array or any tree of them. Or an array `[P]`, one number for each.
      sigma: standard deviations of ydata, which broadcast to it, or for ydata `[M]` the
        covariance `[M, M]`; None for 1.
      absolute_sigma: whether `sigma` is absolute. Otherwise only its ratios matter, and
        the covariance is multiplied by Σ r² / (M - P).
      max_steps: at least 1.
      rtol: in [0, 1), or None for ε^⅔: 4e-11 in float64, 2e-5 in float32.

    Returns:
      The fit; `params, covariance, *_ = curve_fit(...)` are SciPy's two. All of it is
      in one dtype, that of p0 and ydata: float32, or float64 if JAX is in 64-bit mode.

    Raises:
      TypeError: for parameters or data that are not real, half precision, an f that is
        not hashable, a p0 that is not a list, a tuple or an array `[P]`.
      ValueError: for shapes that do not fit, a `sigma` that is known and not positive,
        a `max_steps` or `rtol` out of range.

    Example:
      >>> import jax.numpy as jnp, ngd_jax as ngd
      >>> def f(x, amplitude, rate):
      ...     return amplitude * jnp.exp(-rate * x)
      >>> x = jnp.linspace(0.0, 4.0, 9)
      >>> y = f(x, 2.5, 1.3) + 0.1 * jnp.cos(7 * x)
      >>> fit = ngd.contrib.curve_fit(f, x, y, p0=[1.0, 1.0])
      >>> amplitude, rate = fit.params
      >>> print(f"{amplitude:.2f} {rate:.2f} ± {fit.standard_errors[1]:.2f}")
      2.58 1.36 ± 0.07
      >>> print(ngd.contrib.CurveFitStatus(int(fit.status)).name)
      CONVERGED

    References:
      Moré, The Levenberg-Marquardt algorithm: implementation and theory, 1978 (scales
      of the parameters); Transtrum and Sethna, Improvements to the Levenberg-Marquardt
      algorithm for nonlinear least-squares minimization, 2012 (bent paths); Bates and
      Watts, A relative offset orthogonality convergence criterion for nonlinear least
      squares, 1981.
    """
    check_count("max_steps", max_steps)
    if rtol is not None and not 0 <= rtol < 1:
        raise ValueError(f"`rtol` must be None or in [0, 1), got {rtol}.")
    try:
        hash(f)
    except TypeError as error:
        raise TypeError(
            "`f` must be hashable, as functions are: hand arrays to it through `xdata` "
            f"or `p0`; got {type(f).__name__}."
        ) from error
    if not isinstance(p0, list | tuple) and getattr(p0, "ndim", 0) != 1:
        raise TypeError(
            "`p0` must be a list or tuple with one entry for each parameter of `f`, or "
            f"an array [P]; got {type(p0).__name__}. For a tree: p0=(tree,)."
        )
    ydata = jnp.asarray(ydata)
    dtype = _common_dtype(p0, ydata)
    p0 = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), p0)
    ydata = ydata.astype(dtype)
    for name, values in (("p0", p0), ("ydata", ydata)):
        if tree.size(values) == 0:
            raise ValueError(f"`{name}` must not be empty.")
    outputs = jax.eval_shape(f, xdata, *p0)
    if getattr(outputs, "shape", None) != ydata.shape:
        raise ValueError(
            f"`f` must return an array of the shape {ydata.shape} of `ydata`, got "
            f"{getattr(outputs, 'shape', outputs)}."
        )
    if jnp.issubdtype(outputs.dtype, jnp.complexfloating):
        raise TypeError(f"`f` must return real numbers, got {outputs.dtype}.")
    if sigma is not None:
        sigma = _checked_sigma(sigma, ydata)
    tolerance = float(jnp.finfo(dtype).eps) ** (2 / 3) if rtol is None else rtol
    fit = _fit(f, xdata, ydata, p0, sigma, absolute_sigma, max_steps, tolerance)
    return forward_only(fit, what="curve_fit")


def _common_dtype(p0: Any, ydata: Array) -> Any:
    dtype = jnp.result_type(*jax.tree.leaves(p0), ydata)
    if not jnp.issubdtype(dtype, jnp.inexact):
        dtype = jnp.result_type(float)
    if dtype not in (jnp.float32, jnp.float64):
        raise TypeError(
            f"`p0` and `ydata` must be real numbers of float32 or float64, got {dtype}."
        )
    return dtype


def _checked_sigma(sigma: Any, ydata: Array) -> Array:
    is_known = not isinstance(sigma, jax.core.Tracer)
    sigma = jnp.asarray(sigma).astype(ydata.dtype)
    if _is_covariance(sigma, ydata):
        return sigma
    try:
        is_fitting = np.broadcast_shapes(sigma.shape, ydata.shape) == ydata.shape
    except ValueError:
        is_fitting = False
    if not is_fitting:
        raise ValueError(
            f"`sigma` must broadcast to the shape {ydata.shape} of `ydata`, or be a "
            f"covariance [M, M] for `ydata` [M]; got {sigma.shape}."
        )
    if is_known and not (np.asarray(sigma) > 0).all():
        raise ValueError(f"`sigma` must be positive, got {sigma}.")
    return sigma


def _is_covariance(sigma: Array, ydata: Array) -> bool:
    return ydata.ndim == 1 and sigma.shape == 2 * ydata.shape


class _Loop(NamedTuple):
    """θ, the state of the search, steps so far, and whether the fit has ended.

    `lowest` is the lowest rms(r) up to round-off, and `idle` counts steps since.
    """

    theta: Array
    state: Any
    num_steps: Array
    lowest: Array
    idle: Array
    is_done: Array


class _Local(NamedTuple):
    """The curve about θ: A = J / √M, w = r / √M, and the columns' norms, all rms."""

    fisher: Fisher
    root: Array
    coefficients: Array
    norms: Array


@functools.partial(jax.jit, static_argnames="f")
def _fit(
    f: Callable[..., Any],
    xdata: PyTree,
    ydata: Array,
    p0: Any,
    sigma: Array | None,
    absolute_sigma: ArrayLike,
    max_steps: ArrayLike,
    rtol: ArrayLike,
) -> CurveFitResult:
    start, unravel = ravel_pytree(p0)
    eps = float(jnp.finfo(start.dtype).eps)
    whiten = _whitener(sigma, ydata)
    # The greatest reduction wins: small λ pays where residuals tend to zero.
    solver = DampingSearch(power=0.0, slack=1 + _ROUND_OFF * eps)

    def residuals(theta: Array, _batch: Any = ()) -> Array:
        outputs = f(xdata, *unravel(theta)).astype(ydata.dtype)
        return jnp.ravel(whiten(outputs - ydata))

    def about(theta: Array) -> _Local:
        # With no batch to cut, the root is built from columns: one forward-mode
        # derivative for each of a few parameters.
        fisher = linearize_fisher(residuals, theta, (), Gaussian(event_ndims=0))
        root = dense_root(fisher)
        unit = tree.usable_unit(jnp.max(jnp.abs(root)))
        norms = unit * jnp.linalg.norm(root / unit, axis=0)
        return _Local(fisher, root, fisher.outputs / ydata.size**0.5, norms)

    def step(loop: _Loop) -> _Loop:
        theta, state = loop.theta, loop.state
        fisher, root, w, norms = about(theta)
        rms = tree.norm(w)
        divisors = jnp.where(norms > 0, norms, 1)
        sizes = jnp.where(theta == 0, rms / divisors, jnp.abs(theta))
        scales = jnp.sqrt(sizes) / jnp.sqrt(divisors)
        unit = tree.usable_unit(tree.max_abs(fisher.outputs))

        def objective(coordinates: Array) -> Scalar:
            return jnp.mean((residuals(theta - scales * coordinates) / unit) ** 2)

        solution = solve_scaled(
            solver,
            fisher.in_coordinates(lambda coordinates: scales * coordinates, scales),
            RightHandSide(scales * (root.T @ w), w, objective=objective),
            damping=0.0,
            # The objective is in units of this step.
            state=state._replace(lowest=jnp.full_like(state.lowest, jnp.inf)),
        )
        is_refused = solution.info.status != SolverStatus.CONVERGED
        # The scales may be the part that is not finite.
        update = jnp.where(is_refused, 0, -scales * solution.direction)
        is_small = norms * jnp.abs(update) <= rtol * jnp.maximum(
            norms * jnp.abs(theta), rms
        )
        is_lower = rms < (1 - _ROUND_OFF * eps) * loop.lowest
        idle = jnp.where(is_lower, 0, loop.idle + 1)
        return _Loop(
            theta + update,
            solution.state,
            loop.num_steps + 1,
            jnp.where(is_lower, rms, loop.lowest),
            idle,
            is_refused | jnp.all(is_small) | (idle >= _MAX_IDLE),
        )

    none = jnp.zeros((), jnp.int32)
    loop = jax.lax.while_loop(
        lambda loop: ~loop.is_done & (loop.num_steps < max_steps),
        step,
        _Loop(start, solver.init(start), none, jnp.inf + start[0], none, none > 0),
    )
    local = about(loop.theta)
    rms = tree.norm(local.coefficients)
    offset, inverse = _offset_and_inverse(local)
    # Neither the data nor the parameters are known to better than round-off.
    size = tree.norm(whiten(ydata)) / ydata.size**0.5
    size += jnp.sum(local.norms * jnp.abs(loop.theta))
    is_stationary = offset <= eps ** (1 / 3) * rms + _ROUND_OFF * eps * size
    status = first_cause(
        (~(jnp.isfinite(rms) & tree.all_finite(local.root)), CurveFitStatus.NON_FINITE),
        (~is_stationary & ~loop.is_done, CurveFitStatus.MAX_STEPS),
        (~is_stationary, CurveFitStatus.STALLED),
        (~jnp.isfinite(inverse[0, 0]), CurveFitStatus.UNDETERMINED),
        otherwise=CurveFitStatus.CONVERGED,
    )
    freedom = ydata.size - start.size
    noise = rms**2 / freedom if freedom > 0 else jnp.inf
    covariance = jnp.where(absolute_sigma, 1 / ydata.size, noise) * inverse
    return CurveFitResult(
        params=unravel(loop.theta),
        covariance=jnp.where(jnp.isfinite(covariance), covariance, jnp.inf),
        residual_sum=ydata.size * rms**2,
        relative_offset=offset / jnp.where(rms > 0, rms, 1),
        num_steps=loop.num_steps,
        status=status,
    )


def _whitener(sigma: Array | None, ydata: Array) -> Callable[[Array], Array]:
    """The map that whitens the noise of the residuals and gives it size 1."""
    if sigma is None:
        return lambda residuals: residuals
    if not _is_covariance(sigma, ydata):
        return lambda residuals: residuals / sigma
    factor = jnp.linalg.cholesky(sigma)
    return lambda residuals: jax.scipy.linalg.solve_triangular(
        factor, residuals, lower=True
    )


def _offset_and_inverse(local: _Local) -> tuple[Scalar, Array]:
    """‖Uᵀ w‖, and (AᵀA)⁻¹: infinite if A does not have full column rank."""
    divisors = jnp.where(local.norms > 0, local.norms, 1)
    matrix = local.root / divisors[None, :]
    is_finite = tree.all_finite(matrix)
    values, rights, along, is_kept = decompose(
        jnp.where(is_finite, matrix, 0), local.coefficients
    )
    assert along is not None
    along = jnp.where(is_kept, along, 0)
    rows = rights / jnp.where(is_kept, values, 1)[:, None] / divisors[None, :]
    has_rank = is_kept.all() & (len(values) == divisors.size) & is_finite
    return tree.norm(along), jnp.where(has_rank, rows.T @ rows, jnp.inf)
