"""Which leaves of the parameters are handled together; a function of their shapes.

A matrix has rows and columns. Only the model's program can tell where its shape splits
into the two, and whether its first axis counts the layers of a stack, each with a block
of its own; until it is read, a leaf belongs to a group for each of these. Static
throughout. Knows layers, but not factors.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ngd_jax import tree
from ngd_jax.layers import Layer
from ngd_jax.types import Array, ArrayLike, Params

__all__ = [
    "Block",
    "Group",
    "Member",
    "Room",
    "blocks_of",
    "groups_of",
    "padded",
    "rooms_of",
    "shape_in",
    "splits_of",
]

# Memory, in numbers, that the factors of a split may take even if no layer uses it.
_SPARE_NUMBERS = 2**16
# And what those of a stack may, for each of its numbers: layers with a side up to eight
# times as long as the other.
_STACK_SHARE = 9
# Places for no factor that a group may have, for each factor.
_SPARE_SHARE = 0.1


class Room(NamedTuple):
    """What the state may take a leaf for; static.

    Attributes:
      split: the axis of its shape that separates rows from columns; None for vectors.
      is_stack: whether the first axis counts layers, each with its own block.
    """

    split: int | None
    is_stack: bool


class Member(NamedTuple):
    """The part of a leaf that a group has room for; static.

    Attributes:
      leaf: the index among the leaves; -1 for a place that is left empty.
      room: what the leaf is taken for here.
      first: the first of its layers that is a member; 0 if it is no stack.
      num_layers: the number of its layers that are members; 1 if it is no stack.
    """

    leaf: int
    room: Room
    first: int
    num_layers: int

    def layers_of(self, leaf: Array) -> Array:
        """`[num_layers, ...]`: those layers of a leaf that are a member."""
        if not self.room.is_stack:
            return leaf[None]
        if len(leaf) == self.num_layers:
            return leaf
        stop = self.first + self.num_layers
        return jax.lax.slice_in_dim(leaf, self.first, stop)


class Block(NamedTuple):
    """A block of M, or one for each layer of a stack; static.

    Attributes:
      weight: the index of a matrix or a vector among the leaves.
      room: what it is taken for.
      layer: the layer that it belongs to; None for factors of gradients.
    """

    weight: int
    room: Room
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
      members: their places in the state, one after the other.
      blocks: the block of each member; None if it has none, or if it is not known.
      row_multiple: what the number of rows of a stored factor is a multiple of.
    """

    shape: tuple[int, ...]
    dtype: Any
    members: tuple[Member, ...]
    blocks: tuple[Block | None, ...]
    row_multiple: int

    @property
    def num_places(self) -> int:
        """How many matrices or vectors there are, every layer of a stack counted."""
        return _number(self.members)

    def repeated(self, values: Sequence[Any]) -> np.ndarray:
        """A value for every place from one for every member."""
        return np.repeat(
            np.array(values), [member.num_layers for member in self.members]
        )

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
    members: dict[tuple, list[Member]] = {}
    for place, rooms in enumerate(rooms_of(leaves, max_size)):
        shape, dtype = jnp.shape(leaves[place]), tree.wide_dtype(leaves[place])
        for room in rooms:
            count = shape[0] if room.is_stack else 1
            member = Member(place, room, 0, count)
            members.setdefault((shape_in(room, shape), dtype), []).append(member)
    groups = []
    for (shape, dtype), found in members.items():
        whole, rest = found, []
        number = _number(found)
        spare = -number % num_devices
        if len(shape) == 2 and spare <= _SPARE_SHARE * number:
            whole = [*found, *[Member(-1, Room(None, False), 0, 1)] * spare]
        elif len(shape) == 2:
            whole, rest = _cut(found, number - number % num_devices)
        for part, row_multiple in ((whole, 1), (rest, num_devices)):
            if part:
                none = (None,) * len(part)
                groups.append(Group(shape, dtype, tuple(part), none, row_multiple))
    return groups


def _number(members: Sequence[Member]) -> int:
    return sum(member.num_layers for member in members)


def _cut(members: list[Member], number: int) -> tuple[list[Member], list[Member]]:
    """The first places, and the rest; a stack may have layers in both."""
    first, rest = [], []
    for member in members:
        count = min(member.num_layers, number - _number(first))
        if count:
            first.append(member._replace(num_layers=count))
        if count < member.num_layers:
            left = member.num_layers - count
            rest.append(member._replace(first=member.first + count, num_layers=left))
    return first, rest


def blocks_of(
    layers: list[Layer], stacked: Collection[int], params: Params, max_size: int
) -> list[Block]:
    """One block for every leaf that is not the bias of another, in order.

    Args:
      layers: those that were found.
      stacked: the leaves that are certainly stacks.
      params: the parameters.
      max_size: as in `Kronecker`.
    """
    rooms = rooms_of(jax.tree.leaves(params), max_size)
    # A layer without room for its split does not count: it has factors of gradients.
    fitting = {}
    for layer in layers:
        room = Room(layer.split, bool(layer.num_stacked))
        if layer.num_stacked < 2 and room in rooms[layer.weight]:
            fitting[layer.weight] = Block(layer.weight, room, layer)
    biases = {block.bias for block in fitting.values()}
    blocks = []
    for place, own in enumerate(rooms):
        if place in biases or not own:
            continue
        in_stack = [room for room in own if room.is_stack and place in stacked]
        as_one = [room for room in own if not room.is_stack]
        block = Block(place, (in_stack or as_one)[-1], None)
        blocks.append(fitting.get(place, block))
    return blocks


def rooms_of(leaves: list[Any], max_size: int) -> list[list[Room]]:
    """What the state may take each leaf for, from the shapes of all.

    Only the model's program can tell a stack of layers from a kernel or from attention
    heads. Where it would cost little, or another leaf looks like the biases or scales
    of the same layers, there is room for a stack too.
    """
    shapes: list[tuple[int, ...]] = [jnp.shape(leaf) for leaf in leaves]
    vectors = {shape[0] for shape in shapes if len(shape) == 2}
    rooms: list[list[Room]] = []
    lengths: set[int] = set()
    for leaf, shape in zip(leaves, shapes, strict=True):
        splits = splits_of(leaf, max_size)
        stacks: list[Room] = []
        if splits and len(shape) > 2:
            limit = _SPARE_NUMBERS
            if shape[0] in vectors:
                limit = max(limit, _STACK_SHARE * math.prod(shape))
            stacks = [
                Room(split + 1, True)
                for split in _splits(shape[1:])
                if shape[0] * _numbers(shape[1:], split, max_size) <= limit
            ]
            if stacks:
                lengths.add(shape[0])
                # What is probably a stack needs no second split of another kind.
                best = _squarest(shape)
                splits = [
                    k
                    for k in splits
                    if k == best or _numbers(shape, k, max_size) <= _SPARE_NUMBERS
                ]
        own = [Room(split, False) for split in splits]
        if not own and 0 not in shape:
            own = [Room(None, False)]
        rooms.append(own + stacks)
    for own, shape in zip(rooms, shapes, strict=True):
        if own == [Room(1, False)] and len(shape) == 2 and shape[0] in lengths:
            own.append(Room(None, True))
    return rooms


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
    best, limit = _squarest(shape), max(_SPARE_NUMBERS, 4 * math.prod(shape))
    return [
        k for k in _splits(shape) if k == best or _numbers(shape, k, max_size) <= limit
    ]


def _splits(shape: tuple[int, ...]) -> list[int]:
    return sorted({1, len(shape) - 1})


def _squarest(shape: tuple[int, ...]) -> int:
    return min(_splits(shape), key=lambda k: sum(n**2 for n in sides_of(shape, k)))


def _numbers(shape: tuple[int, ...], split: int, max_size: int) -> int:
    """What the factors of a matrix take."""
    return sum(n if n > max_size else n**2 for n in sides_of(shape, split))


def sides_of(shape: tuple[int, ...], split: int) -> tuple[int, int]:
    """The numbers of rows and columns of a matrix that is split there."""
    return math.prod(shape[:split]), math.prod(shape[split:])


def padded(values: Array, shape: Sequence[int]) -> Array:
    """The values with zeros after them along each axis, up to that shape."""
    if values.shape == tuple(shape):
        return values
    sizes = zip(values.shape, shape, strict=True)
    return jnp.pad(values, [(0, stop - size) for size, stop in sizes])


def shape_in(room: Room, shape: tuple[int, ...]) -> tuple[int, ...]:
    """(rows, columns) or (size,) of each matrix or vector of a leaf."""
    own = shape[1:] if room.is_stack else shape
    if room.split is None:
        return (math.prod(own),)
    return sides_of(own, room.split - room.is_stack)
