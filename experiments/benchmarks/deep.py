"""A deep Transformer as one loop over its layers: a step, and plans of larger ones.

    python -m experiments.benchmarks.deep step    # memory, planned and measured
    python -m experiments.benchmarks.deep plan    # of large models on many devices

The activations are bfloat16, the parameters float32, and each layer is computed again
in the backward pass. Plans are made from shapes and programs; nothing is computed.
"""

import argparse
import dataclasses
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ngd_jax as ngd
from ngd_jax import placement
from ngd_jax.kfac.division import spec_of
from ngd_jax.kfac.groups import groups_of

__all__ = ["Transformer", "measure_step", "operations", "plan"]


@dataclasses.dataclass(frozen=True)
class Transformer:
    """A decoder for text.

    Attributes:
      depth: layers.
      width: of the stream between them; the hidden layers are four times as wide.
      num_heads: of attention.
      num_tokens: the size of the vocabulary.
      context: positions.
    """

    depth: int
    width: int
    num_heads: int = 8
    num_tokens: int = 256
    context: int = 64

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Parameters, float32; the first axis of a leaf in the stack counts layers."""
        width, hidden = self.width, 4 * self.width
        shapes = {
            "attention": (width, width),
            "down": (hidden, width),
            "key": (width, width),
            "query": (width, width),
            "up": (width, hidden),
            "value": (width, width),
        }
        stack = {
            name: jax.random.normal(key, (self.depth, *shape)) / shape[0] ** 0.5
            for name, shape in shapes.items()
        }
        for name in ("attention", "down"):
            stack[name] /= (2 * self.depth) ** 0.5
        norms = {
            "attention_norm": jnp.ones((self.depth, width)),
            "hidden_norm": jnp.ones((self.depth, width)),
        }
        bias = {"bias": jnp.zeros((self.depth, hidden))}
        return {
            "head": jax.random.normal(key, (width, self.num_tokens)) / width**0.5,
            "norm": jnp.ones(width),
            "places": 0.02 * jax.random.normal(key, (self.context, width)),
            "stack": stack | norms | bias,
            "tokens": 0.02 * jax.random.normal(key, (self.num_tokens, width)),
        }

    def __call__(self, params: dict[str, Any], tokens: jax.Array) -> jax.Array:
        """Logits, float32, `[batch, context, num_tokens]`."""
        x = params["tokens"][tokens] + params["places"]
        layer = jax.checkpoint(self.layer, prevent_cse=False)
        x, _ = jax.lax.scan(
            lambda x, params: (layer(params, x), None),
            x.astype(jnp.bfloat16),
            params["stack"],
        )
        x = _norm(x, params["norm"]).astype(jnp.float32)
        return x @ params["head"]

    def layer(self, params: dict[str, Any], x: jax.Array) -> jax.Array:
        """One layer."""
        params = jax.tree.map(lambda leaf: leaf.astype(x.dtype), params)
        shape = (*x.shape[:-1], self.num_heads, -1)
        normed = _norm(x, params["attention_norm"])
        query, key, value = (
            (normed @ params[name]).reshape(shape) for name in ("query", "key", "value")
        )
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + mixed.reshape(x.shape) @ params["attention"]
        hidden = _norm(x, params["hidden_norm"]) @ params["up"] + params["bias"]
        return x + jax.nn.gelu(hidden) @ params["down"]


def _norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(wide**2, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean_square + 1e-6)).astype(x.dtype) * scale


def loss_fn(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """The mean cross-entropy of the next token."""
    return optax.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1], tokens[:, 1:]
    ).mean()


# --- One step on this machine


def measure_step(model: Transformer, batch_size: int, num_steps: int) -> dict[str, Any]:
    """The memory of a step as planned by `describe`, and as measured, in bytes.

    Measured is the largest resident size of the process while the steps run, beyond
    what it was with the step compiled and before there were any arrays (Linux only).
    """
    tx = _transformation(model, ngd.KFAC())
    params = jax.eval_shape(model.init, jax.random.key(0))
    batch = jax.ShapeDtypeStruct((batch_size, model.context), jnp.int32)
    plan = ngd.describe(tx, params, batch, loss_fn=loss_fn, run=False).plan

    def step(params: Any, state: Any, batch: jax.Array) -> tuple[Any, Any, jax.Array]:
        value, grads = jax.value_and_grad(lambda p: loss_fn(model(p, batch), batch))(
            params
        )
        updates, state = tx.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state, value

    state = jax.eval_shape(tx.init, params)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, batch)
    compiled = compiled.compile()
    gc.collect()
    before = _resident("VmRSS")
    params = model.init(jax.random.key(0))
    state = tx.init(params)
    batch = jax.random.randint(jax.random.key(1), batch.shape, 0, model.num_tokens)
    jax.block_until_ready((params, state, batch))
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    began = time.perf_counter()
    value = jnp.zeros(())
    for _ in range(num_steps):
        params, state, value = compiled(params, state, batch)
        jax.block_until_ready((params, value))
    return {
        "parameters": plan.parameters,
        "state": plan.state,
        "planned": plan.peak,
        "measured": _resident("VmHWM") - before,
        "before": before,
        "seconds": (time.perf_counter() - began) / num_steps,
        "loss": float(value),
        "status": int(optax.tree.get(state, "NaturalGradientInfo").status),
    }


def _transformation(model: Transformer, solver: Any) -> Any:
    return ngd.natural_gradient(
        1.0, model, ngd.Categorical(), max_kl=0.1, solver=solver
    )


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


# --- Plans


def plan(
    model: Transformer, num_devices: int, tokens_per_device: int, max_size: int
) -> dict[str, tuple[float, float]]:
    """Memory, traffic and work on one device, of Adam and of `KFAC`.

    Parameters, gradients, moments and factors are divided over all devices, and each
    has its own examples. Numbers are float32 but for activations and gathered weights.

    Returns:
      Pairs for Adam and for K-FAC: bytes by what they are for, bytes received in a
      step, and operations in a step, on the average of many.
    """
    params = jax.eval_shape(model.init, jax.random.key(0))
    num_params = sum(x.size for x in jax.tree.leaves(params))
    mesh = AbstractMesh((num_devices,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, P("data"))
    kronecker = ngd.Kronecker(max_size=max_size)
    factors = _numbers(kronecker.init, params, None, max_size) / 2
    divided = ngd.Kronecker(max_size=max_size, sharding=sharding)
    on_one = _numbers(divided.init, params, sharding, max_size)
    share, moved = num_params / num_devices, 1 - 1 / num_devices
    activations = 2 * model.depth * tokens_per_device * model.width
    logits = 4 * tokens_per_device * model.num_tokens
    both = {
        "parameters and gradient": (8 * share, 8 * share),
        "inputs of layers, logits": (activations + logits, activations + 2 * logits),
        "state": (8 * share, 4 * on_one),
        "M⁻¹g before it is divided": (0.0, 4 * num_params),
        "factors of a batch": (0.0, 4 * factors),
    }
    rows = {f"{name}, bytes": pair for name, pair in both.items()}
    rows["all of them, bytes"] = tuple(map(sum, zip(*both.values(), strict=True)))
    # Weights are gathered in bfloat16 for every pass over the layers, backward passes
    # of checkpointed layers included; a gradient is scattered in float32.
    gradient = (2 + 2 + 4) * num_params
    forward, tangent, observe = 2, 2 + 4, 1 / ngd.KFAC().observe_every
    step = gradient + (forward + tangent + 4 + 3 * forward) * num_params
    step += observe * (2 * num_params + 4 * factors)
    rows["received in a step, bytes"] = (moved * gradient, moved * step)
    tokens = (tokens_per_device * num_devices) // model.context
    batch = jax.ShapeDtypeStruct((tokens, model.context), jnp.int32)
    tx = _transformation(model, ngd.KFAC(max_size=max_size))

    def value(params: Any, batch: jax.Array) -> jax.Array:
        return loss_fn(model(params, batch), batch)

    def update(params: Any, state: Any, batch: jax.Array) -> Any:
        grads = jax.grad(value)(params, batch)
        return tx.update(grads, state, params, batch=batch)

    state = jax.eval_shape(tx.init, params)
    counts = (
        operations(jax.make_jaxpr(jax.grad(value))(params, batch).jaxpr),
        operations(jax.make_jaxpr(update)(params, state, batch).jaxpr),
    )
    rows["operations in a step"] = tuple(count / num_devices for count in counts)
    return rows


def _numbers(init: Callable, params: Any, sharding: Any, max_size: int) -> float:
    """The numbers of the factors and their inverses on one device."""
    zero = np.zeros((), np.float32)
    leaves = [np.broadcast_to(zero, x.shape) for x in jax.tree.leaves(params)]
    groups = groups_of(leaves, max_size, placement.num_parts(sharding))
    state = jax.eval_shape(init, params)
    total = 0
    for entries in (state.averages, state.inverses):
        for group, entry in zip(groups, entries, strict=True):
            for leaf in jax.tree.leaves(entry):
                shape = leaf.shape
                if sharding is not None:
                    spec = spec_of(group, leaf.ndim, sharding)
                    shape = NamedSharding(sharding.mesh, spec).shard_shape(shape)
                total += int(np.prod(shape))
    return total


def operations(jaxpr: Any) -> float:
    """Those of products and factorisations, on the average of many steps of `KFAC`.

    A `cond` is taken to have a costly branch, run when factors are inverted or batches
    observed; a `while_loop` to be run three times, as the search for the radius is.
    """
    kfac, total = ngd.KFAC(), 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        shapes = [x.aval.shape for x in equation.invars if hasattr(x, "aval")]
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            size = np.prod([shapes[0][axis] for axis in contracted])
            total += 2.0 * size * np.prod(equation.outvars[0].aval.shape)
        elif name == "cholesky":
            total += np.prod(shapes[0], dtype=float) * shapes[0][-1] / 3
        elif name == "triangular_solve":
            total += np.prod(shapes[1], dtype=float) * shapes[0][-1]
        elif name == "cond":
            costs = sorted(operations(x.jaxpr) for x in params["branches"])
            inverts = any("cholesky" in str(x) for x in params["branches"])
            every = kfac.refresh_every if inverts else kfac.observe_every
            total += costs[0] + (costs[-1] - costs[0]) / every
        elif name == "while":
            total += 3 * operations(params["body_jaxpr"].jaxpr)
        else:
            inner = params.get("jaxpr", params.get("call_jaxpr"))
            if inner is not None:
                count = params.get("length", 1)
                total += count * operations(getattr(inner, "jaxpr", inner))
    return total


LARGE = {  # and the size above which a side of a matrix has no full factor
    "1 billion": (Transformer(18, 2048, 16, 32768, 2048), 2048),
    "10 billion": (Transformer(48, 4096, 32, 32768, 2048), 4096),
}


def plans_as_markdown(tokens_per_device: int = 4096) -> str:
    """The table of all large models on 64 and on 1,024 devices."""
    columns, rows = [], {}
    for name, (model, max_size) in LARGE.items():
        for num_devices in (64, 1024):
            columns.append(f"{name}, {num_devices:,} devices")
            found = plan(model, num_devices, tokens_per_device, max_size)
            for row, (adam, kfac) in found.items():
                cell = f"{_words(adam)} / {_words(kfac)}"
                rows.setdefault(row, []).append(cell)
    lines = [
        "| Adam / K-FAC | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
        *(f"| {row} | " + " | ".join(cells) + " |" for row, cells in rows.items()),
    ]
    return "\n".join(lines)


def _words(number: float) -> str:
    for unit, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number:.3g}"


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=("step", "plan"))
    parser.add_argument("--depth", type=int, default=24)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--num-steps", type=int, default=1)
    options = parser.parse_args()
    if options.command == "plan":
        print(plans_as_markdown())
        return
    model = Transformer(options.depth, options.width)
    found = measure_step(model, options.batch_size, options.num_steps)
    for name, value in found.items():
        is_size = name not in ("seconds", "loss", "status")
        print(f"{name}: {f'{value / 2**20:,.0f} MiB' if is_size else value}")
    print(f"measured / planned: {found['measured'] / found['planned']:.3f}")


if __name__ == "__main__":
    main()
