"""What a transformation does with a model, in a table, and whether that is right.

Every claim about structure is checked against `fisher.matvec`, the definition, and
printed beside the numbers of the check.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ngd_jax import kfac, layers, tree
from ngd_jax.auto import Auto
from ngd_jax.coordinates import random_signs, real_size
from ngd_jax.damping import CovariantDamping
from ngd_jax.fisher import Fisher
from ngd_jax.likelihoods import Bernoulli, Categorical, Gaussian, Poisson
from ngd_jax.per_example import coefficient_shapes
from ngd_jax.plan import Memory, memory_of
from ngd_jax.solvers.protocol import Solver, SolverStatus
from ngd_jax.transform import natural_gradient
from ngd_jax.transform.arguments import Settings, split_functions
from ngd_jax.transform.step import NaturalGradientStep
from ngd_jax.types import Array, Batch, MatVec, Outputs, Params, PyTree, Scalar

__all__ = ["Check", "Description", "describe"]


class Check(NamedTuple):
    """A claim, and the relative error with which it holds.

    Attributes:
      claim: what should hold, in words.
      error: how far it is from holding; 0 for exactly.
      tolerance: what round-off explains.
      advice: what to do if it does not hold.
    """

    claim: str
    error: float
    tolerance: float
    advice: str

    @property
    def holds(self) -> bool:
        """Whether the error is within the tolerance; NaN is not."""
        return bool(self.error <= self.tolerance)


class Description(NamedTuple):
    """What `describe` found; `str` makes a table of it.

    Attributes:
      summary: lines of text about the model, the solver and its choice.
      parameters: for every parameter its path, its shape and what it is taken for.
      memory: what the state keeps, in multiples of the parameters, by part.
      checks: the claims, checked; none if nothing was run.
      plan: the memory of a training step, in bytes.
    """

    summary: list[str]
    parameters: list[tuple[str, str, str]]
    memory: dict[str, float]
    checks: list[Check]
    plan: Memory

    def __str__(self) -> str:
        lines = list(self.summary)
        widths = [
            max(map(len, column)) for column in zip(*self.parameters, strict=True)
        ]
        lines += ["", "Parameters:"]
        for row in self.parameters:
            cells = (cell.ljust(w) for cell, w in zip(row, widths, strict=True))
            lines.append("  " + "  ".join(cells).rstrip())
        lines += ["", "State, in multiples of the parameters:"]
        lines += [f"  {name}: {size:.2f}" for name, size in self.memory.items()]
        lines += ["", f"Memory: {self.plan}"]
        if not self.checks:
            return "\n".join(lines)
        lines += ["", "Checks:"]
        for check in self.checks:
            mark = "ok" if check.holds else "FAILS"
            lines.append(f"  {mark:5}  {check.claim} (error {check.error:.1e})")
            if not check.holds:
                lines.append(f"         {check.advice}")
        return "\n".join(lines)


def describe(
    tx_or_settings: optax.GradientTransformationExtraArgs | Mapping[str, Any],
    params: Params,
    batch: Batch,
    *,
    loss_fn: Callable[[Outputs, Batch], Scalar] | None = None,
    run: bool = True,
) -> Description:
    """Says what a step will do with a model, and checks it numerically.

    A radius is also given in standard deviations of the predictions: √(2 max_kl) for
    an example, √(2 max_kl / K) for each of its K outputs. With `Gaussian` and `loss_fn`
    it says how many such steps the targets are away at least, since √KL is a distance
    there: √(KL(outputs ‖ targets) / max_kl).

    Args:
      tx_or_settings: what `natural_gradient` returned (not a chain around it), or the
        arguments of `natural_gradient` as a dict.
      params: the parameters; without `run`, their shapes are enough
        (`jax.eval_shape`).
      batch: a batch, as `update` takes it, or likewise its shapes.
      loss_fn: (outputs, batch) -> loss; that of the settings, if they have one.
      run: whether to run the model, and check every claim. If not, nothing is computed:
        a whole training step is compiled instead, and `plan` has the peak of its
        memory. That takes as long as compiling the step that you will train with.

    Returns:
      The description; print it.

    Raises:
      TypeError: for anything else than such a transformation or dict, or a `loss_fn`
        that cannot be called with (outputs, batch).
      ValueError: for a `loss_fn` that returns no scalar.

    Example:
      >>> import jax, jax.numpy as jnp, ngd_jax as ngd
      >>> model_fn = lambda params, x: jnp.tanh(x @ params["w"] + params["b"])
      >>> params = {"b": jnp.zeros(2), "w": jnp.ones((3, 2))}
      >>> tx = ngd.natural_gradient(
      ...     1.0, model_fn, ngd.Gaussian(), solver=ngd.KFAC(), max_kl=0.1
      ... )
      >>> x = jax.random.normal(jax.random.key(0), (16, 3))
      >>> found = ngd.describe(tx, params, x)
      >>> [claim for _, _, claim in found.parameters]
      ["bias of ['w']", "dense 3 → 2 with bias ['b']"]
      >>> all(check.holds for check in found.checks)
      True
    """
    step = _step_of(tx_or_settings)
    settings = step.settings
    loss_fn = settings.loss_fn if loss_fn is None else loss_fn
    params, model_from = split_functions(params)
    state = jax.eval_shape(step.init, params)
    model_fn = model_from(settings.model_fn)
    num_params = max(1, real_size(params))
    found: dict[str, Any] = {}

    def survey(params: Params, batch: Batch) -> Fisher:
        """The Fisher; and what is known from shapes and programs."""
        fisher = step.linearize(model_fn, params, batch, jnp.zeros((), jnp.int32))
        solver, reason = settings.solver, None
        if isinstance(solver, Auto):
            solver, reason = solver.choose(fisher)
        num_examples = sum(mu.size for mu in fisher.measure)
        sizes = f"{num_params} parameters, {real_size(fisher.outputs)} outputs"
        examples = "1 example" if num_examples == 1 else f"{num_examples} examples"
        summary = [
            f"{sizes} of {examples}, {settings.likelihood!r}",
            *_doubts(fisher),
            f"solver: {solver!r}",
            *([f"chosen by Auto: {reason}"] if reason else []),
        ]
        claims = _claims(solver, fisher)
        found.update(solver=solver, summary=summary, claims=claims)
        found["outputs"] = real_size(fisher.outputs) / max(1, num_examples)
        if loss_fn is not None:
            _check_loss(loss_fn, fisher)
        return fisher

    @jax.jit
    def errors_of(params: Params, batch: Batch) -> dict[str, Array]:
        fisher = survey(params, batch)
        # Logits of -inf are legal.
        is_nan = [jnp.isnan(x).any() for x in jax.tree.leaves(fisher.outputs)]
        errors = {"finite": tree.all_finite(fisher.params) & ~jnp.array(is_nan).any()}
        errors |= _errors(fisher, found["solver"])
        errors["damping"] = _relative_damping(step, fisher, params)
        is_natural = isinstance(settings.likelihood, _NATURAL)
        if is_natural and fisher.kind == "exact" and loss_fn is not None:
            ratio = _relative_curvature(loss_fn, fisher)
            errors |= {"loss": jnp.abs(ratio - 1), "factor": ratio}
            if isinstance(settings.likelihood, Gaussian):
                cotangents = jax.grad(loss_fn)(fisher.outputs, fisher.batch)
                residuals = fisher.sqrt_solve(tree.divide(cotangents, ratio))
                errors["distance"] = tree.vdot(residuals, residuals) / 2
        return errors

    if run:
        errors = errors_of(params, batch)
        checks = _checks(errors, params, found["solver"])
    else:
        jax.eval_shape(lambda *shapes: survey(*shapes).outputs, params, batch)
        errors, checks = {}, []
    plan = memory_of(step, model_fn, params, batch, loss_fn, compiled=not run)
    leaves = jax.tree.leaves_with_path(params)
    radius = _radius(settings, found["outputs"], errors.get("distance"))
    return Description(
        summary=found["summary"] + radius,
        parameters=[
            (
                jax.tree_util.keystr(path) or "the root",
                " × ".join(map(str, leaf.shape)) or "scalar",
                claim,
            )
            for (path, leaf), claim in zip(leaves, found["claims"], strict=True)
        ],
        memory={
            "direction": tree.size(state.direction) / num_params,
            "solver": tree.size(state.solver_state) / num_params,
        },
        checks=checks,
        plan=plan,
    )


def _step_of(tx_or_settings: Any) -> NaturalGradientStep:
    if isinstance(tx_or_settings, Mapping):
        tx_or_settings = natural_gradient(**tx_or_settings)
    step = getattr(getattr(tx_or_settings, "update", None), "__self__", None)
    if not isinstance(step, NaturalGradientStep):
        raise TypeError(
            "`tx_or_settings` must be what natural_gradient or "
            "scale_by_natural_gradient returns, without a chain around it, or a dict "
            f"of its arguments; got {tx_or_settings!r}."
        )
    return step


def _relative_damping(
    step: NaturalGradientStep, fisher: Fisher, params: Params
) -> Array:
    """λ of the first step / tr F, by one random vector for which E‖Aᵀu‖² = tr F."""
    rule = step.settings.damping
    if isinstance(rule, CovariantDamping):
        fisher = rule.coordinates(fisher)
    damping = step.damping(step.init(params), fisher)
    root = fisher.sqrt_rmatvec(random_signs(coefficient_shapes(fisher)))
    trace = tree.vdot(root, root)
    return jnp.where(damping > 0, damping / trace, 0)


def _check_loss(loss_fn: Callable, fisher: Fisher) -> None:
    try:
        loss = jax.eval_shape(loss_fn, fisher.outputs, fisher.batch)
    except (TypeError, KeyError, IndexError, AttributeError, ValueError) as error:
        raise TypeError(
            "`loss_fn` must be a function (outputs, batch) -> loss, of the outputs of "
            "`model_fn`, and not of the parameters; it cannot be called so."
        ) from error
    if getattr(loss, "shape", None) != ():
        raise ValueError(f"`loss_fn` must return a scalar, got {loss}.")


def _doubts(fisher: Fisher) -> list[str]:
    """What is legal, and may not be what is meant."""
    leading = {jnp.shape(x)[0] for x in jax.tree.leaves(fisher.batch) if jnp.ndim(x)}
    examples = {mu.shape[:1] for mu in fisher.measure}
    if not leading or any(size and size[0] in leading for size in examples):
        return []
    note = (
        "note: no leaf of the batch has that many examples in front; is their number "
        "right? See `event_ndims` of the likelihood, and the axes of the outputs."
    )
    return [note]


def _relative_curvature(loss_fn: Callable, fisher: Fisher) -> Array:
    """tᵀ (∂²loss) t / tᵀ μ H t for random tangents t of the outputs: 1 for -log p."""

    def where_finite(values: PyTree) -> PyTree:
        return jax.tree.map(
            lambda x, at: jnp.where(jnp.isfinite(at), x, 0).astype(at.dtype),
            values,
            fisher.outputs,
        )

    tangents = where_finite(_random(4, fisher.outputs))
    slope = jax.grad(lambda outputs: loss_fn(outputs, fisher.batch))
    bend = jax.jvp(slope, (fisher.outputs,), (tangents,))[1]
    return tree.vdot(tangents, where_finite(bend)) / fisher.inner(tangents, tangents)


def _radius(
    settings: Settings, num_outputs: float, distance: Array | None
) -> list[str]:
    """The radius of the first step, in units that a user can judge."""
    max_kl = settings.max_kl
    if callable(max_kl):
        max_kl = max_kl(jnp.zeros((), jnp.int32))
    if not isinstance(max_kl, int | float | jax.Array):
        return []
    max_kl, likelihood = float(max_kl), settings.likelihood
    words = f"radius: {max_kl:.3g} nats per example"
    if getattr(likelihood, "kl_curvature", 1.0) == 1.0 and num_outputs > 0:
        whole = math.sqrt(2 * max_kl)
        words += f", which is {whole:.2g} standard deviations of its prediction"
        if num_outputs > 1:
            each = math.sqrt(2 * max_kl / num_outputs)
            words += f", or {each:.2g} in each of its {num_outputs:g} outputs"
    if distance is not None and max_kl > 0:
        num_steps = math.ceil(math.sqrt(float(distance) / max_kl))
        words += f"; the targets are at least {num_steps} such steps away"
    elif isinstance(likelihood, Gaussian):
        words += "; `loss_fn=` of describe tells how far the targets are"
    return [words]


def _factors_of(solver: Solver) -> kfac.Kronecker | kfac.KFAC | None:
    factors = getattr(solver, "preconditioner", solver)
    return factors if isinstance(factors, kfac.Kronecker | kfac.KFAC) else None


def _claims(solver: Solver, fisher: Fisher) -> list[str]:
    factors = _factors_of(solver)
    if factors is not None:
        sizes = {"max_size": factors.max_size, "max_block": factors.max_block}
        return kfac.claims(fisher, **sizes)
    is_iterative = hasattr(solver, "preconditioner")
    words = "products with F" if is_iterative else type(solver).__name__
    return [words] * len(jax.tree.leaves(fisher.params))


# With outputs whose curvature of -log p does not depend on the targets: it is H.
_NATURAL = (Bernoulli, Categorical, Gaussian, Poisson)
# What the checks below hold, and what to do if they do not.
_LIKELIHOOD = "Correct `kl` of the likelihood."
_BUG = "This is a bug of ngd_jax: please report it."
_SCALE = (
    "The loss is on another scale than the likelihood: a sum over the batch, a mean "
    "over the outputs, no factor ½, another event_ndims. See the page on loss and "
    "likelihood."
)
_DROWNED = (
    "Damping drowns F: the step is a short one along the plain gradient. Give less "
    "damping or a RelativeDamping; a likelihood with a scale s divides F by s²."
)
_CLAIMS = {
    "symmetry": ("F is symmetric", _BUG),
    "zero": ("the KL of equal outputs is 0", _LIKELIHOOD),
    "slope": ("the KL has no slope at equal outputs", _LIKELIHOOD),
    "curvature": ("the curvature of the KL is F", _LIKELIHOOD),
    "sign": ("the KL of a short step is not negative", _LIKELIHOOD),
    "layers": ("the layers found add up to the gradient", _BUG),
    "factors": ("M of the Kronecker factors is symmetric and positive", _BUG),
    "loss": (
        "the loss has {factor:.3g} times the curvature of the mean of -log p",
        _SCALE,
    ),
    "damping": ("λ is below the sum of all eigenvalues of F, as λ / tr F", _DROWNED),
}


# What is not a matter of round-off: a loss of other units is off by a factor.
_TOLERANCES = {"damping": 1.0, "loss": 0.05}


def _errors(fisher: Fisher, solver: Solver) -> dict[str, Array]:
    """The relative error of each claim in `_CLAIMS` about it, and of a solve."""
    u, v = (_random(seed, fisher.params) for seed in (0, 1))
    product, pushed = fisher.matvec_and_push(v)

    def asymmetry(matvec: MatVec) -> Array:
        return jnp.abs(tree.vdot(u, matvec(v)) - tree.vdot(v, matvec(u)))

    factor = getattr(fisher.likelihood, "kl_curvature", 1.0)
    curvature = factor * tree.vdot(v, product)
    size = jnp.abs(curvature)

    def kl_along(scale: Array) -> Array:
        return fisher.metric.kl(tree.axpy(scale, pushed, fisher.outputs))

    one = jnp.ones((), curvature.dtype)
    slope, bend = jax.jvp(jax.grad(kl_along), (0 * one,), (one,))
    excess = bend / curvature - 1
    # For wave functions the factor is an upper bound; see `Likelihood.kl_curvature`.
    excess = jnp.abs(excess) if factor == 1 else jnp.maximum(excess, 0)
    errors = {
        "symmetry": asymmetry(fisher.matvec) / (tree.norm(u) * tree.norm(product)),
        "zero": jnp.abs(kl_along(0 * one)),
        "slope": jnp.abs(slope) / jnp.sqrt(size),
        "curvature": excess if fisher.kind == "exact" else 0 * one,
        "sign": jnp.maximum(0.0, -kl_along(0.1 * one) / (0.1**2 * size)),
    }
    factors = _factors_of(solver)
    if factors is not None:
        solve = kfac.Kronecker(
            max_size=factors.max_size, max_block=factors.max_block, dtype=factors.dtype
        )(fisher, 1e-3)
        of_factors = tree.vdot(v, solve(v))
        errors["layers"] = _error_of_layers(fisher.base)
        errors["factors"] = jnp.where(of_factors > 0, asymmetry(solve) / of_factors, 1)
    if not solver.uses_objective:
        solution, info = solver(fisher, u, damping=1e-3)
        left = tree.axpy(1e-3, solution, fisher.matvec(solution))
        errors["solve"] = tree.norm(tree.axpy(-1.0, left, u)) / tree.norm(u)
        errors["status"] = info.status
    return errors


def _error_of_layers(fisher: Fisher) -> Array:
    """How far the sums of a ⊗ δ are from the gradients that they should be."""
    cotangents = _random(2, fisher.outputs)
    backward = layers.read_backward(fisher.pullback, cotangents, fisher.params)
    leaves, worst = jax.tree.leaves(fisher.params), jnp.zeros(())

    def product(values: layers.LayerValues) -> Array:
        return tree.contract(values.inputs, values.cotangents, (0,), (0,))

    found = backward.layers
    results = backward.evaluate(
        [layers.Wanted(one.weight, one, product) for one in found]
        + [layers.Wanted(one.weight, None, lambda gradient: gradient) for one in found]
    )
    products, gradients = results[: len(found)], results[len(found) :]
    for layer, claimed, gradient in zip(found, products, gradients, strict=True):
        if not layer.inputs_first:
            claimed = jnp.swapaxes(claimed, -1, -2)
        error = tree.norm(claimed.reshape(jnp.shape(leaves[layer.weight])) - gradient)
        worst = jnp.maximum(worst, error / jnp.maximum(tree.norm(gradient), 1e-30))
    return worst


def _checks(errors: dict[str, Array], params: Params, solver: Solver) -> list[Check]:
    if not errors["finite"]:
        claim = "the parameters and the outputs on this batch are finite"
        advice = (
            "Look for NaN in the batch and in the parameters; nothing else was checked."
        )
        return [Check(claim, float("inf"), 0.0, advice)]
    eps = float(jnp.finfo(tree.accumulator_dtype(params)).eps)
    checks = [
        Check(
            claim.format(factor=float(errors.get("factor", 1.0))),
            float(errors[name]),
            _TOLERANCES.get(name, math.sqrt(eps)),
            advice,
        )
        for name, (claim, advice) in _CLAIMS.items()
        if name in errors
    ]
    if "status" in errors:
        status = SolverStatus(int(errors["status"]))
        is_refused = status.name in ("NOT_SEPARABLE", "NON_FINITE", "BREAKDOWN")
        claim = f"{type(solver).__name__} on a random system: {status.name}"
        if status == SolverStatus.MAX_STEPS:
            claim += ", the end of its budget"
        tolerance = -1.0 if is_refused else float("inf")
        error = float(errors["solve"])
        checks.append(Check(claim, error, tolerance, status.message))
    return checks


def _random(seed: int, like: PyTree) -> PyTree:
    return tree.random_like(jax.random.normal, jax.random.key(seed), tree.widen(like))
