"""Run by test_sharding with 8 devices: every solver, spread over a mesh or not.

Prints one line of JSON: for each solver and layout the largest difference to the step
on one device, and the largest number of per-example entries that a collective gathers.
"""

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import ngd_jax as ngd
from tests import reference

# A number that no parameter has as a factor of its shape, so that it shows in HLO.
NUM_EXAMPLES = 56
# Solved to the end: unfinished solves amplify round-off a million times.
SOLVERS = {
    "cg": lambda: ngd.CG(200, rtol=1e-12),
    "jacobi": lambda: ngd.CG(200, rtol=1e-12, preconditioner=ngd.Jacobi()),
    "nystrom": lambda: ngd.CG(
        200, rtol=1e-12, preconditioner=ngd.Nystrom(rank=8, key=jax.random.key(0))
    ),
    "kronecker": lambda: ngd.CG(
        200, rtol=1e-12, preconditioner=ngd.Kronecker(jax.random.key(0))
    ),
    "lsmr": lambda: ngd.LSMR(120, rtol=1e-12),
    "sample_space": ngd.SampleSpace,
    "cholesky": ngd.Cholesky,
}
LAYOUTS = ("batch", "batch and parameters")


def model_fn(params, batch):
    return reference.network(params, batch["x"])


def output_loss_fn(logits, batch):
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return losses.mean()


def make_step(solver):
    in_output_space = getattr(solver, "uses_coefficients", False)
    tx = ngd.natural_gradient(
        None,
        model_fn,
        ngd.Categorical(),
        max_kl=1e-2,
        damping=1e-2,
        solver=solver,
        warm_start=0.5,
        output_loss_fn=output_loss_fn if in_output_space else None,
    )

    def step(params, state, batch):
        grads = jax.grad(lambda p: output_loss_fn(model_fn(p, batch), batch))(params)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    return tx, jax.jit(step)


def gathered(hlo):
    """Entries of the largest all-gather or all-to-all result with a batch axis."""
    largest = 0
    for line in hlo.splitlines():
        found = re.search(r"= \(?\w+\[([\d,]*)\].* (all-gather|all-to-all)\(", line)
        if found and found.group(1):
            shape = [int(n) for n in found.group(1).split(",")]
            if NUM_EXAMPLES in shape:
                largest = max(largest, int(np.prod(shape)))
    return largest


def largest(values):
    return float(max(jax.tree.leaves(jax.tree.map(lambda x: jnp.abs(x).max(), values))))


def main(names):
    jax.config.update("jax_enable_x64", True)
    assert len(jax.devices()) == 8
    rng = np.random.default_rng(0)
    params = reference.network_params(rng, 4, num_hidden=8, dtype=jnp.float64)
    batch = {
        "x": jnp.asarray(rng.normal(size=(NUM_EXAMPLES, 2)), jnp.float64),
        "y": jnp.asarray(rng.integers(0, 4, NUM_EXAMPLES)),
    }
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))

    def put(values, spec):
        return jax.device_put(values, NamedSharding(mesh, spec))

    spread_batch = jax.tree.map(lambda x: put(x, P("data")), batch)
    whole = jax.tree.map(lambda p: put(p, P()), params)
    spread = {**whole, "hidden": dict(whole["hidden"]), "out": list(whole["out"])}
    spread["hidden"]["w"] = put(params["hidden"]["w"], P(None, "model"))
    spread["out"][0] = put(params["out"][0], P("model", None))
    starts = dict(zip(LAYOUTS, (whole, spread), strict=True))

    results = {}
    for name in names:
        tx, step = make_step(SOLVERS[name]())
        truth, _ = step(params, tx.init(params), batch)
        for layout, start in starts.items():
            arguments = (start, tx.init(start), spread_batch)
            compiled = step.lower(*arguments).compile()
            moved, state = compiled(*arguments)
            results[f"{name}, {layout}"] = {
                "difference": largest(jax.tree.map(jnp.subtract, truth, moved)),
                "step": largest(jax.tree.map(jnp.subtract, truth, params)),
                "gathered": gathered(compiled.as_text()),
                "devices": len(moved["hidden"]["w"].sharding.device_set),
                "status": int(state.info.status),
            }
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
