"""Run by test_sharding with 8 devices: what is divided over them."""

import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ngd_jax as ngd
from ngd_jax.gram import gram

NUM_STEPS = 3


def network(widths, rng):
    """Parameters of a dense network, and its function of a batch."""
    params = [
        {
            "w": jnp.asarray(rng.normal(size=(m, n)) / m**0.5),
            "b": jnp.asarray(rng.normal(size=n) / 9),
        }
        for m, n in itertools.pairwise(widths)
    ]

    def model_fn(params, x):
        *hidden, last = params
        for layer in hidden:
            x = jnp.tanh(x @ layer["w"] + layer["b"][None])
        return x @ last["w"] + last["b"][None]

    return params, model_fn


def scanned_network(widths, rng):
    """The same with a loop over the hidden layers, which are of one width."""
    layers, model_fn = network(widths, rng)
    *hidden, last = layers

    def scanned_fn(params, x):
        def layer(x, params):
            return jnp.tanh(x @ params["w"] + params["b"][None]), None

        x, _ = jax.lax.scan(layer, x, params["stack"])
        return model_fn([params["last"]], x)

    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *hidden)
    return {"last": last, "stack": stack}, scanned_fn


def step_of(model_fn, solver, x, y):
    tx = ngd.natural_gradient(
        None, model_fn, ngd.Categorical(), max_kl=1e-2, damping=0.1, solver=solver
    )

    def loss_fn(params, x):
        logits = model_fn(params, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def step(params, state, x):
        grads = jax.grad(loss_fn)(params, x)
        updates, state = tx.update(grads, state, params, batch=x)
        return optax.apply_updates(params, updates), state

    return tx, jax.jit(step)


def bytes_of(state, device):
    kept = [optax.tree.get(state, name) for name in ("averages", "inverses")]
    leaves = jax.tree.leaves(kept)
    shards = [s for leaf in leaves for s in leaf.addressable_shards]
    return sum(s.data.nbytes for s in shards if s.device == device)


def placed(mesh, params):
    """Every leaf divided along its largest axis, if the devices divide that."""

    def put(leaf):
        axis = int(np.argmax(leaf.shape))
        spec = P(*[None] * axis, mesh.axis_names)
        if leaf.shape[axis] % mesh.size:
            spec = P()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(put, params)


def divided(kind, axes, widths, solver_fn, make=network):
    """Three steps with divided factors against those on one device."""
    rng = np.random.default_rng(0)
    params, model_fn = make(widths, rng)
    x = jnp.asarray(rng.normal(size=(32, widths[0])))
    y = jnp.asarray(rng.integers(0, widths[-1], 32))
    tx, step = step_of(model_fn, solver_fn(None), x, y)
    start = tx.init(params)
    alone, state = params, start
    for _ in range(NUM_STEPS):
        alone, state = step(alone, state, x)
    whole = bytes_of(start, jax.devices()[0])

    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, P(axes))
        tx, step = step_of(model_fn, solver_fn(sharding), x, y)
        there = jax.device_put(params, NamedSharding(mesh, P()))
        if kind is AxisType.Auto:
            there = placed(mesh, params)
        start = jax.jit(tx.init)(there)
        x = jax.device_put(x, NamedSharding(mesh, P(mesh.axis_names)))
        together, state = there, start
        for _ in range(NUM_STEPS):
            together, state = step(together, state, x)
    vectors = [ravel_pytree(jax.device_get(x))[0] for x in (alone, together, params)]
    alone, together, before = map(np.asarray, vectors)
    return {
        "difference": np.abs(alone - together).max() / np.abs(alone - before).max(),
        "before": bytes_of(start, jax.devices()[0]) / whole,
        "after": bytes_of(state, jax.devices()[0]) / whole,
        "status": int(state.info.status),
    }


def gathers():
    """The all-gathers of a gradient, and of a step, on parameters that are divided."""
    rng = np.random.default_rng(0)
    params, model_fn = network([64, 1024, 128, 8], rng)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    params = placed(mesh, jax.tree.map(lambda x: x.astype(jnp.float32), params))
    x = jax.device_put(jnp.ones((8192, 64)), NamedSharding(mesh, P("data")))
    y = jnp.zeros(len(x), int)

    def shapes(fn, *arguments):
        text = fn.lower(*arguments).compile().as_text()
        pattern = r"= \(?\w+\[([\d,]*)\].* (?:all-gather|all-to-all)\("
        return sorted(set(re.findall(pattern, text)))

    grad = jax.jit(jax.grad(lambda p, x: model_fn(p, x)[jnp.arange(len(y)), y].sum()))
    found = {"gradient": shapes(grad, params, x)}
    for solver in (ngd.CG(5, warm_start=0.5), ngd.LSMR(5)):
        tx, step = step_of(model_fn, solver, x, y)
        found[type(solver).__name__] = shapes(step, params, tx.init(params), x)
    return found


def shares():
    """The operations of one of 8 devices, relative to those of one alone."""
    params, model_fn = network([24, 40, 40, 3], np.random.default_rng(0))
    x = jnp.ones((160, 24))

    def fisher_of(params, x, **options):
        return ngd.linearize_fisher(model_fn, params, x, ngd.Categorical(), **options)

    programs = {
        "Gram, layers": lambda params, x: gram(fisher_of(params, x)),
        "Gram, blocks": lambda params, x: gram(fisher_of(params, x), 40),
        "microbatches": lambda params, x: fisher_of(
            params, x, microbatch_size=40
        ).matvec(params),
    }

    def operations(fn, *arguments):
        costs = jax.jit(fn).lower(*arguments).compile().cost_analysis() or {}
        return costs["flops"]

    found = {}
    for name, program in programs.items():
        alone = operations(program, params, x)
        for kind in (AxisType.Auto, AxisType.Explicit):
            mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
            with jax.set_mesh(mesh):
                there = jax.device_put(params, NamedSharding(mesh, P()))
                batch = jax.device_put(x, NamedSharding(mesh, P("data")))
                ratio = operations(program, there, batch) / alone
            found[f"{name}, {kind.name}"] = ratio
    return found


def redivided():
    """A state made on some devices and moved to others, against that made there."""
    # Eleven matrices of one shape: whole factors and rows, with and without spares.
    params, model_fn = network([7] * 12 + [5], np.random.default_rng(0))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(32, 7)))

    def kronecker(num_devices):
        if num_devices == 1:
            return ngd.Kronecker()
        devices = jax.devices()[:num_devices]
        mesh = jax.make_mesh(
            (num_devices,), ("data",), devices=devices, axis_types=(AxisType.Auto,)
        )
        return ngd.Kronecker(sharding=NamedSharding(mesh, P("data")))

    def observed(num_devices):
        preconditioner = kronecker(num_devices)

        @jax.jit
        def prepare(params, x):
            fisher = ngd.linearize_fisher(model_fn, params, x, ngd.Categorical())
            state = preconditioner.init(params)
            return preconditioner.prepare(fisher, state, 0.1)[1]

        return jax.device_get(prepare(params, x))

    def redivide(state, num_devices):
        return jax.device_get(jax.jit(kronecker(num_devices).redivide)(state, params))

    states, found = {count: observed(count) for count in (1, 2, 8)}, {}
    for old, new in itertools.permutations(states, 2):
        moved = redivide(states[old], new)
        shapes = [jax.tree.map(np.shape, state) for state in (moved, states[new])]
        # Places for no factor may differ, and are left out on one device.
        pairs = zip(
            jax.tree.leaves(redivide(moved, 1)),
            jax.tree.leaves(states[1]),
            strict=True,
        )
        difference = max(float(np.abs(a - b).max()) for a, b in pairs)
        found[f"{old} to {new}"] = difference if shapes[0] == shapes[1] else 1.0
    return found


def main():
    results = {"gathers": gathers(), "shares": shares()}
    jax.config.update("jax_enable_x64", True)
    results["redivided"] = redivided()
    solvers = {
        "kfac": lambda sharding: ngd.KFAC(sharding=sharding),
        "cg": lambda sharding: ngd.CG(
            3, rtol=0, preconditioner=ngd.Kronecker(sharding=sharding)
        ),
    }
    both = ("data", "model")
    for kind, axes, name, widths in (
        (AxisType.Auto, both, "kfac", [16] * 9 + [4]),
        (AxisType.Explicit, both, "kfac", [39, 31, 23, 4]),
        (AxisType.Explicit, both, "cg", [16] * 10 + [4]),
        (AxisType.Auto, ("data",), "cg", [39, 31, 23, 4]),
    ):
        place = f"{name} {kind.name} {axes} {widths}"
        results[place] = divided(kind, axes, widths, solvers[name])
    for kind in (AxisType.Auto, AxisType.Explicit):
        # Eight layers are whole ones on a device each, two are divided by rows.
        widths, make = [16] * 11 + [4], scanned_network
        results[f"stack {kind.name} {both}"] = divided(
            kind, both, widths, solvers["kfac"], make
        )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
