"""The tasks with a few neurons each, on small synthetic data."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.running.config import compose_config, read_config

# A few neurons for each.
SMALL = {
    "charlm": (
        "task.num_layers=1",
        "task.width=8",
        "task.num_heads=2",
        "task.context=12",
        "batch_size=8",
    ),
    "fashion_cnn": (
        "task.channels=[2,3]",
        "task.hidden_size=4",
        "task.data_dir={data}",
        "batch_size=16",
    ),
    "fashion_mlp": ("task.hidden_sizes=[6]", "task.data_dir={data}", "batch_size=16"),
    "autoencoder": (
        "task.data=mnist5k",
        "task.widths=[5,3]",
        "task.data_dir={data}",
        "batch_size=16",
    ),
    "imbalance": ("task.hidden_sizes=[4]",),
    "regression": ("task.hidden_sizes=[4]", "task.data_dir={data}", "batch_size=16"),
    "gru": ("task.width=4", "task.data_dir={data}", "batch_size=16"),
    "row_transformer": (
        "task.num_layers=1",
        "task.width=8",
        "task.num_heads=2",
        "task.data_dir={data}",
        "batch_size=16",
    ),
    "vae": ("task.hidden=6", "task.code=3", "task.data_dir={data}", "batch_size=16"),
}
DOCUMENTS = ["abcab cab. " * 30, "b", "ab", "cabbac" * 20]


def configure(name, data_dir, *overrides):
    small = [override.format(data=data_dir) for override in SMALL[name]]
    return read_config(
        compose_config(
            [f"task={name}", "optimizer.solver.max_steps=3", *small, *overrides]
        )
    )


def first_batch(task, count=7):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf[:count]), task.train)


def concrete_like(count):
    """Features and strengths in about their units; the reader is tested by itself."""
    features = np.random.default_rng(0).normal(200.0, 100.0, (count, 8))
    return features, 30.0 + features[:, 0] / 20.0
