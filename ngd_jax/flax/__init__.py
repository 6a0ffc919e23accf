"""Flax models as `model_fn(params, batch)`, and a TrainState that forwards `batch`.

    outputs = model_fn(params, batch),    d = (F + λI)⁻¹ g at params on that very batch

`model_fn` is a pure function, so everything besides the parameters that changes in
training travels in `batch`: inputs, running statistics, dropout keys. Whatever a module
writes during the call (new running statistics, counters) is discarded: it belongs to
the loss, which is evaluated once, and not to the metric, which is evaluated many times.
Knows nothing of solvers or of steps. Not imported by `ngd_jax` itself.
"""

from ngd_jax.flax.linen_adapter import linen_model_fn
from ngd_jax.flax.nnx_adapter import nnx_model_fn
from ngd_jax.flax.train_state import TrainState

__all__ = ["TrainState", "linen_model_fn", "nnx_model_fn"]
