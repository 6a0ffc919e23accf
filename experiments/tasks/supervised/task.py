"""What a task is: data, a model, a likelihood and a loss, but no optimizer.

    params, batch --model_fn--> outputs --output_loss_fn--> loss
                                outputs --likelihood------> metric, KL

Every program (training, races, claims) sees tasks through this one type. The loss and
the metrics are functions of the *outputs*, because the natural gradient needs the
outputs themselves, and so that one forward pass serves all three.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

__all__ = ["Task", "find_non_finite", "num_examples"]

PyTree = Any


def _keep_model_state(params: PyTree, model_state: PyTree, batch: PyTree) -> PyTree:
    del params, batch
    return model_state


def _no_metrics(outputs: PyTree, batch: PyTree) -> dict[str, jax.Array]:
    del outputs, batch
    return {}


def _draw_nothing(key: jax.Array, batch: PyTree) -> PyTree:
    del key
    return batch


@dataclasses.dataclass(frozen=True)
class Task:
    """A learning problem.

    Attributes:
      name: as in the configuration.
      train: pytree of arrays with the examples along the leading axis.
      test: the same, for evaluation.
      init_fn: `init_fn(key) -> (params, model_state)`; the model state (running
        averages of BatchNorm and the like) is an empty tree for most models.
      model_fn: `model_fn(params, batch) -> outputs`, in training mode.
      likelihood: the distribution that the outputs parametrise.
      output_loss_fn: `output_loss_fn(outputs, batch) -> scalar`, mean over examples.
      metrics_fn: `metrics_fn(outputs, batch) -> {name: scalar}`, means over examples.
      predict_fn: `predict_fn(params, model_state, batch) -> outputs`, in evaluation
        mode; `model_fn` unless given.
      update_model_state: `(params, model_state, batch) -> model_state`, applied at the
        parameters before the step.
      weights_fn: `weights_fn(batch) -> weights` of the examples in the KL and the
        metric; the loss of the task must use them itself. None for equal weights.
      draw_fn: `draw_fn(key, batch) -> batch` with the random inputs of a step, such as
        dropout keys; not used in evaluation.
      count_fn: `count_fn(batch) -> float`, the weight of a batch in a mean over
        several; the number of examples unless given.
    """

    name: str
    train: PyTree
    test: PyTree
    init_fn: Callable[[jax.Array], tuple[PyTree, PyTree]]
    model_fn: Callable[[PyTree, PyTree], PyTree]
    likelihood: Any
    output_loss_fn: Callable[[PyTree, PyTree], jax.Array]
    metrics_fn: Callable[[PyTree, PyTree], dict[str, jax.Array]] = _no_metrics
    predict_fn: Callable[[PyTree, PyTree, PyTree], PyTree] | None = None
    update_model_state: Callable[[PyTree, PyTree, PyTree], PyTree] = _keep_model_state
    weights_fn: Callable[[PyTree], PyTree] | None = None
    draw_fn: Callable[[jax.Array, PyTree], PyTree] = _draw_nothing
    count_fn: Callable[[PyTree], float] | None = None

    def loss_fn(self, params: PyTree, batch: PyTree) -> jax.Array:
        """Returns the mean training loss; the `value_fn` of line searches."""
        return self.output_loss_fn(self.model_fn(params, batch), batch)

    def predict(self, params: PyTree, model_state: PyTree, batch: PyTree) -> PyTree:
        """Returns the outputs in evaluation mode."""
        if self.predict_fn is None:
            return self.model_fn(params, batch)
        return self.predict_fn(params, model_state, batch)

    def weights(self, batch: PyTree) -> PyTree | None:
        """Returns the weights of the examples of `batch`, None for equal ones."""
        return None if self.weights_fn is None else self.weights_fn(batch)

    def count(self, batch: PyTree) -> float:
        """Returns the weight of `batch` in a mean over several of them."""
        return (num_examples if self.count_fn is None else self.count_fn)(batch)


def num_examples(data: PyTree) -> int:
    """Returns the length of the leading axis that all leaves of `data` share."""
    lengths = {leaf.shape[0] for leaf in jax.tree.leaves(data)}
    if len(lengths) != 1:
        raise ValueError(
            f"All arrays of a data set must have the same number of examples, got "
            f"leading axes {sorted(lengths)}."
        )
    return lengths.pop()


def find_non_finite(data: PyTree) -> str | None:
    """Describes where `data` has its first value that is not finite, if any."""
    for path, leaf in jax.tree.leaves_with_path(data):
        for row, example in enumerate(leaf):  # a large set may be on the disk
            values = np.asarray(example)
            if values.dtype.kind in "fc" and not np.isfinite(values).all():
                name = jax.tree_util.keystr(path)
                return f"row {row} of the training data, {name}, is not finite"
    return None
