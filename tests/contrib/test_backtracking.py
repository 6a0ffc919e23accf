"""Conjugate gradients of Martens 2010: the rule of progress, and backtracking."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ngd_jax as ngd
from ngd_jax.contrib.backtracking import BacktrackingCG, checkpoints
from tests.solvers import systems

pytestmark = pytest.mark.usefixtures("strict_ranks")
Status = ngd.SolverStatus


def textbook(matrix, rhs, steps, x0=None):
    """Iterates and their model values, in float64; the best multiple of x0 first."""
    x = np.zeros_like(rhs)
    if x0 is not None:
        x = x0 * (x0 @ rhs) / (x0 @ matrix @ x0)
    r = rhs - matrix @ x
    p, xs = r, [x]
    for _ in range(steps):
        image = matrix @ p
        alpha = (r @ r) / (p @ image)
        x, r_next = x + alpha * p, r - alpha * image
        p = r_next + (r_next @ r_next) / (r @ r) * p
        r = r_next
        xs.append(x)
    return np.array(xs), np.array([systems.energy(matrix, x, rhs) for x in xs])


def run(root, rhs, *, x0=None, objective=None, damping=0.0, **options):
    """Direction and report of `BacktrackingCG` on RᵀR."""
    solver = BacktrackingCG(
        **{"progress_tol": None, "backtracking": objective is not None} | options
    )
    system = ngd.RightHandSide(rhs, guess=x0, objective=objective)
    fisher = systems.fisher_of(root, rhs)
    solution = ngd.solve_scaled(solver, fisher, system, damping=damping)
    return solution.direction, solution.info


# --- The progress rule.


def martens_rule(values, tolerance):
    """The first step at which Martens' rule (2010, section 4.4) says to stop."""
    for i in range(1, len(values)):
        k = max(10, int(np.ceil(0.1 * i)))
        phi = values[i]
        if i > k and phi < 0 and (phi - values[i - k]) / phi < k * tolerance:
            return i
    return None


@pytest.mark.parametrize(
    ("max_steps", "tolerance", "guess"),
    [(50, 3e-2, True), (50, 1e-9, False), (180, 2e-4, False), (180, 1e-2, True)],
)
def test_progress_rule_is_that_of_martens(max_steps, tolerance, guess, x64, rng):
    matrix = systems.spectrum(rng, np.geomspace(1e-4, 1, 200))
    rhs, x0 = rng.normal(size=(2, 200))
    _, values = textbook(matrix, rhs, max_steps, x0 if guess else None)
    expected = martens_rule(values, tolerance)
    # Among the cases: one that never stops, and one with a window above ten.
    assert (expected is None) == (tolerance == 1e-9)
    assert (expected or 0) > 100 or tolerance != 2e-4

    x, info = jax.jit(
        lambda root, rhs, x0: run(
            root,
            rhs,
            x0=x0 if guess else None,
            max_steps=max_steps,
            progress_tol=tolerance,
        )
    )(*map(jnp.asarray, (systems.root_of(matrix), rhs, x0)))
    steps = int(info.num_steps)
    # Long solves amplify round-off, which decides near the threshold.
    slack = 1.05 if (expected or 0) > 40 else 1.0
    earliest, latest = (martens_rule(values, tolerance * x) for x in (slack, 1 / slack))
    assert (earliest or max_steps) <= steps <= (latest or max_steps)
    assert int(info.status) == (Status.SETTLED if expected else Status.MAX_STEPS)
    energy = systems.energy(matrix, np.asarray(x), rhs)
    np.testing.assert_allclose(energy, values[steps], rtol=5e-3)


def test_progress_rule_includes_the_damping_and_any_scale(rng):
    matrix = np.float32(systems.spectrum(rng, np.geomspace(1e-4, 1, 60)))
    rhs = np.float32(rng.normal(size=60))
    root = np.float32(systems.root_of(matrix))

    @jax.jit
    def solve(root, rhs, damping):
        return run(root, rhs, damping=damping, max_steps=50, progress_tol=1e-2)[1]

    for scale in (1.0, 2.0**60):
        info = solve(root, rhs * scale, 0.1)
        _, values = textbook(matrix + 0.1 * np.eye(60), np.float64(rhs), 50)
        assert int(info.num_steps) == martens_rule(values, 1e-2)
        assert int(info.status) == Status.SETTLED


def test_what_converges_first_is_converged(rng):
    matrix = systems.spectrum(rng, np.linspace(1, 2, 16))
    _, info = run(
        jnp.asarray(systems.root_of(matrix), "f4"),
        jnp.asarray(rng.normal(size=16), "f4"),
        max_steps=20,
        rtol=1e-3,
        progress_tol=1.0,
    )
    assert int(info.status) == Status.CONVERGED


# --- Backtracking.


def test_checkpoints_grow_by_three_tenths():
    assert checkpoints(1) == (1,)
    assert checkpoints(20) == (1, 2, 3, 4, 5, 7, 9, 11, 14, 18, 20)
    for max_steps in (5, 50, 250):
        kept = checkpoints(max_steps)
        assert kept[-1] == max_steps
        powers = {int(np.ceil(1.3**j)) for j in range(30)}
        assert set(kept) - {max_steps} == {s for s in powers if s < max_steps}


def walk(values):
    """From the last towards the first while the value falls; NaN is the worst."""
    values = [np.inf if np.isnan(v) else v for v in values]
    place = len(values) - 1
    while place > 0 and (values[place - 1] < values[place] or values[place] == np.inf):
        place -= 1
    return place


@pytest.mark.parametrize("max_steps", [20, 60])
@pytest.mark.parametrize("kind", ["early", "late", "two valleys", "nan at the end"])
def test_backtracking_goes_where_a_walk_by_hand_goes(kind, max_steps, x64, rng):
    matrix = systems.spectrum(rng, np.geomspace(1e-4, 1, 80))
    rhs = rng.normal(size=80)
    xs, _ = textbook(matrix, rhs, max_steps)
    kept = xs[list(checkpoints(max_steps))]
    lengths = np.linalg.norm(kept, axis=1)  # grow with every step
    middle, last = lengths[len(kept) // 2], lengths[-1]

    def objective(x):
        length = jnp.linalg.norm(x)
        if kind == "early":
            return (length - lengths[2]) ** 2
        if kind == "late":
            return -length
        if kind == "two valleys":
            return jnp.sin(13 * length / last)
        return jnp.where(length > middle, jnp.nan, length)

    place = walk([float(objective(x)) for x in kept])
    x, info = jax.jit(
        lambda root, rhs: run(root, rhs, max_steps=max_steps, objective=objective)
    )(jnp.asarray(systems.root_of(matrix)), jnp.asarray(rhs))
    # Long solves amplify round-off; neighbours are ten times further apart.
    error = 1e-2 if max_steps > 20 else 1e-7
    assert np.linalg.norm(x - kept[place]) <= error * lengths[place]
    assert (np.diff(lengths) > 5 * error * lengths[1:]).all()
    is_last = place == len(kept) - 1
    assert is_last == (kind == "late")
    assert int(info.status) == (Status.MAX_STEPS if is_last else Status.BACKTRACKED)
    assert int(info.num_steps) == max_steps
    residual = np.linalg.norm(rhs - matrix @ kept[place]) / np.linalg.norm(rhs)
    if max_steps == 20:
        np.testing.assert_allclose(info.relative_residual, residual, rtol=1e-5)


def test_backtracking_starts_at_the_last_iterate_of_a_short_solve(x64, rng):
    matrix = systems.spectrum(rng, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0] * 2)
    rhs = rng.normal(size=12)
    seen = []

    def objective(x):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), x)
        return -jnp.linalg.norm(x)

    x, info = jax.jit(
        lambda root, rhs: run(root, rhs, max_steps=40, rtol=1e-9, objective=objective)
    )(jnp.asarray(systems.root_of(matrix)), jnp.asarray(rhs))
    jax.effects_barrier()
    assert int(info.num_steps) == 6
    assert int(info.status) == Status.CONVERGED
    np.testing.assert_allclose(x, np.linalg.solve(matrix, rhs), rtol=1e-8)
    # Steps 6 and 5, and no further.
    assert len(seen) == 2
    np.testing.assert_allclose(seen[0], x)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_objectives_that_are_never_finite_give_the_first_iterate(value, rng):
    root = systems.root_of(systems.spectrum(rng, np.geomspace(1e-2, 1, 12)))
    root, rhs = jnp.asarray(root, "f4"), jnp.asarray(rng.normal(size=12), "f4")
    x, _ = run(root, rhs, max_steps=9, objective=lambda _: jnp.float32(value))
    first, _ = run(root, rhs, max_steps=1)
    np.testing.assert_allclose(x, first, rtol=1e-5)


@pytest.mark.parametrize("rhs", [np.zeros(5), np.full(5, np.nan)])
def test_backtracking_over_nothing_is_zero(rhs):
    x, info = run(jnp.eye(5), jnp.asarray(rhs, "f4"), max_steps=9, objective=jnp.sum)
    assert not x.any()
    expected = Status.NON_FINITE if np.isnan(rhs).any() else Status.CONVERGED
    assert int(info.status) == expected


def test_objective_sees_the_structure_and_the_units_of_the_gradient(rng):
    rhs = {"a": jnp.ones(3), "b": [100 * jnp.ones(2)]}
    seen = []

    def objective(d):
        assert jax.tree.structure(d) == jax.tree.structure(rhs)
        jax.debug.callback(lambda value: seen.append(float(value)), d["b"][0][0])
        return -jnp.sum(d["b"][0])

    root = jnp.sqrt(2.0) * jnp.eye(5)
    x, _ = run(root, rhs, max_steps=3, rtol=1e-5, objective=objective)
    jax.effects_barrier()
    np.testing.assert_allclose(x["b"][0], 50.0, rtol=1e-5)
    np.testing.assert_allclose(seen[0], 50.0, rtol=1e-5)


def test_options_under_vmap_are_those_of_each(rng):
    matrices = [
        systems.spectrum(rng, np.geomspace(1e-3, 1, 24)),
        systems.spectrum(rng, np.linspace(1, 2, 24)),
    ]
    roots = jnp.asarray([systems.root_of(matrix) for matrix in matrices], "f4")
    rhs = jnp.asarray(rng.normal(size=(2, 24)), "f4")

    def solve(root, rhs):
        return run(
            root,
            rhs,
            max_steps=30,
            rtol=1e-4,
            progress_tol=1e-2,
            objective=lambda x: jnp.linalg.norm(x - rhs),
        )

    xs, infos = jax.jit(jax.vmap(solve))(roots, rhs)
    for i in range(2):
        x, info = jax.jit(solve)(roots[i], rhs[i])
        np.testing.assert_allclose(xs[i], x, rtol=1e-3, atol=1e-4)
        assert int(infos.num_steps[i]) == int(info.num_steps)
        assert int(infos.status[i]) == int(info.status)


# --- The solver.


def test_backtracking_needs_a_loss_and_without_it_is_cg(rng):
    root = systems.root_of(systems.spectrum(rng, np.geomspace(1e-3, 1, 12)))
    root, rhs = jnp.asarray(root, "f4"), systems.tree_like(rng.normal(size=12), "f4")
    fisher = systems.fisher_of(root, rhs)
    solver = BacktrackingCG(20)
    assert solver.uses_objective
    with pytest.raises(ValueError, match=r"`loss_fn`.*value_fn=value_fn"):
        solver(fisher, rhs, damping=0.1)

    def objective(d):
        return jnp.linalg.norm(d["a"])  # the shorter, the better

    system = ngd.RightHandSide(rhs, objective=objective)
    solution = ngd.solve_scaled(solver, fisher, system, damping=0.1)
    assert int(solution.info.status) == Status.BACKTRACKED
    assert solution.pushed is None  # not that of the last iterate

    plain = BacktrackingCG(20, 1e-4, progress_tol=None, backtracking=False)
    assert not plain.uses_objective
    solution = ngd.solve_scaled(plain, fisher, system, damping=0.1)
    usual, _ = ngd.CG()(fisher, rhs, damping=0.1)
    jax.tree.map(np.testing.assert_array_equal, solution.direction, usual)
    assert solution.pushed is not None


@pytest.mark.parametrize("value", [0.0, -1e-3, float("nan")])
def test_progress_tolerances_that_cannot_work_raise(value):
    construct = inspect.unwrap(BacktrackingCG.__init__)
    with pytest.raises(ValueError, match="`progress_tol` must be positive"):
        construct(object.__new__(BacktrackingCG), progress_tol=value)
