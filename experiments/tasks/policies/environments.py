"""Environments of gymnax as pure functions of one environment.

    state, action --step--> observation, state, reward, terminated, truncated

A terminated episode has no future; a truncated one has, but it is not observed. The two
must never be merged into one flag. Knows nothing of policies.
"""

import dataclasses
import importlib.util
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import ngd_jax as ngd
from experiments.running.build import locate
from experiments.running.settings import ConfigError

__all__ = ["Environment", "Transition", "make_environment"]

PyTree = Any


class Transition(NamedTuple):
    """The result of one step of one environment.

    Attributes:
      observation: what the policy sees next: of a new episode if this one ended.
      state: of the environment, likewise of the new episode.
      reward: float32.
      terminated: whether the episode reached a terminal state.
      truncated: whether the time limit cut the episode off.
      next_observation: of the state that the action led to, even if the episode ended.
    """

    observation: jax.Array
    state: PyTree
    reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    next_observation: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)  # an array has no hash
class Environment:
    """One gymnax environment with its parameters.

    Attributes:
      name: its name in gymnax.
      dynamics: the environment.
      constants: its parameters.
      observation_shape: of one observation.
      num_actions: number of discrete actions; 0 for vectors.
      action_size: number of entries of an action vector; 0 for discrete actions.
      action_low: lower bounds of action vectors.
      action_high: upper bounds.
      max_episode_steps: the time limit.
      observation_scale: what observations are divided by.
      is_squashed: whether tanh maps action vectors into their bounds; otherwise they
        are clipped.
    """

    name: str
    dynamics: Any
    constants: Any
    observation_shape: tuple[int, ...]
    num_actions: int
    action_size: int
    action_low: float | tuple[float, ...]
    action_high: float | tuple[float, ...]
    max_episode_steps: int
    observation_scale: tuple[float, ...] = (1.0,)
    is_squashed: bool = False

    @property
    def likelihood(self) -> ngd.Likelihood:
        """The distribution of actions: categorical, or normal with learned width.

        For vectors, the distribution is not cut off at the bounds: it is that of u, and
        the environment gets the action a = `bounded(u)`. If that is tanh, the density
        of the action is p(u) / |da/du|. The Jacobian does not depend on the parameters,
        so it cancels in the ratio of two policies and in their KL: surrogate and metric
        are those of the normal distribution. It does not cancel in the entropy, which
        is that of u.
        """
        return ngd.Categorical() if self.num_actions else ngd.DiagonalGaussian()

    def reset(self, key: jax.Array) -> tuple[jax.Array, PyTree]:
        """The first observation and the state of a new episode."""
        observation, state = self.dynamics.reset_env(key, self.constants)
        return self.scaled(observation), jax.tree.map(_strong, state)

    def step(self, key: jax.Array, state: PyTree, action: jax.Array) -> Transition:
        """Takes `action`; if the episode ends, a new one begins after it."""
        observation, next_state, reward, terminated, truncated, info = (
            self.dynamics.step(key, state, self.bounded(action), self.constants)
        )
        # The dtypes of a state must not change from step to step.
        next_state = jax.tree.map(
            lambda new, old: (
                jnp.asarray(new).astype(jnp.result_type(old)).reshape(jnp.shape(old))
            ),
            next_state,
            state,
        )
        return Transition(
            observation=self.scaled(observation),
            state=next_state,
            reward=_as_float(reward),
            terminated=terminated,
            truncated=truncated & ~terminated,
            next_observation=self.scaled(info["final_observation"]),
        )

    def bounded(self, action: jax.Array) -> jax.Array:
        """The action passed to the environment for an `action` that a policy drew."""
        if self.num_actions:
            return action
        low, high = jnp.asarray(self.action_low), jnp.asarray(self.action_high)
        if self.is_squashed:
            action = low + (high - low) * (1 + jnp.tanh(action)) / 2
        return jnp.clip(action, low, high)  # also after tanh, because of round-off

    def scaled(self, observation: Any) -> jax.Array:
        """Scales an observation of the environment for the policy."""
        return _as_float(observation) / jnp.asarray(self.observation_scale, jnp.float32)


def make_environment(
    name: str,
    observation_scale: Sequence[float] = (1.0,),
    *,
    squash_actions: bool = False,
) -> Environment:
    """Builds the gymnax environment called `name`.

    Args:
      name: its name in gymnax, or "module:function" for a function that returns an
        environment and its parameters, as `gymnax.make` does.
      observation_scale: what observations are divided by: one number, or one for each
        entry of a vector.
      squash_actions: whether tanh maps action vectors into their bounds; otherwise they
        are clipped.

    Raises:
      ConfigError: gymnax is not installed or has no such environment, or no policy here
        supports its actions or observations.
    """
    for package in ("gymnax", "six"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"`task.env` needs {package}, which is not installed: "
                f"pip install -e '.[rl]'."
            )
    import gymnax
    from gymnax.environments import spaces

    if ":" in name:
        dynamics, constants = _own_environment(name)
    elif name in gymnax.registered_envs:
        dynamics, constants = gymnax.make(name)
    else:
        raise ConfigError(
            f"`task.env` must be one of {', '.join(gymnax.registered_envs)}, or a "
            f"module:function of your own; got {name!r}."
        )
    actions = dynamics.action_space(constants)
    observation, _ = jax.eval_shape(
        lambda key: dynamics.reset_env(key, constants), jax.random.key(0)
    )
    is_discrete = isinstance(actions, spaces.Discrete)
    is_vector = isinstance(actions, spaces.Box) and len(actions.shape) == 1
    if not (is_discrete or is_vector) or not hasattr(observation, "shape"):
        raise ConfigError(
            f"`task.env` must have observations of one array and actions that are "
            f"chosen from a list or vectors; {name} has actions {actions!r} and "
            f"observations {observation!r}."
        )
    shape = tuple(observation.shape)
    if len(observation_scale) != 1 and shape != (len(observation_scale),):
        raise ConfigError(
            f"`task.observation_scale` must have 1 number, or as many as an "
            f"observation of {name} has entries, shape {shape}; got "
            f"{len(observation_scale)}."
        )
    low, high = (0.0, 0.0) if is_discrete else _bounds(actions)
    if squash_actions and (is_discrete or not np.isfinite([low, high]).all()):
        raise ConfigError(
            f"`task.squash_actions` must be false unless actions are vectors with "
            f"finite bounds, got true for {name} with actions {actions!r}."
        )
    return Environment(
        name=name,
        dynamics=dynamics,
        constants=constants,
        observation_shape=shape,
        num_actions=int(actions.n) if is_discrete else 0,
        action_size=0 if is_discrete else int(actions.shape[0]),
        action_low=low,
        action_high=high,
        max_episode_steps=int(constants.max_steps_in_episode),
        observation_scale=tuple(observation_scale),
        is_squashed=squash_actions,
    )


def _own_environment(name: str) -> tuple[Any, Any]:
    from gymnax.environments.environment import Environment as Dynamics

    made = locate(name, "task.env")()
    if not (
        isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], Dynamics)
    ):
        raise ConfigError(
            f"`task.env` must name a function that makes a gymnax environment and its "
            f"parameters, as gymnax.make does, but {name} made {made!r}."
        )
    return made


def _bounds(actions: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    size = actions.shape[0]
    low, high = (
        jnp.broadcast_to(jnp.asarray(bound, jnp.float32), (size,)).tolist()
        for bound in (actions.low, actions.high)
    )
    return tuple(low), tuple(high)


def _as_float(x: Any) -> jax.Array:
    return jnp.asarray(x).astype(jnp.float32)


def _strong(leaf: Any) -> jax.Array:
    leaf = jnp.asarray(leaf)
    return jax.lax.convert_element_type(leaf, leaf.dtype)
