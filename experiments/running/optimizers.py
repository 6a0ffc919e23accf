"""The optimizers by name, all called in one way, and what each tells about its step.

Every transformation accepts the same extra arguments (`batch`, `value`, `grad`,
`value_fn`), so that one training step serves them all. Knows nothing of loops, logs or
particular tasks.
"""

import dataclasses
import functools
from typing import Annotated, Any

import jax
import optax
import optax.contrib

import ngd_jax as ngd
from experiments.running.settings import (
    AT_LEAST_ONE,
    FRACTION,
    NON_NEGATIVE,
    POSITIVE,
    ConfigError,
    Rule,
    one_of,
)
from experiments.tasks import Task
from ngd_jax import contrib

__all__ = [
    "ALL_OPTIMIZER_CONFIGS",
    "OPTIMIZER_CONFIGS",
    "OTHER_OPTIMIZER_CONFIGS",
    "NaturalGradientConfig",
    "PPOConfig",
    "make_optimizer",
    "make_solver",
    "read_step_info",
]

PyTree = Any

ZERO_OR_MORE = Rule("zero or more", lambda value: value >= 0)
AT_LEAST_ONE_TIMES = Rule("1 or more", lambda value: value >= 1)


@dataclasses.dataclass
class CGConfig:
    """Settings of the conjugate gradients inside the natural gradient.

    Attributes:
      max_steps: steps at most, each one Fisher-vector product.
      rtol: stop once the residual is this fraction of the gradient.
      preconditioner: "none", "jacobi" (the diagonal), "nystrom" (a sketch of F) or
        "kronecker" (factored blocks of dense layers and convolutions, averaged over
        steps).
      refresh_every: steps for which the preconditioner is kept, or what kfac inverts.
      observe_every: of kronecker and kfac: one batch in so many goes into the averages.
      rank: vectors of the sketch.
      decay: of kronecker, and of the solver kfac: weight of the past in its averages.
    """

    max_steps: Annotated[int, AT_LEAST_ONE]
    rtol: Annotated[float, NON_NEGATIVE]
    preconditioner: Annotated[str, one_of("none", "jacobi", "nystrom", "kronecker")]
    refresh_every: Annotated[int, AT_LEAST_ONE]
    observe_every: Annotated[int, AT_LEAST_ONE]
    rank: Annotated[int, AT_LEAST_ONE]
    decay: Annotated[float, FRACTION]


@dataclasses.dataclass
class LSMRConfig:
    """Settings of the least-squares solver inside the natural gradient.

    Attributes:
      max_steps: steps at most, each at the price of one Fisher-vector product.
      rtol: stop once the residual is this fraction of the gradient.
    """

    max_steps: Annotated[int, AT_LEAST_ONE]
    rtol: Annotated[float, NON_NEGATIVE]


@dataclasses.dataclass
class NaturalGradientConfig:
    """Settings of `ngd_jax.natural_gradient`.

    Attributes:
      name: "natural_gradient", or what policies call it with settings of their own.
      learning_rate: length of the step in natural gradients; null to go to the radius
        at every step, or for `rate_rule` to choose it.
      rate_rule: "constant"; or "quadratic_model", which chooses rate and momentum, and
        goes no further than the radius, where there is one.
      max_kl: trust-region radius in nats per example; null for none.
      damping: λ, added to the Fisher matrix, in its units: see `damping_rule`.
      damping_rule: "constant"; "relative", λ in units of the mean eigenvalue; or
        "levenberg_marquardt", λ as it is at first.
      momentum: weight of the previous direction, in [0, 1).
      warm_start: cg starts from this multiple of the last direction; 0 for the other
        solvers.
      metric_examples: the metric is that of the first so many examples of a batch;
        null for all.
      microbatch_size: examples in memory at once; null for all.
      solver: "cg", "kfac", "lsmr", "svd", "sample_space", "cholesky"; "auto", which is
        cholesky where that is cheap, and else cg; or "damping_search", which finds λ by
        itself: `damping` is the least.
      cg: settings of cg, and of what it shares with kfac.
      lsmr: settings of lsmr.
      min_decrease: a step is taken only where the loss falls by this part of what the
        gradient promises; null takes all.
      max_halvings: so often a step that fails this is halved before it is refused; null
        where `min_decrease` is.
      slack: of damping_search: the loss may rise to so many times the lowest so far;
        null for the other solvers.
      rcond: of svd: singular values below this part of the largest count as zero; null
        for those that round-off cannot tell from it.
    """

    name: str
    learning_rate: Annotated[float | None, POSITIVE]
    rate_rule: Annotated[str, one_of("constant", "quadratic_model")]
    max_kl: Annotated[float | None, POSITIVE]
    damping: Annotated[float, NON_NEGATIVE]
    damping_rule: Annotated[str, one_of("constant", "relative", "levenberg_marquardt")]
    momentum: Annotated[float, FRACTION]
    warm_start: Annotated[float, FRACTION]
    metric_examples: Annotated[int | None, AT_LEAST_ONE]
    microbatch_size: Annotated[int | None, AT_LEAST_ONE]
    solver: Annotated[
        str,
        one_of(
            "cg",
            "kfac",
            "lsmr",
            "svd",
            "sample_space",
            "cholesky",
            "auto",
            "damping_search",
        ),
    ]
    cg: CGConfig
    lsmr: LSMRConfig
    min_decrease: Annotated[float | None, FRACTION]
    max_halvings: Annotated[int | None, ZERO_OR_MORE]
    slack: Annotated[float | None, AT_LEAST_ONE_TIMES]
    rcond: Annotated[float | None, FRACTION]


@dataclasses.dataclass
class NaturalGradientDefaultsConfig:
    """`ngd_jax.natural_gradient(1.0, ..., max_kl=max_kl)` without any other word.

    Attributes:
      name: "natural_gradient_defaults".
      max_kl: trust-region radius in nats per example.
    """

    name: str
    max_kl: Annotated[float, POSITIVE]


@dataclasses.dataclass
class AdamConfig:
    """Settings of `optax.adam`."""

    name: str
    learning_rate: Annotated[float, POSITIVE]
    b1: Annotated[float, FRACTION]
    b2: Annotated[float, FRACTION]


@dataclasses.dataclass
class AdamWConfig:
    """Settings of `optax.adamw`; the weight decay spares nothing."""

    name: str
    learning_rate: Annotated[float, POSITIVE]
    b1: Annotated[float, FRACTION]
    b2: Annotated[float, FRACTION]
    weight_decay: Annotated[float, NON_NEGATIVE]


@dataclasses.dataclass
class MuonConfig:
    """Settings of `optax.contrib.muon`: matrices by Muon, all else by Adam.

    Attributes:
      name: "muon".
      learning_rate: of the matrices, whose steps are orthogonal matrices times this.
      momentum: of the matrices, Nesterov's.
      adam_learning_rate: of everything that is no matrix.
    """

    name: str
    learning_rate: Annotated[float, POSITIVE]
    momentum: Annotated[float, FRACTION]
    adam_learning_rate: Annotated[float, POSITIVE]


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


@dataclasses.dataclass
class PPOConfig:
    """Settings of proximal policy optimization by Adam; for policies only.

    Attributes:
      name: "ppo".
      learning_rate: of Adam.
      clip: a ratio of probabilities gains nothing by going further from 1.
      epochs: passes over a rollout.
      minibatch_size: environment steps in a minibatch; divides `batch_size`.
    """

    name: str
    learning_rate: Annotated[float, POSITIVE]
    clip: Annotated[float, POSITIVE]
    epochs: Annotated[int, AT_LEAST_ONE]
    minibatch_size: Annotated[int, AT_LEAST_ONE]


OPTIMIZER_CONFIGS = {
    "natural_gradient": NaturalGradientConfig,
    "natural_gradient_defaults": NaturalGradientDefaultsConfig,
    "adam": AdamConfig,
    "adamw": AdamWConfig,
    "muon": MuonConfig,
    "sgd": SGDConfig,
    "lbfgs": LBFGSConfig,
}
# What goes by names of its own, with settings for policies, equations, wave functions.
OTHER_OPTIMIZER_CONFIGS = {
    "trpo": NaturalGradientConfig,  # to the radius, or not at all
    "npg": NaturalGradientConfig,  # with a fixed rate
    "ppo": PPOConfig,
    "energy_natural_gradient": NaturalGradientConfig,
    "stochastic_reconfiguration": NaturalGradientConfig,
}
ALL_OPTIMIZER_CONFIGS = {**OPTIMIZER_CONFIGS, **OTHER_OPTIMIZER_CONFIGS}


def make_optimizer(config: Any, task: Task) -> optax.GradientTransformationExtraArgs:
    """Builds the transformation that `config.name` names, for the model of `task`."""
    match config:
        case NaturalGradientConfig():
            return _make_natural_gradient(config, task)
        case NaturalGradientDefaultsConfig():
            return ngd.natural_gradient(
                1.0,
                task.model_fn,
                task.likelihood,
                max_kl=config.max_kl,
                # Which examples there are, no setting.
                metric=ngd.Metric(weights_fn=task.weights_fn),
            )
        case AdamConfig():
            tx = optax.adam(config.learning_rate, b1=config.b1, b2=config.b2)
        case AdamWConfig():
            tx = optax.adamw(
                config.learning_rate,
                b1=config.b1,
                b2=config.b2,
                weight_decay=config.weight_decay,
            )
        case MuonConfig():
            tx = optax.contrib.muon(
                config.learning_rate,
                beta=config.momentum,
                adam_learning_rate=config.adam_learning_rate,
            )
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
        case PPOConfig():
            raise ConfigError(
                f"`optimizer=ppo` is for policies (task=trpo), not for the task "
                f"{task.name}."
            )
        case _:
            raise TypeError(f"No optimizer is built from {config!r}.")
    return optax.with_extra_args_support(tx)


def _make_natural_gradient(
    config: NaturalGradientConfig, task: Task
) -> optax.GradientTransformationExtraArgs:
    batch_fn = None
    if config.metric_examples is not None:
        batch_fn = functools.partial(_first_examples, config.metric_examples)
    solver = make_solver(config)
    in_output_space = solver.uses_coefficients and batch_fn is None
    return ngd.natural_gradient(
        _make_rate(config),
        task.model_fn,
        task.likelihood,
        max_kl=config.max_kl,
        damping=_make_damping(config),
        momentum=config.momentum,
        solver=solver,
        loss_fn=task.output_loss_fn if in_output_space else None,
        accept=_make_acceptance(config),
        metric=ngd.Metric(
            weights_fn=task.weights_fn,
            batch_fn=batch_fn,
            microbatch_size=config.microbatch_size,
        ),
    )


def _make_rate(
    config: NaturalGradientConfig,
) -> float | contrib.QuadraticModelRate | None:
    if config.rate_rule == "quadratic_model":
        if config.learning_rate is not None or config.momentum:
            raise ConfigError(
                f"`optimizer.rate_rule=quadratic_model` chooses rate and momentum: it "
                f"needs learning_rate=null and momentum=0, got {config.learning_rate} "
                f"and {config.momentum}."
            )
        return contrib.QuadraticModelRate()
    if config.learning_rate is None and config.max_kl is None:
        raise ConfigError(
            "`optimizer.learning_rate` and `optimizer.max_kl` cannot both be null: one "
            "of them sets the length of the step."
        )
    return config.learning_rate


def _make_acceptance(config: NaturalGradientConfig) -> ngd.SufficientDecrease | None:
    if (config.min_decrease is None) != (config.max_halvings is None):
        raise ConfigError(
            f"`optimizer.max_halvings` must be a number beside optimizer.min_decrease, "
            f"and null without it; got {config.max_halvings} and "
            f"{config.min_decrease}."
        )
    if config.min_decrease is None or config.max_halvings is None:
        return None
    return ngd.SufficientDecrease(config.min_decrease, config.max_halvings)


def _first_examples(count: int, batch: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[:count], batch)


def _make_damping(
    config: NaturalGradientConfig,
) -> float | ngd.RelativeDamping | ngd.LevenbergMarquardt:
    if config.damping_rule == "constant":
        return config.damping
    if config.damping == 0:
        raise ConfigError(
            f"`optimizer.damping` must be positive with "
            f"damping_rule={config.damping_rule}, got {config.damping}."
        )
    if config.damping_rule == "relative":
        return ngd.RelativeDamping(config.damping)
    return ngd.LevenbergMarquardt(initial=config.damping)


def _check_solver(config: NaturalGradientConfig) -> None:
    has_cg = config.solver in ("cg", "auto")
    for name, value, unused in (
        ("cg.preconditioner", config.cg.preconditioner, "none"),
        ("warm_start", config.warm_start, 0.0),
    ):
        if not has_cg and value != unused:
            raise ConfigError(
                f"`optimizer.{name}` is for optimizer.solver=cg or auto: got {value} "
                f"with solver={config.solver}."
            )
    if config.solver != "svd" and config.rcond is not None:
        raise ConfigError(
            f"`optimizer.rcond` is for optimizer.solver=svd: got rcond={config.rcond} "
            f"with solver={config.solver}."
        )
    if (config.solver == "damping_search") != (config.slack is not None):
        raise ConfigError(
            f"`optimizer.slack` must be a number for optimizer.solver=damping_search, "
            f"and null for the others: got slack={config.slack} with "
            f"solver={config.solver}."
        )


def make_solver(config: NaturalGradientConfig) -> ngd.Solver:
    """Builds the solver that `config.solver` names.

    Raises:
      ConfigError: for a setting that this solver has no use for, or that it lacks.
    """
    _check_solver(config)
    preconditioner = _make_preconditioner(config.cg)
    cg = ngd.CG(config.cg.max_steps, config.cg.rtol, preconditioner, config.warm_start)
    match config.solver:
        case "cg":
            return cg
        case "kfac":
            return ngd.KFAC(
                decay=config.cg.decay,
                refresh_every=config.cg.refresh_every,
                observe_every=config.cg.observe_every,
                # The other rule finds the length by itself.
                exact_length=config.rate_rule == "constant",
            )
        case "lsmr":
            return ngd.LSMR(max_steps=config.lsmr.max_steps, rtol=config.lsmr.rtol)
        case "svd":
            return contrib.SVD(config.rcond)
        case "damping_search":
            return contrib.DampingSearch(slack=config.slack or 1.0)
        case "sample_space":
            return ngd.SampleSpace()
        case "cholesky":
            return ngd.Cholesky()
        case _:
            return ngd.Auto(otherwise=cg)


def _make_preconditioner(config: CGConfig) -> ngd.Preconditioner | None:
    match config.preconditioner:
        case "jacobi":
            return contrib.Jacobi(refresh_every=config.refresh_every)
        case "nystrom":
            # All that the sketch asks of chance is to be no special direction.
            return contrib.Nystrom(
                rank=config.rank,
                key=jax.random.key(0),
                refresh_every=config.refresh_every,
            )
        case "kronecker":
            return ngd.Kronecker(
                decay=config.decay,
                refresh_every=config.refresh_every,
                observe_every=config.observe_every,
            )
        case _:
            return None


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
