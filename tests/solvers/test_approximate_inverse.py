"""ApproximateInverse: the step of CG(1) without its residual, and M⁻¹ g by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ngd_jax as ngd
from tests import reference
from tests.preconditioners.problems import KEY, dense, linearize, network_problem

pytestmark = pytest.mark.usefixtures("strict_ranks")
Status = ngd.SolverStatus
DAMPING = 1e-2


def double(fisher, damping):
    """M = ½ I: a metric that is a function."""
    return lambda v: jax.tree.map(lambda leaf: 2 * leaf, v)


PRECONDITIONERS = {
    "jacobi": ngd.Jacobi(),
    "kronecker": ngd.Kronecker(KEY),
    "function": double,
}
every_preconditioner = pytest.mark.parametrize("name", PRECONDITIONERS)


def direction_problem(rng, dtype="float64"):
    params, x, fisher = network_problem(rng, dtype)
    rhs = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), dtype), params)
    return params, x, fisher, rhs


def solve(solver, params, x, rhs, damping=DAMPING, x0=None):
    @jax.jit
    def run(params, x, rhs, x0):
        return solver.solve_with_image(
            linearize(params, x),
            rhs,
            damping=damping,
            x0=x0,
            state=solver.init(params),
        )

    return run(params, x, rhs, x0)


def assert_close(actual, expected, rtol):
    actual, expected = reference.flat(actual), reference.flat(expected)
    atol = rtol * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


@every_preconditioner
@pytest.mark.usefixtures("optimized")
def test_direction_is_that_of_one_step_of_cg(name, dtype, rng):
    params, x, _, rhs = direction_problem(rng, dtype)
    preconditioner = PRECONDITIONERS[name]
    solver = ngd.ApproximateInverse(preconditioner)
    solution, image, info, state = solve(solver, params, x, rhs)
    cg = ngd.CG(max_steps=1, rtol=0.0, preconditioner=preconditioner)
    expected, cg_image, cg_info, cg_state = solve(cg, params, x, rhs)
    rtol = 1e-4 if dtype == "float32" else 1e-10
    assert_close(solution, expected, rtol)
    assert_close(image, cg_image, rtol)
    assert jax.tree.map(lambda x: x.dtype, solution) == jax.tree.map(
        lambda x: x.dtype, rhs
    )
    jax.tree.map(np.testing.assert_array_equal, state, cg_state)
    assert int(info.num_steps) == int(cg_info.num_steps) == 1
    assert int(info.status) == Status.UNCHECKED
    assert float(info.relative_residual) == np.inf
    assert info.relative_residual.dtype == dtype


@every_preconditioner
def test_exact_length_minimises_the_quadratic_model(name, x64, rng):
    params, x, fisher, rhs = direction_problem(rng)
    solver = ngd.ApproximateInverse(PRECONDITIONERS[name])
    solution, _, _, _ = solve(solver, params, x, rhs)
    d, g = reference.flat(solution), reference.flat(rhs)
    slope = d @ (fisher @ d + DAMPING * d - g)
    assert abs(slope) <= 1e-10 * abs(d @ g)


@every_preconditioner
def test_without_a_length_it_is_the_inverse_itself(name, x64, rng):
    params, x, _, rhs = direction_problem(rng)
    preconditioner = PRECONDITIONERS[name]
    solver = ngd.ApproximateInverse(preconditioner, exact_length=False)
    solution, image, info, _ = solve(solver, params, x, rhs)
    inverse = dense(preconditioner(linearize(params, x), DAMPING), params)
    np.testing.assert_allclose(
        reference.flat(solution), inverse @ reference.flat(rhs), rtol=1e-9, atol=1e-12
    )
    assert image is None
    assert int(info.status) == Status.UNCHECKED


def test_image_is_the_change_of_the_outputs(x64, rng):
    params, x, _, rhs = direction_problem(rng)
    solver = ngd.ApproximateInverse(ngd.Jacobi())
    x0 = jax.tree.map(lambda leaf: leaf / 3, rhs)
    for start in (None, x0):
        solution, image, _, _ = solve(solver, params, x, rhs, x0=start)
        _, jacobian = reference.jacobian(reference.network, params, x)
        expected = np.einsum("nkp,p->nk", jacobian, reference.flat(solution))
        np.testing.assert_allclose(image, expected, rtol=1e-9, atol=1e-12)


def test_a_guess_is_improved_along_what_it_leaves(x64, rng):
    params, x, fisher, rhs = direction_problem(rng)
    solver = ngd.ApproximateInverse(ngd.Jacobi())
    matrix = fisher + DAMPING * np.eye(len(fisher))
    truth = np.linalg.solve(matrix, reference.flat(rhs))
    # From the solution there is nowhere to go.
    x0 = reference.unflat(truth, rhs)
    solution, _, _, _ = solve(solver, params, x, rhs, x0=x0)
    np.testing.assert_allclose(reference.flat(solution), truth, rtol=1e-9)
    # From elsewhere the step is that of the system for the rest.
    x0 = reference.unflat(truth + rng.normal(size=len(truth)), rhs)
    rest = reference.unflat(reference.flat(rhs) - matrix @ reference.flat(x0), rhs)
    solution, _, _, _ = solve(solver, params, x, rhs, x0=x0)
    step, _, _, _ = solve(solver, params, x, rest)
    np.testing.assert_allclose(
        reference.flat(solution), reference.flat(x0) + reference.flat(step), rtol=1e-9
    )


@pytest.mark.parametrize("exact_length", [True, False])
def test_a_guess_that_is_not_finite_is_dropped(exact_length, rng):
    params, x, _, rhs = direction_problem(rng, "float32")
    x0 = jax.tree.map(lambda leaf: leaf * jnp.nan, rhs)
    solver = ngd.ApproximateInverse(ngd.Jacobi(), exact_length)
    solution, _, info, _ = solve(solver, params, x, rhs, x0=x0)
    assert not reference.flat(solution).any()
    assert int(info.status) == Status.NON_FINITE


@pytest.mark.parametrize("exponent", [-35, -20, 20, 35])
def test_the_size_of_the_right_hand_side_does_not_matter(exponent, rng):
    params, x, _, rhs = direction_problem(rng, "float32")
    scale = np.float32(10.0**exponent)
    solver = ngd.ApproximateInverse(ngd.Jacobi())
    solution, _, info, _ = solve(solver, params, x, rhs)
    scaled = jax.tree.map(lambda leaf: leaf * scale, rhs)
    far, _, far_info, _ = solve(solver, params, x, scaled)
    assert int(info.status) == int(far_info.status) == Status.UNCHECKED
    assert_close(jax.tree.map(lambda leaf: leaf / scale, far), solution, 1e-5)


@pytest.mark.parametrize("exact_length", [True, False])
def test_zero_is_solved(exact_length, rng):
    params, x, _, rhs = direction_problem(rng, "float32")
    zero = jax.tree.map(jnp.zeros_like, rhs)
    solver = ngd.ApproximateInverse(ngd.Jacobi(), exact_length)
    solution, _, info, _ = solve(solver, params, x, zero)
    assert not reference.flat(solution).any()
    assert int(info.status) == Status.CONVERGED
    assert float(info.relative_residual) == 0.0


@pytest.mark.parametrize("exact_length", [True, False])
@pytest.mark.parametrize("where", ["right-hand side", "model", "preconditioner"])
def test_what_is_not_finite_gives_zero_and_says_so(where, exact_length, rng):
    params, x, _, rhs = direction_problem(rng, "float32")

    def broken(fisher, damping):
        return lambda v: jax.tree.map(lambda leaf: leaf * jnp.nan, v)

    preconditioner = double
    if where == "right-hand side":
        rhs = jax.tree.map(lambda leaf: leaf.at[...].set(jnp.inf), rhs)
    elif where == "model":
        x = x.at[0].set(jnp.nan)
        preconditioner = double if exact_length else ngd.Jacobi()
    else:
        preconditioner = broken
    solver = ngd.ApproximateInverse(preconditioner, exact_length)
    solution, image, info, state = solve(solver, params, x, rhs)
    assert np.isfinite(reference.flat(state)).all()
    if where == "model" and not exact_length:
        # Nothing was asked of the model, and its preconditioner keeps what it had.
        assert np.isfinite(reference.flat(solution)).all()
        return
    assert not reference.flat(solution).any()
    assert image is None or not reference.flat(image).any()
    assert int(info.status) == Status.NON_FINITE
    assert float(info.relative_residual) == 1.0


def test_a_direction_without_curvature_is_a_breakdown(rng):
    params, x, _, rhs = direction_problem(rng, "float32")
    model_fn = lambda _, x: x  # noqa: E731  # whatever the parameters are
    fisher = ngd.linearize_fisher(model_fn, params, x, ngd.Gaussian())
    solution, info = ngd.ApproximateInverse(double)(fisher, rhs, damping=0.0)
    assert not reference.flat(solution).any()
    assert int(info.status) == Status.BREAKDOWN


@pytest.mark.parametrize("given", [ngd.Kronecker, "kronecker", None])
def test_what_is_no_preconditioner_is_refused(given):
    is_class = isinstance(given, type)  # beartype finds out about the others
    match = "`preconditioner` must be one, such as Kron" if is_class else None
    with pytest.raises(TypeError, match=match):
        ngd.ApproximateInverse(given)


def loss_fn(params, batch):
    logits = reference.network(params, batch["x"])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]))


@pytest.mark.parametrize(
    ("rate", "momentum"),
    [(0.5, 0.0), (0.5, 0.9), (ngd.QuadraticModelRate(), 0.0)],
    ids=["", "momentum", "quadratic model"],
)
@pytest.mark.parametrize("microbatch_size", [None, 4])
def test_training_is_that_by_one_step_of_cg(rate, momentum, microbatch_size, x64, rng):
    params, x, _ = network_problem(rng)
    batch = {"x": x, "y": jnp.asarray(rng.integers(0, 3, len(x)))}

    def train(solver):
        tx = ngd.natural_gradient(
            rate,
            lambda params, batch: reference.network(params, batch["x"]),
            ngd.Categorical(),
            max_kl=0.05,
            momentum=momentum,
            solver=solver,
            microbatch_size=microbatch_size,
        )

        def step(carry, _):
            params, state = carry
            grads = jax.grad(loss_fn)(params, batch)
            updates, state = tx.update(grads, state, params, batch=batch)
            params = optax.apply_updates(params, updates)
            info = state.info
            told = info.predicted_kl, info.measured_kl, info.step_scale, info.status
            return (params, state), (loss_fn(params, batch), told)

        carry = params, tx.init(params)
        return jax.jit(lambda: jax.lax.scan(step, carry, None, length=8)[1])()

    kronecker = ngd.Kronecker(KEY)
    expected = train(ngd.CG(1, rtol=0.0, preconditioner=kronecker))
    exact_length = isinstance(rate, float)
    found = train(ngd.ApproximateInverse(kronecker, exact_length=exact_length))
    assert found[0][-1] < found[0][0]
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6),
        found,
        expected,
    )
