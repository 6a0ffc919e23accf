"""Solves in the space of samples equal those in the space of parameters.

    (F + λI)⁻¹ Aᵀ w = Aᵀ (A Aᵀ + λI)⁻¹ w,    F = Aᵀ A

with A of 60 rows for 300 parameters. The textbook formula uses the gradient g = Aᵀ w
instead of w and subtracts two terms of size ‖g‖/λ, so it loses digits as λ decreases.
The reference is computed with decimal numbers of 50 digits.

Claimed: With fewer samples than parameters, the natural direction can be computed
exactly from a system whose size is the number of samples.

Verdict: Algebraically exact and, at moderate damping, true to round-off. At small
damping it is true only if the gradient is known in output space, or if its component
outside the span of the samples is dropped: the textbook formula loses a digit for each
decade of λ.

Source: Ren and Goldfarb 2019, Efficient subsampled Gauss-Newton and natural gradient
methods for training neural networks; Korbit et al. 2024, Exact Gauss-Newton
optimization for training deep neural networks (EGN)

Note: The component of g outside the span of the 60 rows is round-off; F + λI has the
eigenvalue λ there, so its inverse amplifies that round-off to ε‖g‖/λ. Dense Cholesky in
parameter space has the same error. SampleSpace drops that component if it is no larger
than round-off can be, and has nothing to drop if it is given w, the gradient in output
space (`loss_fn` of `natural_gradient`). CG never leaves the span; because of round-off
it needs more than the 60 steps of exact arithmetic, so it may take 600 here.

Note: The two spaces give the same result, but at different costs: a 60 × 60 matrix in
sample space, a 300 × 300 matrix in parameter space.
"""

import decimal
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import ngd_jax as ngd
from experiments.benchmarks.markdown import Table
from experiments.claims.claim import Check, Evidence, check, theory
from experiments.claims.drawing import COLORS, finish, new_figure
from experiments.claims.texts import claim_of, described, drawn, notes

__all__ = ["SPACES"]

_LIKELIHOOD = ngd.Gaussian()
_EXAMPLES, _OUTPUTS, _PARAMETERS = 20, 3, 300
_ROWS = _EXAMPLES * _OUTPUTS
_SMALLEST_SINGULAR_VALUE = 1e-2  # of A; the largest is 1
_DAMPING = 1e-3
_DIGITS = 50
# In exact arithmetic, 60 steps would do, one for each row; round-off requires more.
_CG = ngd.CG(max_steps=10 * _ROWS, rtol=1e-14)
_TEXTBOOK = "Woodbury from g, textbook formula"
_IN_OUTPUTS = "SampleSpace, w known"
_IN_PARAMETERS = "SampleSpace, g known"
_AGREEING = (_IN_OUTPUTS, _IN_PARAMETERS, "Cholesky", "CG")
_STYLES = {
    _TEXTBOOK: ("SGD", "v-"),
    "Cholesky": ("theory", "^-"),
    _IN_PARAMETERS: ("natural gradient, fixed rate", "s-"),
    "CG": ("Adam", "D:"),
    _IN_OUTPUTS: ("natural gradient", "o-"),
}


def model_fn(params: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """Linear in the parameters, with the given rows: `[20, 3]`."""
    return batch["rows"] @ params


def output_loss_fn(outputs: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """Half the squared error, averaged over examples: nats, up to a constant."""
    return 0.5 * ((outputs - batch["y"]) ** 2).sum(-1).mean()


def make_batch(seed: int) -> dict[str, np.ndarray]:
    """Rows with singular values from 1 down, after taking the mean over examples."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.normal(size=(_ROWS, _ROWS)))[0]
    right = np.linalg.qr(rng.normal(size=(_PARAMETERS, _ROWS)))[0]
    values = np.geomspace(1, _SMALLEST_SINGULAR_VALUE, _ROWS)
    rows = np.sqrt(_EXAMPLES) * (left * values) @ right.T
    return {
        "rows": rows.reshape(_EXAMPLES, _OUTPUTS, _PARAMETERS),
        "y": rng.normal(size=(_EXAMPLES, _OUTPUTS)),
    }


@functools.partial(jax.jit, static_argnames="cg")
def solve_all(
    params: jax.Array, batch: dict[str, jax.Array], dampings: jax.Array, cg: ngd.CG
) -> dict[str, jax.Array]:
    """g, and the direction of every solver at every damping, `[dampings, 300]`."""
    fisher = ngd.linearize_fisher(model_fn, params, batch, _LIKELIHOOD)
    by_outputs = jax.grad(output_loss_fn)(fisher.outputs, batch)
    gradient = fisher.pullback(by_outputs)
    coefficients = fisher.sqrt_solve(by_outputs)

    def in_samples(damping: jax.Array, coefficients: jax.Array) -> Any:
        rhs = ngd.RightHandSide(gradient, coefficients)
        solver = ngd.SampleSpace()
        return ngd.solve_scaled(solver, fisher, rhs, damping=damping).direction

    def solve(damping: jax.Array) -> dict[str, Any]:
        # With coefficients of zero, the solver must split all of g by itself.
        known = jnp.stack([coefficients, jnp.zeros_like(coefficients)])
        told, untold = jax.lax.map(functools.partial(in_samples, damping), known)
        return {
            _IN_OUTPUTS: told,
            _IN_PARAMETERS: untold,
            "Cholesky": ngd.Cholesky()(fisher, gradient, damping=damping)[0],
            "CG": cg(fisher, gradient, damping=damping)[0],
        }

    return {"g": gradient, **jax.lax.map(solve, dampings)}


def textbook_woodbury(
    rows: np.ndarray, gradient: np.ndarray, damping: float
) -> np.ndarray:
    """(g - Aᵀ (A Aᵀ + λI)⁻¹ A g) / λ, the usual formula."""
    gram = rows @ rows.T + damping * np.eye(len(rows))
    inside = rows.T @ np.linalg.solve(gram, rows @ gradient)
    return (gradient - inside) / damping


def exact_directions(
    rows: np.ndarray, residuals: np.ndarray, dampings: np.ndarray
) -> np.ndarray:
    """(F + λI)⁻¹ g to 50 digits: Jᵀ (J Jᵀ + λN I)⁻¹ r, `[dampings, 300]` decimals.

    Args:
      rows: J, `[60, 300]`; its entries are taken to be exact.
      residuals: r, `[60]`; g = Jᵀ r / N and F = Jᵀ J / N.
      dampings: λ.
    """
    with decimal.localcontext(prec=_DIGITS):
        jacobian, right = to_decimal(rows), to_decimal(residuals)
        gram = jacobian @ jacobian.T
        shifts = to_decimal(dampings) * _EXAMPLES
        found = [_eliminate(gram, right, shift) @ jacobian for shift in shifts]
        return np.array(found)


def _eliminate(matrix: np.ndarray, right: np.ndarray, shift: Any) -> np.ndarray:
    """Solves (matrix + shift I) y = right, positive definite, without pivoting."""
    matrix, right, size = matrix.copy(), right.copy(), len(right)
    for i in range(size):
        matrix[i, i] += shift
    for i in range(size):
        factors = matrix[i + 1 :, i] / matrix[i, i]
        matrix[i + 1 :, i:] -= np.outer(factors, matrix[i, i:])
        right[i + 1 :] -= factors * right[i]
    solution = right.copy()
    for i in reversed(range(size)):
        known = matrix[i, i + 1 :] @ solution[i + 1 :]
        solution[i] = (right[i] - known) / matrix[i, i]
    return solution


def to_decimal(values: np.ndarray) -> np.ndarray:
    """The same numbers, exactly, as `decimal.Decimal`."""
    return np.vectorize(decimal.Decimal.from_float, otypes=[object])(values)


def relative_error(found: np.ndarray, exact: np.ndarray) -> float:
    """‖found - exact‖ / ‖exact‖, without round-off in the comparison."""
    with decimal.localcontext(prec=_DIGITS):
        rest = to_decimal(found) - exact
        square: Any = rest @ rest / (exact @ exact)
        return float(square.sqrt())


def demonstrate(quick: bool) -> Evidence:
    """All solvers on one system, over twelve decades of damping.

    A model with {_PARAMETERS} parameters on {_EXAMPLES} examples with {_OUTPUTS}
    outputs: A has {_ROWS} rows, with singular values from 1 to
    {_SMALLEST_SINGULAR_VALUE:g}, so that λ is in units of the largest eigenvalue of F.
    Squared error, float64. Errors are relative, in norm, compared with a solve in
    decimal arithmetic with {_DIGITS} digits.
    """
    dampings = 10.0 ** np.arange(-12, 1, 3 if quick else 1)
    params = np.random.default_rng(0).normal(size=_PARAMETERS)
    batch = make_batch(1)
    arrays = jax.tree.map(jnp.asarray, batch)
    solved = solve_all(jnp.asarray(params), arrays, jnp.asarray(dampings), _CG)
    found = {name: np.asarray(value) for name, value in solved.items()}
    gradient = found.pop("g")

    jacobian = batch["rows"].reshape(_ROWS, _PARAMETERS)
    rows = jacobian / np.sqrt(_EXAMPLES)
    found[_TEXTBOOK] = np.array(
        [textbook_woodbury(rows, gradient, damping) for damping in dampings]
    )
    residuals = np.asarray(model_fn(jnp.asarray(params), arrays) - batch["y"]).ravel()
    exact = exact_directions(jacobian, residuals, dampings)
    errors = {
        name: np.array(list(map(relative_error, found[name], exact)))
        for name in _STYLES
    }

    at = int(np.argmin(abs(np.log(dampings / _DAMPING))))
    apart = max(
        float(np.linalg.norm(found[one][at] - found[other][at]))
        for one, other in itertools.combinations(_AGREEING, 2)
    ) / float(np.linalg.norm(found[_IN_OUTPUTS][at]))
    condition = _SMALLEST_SINGULAR_VALUE**-2
    round_off = _ROWS * float(np.finfo(float).eps)
    bound = round_off * condition
    is_small = dampings <= 1e-6
    slopes = {
        name: np.polyfit(np.log(dampings[is_small]), np.log(error[is_small]), 1)[0]
        for name, error in errors.items()
    }
    checks: list[Check] = [
        check(
            f"largest relative difference of two of {len(_AGREEING)} solvers at λ = "
            f"{_DAMPING:g}",
            apart,
            theory(
                None,
                round_off * (1 + _DAMPING) / _DAMPING,
                "all compute the same vector; round-off 60 ε cond(F + λI)",
            ),
        ),
        check(
            "SampleSpace, w known: largest relative error over all λ",
            errors[_IN_OUTPUTS].max(),
            theory(None, bound, "round-off 60 ε cond(A Aᵀ)"),
        ),
        check(
            f"textbook formula: relative error at λ = {dampings[0]:g}",
            errors[_TEXTBOOK][0],
            theory(1e-5, 1.0, "of the order of ε / λ = 2e-4 or beyond"),
        ),
        check(
            "textbook formula: slope of log error against log λ up to 1e-6",
            slopes[_TEXTBOOK],
            theory(-1.15, -0.85, "cancellation of terms of size ‖g‖/λ: -1"),
        ),
    ]
    names = [_TEXTBOOK, *_AGREEING]
    every = np.arange(0, len(dampings), 1 if quick else 3)
    rows_of_table = [
        [f"{dampings[index]:.0e}"] + [f"{errors[name][index]:.0e}" for name in names]
        for index in every
    ]
    return Evidence(
        headline=(
            f"at λ = {_DAMPING:g}, all agree to {apart:.0e}; at λ = {dampings[0]:.0e}, "
            f"the error of the textbook formula is {errors[_TEXTBOOK][0]:.0e}, that of "
            f"SampleSpace {errors[_IN_OUTPUTS][0]:.0e}"
        ),
        setup=described(demonstrate),
        checks=checks,
        tables=[Table("Relative error of the direction", ["λ", *names], rows_of_table)],
        plots=[drawn("spaces", _draw, dampings, errors, bound)],
        notes=notes(demonstrate),
    )


def _draw(dampings: np.ndarray, errors: dict[str, np.ndarray], bound: float) -> Figure:
    """Draws `spaces`.

    The error of (F + λI)⁻¹g as damping decreases. If the gradient is known in output
    space (as w), nothing is lost; solves that divide the round-off of g by λ lose a
    digit for each decade.
    """
    figure, (axis,) = new_figure(width=8.0, height=5.0)
    for name, (color, style) in _STYLES.items():
        axis.loglog(dampings, errors[name], style, color=COLORS[color], label=name)
    axis.axhline(bound, color="black", linestyle="--", linewidth=0.8)
    axis.text(dampings[-1], 1.3 * bound, "60 ε cond(A Aᵀ)", ha="right")
    finish(
        axis,
        f"{_ROWS} rows, {_PARAMETERS} parameters",
        "damping λ (largest eigenvalue of F: 1)",
        "relative error of the direction",
        legend=False,
    )
    figure.legend(frameon=False, loc="outside lower center", ncols=2)
    return figure


SPACES = claim_of(demonstrate)
