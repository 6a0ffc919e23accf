"""Which leaves of the parameters are handled together; a function of their shapes.

A matrix has rows and columns. Only the model's program can tell where its shape splits
into the two; until it is read, a leaf belongs to the group of every split. Static
throughout. Knows layers, but not factors.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ngd_jax import tree
from ngd_jax.layers import Layer
from ngd_jax.types import ArrayLike, Params

__all__ = ["Block", "Group", "blocks_of", "groups_of", "sides_of", "splits_of"]

# Memory, in numbers, that the factors of a split may take even if no layer uses it.
_SPARE_NUMBERS = 2**16
# Places for no factor that a group may have, for each factor.
_SPARE_SHARE = 0.1


class Block(NamedTuple):
    """A block of M; static.

    Attributes:
      weight: the index of a matrix or a vector among the leaves.
      split: the axis that separates rows from columns; None for vectors.
      layer: the layer that it belongs to; None for factors of gradients.
    """

    weight: int
    split: int | None
    layer: Layer | None

    @property
    def bias(self) -> int | None:
        """The index of the bias that shares the block."""
        return None if self.layer is None else self.layer.bias

    @property
    def is_turned(self) -> bool:
        """Whether the rows are outputs, and the columns inputs."""
        return self.layer is not None and not self.layer.inputs_first


class Group(NamedTuple):
    """Leaves that are handled together; static.

    Attributes:
      shape: (rows, columns), or (size,) for vectors.
      dtype: of the leaves, float32 or wider.
      members: for each, the index among the leaves, and the axis of its shape that
        separates rows from columns; None for vectors.
      blocks: the block of each member; None if it has none, or if it is not known.
      row_multiple: what the number of rows of a stored factor is a multiple of.
    """

    shape: tuple[int, ...]
    dtype: Any
    members: tuple[tuple[int, int | None], ...]
    blocks: tuple[Block | None, ...]
    row_multiple: int

    @property
    def real_dtype(self) -> Any:
        """The dtype of factors and diagonals."""
        return jnp.finfo(self.dtype).dtype

    @property
    def is_matrices(self) -> bool:
        """Whether they are matrices."""
        return len(self.shape) == 2

    @property
    def is_by_rows(self) -> bool:
        """Whether each device has some rows of every factor."""
        return self.row_multiple > 1

    def num_rows(self, size: int) -> int:
        """The rows that are stored of the factor of a side, with that of a bias."""
        return -(-(size + 1) // self.row_multiple) * self.row_multiple

    @property
    def is_used(self) -> bool:
        """Whether any member has a block."""
        return any(block is not None for block in self.blocks)


def groups_of(leaves: list[Any], max_size: int, num_devices: int = 1) -> list[Group]:
    """The groups of all leaves with entries, a function of their shapes alone.

    If the matrices of one shape fill `num_devices` devices almost evenly, places for
    none fill up the rest. If not, those that are left over are a group divided by rows.
    """
    members: dict[tuple, list[tuple[int, int | None]]] = {}
    for place, leaf in enumerate(leaves):
        shape, dtype = jnp.shape(leaf), tree.wide_dtype(leaf)
        for split in splits_of(leaf, max_size):
            key = (sides_of(shape, split), dtype)
            members.setdefault(key, []).append((place, split))
        if not splits_of(leaf, max_size) and 0 not in shape:
            key = ((math.prod(shape),), dtype)
            members.setdefault(key, []).append((place, None))
    groups = []
    for (shape, dtype), found in members.items():
        whole, rest = found, []
        spare = -len(found) % num_devices
        if len(shape) == 2 and spare <= _SPARE_SHARE * len(found):
            whole = [*found, *[(-1, None)] * spare]
        elif len(shape) == 2:
            stop = len(found) - len(found) % num_devices
            whole, rest = found[:stop], found[stop:]
        for part, row_multiple in ((whole, 1), (rest, num_devices)):
            if part:
                none = (None,) * len(part)
                groups.append(Group(shape, dtype, tuple(part), none, row_multiple))
    return groups


def blocks_of(layers: list[Layer], params: Params, max_size: int) -> list[Block]:
    """One block for every leaf that is not the bias of another, in order."""
    leaves = jax.tree.leaves(params)
    splits = [splits_of(leaf, max_size) for leaf in leaves]
    # A layer without room for its split does not count: it has factors of gradients.
    fitting = {one.weight: one for one in layers if one.split in splits[one.weight]}
    biases = {layer.bias for layer in fitting.values()}
    blocks = []
    for place, own in enumerate(splits):
        if place in biases or 0 in jnp.shape(leaves[place]):
            continue
        layer = fitting.get(place)
        split = layer.split if layer is not None else own[-1] if own else None
        blocks.append(Block(place, split, layer))
    return blocks


def splits_of(leaf: ArrayLike, max_size: int) -> list[int]:
    """The axes where the shape of a matrix may split; none for leaves with a diagonal.

    A matrix with two axes has one. A kernel with more splits into inputs and outputs
    after the first axis or before the last; only the model's program can tell which.
    The squarer split always has room in the state, the other only if it takes no more
    than a few times as many numbers as the weight itself.
    """
    shape = jnp.shape(leaf)
    if jnp.iscomplexobj(leaf) or len(shape) < 2 or 0 in shape:
        return []
    candidates = sorted({1, len(shape) - 1})
    best = min(candidates, key=lambda k: sum(n**2 for n in sides_of(shape, k)))

    def numbers(split: int) -> int:
        sides = sides_of(shape, split)
        return sum(n if n > max_size else n**2 for n in sides)

    limit = max(_SPARE_NUMBERS, 4 * math.prod(shape))
    return [k for k in candidates if k == best or numbers(k) <= limit]


def sides_of(shape: tuple[int, ...], split: int) -> tuple[int, int]:
    """The numbers of rows and columns of a matrix that is split there."""
    return math.prod(shape[:split]), math.prod(shape[split:])
