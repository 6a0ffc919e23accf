"""One run of TRPO in stable-baselines3-contrib with its defaults, reported as JSON.

    python -m experiments.benchmarks.policy_peer '{"env": ..., "seed": ..., ...}'

This is a separate program: it needs neither JAX nor this project's library, and its CPU
time includes nothing else.
"""

import json
import sys
import time
from typing import Any

__all__ = ["run"]


def run(
    env: str, *, seed: int, steps: int, discount: float, threshold: float, episodes: int
) -> dict[str, Any]:
    """Trains and evaluates once.

    Args:
      env: name of the environment in gymnasium.
      seed: for all randomness.
      steps: number of environment steps.
      discount: γ, the only setting that is not the default.
      threshold: for the mean return of the last 100 episodes.
      episodes: number of episodes of the deterministic evaluation.

    Returns:
      The CPU "seconds" of training, the mean "return" of the evaluation, the
      environment steps until the threshold was "passed" (None for never), and the "kl"
      of each update as measured by the library itself.
    """
    import gymnasium
    import numpy as np
    import torch  # pyright: ignore[reportMissingImports]
    from sb3_contrib import TRPO  # pyright: ignore[reportMissingImports]
    from stable_baselines3.common.callbacks import BaseCallback  # pyright: ignore[reportMissingImports]
    from stable_baselines3.common.evaluation import evaluate_policy  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(1)

    class Watch(BaseCallback):
        passed: int | None = None

        def __init__(self) -> None:
            super().__init__()
            self.kl: list[float] = []

        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            kl = self.logger.name_to_value.get("train/kl_divergence_loss")
            if kl is not None:
                self.kl.append(float(kl))

        def _on_rollout_end(self) -> None:
            finished = self.model.ep_info_buffer or []
            mean = np.mean([episode["r"] for episode in finished] or [-np.inf])
            if self.passed is None and mean >= threshold:
                self.passed = self.num_timesteps

    model = TRPO("MlpPolicy", env, gamma=discount, seed=seed, device="cpu")
    watch = Watch()
    start = time.process_time()
    model.learn(steps, callback=watch, log_interval=10**9)
    seconds = time.process_time() - start
    mean, _ = evaluate_policy(
        model, gymnasium.make(env), n_eval_episodes=episodes, warn=False
    )
    return {
        "seconds": seconds,
        "return": float(np.mean(mean)),
        "passed": watch.passed,
        "kl": watch.kl,
    }


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    print(json.dumps(run(settings.pop("env"), **settings)))
