"""The learner of the task `pinn`: optimizer steps on the residuals at all points.

L2 error = √ mean (u_θ - u)²  at the evaluation points
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
from experiments.tasks.equations.derivatives import init_network
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
    """

    step: jax.Array
    key: jax.Array
    params: PyTree
    opt_state: PyTree


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
        self._sizes = Sizes(task.interior, task.boundary, task.layout)
        self._task = physics_task(self.problem, task)
        tx = make_optimizer(config.optimizer, self._task)
        key = jax.random.key(config.seed)
        points_key = jax.random.fold_in(key, POINTS_STREAM)
        points = self.problem.draw_points(points_key, self._sizes)

        def points_of(step: jax.Array) -> Points:
            if not task.fresh_points:
                return points
            step_key = jax.random.fold_in(points_key, step)
            return self.problem.draw_points(step_key, self._sizes)

        self._train_chunk = _make_train_chunk(
            self._task,
            tx,
            points_of,
            capacity=config.steps_per_dispatch,
            measure_kl=config.measure_kl,
        )
        test_points = self.problem.test_points(task.test_points)
        self._error = l2_error(self.problem, test_points)

        def init(key: jax.Array) -> PhysicsState:
            params, _ = self._task.init_fn(key)
            return PhysicsState(jnp.zeros((), jnp.int32), key, params, tx.init(params))

        self.first_state = fix_types(jax.jit(init)(key))
        self.columns = (
            Column("residual", "solver_residual", ".1e"),
            Column("scale", "step_scale", ".2g"),
            Column("L2 error", "test_l2_error", ".2e"),
        )

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
        """Returns the L2 error, absolute and relative to the solution."""
        error, relative = self._error(state.params)
        return {"test_l2_error": error, "test_relative_error": relative}

    def draw(
        self, state: PhysicsState, records: Rows, folder: Path, title: str
    ) -> None:
        """Draws the curves, and the solution with its error and residual."""
        title = f"{self.problem.name}, {title}"
        draw_curves(records, folder / "curves.png", title)
        draw_solution(self.problem, state.params, folder / "solution.png", title)


def physics_task(problem: Problem, config: PhysicsConfig) -> Task:
    """The equation in the form that optimizers expect: a task whose data are points."""
    widths = (problem.num_features, *config.hidden_sizes, 1)
    return Task(
        name="pinn",
        train={},
        test={},
        init_fn=lambda key: (init_network(key, widths, config.initial_scale), {}),
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
    points_of: Callable[[jax.Array], Points],
    *,
    capacity: int,
    measure_kl: bool,
) -> jax.stages.Wrapped:
    """Builds `train_chunk(state, num_steps) -> (state, records)`, jitted; donates."""

    def take_step(
        state: PhysicsState, _index: jax.Array
    ) -> tuple[PhysicsState, Records]:
        points = points_of(state.step)
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
        new = PhysicsState(state.step + 1, state.key, params, opt_state)
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
    faces = len(problem.faces)
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
    if task.fresh_points and task.layout != "random":
        raise ConfigError(
            f"`task.fresh_points` must be false for task.layout={task.layout}: only "
            f"random points can change in every step."
        )
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
