"""Finds dense layers and convolutions in the program of a model's backward pass.

    y = x W + b:    ∂/∂W = Σₜ aₜ ⊗ δₜ,    ∂/∂b = Σₜ δₜ

aₜ is the input of the layer (for a convolution a patch of its images), δₜ the cotangent
of its output, and t runs over examples and, if a layer is used at several positions of
an example, over positions. Owns everything that looks into a traced program; a layer is
claimed only where the program proves the formula. Knows nothing of metrics or solvers.
"""

from ngd_jax.layers.backward import Backward, Wanted, check_partition, read_backward
from ngd_jax.layers.products import Layer, LayerValues

__all__ = [
    "Backward",
    "Layer",
    "LayerValues",
    "Wanted",
    "check_partition",
    "read_backward",
]
