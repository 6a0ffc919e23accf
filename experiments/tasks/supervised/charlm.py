"""A small Transformer that reads a text character by character, in Flax nnx.

    p(character | those before it in its window)      one Categorical per character

A document is cut into windows of `context` characters to predict; the last one is
padded, and the padding is masked by weights of zero in the loss, the metric and the KL.
All three are means over characters. The dropout keys are part of the batch, one for
each window, so that a part of a batch has the same masks as the whole batch.
"""

from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import ngd_jax as ngd
from experiments.running.settings import AT_LEAST_ONE, FRACTION, ConfigError, one_of
from experiments.tasks.data.texts import load_text
from experiments.tasks.supervised.task import PyTree, Task
from ngd_jax.flax import nnx_model_fn

__all__ = ["CharTransformer", "cut_into_windows", "make_charlm"]

HELD_OUT = 20  # one window in twenty
MAX_CHARACTERS = 256  # distinct ones; they are stored as bytes


class _Block(nnx.Module):
    """Attention and a feed-forward layer, each applied to normalised inputs."""

    def __init__(self, width: int, num_heads: int, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.projections = nnx.Linear(width, 3 * width, rngs=rngs)
        self.attention_out = nnx.Linear(width, width, rngs=rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.hidden = nnx.Linear(width, 4 * width, rngs=rngs)
        self.out = nnx.Linear(4 * width, width, rngs=rngs)

    def attend(self, x: jax.Array) -> jax.Array:
        """Mixes each position with those before it, `[B, T, D]`."""
        heads = self.projections(self.attention_norm(x))
        heads = heads.reshape(*x.shape[:2], 3, self.num_heads, -1)
        queries, keys, values = (heads[:, :, i] for i in range(3))
        mixed = jax.nn.dot_product_attention(queries, keys, values, is_causal=True)
        return self.attention_out(mixed.reshape(x.shape))

    def feed_forward(self, x: jax.Array) -> jax.Array:
        """Transforms each position separately, `[B, T, D]`."""
        return self.out(nnx.gelu(self.hidden(self.norm(x))))


class CharTransformer(nnx.Module):
    """A causal Transformer whose output weights are its embeddings.

    Args:
      num_layers: attention and feed-forward pairs.
      width: of the stream between the layers.
      num_heads: number of attention heads; must divide the width.
      context: number of characters that a window predicts.
      dropout: share of activations that are dropped if keys are given.
      vocabulary_size: number of distinct characters.
      rngs: the stream `params` draws the initial parameters.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        width: int,
        num_heads: int,
        context: int,
        dropout: float,
        vocabulary_size: int,
        rngs: nnx.Rngs,
    ):
        normal = nnx.initializers.normal(0.02)
        self.rate, self.num_layers = dropout, num_layers
        self.embedding = nnx.Embed(
            vocabulary_size, width, embedding_init=normal, rngs=rngs
        )
        self.places = nnx.Param(normal(rngs.params(), (context, width)))
        for index in range(num_layers):
            block = _Block(width, num_heads, rngs)
            setattr(self, f"block_{index}", block)
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, tokens: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """Returns logits `[B, T, V]` for `tokens`, `[B, T]`.

        Args:
          tokens: characters by number.
          keys: typed dropout keys `[B]`; None for evaluation.
        """
        x = self.embedding(tokens.astype(jnp.int32)) + self.places[: tokens.shape[1]]
        x = self._drop(x, keys, 0)
        for index in range(self.num_layers):
            block = getattr(self, f"block_{index}")
            x = x + self._drop(block.attend(x), keys, 2 * index + 1)
            x = x + self._drop(block.feed_forward(x), keys, 2 * index + 2)
        return self.embedding.attend(self.norm(x))

    def _drop(self, x: jax.Array, keys: jax.Array | None, place: int) -> jax.Array:
        if keys is None or self.rate == 0.0:
            return x

        def mask(key: jax.Array) -> jax.Array:
            key = jax.random.fold_in(key, place)
            return jax.random.bernoulli(key, 1.0 - self.rate, x.shape[1:])

        return jnp.where(jax.vmap(mask)(keys), x / (1.0 - self.rate), 0.0)


def cut_into_windows(
    documents: list[str], context: int
) -> tuple[dict[str, np.ndarray], str]:
    """Returns the windows of all documents, and the characters ordered by number.

    The windows are `tokens`, uint8 `[N, context + 1]`, of which all but the first are
    predicted, and `length`, int32 `[N]`: how many of those are not padding.

    Raises:
      ConfigError: there are more than 256 distinct characters.
    """
    characters = "".join(sorted(set("".join(documents))))
    if len(characters) > MAX_CHARACTERS:
        raise ConfigError(
            f"`task.text` must have at most {MAX_CHARACTERS} different characters, got "
            f"{len(characters)}."
        )
    number = {character: index for index, character in enumerate(characters)}
    tokens, lengths = [], []
    for document in documents:
        numbers = np.array([number[character] for character in document], np.uint8)
        for start in range(0, len(numbers) - 1, context):
            window = numbers[start : start + context + 1]
            tokens.append(np.pad(window, (0, context + 1 - len(window))))
            lengths.append(len(window) - 1)
    windows = {"tokens": np.stack(tokens), "length": np.array(lengths, np.int32)}
    return windows, characters


def make_charlm(
    text: Annotated[str, one_of("python", "kjv")],
    num_layers: Annotated[int, AT_LEAST_ONE],
    width: Annotated[int, AT_LEAST_ONE],
    num_heads: Annotated[int, AT_LEAST_ONE],
    context: Annotated[int, AT_LEAST_ONE],
    dropout: Annotated[float, FRACTION],
    data_dir: str | None,
) -> Task:
    """Builds the task from its settings.

    Args:
      text: "python", the topics of Python's documentation, which are always available,
        or "kjv", the King James Bible.
      num_layers: attention and feed-forward pairs.
      width: of the stream between the layers.
      num_heads: number of attention heads; must divide the width.
      context: number of characters that a window predicts.
      dropout: share of activations that are dropped in training.
      data_dir: a folder to search for the data first; null for none.

    Raises:
      ConfigError: the text is missing, or the heads do not divide the width.
    """
    if width % num_heads:
        raise ConfigError(
            f"`task.num_heads` must divide `task.width`, got {num_heads} and {width}."
        )
    documents = load_text(text, data_dir)
    windows, characters = cut_into_windows(documents, context)
    held_out = np.arange(len(windows["length"])) % HELD_OUT == HELD_OUT - 1
    train = {name: array[~held_out] for name, array in windows.items()}
    test = {name: array[held_out] for name, array in windows.items()}

    def make_model(key: jax.Array) -> CharTransformer:
        return CharTransformer(
            num_layers=num_layers,
            width=width,
            num_heads=num_heads,
            context=context,
            dropout=dropout,
            vocabulary_size=len(characters),
            rngs=nnx.Rngs(params=key),
        )

    def inputs_fn(batch: PyTree) -> tuple[jax.Array, jax.Array | None]:
        return batch["tokens"][:, :-1], batch.get("dropout_keys")

    def init_fn(key: jax.Array) -> tuple[PyTree, PyTree]:
        return nnx.to_pure_dict(nnx.state(make_model(key), nnx.Param)), {}

    def draw_fn(key: jax.Array, batch: PyTree) -> PyTree:
        keys = jax.random.split(key, len(batch["length"]))
        return {**batch, "dropout_keys": keys}

    def weights_fn(batch: PyTree) -> jax.Array:
        places = jnp.arange(batch["tokens"].shape[1] - 1)
        return (places < batch["length"][:, None]).astype(jnp.float32)

    def mean(values: jax.Array, batch: PyTree) -> jax.Array:
        weights = weights_fn(batch)
        return jnp.sum(weights * values) / jnp.sum(weights)

    def labels(batch: PyTree) -> jax.Array:
        return batch["tokens"][:, 1:].astype(jnp.int32)

    def output_loss_fn(outputs: PyTree, batch: PyTree) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs, labels(batch))
        return mean(losses, batch)

    def metrics_fn(outputs: PyTree, batch: PyTree) -> dict[str, jax.Array]:
        correct: Any = jnp.argmax(outputs, axis=-1) == labels(batch)
        return {"accuracy": mean(correct, batch)}

    return Task(
        name="charlm",
        train=train,
        test=test,
        init_fn=init_fn,
        model_fn=nnx_model_fn(
            make_model(jax.random.key(0)), nnx.Param, inputs_fn=inputs_fn
        ),
        likelihood=ngd.Categorical(),
        output_loss_fn=output_loss_fn,
        metrics_fn=metrics_fn,
        weights_fn=weights_fn,
        draw_fn=draw_fn,
        count_fn=lambda batch: float(batch["length"].sum()),
    )
