"""Environments of gymnax as pure functions of one environment.

    state, action --step--> observation, state, reward, terminated, truncated

A terminated episode has no future; a truncated one has, but nobody watches it: the two
must never be one flag. Knows nothing of policies.
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
    """What one step of one environment gives.

    Attributes:
      observation: what the policy sees next: of a new episode where this one ended.
      state: of the environment, of the new episode likewise.
      reward: float32.
      terminated: whether the episode came to its end.
      truncated: whether the time limit cut it off.
      next_observation: where the action led to, whether the episode ended or not.
    """

    observation: jax.Array
    state: PyTree
    reward: jax.Array
    terminated: jax.Array
    truncated: jax.Array
    next_observation: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)  # an array has no hash
class Environment:
    """One environment of gymnax with its parameters.

    Attributes:
      name: as gymnax has it.
      dynamics: the environment.
      constants: its parameters.
      observation_shape: of one observation.
      num_actions: of the actions to choose from; 0 where they are vectors.
      action_size: entries of the vectors; 0 where actions are chosen.
      action_low: bounds of the vectors.
      action_high: likewise.
      max_episode_steps: the time limit.
      observation_scale: what observations are divided by.
      is_squashed: whether vectors come to their bounds by tanh; else they are clipped.
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
        """The distribution of the actions: categorical, or normal with learned width.

        That of vectors is not cut off at the bounds: it is of u, and the environment
        acts by `bounded(u)`. Where that is tanh the density of the action is
        p(u) / |da/du|. The Jacobian has no parameters: it cancels in the ratio of two
        policies, and with it in their KL, so that surrogate and metric are those of
        the normal distribution. Not in the entropy, which is that of u.
        """
        return ngd.Categorical() if self.num_actions else ngd.DiagonalGaussian()

    def reset(self, key: jax.Array) -> tuple[jax.Array, PyTree]:
        """The first observation and the state of a new episode."""
        observation, state = self.dynamics.reset_env(key, self.constants)
        return self.scaled(observation), jax.tree.map(_strong, state)

    def step(self, key: jax.Array, state: PyTree, action: jax.Array) -> Transition:
        """Takes `action`; where the episode ends, a new one has begun after it."""
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
        """What the environment is given for an `action` that a policy drew."""
        if self.num_actions:
            return action
        low, high = jnp.asarray(self.action_low), jnp.asarray(self.action_high)
        if self.is_squashed:
            action = low + (high - low) * (1 + jnp.tanh(action)) / 2
        return jnp.clip(action, low, high)  # a squashed one, by round-off

    def scaled(self, observation: Any) -> jax.Array:
        """An observation of the environment as the policy is given it."""
        return _as_float(observation) / jnp.asarray(self.observation_scale, jnp.float32)


def make_environment(
    name: str,
    observation_scale: Sequence[float] = (1.0,),
    *,
    squash_actions: bool = False,
) -> Environment:
    """Builds the environment that gymnax has under `name`.

    Args:
      name: as gymnax has it, or "module:function" for a function that returns what
        `gymnax.make` does: an environment and its parameters.
      observation_scale: what observations are divided by: one number, or one for each
        entry of a vector.
      squash_actions: whether tanh maps vectors of actions into their bounds, instead
        of clipping them.

    Raises:
      ConfigError: gymnax is not installed, has no such environment, or has one whose
        actions or observations no policy here is made for.
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
