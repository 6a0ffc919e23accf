"""A linen module as `model_fn(params, batch)`: `module.apply`, all state in `batch`.

Variables besides the parameters and the random keys are entries of `batch`; what the
module writes is discarded.
"""

from collections.abc import Callable, Sequence
from typing import Any

from flax import errors, linen

from ngd_jax.flax.calls import (
    arguments_of,
    check_call,
    check_names,
    entry_of,
    keys_of,
)
from ngd_jax.types import Batch, ModelFn, Outputs, Params

__all__ = ["linen_model_fn"]


def linen_model_fn(
    module: linen.Module,
    *,
    inputs_fn: Callable[[Batch], Any] | None = None,
    collections: Sequence[str] = (),
    rngs: Sequence[str] = (),
    method: Callable[..., Any] | str | None = None,
    **kwargs: Any,
) -> ModelFn:
    """Makes `model_fn(params, batch)` from a linen module.

        model_fn(params, batch) = module.apply(
            {"params": params, "batch_stats": batch["batch_stats"], ...},
            batch["x"],
            rngs=batch["rngs"],
            **kwargs,
        )

    Args:
      module: the module; it is not changed.
      inputs_fn: batch -> the input of the module, or a tuple of its positional
        arguments. By default `batch["x"]`.
      collections: names of the variable collections besides "params", each read from
        the entry of `batch` of that name. What the module writes to them is discarded,
        so that batch normalisation works in training mode.
      rngs: names of the random streams, such as "dropout", whose keys are read from
        `batch["rngs"]`. The same key gives the same mask: in the gradient, in every
        product with the metric and in the measured KL.
      method: the method to call, or its name; `__call__` by default.
      **kwargs: passed to every call, such as `train=True` or `deterministic=False`.

    Returns:
      `model_fn`, to be given to `natural_gradient` and used in the loss as well.
      `params` are `variables["params"]`.

    Raises:
      TypeError: if `module` is not a linen module, or does not take an argument named
        in `kwargs`.
      ValueError: when `model_fn` is traced, where `batch` lacks an entry, or the module
        reads a collection or a stream that is not named here.

    Example:
      Batch normalisation and dropout in training mode.

      >>> import jax, jax.numpy as jnp, optax, ngd_jax as ngd
      >>> from flax import linen as nn
      >>> from ngd_jax.flax import linen_model_fn
      >>> class Net(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x, train):
      ...         x = nn.tanh(nn.BatchNorm(not train)(nn.Dense(8)(x)))
      ...         return nn.Dense(3)(nn.Dropout(0.1, deterministic=not train)(x))
      >>> x = jax.random.normal(jax.random.key(0), (32, 4))
      >>> labels = jnp.argmax(x[:, :3], axis=-1)
      >>> net = Net()
      >>> variables = net.init(jax.random.key(1), x, train=False)
      >>> params, stats = variables["params"], variables["batch_stats"]
      >>> model_fn = linen_model_fn(
      ...     net, collections=("batch_stats",), rngs=("dropout",), train=True
      ... )
      >>> tx = ngd.natural_gradient(None, model_fn, ngd.Categorical(), max_kl=1e-2)

      The loss keeps the new statistics, the metric does not:

      >>> def loss_fn(params, batch):
      ...     logits, updated = net.apply(
      ...         {"params": params, "batch_stats": batch["batch_stats"]},
      ...         batch["x"],
      ...         train=True,
      ...         rngs=batch["rngs"],
      ...         mutable=["batch_stats"],
      ...     )
      ...     losses = optax.softmax_cross_entropy_with_integer_labels(
      ...         logits, batch["y"]
      ...     )
      ...     return losses.mean(), updated["batch_stats"]
      >>> @jax.jit
      ... def train_step(params, stats, opt_state, key):
      ...     batch = {"x": x, "y": labels, "batch_stats": stats}
      ...     batch["rngs"] = {"dropout": key}
      ...     grads, stats = jax.grad(loss_fn, has_aux=True)(params, batch)
      ...     updates, opt_state = tx.update(grads, opt_state, params, batch=batch)
      ...     return optax.apply_updates(params, updates), stats, opt_state
      >>> opt_state = tx.init(params)
      >>> for step in range(2):
      ...     key = jax.random.key(step)
      ...     params, stats, opt_state = train_step(params, stats, opt_state, key)
      >>> int(opt_state.count), bool(opt_state.info.measured_kl <= 1e-2)
      (2, True)

    Note:
      With batch normalisation in training mode the examples of a batch depend on each
      other. F is then the metric of the outputs as they are, normalised by their own
      batch; `microbatch_size` would normalise by the microbatch, and draw the dropout
      mask of every microbatch from the same key.
    """
    if not isinstance(module, linen.Module):
        raise TypeError(
            f"`module` must be a flax.linen.Module, got {type(module).__name__}."
        )
    collections, rngs = (
        check_names("collections", collections),
        check_names("rngs", rngs),
    )
    if "params" in collections:
        raise ValueError(
            "`collections` must not hold 'params': they are the first argument of "
            "model_fn."
        )
    called = method if callable(method) else getattr(module, method or "__call__", None)
    check_call(called, method, kwargs, owner="module")

    def model_fn(params: Params, batch: Batch) -> Outputs:
        variables = {name: entry_of(batch, name, "collections") for name in collections}
        try:
            outputs, _ = module.apply(
                {"params": params, **variables},
                *arguments_of(batch, inputs_fn),
                rngs=keys_of(batch, rngs),
                method=method,
                mutable=list(collections),
                **kwargs,
            )
        except errors.ScopeCollectionNotFound as error:
            raise ValueError(
                "The module reads a variable that it was not given: name its "
                'collection, as in collections=("batch_stats",), and hand the values '
                f'over in batch["batch_stats"]. {error}'
            ) from error
        except errors.ModifyScopeVariableError as error:
            raise ValueError(
                "The module writes to a collection that is not among `collections`: "
                f"name it there; what is written is discarded. {error}"
            ) from error
        except errors.InvalidRngError as error:
            raise ValueError(
                "The module draws random numbers without a key: name the stream, as in "
                'rngs=("dropout",), and hand a key over in batch["rngs"]["dropout"]. '
                f"{error}"
            ) from error
        return outputs

    return model_fn
