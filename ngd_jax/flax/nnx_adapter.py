"""An nnx module as `model_fn(params, batch)`: split once, merged anew in every call.

Every call makes a new module with new variables, so that nothing that it writes or
traces escapes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ngd_jax.flax.calls import (
    arguments_of,
    check_call,
    check_names,
    entry_of,
    keys_of,
)
from ngd_jax.types import Array, Batch, KeyArray, ModelFn, Outputs, Params, PyTree

__all__ = ["nnx_model_fn"]


def nnx_model_fn(
    model: nnx.Module,
    wrt: Any = nnx.Param,
    *,
    inputs_fn: Callable[[Batch], Any] | None = None,
    state: Any = None,
    rngs: Sequence[str] = (),
    method: Callable[..., Any] | str | None = None,
    **kwargs: Any,
) -> ModelFn:
    """Makes `model_fn(params, batch)` from an nnx module.

        model_fn(params, batch) = merge(graphdef, params, state)(batch["x"], **kwargs)

    The module is split here, once. Its structure, its mode (`model.train()` and
    `model.eval()`) and the variables selected by neither `wrt` nor `state` are fixed at
    that moment; the module itself is never touched again.

    Args:
      model: the module.
      wrt: an nnx filter, the one given to `nnx.Optimizer`.
      inputs_fn: batch -> the input of the module, or a tuple of its positional
        arguments. By default `batch["x"]`.
      state: an nnx filter of the variables that are read from `batch["state"]`, such as
        `nnx.BatchStat`: `batch["state"] = nnx.state(model, nnx.BatchStat)`. Batch
        normalisation needs it in evaluation mode only, where it reads them.
      rngs: names of the random streams whose keys are read from `batch["rngs"]`, as in
        `nnx.Rngs(params=0, dropout=1)`; "default" for all those of `nnx.Rngs(0)`. The
        module is reseeded with them (`nnx.reseed`) before every call. For the same
        masks in the gradient, call `model_fn` there, or reseed the module likewise.
      method: the method to call, or its name; `__call__` by default.
      **kwargs: passed to every call, such as `deterministic=False`.

    Returns:
      `model_fn`, to be given to `natural_gradient`. `params` are an `nnx.State` of
      variables or of arrays, or a dict of that structure.

    Raises:
      TypeError: if `model` is not an nnx module, or does not take an argument named in
        `kwargs`.
      ValueError: where `wrt` selects nothing, or `rngs` names a stream that the model
        does not have; when `model_fn` is traced, where `batch` lacks an entry, `params`
        do not fit, or the model draws from a stream that is not in `rngs`.

    Example:
      Batch normalisation and dropout in training mode, with `nnx.Optimizer`.

      >>> import jax, jax.numpy as jnp, optax, ngd_jax as ngd
      >>> from flax import nnx
      >>> from ngd_jax.flax import nnx_model_fn
      >>> class Net(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.hidden = nnx.Linear(4, 8, rngs=rngs)
      ...         self.norm = nnx.BatchNorm(8, rngs=rngs)
      ...         self.dropout = nnx.Dropout(0.1, rngs=rngs)
      ...         self.out = nnx.Linear(8, 3, rngs=rngs)
      ...
      ...     def __call__(self, x):
      ...         return self.out(self.dropout(nnx.tanh(self.norm(self.hidden(x)))))
      >>> model = Net(nnx.Rngs(params=0, dropout=1))
      >>> model_fn = nnx_model_fn(model, wrt=nnx.Param, rngs=("dropout",))
      >>> tx = ngd.natural_gradient(None, model_fn, ngd.Categorical(), max_kl=1e-2)
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> @nnx.jit
      ... def train_step(model, optimizer, batch):
      ...     def loss_fn(model):
      ...         nnx.reseed(model, **batch["rngs"])
      ...         logits = model(batch["x"])
      ...         return optax.softmax_cross_entropy_with_integer_labels(
      ...             logits, batch["y"]
      ...         ).mean()
      ...
      ...     grads = nnx.grad(loss_fn)(model)
      ...     optimizer.update(model, grads, batch=batch)
      >>> x = jax.random.normal(jax.random.key(0), (32, 4))
      >>> batch = {"x": x, "y": jnp.argmax(x[:, :3], axis=-1)}
      >>> for step in range(2):
      ...     train_step(
      ...         model, optimizer, batch | {"rngs": {"dropout": jax.random.key(step)}}
      ...     )
      >>> info = optax.tree.get(optimizer.opt_state, "NaturalGradientInfo")
      >>> int(info.status[...]), bool(info.measured_kl[...] <= 1e-2)
      (0, True)

    Note:
      See the note of `linen_model_fn` on batch normalisation and microbatches.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"`model` must be a flax.nnx.Module, got {type(model).__name__}."
        )
    rngs = check_names("rngs", rngs)
    streams = {stream.key.tag for stream in _streams(model)}
    for name in rngs:
        if name not in streams:
            raise ValueError(
                f"`rngs` must name streams of the model, got {name!r}; the model has "
                f"{sorted(streams)}."
            )
    called = method if callable(method) else getattr(model, method or "__call__", None)
    check_call(called, method, kwargs, owner="model")

    filters = (wrt,) if state is None else (wrt, state)
    graphdef, *states = nnx.split(model, *filters, ...)
    # Copies, since the buffers of the module may be donated in training.
    captured = jax.tree.map(jnp.copy, _pure(states[-1]))
    captured_keys = [(s.key.tag, jnp.copy(s.key.get_value())) for s in _streams(model)]
    params_like = _flat_paths(states[0])
    state_like = _flat_paths(states[1]) if len(states) == 3 else None
    if not params_like:
        raise ValueError(f"`wrt` selects none of the variables of `model`, got {wrt}.")

    def model_fn(params: Params, batch: Batch) -> Outputs:
        _check_paths("params", params, params_like)
        merged = [_pure(params), captured]
        if state_like is not None:
            given = entry_of(batch, "state", "state")
            _check_paths('batch["state"]', given, state_like)
            merged.append(_pure(given))
        arguments, keys = arguments_of(batch, inputs_fn), keys_of(batch, rngs)

        def call(fixed_keys: list[KeyArray]) -> tuple[Outputs, list[bool]]:
            # New variables, so that nothing traced leaks into those of the caller.
            module = nnx.merge(graphdef, *merged, copy=True)
            if keys:
                streams: Any = keys  # Their names; pyright thinks of the options.
                nnx.reseed(module, policy="match_shape", **streams)
            fixed = [s for s in _streams(module) if s.key.tag not in keys]
            for stream, key in zip(fixed, fixed_keys, strict=True):
                stream.key.set_value(key)
            counts = [stream.count.get_value() for stream in fixed]
            if callable(method):
                outputs = method(module, *arguments, **kwargs)
            else:
                outputs = getattr(module, method or "__call__")(*arguments, **kwargs)
            # A traced counter cannot be read, but a draw replaces it.
            pairs = zip(fixed, counts, strict=True)
            return outputs, [s.count.get_value() is not count for s, count in pairs]

        fixed = [(tag, key) for tag, key in captured_keys if tag not in keys]
        outputs, drawn = call([key for _, key in fixed])
        _check_unused(
            lambda fixed_keys: call(fixed_keys)[0],
            [key for _, key in fixed],
            [tag for (tag, _), is_drawn in zip(fixed, drawn, strict=True) if is_drawn],
        )
        return outputs

    return model_fn


def _streams(module: nnx.Module) -> list[nnx.RngStream]:
    return [n for _, n in nnx.iter_graph(module) if isinstance(n, nnx.RngStream)]


def _check_unused(
    call: Callable[[list[KeyArray]], Outputs], keys: list[KeyArray], drawn: list[str]
) -> None:
    """Raises if the outputs depend on random numbers that are the same in every step.

    A module may draw numbers without using them, as recurrent ones do to set up a carry
    of zeros. With batched keys, exactly the values that depend on them are batched, and
    a batched result cannot be returned with `out_axes=None`.
    """
    if not drawn:
        return
    several = jax.tree.map(lambda key: jnp.expand_dims(key, 0), keys)
    try:
        jax.eval_shape(jax.vmap(call, out_axes=None), several)
    except ValueError as error:
        names = tuple(sorted(set(drawn)))
        raise ValueError(
            f"The outputs depend on random streams whose numbers are the same in every "
            f"step: name them in rngs={names} and hand keys over in "
            f'batch["rngs"][{names[0]!r}], or switch dropout off with model.eval() '
            f"before nnx_model_fn."
        ) from error


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _pure(state: PyTree) -> PyTree:
    """Arrays in place of variables, like `nnx.as_pure`, which old Flax calls `pure`."""

    def value(node: Any) -> Array:
        return node.get_value() if _is_variable(node) else node

    return jax.tree.map(value, state, is_leaf=_is_variable)


def _flat_paths(state: PyTree) -> list[str]:
    leaves = jax.tree.leaves_with_path(_pure(state))
    return [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in leaves]


def _check_paths(name: str, state: PyTree, expected: list[str]) -> None:
    paths = _flat_paths(state)
    if paths != expected:
        missing = sorted(set(expected) - set(paths))
        unknown = sorted(set(paths) - set(expected))
        raise ValueError(
            f"`{name}` must be the state that the filter selected when the model was "
            f"split: missing {missing}, unknown {unknown}."
        )
