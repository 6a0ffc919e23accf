"""The learner of the task `pinn`: optimizer steps on the residuals at all points.

L2 error = √ mean (u_θ - u)²  at the evaluation points, over all outputs of a system
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from threadpoolctl import threadpool_limits

import ngd_jax as ngd
from experiments.running.config import TrainConfig
from experiments.running.dispatch import fix_types, match_types, take_steps
from experiments.running.learner import Advance, Records, Rows
from experiments.running.optimizers import make_optimizer, read_step_info
from experiments.running.screen import Column
from experiments.running.settings import ConfigError
from experiments.tasks.equations.pictures import draw_curves, draw_solution
from experiments.tasks.equations.problem import Points, Problem, Sizes
from experiments.tasks.equations.problems import make_problem
from experiments.tasks.equations.settings import PhysicsConfig
from experiments.tasks.supervised.task import Task

__all__ = ["PhysicsLearner", "PhysicsState", "l2_error", "physics_task"]

PyTree = Any

# Folded into the key of a run to draw its points; parameters use the key itself.
POINTS_STREAM = 2**31 - 1


class PhysicsState(NamedTuple):
    """Everything that the next step needs.

    Attributes:
      step: int32, steps taken.
      key: for drawing the points of a step.
      params: of the network.
      opt_state: of the optimizer.
      points: those of the last step.
    """

    step: jax.Array
    key: jax.Array
    params: PyTree
    opt_state: PyTree
    points: Points


class PhysicsLearner:
    """Solves the equation of `config.task`; see `Learner`.

    Raises:
      ConfigError: settings that contradict each other.
    """

    train_data = None

    def __init__(self, config: TrainConfig):
        _check(config)
        task: PhysicsConfig = config.task
        self._config = config
        self.problem = make_problem(task.problem)
        sizes = Sizes(task.interior, task.boundary, task.layout)
        self._task = physics_task(self.problem, task)
        tx = make_optimizer(config.optimizer, self._task)
        key = jax.random.key(config.seed)
        points_key = jax.random.fold_in(key, POINTS_STREAM)
        points = self.problem.draw_points(points_key, sizes)
        if any(jnp.isnan(leaf).any() for leaf in jax.tree.leaves(points)):
            raise ConfigError(
                f"`task.problem={task.problem}` has too few points: the region must "
                f"fill a twentieth of its box, and its boundary as much of its curves."
            )

        def points_of(state: PhysicsState) -> Points:
            if task.redraw_every is None:
                return state.points
            is_due = (state.step > 0) & (state.step % task.redraw_every == 0)
            step_key = jax.random.fold_in(points_key, state.step)
            return jax.lax.cond(
                is_due,
                lambda: self.problem.redraw_points(
                    step_key, state.params, state.points, sizes, task.residual_power
                ),
                lambda: state.points,
            )

        def weighed(params: PyTree, points: Points) -> Points:
            if not task.causality:
                return points
            return self.problem.weigh_causally(params, points, task.causality)

        self._train_chunk = _make_train_chunk(
            self._task,
            tx,
            points_of,
            weighed,
            capacity=config.steps_per_dispatch,
            measure_kl=config.measure_kl,
        )
        test_points = self.problem.test_points(task.test_points)
        self._error = l2_error(self.problem, test_points)

        def init(key: jax.Array) -> PhysicsState:
            params, _ = self._task.init_fn(key)
            step = jnp.zeros((), jnp.int32)
            return PhysicsState(step, key, params, tx.init(params), points)

        self.first_state = fix_types(jax.jit(init)(key))
        self.columns = (
            Column("residual", "solver_residual", ".1e"),
            Column("scale", "step_scale", ".2g"),
            Column("L2 error", "test_l2_error", ".2e"),
        )
        if self.problem.unknowns is not None:
            self.columns += (Column("coeff.", "test_coefficient_error", ".1e"),)

    @contextlib.contextmanager
    def start(self, state: PhysicsState) -> Iterator[Advance]:
        """Yields the compiled `advance(state, num_steps)`."""
        train_chunk = self._train_chunk.lower(state, np.int32(0)).compile()
        # The matrices are small: on a busy machine the threads of LAPACK wait for each
        # other for thirty times as long as a single thread computes.
        with threadpool_limits(limits=1, user_api="blas"):
            yield self._advance(train_chunk)

    def _advance(self, train_chunk: Any) -> Advance:

        def advance(
            state: PhysicsState, num_steps: int
        ) -> tuple[PhysicsState, Records]:
            return train_chunk(state, np.int32(num_steps))

        return advance

    def evaluate(self, state: PhysicsState) -> dict[str, Any]:
        """Returns the L2 error, absolute and relative, and that of coefficients."""
        error, relative = self._error(state.params)
        metrics = {"test_l2_error": error, "test_relative_error": relative}
        if (unknowns := self.problem.unknowns) is not None:
            found = unknowns.relative_error(state.params["coefficients"])
            metrics["test_coefficient_error"] = found
        return metrics

    def draw(
        self, state: PhysicsState, records: Rows, folder: Path, title: str
    ) -> None:
        """Draws the curves, and the solution with its error and residual."""
        title = f"{self.problem.name}, {title}"
        draw_curves(records, folder / "curves.png", title)
        draw_solution(self.problem, state.params, folder / "solution.png", title)


def physics_task(problem: Problem, config: PhysicsConfig) -> Task:
    """The equation in the form that optimizers expect: a task whose data are points."""
    sizes, scale = config.hidden_sizes, config.initial_scale
    return Task(
        name="pinn",
        train={},
        test={},
        init_fn=lambda key: (problem.init(key, sizes, scale), {}),
        model_fn=problem.residuals,
        likelihood=problem.likelihood,
        output_loss_fn=problem.loss,
    )


def l2_error(
    problem: Problem, points: jax.Array
) -> Callable[[PyTree], tuple[jax.Array, jax.Array]]:
    """A function from parameters to the root of the mean squared error at some points.

    Returns:
      A compiled function whose results are absolute, and relative to the solution. The
      exact solution is computed in float64, whatever dtype the points have.
    """
    with jax.enable_x64(True):
        exact = np.asarray(problem.solution(jnp.asarray(points, jnp.float64)))

    @jax.jit
    def error_of(params: PyTree) -> tuple[jax.Array, jax.Array]:
        values = jax.vmap(functools.partial(problem.value, params))(points)
        error = jnp.sqrt(jnp.mean((values - exact.astype(points.dtype)) ** 2))
        return error, error / np.sqrt(np.mean(exact**2))

    return error_of


def _make_train_chunk(
    task: Task,
    tx: optax.GradientTransformationExtraArgs,
    points_of: Callable[[PhysicsState], Points],
    weighed: Callable[[PyTree, Points], Points],
    *,
    capacity: int,
    measure_kl: bool,
) -> jax.stages.Wrapped:
    """Builds `train_chunk(state, num_steps) -> (state, records)`, jitted; donates."""

    def take_step(
        state: PhysicsState, _index: jax.Array
    ) -> tuple[PhysicsState, Records]:
        drawn = points_of(state)
        points = weighed(state.params, drawn)
        value, grads = jax.value_and_grad(task.loss_fn)(state.params, points)
        updates, opt_state = tx.update(
            grads,
            state.opt_state,
            state.params,
            batch=points,
            value=value,
            grad=grads,
            value_fn=functools.partial(_loss_on, task, points),
        )
        params = optax.apply_updates(state.params, updates)
        records = {"loss": value, **read_step_info(opt_state)}
        if measure_kl and "measured_kl" not in records:
            records["measured_kl"] = ngd.mean_kl(
                task.model_fn, state.params, params, points, task.likelihood
            )
        new = PhysicsState(state.step + 1, state.key, params, opt_state, drawn)
        return match_types(new, state), records

    def train_chunk(
        state: PhysicsState, num_steps: jax.Array
    ) -> tuple[PhysicsState, Records]:
        return take_steps(take_step, state, num_steps, capacity)

    return jax.jit(train_chunk, donate_argnums=0)


def _loss_on(
    task: Task, points: Points, params: PyTree, *_: Any, **__: Any
) -> jax.Array:
    """The loss for line searches, which may pass further arguments."""
    return task.loss_fn(params, points)


def _check(config: TrainConfig) -> None:
    task: PhysicsConfig = config.task
    problem = make_problem(task.problem)
    if task.layout == "grid":
        if problem.dimension != 2:
            raise ConfigError(
                f"`task.layout` must be halton or random in {problem.dimension} "
                f"dimensions, got grid, which needs two dimensions."
            )
        if round(task.interior**0.5) ** 2 != task.interior:
            raise ConfigError(
                f"`task.interior` must be a square for task.layout=grid, got "
                f"{task.interior}."
            )
    if problem.region is not None and task.layout == "grid":
        raise ConfigError(
            f"`task.layout` must be halton or random for task.problem={task.problem}, "
            f"whose region is no box; got grid."
        )
    faces = problem.num_faces
    if (faces == 0) != (task.boundary == 0):
        raise ConfigError(
            f"`task.boundary` must be {'positive' if faces else 0} for "
            f"task.problem={task.problem}, which has {faces or 'no'} faces with a "
            f"boundary condition; got {task.boundary}."
        )
    if task.layout != "random" and faces and task.boundary % faces:
        raise ConfigError(
            f"`task.boundary` must be a multiple of {faces} for "
            f"task.layout={task.layout}, got {task.boundary}."
        )
    _check_steps(task, problem)
    for name in ("batch_size", "eval_train_examples", "stream_above"):
        if (value := getattr(config, name)) is not None:
            raise ConfigError(
                f"`{name}` is about a training set, and task=pinn has points: it must "
                f"be null, got {value}."
            )
    if config.distributed.num_processes > 1:
        raise ConfigError(
            f"`distributed.num_processes` must be 1 for task=pinn, got "
            f"{config.distributed.num_processes}."
        )


def _check_steps(task: PhysicsConfig, problem: Problem) -> None:
    """What changes from step to step: points and their weights."""
    allowed = ("halton", "random") if task.residual_power else ("random",)
    if task.redraw_every is not None and task.layout not in allowed:
        raise ConfigError(
            f"`task.redraw_every` must be null for task.layout={task.layout}: only "
            f"random points can change, and with task.residual_power those of halton."
        )
    if task.residual_power and task.redraw_every is None:
        raise ConfigError(
            f"`task.residual_power` must be 0 without task.redraw_every, got "
            f"{task.residual_power}."
        )
    if task.causality and not problem.is_in_time:
        raise ConfigError(
            f"`task.causality` must be 0 for task.problem={task.problem}, which has no "
            f"time; got {task.causality}."
        )
