"""Natural gradient as an Optax transformation.

    d = (F + λI)⁻¹ g,    θ ← θ - s d,    s = the learning rate or the KL radius

The only package that knows Optax's protocol.

* `natural_gradient`: the two public functions;
* `step`: what they return, one step in four parts;
* `state`: what it keeps and what it reports;
* `arguments`: what it refuses to begin with.
"""

from ngd_jax.transform.natural_gradient import (
    natural_gradient,
    scale_by_natural_gradient,
)
from ngd_jax.transform.state import (
    NaturalGradientInfo,
    NaturalGradientState,
    StepStatus,
)

__all__ = [
    "NaturalGradientInfo",
    "NaturalGradientState",
    "StepStatus",
    "natural_gradient",
    "scale_by_natural_gradient",
]
