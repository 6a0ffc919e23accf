"""Optimizers from their settings, with one calling convention, and their step reports.

Every transformation accepts the same extra arguments (`batch`, `value`, `grad`,
`value_fn`), so that one training step serves them all. `configs/optimizer/` names the
constructors (`_target_`) and their arguments; the task supplies the model.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import ngd_jax as ngd
from experiments.running.build import build
from experiments.running.settings import (
    AT_LEAST_ONE,
    FRACTION,
    NON_NEGATIVE,
    POSITIVE,
    ConfigError,
)
from experiments.tasks.supervised.task import Task

__all__ = [
    "check_optimizer",
    "make_metric",
    "make_optimizer",
    "read_step_info",
    "take_step",
    "without_extra_arguments",
]

PyTree = Any
Settings = dict[str, Any]

# Settings can be checked before the data of a task is there.
# What the constructors of Optax and its friends take as it comes, wherever it stands.
_RULES = {
    "adam_learning_rate": POSITIVE,
    "b1": FRACTION,
    "b2": FRACTION,
    "beta": FRACTION,
    "learning_rate": POSITIVE,
    "max_linesearch_steps": AT_LEAST_ONE,
    "momentum": FRACTION,
    "weight_decay": NON_NEGATIVE,
}
_NO_TASK = Task(
    name="none",
    train={},
    test={},
    init_fn=lambda _: ({}, {}),
    model_fn=lambda _, batch: batch,
    likelihood=ngd.Categorical(),
    output_loss_fn=lambda *_: jnp.zeros(()),
)


def make_optimizer(
    settings: Settings, task: Task, path: str = "optimizer"
) -> optax.GradientTransformationExtraArgs:
    """Builds the transformation that `settings` describe, for the model of `task`.

    Raises:
      ConfigError: a constructor refuses the settings, or makes no transformation.
    """
    built = _build(settings, task, path)
    if not isinstance(built, optax.GradientTransformation):
        raise ConfigError(
            f"`{path}={settings['name']}` is not for the task {task.name}: it makes no "
            f"Optax transformation, but {built!r}."
        )
    return optax.with_extra_args_support(built)


def check_optimizer(settings: Settings, path: str = "optimizer") -> Any:
    """Builds what `settings` describe for a dummy model, and returns it.

    Raises:
      ConfigError: their constructor refuses the settings.
    """
    return _build(settings, _NO_TASK, path)


def make_metric(
    examples: int | None = None,
    microbatch_size: int | None = None,
    weights_fn: Any = None,
) -> ngd.Metric:
    """The metric on the first `examples` of a batch, None for all.

    Args:
      examples: number of examples; their weights remain those of `weights_fn`.
      microbatch_size: examples in memory at once; None for all.
      weights_fn: see `ngd_jax.Metric`.

    Raises:
      ValueError: `examples` is below 1.
    """
    batch_fn = None
    if examples is not None and examples < 1:
        raise ValueError(f"`examples` must be at least 1, got {examples}.")
    if examples is not None:
        batch_fn = functools.partial(ngd.take_examples, count=examples)
    return ngd.Metric(
        weights_fn=weights_fn, batch_fn=batch_fn, microbatch_size=microbatch_size
    )


def take_step(
    tx: optax.GradientTransformationExtraArgs,
    loss_fn: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    opt_state: PyTree,
    batch: PyTree,
    value: jax.Array,
    grads: PyTree,
) -> tuple[PyTree, PyTree, PyTree]:
    """Passes `tx` all that it may ask for; returns new parameters, state and updates.

    `value` and `grads` are those of `loss_fn(params, batch)`.
    """
    updates, opt_state = tx.update(
        grads, opt_state, params, batch=batch, value=value, grad=grads, value_fn=loss_fn
    )
    return optax.apply_updates(params, updates), opt_state, updates


def without_extra_arguments(
    transformation: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """Hides `batch` and the like from a transformation that wrongly claims them."""

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> Any:
        return transformation.update(updates, state, params)

    return optax.GradientTransformation(transformation.init, update)


def _build(settings: Settings, task: Task, path: str) -> Any:
    settings = {name: value for name, value in settings.items() if name != "name"}
    _check_numbers(settings, path)
    offered = {"weights_fn": task.weights_fn}
    parts = {
        name: build(value, f"{path}.{name}", offered)
        for name, value in settings.items()
        if name != "_target_"
    }
    offered |= {
        "model_fn": task.model_fn,
        "likelihood": task.likelihood,
        "metric": ngd.Metric(weights_fn=task.weights_fn),
    }
    solver, metric = parts.get("solver"), parts.get("metric")
    is_of_part = isinstance(metric, ngd.Metric) and metric.batch_fn is not None
    if isinstance(solver, ngd.Solver) and solver.uses_coefficients and not is_of_part:
        offered["loss_fn"] = task.output_loss_fn
    return build({"_target_": settings.get("_target_"), **parts}, path, offered)


def _check_numbers(settings: Settings, path: str) -> None:
    for name, value in settings.items():
        if isinstance(value, dict):
            _check_numbers(value, f"{path}.{name}")
        rule = _RULES.get(name)
        if rule and isinstance(value, int | float) and not rule.holds(value):
            raise ConfigError(f"`{path}.{name}` must be {rule.text}, got {value}.")


def read_step_info(opt_state: PyTree) -> dict[str, jax.Array]:
    """Returns what the optimizer reports about its last step, as named scalars.

    The natural gradient reports its solve and its radius in full; a zoom line search
    the number of points it tried; other optimizers nothing.
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
