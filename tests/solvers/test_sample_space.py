"""SampleSpace against the singular values of a dense A, and what it promises around it.

    A = U σ Vᵀ:    (F + λI)⁻¹ (Aᵀ w + z) = V σ / (σ² + λ) Uᵀ w + z / λ,    V ᵀz = 0

which is exact at every λ, where a dense solve of F + λI in float64 is good to ε/λ only.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ngd_jax as ngd
from ngd_jax.coordinates import ravel_real
from tests import dense_models, reference
from tests.marks import float64_is_long, long_unless
from tests.test_dense import RESIDUALS, columns, residual_case, residuals

pytestmark = pytest.mark.usefixtures("strict_ranks")
Status = ngd.SolverStatus


def holomorphic(params, x):
    return reference.network(params, x.astype(complex))[..., 0]


def amplitude(params, x):
    z = reference.network(params, x)
    return jax.lax.complex(z[..., 0], z[..., 1])


class Problem:
    """A model on a batch, its A in float64, and solves that are compiled once."""

    def __init__(
        self,
        model_fn,
        params,
        batch,
        likelihood,
        block_size=None,
        sharding=None,
        **options,
    ):
        arguments = (model_fn, params, batch, likelihood)
        self.params = params
        self.root = columns(*arguments, **options).astype(float)
        u, s, v = np.linalg.svd(self.root, full_matrices=False)
        rank = int((s > 1e-7 * s[0]).sum())
        self.u, self.s, self.v = u[:, :rank], s[:rank], v[:rank].T

        @functools.partial(jax.jit, static_argnames="with_coefficients")
        def solve(g, w, damping, with_coefficients):
            fisher = ngd.linearize_fisher(*arguments, **options)
            rhs = ravel_real(params)[1](g)
            like = jax.eval_shape(lambda: fisher.sqrt_matvec(params))
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
            coefficients = ravel_real(zeros)[1](w) if with_coefficients else None
            solution = ngd.solve_scaled(
                ngd.SampleSpace(block_size, sharding=sharding),
                fisher,
                ngd.RightHandSide(rhs, coefficients=coefficients),
                damping=damping,
            )
            return ravel_real(solution.direction)[0], solution.info

        self._solve = solve

    def draw(self, rng, kind):
        """w, g and a function from λ to the truth."""
        w = rng.normal(size=len(self.root)) * (kind != "outside")
        z = rng.normal(size=self.root.shape[1]) * (kind != "inside")
        for _ in range(3):
            z = z - self.v @ (self.v.T @ z)
        along = self.u.T @ w

        def truth(damping):
            outside = z / damping if damping else 0 * z
            return self.v @ (self.s / (self.s**2 + damping) * along) + outside

        return w, self.v @ (self.s * along) + z, truth

    def solve(self, g, w=None, damping=0.0):
        known = w is not None
        w = np.zeros(len(self.root)) if w is None else w
        solution, info = self._solve(jnp.asarray(g), jnp.asarray(w), damping, known)
        assert np.isfinite(solution).all()
        return np.asarray(solution), info

    def error(self, solution, truth):
        return np.linalg.norm(solution - truth) / np.linalg.norm(truth)


def one_device():
    """A mesh on which nothing is exchanged, but everything is done as on many."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, P("data"))


@functools.cache
def problem(name, is_divided=False):
    """Float64; by name, so that each is compiled once."""
    rng = np.random.default_rng(1)

    def network(num_outputs, num_examples=6, num_hidden=8, dtype="float64"):
        params = reference.network_params(
            rng, num_outputs, num_inputs=4, num_hidden=num_hidden, dtype=dtype
        )
        return params, jnp.asarray(rng.normal(size=(num_examples, 4)))

    def duplicated():
        params, x = network(2)
        return params, jnp.concatenate([x, x[:4]])

    first = functools.partial(lambda p, x: reference.network(p, x)[..., 0])
    net, weights = reference.network, jnp.asarray([1.0, 0.0, 3.0, 0.5, 0.0, 1.0])
    targets = jnp.asarray([0, 2, 1, 1, 0, 2])
    make = {
        "gaussian": lambda: (net, *network(2), ngd.Gaussian()),
        "softmax": lambda: (net, *network(3), ngd.Categorical()),
        "duplicates": lambda: (net, *duplicated(), ngd.Gaussian()),
        "few parameters": lambda: (net, *network(3, 12, 2), ngd.Gaussian()),
        "density": lambda: (first, *network(1, 9), ngd.LogDensity()),
        "complex": lambda: (amplitude, *network(2, 7), ngd.LogAmplitude()),
        "holomorphic": lambda: (
            holomorphic,
            *network(1, 7, dtype="complex128"),
            ngd.LogAmplitude(),
        ),
        "residuals": lambda: (residuals, *residual_case(rng, num_hidden=9), RESIDUALS),
        "weights": lambda: (net, *network(3), ngd.Categorical()),
        "empirical": lambda: (net, *network(3), ngd.Categorical()),
        "microbatches": lambda: (net, *network(2), ngd.Gaussian()),
    }
    options = {
        "weights": {"weights": weights, "block_size": 4},
        "empirical": {"kind": "empirical", "targets": targets},
        "microbatches": {"microbatch_size": 4, "block_size": 2},
    }
    sharding = one_device() if is_divided else None
    return Problem(*make[name](), sharding=sharding, **options.get(name, {}))


long = functools.partial(pytest.param, marks=pytest.mark.long)
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
KNOWN = [
    ("softmax", False),
    ("softmax", True),
    ("few parameters", False),
    long("gaussian", False),
    long("duplicates", True),
    long("complex", False),
    long("residuals", False),
    long("microbatches", False),
    slow("gaussian", True),
    slow("duplicates", False),
    slow("few parameters", True),
    slow("complex", True),
    slow("residuals", True),
    slow("density", False),
    slow("holomorphic", False),
    slow("weights", False),
    slow("empirical", False),
]


@pytest.mark.parametrize(("name", "with_coefficients"), KNOWN)
def test_solution_equals_singular_values_at_every_damping(
    name, with_coefficients, x64, rng
):
    case = problem(name)
    kinds = ("inside", "outside", "mixed")
    if len(case.s) == case.root.shape[1]:
        kinds = ("inside",)
    for kind in kinds:
        w, g, truth = case.draw(rng, kind)
        for damping in (1e-12, 1e-8, 1e-4, 1.0):
            solution, info = case.solve(g, w if with_coefficients else None, damping)
            assert case.error(solution, truth(damping)) < 1e-9, (kind, damping)
            # What is outside of the span is divided by λ, and F times its round-off is
            # all that is left: no vector in this precision has a smaller residual.
            length = np.linalg.norm(solution) / np.linalg.norm(g)
            round_off = 1e-14 * (1 + case.s[0] ** 2 * length)
            assert float(info.relative_residual) < max(1e-9, round_off)
            is_small = float(info.relative_residual) <= np.finfo(float).eps ** 0.5
            expected = Status.CONVERGED if is_small else Status.STAGNATED
            assert int(info.status) == expected, (kind, damping)
            assert kind != "inside" or is_small


@pytest.mark.parametrize(
    ("name", "with_coefficients"),
    [
        long("softmax", True),
        long("complex", False),
        slow("duplicates", True),
        slow("density", False),
        slow("weights", False),
    ],
)
def test_divided_solution_equals_singular_values(name, with_coefficients, x64, rng):
    """By CG on the rows of G: with coefficients in null vectors, and in any order."""
    case = problem(name, is_divided=True)
    for kind in ("inside", "mixed"):
        w, g, truth = case.draw(rng, kind)
        for damping in (0.0, 1e-8, 1e-4, 1.0):
            known = w if with_coefficients else None
            solution, info = case.solve(g, known, damping)
            limit = 1e-9 if damping else 1e-6
            assert case.error(solution, truth(damping)) < limit, (kind, damping)
            assert int(info.status) in (Status.CONVERGED, Status.STAGNATED)
            if kind == "inside" and damping:
                assert int(info.status) == Status.CONVERGED, damping
            assert int(info.num_steps) > 0


@pytest.mark.long
def test_too_few_steps_of_a_divided_solve_are_reported(rng):
    params, x = narrow_problem(rng)
    rhs = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)
    # On one device the preconditioner is the matrix itself, but for round-off.
    solver = ngd.SampleSpace(sharding=one_device(), max_steps=1)
    _, info = solve_network(ngd.Categorical(), solver, params, x, rhs, 1e-4)
    assert int(info.status) == Status.MAX_STEPS
    assert int(info.num_steps) == 1
    assert float(info.relative_residual) > 1e-4


def test_a_budget_without_an_iteration_raises():
    with pytest.raises(ValueError, match=r"`max_steps` is for `sharding`.* got 5"):
        ngd.SampleSpace(max_steps=5)


def test_a_sharding_without_mesh_axes_raises():
    with pytest.raises(ValueError, match="that divide the Gram matrix as its only"):
        ngd.SampleSpace(sharding=NamedSharding(one_device().mesh, P()))


@pytest.mark.parametrize("name", ["softmax", slow("gaussian"), slow("duplicates")])
def test_without_damping_the_solution_has_least_norm_and_the_rest_shows(name, x64, rng):
    case = problem(name)
    w, g, truth = case.draw(rng, "inside")
    solution, info = case.solve(g)
    assert case.error(solution, truth(0.0)) < 1e-9
    assert int(info.status) == Status.CONVERGED
    solution, info = case.solve(g, w)
    assert case.error(solution, truth(0.0)) < 1e-6
    _, g, truth = case.draw(rng, "mixed")
    solution, info = case.solve(g)
    assert case.error(solution, truth(0.0)) < 1e-9
    outside = g - case.v @ (case.v.T @ g)
    np.testing.assert_allclose(
        info.relative_residual, np.linalg.norm(outside) / np.linalg.norm(g), rtol=1e-6
    )
    assert int(info.status) == Status.STAGNATED


def test_without_damping_round_off_refuses_no_right_solution(x64):
    """Null vectors in w leave a residual of round-off, by G and by F not the same."""
    case = problem("softmax")
    for seed in range(60):
        w, g, truth = case.draw(np.random.default_rng(seed), "inside")
        solution, info = case.solve(g, w)
        assert case.error(solution, truth(0.0)) < 1e-6, seed
        assert int(info.status) in (Status.CONVERGED, Status.STAGNATED), seed


def test_coefficients_that_miss_a_part_of_the_right_hand_side_do_no_harm(x64, rng):
    case = problem("gaussian")
    w, g, truth = case.draw(rng, "mixed")
    wrong = w + rng.normal(size=len(w))
    for damping in (1e-10, 1e-4, 1.0):
        solution, _ = case.solve(g, wrong, damping)
        assert case.error(solution, truth(damping)) < 1e-9


def test_residual_is_that_of_the_system_asked_for(x64, rng):
    # Eigenvalues of G down to its round-off: no solver is exact here.
    x = jnp.asarray(np.linspace(-1, 1, 12)[:, None] ** np.arange(12)[None])
    fisher = ngd.linearize_fisher(
        lambda w, x: x @ w, jnp.zeros((12, 1)), x, ngd.Gaussian()
    )
    root = np.asarray(x) / np.sqrt(12)
    g = rng.normal(size=12)
    rhs = jnp.asarray(g)[:, None]
    solve = jax.jit(lambda damping: ngd.SampleSpace()(fisher, rhs, damping=damping))
    for damping in (0.0, 1e-14, 1e-9, 1e-3):
        solution, info = solve(damping)
        d = np.asarray(solution)[:, 0]
        residual = g - root.T @ (root @ d) - damping * d
        truth = np.linalg.norm(residual) / np.linalg.norm(g)
        # Below √ε the residual comes from G, otherwise from the products themselves.
        size = 1e-13 * np.linalg.norm(d) / np.linalg.norm(g)
        assert abs(float(info.relative_residual) - truth) < 1e-8 + size


# --- Float32, narrow and mixed dtypes.


def narrow_problem(rng, dtype="float32", num_outputs=3):
    params = reference.network_params(rng, num_outputs, num_hidden=16)
    params["out"][0] = params["out"][0].astype(dtype)
    x = jnp.asarray(rng.normal(size=(6, 2)), jnp.float32)
    return params, x


@functools.partial(jax.jit, static_argnums=(0, 1))
def solve_network(likelihood, solver, params, x, rhs, damping):
    fisher = ngd.linearize_fisher(reference.network, params, x, likelihood)
    return solver(fisher, rhs, damping=damping)


def dense_system(likelihood, params, x, damping):
    """F + λI in float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda p: jnp.asarray(p, float), params)
        root = columns(reference.network, wide, jnp.asarray(x, float), likelihood)
    return root.T @ root + damping * np.eye(root.shape[1])


def dense_truth(likelihood, params, x, g, damping):
    return np.linalg.solve(dense_system(likelihood, params, x, damping), g)


@pytest.mark.parametrize("damping", [1e-4, 1e-2, 1.0])
def test_float32_is_as_good_as_its_precision(damping, rng):
    params, x = narrow_problem(rng)
    rhs = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)
    solution, info = solve_network(
        ngd.Categorical(), ngd.SampleSpace(), params, x, rhs, damping
    )
    g = reference.flat(rhs)
    d = reference.flat(solution)
    truth = dense_truth(ngd.Categorical(), params, x, g, damping)
    error = np.linalg.norm(d - truth) / np.linalg.norm(truth)
    assert error < 2e-5
    # The smaller λ, the longer d, and the more of g - (F + λI) d is round-off: in 40
    # problems of this kind at most 1.9 units, in two modes of the compiler. Above √ε it
    # no longer says CONVERGED, which for λ = 1e-4 is the case in half of them.
    eps = float(jnp.finfo(jnp.float32).eps)
    system = dense_system(ngd.Categorical(), params, x, damping)
    length = np.linalg.norm(system, 2) * np.linalg.norm(d) / np.linalg.norm(g)
    residual = np.linalg.norm(g - system @ d) / np.linalg.norm(g)
    assert residual <= 5 * eps * (1 + length)
    reported = float(info.relative_residual)
    assert reported <= 5 * eps * (1 + length)
    has_converged = int(info.status) == Status.CONVERGED
    assert has_converged == (reported <= eps**0.5)
    assert has_converged or (damping < 1e-2 and int(info.status) == Status.STAGNATED)


@pytest.mark.parametrize("damping", [1e-3, 1e-2, 0.1])
@pytest.mark.parametrize("is_known", [True, False])
def test_small_singular_values_are_not_taken_for_null_in_float32(
    damping, is_known, rng
):
    # More rows than parameters and no gap, as of a wave function near its ground state.
    num_rows, num_params = 200, 150
    u, _ = np.linalg.qr(rng.normal(size=(num_rows, num_params)))
    v, _ = np.linalg.qr(rng.normal(size=(num_params, num_params)))
    s = np.geomspace(50, 1e-5, num_params)
    x = jnp.asarray(np.sqrt(num_rows) * (u * s) @ v.T, jnp.float32)
    known = rng.normal(size=num_params)
    truth = v @ (s / (s**2 + damping) * known)

    @jax.jit
    def solve(x, w):
        params = jnp.zeros((num_params, 1))
        fisher = ngd.linearize_fisher(lambda p, x: x @ p, params, x, ngd.Gaussian())
        rhs = ngd.RightHandSide(fisher.sqrt_rmatvec(w), w if is_known else None)
        return ngd.SampleSpace().solve(fisher, rhs, damping=damping).direction

    d = np.ravel(solve(x, jnp.asarray(u @ known, jnp.float32)[:, None]))
    # The round-off of F, over λ: Cholesky errs by 6e-5 / λ.
    assert np.linalg.norm(d - truth) <= 2e-4 / damping * np.linalg.norm(truth)


@pytest.mark.long
def test_narrow_parameters_keep_their_dtype(rng):
    params, x = narrow_problem(rng, "bfloat16")
    rhs = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)
    solution, info = solve_network(
        ngd.Gaussian(), ngd.SampleSpace(), params, x, rhs, 0.1
    )
    assert jax.tree.map(jnp.result_type, solution) == jax.tree.map(
        jnp.result_type, params
    )
    truth = dense_truth(ngd.Gaussian(), params, x, reference.flat(rhs), 0.1)
    error = np.linalg.norm(reference.flat(solution) - truth) / np.linalg.norm(truth)
    assert error < 0.05
    assert info.relative_residual.dtype == jnp.float32


# --- Units.


def line(scale=1.0):
    """A linear model with rows of about this size."""
    rng = np.random.default_rng(3)
    x = jnp.asarray(scale * rng.normal(size=(4, 6)), jnp.float32)
    return x, jnp.asarray(rng.normal(size=(6, 1)), jnp.float32)


@jax.jit
def solve_line(x, rhs, damping):
    fisher = ngd.linearize_fisher(
        lambda w, x: x @ w, jnp.zeros((6, 1)), x, ngd.Gaussian()
    )
    return ngd.SampleSpace()(fisher, rhs, damping=damping)


@pytest.mark.long
@pytest.mark.parametrize("exponent", [-100, -60, 0, 60, 100])
def test_powers_of_two_in_the_right_hand_side_pass_through(exponent):
    x, rhs = line()
    one, info = solve_line(x, rhs, 0.1)
    other, other_info = solve_line(x, jnp.ldexp(rhs, exponent), 0.1)
    np.testing.assert_array_equal(np.ldexp(one, exponent), other)
    assert int(info.status) == int(other_info.status) == Status.CONVERGED


@pytest.mark.parametrize("scale", [1e-16, 1e-8, 1e8, 1e16])
@pytest.mark.parametrize("damping", [1e-5, 0.1])
def test_units_of_the_model_do_not_matter(scale, damping):
    x, rhs = line()
    one, _ = solve_line(x, rhs, damping)
    other, info = solve_line(scale * x, rhs, damping * scale**2)
    np.testing.assert_allclose(
        np.float64(other) * scale**2, one, atol=1e-4 * np.abs(one).max()
    )
    # A solution of length ‖g‖/λ has a residual of ε/λ in float32.
    expected = Status.CONVERGED if damping == 0.1 else Status.STAGNATED
    assert int(info.status) == expected


def test_zero_right_hand_side_gives_zero():
    x, rhs = line()
    for damping in (0.0, 0.1):
        solution, info = solve_line(x, 0 * rhs, damping)
        assert not np.asarray(solution).any()
        assert float(info.relative_residual) == 0.0
        assert int(info.status) == Status.CONVERGED


def test_model_without_any_slope_is_damped_descent():
    x, rhs = line(0.0)
    solution, info = solve_line(x, rhs, 0.5)
    np.testing.assert_allclose(solution, 2 * rhs, rtol=1e-6)
    solution, info = solve_line(x, rhs, 0.0)
    assert not np.asarray(solution).any()
    assert float(info.relative_residual) == 1.0


@pytest.mark.parametrize("where", ["model", "rhs", "damping"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_input_is_reported_and_never_returned(where, bad):
    x, rhs = line()
    damping = 0.1
    if where == "model":
        x = x.at[1, 2].set(bad)
    elif where == "rhs":
        rhs = rhs.at[3].set(bad)
    else:
        damping = bad
    solution, info = solve_line(x, rhs, damping)
    assert int(info.status) == Status.NON_FINITE
    assert not np.asarray(solution).any()
    assert float(info.relative_residual) == 1.0


# --- Transformations of JAX, and memory.


@pytest.mark.long
def test_vmap_over_damping_equals_a_loop():
    x, rhs = line()
    dampings = jnp.asarray([0.0, 1e-6, 1e-3, 1.0])
    many, infos = jax.vmap(solve_line, in_axes=(None, None, 0))(x, rhs, dampings)
    for i, damping in enumerate(dampings):
        one, info = solve_line(x, rhs, damping)
        np.testing.assert_allclose(many[i], one, atol=1e-5 * np.abs(one).max())
        assert int(infos.status[i]) == int(info.status)


@pytest.mark.long
def test_scan_equals_a_loop():
    x, rhs = line()

    def step(g, damping):
        d, info = solve_line(x, g, damping)
        return d, info.status

    dampings = jnp.asarray([1.0, 0.1])
    last, statuses = jax.lax.scan(step, rhs, dampings)
    expected = rhs
    for damping in dampings:
        expected, _ = solve_line(x, expected, damping)
    np.testing.assert_allclose(last, expected, rtol=1e-5)
    assert not np.asarray(statuses).any()


@pytest.mark.long
def test_memory_is_set_by_the_block_and_not_by_all_rows():
    num_examples, width = 256, 512
    x = jnp.ones((num_examples, 32))
    params = {"w": jnp.ones((32, width)), "v": jnp.ones((width, 1))}
    num_params = 33 * width
    all_rows = 4 * num_examples * num_params

    def model_fn(params, x):
        return jnp.tanh(x @ params["w"]) @ params["v"]

    def temporaries(block_size):
        def solve(params, x):
            fisher = ngd.linearize_fisher(model_fn, params, x, ngd.Gaussian())
            return ngd.SampleSpace(block_size)(fisher, params, damping=1e-3)

        compiled = jax.jit(solve).lower(params, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # Two blocks of rows, what they are made from, a few matrices, activations.
    beside = 16 * 4 * num_examples**2 + 16 * 4 * num_examples * width
    small = temporaries(8)
    assert small < 6 * 8 * 4 * num_params + beside
    assert small < all_rows / 2
    assert temporaries(num_examples) > all_rows / 2


# --- Models that mix examples, and mistakes.


MARKS = {
    "batch_norm_before_a_zero_head": [],
    "batch_norm_with_a_large_offset": pytest.mark.long,
    "output_mean": [],
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=MARKS.get(name, pytest.mark.slow))
        for name in dense_models.MIXING
        # Here the head is all that the solution knows of.
        if name != "mixing_behind_a_large_scale"
    ],
)
@float64_is_long
def test_models_that_mix_examples_are_refused(name, dtype, rng):
    model_fn = dense_models.MIXING[name]
    params, batch = dense_models.make(rng, dtype)

    @jax.jit
    def solve(params):
        fisher = ngd.linearize_fisher(model_fn, params, batch, ngd.Gaussian())
        return ngd.SampleSpace()(fisher, params, damping=0.1)

    solution, info = solve(params)
    assert float(info.relative_residual) == 1.0
    assert not ravel_pytree(solution)[0].any()
    if name == "nothing_alone":
        assert int(info.status) == Status.NON_FINITE
    else:
        assert int(info.status) == Status.NOT_SEPARABLE
        assert "Cholesky" in Status.NOT_SEPARABLE.message


@pytest.mark.parametrize(
    "name",
    long_unless(
        ("layer_norm", "dropout_with_keys_of_examples"), dense_models.SEPARABLE.keys()
    ),
)
@float64_is_long
def test_models_that_do_not_mix_are_not_refused(name, dtype, rng):
    model_fn = dense_models.SEPARABLE[name]
    params, batch = dense_models.make(rng, dtype)

    @jax.jit
    def solve(params):
        fisher = ngd.linearize_fisher(model_fn, params, batch, ngd.Gaussian())
        return ngd.SampleSpace()(fisher, params, damping=1e-3)

    _, info = solve(params)
    assert int(info.status) == Status.CONVERGED


def test_without_verification_the_rows_are_trusted(rng):
    params, batch = dense_models.make(rng, "float32")

    @jax.jit
    def solve(params):
        fisher = ngd.linearize_fisher(
            dense_models.output_mean, params, batch, ngd.Gaussian()
        )
        return ngd.SampleSpace(verify=False)(fisher, params, damping=0.1)

    solution, info = solve(params)
    assert ravel_pytree(solution)[0].any()
    assert int(info.status) == Status.CONVERGED


@pytest.mark.long
def test_two_weights_with_one_bias_are_solved(x64, rng):
    params = {
        "W": jnp.asarray(rng.normal(size=(12, 16)) * 0.3),
        "U": jnp.asarray(rng.normal(size=(14, 16)) * 0.3),
        "b": jnp.zeros(16),
    }
    batch = {
        "x": jnp.asarray(rng.normal(size=(5, 12))),
        "h": jnp.asarray(rng.normal(size=(5, 14))),
    }

    def model_fn(params, batch):
        sums = batch["x"] @ params["W"] + batch["h"] @ params["U"] + params["b"][None]
        return jnp.tanh(sums).sum(-1)

    likelihood = ngd.Gaussian(event_ndims=0)
    root = columns(model_fn, params, batch, likelihood)
    g = root.T @ rng.normal(size=5)

    @jax.jit
    def solve(g):
        fisher = ngd.linearize_fisher(model_fn, params, batch, likelihood)
        return ngd.SampleSpace()(fisher, ravel_pytree(params)[1](g), damping=0.01)

    d, info = solve(g)
    truth = np.linalg.solve(root.T @ root + 0.01 * np.eye(len(g)), g)
    np.testing.assert_allclose(ravel_pytree(d)[0], truth, rtol=1e-9, atol=1e-10)
    assert int(info.status) == Status.CONVERGED


@pytest.mark.long
def test_coefficients_of_another_shape_raise():
    x, rhs = line()
    fisher = ngd.linearize_fisher(
        lambda w, x: x @ w, jnp.zeros((6, 1)), x, ngd.Gaussian()
    )
    wrong = ngd.RightHandSide(rhs, coefficients=jnp.ones((3, 1)))
    with pytest.raises(ValueError, match="`coefficients` must have the shapes"):
        ngd.solve_scaled(ngd.SampleSpace(), fisher, wrong, damping=0.1)
