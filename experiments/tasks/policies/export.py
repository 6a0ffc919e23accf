"""Saves the greedy policy as one file of arrays, and evaluates it with NumPy alone.

`policy.npz` contains

* `kernel_0`, `bias_0`, ...: the layers, with tanh between them; for images, the first
  one acts on patches of 3 by 3 pixels;
* `center`, `scale`, `limit`: the first layer sees (observation - center) / scale, cut
  off at ± limit;
* `shape`: of one observation of the environment;
* `kind`, `low`, `high`: of the actions, which are "chosen", or vectors that are
  "clipped" to their bounds or "squashed" into them by tanh.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.running.run_folder import write_atomically
from experiments.tasks.policies.environments import Environment
from experiments.tasks.policies.observations import LIMIT, Statistics, deviation

__all__ = ["export_policy", "load_policy"]

PyTree = Any

FILE = "policy.npz"


def export_policy(
    environment: Environment,
    params: PyTree,
    statistics: Statistics | None,
    folder: Path,
) -> None:
    """Writes `policy.npz`.

    Args:
      environment: defines the actions and observations.
      params: of a `PolicyNetwork`.
      statistics: for normalising observations; None to leave them as they are.
      folder: where to write the file.
    """
    torso = params.get("Torso_0", {})
    layers = [torso[f"Dense_{i}"] for i in range(len(torso))] + [params["Dense_0"]]
    arrays = {
        f"{name}_{i}": np.asarray(layer[name])
        for i, layer in enumerate(layers)
        for name in ("kernel", "bias")
    }
    scale = np.asarray(environment.observation_scale, np.float32)
    center, limit = np.zeros_like(scale), np.inf
    if statistics is not None:
        center, limit = np.asarray(statistics.mean) * scale, LIMIT
        scale = scale * np.asarray(deviation(statistics))
    kind = "squashed" if environment.is_squashed else "clipped"
    content = io.BytesIO()
    np.savez(
        content,
        allow_pickle=False,
        **arrays,
        center=center,
        scale=scale,
        limit=np.float32(limit),
        shape=np.array(environment.observation_shape, int),
        kind="chosen" if environment.num_actions else kind,
        low=np.asarray(environment.action_low, np.float32),
        high=np.asarray(environment.action_high, np.float32),
    )
    write_atomically(folder / FILE, content.getvalue())


def load_policy(folder: Path) -> Callable[[Any], np.ndarray]:
    """Returns `act(observation) -> action` of the policy that a run saved in `folder`.

    It takes one observation of the environment, or an array of them with any leading
    axes, and returns the most likely action for each. This function depends only on
    NumPy, so it can be copied out of this module.
    """
    with np.load(folder / "policy.npz") as file:
        arrays = dict(file)
    layers = [
        (arrays[f"kernel_{i}"], arrays[f"bias_{i}"])
        for i in range(sum(name.startswith("kernel_") for name in arrays))
    ]
    shape = tuple(arrays["shape"].tolist())

    def act(observation: Any) -> np.ndarray:
        x = np.asarray(observation, np.float32)
        leading = x.shape[: max(0, x.ndim - len(shape))]
        if x.shape != (*leading, *shape):
            raise ValueError(f"An observation must be of {shape}, got {x.shape}.")
        x = (x - arrays["center"]) / arrays["scale"]
        x = np.clip(x, -arrays["limit"], arrays["limit"])
        hidden = layers[:-1]
        if len(shape) == 3:
            (kernel, bias), *hidden = hidden
            squares = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (-3, -2))
            squares = np.moveaxis(squares, -3, -1)  # rows, columns, channels
            x = np.tanh(squares.reshape(*squares.shape[:-3], -1) @ kernel + bias)
        x = x.reshape(*leading, -1)
        for kernel, bias in hidden:
            x = np.tanh(x @ kernel + bias)
        kernel, bias = layers[-1]
        out = x @ kernel + bias
        if arrays["kind"] == "chosen":
            return out.argmax(axis=-1)
        low, high = arrays["low"], arrays["high"]
        if arrays["kind"] == "squashed":
            out = low + (high - low) * (1 + np.tanh(out)) / 2
        return np.clip(out, low, high)

    return act
