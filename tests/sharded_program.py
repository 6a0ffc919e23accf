"""Run by test_sharding with 8 devices: every solver, spread over a mesh or not.

Prints one line of JSON: for each solver, layout and dtype the largest difference from
two steps on one device, and the number of entries that the largest all-gather returns.
Arguments: solvers, layouts and dtypes, each with commas between; or `products`, for
products and KL of the Fisher, microbatches among them.
"""

import contextlib
import json
import re
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ngd_jax as ngd
from tests import reference

NUM_EXAMPLES = 48
# Solved to the end: unfinished solves amplify round-off a million times.
SOLVERS = {
    "default": None,
    "auto": ngd.Auto(
        ngd.CG(3, preconditioner=ngd.Kronecker()), free=0.0, exactness=0.0
    ),
    "cg": ngd.CG(60, rtol=1e-14, warm_start=0.5),
    "nystrom": ngd.CG(
        60,
        rtol=1e-14,
        preconditioner=ngd.contrib.Nystrom(rank=8, key=jax.random.key(0)),
    ),
    "jacobi": ngd.CG(60, rtol=1e-14, preconditioner=ngd.contrib.Jacobi()),
    "kronecker": ngd.CG(60, rtol=1e-14, preconditioner=ngd.Kronecker()),
    "kfac": ngd.KFAC(),
    "lsmr": ngd.LSMR(60, rtol=1e-14),
    "sample_space": ngd.SampleSpace(),
    "blocks": ngd.SampleSpace(block_size=8),
    "cholesky": ngd.Cholesky(),
    "svd": ngd.contrib.SVD(),
    "damping_search": ngd.contrib.DampingSearch(initial=10.0),
}
QUICK = ("cg", "kfac", "sample_space")


class Layout(NamedTuple):
    """Where batch and parameters are.

    Attributes:
      shape: of the mesh with axes "data" and "model".
      kind: of the axes.
      batch: the mesh axes that divide the examples.
      params: the mesh axes that divide the largest axis of each parameter, if they can.
    """

    shape: tuple[int, int]
    kind: AxisType
    batch: tuple[str, ...]
    params: tuple[str, ...]

    @property
    def mesh(self):
        return jax.make_mesh(self.shape, ("data", "model"), axis_types=(self.kind,) * 2)


_AUTO, _EXPLICIT = AxisType.Auto, AxisType.Explicit
LAYOUTS = {
    f"{name}{kind.name.lower()}": Layout(shape, kind, batch, params)
    for kind in (_AUTO, _EXPLICIT)
    for name, shape, batch, params in (
        ("", (8, 1), ("data",), ()),
        ("two-", (4, 2), ("data", "model"), ()),
        ("fsdp-", (8, 1), ("data",), ("data",)),
        ("mixed-", (4, 2), ("data",), ("model",)),
    )
}


def model_fn(params, batch):
    if any(any(jax.typeof(x).sharding.spec) for x in jax.tree.leaves(params)):
        # With explicit axes a model says itself where its parameters meet.
        params = jax.tree.map(lambda x: jax.sharding.reshard(x, P()), params)
    return reference.network(params, batch["x"])


def loss_of_outputs(logits, batch):
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return losses.mean()


def make_step(solver, **options):
    if solver is not None:
        options["solver"] = solver
    if getattr(solver, "uses_coefficients", False):
        options["loss_fn"] = loss_of_outputs
    tx = ngd.natural_gradient(
        None,
        model_fn,
        ngd.Categorical(),
        max_kl=1e-2,
        momentum=0.5 if getattr(solver, "warm_start", 0) == 0 else 0.0,
        damping=0.0 if isinstance(solver, ngd.contrib.DampingSearch) else 0.1,
        **options,
    )

    def step(params, state, batch):
        grads = jax.grad(lambda p: loss_of_outputs(model_fn(p, batch), batch))(params)
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    def two_steps(params, state, batch):
        return step(*step(params, state, batch), batch)

    return tx, jax.jit(two_steps)


def gathered(hlo):
    """The entries of the largest result of an all-gather or all-to-all."""
    found = re.findall(r"= \(?\w+\[([\d,]*)\].* (?:all-gather|all-to-all)\(", hlo)
    shapes = [[int(n) for n in shape.split(",") if n] for shape in found]
    return max((int(np.prod(shape)) for shape in shapes), default=0)


def largest(values):
    return float(max(np.abs(x).max() for x in jax.tree.leaves(values)))


def problem(dtype):
    rng = np.random.default_rng(0)
    params = reference.network_params(rng, 4, num_hidden=16, dtype=jnp.float64)
    batch = {"x": rng.normal(size=(NUM_EXAMPLES, 2))}
    params, batch = jax.tree.map(lambda x: jnp.asarray(x, dtype), (params, batch))
    return params, batch | {"y": jnp.asarray(rng.integers(0, 4, NUM_EXAMPLES))}


def placed(layout, params, batch):
    """Parameters and batch on the devices."""
    mesh = layout.mesh

    def spec(leaf):
        size = int(np.prod([mesh.shape[axis] for axis in layout.params]))
        axis = max(range(leaf.ndim), key=lambda k: leaf.shape[k], default=None)
        if axis is None or leaf.shape[axis] % size or not layout.params:
            return P()
        return P(*[None] * axis, layout.params)

    params = jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(mesh, spec(x))), params
    )
    return params, jax.device_put(batch, NamedSharding(mesh, P(layout.batch)))


def measure(name, dtype, layouts):
    """Two steps at all places against those on one device."""
    tx, steps = make_step(SOLVERS[name])
    params, batch = problem(dtype)
    truth, _ = steps(params, tx.init(params), batch)
    reports = {}
    for place in layouts:
        layout = LAYOUTS[place]
        is_explicit = layout.kind is _EXPLICIT
        with jax.set_mesh(layout.mesh) if is_explicit else contextlib.nullcontext():
            try:
                start, examples = placed(layout, params, batch)
                arguments = (start, tx.init(start), examples)
                compiled = steps.lower(*arguments).compile()
                moved, state = compiled(*arguments)
            except Exception as error:  # noqa: BLE001  # told to the test
                reports[place] = {"error": f"{type(error).__name__}: {error}"[:1500]}
                continue
        on_host = jax.device_get((moved, truth, params))
        moved_there, truth, before = on_host
        step = largest(jax.tree.map(np.subtract, truth, before))
        reports[place] = {
            "error": None,
            "difference": largest(jax.tree.map(np.subtract, truth, moved_there)) / step,
            "gathered": gathered(compiled.as_text()),
            "devices": len(moved["hidden"]["w"].sharding.device_set),
            "status": int(state.info.status),
        }
    return reports


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

    options = [
        {},
        {"weights": 1.0 + batch["y"]},
        {"kind": "empirical", "targets": batch["y"]},
        {"microbatch_size": 8},
    ]
    return [of(**one) for one in options]


def check_products():
    layout = LAYOUTS["explicit"]
    params, batch = problem(jnp.float64)
    truth = jax.device_get(products(params, batch))
    with jax.set_mesh(layout.mesh):
        found = jax.device_get(products(*placed(layout, params, batch)))
    for a, b in zip(jax.tree.leaves(truth), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def check_convolution():
    """Patches of images that explicit mesh axes divide: a step of K-FAC."""

    def model_fn(params, images):
        features = jax.lax.conv_general_dilated(
            images,
            params["kernel"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return jnp.tanh(features + params["bias"]).mean((1, 2)) @ params["out"]

    rng = np.random.default_rng(0)
    shapes = {"kernel": (3, 3, 2, 4), "bias": (4,), "out": (4, 3)}
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    gradient = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    images = rng.normal(size=(NUM_EXAMPLES, 5, 5, 2))
    tx = ngd.natural_gradient(
        None, model_fn, ngd.Categorical(), solver=ngd.KFAC(), max_kl=1e-2, damping=0.1
    )

    @jax.jit
    def update(params, gradient, images):
        return tx.update(gradient, tx.init(params), params, batch=images)[0]

    truth = jax.device_get(update(params, gradient, images))
    layout = LAYOUTS["explicit"]
    with jax.set_mesh(layout.mesh):
        (params, images) = placed(layout, params, images)
        found = jax.device_get(update(params, gradient, images))
    for a, b in zip(jax.tree.leaves(truth), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def main(names, layouts, dtypes):
    jax.config.update("jax_enable_x64", True)
    assert len(jax.devices()) == 8
    results = {}
    for name in names.split(","):
        for dtype in dtypes.split(","):
            found = measure(name, dtype, layouts.split(","))
            results |= {f"{name} {where} {dtype}": x for where, x in found.items()}
    check_products()
    check_convolution()
    print(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
