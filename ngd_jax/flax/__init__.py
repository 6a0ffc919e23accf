"""Flax models as `model_fn(params, batch)`, and a TrainState that forwards `batch`.

    outputs = model_fn(params, batch),    d = (F + λI)⁻¹ g at params on that very batch

`model_fn` is a pure function, so all that changes in training besides the parameters
travels in `batch`: inputs, running statistics, dropout keys. What a module writes
during the call (new running statistics, counters) is thrown away: it belongs to the
loss, which is evaluated once, and not to the metric, which is evaluated many times.
Knows nothing of solvers or of steps. Not imported by `ngd_jax` itself.
"""

from ngd_jax.flax.linen_adapter import linen_model_fn
from ngd_jax.flax.nnx_adapter import nnx_model_fn
from ngd_jax.flax.train_state import TrainState

__all__ = ["TrainState", "linen_model_fn", "nnx_model_fn"]
