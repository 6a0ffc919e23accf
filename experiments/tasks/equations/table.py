"""Errors at equal time: `python -m experiments.tasks.equations.table [problem=...]`.

For each seed, all peers start from the same parameters on the same points, run one
after the other in one process, and get the same CPU time. Prints a table, draws the
error curves, and writes both into `output`. The settings are in
`configs/physics_table.yaml`.
"""

import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import hydra
from omegaconf import DictConfig, OmegaConf

from experiments.benchmarks.clocks import use_one_thread

use_one_thread()  # before JAX starts its threads

import jax  # noqa: E402
import threadpoolctl  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from experiments.running.config import CONFIG_DIR, read_as, run_program  # noqa: E402
from experiments.running.screen import Terminal  # noqa: E402
from experiments.running.settings import AT_LEAST_ONE, POSITIVE, ConfigError  # noqa: E402
from experiments.tasks.equations.learner import POINTS_STREAM, l2_error  # noqa: E402
from experiments.tasks.equations.peers import PEERS, Equation, iterate  # noqa: E402
from experiments.tasks.equations.problem import Sizes  # noqa: E402
from experiments.tasks.equations.problems import make_problem  # noqa: E402
from experiments.tasks.equations.settings import PhysicsConfig  # noqa: E402

__all__ = ["Course", "TableConfig", "measure", "read_table", "render"]


@dataclasses.dataclass
class TableConfig:
    """Settings of the table.

    Attributes:
      task: the equation; as in `experiments.train task=pinn`.
      seeds: 0, 1, ..., for the initial parameters and the points.
      seconds: CPU seconds after which errors are reported; a run lasts for the largest.
      target: L2 error to reach; the time it takes is reported.
      iterations: numbers of steps after which errors are reported.
      sketch_size: residuals that ours sketches all of them to; null for no sketch.
      peers: which peers to run; null for all.
      output: folder for the table, the error curves and the picture.
    """

    task: PhysicsConfig
    seeds: Annotated[int, AT_LEAST_ONE]
    seconds: Annotated[list[float], POSITIVE]
    target: Annotated[float, POSITIVE]
    iterations: Annotated[list[int], AT_LEAST_ONE]
    sketch_size: Annotated[int | None, AT_LEAST_ONE]
    peers: list[str] | None
    output: str


class Course(NamedTuple):
    """The history of a run, at all of its evaluations.

    Attributes:
      iterations: steps so far.
      seconds: CPU seconds so far, without evaluations.
      errors: absolute L2 error.
    """

    iterations: list[int]
    seconds: list[float]
    errors: list[float]


# Steps between evaluations: steps of first-order methods are cheap.
_CHUNKS = {
    "L-BFGS (Optax)": 50,
    "BFGS, dense (SciPy)": 50,
    "SSBroyden, dense": 50,
    **{name: 200 for name in PEERS if name.startswith("Adam")},
}
_CHUNK = 5


def measure(config: TableConfig, say: Any = print) -> dict[str, list[Course]]:
    """Runs every peer with every seed."""
    task = config.task
    problem = make_problem(task.problem)
    names = list(PEERS) if config.peers is None else config.peers
    for name in names:
        if name not in PEERS:
            raise ConfigError(
                f"`peers` must be some of {', '.join(PEERS)}, got {name!r}."
            )
    if task.redraw_every is not None or task.causality:
        raise ConfigError(
            "`task.redraw_every` must be null and `task.causality` 0 in the table: all "
            "peers lower one loss, on the same points."
        )
    test_points = problem.test_points(task.test_points)
    error_of = l2_error(problem, test_points)
    sizes = Sizes(task.interior, task.boundary, task.layout)
    paths: dict[str, list[Course]] = {name: [] for name in names}
    runs = {name: iterate(name, _CHUNKS.get(name, _CHUNK)) for name in names}
    points = problem.draw_points(
        jax.random.fold_in(jax.random.key(0), POINTS_STREAM), sizes
    )
    for seed in range(config.seeds):
        params = problem.init(
            jax.random.key(seed), task.hidden_sizes, task.initial_scale
        )
        equation = Equation(problem, points, params, config.sketch_size)
        for name in names:
            path = _follow(
                runs[name](equation),
                error_of,
                _CHUNKS.get(name, _CHUNK),
                max(config.seconds),
            )
            paths[name].append(path)
            say(
                f"{name}, seed {seed}: {path.errors[-1]:.1e} after "
                f"{path.iterations[-1]} steps, lowest {min(path.errors):.1e}"
            )
    return paths


def _follow(run: Any, error_of: Any, chunk: int, budget: float) -> Course:
    path = Course([], [], [])
    params, seconds = next(run), 0.0
    while True:
        path.iterations.append(chunk * len(path.iterations))
        path.seconds.append(seconds)
        path.errors.append(float(error_of(params)[0]))
        if seconds >= budget:
            return path
        # Nothing is compiled here: iterators compile before their first element.
        start = time.process_time()
        params = jax.block_until_ready(next(run))
        seconds += time.process_time() - start


def render(config: TableConfig, paths: dict[str, list[Course]]) -> str:
    """The table as Markdown: median [lowest..highest] over the seeds."""
    what = f"{config.task.problem}, {config.task.precision}, {config.seeds} seeds"
    head = [f"{what}, absolute L2 error, median [lowest..highest]", ""]
    titles = [f"{n} steps" for n in config.iterations]
    titles += [f"{seconds:g} CPU s" for seconds in config.seconds]
    titles += ["CPU ms a step"]
    titles += [f"CPU s to {config.target:g}"]
    rows = [["", *titles], ["---"] * (len(titles) + 1)]
    for name, runs in paths.items():
        cells = [
            _spread([_error_at(run, n) for run in runs]) for n in config.iterations
        ]
        cells += [
            _spread([_error_after(run, seconds) for run in runs])
            for seconds in config.seconds
        ]
        pace = [1e3 * run.seconds[-1] / run.iterations[-1] for run in runs]
        cells.append(f"{statistics.median(pace):.3g}")
        times = [_time_to(run, config.target) for run in runs]
        found = [t for t in times if t is not None]
        cells.append(
            f"{statistics.median(found):.2g} [{min(found):.2g}..{max(found):.2g}], "
            f"{len(found)} of {len(times)}"
            if found
            else f"0 of {len(times)}"
        )
        rows.append([name, *cells])
    return "\n".join(head + [f"| {' | '.join(row)} |" for row in rows])


def _error_at(path: Course, iteration: int) -> float | None:
    later = [
        e for i, e in zip(path.iterations, path.errors, strict=True) if i >= iteration
    ]
    return later[0] if later else None


def _error_after(path: Course, seconds: float) -> float:
    """The error at the last evaluation within `seconds`."""
    within = [s <= seconds for s in path.seconds]
    return path.errors[sum(within) - 1]


def _time_to(path: Course, target: float) -> float | None:
    reached = [s for s, e in zip(path.seconds, path.errors, strict=True) if e <= target]
    return reached[0] if reached else None


def _spread(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return ""
    return f"{statistics.median(known):.1e} [{min(known):.0e}..{max(known):.0e}]"


def draw(config: TableConfig, paths: dict[str, list[Course]], file: Path) -> None:
    """Draws errors over steps and over seconds."""
    figure = Figure(figsize=(12.0, 4.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for index, (name, runs) in enumerate(paths.items()):
        for number, run in enumerate(runs):
            for panel, across in zip(
                panels, (run.iterations, run.seconds), strict=True
            ):
                panel.plot(
                    across[1:],
                    run.errors[1:],
                    color=f"C{index}",
                    lw=2.0 if index == 0 else 1.0,
                    zorder=3 if index == 0 else 2,
                    label=name if number == 0 else None,
                )
    panels[0].set(
        xlabel="steps", ylabel="absolute L2 error", xscale="log", yscale="log"
    )
    panels[1].set(xlabel="CPU seconds", xscale="log")
    for panel in panels:
        panel.axhline(config.target, color="gray", ls="--", lw=1)
        panel.grid(visible=True, alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"{config.task.problem}, {config.task.precision}")
    figure.savefig(file, dpi=120)


def read_table(tree: DictConfig) -> TableConfig:
    """The settings of the table, from a problem's file without what is about training.

    Raises:
      ConfigError: see `read_as`.
    """
    own = [field.name for field in dataclasses.fields(TableConfig)]
    tree = OmegaConf.masked_copy(tree, own)
    # The program has one task, whose constructor it knows.
    task = [name for name in tree.task if name != "_target_"]
    tree.task = OmegaConf.masked_copy(tree.task, task)
    return read_as(OmegaConf.structured(TableConfig), tree)


@hydra.main(
    version_base="1.3", config_path=str(CONFIG_DIR), config_name="physics_table"
)
def table(tree: DictConfig) -> None:
    """Measures, prints and writes the table that `tree` describes."""
    console = Terminal(highlight=False, markup=False, soft_wrap=True)
    try:
        config = read_table(tree)
        with (
            jax.enable_x64(config.task.precision == "float64"),
            threadpoolctl.threadpool_limits(1, user_api="blas"),
        ):
            paths = measure(config, console.print)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    text = render(config, paths)
    (folder / "table.md").write_text(text + "\n")
    console.print(text)
    raw = {name: [run._asdict() for run in runs] for name, runs in paths.items()}
    (folder / "paths.json").write_text(json.dumps(raw))
    draw(config, paths, folder / "paths.png")


def main() -> None:
    """Runs the command line."""
    run_program(table)


if __name__ == "__main__":
    main()
