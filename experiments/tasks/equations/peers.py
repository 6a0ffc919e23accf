"""Other methods on the same residuals, as peers of the natural gradient.

    r(θ) = (√(w_b / N_b) r_bn)ₙ,    loss = |r|²,    J = ∂r/∂θ

All treat the parameters as one vector. `advance` takes several steps in one compiled
call.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
from jax.flatten_util import ravel_pytree

import ngd_jax as ngd
from experiments.tasks.equations.problem import Points, Problem
from ngd_jax import contrib

__all__ = ["OURS", "OURS_FAST", "PEERS", "Equation", "broyden_update", "iterate"]

PyTree = Any

OURS = "natural gradient, ours"
OURS_FAST = "natural gradient, ours, squared"
# The line search of the published energy natural gradient.
_SCALES = 2.0 ** -np.arange(31.0)


class Equation(NamedTuple):
    """A problem on its points.

    Attributes:
      problem: the equation.
      points: all of them.
      params: the initial parameters, a tree.
      sketch_size: of our search; None for no sketch.
    """

    problem: Problem
    points: Points
    params: PyTree
    sketch_size: int | None = None

    def unravel(self, theta: jax.Array) -> PyTree:
        """Converts a vector of parameters into a tree."""
        return ravel_pytree(self.params)[1](theta)

    def residuals(self, theta: jax.Array) -> jax.Array:
        """r, so that the loss is |r|²."""
        blocks = self.problem.residuals(self.unravel(theta), self.points)
        return self._join(blocks)

    def jacobian(self, theta: jax.Array) -> jax.Array:
        """J, `[N, P]`, by one backward pass per point."""

        def rows(points: Points) -> PyTree:
            single = jax.tree.map(lambda x: x[None], points)
            jacobian = jax.jacrev(
                lambda theta: self.problem.residuals(self.unravel(theta), single)
            )(theta)
            return jax.tree.map(lambda row: row[0], jacobian)  # [P], or [K, P]

        points, first = self.points, jax.tree.map(lambda x: x[0], self.points)
        axes = dict.fromkeys(points)
        blocks = {}
        for name in self.problem.weights:
            own = [key for key in points if key.startswith(name)]
            cut = {key: points[key] if key in own else first[key] for key in points}
            in_axes = {**axes, **dict.fromkeys(own, 0)}
            blocks[name] = jax.vmap(
                lambda points, name=name: rows(points)[name], in_axes=(in_axes,)
            )(cut)
        return self._join(blocks, theta.size)

    def _join(self, blocks: dict[str, jax.Array], *shape: int) -> jax.Array:
        """All blocks with rows of that shape, one for each output of a point."""
        scaled = [(w / len(blocks[b])) ** 0.5 * blocks[b] for b, w in self._weights()]
        return jnp.concatenate([block.reshape(-1, *shape) for block in scaled])

    def _weights(self) -> list[tuple[str, float]]:
        return sorted(self.problem.weights.items())

    def loss(self, theta: jax.Array) -> jax.Array:
        """|r|² = Σ w_b mean r_b²."""
        return jnp.sum(self.residuals(theta) ** 2)


Step = Callable[[PyTree], PyTree]


def _search(equation: Equation, theta: jax.Array, direction: jax.Array) -> jax.Array:
    """θ - s d with the lowest loss among s = 2⁰ ... 2⁻³⁰ and 0."""
    moved = theta - jnp.asarray([*_SCALES, 0.0])[:, None] * direction
    losses = jax.vmap(equation.loss)(moved)
    return moved[jnp.argmin(jnp.where(jnp.isfinite(losses), losses, jnp.inf))]


def _published(equation: Equation) -> tuple[PyTree, Step]:
    """Müller and Zeinhofer 2023: least squares with the Gram matrix, line search."""

    def step(theta: jax.Array) -> jax.Array:
        jacobian, residuals = equation.jacobian(theta), equation.residuals(theta)
        gram = jacobian.T @ jacobian
        direction = jnp.linalg.lstsq(gram, jacobian.T @ residuals)[0]
        return _search(equation, theta, direction)

    return ravel_pytree(equation.params)[0], step


def _least_squares(equation: Equation) -> tuple[PyTree, Step]:
    """Least squares with the singular values of J above 1e-7, the same line search."""

    def step(theta: jax.Array) -> jax.Array:
        jacobian, residuals = equation.jacobian(theta), equation.residuals(theta)
        direction = jnp.linalg.lstsq(jacobian, residuals, rcond=1e-7)[0]
        return _search(equation, theta, direction)

    return ravel_pytree(equation.params)[0], step


def _levenberg_marquardt(equation: Equation) -> tuple[PyTree, Step]:
    """(JᵀJ + λI) d = Jᵀr; λ/3 after a good step, 2λ after a poor one, 4λ if refused."""

    def step(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        theta, damping = state
        jacobian, residuals = equation.jacobian(theta), equation.residuals(theta)
        gradient = jacobian.T @ residuals
        matrix = jacobian.T @ jacobian + damping * jnp.eye(theta.size)
        direction = jax.scipy.linalg.cho_solve(
            jax.scipy.linalg.cho_factor(matrix), gradient
        )
        loss, moved = residuals @ residuals, theta - direction
        actual = loss - equation.loss(moved)
        foretold = direction @ (gradient + damping * direction)
        factor = jnp.where(
            actual > 0.75 * foretold, 1 / 3, jnp.where(actual < 0.25 * foretold, 2, 1)
        )
        # NaN is refused, which covers a failed factorisation.
        is_taken = actual > 0
        factor = jnp.where(is_taken, factor, 4.0)
        return jnp.where(is_taken, moved, theta), damping * factor

    return (ravel_pytree(equation.params)[0], jnp.asarray(1.0)), step


def _optax(
    tx: optax.GradientTransformationExtraArgs, equation: Equation, **extra_args: Any
) -> tuple[PyTree, Step]:
    """Any transformation of Optax, on ½ |r|², with the arguments it asks for."""
    problem, points = equation.problem, equation.points

    def loss_fn(params: PyTree, *_: Any) -> jax.Array:
        return problem.loss(problem.residuals(params, points), points)

    def step(state: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        params, opt_state = state
        value, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = tx.update(
            grads,
            opt_state,
            params,
            value=value,
            grad=grads,
            value_fn=loss_fn,
            **extra_args,
        )
        return optax.apply_updates(params, updates), opt_state

    return (equation.params, tx.init(equation.params)), step


def _ours(equation: Equation, **settings: Any) -> tuple[PyTree, Step]:
    problem = equation.problem
    tx = ngd.natural_gradient(
        1.0,
        problem.residuals,
        problem.likelihood,
        damping=0.0,
        solver=contrib.DampingSearch(
            sketch_size=equation.sketch_size,
            key=None if equation.sketch_size is None else jax.random.key(0),
            **settings,
        ),
        loss_fn=problem.loss,
    )
    return _optax(tx, equation, batch=equation.points)


def _adam(rate: float, equation: Equation) -> tuple[PyTree, Step]:
    schedule = optax.exponential_decay(rate, 2000, 0.7, end_value=1e-5)
    return _optax(optax.with_extra_args_support(optax.adam(schedule)), equation)


def _lbfgs(equation: Equation) -> tuple[PyTree, Step]:
    return _optax(optax.lbfgs(memory_size=50), equation)


def iterate(name: str, chunk: int) -> Callable[[Equation], Iterator[PyTree]]:
    """Iterates over the parameters after every `chunk` steps of the peer `name`.

    The result can be called for one problem at several initial parameters, and compiles
    once; its iterators yield the initial parameters first.
    """
    make = PEERS[name]
    if make in (_iterate_bfgs, _iterate_ssbroyden):
        return functools.partial(make, chunk)
    compiled: dict[str, Any] = {}

    def run(equation: Equation) -> Iterator[PyTree]:
        state, step = make(equation)
        if not compiled:

            def advance(state: PyTree) -> PyTree:
                return jax.lax.fori_loop(0, chunk, lambda _, s: step(s), state)

            state = jax.tree.map(jnp.asarray, state)
            compiled["advance"] = jax.jit(advance).lower(state).compile()
        while True:
            theta = state[0] if isinstance(state, tuple) else state
            yield equation.unravel(theta) if isinstance(theta, jax.Array) else theta
            state = jax.block_until_ready(compiled["advance"](state))

    return run


def _value_and_grad(
    equation: Equation,
) -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
    """The compiled loss and gradient, for arrays of NumPy."""
    compiled = jax.jit(jax.value_and_grad(equation.loss))

    @functools.lru_cache(maxsize=2)  # line searches ask for values and slopes apart
    def known(theta: bytes) -> tuple[float, np.ndarray]:
        value, grad = compiled(jnp.asarray(np.frombuffer(theta)))
        return float(value), np.asarray(grad)

    def fun(theta: np.ndarray) -> tuple[float, np.ndarray]:
        return known(np.asarray(theta, np.float64).tobytes())

    fun(np.asarray(ravel_pytree(equation.params)[0]))
    return fun


def _iterate_bfgs(chunk: int, equation: Equation) -> Iterator[PyTree]:
    """SciPy's BFGS with compiled gradients, `chunk` iterations at a time.

    SciPy calls back and cannot be asked for the next step, so each chunk continues from
    the inverse Hessian of the last one.
    """
    fun = _value_and_grad(equation)
    theta = np.asarray(ravel_pytree(equation.params)[0])
    options: dict[str, Any] = {"maxiter": chunk, "gtol": 0.0}
    while True:
        yield equation.unravel(jnp.asarray(theta))
        result = scipy.optimize.minimize(
            fun, theta, jac=True, method="BFGS", options=options
        )
        theta = result.x
        inverse = (result.hess_inv + result.hess_inv.T) / 2
        if np.all(np.isfinite(inverse)) and np.linalg.eigvalsh(inverse)[0] > 0:
            options["hess_inv0"] = inverse
        else:
            options.pop("hess_inv0", None)


def _iterate_ssbroyden(chunk: int, equation: Equation) -> Iterator[PyTree]:
    """Self-scaled Broyden with SciPy's strong Wolfe line search.

        H ← (H - H y yᵀ H / yᵀHy + φ yᵀHy v vᵀ) / τ + s sᵀ / yᵀs

    References:
      Al-Baali and Khalfan, A combined class of self-scaling and modified quasi-Newton
      methods, 2012; Urbán, Stefanou and Pons, Unveiling the optimization process of
      physics informed neural networks, 2025.
    """
    fun = _value_and_grad(equation)
    theta = np.asarray(ravel_pytree(equation.params)[0], np.float64)
    value, grad = fun(theta)
    inverse, last = _fresh(value, grad)
    while True:
        yield equation.unravel(jnp.asarray(theta))
        for _ in range(chunk):
            p = -inverse @ grad
            found = scipy.optimize.line_search(
                lambda x: fun(x)[0], lambda x: fun(x)[1], theta, p, grad, value, last
            )
            length = found[0]
            if length is None:
                # No progress along p: begin anew with the steepest descent.
                inverse, last = _fresh(value, grad)
                continue
            s, last = length * p, value
            value, new = fun(theta + s)
            y, theta, grad_before, grad = new - grad, theta + s, grad, new
            inverse = broyden_update(inverse, s, y, float(-length * (s @ grad_before)))


def _fresh(value: float, grad: np.ndarray) -> tuple[np.ndarray, float]:
    """H = I, and a former value from which the search tries a first step of length 1.

    Without one it tries θ - ∇f, and gives up if that is many times too far.
    """
    return np.eye(grad.size), value + float(np.linalg.norm(grad)) / 2


def broyden_update(
    inverse: np.ndarray, s: np.ndarray, y: np.ndarray, curved: float
) -> np.ndarray:
    """The next H for a step s, the change y of the gradient, and sᵀ H⁻¹ s."""
    image = inverse @ y
    across, along = y @ image, y @ s
    if not (along > 0 and across > 0):
        return inverse
    h, b = across / along, curved / along
    a = h * b - 1
    if not a > 0:
        return inverse
    lowest = min(1.0, h * (1 - np.sqrt(a / (1 + a))))
    theta = max((lowest - 1) / a, min(1 / lowest, (1 - b) / b))
    sigma = 1 + a * theta
    power = sigma ** (-1 / (len(s) - 1))
    if theta > 0:
        tau = min(1.0, 1 / b) * min(power, 1 / theta)
    else:
        tau = min(min(1.0, 1 / b) * power, sigma)
    v = s / along - image / across
    changed = inverse - np.outer(image, image) / across
    changed += (1 - theta) / sigma * across * np.outer(v, v)
    return changed / tau + np.outer(s, s) / along


PEERS: dict[str, Callable[..., Any]] = {
    OURS: _ours,
    # As in configs/optimizer/solver/damping_search_squared.yaml.
    OURS_FAST: functools.partial(_ours, squared=True, factors=(0.3333, 1.0, 9.0)),
    "energy natural gradient, published": _published,
    "SVD least squares, line search": _least_squares,
    "Levenberg-Marquardt": _levenberg_marquardt,
    "BFGS, dense (SciPy)": _iterate_bfgs,
    "SSBroyden, dense": _iterate_ssbroyden,
    "L-BFGS (Optax)": _lbfgs,
    "Adam (Optax), 1e-3": functools.partial(_adam, 1e-3),
    "Adam (Optax), 3e-3": functools.partial(_adam, 3e-3),
    "Adam (Optax), 1e-2": functools.partial(_adam, 1e-2),
}
