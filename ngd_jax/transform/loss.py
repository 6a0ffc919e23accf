"""The loss that the rules of a step weigh: of damping, radius and acceptance."""

import dataclasses
from collections.abc import Callable
from typing import Any

from ngd_jax.damping import LevenbergMarquardt
from ngd_jax.fisher import Fisher
from ngd_jax.fisher.functions import model_on
from ngd_jax.relative_radius import RelativeRadius
from ngd_jax.types import Batch, Params, Scalar

__all__ = ["WeighedLoss"]


@dataclasses.dataclass(frozen=True)
class WeighedLoss:
    """The loss on the batch of the gradient, as a function of the parameters.

    Attributes:
      options: the arguments of `natural_gradient`.
      fisher: the metric, at the parameters of the step.
      batch: the batch of the gradient.
      value: the loss at those parameters where it is known, or None.
      value_fn: (params, batch) -> loss, or None. It goes before `output_loss_fn`,
        which may have the right gradient and another value.
    """

    options: Any
    fisher: Fisher
    batch: Batch
    value: Scalar | None
    value_fn: Callable[..., Scalar] | None

    def at(self, params: Params) -> Scalar:
        """The loss at `params`."""
        options = self.options
        if self.value_fn is not None:
            return self.value_fn(params, self.batch)
        if options.output_loss_fn is None:
            raise ValueError(
                f"{self._who_asks()} needs the loss: give `output_loss_fn` "
                f"to natural_gradient, or call tx.update(..., value_fn=value_fn) with "
                f"value_fn(params, batch)."
            )
        outputs_fn = self.fisher.outputs_at
        if options.metric_batch_fn is not None:
            outputs_fn = model_on(
                options.model_fn,
                options.likelihood,
                self.batch,
                options.microbatch_size,
            )
        return options.output_loss_fn(outputs_fn(params), self.batch)

    def here(self) -> Scalar:
        """The loss at the parameters of the step: a pass through the model at most."""
        options = self.options
        if self.value is not None:
            return self.value
        is_known = options.metric_batch_fn is None and self.value_fn is None
        if is_known and options.output_loss_fn is not None:
            return options.output_loss_fn(self.fisher.outputs, self.batch)
        return self.at(self.fisher.params)

    def _who_asks(self) -> str:
        options = self.options
        if isinstance(options.rule, LevenbergMarquardt):
            return "damping=LevenbergMarquardt(...)"
        if isinstance(options.max_kl, RelativeRadius):
            return f"max_kl={options.max_kl!r}"
        if options.acceptance is not None:
            return f"acceptance={options.acceptance!r}"
        return f"solver={options.solver!r}"
