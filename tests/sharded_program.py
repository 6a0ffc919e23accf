"""Run by test_sharding with 8 devices: every solver, spread over a mesh or not.

Prints one line of JSON: for each solver and layout the largest difference from the step
on one device, and the largest number of per-example entries that a collective gathers.
With explicit mesh axes also products and KL of the Fisher, microbatches among them.
"""

import contextlib
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import ngd_jax as ngd
from tests import reference

# A number that no parameter has as a factor of its shape, so that it shows in HLO.
NUM_EXAMPLES = 56
# Solved to the end: unfinished solves amplify round-off a million times.
SOLVERS = {
    "default": None,
    "cg": ngd.CG(200, rtol=1e-12, warm_start=0.5),
    "nystrom": ngd.CG(
        200,
        rtol=1e-12,
        preconditioner=ngd.contrib.Nystrom(rank=8, key=jax.random.key(0)),
    ),
    "jacobi": ngd.CG(200, rtol=1e-12, preconditioner=ngd.contrib.Jacobi()),
    "kronecker": ngd.CG(200, rtol=1e-12, preconditioner=ngd.Kronecker()),
    "kfac": ngd.KFAC(),
    "lsmr": ngd.LSMR(120, rtol=1e-12),
    "sample_space": ngd.SampleSpace(),
    "cholesky": ngd.Cholesky(),
}
QUICK = ("cg", "kronecker", "sample_space")
LAYOUTS = ("batch", "batch and parameters", "explicit batch")


def model_fn(params, batch):
    return reference.network(params, batch["x"])


def loss_of_outputs(logits, batch):
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return losses.mean()


def make_step(solver):
    options = {} if solver is None else {"solver": solver}
    if solver is not None and solver.uses_coefficients:
        options["loss_fn"] = loss_of_outputs
    tx = ngd.natural_gradient(
        None,
        model_fn,
        ngd.Categorical(),
        max_kl=1e-2,
        damping=1e-2,
        **options,
    )

    def step(params, state, batch):
        grads = jax.grad(lambda p: loss_of_outputs(model_fn(p, batch), batch))(params)
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
    return float(max(np.abs(x).max() for x in jax.tree.leaves(values)))


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
    explicit = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))

    def put(values, spec, mesh=mesh):
        return jax.tree.map(
            lambda x: jax.device_put(x, NamedSharding(mesh, spec)), values
        )

    whole = put(params, P())
    spread = {**whole, "hidden": dict(whole["hidden"]), "out": list(whole["out"])}
    spread["hidden"]["w"] = put(params["hidden"]["w"], P(None, "model"))
    spread["out"][0] = put(params["out"][0], P("model", None))
    places = {
        "batch": (mesh, whole, put(batch, P("data"))),
        "batch and parameters": (mesh, spread, put(batch, P("data"))),
        "explicit batch": (
            explicit,
            put(params, P(), explicit),
            put(batch, P("data"), explicit),
        ),
    }
    results = {}
    for name in names:
        tx, step = make_step(SOLVERS[name])
        truth, _ = step(params, tx.init(params), batch)
        for layout in LAYOUTS:
            try:
                report = measure(tx, step, truth, params, *places[layout])
            except Exception as error:  # noqa: BLE001  # told to the test
                report = {"error": f"{type(error).__name__}: {error}"[:2000]}
            results[f"{name}, {layout}"] = report
    with jax.set_mesh(explicit):
        check_products(*places["explicit batch"][1:], params, batch)
    print(json.dumps(results))


def measure(tx, step, truth, params, mesh, start, batch):
    """A step at one place against that on one device."""
    is_explicit = AxisType.Explicit in mesh.axis_types
    with jax.set_mesh(mesh) if is_explicit else contextlib.nullcontext():
        arguments = (start, tx.init(start), batch)
        compiled = step.lower(*arguments).compile()
        moved, state = compiled(*arguments)
    on_host = jax.device_get((moved, truth, params))
    moved_there, truth, before = on_host
    return {
        "error": None,
        "difference": largest(jax.tree.map(np.subtract, truth, moved_there)),
        "step": largest(jax.tree.map(np.subtract, truth, before)),
        "gathered": gathered(compiled.as_text()),
        "devices": len(moved["hidden"]["w"].sharding.device_set),
        "status": int(state.info.status),
    }


@jax.jit
def products(params, batch):
    """What the Fisher gives, by every one of its ways."""

    def of(**options):
        fisher = ngd.linearize_fisher(
            model_fn, params, batch, ngd.Categorical(), **options
        )
        moved = jax.tree.map(lambda p: 1.1 * p, params)
        coefficients = fisher.sqrt_matvec(params)
        cotangents = fisher.sqrt_cotangents(coefficients)
        return [
            fisher.matvec(params),
            fisher.quadratic(params),
            fisher.kl(moved),
            fisher.sqrt_rmatvec(coefficients),
            fisher.sqrt_rmatvec(fisher.sqrt_solve(cotangents)),
        ]

    weights = 1.0 + batch["y"]
    return [of(), of(weights=weights), of(kind="empirical", targets=batch["y"])]


def check_products(params, batch, params_here, batch_here):
    truth = jax.device_get(products(params_here, batch_here))
    found = jax.device_get(products(params, batch))
    for a, b in zip(jax.tree.leaves(truth), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


if __name__ == "__main__":
    main(sys.argv[1:])
