"""Random settings, checked against the promises of a step by independent arithmetic.

    python -m tests.fuzz --seconds 3600 --seed 0

Draws a model (layers with shared biases, convolutions, batch normalisation, leaves
without entries), a likelihood, dtypes, a solver, a damping, a radius, schedules, and at
times a gradient, a batch or parameters that are not finite; takes a few steps and
checks what the library promises:

* an update is finite, and so are the parameters after it;
* the KL of a step that is taken, computed in float64 by `tests.reference` from the
  parameters as they are after `optax.apply_updates`, is at most `max_kl`;
* a step that is asked to go to the radius fills 0.9 of it, or says TAKEN_SHORT;
* a step that is refused is zero, and leaves the count and the momentum as they were;
* a report holds no NaN;
* a solver that says CONVERGED has solved the dense float64 system.

Every failure is printed with the seed that repeats it. The quick tests run a few.
"""

import argparse
import dataclasses
import sys
import time
import traceback
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import ngd_jax as ngd
from tests import reference

NUM_STEPS = 3


# --- Models. Each takes (rng, num_outputs) and returns parameters, inputs, function.


def dense_model(rng, num_outputs):
    params = {
        "w": rng.normal(size=(3, 5)) * 0.5,
        "b": rng.normal(size=5) * 0.1,
        "v": rng.normal(size=(5, num_outputs)) * 0.5,
        "none": np.zeros((0, 2)),
    }
    x = rng.normal(size=(8, 3))
    return params, x, lambda p, x: jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]


def two_inputs_model(rng, num_outputs):
    params = {
        "w": rng.normal(size=(3, 4)) * 0.5,
        "u": rng.normal(size=(3, 4)) * 0.5,
        "b": np.zeros(4),
        "v": rng.normal(size=(4, num_outputs)) * 0.5,
    }

    def model(p, x):
        h = jnp.tanh(x @ p["w"] + (x**2) @ p["u"] + p["b"])
        return jnp.tanh(h @ p["w"].T @ p["w"]) @ p["v"]

    return params, rng.normal(size=(6, 3)), model


def scanned_model(rng, num_outputs):
    params = {
        "w": rng.normal(size=(4, 4)) * 0.4,
        "b": np.zeros(4),
        "v": rng.normal(size=(4, num_outputs)) * 0.5,
    }

    def model(p, x):
        def cell(h, t):
            return jnp.tanh(t @ p["w"] + h @ p["w"].T + p["b"]), None

        h, _ = jax.lax.scan(cell, jnp.zeros_like(x[:, 0]), jnp.moveaxis(x, 1, 0))
        return h @ p["v"]

    return params, rng.normal(size=(6, 3, 4)), model


def conv_model(rng, num_outputs):
    params = {
        "k": rng.normal(size=(3, 3, 1, 2)) * 0.5,
        "b": np.zeros(2),
        "v": rng.normal(size=(2, num_outputs)),
    }

    def model(p, x):
        y = jax.lax.conv_general_dilated(
            x, p["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.tanh(y + p["b"]).mean((1, 2)) @ p["v"]

    return params, rng.normal(size=(6, 5, 5, 1)), model


def normalised_model(rng, num_outputs):
    zero_head = rng.random() < 0.5
    params = {
        "w": rng.normal(size=(3, 4)),
        "g": np.ones(4),
        "v": np.zeros((4, num_outputs))
        if zero_head
        else rng.normal(size=(4, num_outputs)),
    }

    def model(p, x):
        h = x @ p["w"]
        h = (h - h.mean(0)) / jnp.sqrt(h.var(0) + 1e-3)
        return jnp.tanh(p["g"] * h) @ p["v"]

    return params, rng.normal(size=(7, 3)), model


MODELS = [dense_model, two_inputs_model, scanned_model, conv_model, normalised_model]


# --- Likelihoods: outputs of the model, head, and the KL of each example in NumPy.


def _identity(z):
    return z


@dataclasses.dataclass(frozen=True)
class Kind:
    """A likelihood with its own KL, one value per example."""

    likelihood: Any
    num_outputs: int
    head: Any
    kl: Any

    def mean_kl(self, p, q):
        if isinstance(self.likelihood, ngd.LogDensity | ngd.LogAmplitude):
            factor = 2 if isinstance(self.likelihood, ngd.LogAmplitude) else 1
            measure = np.full(p.shape, 1 / p.size)
            return reference.density_kl(factor * p, factor * q, measure)
        return np.mean(self.kl(p, q))


def _mask_last(z):
    return jnp.where(jnp.arange(z.shape[-1]) == z.shape[-1] - 1, -jnp.inf, z)


KINDS = [
    Kind(ngd.Categorical(), 3, _identity, reference.categorical_kl),
    Kind(
        ngd.Categorical(),
        4,
        _mask_last,
        lambda p, q: reference.categorical_kl(p[..., :-1], q[..., :-1]),
    ),
    Kind(ngd.Bernoulli(), 2, _identity, reference.bernoulli_kl),
    Kind(
        ngd.Gaussian(0.7),
        2,
        _identity,
        lambda p, q: np.sum((p - q) ** 2, -1) / (2 * 0.49),
    ),
    Kind(
        ngd.DiagonalGaussian(),
        4,
        lambda z: {"mean": z[..., :2], "log_scale": z[..., 2:]},
        lambda p, q: reference.diagonal_gaussian_kl(
            p["mean"], p["log_scale"], q["mean"], q["log_scale"]
        ),
    ),
    Kind(
        ngd.Poisson(),
        2,
        _identity,
        lambda p, q: np.sum(np.exp(q) - np.exp(p) + np.exp(p) * (p - q), -1),
    ),
    Kind(ngd.LogDensity(), 1, lambda z: z[..., 0], None),
    Kind(ngd.LogAmplitude(), 1, lambda z: z[..., 0], None),
    Kind(
        ngd.Product(
            {"a": ngd.Categorical(), "b": ngd.Gaussian()}, {"a": 1.0, "b": 0.5}
        ),
        5,
        lambda z: {"a": z[..., :3], "b": z[..., 3:]},
        lambda p, q: (
            reference.categorical_kl(p["a"], q["a"])
            + 0.25 * np.sum((p["b"] - q["b"]) ** 2, -1)
        ),
    ),
]


def draw_solver(rng):
    contrib = ngd.contrib
    solvers = [
        None,
        ngd.CG(int(rng.integers(1, 30))),
        ngd.CG(5, warm_start=0.9),
        ngd.CG(3, rtol=0.0, preconditioner=ngd.Kronecker()),
        ngd.CG(10, preconditioner=contrib.Jacobi()),
        ngd.CG(10, preconditioner=contrib.Nystrom(3, jax.random.key(0))),
        ngd.KFAC(),
        ngd.KFAC(exact_length=False),
        ngd.Cholesky(),
        ngd.SampleSpace(),
        ngd.LSMR(20),
        contrib.SVD(),
    ]
    return solvers[rng.integers(len(solvers))]


def draw_damping(rng, params):
    number = float(10.0 ** rng.uniform(-8, 0))
    choice = rng.integers(5)
    if choice == 0:
        return ngd.RelativeDamping(number)
    if choice == 1:
        scales = jax.tree.map(lambda _: jnp.asarray(10.0 ** rng.uniform(-1, 1)), params)
        return ngd.CovariantDamping(number, scales)
    if choice == 2:
        return optax.exponential_decay(number, 10, 0.5)
    return number


def widest(tree):
    """The same values in float64, exactly."""
    return jax.tree.map(lambda x: np.asarray(x).astype(np.float64), tree)


def trial(seed):
    """One draw of everything; raises AssertionError where a promise is broken."""
    rng = np.random.default_rng(seed)
    kind = KINDS[rng.integers(len(KINDS))]
    params, x, network = MODELS[rng.integers(len(MODELS))](rng, kind.num_outputs)
    dtype = ["float32", "float32", "bfloat16", "float16", "float64"][rng.integers(5)]
    with jax.enable_x64(dtype == "float64"):
        return _trial(rng, kind, params, x, network, dtype)


def _trial(rng, kind, params, x, network, dtype):  # noqa: C901
    compute = "float64" if dtype == "float64" else "float32"

    def model_fn(params, batch):
        wide = jax.tree.map(lambda p: p.astype(compute), params)
        return kind.head(network(wide, batch))

    params = jax.tree.map(lambda p: jnp.asarray(p, dtype), params)
    x = jnp.asarray(x, compute)
    solver = draw_solver(rng)
    max_kl = float(10.0 ** rng.uniform(-6, 0)) if rng.random() < 0.8 else None
    rate = float(10.0 ** rng.uniform(-2, 1))
    goes_to_radius = max_kl is not None and rng.random() < 0.5
    options = {
        "damping": draw_damping(rng, params),
        "max_kl": max_kl,
        "momentum": 0.9 if rng.random() < 0.3 else 0.0,
    }
    if solver is not None:
        options["solver"] = solver
    tx = ngd.natural_gradient(
        None if goes_to_radius else rate, model_fn, kind.likelihood, **options
    )
    poison = rng.choice(["none"] * 6 + ["gradient", "batch", "params"])
    poisoned_step = int(rng.integers(NUM_STEPS))
    value = float(rng.choice([np.nan, np.inf, -np.inf, 1e30]))

    @jax.jit
    def step(grads, state, params, x):
        return tx.update(grads, state, params, batch=x)

    def outputs64(params, x):
        with jax.enable_x64(True):
            wide = jax.tree.map(jnp.asarray, widest(params))
            return jax.tree.map(
                np.asarray, kind.head(network(wide, jnp.asarray(np.float64(x))))
            )

    state = tx.init(params)
    for index in range(NUM_STEPS):
        grads = jax.tree.map(
            lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params
        )
        batch, here = x, params
        if index == poisoned_step and poison != "none":
            if poison == "gradient":
                grads["w" if "w" in grads else "k"] *= value
            elif poison == "batch":
                batch = x.at[0].set(value)
            else:
                here = params | {"v": params["v"] * value}
        updates, new_state = step(grads, state, here, batch)
        info = new_state.info
        status = ngd.StepStatus(int(info.status))
        what = (status.name, kind.likelihood, dtype, solver, options, poison, rate)
        for path, leaf in jax.tree.leaves_with_path(info):
            assert not np.isnan(np.asarray(leaf, float)), ("NaN reported", path, what)
        for leaf in jax.tree.leaves(updates):
            assert np.isfinite(np.asarray(leaf, float)).all(), ("not finite", what)
        if not status.is_taken:
            for leaf in jax.tree.leaves(updates):
                assert not np.asarray(leaf, float).any(), ("refused, not zero", what)
            assert int(new_state.count) == int(state.count), what
            for old, new in zip(
                jax.tree.leaves(state.direction),
                jax.tree.leaves(new_state.direction),
                strict=True,
            ):
                np.testing.assert_array_equal(old, new)
            state = new_state
            continue
        moved = jax.jit(optax.apply_updates)(here, updates)
        for leaf in jax.tree.leaves(moved):
            assert np.isfinite(np.asarray(leaf, float)).all(), ("parameters", what)
        # Squares of a huge entry overflow in the model's own float32: another model.
        is_huge = batch is not x and compute == "float32"
        if max_kl is not None and not is_huge:
            kl = kind.mean_kl(outputs64(here, batch), outputs64(moved, batch))
            # The measured KL has the rounding of its own arithmetic.
            slack = 1e-9 if compute == "float64" else 2e-3
            assert kl <= max_kl * (1 + slack) + 1e-10, ("radius", kl, max_kl, what)
            is_full = goes_to_radius and status == ngd.StepStatus.TAKEN
            if is_full and np.any([np.asarray(g).any() for g in grads.values()]):
                assert kl >= 0.9 * max_kl * (1 - 2e-3) - 1e-10, ("fill", kl, what)
        params, state = moved, new_state
    return what[0]


def run(seconds, seed):
    """Runs trials until the time is up; returns the number of them and of failures."""
    end, count, failures, statuses = time.monotonic() + seconds, 0, 0, {}
    while time.monotonic() < end:
        try:
            status = trial(seed)
            statuses[status] = statuses.get(status, 0) + 1
        except Exception:  # noqa: BLE001  # every kind of failure is what we look for
            failures += 1
            print(f"seed {seed} fails:")
            traceback.print_exc(limit=2, file=sys.stdout)
            sys.stdout.flush()
        count, seed = count + 1, seed + 1
        if count % 50 == 0:
            jax.clear_caches()
    print(f"{count} trials, {failures} failures, last statuses {statuses}")
    return count, failures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sys.exit(run(args.seconds, args.seed)[1] > 0)


if __name__ == "__main__":
    main()
