"""DampingSearch against trials made one by one in NumPy, and the problems it is for.

(F + λI) v = g,    (F + λI) q = Jᵀ ∂²outputs[v, v] / N,    d = s v + ½ s² q
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import ngd_jax as ngd
from ngd_jax.contrib import DampingSearch
from ngd_jax.contrib.damping_search import DampingSearchState
from ngd_jax.dense import dense_root, sketched_root
from tests.fisher_cases import assert_close

pytestmark = pytest.mark.usefixtures("strict_ranks")
Status = ngd.SolverStatus
GAUSSIAN = ngd.Gaussian(event_ndims=0)


def model_fn(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


def output_loss_fn(outputs, _x):
    return jnp.mean(outputs**2) / 2


def make(rng, num_examples, dtype="float64"):
    params = {"v": rng.normal(size=3), "w": rng.normal(size=(2, 3))}
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), params)
    return params, jnp.asarray(rng.normal(size=(num_examples, 2)), dtype)


@functools.partial(jax.jit, static_argnames=("solver", "in_output_space"))
def search(solver, params, x, state, *, in_output_space=True):
    """The step, the report, the state, and the same as functions of a vector."""

    def loss_fn(params):
        return output_loss_fn(model_fn(params, x), x)

    fisher = ngd.linearize_fisher(model_fn, params, x, GAUSSIAN)
    cotangents = jax.grad(output_loss_fn)(fisher.outputs, x)
    rhs = ngd.RightHandSide(
        jax.grad(loss_fn)(params),
        coefficients=fisher.sqrt_solve(cotangents) if in_output_space else None,
        objective=lambda d: loss_fn(jax.tree.map(jnp.subtract, params, d)),
    )
    return ngd.solve_scaled(solver, fisher, rhs, damping=0.0, state=state)


def trials(params, x, dampings, lengths, max_curvature):
    """Every λ and s with its step and its loss, the plain way."""
    theta, unravel = ravel_pytree(params)
    outputs_fn = jax.jit(lambda theta: model_fn(unravel(theta), x))
    outputs = np.asarray(outputs_fn(theta))
    jacobian = np.asarray(jax.jacobian(outputs_fn)(theta))
    hessian = np.asarray(jax.hessian(outputs_fn)(theta))
    count = len(outputs)
    for damping in dampings:
        matrix = jacobian.T @ jacobian / count + damping * np.eye(len(theta))
        v = np.linalg.solve(matrix, jacobian.T @ outputs / count)
        second = np.einsum("nij,i,j->n", hessian, v, v)
        q = np.linalg.solve(matrix, jacobian.T @ second / count)
        for s in lengths:
            is_small = s * np.linalg.norm(q) <= max_curvature * np.linalg.norm(v)
            d = s * v + is_small * s**2 / 2 * q
            loss = np.mean(np.asarray(outputs_fn(theta - d)) ** 2) / 2
            yield damping, d, loss, s


@pytest.mark.parametrize(
    ("num_examples", "in_output_space", "squared"),
    [(5, True, False), (20, False, False), (5, False, True), (20, True, True)],
)
def test_the_trial_of_least_loss_and_damping_is_taken(
    num_examples, in_output_space, squared, x64, rng
):
    solver = DampingSearch(power=0.4, slack=1.5, max_curvature=1.0, squared=squared)
    params, x = make(rng, num_examples)
    before = float(output_loss_fn(model_fn(params, x), x))
    for damping, lowest in ((1e-2, np.inf), (1e-4, 0.1 * before)):
        state = DampingSearchState(jnp.float64(damping), jnp.float64(lowest))
        found = search(solver, params, x, state, in_output_space=in_output_space)
        dampings = damping * np.asarray(solver.factors)
        highest = max(before, 1.5 * min(before, lowest))
        allowed = [
            trial
            for trial in trials(params, x, dampings, solver.lengths, 1.0)
            if trial[2] < highest
        ]
        best = min(allowed, key=lambda t: t[2] * t[0] ** 0.4 * t[3] ** -0.5)
        np.testing.assert_allclose(found.state.damping, best[0], rtol=1e-12)
        np.testing.assert_allclose(found.damping, best[0], rtol=1e-12)
        np.testing.assert_allclose(found.length, best[3], rtol=1e-12)
        assert_close(ravel_pytree(found.direction)[0], best[1], 1e-7)
        assert int(found.info.num_steps) == 1
        assert int(found.info.status) == Status.CONVERGED
        np.testing.assert_allclose(found.state.lowest, min(before, lowest), rtol=1e-12)


def test_a_sketch_adds_rows_with_signs(x64, rng):
    """S A and S w by hand, for two blocks of outputs with batches of their own."""
    params, x = make(rng, 12)
    batch = {"a": x, "b": 2 * x[:7]}
    likelihood = ngd.Product(dict.fromkeys(batch, GAUSSIAN))

    def blocks(params, batch):
        return {name: model_fn(params, x) for name, x in batch.items()}

    buckets = jnp.asarray(rng.integers(0, 5, 19))
    signs = jnp.asarray(rng.choice([-1.0, 1.0], 19))
    sketch = np.zeros((5, 19))
    sketch[np.asarray(buckets), np.arange(19)] = signs

    @jax.jit
    def both(params):
        fisher = ngd.linearize_fisher(blocks, params, batch, likelihood)
        return dense_root(fisher), sketched_root(fisher, buckets, signs, 5)

    matrix, found = both(params)
    assert_close(found, sketch @ np.asarray(matrix), 1e-13)


def test_a_sketch_of_a_model_that_mixes_its_examples_is_right(x64, rng):
    params, x = make(rng, 12)

    def mixing(params, x):
        outputs = model_fn(params, x)
        return outputs - outputs.mean()

    theta, unravel = ravel_pytree(params)

    @jax.jit
    def both(theta):
        fisher = ngd.linearize_fisher(mixing, unravel(theta), x, GAUSSIAN)
        jacobian = jax.jacobian(lambda theta: mixing(unravel(theta), x))(theta)
        return jacobian, sketched_root(fisher, jnp.arange(12) % 4, jnp.ones(12), 4)

    jacobian, found = both(theta)
    expected = jacobian.reshape(3, 4, 9).sum(0) / 12**0.5
    assert_close(found, expected, 1e-13)


@pytest.mark.parametrize("squared", [False, True])
def test_a_sketched_search_takes_the_step_of_the_sketched_system(squared, x64, rng):
    """Without bending, and for one λ and length: d = (F' + λI)⁻¹ A'ᵀ w', A' = S A."""
    params, x = make(rng, 30)
    key = jax.random.key(3)
    solver = DampingSearch(
        power=0.0,
        factors=(1.0, 2.0),
        lengths=(1.0,),
        max_curvature=0.0,
        sketch_size=6,
        key=key,
        squared=squared,
    )
    state = solver.init(params)._replace(damping=jnp.float64(1e-3))
    first = search(solver, params, x, state)
    second = search(solver, params, x, state._replace(num_sketches=jnp.int32(1)))
    assert int(first.state.num_sketches) == 1
    assert int(second.state.num_sketches) == 2
    theta, unravel = ravel_pytree(params)
    outputs_fn = jax.jit(lambda theta: model_fn(unravel(theta), x) / 30**0.5)
    matrix, w = (
        np.asarray(jax.jacobian(outputs_fn)(theta)),
        np.asarray(outputs_fn(theta)),
    )
    steps = []
    for count, found in enumerate((first, second)):
        keys = jax.random.split(jax.random.fold_in(key, count))
        sketch = np.zeros((6, 30))
        buckets = np.asarray(jax.random.randint(keys[0], (30,), 0, 6))
        sketch[buckets, np.arange(30)] = jax.random.rademacher(keys[1], (30,))
        root = sketch @ matrix
        damped = root.T @ root + float(found.damping) * np.eye(9)
        steps.append(np.linalg.solve(damped, root.T @ sketch @ w))
        assert_close(ravel_pytree(found.direction)[0], steps[-1], 1e-8)
        # The report is about the whole system.
        left = matrix.T @ (w - matrix @ steps[-1])
        expected = np.linalg.norm(left) / np.linalg.norm(matrix.T @ w)
        np.testing.assert_allclose(found.info.relative_residual, expected, rtol=1e-6)
    assert np.linalg.norm(steps[0] - steps[1]) > 0.1 * np.linalg.norm(steps[0])


def test_a_sketch_that_is_not_smaller_changes_nothing(x64, rng):
    params, x = make(rng, 20)
    plain = DampingSearch()
    sketched = DampingSearch(sketch_size=20, key=jax.random.key(0))
    found, same = (search(s, params, x, s.init(params)) for s in (plain, sketched))
    assert_close(same.direction["w"], found.direction["w"], 1e-14)
    assert int(same.state.num_sketches) == 0


@pytest.mark.parametrize(
    ("loss", "options", "length"),
    [
        (0.26, {}, 1.0),
        (0.24, {}, 0.25),
        (0.49, {"length_power": 0.0}, 0.25),
        (0.13, {"length_power": 1.0}, 1.0),
    ],
)
def test_a_quarter_of_a_step_must_lower_the_loss_more(loss, options, length, x64):
    # F = 1 and g = 1, so that d = s: a loss of ½ / √1 against loss / √¼.
    solver = DampingSearch(0.0, factors=(1.0, 2.0), lengths=(1.0, 0.25), **options)
    state = DampingSearchState(jnp.float64(1e-6), jnp.float64(np.inf))

    def objective(d):
        return jnp.where(d > 0.5, 0.5, jnp.where(d > 0.1, loss, 1.0))

    @jax.jit
    def solve(params):
        fisher = ngd.linearize_fisher(jnp.multiply, params, jnp.ones(1), GAUSSIAN)
        rhs = ngd.RightHandSide(params, objective=objective)
        return ngd.solve_scaled(solver, fisher, rhs, damping=0.0, state=state)

    found = solve(jnp.ones(()))
    assert float(found.length) == length
    np.testing.assert_allclose(found.direction, length, rtol=1e-5)


def test_the_bent_path_keeps_to_the_line_of_the_outputs_to_third_order(rng):
    """With fewer examples than parameters, v sends the outputs straight to zero."""
    dtype = "float32"
    params, x = make(rng, 3, dtype)
    outputs = model_fn(params, x)
    apart = []
    for length in (0.4, 0.2):
        solver = DampingSearch(
            lengths=(length,), factors=(1.0, 2.0), power=1.0, max_curvature=100.0
        )
        state = DampingSearchState(jnp.asarray(1e-6, dtype), jnp.asarray(np.inf, dtype))
        found = search(solver, params, x, state)
        d = found.direction
        assert {leaf.dtype for leaf in jax.tree.leaves(d)} == {jnp.dtype(dtype)}
        np.testing.assert_allclose(found.damping, 1e-6, rtol=1e-5)
        moved = model_fn(jax.tree.map(jnp.subtract, params, d), x)
        apart.append(float(jnp.linalg.norm(moved - (1 - length) * outputs)))
    assert apart[0] / apart[1] > 5.5  # 8 in the limit, 4 for a straight step


@pytest.mark.parametrize("squared", [False, True])
def test_the_first_damping_is_in_units_of_f(squared, x64, rng):
    """Of its largest eigenvalue, or of its Frobenius norm."""
    params, x = make(rng, 5)
    root = np.asarray(
        jax.jacobian(lambda t: model_fn(ravel_pytree(params)[1](t), x))(
            ravel_pytree(params)[0]
        )
    ) / np.sqrt(5)
    solver = DampingSearch(
        initial=1e-3, factors=(1.0, 9.0), power=10.0, squared=squared
    )
    found = search(solver, params, x, solver.init(params))
    largest = np.linalg.norm(root.T @ root, "fro" if squared else 2)
    np.testing.assert_allclose(found.damping, 1e-3 * largest, rtol=1e-9)


@pytest.mark.long
def test_a_squared_search_has_no_row_for_each_output(rng):
    params = {"v": jnp.ones(60), "w": jnp.ones((2, 60))}
    x = jnp.asarray(rng.normal(size=(5000, 2)), "float32")
    has_rows = {}
    for squared in (False, True):
        solver = DampingSearch(squared=squared)
        program = search.lower(solver, params, x, solver.init(params)).as_text()
        has_rows[squared] = "5000x180xf32" in program
    assert has_rows == {False: True, True: False}


def test_no_damping_below_round_off_is_tried(x64, rng):
    """Of F, which is singular here: 5 rows of 9 parameters."""
    params, x = make(rng, 5)
    solver = DampingSearch(factors=(1e-30, 1.0, 9.0), power=1.0, squared=True)
    found = search(solver, params, x, solver.init(params))
    matrix = np.asarray(
        ngd.dense_fisher(model_fn, params, x, GAUSSIAN), dtype="float64"
    )
    eps = float(jnp.finfo("float64").eps)
    np.testing.assert_allclose(found.damping, eps * np.linalg.norm(matrix), rtol=1e-6)
    assert np.isfinite(ravel_pytree(found.direction)[0]).all()


@pytest.mark.parametrize("squared", [False, True])
def test_without_a_better_trial_there_is_no_step_and_the_state_stays(squared, rng):
    params, x = make(rng, 5, "float32")
    state = DampingSearchState(jnp.float32(0.5), jnp.float32(np.inf))
    fisher = ngd.linearize_fisher(model_fn, params, x, GAUSSIAN)

    @jax.jit
    def solve(gradient):
        rhs = ngd.RightHandSide(gradient, objective=lambda d: 1 + optax.tree.norm(d))
        solver = DampingSearch(slack=1.0, squared=squared)
        return ngd.solve_scaled(solver, fisher, rhs, damping=0.0, state=state)

    def is_zero(tree):
        return all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(tree))

    found = solve(params)
    assert is_zero(found.direction)
    assert int(found.info.status) == Status.STAGNATED
    assert float(found.info.relative_residual) == 1.0
    assert float(found.state.damping) == 0.5
    assert float(found.length) == 0.0

    found = solve(jax.tree.map(jnp.zeros_like, params))
    assert int(found.info.status) == Status.CONVERGED
    assert float(found.info.relative_residual) == 0.0

    found = solve(jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), params))
    assert is_zero(found.direction)
    assert int(found.info.status) == Status.NON_FINITE
    assert float(found.state.damping) == 0.5


def run(residuals, params, batch, num_steps):
    """Steps of the search alone, without the transformation."""
    solver = DampingSearch()

    @jax.jit
    def all_steps(params):
        def step(_, carry):
            params, state = carry
            fisher = ngd.linearize_fisher(residuals, params, batch, GAUSSIAN)
            cotangents = jax.grad(output_loss_fn)(fisher.outputs, batch)
            rhs = ngd.RightHandSide(
                fisher.pullback(cotangents),
                coefficients=fisher.sqrt_solve(cotangents),
                objective=lambda d: output_loss_fn(
                    fisher.outputs_at(jax.tree.map(jnp.subtract, params, d)), batch
                ),
            )
            found = ngd.solve_scaled(solver, fisher, rhs, damping=0.0, state=state)
            return jax.tree.map(jnp.subtract, params, found.direction), found.state

        return jax.lax.fori_loop(0, num_steps, step, (params, solver.init(params)))

    return all_steps(params)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rosenbrock_is_solved_to_round_off(dtype, x64):
    """The residuals (1 - x, 100 (y - x²)) of a narrow bent valley, from (-1.9, 2)."""

    def residuals(params, which):
        first, second = 1 - params[0], 100 * (params[1] - params[0] ** 2)
        return jnp.where(which == 0, first, second)

    params, _ = run(residuals, jnp.asarray([-1.9, 2.0], dtype), jnp.arange(2), 40)
    np.testing.assert_allclose(params, 1.0, rtol=100 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("start", range(2))
def test_short_steps_do_not_drive_the_damping_down(start, x64):
    """A network for u'' = -π² sin(πx), u(±1) = 0: chaotic, and solved from each start.

    Without the length in the score a tenth of a step at λ/27 beats a whole one at λ,
    and some of the starts, which differ by 1e-15, hardly move until the end.
    """
    rng = np.random.default_rng(0)
    params = {
        "w": jnp.asarray(rng.normal(size=16)),
        "b": jnp.asarray(rng.normal(size=16)),
        "v": jnp.asarray(0.1 * rng.normal(size=16)),
    }
    params = jax.tree.map(lambda leaf: leaf * (1 + start * 1e-15), params)
    x = jnp.linspace(-1.0, 1.0, 40)

    def network(params, x):
        return jnp.tanh(x * params["w"] + params["b"]) @ params["v"]

    def residuals(params, x):
        second = jax.vmap(jax.grad(jax.grad(network, 1), 1), (None, 0))(params, x)
        values = jax.vmap(network, (None, 0))(params, x)
        inside = second + jnp.pi**2 * jnp.sin(jnp.pi * x)
        return jnp.where(jnp.abs(x) < 1, inside, 20 * values)

    # They break through between steps 60 and 80, and a few later. At step 100 all of 20
    # starts are below 2e-8, as compiled and unoptimized.
    params, state = run(residuals, params, x, 100)
    solution = jax.vmap(network, (None, 0))(params, x)
    assert float(jnp.max(jnp.abs(solution - jnp.sin(jnp.pi * x)))) < 1e-7
    assert float(state.damping) > 1e-25


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"power": -1.0}, "`power` must be at least 0"),
        ({"slack": 0.5}, "`slack` must be at least 1"),
        ({"lengths": ()}, "`lengths` must be positive"),
        ({"factors": (1.0, 0.1)}, "`factors` must rise"),
        ({"factors": (0.1, 1.0)}, "`factors` must rise"),
        ({"max_curvature": np.inf}, "`max_curvature` must be at least 0"),
        ({"initial": 0.0}, "`initial` must be positive"),
        ({"length_power": -0.5}, "`length_power` must be at least 0"),
        ({"sketch_size": 0, "key": jax.random.key(0)}, "`sketch_size` must be at"),
        ({"key": jax.random.key(0)}, "`key` must be None without `sketch_size`"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DampingSearch(**options)


def test_lists_from_a_configuration_are_tuples():
    solver = DampingSearch(factors=[0.3, 9.0], lengths=[1.0, 0.5])
    assert solver.factors == (0.3, 9.0)
    assert solver.lengths == (1.0, 0.5)


def test_a_sketch_without_a_key_or_coefficients_is_refused(rng):
    with pytest.raises(TypeError, match="A sketch needs `key`, a typed key"):
        DampingSearch(sketch_size=5)
    params, x = make(rng, 8, "float32")
    solver = DampingSearch(sketch_size=5, key=jax.random.key(0))
    with pytest.raises(ValueError, match="needs the gradient in the space of outputs"):
        search(solver, params, x, solver.init(params), in_output_space=False)


def test_a_search_without_a_loss_is_refused(rng):
    params, x = make(rng, 3, "float32")
    fisher = ngd.linearize_fisher(model_fn, params, x, GAUSSIAN)
    with pytest.raises(ValueError, match="DampingSearch needs the loss"):
        DampingSearch()(fisher, params, damping=0.0)
