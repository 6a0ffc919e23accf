"""Small versions of the tables of policies, without the peer."""

import math

import numpy as np
import pytest

from experiments.benchmarks.markdown import write_table
from experiments.benchmarks.policies import passage, policy_tables
from experiments.benchmarks.settings import PoliciesSettings


@pytest.mark.parametrize(
    ("returns", "expected"),
    [
        ([np.nan, 1.0, 3.0, 2.0, 4.0], 300.0),
        ([5.0], 100.0),
        ([1.0, 2.0], math.inf),
        ([np.nan], math.inf),
    ],
)
def test_passage_is_the_first_time_above(returns, expected):
    assert passage(np.array(returns), 3.0, 100) == expected


@pytest.mark.slow
def test_tables_of_policies_tell_what_was_measured():
    settings = PoliciesSettings(
        environments={"CartPole-v1": 15.0},
        seeds=2,
        peer_seeds=1,
        peer_python=None,
        num_agents=2,
        dampings=[1e-2],
        solver_steps=[2, 10],
        overrides=[
            "steps=4",
            "steps_per_dispatch=2",
            "batch_size=500",
            "task.num_envs=4",
        ],
    )
    quality, steps, speed, residuals = policy_tables(settings)
    assert quality.rows[0][:3] == ["CartPole-v1", "ours", "2"]
    assert quality.rows[0][6] in ("500", "1,000", "1,500", "2,000")
    assert all(goal.is_met for goal in steps.goals)
    least, largest = float(steps.rows[0][2]), float(steps.rows[0][6])
    assert 0.009 <= least <= largest <= 0.01
    assert speed.goals[-1].value > 0
    few, many = (float(row[3]) for row in residuals.rows)
    assert many < few
    for table in (quality, steps, speed, residuals):
        assert table.title in write_table(table)
