"""Run by test_sharding with 8 devices: the Gram matrix of `SampleSpace` by its rows.

Prints one line of JSON: for each kind of mesh axes and each way to the matrix, the
largest difference from that of one device, and what a device has and does; and the same
of whole solves.
"""

import contextlib
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ngd_jax as ngd
from ngd_jax.gram import divided_gram, gram
from tests.sharded_curvature import network
from tests.sharded_program import largest

NUM_EXAMPLES, WIDTHS = 256, [8, 32, 2]
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
GAUSSIAN, DENSITY = ngd.Gaussian(), ngd.LogAmplitude()


def numbers(shape):
    return int(np.prod([int(n) for n in shape.split(",") if n]))


def costs(compiled):
    """Of one device: operations, bytes beside its arguments, its largest exchange."""
    memory = compiled.memory_analysis()
    pattern = r"= \(?\w+\[([\d,]*)\].* (?:all-gather|all-to-all|all-reduce)\("
    found = re.findall(pattern, compiled.as_text())
    return {
        "operations": (compiled.cost_analysis() or {})["flops"],
        "bytes": memory.temp_size_in_bytes + memory.output_size_in_bytes,
        "exchanged": max(map(numbers, found), default=0),
    }


def fisher_of(likelihood, params, x):
    _, logits = network(WIDTHS, np.random.default_rng(0))

    def model_fn(params, x):
        outputs = logits(params, x)
        return outputs.sum(-1) if likelihood is DENSITY else outputs

    return ngd.linearize_fisher(model_fn, params, x, likelihood)


def compare(kind, alone, divided, arguments):
    """`divided(sharding, *arguments)` on 8 devices against `alone(*arguments)`."""
    compiled = jax.jit(alone).lower(*arguments).compile()
    truth, own = jax.device_get(compiled(*arguments)[0]), costs(compiled)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh) if kind is EXPLICIT else contextlib.nullcontext():
        by_rows, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
        params, x, *others = arguments
        there = jax.device_put((params, *others), everywhere)
        there = (there[0], jax.device_put(x, by_rows), *there[1:])
        compiled = jax.jit(lambda *y: divided(by_rows, *y)).lower(*there).compile()
        found, *info = jax.device_get(compiled(*there))
    error = largest(jax.tree.map(np.subtract, truth, found)) / largest(truth)
    there = costs(compiled)
    return {
        "difference": error,
        "exchanged": there["exchanged"],
        "operations": there["operations"] / own["operations"],
        "bytes": there["bytes"] / own["bytes"],
        "info": [float(x) for x in jax.tree.leaves(info)],
    }


def matrices(params, x):
    """Of each way to the matrix, on each kind of axes."""

    def permuted(matrix, order):
        return matrix[order][:, order]

    found = {}
    for name, likelihood, size in (
        ("layers", GAUSSIAN, None),
        ("covariance", DENSITY, None),
        ("blocks", GAUSSIAN, 64),
    ):
        for kind in (AUTO, EXPLICIT):
            found[f"{name} {kind.name}"] = compare(
                kind,
                lambda *y, likelihood=likelihood, size=size: [
                    gram(fisher_of(likelihood, *y), size)
                ],
                lambda sharding, *y, likelihood=likelihood, size=size: [
                    divided_gram(fisher_of(likelihood, *y), sharding, size)[0]
                ],
                (params, x),
            )
    return found


def solves(params, x):
    """Of a whole solve, with damping for few steps: 8 devices share a core here."""
    fisher = fisher_of(GAUSSIAN, params, x)
    rng = np.random.default_rng(2)
    w = jnp.asarray(rng.normal(size=(NUM_EXAMPLES, WIDTHS[-1])))
    g = fisher.sqrt_rmatvec(w)

    def solve(sharding, params, x, g, w, *, is_known, **options):
        fisher = fisher_of(GAUSSIAN, params, x)
        rhs = ngd.RightHandSide(g, coefficients=w if is_known else None)
        solver = ngd.SampleSpace(sharding=sharding, **options)
        found = ngd.solve_scaled(solver, fisher, rhs, damping=1.0)
        return found.direction, found.info

    found = {}
    for kind, options in (
        (AUTO, {"is_known": False}),
        (EXPLICIT, {"is_known": True, "block_size": 64}),
    ):
        found[f"solve {kind.name}"] = compare(
            kind,
            lambda *y, options=options: solve(None, *y, **options),
            lambda *y, options=options: solve(*y, **options),
            (params, x, g, w),
        )
    return found


def main():
    jax.config.update("jax_enable_x64", True)
    assert len(jax.devices()) == 8
    params, _ = network(WIDTHS, np.random.default_rng(0))
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(NUM_EXAMPLES, WIDTHS[0])))
    print(json.dumps(matrices(params, x) | solves(params, x)))


if __name__ == "__main__":
    main()
