"""The settings of the task `trpo`.

`configs/task/trpo.yaml` and `configs/env/` have the values.
"""

import dataclasses
from typing import Annotated

from experiments.running.settings import (
    AT_LEAST_ONE,
    NON_NEGATIVE,
    POSITIVE,
    Rule,
    one_of,
)

__all__ = ["PPOConfig", "PolicyConfig", "ValueConfig"]

UP_TO_ONE = Rule("in [0, 1]", lambda value: 0.0 <= value <= 1.0)


@dataclasses.dataclass
class ValueConfig:
    """How the value function is fitted after each rollout.

    Attributes:
      hidden_sizes: widths of its hidden layers.
      method: "adam", on minibatches, or "natural_gradient", on the whole rollout.
      learning_rate: of Adam.
      epochs: Adam's passes over the rollout.
      minibatch_size: environment steps in a minibatch of Adam.
      natural_rate: learning rate of the natural gradient, if the radius allows it.
      natural_steps: number of natural gradient steps on the whole rollout.
      max_kl: radius of a natural gradient step in nats per environment step, for a
        normal distribution of width one around the value; null for none.
      damping: λ of the natural gradient.
      max_steps: largest number of conjugate gradient steps of the natural gradient.
    """

    hidden_sizes: Annotated[list[int], AT_LEAST_ONE]
    method: Annotated[str, one_of("adam", "natural_gradient")]
    learning_rate: Annotated[float, POSITIVE]
    epochs: Annotated[int, AT_LEAST_ONE]
    minibatch_size: Annotated[int, AT_LEAST_ONE]
    natural_rate: Annotated[float, POSITIVE]
    natural_steps: Annotated[int, AT_LEAST_ONE]
    max_kl: Annotated[float | None, POSITIVE]
    damping: Annotated[float, NON_NEGATIVE]
    max_steps: Annotated[int, AT_LEAST_ONE]


@dataclasses.dataclass
class PPOConfig:
    """Settings of proximal policy optimization by Adam, `optimizer=ppo`.

    Attributes:
      learning_rate: of Adam.
      clip: moving a ratio of probabilities further than this from 1 gains nothing.
      epochs: number of passes over a rollout.
      minibatch_size: environment steps in a minibatch; divides `batch_size`.
    """

    learning_rate: Annotated[float, POSITIVE]
    clip: Annotated[float, POSITIVE]
    epochs: Annotated[int, AT_LEAST_ONE]
    minibatch_size: Annotated[int, AT_LEAST_ONE]


@dataclasses.dataclass
class PolicyConfig:
    """Settings of the task `trpo`.

    Attributes:
      name: "trpo".
      env: the environment, as gymnax names it; `env=...` chooses one with its values.
        As "module:function", a function that returns what `gymnax.make` does.
      num_agents: agents that learn in parallel, each from a seed of its own; curves
        then have bands.
      num_envs: copies of the environment that an agent acts in; `batch_size` must be a
        multiple of it.
      discount: γ.
      trace_decay: λ of the advantages.
      observation_scale: what observations are divided by: one number for each entry, or
        one for all.
      normalize_observations: whether they are then shifted by the mean and divided by
        the standard deviation of all observations that the agent had seen before the
        rollout.
      reward_scale: what rewards are multiplied by for learning; logs and evaluations
        use the true ones.
      hidden_sizes: widths of the policy's hidden layers.
      initial_scale: standard deviation of the first actions, if they are vectors.
      squash_actions: whether tanh maps action vectors into their bounds, instead of
        clipping them; `initial_scale` and the entropy in the logs then refer to the
        argument of tanh.
      eval_episodes: number of episodes of an evaluation, in which the policy takes its
        most likely action.
      value: the value function.
    """

    name: str
    env: str
    num_agents: Annotated[int, AT_LEAST_ONE]
    num_envs: Annotated[int, AT_LEAST_ONE]
    discount: Annotated[float, UP_TO_ONE]
    trace_decay: Annotated[float, UP_TO_ONE]
    observation_scale: Annotated[list[float], POSITIVE]
    normalize_observations: bool
    reward_scale: Annotated[float, POSITIVE]
    hidden_sizes: Annotated[list[int], AT_LEAST_ONE]
    initial_scale: Annotated[float, POSITIVE]
    squash_actions: bool
    eval_episodes: Annotated[int, AT_LEAST_ONE]
    value: ValueConfig
