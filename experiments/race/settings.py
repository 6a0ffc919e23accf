"""The configuration of a race, from Hydra's tree to checked dataclasses.

An entrant is an optimizer with initial settings, and a grid of values to try in tuning:
`grid={learning_rate: [0.1, 0.3]}`.
"""

import dataclasses
import itertools
import math
from typing import Annotated, Any

from omegaconf import MISSING, DictConfig, OmegaConf

from experiments.running.build import locate
from experiments.running.config import CONFIG_DIR, read_as, read_schema
from experiments.running.optimizers import check_optimizer
from experiments.running.settings import (
    AT_LEAST_ONE,
    POSITIVE,
    SEED,
    ConfigError,
    Rule,
    one_of,
)

__all__ = [
    "CompareConfig",
    "Entrant",
    "TuningConfig",
    "candidates",
    "check_task",
    "read_compare",
]

BY_PEERS = "best_first_order"
SHARE = Rule("in (0, 1]", lambda value: 0.0 < value <= 1.0)

# Settings of `experiments.train` in a task file that a race replaces by its own.
TRAINING_SETTINGS = ("eval_every", "steps", "steps_per_dispatch")


@dataclasses.dataclass
class TuningConfig:
    """How the settings of an entrant are chosen from its grid.

    Attributes:
      share: share of the budget that each candidate gets.
      seed: for these runs; must not be a seed of the race.
    """

    share: Annotated[float, SHARE]
    seed: Annotated[int, SEED]


@dataclasses.dataclass
class CompareConfig:
    """Settings of a race.

    Attributes:
      task: what to learn; a group, `task=...`.
      seeds: number of seeds, 0, 1, 2 and so on; each determines initial parameters and
        batches.
      budget: training time of each run in seconds, "60" or "60s"; compiling and
        evaluating do not count.
      clock: "cpu", the CPU time of this process, or "wall".
      target: the loss to reach on the training set: a number; null for none; or
        "best_first_order", the best result of the first-order peers: the lowest median
        over seeds of the losses at the end of the budget.
      tuning: how settings are chosen.
      only: names of the entrants to run; null for all.
      batch_size: examples in a batch; null for the whole training set.
      eval_batch_size: examples per forward pass in evaluation.
      eval_train_examples: the loss is evaluated on this many examples at the start of
        the training set; null for all.
      schedule: "cosine", each number that is a learning rate rises and falls with the
        part of the budget that is spent, or "constant". Rules and searches that choose
        their rates themselves (L-BFGS, kfac_jax, `quadratic_model`) are left alone.
      turns: number of turns into which a budget is cut; the entrants alternate.
      max_dispatch: largest number of steps between returns to Python.
      output: the folder of the results.
      entrants: by name; see `Entrant`.
    """

    task: Any
    seeds: Annotated[int, AT_LEAST_ONE]
    budget: str
    clock: Annotated[str, one_of("cpu", "wall")]
    target: str | None
    tuning: TuningConfig
    only: list[str] | None
    batch_size: Annotated[int | None, AT_LEAST_ONE]
    eval_batch_size: Annotated[int, AT_LEAST_ONE]
    eval_train_examples: Annotated[int | None, AT_LEAST_ONE]
    schedule: Annotated[str, one_of("constant", "cosine")]
    turns: Annotated[int, AT_LEAST_ONE]
    max_dispatch: Annotated[int, AT_LEAST_ONE]
    output: str
    entrants: Any

    @property
    def seconds(self) -> float:
        """The budget as a number."""
        return _read_seconds(self.budget)

    @property
    def fixed_target(self) -> float | None:
        """The target that is known before the race; None if there is none."""
        return None if self.target in (None, BY_PEERS) else _read_target(self.target)


@dataclasses.dataclass
class Entrant:
    """An optimizer that takes part.

    Attributes:
      name: its name in the table.
      optimizer: its settings before tuning.
      grid: values to try, by setting; empty for none.
      batch_size: if it differs from the race's; null for the whole training set.
      seeds: if fewer than the race's, for expensive entrants.
    """

    name: str
    optimizer: dict[str, Any]
    grid: dict[str, list[Any]]
    batch_size: int | None
    seeds: int


def candidates(entrant: Entrant) -> list[dict[str, Any]]:
    """All combinations of the values of the grid, as changes to the settings."""
    return [
        dict(zip(entrant.grid, values, strict=True))
        for values in itertools.product(*entrant.grid.values())
    ]


def check_task(overrides: list[str]) -> None:
    """Checks that the task on a command line can race, before Hydra composes it.

    The files of the others choose optimizers that only they can use.

    Raises:
      ConfigError: it cannot; the message names the tasks that can.
    """
    tasks, races = (
        sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))
        for group in ("task", "race")
    )
    for override in overrides:
        name, _, task = override.partition("=")
        if name == "task" and task in tasks and task not in races:
            raise ConfigError(
                f"`task={task}` has no training loss that all optimizers could lower "
                f"in a race; there are {', '.join(races)}."
            )


def read_compare(tree: DictConfig) -> tuple[CompareConfig, list[Entrant]]:
    """Turns an untyped tree into checked dataclasses, with the entrants in order.

    Raises:
      ConfigError: an unknown key, a missing one, a wrong type, or a broken rule.
    """
    kept = [str(name) for name in tree if name not in TRAINING_SETTINGS]
    tree = OmegaConf.masked_copy(tree, kept)
    schema = OmegaConf.structured(CompareConfig)
    schema.task = read_schema(tree)
    if isinstance(locate(tree.task._target_, "task._target_"), type):
        raise ConfigError(
            f"`task={tree.task.name}` has no training loss that all optimizers could "
            f"lower in a race."
        )
    config = read_as(schema, tree)
    _ = config.seconds, config.fixed_target
    if config.tuning.seed < config.seeds:
        raise ConfigError(
            f"`tuning.seed` must not be one of the race's {config.seeds} seeds, got "
            f"{config.tuning.seed}."
        )
    chosen = list(config.entrants) if config.only is None else config.only
    if unknown := [name for name in chosen if name not in config.entrants]:
        raise ConfigError(
            f"`only` must name entrants, {', '.join(config.entrants)}, got "
            f"{', '.join(unknown)}."
        )
    return config, [_read_entrant(name, tree, config) for name in chosen]


def _read_entrant(name: str, tree: DictConfig, config: CompareConfig) -> Entrant:
    place = f"entrants.{name}"
    given = OmegaConf.select(tree, place)
    if unknown := set(given) - {"optimizer", "grid", "batch_size", "seeds"}:
        raise ConfigError(f"`{place}.{unknown.pop()}` is not a setting.")
    entrant = Entrant(
        name,
        OmegaConf.to_object(given.optimizer),  # pyright: ignore[reportArgumentType]
        OmegaConf.to_object(given.get("grid") or OmegaConf.create({})),  # pyright: ignore[reportArgumentType]
        given.get("batch_size", config.batch_size),
        given.get("seeds", config.seeds),
    )
    if not isinstance(entrant.seeds, int) or not 1 <= entrant.seeds <= config.seeds:
        raise ConfigError(
            f"`{place}.seeds` must be between 1 and the race's {config.seeds}, got "
            f"{entrant.seeds!r}."
        )
    for setting, values in entrant.grid.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(
                f"`{place}.grid.{setting}` must be a list of values, got {values!r}."
            )
    for candidate in candidates(entrant):
        changed = with_settings(entrant.optimizer, candidate)
        check_optimizer(changed, f"{place}.optimizer")
    return entrant


def with_settings(optimizer: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings with `changes`; names may be dotted: `solver.max_steps`.

    Raises:
      ConfigError: a name is not a setting.
    """
    tree = OmegaConf.create(optimizer)
    for name, value in changes.items():
        if OmegaConf.select(tree, name, default=MISSING) == MISSING:
            raise ConfigError(f"`{name}` in a grid is not a setting of the optimizer.")
        OmegaConf.update(tree, name, value)
    return OmegaConf.to_object(tree)  # pyright: ignore[reportReturnType]


def _read_target(text: str) -> float:
    try:
        target = float(text)
    except ValueError:
        target = math.nan
    if not math.isfinite(target):
        raise ConfigError(
            f"`target` must be a finite number, {BY_PEERS} or null, got {text}."
        )
    return target


def _read_seconds(text: str) -> float:
    try:
        seconds = float(text.removesuffix("s"))
    except ValueError:
        seconds = 0.0
    if not POSITIVE.holds(seconds):
        raise ConfigError(
            f"`budget` must be seconds such as 60 or 60s, positive and finite, got "
            f"{text}."
        )
    return seconds
