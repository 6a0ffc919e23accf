"""The optimizers by name, all called in one way, and what each tells about its step.

Every transformation accepts the same extra arguments (`batch`, `value`, `grad`,
`value_fn`), so that one training step serves them all. Knows nothing of loops, logs or
particular tasks.
"""

import dataclasses
from typing import Annotated, Any

import jax
import optax

import ngd_jax as ngd
from experiments.settings import (
    AT_LEAST_ONE,
    FRACTION,
    NON_NEGATIVE,
    POSITIVE,
    ConfigError,
)
from experiments.tasks import Task

__all__ = [
    "OPTIMIZER_CONFIGS",
    "CGConfig",
    "make_optimizer",
    "read_step_info",
]

PyTree = Any


@dataclasses.dataclass
class CGConfig:
    """Settings of the conjugate gradients inside the natural gradient.

    Attributes:
      max_steps: steps at most, each one Fisher-vector product.
      rtol: stop once the residual is this fraction of the gradient.
    """

    max_steps: Annotated[int, AT_LEAST_ONE]
    rtol: Annotated[float, NON_NEGATIVE]


@dataclasses.dataclass
class NaturalGradientConfig:
    """Settings of `ngd_jax.natural_gradient`.

    Attributes:
      name: "natural_gradient".
      learning_rate: length of the step in natural gradients; null to go to the radius
        at every step.
      max_kl: trust-region radius in nats per example; null for none.
      damping: added to the Fisher matrix, in its units.
      momentum: weight of the previous direction, in [0, 1).
      cg: the inner solver.
    """

    name: str
    learning_rate: Annotated[float | None, POSITIVE]
    max_kl: Annotated[float | None, POSITIVE]
    damping: Annotated[float, NON_NEGATIVE]
    momentum: Annotated[float, FRACTION]
    cg: CGConfig


@dataclasses.dataclass
class AdamConfig:
    """Settings of `optax.adam`."""

    name: str
    learning_rate: Annotated[float, POSITIVE]
    b1: Annotated[float, FRACTION]
    b2: Annotated[float, FRACTION]


@dataclasses.dataclass
class SGDConfig:
    """Settings of `optax.sgd`, with Nesterov's momentum."""

    name: str
    learning_rate: Annotated[float, POSITIVE]
    momentum: Annotated[float, FRACTION]


@dataclasses.dataclass
class LBFGSConfig:
    """Settings of `optax.lbfgs` with its zoom line search.

    Attributes:
      name: "lbfgs".
      memory_size: pairs of steps and gradient differences that are kept.
      max_linesearch_steps: evaluations of the loss at most in one line search.
    """

    name: str
    memory_size: Annotated[int, AT_LEAST_ONE]
    max_linesearch_steps: Annotated[int, AT_LEAST_ONE]


OPTIMIZER_CONFIGS = {
    "natural_gradient": NaturalGradientConfig,
    "adam": AdamConfig,
    "sgd": SGDConfig,
    "lbfgs": LBFGSConfig,
}


def make_optimizer(config: Any, task: Task) -> optax.GradientTransformationExtraArgs:
    """Builds the transformation that `config.name` names, for the model of `task`."""
    match config:
        case NaturalGradientConfig():
            return _make_natural_gradient(config, task)
        case AdamConfig():
            tx = optax.adam(config.learning_rate, b1=config.b1, b2=config.b2)
        case SGDConfig():
            tx = optax.sgd(
                config.learning_rate, momentum=config.momentum, nesterov=True
            )
        case LBFGSConfig():
            tx = optax.lbfgs(
                memory_size=config.memory_size,
                linesearch=optax.scale_by_zoom_linesearch(
                    max_linesearch_steps=config.max_linesearch_steps,
                    initial_guess_strategy="one",
                ),
            )
        case _:
            raise TypeError(f"No optimizer is built from {config!r}.")
    return optax.with_extra_args_support(tx)


def _make_natural_gradient(
    config: NaturalGradientConfig, task: Task
) -> optax.GradientTransformationExtraArgs:
    if config.learning_rate is None and config.max_kl is None:
        raise ConfigError(
            "`optimizer.learning_rate` and `optimizer.max_kl` cannot both be null: one "
            "of them sets the length of the step."
        )
    return ngd.natural_gradient(
        config.learning_rate,
        task.model_fn,
        task.likelihood,
        max_kl=config.max_kl,
        damping=config.damping,
        momentum=config.momentum,
        solver=ngd.CG(max_steps=config.cg.max_steps, rtol=config.cg.rtol),
    )


def read_step_info(opt_state: PyTree) -> dict[str, jax.Array]:
    """Returns what the optimizer itself reports of its last step, as named scalars.

    The natural gradient tells all about its solve and its radius; a zoom line search
    how many points it tried; other optimizers nothing.
    """
    info = optax.tree.get(opt_state, "NaturalGradientInfo")
    if info is not None:
        return {
            "measured_kl": info.measured_kl,
            "predicted_kl": info.predicted_kl,
            "solver_steps": info.solver.num_steps,
            "solver_residual": info.solver.relative_residual,
            "solver_status": info.solver.status,
            "step_scale": info.step_scale,
            "damping": info.damping,
            "kl_evaluations": info.num_kl_evaluations,
            "status": info.status,
        }
    search = optax.tree.get(opt_state, "ZoomLinesearchInfo")
    if search is not None:
        return {"linesearch_steps": search.num_linesearch_steps}
    return {}
