"""The state of the factors, kept from step to step."""

from typing import Any, NamedTuple

from ngd_jax.types import Array, PyTree

__all__ = ["KroneckerState", "Long", "LongInverse", "Pair"]


class Long(NamedTuple):
    """A factor of a long side: only averages of x² and x are kept."""

    square: Array
    mean: Array


class LongInverse(NamedTuple):
    """diag(d) - s sᵀ, the inverse of diag(v) + x̄ x̄ᵀ.

    Attributes:
      diagonal: d = 1 / v.
      downdate: s = d x̄ / √(1 + x̄ᵀ (d x̄)).
    """

    diagonal: Array
    downdate: Array


class Pair(NamedTuple):
    """One entry for the rows and one for the columns of a matrix."""

    rows: Any
    columns: Any


class KroneckerState(NamedTuple):
    """The state of `Kronecker`, by groups of leaves of one shape.

    Matrices r × c of one group have their factors in two arrays `[K, r + 1, r + 1]` and
    `[K, c + 1, c + 1]`; the last row and column are those of a bias, whose input is 1.
    A matrix that may be split in two ways is in two groups, and a stack of layers has a
    place for each of them. With `max_block` or `dtype` the arrays are `Blocks` and
    `BlockRoots` `[K, B, b, b]`.

    Attributes:
      num_batches: int32, batches in the averages so far.
      age: int32, steps that the inverses have served, this one included.
      averages: for a group of matrices, the factors of both sides; for a group of
        vectors, estimates of the diagonal of F.
      inverses: for a group of matrices, the inverses of the damped factors.
    """

    num_batches: Array
    age: Array
    averages: PyTree
    inverses: PyTree
