"""What a training step keeps in memory, before anything is computed.

    peak = arguments + results - those that share memory + intermediate values

from the shapes of the state and the plan that XLA makes of the step. Must not run the
model.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from ngd_jax import tree
from ngd_jax.transform.step import NaturalGradientStep
from ngd_jax.types import Batch, ModelFn, Outputs, Params, PyTree, Scalar

__all__ = ["Memory", "memory_of"]


class Memory(NamedTuple):
    """Bytes.

    Attributes:
      parameters: of all parameters.
      state: of the state of the transformation.
      peak: the most that a training step needs at a time on one device, parameters and
        state included, as XLA plans it; None if the step was not compiled, or if the
        backend does not tell. The step is the gradient, `update` and `apply_updates` in
        one function that donates parameters and state.
    """

    parameters: int
    state: int
    peak: int | None

    def __str__(self) -> str:
        words = f"parameters {_words(self.parameters)}, state {_words(self.state)}"
        return words if self.peak is None else f"{words}, peak {_words(self.peak)}"


def memory_of(
    step: NaturalGradientStep,
    model_fn: ModelFn,
    params: Params,
    batch: Batch,
    loss_fn: Callable[[Outputs, Batch], Scalar] | None,
    *,
    compiled: bool,
) -> Memory:
    """The memory of a training step.

    Args:
      step: the transformation.
      model_fn: the model.
      params: the parameters, or their shapes.
      batch: a batch, or its shapes.
      loss_fn: (outputs, batch) -> loss; None for any loss.
      compiled: whether to compile the step, for its peak.
    """
    state = jax.eval_shape(step.init, params)
    memory = Memory(_num_bytes(params), _num_bytes(state), None)
    if not compiled:
        return memory

    def loss_of(params: Params, batch: Batch) -> Scalar:
        outputs = model_fn(params, batch)
        if loss_fn is not None:
            return loss_fn(outputs, batch)
        leaves = jax.tree.leaves(tree.widen(outputs))
        return sum((jnp.sum(jnp.real(x)) for x in leaves), jnp.zeros(()))

    def training_step(
        params: Params, state: PyTree, batch: Batch
    ) -> tuple[Params, PyTree, Scalar]:
        value, grads = jax.value_and_grad(loss_of)(params, batch)
        grads = jax.tree.map(jnp.conj, grads)
        updates, state = step.update(grads, state, params, batch=batch)
        return optax.apply_updates(params, updates), state, value

    jitted = jax.jit(training_step, donate_argnums=(0, 1))
    plan = jitted.lower(params, state, batch).compile().memory_analysis()
    if plan is None:
        return memory
    peak = plan.argument_size_in_bytes + plan.output_size_in_bytes
    peak += plan.temp_size_in_bytes - plan.alias_size_in_bytes
    return memory._replace(peak=peak)


def _num_bytes(values: PyTree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(values))


def _words(num_bytes: int) -> str:
    size, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.3g} {unit}"
