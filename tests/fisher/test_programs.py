"""Layouts, read off a program, against the numbers that it returns."""

import jax.numpy as jnp
import numpy as np

from ngd_jax.fisher.programs import join, read_program


def places(ranges):
    """The sums of ranges, the last one fastest."""
    found = np.zeros(1, int)
    for size, stride in ranges:
        found = (found[:, None] + stride * np.arange(size)).ravel()
    return found


def moved_at_random(rng, x, num_steps):
    """By reshapes that split and join axes, and by transposes."""
    for _ in range(num_steps):
        if rng.random() < 0.5:
            x = x.transpose(tuple(int(axis) for axis in rng.permutation(x.ndim)))
            continue
        factors = [k for n in x.shape for k in ([2, n // 2] if n in (4, 6) else [n])]
        cuts = np.flatnonzero(rng.random(len(factors) - 1) < 0.6) + 1
        x = x.reshape([int(np.prod(part)) for part in np.split(factors, cuts)])
    return x


def test_layouts_are_those_of_the_numbers_themselves(rng):
    start, ends = jnp.arange(72).reshape(4, 3, 6), []
    for _ in range(12):
        program = read_program(lambda x: [moved_at_random(rng, x, 5)], start)
        (variable,) = program.jaxpr.outvars
        source, axes = program.layout(variable)
        before, after = map(np.asarray, program.function([source, variable])(start))
        assert [len(places(axis)) for axis in axes] == list(after.shape)
        flat = [one for axis in axes for one in axis]
        for ranges in (flat, join(flat)):
            np.testing.assert_array_equal(before.ravel()[places(ranges)], after.ravel())
        ends.append(source is program.before_layout(variable))
    assert sum(ends) >= 6  # but where a reshape tears an axis apart
