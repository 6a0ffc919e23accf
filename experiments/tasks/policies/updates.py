"""One update of a policy on a rollout: what is maximised, and by which step.

    L(θ) = mean_n  π_θ(a_n|s_n) / π_old(a_n|s_n)  A_n,      ∇L(θ_old) = policy gradient

Any Optax transformation that accepts the project's extra arguments takes one step on
the whole rollout: the natural gradient with a KL radius gives trust region policy
optimization, with a fixed rate the natural policy gradient. Proximal policy
optimization takes many steps on minibatches, on a clipped L.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import ngd_jax as ngd
from experiments.running.optimizers import read_step_info, take_step
from experiments.tasks import Task
from experiments.tasks.policies.minibatches import descend

__all__ = [
    "PolicyUpdate",
    "clipped_loss",
    "entropy",
    "make_clipped_update",
    "make_whole_update",
    "policy_task",
    "surrogate_loss",
]

_NORMAL_ENTROPY = (1 + math.log(2 * math.pi)) / 2

PyTree = Any
Records = dict[str, jax.Array]
# (params, opt_state, batch, key) -> (params, opt_state, records). The batch holds
# "observations", "actions", "advantages", and the "log_probs" of the old policy.
PolicyUpdate = Callable[
    [PyTree, PyTree, PyTree, jax.Array], tuple[PyTree, PyTree, Records]
]


def surrogate_loss(
    likelihood: ngd.Likelihood, outputs: PyTree, batch: PyTree
) -> jax.Array:
    """-L(θ): minus the importance-weighted mean advantage.

    References:
      Schulman et al., Trust region policy optimization, 2015, equation 14.
    """
    log_probs = likelihood.log_prob(outputs, batch["actions"])
    ratio = jnp.exp(log_probs - batch["log_probs"])
    return -jnp.mean(ratio * batch["advantages"])


def clipped_loss(
    likelihood: ngd.Likelihood, clip: float, outputs: PyTree, batch: PyTree
) -> jax.Array:
    """-L(θ), with no gain for ratios outside 1 ± `clip`.

    References:
      Schulman et al., Proximal policy optimization algorithms, 2017, equation 7.
    """
    log_probs = likelihood.log_prob(outputs, batch["actions"])
    ratio = jnp.exp(log_probs - batch["log_probs"])
    advantages = batch["advantages"]
    clipped = jnp.clip(ratio, 1 - clip, 1 + clip)
    return -jnp.mean(jnp.minimum(ratio * advantages, clipped * advantages))


def entropy(likelihood: ngd.Likelihood, outputs: PyTree) -> jax.Array:
    """Mean entropy in nats of categorical or normal actions."""
    if isinstance(likelihood, ngd.Categorical):
        log_probs = jax.nn.log_softmax(outputs)
        return -jnp.mean(jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1))
    if isinstance(likelihood, ngd.DiagonalGaussian):
        return jnp.mean(jnp.sum(outputs["log_scale"] + _NORMAL_ENTROPY, axis=-1))
    raise TypeError(f"No entropy of {likelihood!r} is known here.")


def policy_task(
    policy_fn: Callable[[PyTree, PyTree], PyTree],
    init_fn: Callable[[jax.Array], PyTree],
    likelihood: ngd.Likelihood,
) -> Task:
    """The policy in the form that optimizers expect: a task whose data are rollouts."""
    return Task(
        name="policy",
        train={},
        test={},
        init_fn=lambda key: (init_fn(key), {}),
        model_fn=policy_fn,
        likelihood=likelihood,
        output_loss_fn=functools.partial(surrogate_loss, likelihood),
    )


def make_whole_update(
    tx: optax.GradientTransformationExtraArgs, task: Task, *, measure_kl: bool
) -> PolicyUpdate:
    """Makes an update that is one step of `tx` on the surrogate of the whole rollout.

    Args:
      tx: takes `batch`, `value`, `grad` and `value_fn` in addition to the gradient.
      task: the policy, from `policy_task`.
      measure_kl: whether to measure the KL of the step if `tx` does not.
    """

    def update(
        params: PyTree, opt_state: PyTree, batch: PyTree, key: jax.Array
    ) -> tuple[PyTree, PyTree, Records]:
        del key
        value, grads = jax.value_and_grad(task.loss_fn)(params, batch)
        new_params, opt_state, updates = take_step(
            tx, task.loss_fn, params, opt_state, batch, value, grads
        )
        records = {
            "improvement": value - task.loss_fn(new_params, batch),
            "expected_improvement": -jnp.asarray(optax.tree.vdot(grads, updates)),
            **read_step_info(opt_state),
        }
        if "status" in records:
            taken = jnp.array([ngd.StepStatus.TAKEN, ngd.StepStatus.TAKEN_SHORT])
            accepted = jnp.isin(records["status"], taken)
            records["accepted"] = accepted.astype(jnp.float32)
        if measure_kl and "measured_kl" not in records:
            records["measured_kl"] = _kl(task, params, new_params, batch)
        return new_params, opt_state, records

    return update


def make_clipped_update(
    tx: optax.GradientTransformation,
    task: Task,
    *,
    clip: float,
    epochs: int,
    minibatch_size: int,
    measure_kl: bool,
) -> PolicyUpdate:
    """Makes an update of `epochs` passes over the rollout in minibatches.

    Each minibatch gives one step on the clipped loss.

    Args:
      tx: any plain transformation.
      task: the policy, from `policy_task`.
      clip: how far from 1 a ratio can still gain.
      epochs: number of passes.
      minibatch_size: environment steps in a minibatch; divides those of the rollout.
      measure_kl: whether to measure the KL of the whole update.
    """

    def loss_fn(params: PyTree, batch: PyTree) -> jax.Array:
        return clipped_loss(task.likelihood, clip, task.model_fn(params, batch), batch)

    def update(
        params: PyTree, opt_state: PyTree, batch: PyTree, key: jax.Array
    ) -> tuple[PyTree, PyTree, Records]:
        new_params, opt_state = descend(
            tx, loss_fn, params, opt_state, batch, key, epochs, minibatch_size
        )
        improvement = task.loss_fn(params, batch) - task.loss_fn(new_params, batch)
        records = {"improvement": improvement}
        if measure_kl:
            records["measured_kl"] = _kl(task, params, new_params, batch)
        return new_params, opt_state, records

    return update


def _kl(task: Task, params: PyTree, new_params: PyTree, batch: PyTree) -> jax.Array:
    return ngd.mean_kl(task.model_fn, params, new_params, batch, task.likelihood)
