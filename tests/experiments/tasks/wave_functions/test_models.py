"""Networks on lattices: their symmetries, and complex log ψ of real parameters."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.tasks.wave_functions.ansatz import GroupConvolutional
from experiments.tasks.wave_functions.hamiltonians import make_square_heisenberg
from experiments.tasks.wave_functions.lattices import Lattice
from experiments.tasks.wave_functions.models import make_model, symmetries
from experiments.tasks.wave_functions.settings import ModelConfig
from tests.marks import long_unless

SQUARE = Lattice((4, 4))
NEIGHBOURS = SQUARE.translations((2, 2))[1:]


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def network(name, *names, **settings):
    """Log ψ of random parameters on the square of 16 spins, and 5 configurations."""
    kernel_size = 3 if name in ("cnn", "gcnn") else None
    patch_size = 2 if name == "transformer" else None
    config = ModelConfig(
        name=name,
        features=[4] if name == "rbm" else [4, 4],
        kernel_size=kernel_size,
        patch_size=patch_size,
        complex_parameters=settings.get("complex_parameters", False),
        phase=settings.get("phase", False),
        symmetries=list(names),
    )
    init_fn, model_fn = make_model(config, make_square_heisenberg(16))
    leaves, structure = jax.tree.flatten(init_fn(jax.random.key(0)))
    rng = np.random.default_rng(0)
    leaves = [leaf + 0.3 * rng.normal(size=leaf.shape) for leaf in leaves]
    params = jax.tree.unflatten(structure, leaves)
    spins = rng.choice([-1.0, 1.0], size=(5, 16))
    log_psi_fn = jax.jit(lambda spins: model_fn(params, {"spins": spins}))
    return log_psi_fn, spins, params, symmetries(config, SQUARE)


def is_invariant(log_psi_fn, spins, permutations):
    expected = log_psi_fn(spins)
    return [
        np.allclose(log_psi_fn(spins[:, row]), expected, atol=1e-12)
        for row in permutations
    ]


@pytest.mark.parametrize(
    ("name", "names", "translated", "turned", "flipped"),
    [
        ("rbm", (), False, False, False),
        ("rbm", ("translations",), True, False, False),
        ("rbm", ("translations", "point_group", "flip"), True, True, True),
        ("cnn", (), True, False, False),
        ("cnn", ("point_group",), True, True, False),
        ("gcnn", (), True, True, True),
        ("transformer", (), False, False, False),
        ("transformer", ("translations",), True, False, False),
        pytest.param(
            "transformer",
            ("translations", "point_group", "flip"),
            True,
            True,
            True,
            marks=pytest.mark.long,
        ),
        ("mlp", ("flip",), False, False, True),
    ],
)
def test_networks_have_the_symmetries_asked_for(
    name, names, translated, turned, flipped
):
    log_psi_fn, spins, _, (group, flips) = network(name, *names)
    found = is_invariant(log_psi_fn, spins, NEIGHBOURS)
    assert found == [translated] * len(NEIGHBOURS)
    # Without translations, an image may differ by one from that around another site.
    found = is_invariant(log_psi_fn, spins, SQUARE.point_group[1:])
    assert all(found) == turned
    same = np.allclose(log_psi_fn(-spins), log_psi_fn(spins), atol=1e-12)
    assert same == flipped
    assert all(is_invariant(log_psi_fn, spins, group[:: len(group) // 4 or 1]))
    assert flips == flipped
    sizes = {"rbm": 1, "mlp": 1, "cnn": 16, "gcnn": 16, "transformer": 4}
    num_translations = 16 if translated else sizes[name]
    assert len(group) == num_translations * (8 if turned else 1)


@pytest.mark.parametrize("is_complex", long_unless([False], [False, True]))
def test_symmetric_psi_is_the_mean_over_the_images(is_complex):
    plain, spins, *_ = network("rbm", complex_parameters=is_complex)
    symmetric, *_ = network(
        "rbm", "translations", "flip", complex_parameters=is_complex
    )
    field = spins.reshape(5, 4, 4)
    images = [
        sign * np.roll(field, shift, axis=(1, 2)).reshape(5, 16)
        for shift in itertools.product(range(4), repeat=2)
        for sign in (1, -1)
    ]
    expected = np.mean([np.exp(plain(image)) for image in images], axis=0)
    np.testing.assert_allclose(np.exp(symmetric(spins)), expected, rtol=1e-12)


@pytest.mark.parametrize("phase", [False, True])
def test_group_convolutions_are_sums_over_sites_and_turns(phase):
    log_psi_fn, spins, params, _ = network("gcnn", phase=phase)
    turns = [
        np.array(rows) * np.array(signs)[:, None]
        for rows in ([[1, 0], [0, 1]], [[0, 1], [1, 0]])
        for signs in itertools.product((1, -1), repeat=2)
    ]
    features = {}
    window = list(itertools.product((-1, 0, 1), repeat=2))

    def number(x):
        return (x[0] % 4) * 4 + x[1] % 4

    def turned(g, site):
        return window.index(tuple(np.linalg.inv(g).round().astype(int) @ site))

    first, others = params["kernel_0"], params["kernel_1"]
    sites = list(itertools.product(range(4), repeat=2))
    for site in sites:
        at = spins[:, number(site)][:, None]
        for j, g in enumerate(turns):
            sums = sum(
                at * spins[:, number(np.add(site, x))][:, None] * first[turned(g, x), 0]
                for x in window
            )
            features[site, j] = np.tanh(sums + params["bias_0"])
    totals = np.zeros((len(turns), 5, 4))
    for site in sites:
        for j, g in enumerate(turns):
            sums = params["bias_1"]
            for k, h in enumerate(turns):
                product = np.linalg.inv(g) @ h
                (of_group,) = (i for i, t in enumerate(turns) if (t == product).all())
                for x in window:
                    there = tuple(np.add(site, x) % 4)
                    sums = sums + features[there, k] @ others[turned(g, x), of_group]
            totals[j] += features[site, j] + np.tanh(sums)
    last = params["Dense_0"]
    if phase:
        parts = totals @ last["kernel"] + last["bias"]
        factors = 1 + (parts[..., 1] + 1j * parts[..., 2]) / np.sqrt(len(sites))
        expected = np.mean(np.exp(parts[..., 0]) * factors, axis=0)
        np.testing.assert_allclose(np.exp(log_psi_fn(spins)), expected, rtol=1e-10)
    else:
        expected = totals.mean(axis=0) @ last["kernel"][:, 0] + last["bias"][0]
        np.testing.assert_allclose(log_psi_fn(spins), expected, rtol=1e-10)


@pytest.mark.parametrize("shape", [(3,), (4, 4), (2, 4, 4), (2,) * 4])
def test_group_convolutions_in_float32_are_those_in_float64(shape):
    lattice = Lattice(shape)
    spins = np.random.default_rng(0).choice([-1.0, 1.0], size=(5, lattice.num_sites))
    exact = GroupConvolutional((2, 2), 3, jnp.float64, lattice)
    rounded = GroupConvolutional((2, 2), 3, jnp.float32, lattice)
    params = exact.init(jax.random.key(0), spins)
    low = jax.tree.map(jnp.float32, params)

    def rows(module, params, spins):
        def one(spins):
            return jax.value_and_grad(lambda p: module.apply(p, spins[None])[0])(params)

        return jax.jit(jax.vmap(one))(spins)

    chex.assert_trees_all_close(
        rows(rounded, low, np.float32(spins)),
        rows(exact, params, spins),
        rtol=1e-4,
        atol=1e-6,
    )


@pytest.mark.parametrize("name", ["mlp", "cnn", "gcnn", "transformer"])
def test_phases_are_complex_numbers_of_real_parameters(name):
    log_psi_fn, spins, params, _ = network(name, phase=True)
    log_psi = log_psi_fn(spins)
    assert log_psi.dtype == complex
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(float)}
    assert np.ptp(log_psi.imag) > 1e-3
    assert np.ptp(log_psi.real) > 1e-3
