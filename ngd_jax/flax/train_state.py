"""Flax's TrainState for optimizers that take extra arguments, such as `batch`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import optax
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state

from ngd_jax.types import PyTree

__all__ = ["TrainState"]


class TrainState(train_state.TrainState):
    """Flax's TrainState, with extra arguments of `apply_gradients` for the optimizer.

        updates, opt_state ← tx.update(grads, opt_state, params, batch=batch, ...)

    Of the keyword arguments, those that name a field of the dataclass replace it, as in
    Flax; all others go to `tx.update`. Works with every Optax optimizer: one that takes
    no extra arguments is not given any.

    Attributes:
      step: how many gradients were applied.
      apply_fn: for the caller's use.
      params: the parameters.
      tx: the optimizer.
      opt_state: its state.

    Example:
      >>> import jax, jax.numpy as jnp, optax, ngd_jax as ngd
      >>> from flax import linen as nn
      >>> from ngd_jax.flax import TrainState, linen_model_fn
      >>> x = jax.random.normal(jax.random.key(0), (64, 3))
      >>> batch = {"x": x, "y": x @ jnp.array([[1.0], [-2.0], [0.5]])}
      >>> net = nn.Dense(1, use_bias=False)
      >>> model_fn = linen_model_fn(net)
      >>> state = TrainState.create(
      ...     apply_fn=net.apply,
      ...     params=net.init(jax.random.key(1), x)["params"],
      ...     tx=ngd.natural_gradient(1.0, model_fn, ngd.Gaussian(), damping=0.0),
      ... )
      >>> def loss_fn(params):
      ...     return 0.5 * jnp.mean((model_fn(params, batch) - batch["y"]) ** 2)
      >>> grads = jax.grad(loss_fn)(state.params)
      >>> state = state.apply_gradients(grads=grads, batch=batch)
      >>> state.step, state.params["kernel"].ravel().round(3)
      (1, Array([ 1. , -2. ,  0.5], dtype=float32))
    """

    def apply_gradients(self, *, grads: PyTree, **kwargs: Any) -> "TrainState":
        """One step of the optimizer.

        Args:
          grads: of the structure of `params`. An entry "_overwrite_with_gradient" (fp8
            statistics) replaces the parameters of that name, as in Flax.
          **kwargs: fields of the dataclass, which are replaced; anything else, such as
            `batch`, `value` and `value_fn`, is an extra argument of `tx.update`.

        Returns:
          The state after the step, with `step` one higher.

        Raises:
          TypeError: for a field that the step itself sets.
        """
        own = {"step", "params", "opt_state"} & kwargs.keys()
        if own:
            raise TypeError(
                f"`apply_gradients` sets {sorted(own)} itself: use `replace` before or "
                f"after it."
            )
        fields = {field.name for field in dataclasses.fields(self)}
        replaced = {name: kwargs[name] for name in kwargs.keys() & fields}
        extra_args = {name: kwargs[name] for name in kwargs.keys() - fields}

        overwrites = isinstance(grads, Mapping) and OVERWRITE_WITH_GRADIENT in grads
        trained = self.params["params"] if overwrites else self.params
        updates, opt_state = optax.with_extra_args_support(self.tx).update(
            grads["params"] if overwrites else grads,
            self.opt_state,
            trained,
            **extra_args,
        )
        params: Any = optax.apply_updates(trained, updates)
        if overwrites:
            params = {
                "params": params,
                OVERWRITE_WITH_GRADIENT: grads[OVERWRITE_WITH_GRADIENT],
            }
        return self.replace(
            step=self.step + 1, params=params, opt_state=opt_state, **replaced
        )
