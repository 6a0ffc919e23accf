"""Images read row by row, of which only the first rows are there.

Each image of Fashion-MNIST is a sequence of rows, cut off after 14 to 28 of them. A
recurrent network reads them one by one, with the same weights at every step; a
Transformer lets every row attend to those that are there.
"""

from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.running.settings import AT_LEAST_ONE, ConfigError
from experiments.tasks.supervised.classification import make_classifier
from experiments.tasks.supervised.images import load_images, to_unit_interval
from experiments.tasks.supervised.task import PyTree, Task

__all__ = ["RowGRU", "RowTransformer", "make_gru", "make_row_transformer"]

ROWS, NUM_CLASSES = 28, 10


class RowGRU(nn.Module):
    """A gated recurrent unit, and a linear layer on its last state.

    Attributes:
      width: of the state.
    """

    width: int

    @nn.compact
    def __call__(self, rows: jax.Array, length: jax.Array) -> jax.Array:
        """Logits for `rows`, `[B, T, D]`, of which the first `length` count."""
        reader = nn.RNN(nn.GRUCell(self.width), return_carry=True)
        state, _ = reader(rows, seq_lengths=length)
        return nn.Dense(NUM_CLASSES)(state)


class RowTransformer(nn.Module):
    """A Transformer whose rows attend to those that are there, and their mean.

    Attributes:
      num_layers: attention and feed-forward pairs.
      width: of the stream between the layers.
      num_heads: number of attention heads; must divide the width.
    """

    num_layers: int
    width: int
    num_heads: int

    @nn.compact
    def __call__(self, rows: jax.Array, length: jax.Array) -> jax.Array:
        """Logits for `rows`, `[B, T, D]`, of which the first `length` count."""
        is_there = jnp.arange(rows.shape[1]) < length[:, None]
        mask = nn.make_attention_mask(jnp.ones_like(is_there), is_there)
        places = self.param(
            "places", nn.initializers.normal(0.02), (rows.shape[1], self.width)
        )
        x = nn.Dense(self.width)(rows) + places
        for _ in range(self.num_layers):
            attend: Any = nn.MultiHeadDotProductAttention(self.num_heads)
            x = x + attend(nn.LayerNorm()(x), mask=mask)
            hidden = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            x = x + nn.Dense(self.width)(hidden)
        x = jnp.sum(is_there[..., None] * nn.LayerNorm()(x), 1) / length[:, None]
        return nn.Dense(NUM_CLASSES)(x)


def make_gru(
    width: Annotated[int, AT_LEAST_ONE],
    data_dir: str | None,
    cache_dir: str | None,
) -> Task:
    """Builds the task of the recurrent network from its settings.

    Args:
      width: of the state.
      data_dir: a folder to search for the data first; null for none.
      cache_dir: a folder for a memory-mapped copy of the pixels; null keeps them in
        memory.
    """
    return _make("gru", RowGRU(width), data_dir, cache_dir)


def make_row_transformer(
    num_layers: Annotated[int, AT_LEAST_ONE],
    width: Annotated[int, AT_LEAST_ONE],
    num_heads: Annotated[int, AT_LEAST_ONE],
    data_dir: str | None,
    cache_dir: str | None,
) -> Task:
    """Builds the task of the Transformer from its settings.

    Args:
      num_layers: attention and feed-forward pairs.
      width: of the stream between the layers.
      num_heads: number of attention heads; must divide the width.
      data_dir: a folder to search for the data first; null for none.
      cache_dir: a folder for a memory-mapped copy of the pixels; null keeps them in
        memory.

    Raises:
      ConfigError: the heads do not divide the width.
    """
    if width % num_heads:
        raise ConfigError(
            f"`task.num_heads` must divide `task.width`, got {num_heads} and {width}."
        )
    network = RowTransformer(num_layers, width, num_heads)
    return _make("row_transformer", network, data_dir, cache_dir)


def _make(
    name: str, network: nn.Module, data_dir: str | None, cache_dir: str | None
) -> Task:
    rng = np.random.default_rng(0)
    train, test = (
        {**part, "length": rng.integers(ROWS // 2, ROWS + 1, len(part["y"]), "i4")}
        for part in load_images("fashion_mnist", data_dir, cache_dir)
    )

    def apply(variables: PyTree, batch: PyTree) -> Any:
        x = to_unit_interval(batch["x"])
        # The other rows are handed over too: leaving them out is up to the network.
        return network.apply(variables, x.reshape(len(x), ROWS, -1), batch["length"])

    def init_fn(key: jax.Array) -> tuple[PyTree, PyTree]:
        rows = jnp.zeros((1, ROWS, train["x"].shape[1] // ROWS))
        return network.init(key, rows, jnp.full((1,), ROWS))["params"], {}

    return make_classifier(
        name,
        train,
        test,
        init_fn=init_fn,
        model_fn=lambda params, batch: apply({"params": params}, batch),
    )
