"""The tables of policies: returns, step sizes, speed, and accuracy of the solves.

Each environment with the settings of `configs/env/`, in one compiled program for all
seeds, compared with TRPO of stable-baselines3-contrib with its defaults and the same
discount; they take turns, with one thread each.
"""

import functools
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from hydra import compose
from hydra.core.global_hydra import GlobalHydra

import ngd_jax as ngd
from experiments.benchmarks.markdown import Figure, Table
from experiments.benchmarks.settings import PoliciesSettings
from experiments.running.config import TrainConfig, compose_config, read_config
from experiments.tasks.policies.learner import PolicyLearner, make_parts
from experiments.tasks.policies.training import (
    Parts,
    gather,
    init_state,
    make_train_chunk,
)

__all__ = ["Run", "passage", "policy_tables"]

NEVER = math.inf


class Run(NamedTuple):
    """One seed of one contestant.

    Attributes:
      seconds: CPU seconds of training.
      evaluation: mean return of greedy episodes.
      passed: environment steps until the mean of the last 100 returns passed the
        threshold; infinity for never.
      kl: of every update that was taken.
      refused: number of updates that were refused.
      residual: of every solve; none for the peer.
    """

    seconds: float
    evaluation: float
    passed: float
    kl: list[float]
    refused: int = 0
    residual: tuple[float, ...] = ()


def policy_tables(settings: PoliciesSettings) -> list[Table]:
    """All tables; those of the peer are left out if it is not installed."""
    python = settings.peer_python or sys.executable
    has_peer = settings.peer_python is not None or bool(
        importlib.util.find_spec("sb3_contrib")
    )
    ours: dict[str, list[Run]] = {}
    peers: dict[str, list[Run]] = {}
    compilations = {}
    for env, threshold in settings.environments.items():
        config = _config(settings, env)
        program, compilations[env] = _compiled(config)
        learner = PolicyLearner(config)
        ours[env], peers[env] = [], []
        for seed in range(settings.seeds):
            ours[env].append(_run(program, learner, config, seed, threshold))
            if has_peer and seed < settings.peer_seeds:
                peers[env].append(_run_peer(python, config, env, seed, threshold))
    tables = [
        _quality(settings, ours, peers),
        _steps(ours, peers),
        _speed(settings, ours, peers, compilations),
    ]
    if settings.dampings:
        tables.append(_residuals(settings))
    return tables


def passage(returns: np.ndarray, threshold: float, steps_per_update: int) -> float:
    """Environment steps until `returns`, one for each update, exceed `threshold`."""
    with np.errstate(invalid="ignore"):
        above = np.flatnonzero(returns >= threshold)
    return float(steps_per_update * (above[0] + 1)) if above.size else NEVER


def _config(settings: PoliciesSettings, env: str, num_agents: int = 1) -> TrainConfig:
    overrides = ["task=trpo", f"env={env}", f"task.num_agents={num_agents}"]
    overrides += settings.overrides
    # Called inside a Hydra program, which has already found the configurations.
    if GlobalHydra.instance().is_initialized():
        return read_config(compose("train", overrides=overrides))
    return read_config(compose_config(overrides))


def _compiled(config: TrainConfig) -> tuple[Any, float]:
    """The program of a whole run as one dispatch, and CPU seconds to compile it."""
    num_agents = config.task.num_agents
    parts = make_parts(config)
    chunk = make_train_chunk(parts, num_agents, config.steps, is_merged=False)
    state = init_state(parts, 0, num_agents)
    start = time.process_time()
    compiled = chunk.lower(state, np.int32(0)).compile()
    seconds = time.process_time() - start

    def program(seed: int) -> tuple[Any, dict[str, np.ndarray], float]:
        state = jax.block_until_ready(init_state(parts, seed, num_agents))
        start = time.process_time()
        state, records = jax.block_until_ready(compiled(state, np.int32(config.steps)))
        elapsed = time.process_time() - start
        return state, jax.tree.map(np.asarray, records), elapsed

    return program, seconds


def _run(
    program: Any,
    learner: PolicyLearner,
    config: TrainConfig,
    seed: int,
    threshold: float,
) -> Run:
    state, records, seconds = program(seed)
    evaluation = learner.evaluate(state)
    taken = records["accepted"] == 1
    assert config.batch_size is not None
    return Run(
        seconds=seconds,
        evaluation=float(evaluation["test_return"]),
        passed=passage(records["return"], threshold, config.batch_size),
        kl=records["measured_kl"][taken].tolist(),
        refused=int((~taken).sum()),
        residual=tuple(records["solver_residual"].tolist()),
    )


def _run_peer(
    python: str, config: TrainConfig, env: str, seed: int, threshold: float
) -> Run:
    assert config.batch_size is not None
    arguments = {
        "env": env,
        "seed": seed,
        "steps": config.steps * config.batch_size,
        "discount": config.task.discount,
        "threshold": threshold,
        "episodes": config.task.eval_episodes,
    }
    command = [
        python,
        "-m",
        "experiments.benchmarks.policy_peer",
        json.dumps(arguments),
    ]
    done = subprocess.run(  # noqa: S603 (our own program)
        command,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    result = json.loads(done.stdout.splitlines()[-1])
    passed = NEVER if result["passed"] is None else float(result["passed"])
    return Run(result["seconds"], result["return"], passed, result["kl"])


def _quality(
    settings: PoliciesSettings, ours: dict[str, list[Run]], peers: dict[str, list[Run]]
) -> Table:
    rows, goals = [], []
    for env, runs in ours.items():
        threshold = settings.environments[env]
        for name, group in (("ours", runs), ("peer", peers[env])):
            if group:
                returns = [run.evaluation for run in group]
                passed = sorted(run.passed for run in group)
                rows.append(
                    [
                        env,
                        name,
                        str(len(group)),
                        f"{statistics.median(returns):.1f}",
                        f"{min(returns):.1f}",
                        f"{threshold:g}",
                        _steps_text(statistics.median(passed)),
                        _steps_text(passed[-1]),
                    ]
                )
        if peers[env]:
            ratio = statistics.median(run.passed for run in runs) / statistics.median(
                run.passed for run in peers[env]
            )
            goals.append(
                Figure(
                    f"{env}: median steps to the threshold, ours over peer's", ratio, 1
                )
            )
    head = ("environment", "", "seeds", "median return", "lowest seed")
    return Table(
        "Return of greedy episodes at the end of training",
        (*head, "threshold", "passed, median", "passed, last seed"),
        rows,
        goals,
        ["Passed: environment steps until the mean of the last 100 episodes did."],
    )


def _steps(ours: dict[str, list[Run]], peers: dict[str, list[Run]]) -> Table:
    rows = []
    for env, own in ours.items():
        for name, runs in (("ours", own), ("peer", peers[env])):
            if runs:
                kl = np.array([kl for run in runs for kl in run.kl])
                quantiles = np.quantile(kl, [0.0, 0.1, 0.5, 0.9, 1.0])
                refused = sum(run.refused for run in runs) if name == "ours" else ""
                rows.append([env, name, *(f"{q:.4f}" for q in quantiles), str(refused)])
    all_kl = np.array([kl for runs in ours.values() for run in runs for kl in run.kl])
    goals = [
        Figure("largest KL of a step taken", float(all_kl.max()), 0.0105),
        Figure("0.009 over the smallest", 0.009 / float(all_kl.min()), 1.0),
    ]
    head = ("environment", "", "least", "10 %", "median", "90 %", "largest", "refused")
    return Table("KL of each update, where 0.01 was asked for", head, rows, goals)


def _speed(
    settings: PoliciesSettings,
    ours: dict[str, list[Run]],
    peers: dict[str, list[Run]],
    compilations: dict[str, float],
) -> Table:
    rows, goals = [], []
    for env, runs in ours.items():
        seconds = statistics.median(run.seconds for run in runs)
        row = [env, f"{seconds:.2f}", f"{compilations[env]:.2f}"]
        if peers[env]:
            peer = statistics.median(run.seconds for run in peers[env])
            whole = seconds + compilations[env]
            row += [f"{peer:.1f}", f"{peer / seconds:.1f}", f"{peer / whole:.1f}"]
            goals += [
                Figure(f"{env}: time over the peer's", seconds / peer, 1 / 30),
                Figure(f"{env}: the same with compiling", whole / peer, 1 / 8),
            ]
        rows.append(row)
    goals.append(Figure("compiling, CPU s, the most", max(compilations.values()), 6.0))
    if settings.num_agents > 1:
        env = next(iter(ours))
        program, _ = _compiled(_config(settings, env, settings.num_agents))
        program(0)
        many = program(0)[2]
        alone = statistics.median(run.seconds for run in ours[env])
        name = f"{env}: {settings.num_agents} agents under vmap, over the time of one"
        goals.append(Figure(name, many / alone, 4.0))
    head = ["environment", "ours, CPU s", "compiling, CPU s"]
    if any(peers.values()):
        head += ["peer, CPU s", "peer / ours", "with compiling"]
    return Table("CPU seconds of a run, one thread", head, rows, goals)


def _residuals(settings: PoliciesSettings) -> Table:
    """Residuals of the same systems during a run, by damping and step budget."""
    cells = [(d, k) for d in settings.dampings for k in settings.solver_steps]
    rows = []
    for env in settings.environments:
        config = _config(settings, env)
        learner = PolicyLearner(config)
        solve = jax.jit(functools.partial(_solve_all, make_parts(config), cells))
        found, state = [], learner.first_state
        with learner.start(state) as advance:
            for _ in range(config.steps // config.steps_per_dispatch):
                state, _ = advance(state, config.steps_per_dispatch)
                found.append(np.asarray(solve(state.agents, jax.random.key(1))))
        residuals = np.stack(found)
        rows += [
            [env, f"{damping:g}", str(steps), f"{np.median(r):.1e}", f"{r.max():.1e}"]
            for (damping, steps), r in zip(cells, residuals.T, strict=True)
        ]
    head = ("environment", "damping", "CG steps", "median residual", "largest")
    return Table("Relative residual of the solve, by damping and CG steps", head, rows)


def _solve_all(
    parts: Parts, cells: list[tuple[float, int]], agent: Any, key: jax.Array
) -> jax.Array:
    batch = gather(parts, agent, key).policy
    likelihood = parts.environment.likelihood

    def loss_fn(params: Any) -> jax.Array:
        log_probs = likelihood.log_prob(
            parts.policy_fn(params, batch), batch["actions"]
        )
        return -jax.numpy.mean(log_probs * batch["advantages"])

    fisher = ngd.linearize_fisher(parts.policy_fn, agent.params, batch, likelihood)
    gradient = jax.grad(loss_fn)(agent.params)
    return jax.numpy.stack(
        [
            ngd.CG(steps, 0.0)(fisher, gradient, damping=damping)[1].relative_residual
            for damping, steps in cells
        ]
    )


def _steps_text(steps: float) -> str:
    return "never" if math.isinf(steps) else f"{steps:,.0f}"
