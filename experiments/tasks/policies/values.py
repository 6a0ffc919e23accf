"""The value function: a regression on the returns that the advantages imply.

    min_φ  mean_n ½ (V_φ(s_n) - R_n)²,      R = A + V_old

Fitted by Adam on minibatches, or by natural gradient on the whole rollout: squared
error is the negative log-likelihood of a Gaussian, so this is Gauss-Newton within a KL
radius.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import ngd_jax as ngd
from experiments.tasks.policies.minibatches import descend
from experiments.tasks.policies.settings import ValueConfig

__all__ = ["ValueFit", "explained_variance", "make_value_fit"]

PyTree = Any
ValueFn = Callable[[PyTree, PyTree], jax.Array]
# (params, opt_state, batch, key) -> (params, opt_state). The batch holds "observations"
# and "targets".
ValueFit = Callable[[PyTree, PyTree, PyTree, jax.Array], tuple[PyTree, PyTree]]


def make_value_fit(
    config: ValueConfig, value_fn: ValueFn
) -> tuple[Callable[[PyTree], PyTree], ValueFit]:
    """Makes `init(params) -> opt_state`, and the fit after a rollout."""

    def loss_fn(params: PyTree, batch: PyTree) -> jax.Array:
        return jnp.mean((value_fn(params, batch) - batch["targets"]) ** 2) / 2

    if config.method == "adam":
        return _minibatch_fit(config, loss_fn)
    return _natural_fit(config, value_fn, loss_fn)


def explained_variance(values: jax.Array, targets: jax.Array) -> jax.Array:
    """1 - Var(R - V) / Var(R): 1 is perfect, 0 is no better than a constant.

    NaN if all targets are equal.
    """
    return 1 - jnp.var(targets - values) / jnp.var(targets)


def _minibatch_fit(
    config: ValueConfig, loss_fn: ValueFn
) -> tuple[Callable[[PyTree], PyTree], ValueFit]:
    adam = optax.adam(config.learning_rate)

    def fit(
        params: PyTree, opt_state: PyTree, batch: PyTree, key: jax.Array
    ) -> tuple[PyTree, PyTree]:
        size = config.minibatch_size
        return descend(
            adam, loss_fn, params, opt_state, batch, key, config.epochs, size
        )

    return adam.init, fit


def _natural_fit(
    config: ValueConfig, value_fn: ValueFn, loss_fn: ValueFn
) -> tuple[Callable[[PyTree], PyTree], ValueFit]:
    tx = ngd.natural_gradient(
        config.natural_rate,
        value_fn,
        ngd.Gaussian(event_ndims=0),
        max_kl=config.max_kl,
        damping=config.damping,
        solver=ngd.CG(config.max_steps),
    )

    def fit(
        params: PyTree, opt_state: PyTree, batch: PyTree, key: jax.Array
    ) -> tuple[PyTree, PyTree]:
        del key

        def step(carry: tuple[PyTree, PyTree], _: None) -> tuple:
            params, opt_state = carry
            grads = jax.grad(loss_fn)(params, batch)
            updates, opt_state = tx.update(grads, opt_state, params, batch=batch)
            return (optax.apply_updates(params, updates), opt_state), None

        (params, opt_state), _ = jax.lax.scan(
            step, (params, opt_state), length=config.natural_steps
        )
        return params, opt_state

    return tx.init, fit
