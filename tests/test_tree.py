"""Tree operations: wide sums, kept dtypes, and errors that say where."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngd_jax import tree
from tests import reference

MIXED = ("bfloat16", "float16", "float32")


def mixed_tree(rng, dtypes=MIXED):
    def draw(shape, dtype):
        return jnp.asarray(rng.normal(size=shape), dtype)

    return {
        "a": draw((2, 3), dtypes[0]),
        "nothing": {},
        "b": [draw((), dtypes[1 % len(dtypes)]), draw((4,), dtypes[2 % len(dtypes)])],
        "empty": jnp.zeros((0, 2)),
    }


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (["bfloat16"], "float32"),
        (["float16", "float32"], "float32"),
        (["bfloat16", "float64"], "float64"),
        (["complex64"], "float32"),
        (["complex128", "float32"], "float64"),
        ([], "float32"),
    ],
)
def test_sums_are_taken_in_the_widest_real_dtype(dtypes, expected, x64):
    leaves = [jnp.zeros((), dtype) for dtype in dtypes]
    assert tree.accumulator_dtype(leaves) == expected
    assert tree.vdot(leaves, leaves).dtype == expected
    assert tree.max_abs(leaves).dtype == expected


def test_widening_leaves_wide_leaves_alone(x64, rng):
    dtypes = ("bfloat16", "float64", "complex64")
    values = mixed_tree(rng, dtypes)
    wide = tree.widen(values)
    assert jax.tree.structure(wide) == jax.tree.structure(values)
    assert [x.dtype.name for x in jax.tree.leaves(wide)] == [
        "float32",
        "float64",
        "complex64",
        "float64",
    ]
    np.testing.assert_array_equal(reference.flat(wide), reference.flat(values))
    zeros = tree.zeros_like_wide(values)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(zeros)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(wide)
    ]
    assert not reference.flat(zeros).any()


def test_size_counts_scalars(rng):
    assert tree.size(mixed_tree(rng)) == 11
    assert tree.size({}) == 0


@given(seed=st.integers(0, 2**32 - 1))
def test_vdot_equals_numpy_on_mixed_and_complex_trees(seed):
    rng = np.random.default_rng(seed)
    a = mixed_tree(rng)
    b = mixed_tree(rng, ("float32", "bfloat16", "float16"))
    a["c"] = jnp.asarray(rng.normal(size=3) + 1j * rng.normal(size=3), "complex64")
    b["c"] = jnp.asarray(rng.normal(size=3) + 1j * rng.normal(size=3), "complex64")
    truth = np.vdot(reference.flat(a), reference.flat(b)).real
    size = np.linalg.norm(reference.flat(a)) * np.linalg.norm(reference.flat(b))
    assert abs(float(tree.vdot(a, b)) - truth) <= 1e-6 * size


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sums_over_narrow_dtypes_do_not_stop_growing(dtype):
    ones = {"w": jnp.ones((100, 700), dtype)}
    assert float(tree.vdot(ones, ones)) == 70_000


@pytest.mark.parametrize("alpha", [0.3, jnp.float32(0.3), np.float64(0.3)])
def test_scaling_and_adding_keep_dtypes_and_round_once(alpha, rng):
    x, y = mixed_tree(rng), mixed_tree(rng)
    results = {
        "axpy": (tree.axpy(alpha, x, y), lambda a, b: 0.3 * a + b),
        "scale": (tree.scale(alpha, y), lambda _, b: 0.3 * b),
        "divide": (tree.divide(y, alpha), lambda _, b: b / 0.3),
    }
    for result, truth_fn in results.values():
        assert jax.tree.structure(result) == jax.tree.structure(y)
        for leaf, a, b in zip(
            *(jax.tree.leaves(t) for t in (result, x, y)), strict=True
        ):
            assert leaf.dtype == b.dtype
            truth = truth_fn(np.asarray(a, float), np.asarray(b, float))
            half_unit = float(jnp.finfo(leaf.dtype).eps) / 2
            np.testing.assert_allclose(
                np.asarray(leaf, float), truth, rtol=1.01 * half_unit, atol=1e-6
            )


def test_complex_leaves_take_real_factors():
    z = {"z": jnp.array([1.0 + 2.0j])}
    for result, truth in (
        (tree.scale(2.0, z), 2 + 4j),
        (tree.axpy(jnp.float32(2.0), z, z), 3 + 6j),
        (tree.divide(z, 2.0), 0.5 + 1j),
    ):
        assert result["z"].dtype == jnp.complex64
        np.testing.assert_allclose(result["z"], [truth])


def test_division_is_exact_where_the_inverse_overflows():
    smallest = jnp.float32(1.5e-38)
    quotient = tree.divide({"w": jnp.array([1.5e-38, 3e-38])}, smallest)
    np.testing.assert_allclose(quotient["w"], [1, 2], rtol=1e-6)


def test_largest_entry_is_zero_without_entries_and_nan_with_nan():
    assert float(tree.max_abs({})) == 0.0
    assert float(tree.max_abs([jnp.zeros((0, 3))])) == 0.0
    assert float(tree.max_abs([jnp.array([1.0, -3.0]), jnp.array(2.0)])) == 3.0
    assert float(tree.max_abs(jnp.array([3.0 + 4.0j]))) == 5.0
    for leaves in ([jnp.nan, 1.0], [1.0, jnp.nan]):
        assert np.isnan(tree.max_abs([jnp.asarray(x) for x in leaves]))
    assert np.isinf(tree.max_abs([jnp.array([1.0, -jnp.inf])]))


def test_all_finite_finds_every_bad_entry():
    good = {"a": jnp.ones(3), "b": jnp.ones((), jnp.bfloat16)}
    assert bool(tree.all_finite(good))
    assert bool(tree.all_finite({}))
    for bad in (np.nan, np.inf, -np.inf):
        assert not bool(tree.all_finite(good | {"a": jnp.array([1.0, bad, 1.0])}))
        assert not bool(tree.all_finite(good | {"b": jnp.asarray(bad, jnp.bfloat16)}))
    assert not bool(tree.all_finite(jnp.array([1.0 + 1j * np.inf])))


@pytest.mark.parametrize("predicate", [True, False])
def test_selection_never_mixes_and_keeps_dtypes(predicate):
    good = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.zeros(())}
    bad = {"a": jnp.full(3, jnp.nan), "b": jnp.asarray(jnp.inf)}
    chosen = tree.select(predicate, good, jax.tree.map(jnp.ones_like, bad))
    expected = 0.0 if predicate else 1.0
    assert float(chosen["b"]) == expected
    assert bool(tree.all_finite(tree.select(True, good, bad)))
    assert not bool(tree.all_finite(tree.select(False, good, bad)))


@pytest.mark.parametrize("large", [(), (300, 300), (2**16,)])
def test_unpacking_undoes_packing(large, rng):
    values = mixed_tree(rng) | {"large": jnp.asarray(rng.normal(size=large))}
    packed, unpack = tree.pack(values)
    restored = unpack(packed)
    assert jax.tree.structure(restored) == jax.tree.structure(values)
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(values), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x, float), np.asarray(y, float))


def test_packing_joins_small_leaves_and_leaves_large_ones(rng):
    values = [jnp.ones(5), jnp.ones(2**16), jnp.ones(3), jnp.ones(2, jnp.bfloat16)]
    packed, unpack = tree.pack(values)
    assert sorted(x.size for x in jax.tree.leaves(packed)) == [2, 8, 2**16]
    doubled = unpack(jax.tree.map(lambda x: 2 * x, packed))
    assert all(bool(jnp.all(x == 2)) for x in doubled)
    assert [x.shape for x in doubled] == [x.shape for x in values]


def test_an_empty_tree_is_packed():
    packed, unpack = tree.pack({"nothing": {}})
    assert jax.tree.leaves(packed) == []
    assert unpack(packed) == {"nothing": {}}


def test_trees_that_differ_raise_where_they_differ():
    like = {"a": {"w": jnp.ones((2, 3))}, "b": jnp.ones(())}
    tree.check_like(like, like, name="updates", like_name="params")
    with pytest.raises(ValueError, match="`updates` must have the tree structure of"):
        tree.check_like({"a": 1.0}, like, name="updates", like_name="params")
    wrong = {"a": {"w": jnp.ones((3, 2))}, "b": jnp.ones(())}
    match = r"`updates`.*`params`: at \['a'\]\['w'\] got \(3, 2\), expected \(2, 3\)"
    with pytest.raises(ValueError, match=match):
        tree.check_like(wrong, like, name="updates", like_name="params")
    with pytest.raises(ValueError, match="at the root got"):
        tree.check_like(jnp.ones(2), jnp.ones(3), name="x", like_name="y")


@pytest.mark.parametrize(
    "leaf", [jnp.arange(3), jnp.array(True), jax.random.key(0)], ids=str
)
def test_parameters_that_cannot_be_differentiated_raise(leaf):
    with pytest.raises(TypeError, match=r"`params` must hold floating.*\['count'\]"):
        tree.check_parameters({"w": jnp.ones(2), "count": leaf})
    tree.check_parameters({"w": jnp.ones(2, jnp.bfloat16), "z": jnp.ones(1, complex)})


@pytest.mark.parametrize("shape", [(40_000,), (400, 100)])
def test_largest_entry_of_a_long_leaf_is_nan_where_one_entry_is(shape):
    # The maximum of jaxlib 0.10 loses it from 2^15 entries on.
    values = np.ones(shape, np.float32)
    values.reshape(-1)[12_345] = np.nan
    assert np.isnan(jax.jit(tree.max_abs)({"w": jnp.asarray(values)}))
    values.reshape(-1)[12_345] = -3.0
    assert jax.jit(tree.max_abs)({"w": jnp.asarray(values)}) == 3.0


def test_norm_has_derivative_zero_at_zero():
    zero = {"w": jnp.zeros(3), "b": jnp.zeros(())}
    value, gradient = jax.value_and_grad(tree.norm)(zero)
    assert value == 0
    for leaf in jax.tree.leaves(gradient):
        np.testing.assert_array_equal(leaf, jnp.zeros_like(leaf))
