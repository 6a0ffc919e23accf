"""`Kronecker`: averages of the factors over the batches of many steps."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from ngd_jax import placement, tree
from ngd_jax.kfac.blocks import BlockRoots, Blocks, zero_blocks
from ngd_jax.kfac.division import divide
from ngd_jax.kfac.factors import batch_factors
from ngd_jax.kfac.groups import Block, Group, Member, groups_of, padded, shape_in
from ngd_jax.kfac.inverses import damping_weights, inverse_matvec, refreshed_inverses
from ngd_jax.kfac.state import KroneckerState, Long, LongInverse, Pair
from ngd_jax.metric import check_count
from ngd_jax.types import Array, ArrayLike, MatVec, Params, PyTree

__all__ = ["Factors", "Kronecker", "claims"]

# Of a state that is divided anew; the search takes time in proportion.
_MOST_DEVICES = 256


@dataclasses.dataclass(frozen=True)
class Factors:
    """The settings of factors and the way to their state; see `Kronecker`."""

    decay: float = 0.95
    refresh_every: int = 20
    observe_every: int = 5
    max_size: int = 2048
    sharding: NamedSharding | None = None
    max_block: int | None = None
    dtype: Any = None

    def __post_init__(self) -> None:
        placement.check_sharding(self.sharding, "the factors")
        if self.max_block is not None:
            check_count("max_block", self.max_block)
        if self.dtype is not None and not jnp.issubdtype(self.dtype, jnp.floating):
            raise ValueError(f"`dtype` must be a floating one, got {self.dtype}.")
        if self.sharding is not None and self._block is not None:
            raise ValueError(
                "`sharding` divides whole factors: leave out `max_block` and `dtype`."
            )
        for name in ("refresh_every", "observe_every", "max_size"):
            check_count(name, getattr(self, name))
        if not 0 <= self.decay < 1:
            raise ValueError(f"`decay` must be in [0, 1), got {self.decay}.")

    @property
    def _block(self) -> int | None:
        """The largest side of a block; None for whole factors in their own dtype."""
        if self.max_block is None and self.dtype is not None:
            return self.max_size
        return self.max_block

    def init(self, params: Params) -> KroneckerState:
        """The state before anything is built; M is then I."""
        groups = self._groups(params)
        # `optax.tree.map_params` treats the state made from no parameters as a prefix
        # of every state: a leaf there stands for everything not shaped like the
        # parameters.
        averages = tuple(map(self._zeros, groups)) if groups else jnp.zeros(())
        inverses = tuple(map(self._identity, groups)) if groups else jnp.zeros(())
        state = KroneckerState(
            num_batches=jnp.zeros((), jnp.int32),
            age=jnp.asarray(self.refresh_every, jnp.int32),
            averages=averages,
            inverses=inverses,
        )
        return self._divided(groups, state) if groups else state

    def prepare(
        self, fisher: Any, state: KroneckerState, damping: ArrayLike
    ) -> tuple[MatVec, KroneckerState]:
        """The map v -> M⁻¹ v for this step, and the state; see `Preconditioner`."""
        groups = self._groups(fisher.params)
        if not groups:
            return lambda vector: vector, state
        state = self._divided(groups, state)
        # A mean of few batches needs every batch; a long memory changes slowly.
        is_young = state.num_batches < 1 / (1 - self.decay)
        is_observed = is_young | (state.age % self.observe_every == 0)
        num_batches, averages = jax.lax.cond(
            is_observed,
            lambda: self._observe(fisher, state, groups),
            lambda: (state.num_batches, state.averages),
        )
        state = state._replace(num_batches=num_batches, averages=averages)
        damping = jnp.asarray(damping).astype(tree.accumulator_dtype(state.averages))
        weights = damping_weights(fisher)
        # While the averages are young, half as many batches again change them a lot.
        half = (state.num_batches - state.age + 1) // 2
        is_due = state.age >= jnp.minimum(half, self.refresh_every)
        age, inverses = jax.lax.cond(
            is_due & is_observed & (state.num_batches > 0),
            lambda: refreshed_inverses(groups, self.sharding, state, damping, weights),
            lambda: (state.age + 1, state.inverses),
        )
        state = self._divided(groups, state._replace(age=age, inverses=inverses))
        precondition = inverse_matvec(
            fisher, groups, self.sharding, state, damping, weights
        )
        return precondition, state

    def redivide(self, state: KroneckerState, params: Params) -> KroneckerState:
        """A state from any number of devices, in the shapes that `sharding` gives it.

        For a checkpoint that is restored on another number of devices; the old number
        follows from the shapes.

        Args:
          state: made by these settings but for `sharding`; on the host, or whole on
            every device.
          params: the parameters.

        Raises:
          ValueError: for a state of other parameters or settings.
        """
        groups, leaves = self._groups(params), jax.tree.leaves(params)
        if not groups:
            return state
        shapes = jax.tree.map(jnp.shape, state.averages)
        for num_devices in range(1, _MOST_DEVICES + 1):
            old = groups_of(leaves, self.max_size, num_devices)
            like = jax.eval_shape(lambda old=old: tuple(map(self._zeros, old)))
            if jax.tree.map(jnp.shape, like) == shapes:
                break
        else:
            raise ValueError(
                f"`state` must be that of these parameters and settings, on at most "
                f"{_MOST_DEVICES} devices, got averages of shapes {shapes}."
            )

        def moved(values: PyTree, empty_fn: Callable[[Group], Any]) -> PyTree:
            by_place: dict[Any, Any] = {
                place: jax.tree.map(lambda x, k=k: x[k], entry)
                for group, entry in zip(old, values, strict=True)
                for k, place in enumerate(_places(group))
                if place is not None
            }

            def stacked(group: Group) -> Any:
                empty = empty_fn(group)
                spare = jax.tree.map(lambda x: x[0], empty)
                parts = [by_place.get(place, spare) for place in _places(group)]
                return jax.tree.map(
                    lambda like, *own: jnp.stack(
                        [_fitted(x, like.shape[1:]) for x in own]
                    ),
                    *(empty, *parts),
                )

            return tuple(map(stacked, groups))

        return self._divided(
            groups,
            state._replace(
                averages=moved(state.averages, self._zeros),
                inverses=moved(state.inverses, self._identity),
            ),
        )

    def _groups(self, params: Params) -> list[Group]:
        num_devices = placement.num_parts(self.sharding)
        return groups_of(jax.tree.leaves(params), self.max_size, num_devices)

    def _divided(self, groups: list[Group], state: KroneckerState) -> KroneckerState:
        """The state with every device's share on it."""
        divided = functools.partial(divide, sharding=self.sharding)
        return state._replace(
            averages=tuple(map(divided, groups, state.averages)),
            inverses=tuple(map(divided, groups, state.inverses)),
        )

    def _zeros(self, group: Group) -> Any:
        count = group.num_places
        if not group.is_matrices:
            return jnp.zeros((count, *group.shape), group.real_dtype)

        def side(size: int) -> Any:
            vectors = (count, size + 1)
            if size > self.max_size:
                return Long(*(jnp.zeros(vectors, group.real_dtype) for _ in range(2)))
            if self._block is not None:
                dtype = self.dtype or group.real_dtype
                return zero_blocks(count, size, self._block, dtype)
            shape = (count, group.num_rows(size), size + 1)
            return jnp.zeros(shape, group.real_dtype)

        return Pair(*map(side, group.shape))

    def _identity(self, group: Group) -> Any:
        def with_ones(side: Any) -> Any:
            if isinstance(side, Long):
                return LongInverse(side.square + 1, side.mean)
            if isinstance(side, Blocks):
                return BlockRoots(with_ones(side.values))
            one = jnp.eye(*side.shape[-2:], dtype=side.dtype)
            return jnp.broadcast_to(one, side.shape)

        return Pair(*map(with_ones, self._zeros(group))) if group.is_matrices else ()

    def _observe(
        self, fisher: Any, state: KroneckerState, groups: list[Group]
    ) -> tuple[Array, PyTree]:
        """Adds this batch to the averages, if its factors are finite.

        Records in `groups` which block each member is.
        """
        blocks, factors = batch_factors(
            fisher, state.num_batches, self.max_size, self._block
        )
        is_finite, count = tree.all_finite(factors), state.num_batches + 1
        dtype = tree.accumulator_dtype(state.averages)
        share = jnp.maximum(1 / count.astype(dtype), 1 - self.decay)

        def mix(group: Group, old: Array, *new: Array | None) -> Array:
            kept, old = old.dtype, tree.widen(old)
            filled = [
                _placed(x, member, old)
                for x, member in zip(new, group.members, strict=True)
            ]
            # Each device keeps what it has to: compiled to a reduce-scatter.
            change = divide(group, jnp.concatenate(filled), self.sharding) - old
            is_new, is_known = is_finite, group.repeated([x is not None for x in new])
            if not is_known.all():
                is_new &= is_known.reshape(-1, *[1] * (old.ndim - 1))
            mixed = old + share.astype(old.dtype) * change
            return jnp.where(is_new, mixed, old).astype(kept)

        # Averages for which no batch has a factor stay as they are.
        found = {
            (block.weight, block.room): (block, factor)
            for block, factor in zip(blocks, factors, strict=True)
        }
        averages = []
        for place, (group, old) in enumerate(zip(groups, state.averages, strict=True)):
            new = [found.get(x[:2], (None, None)) for x in group.members]
            groups[place] = group._replace(blocks=tuple(block for block, _ in new))
            if groups[place].is_used:
                none = jax.tree.map(lambda _: None, old)
                filled = [none if factor is None else factor for _, factor in new]
                old = jax.tree.map(functools.partial(mix, groups[place]), old, *filled)
            averages.append(old)
        return jnp.where(is_finite, count, state.num_batches), tuple(averages)


@dataclasses.dataclass(frozen=True)
class Kronecker(Factors):
    """Blocks of layers as products of small matrices: M = (A + ε) ⊗ (G + ε').

        A = E[a aᵀ],    G = E[δ δᵀ],    ε = π √λ,    ε' = √λ / π

    a are the inputs of a dense layer or the patches of a convolution, followed by a 1
    if there is a bias; δ are the cotangents of the outputs for random signs in the
    space where F is a square; and π² = (tr A / dim A) / (tr G / dim G). Example weights
    enter G; A counts all examples alike. Layers are found in the program of the
    gradient, whatever library the model is written in. Where `jax.lax.scan` runs over a
    stack of layers, whose first axis counts them, each layer has a block of its own;
    where it runs over time with one weight, the block is of all times together. A
    matrix outside any layer (embedding, tied weight) has factors of its gradients γ for
    such signs,

        L = E[γ γᵀ],    R = E[γᵀ γ],    F ≈ L ⊗ R / tr L,

    and a vector outside any layer has an estimate of the diagonal of F.

    The factors are averages over the batches of many steps, so M reflects more examples
    than the F of this batch. They cost a backward pass and the products a aᵀ and δ δᵀ
    at some steps, and an inverse of each at fewer. As a preconditioner of `CG`, one to
    three steps of CG are enough; `KFAC` is K-FAC itself.

    Attributes:
      decay: weight of the past in the averages, which are plain means until
        1 / (1 - decay) batches are seen.
      refresh_every: the most steps from one inverse to the next. Early on, there is one
        after batches 1, 2, 3, 5, 8, 12 (whenever half as many have come in again), and
        always with a batch that is observed.
      observe_every: steps from one batch in the averages to the next, once there are
        1 / (1 - decay) in them.
      max_size: the greatest length of a and δ with a full factor. For a longer a, A is
        ā āᵀ of its mean plus the diagonal of its variances; for a longer δ, G is
        diagonal. An m × n weight takes 2 (m² + n²) numbers in the state, and a long
        side takes a few vectors in place of its two matrices. A weight with more than
        two axes takes more, because only the program tells which of them are inputs,
        which are outputs, and whether the first one counts layers.
      sharding: a mesh, and its axes that divide factors and inverses, as in
        `NamedSharding(mesh, P("data"))`; None if every device has all of them. Each
        device has and inverts an equal share of the factors of one shape; of those that
        are left over it has some rows, for which it factorises all of them. M⁻¹ v then
        gathers as many numbers as there are parameters, or twice as many. The shapes of
        the state depend on the number of devices (`redivide` changes it);
        `jax.jit(tx.init)(params)` makes it where it belongs.
      max_block: sides longer than this, up to `max_size`, have block-diagonal factors,
        in equal blocks of at most about this length; correlations between blocks are
        left out. None for whole factors.
      dtype: of the averages of factors up to `max_size`, and of the inverse Cholesky
        roots that are then kept in place of inverses; None for float32, or the dtype of
        wider parameters. bfloat16 halves the state. An average of 20 batches in it does
        not follow changes of an entry below 4 to 8 %, which round away; what rounding
        may do to eigenvalues is added to the damping.

    Raises:
      ValueError, TypeError: for numbers out of range, a `dtype` that is not a floating
        one, or `sharding` together with `max_block` or `dtype`.

    Example:
      >>> import jax, jax.numpy as jnp, ngd_jax as ngd
      >>> x = jnp.array([[1.0, 0.0], [0.0, 3.0]])
      >>> fisher = ngd.linearize_fisher(
      ...     lambda w, x: x @ w, jnp.ones((2, 1)), x, ngd.Gaussian()
      ... )
      >>> precondition = Kronecker()(fisher, 0.0)
      >>> precondition(jnp.ones((2, 1))).ravel().round(2)  # F = diag(1/2, 9/2)
      Array([2.  , 0.22], dtype=float32)

    References:
      Martens and Grosse, Optimizing neural networks with Kronecker-factored approximate
      curvature, 2015: sections 3 (factors), 5 (averages) and 6.3 (π). Grosse and
      Martens, A Kronecker-factored approximate Fisher matrix for convolution layers,
      2016, section 3.1.
    """

    def __call__(self, fisher: Any, damping: ArrayLike) -> MatVec:
        """The map v -> M⁻¹ v, built for this Fisher and not kept."""
        return self.prepare(fisher, self.init(fisher.params), damping)[0]


def _placed(new: Array | None, member: Member, old: Array) -> Array:
    """What a batch has for a member, in the shape of its places in the averages."""
    shape = (member.num_layers, *old.shape[1:])
    if new is None:
        return jnp.zeros(shape, old.dtype)
    return padded(member.layers_of(new.astype(old.dtype)), shape)


def _places(group: Group) -> list[tuple | None]:
    """What every place along the first axis of a group's arrays is for, if anything."""
    return [
        None if leaf < 0 else (leaf, room, first + place)
        for leaf, room, first, num_layers in group.members
        for place in range(num_layers)
    ]


def _fitted(values: Array, shape: tuple[int, ...]) -> Array:
    """With rows of zeros added or taken away."""
    return padded(values[tuple(map(slice, shape))], shape)


def claims(
    fisher: Any, *, max_size: int = 2048, max_block: int | None = None
) -> list[str]:
    """How every leaf of the parameters is treated, in words.

    Args:
      fisher: the model's Fisher, at any parameters.
      max_size, max_block: as in `Kronecker`.

    Example:
      >>> import jax.numpy as jnp, ngd_jax as ngd
      >>> fisher = ngd.linearize_fisher(
      ...     lambda params, x: x @ params["w"] + params["b"],
      ...     {"b": jnp.zeros(2), "w": jnp.zeros((3, 2))},
      ...     jnp.ones((4, 3)),
      ...     ngd.Gaussian(),
      ... )
      >>> claims(fisher)
      ["bias of ['w']", "dense 3 → 2 with bias ['b']"]
    """
    blocks: list[Block] = []

    def trace() -> Array:
        blocks[:] = batch_factors(fisher, jnp.zeros((), jnp.int32), max_size)[0]
        return jnp.zeros(())

    jax.eval_shape(trace)
    leaves = jax.tree.leaves_with_path(fisher.params)
    paths = [jax.tree_util.keystr(path) for path, _ in leaves]
    shapes = [jnp.shape(leaf) for _, leaf in leaves]
    words = ["diagonal"] * len(paths)
    for block in blocks:
        shape, room, layer = shapes[block.weight], block.room, block.layer
        if room.split is None:
            continue
        sides = shape_in(room, shape)
        is_cut = any((max_block or size) < size <= max_size for size in sides)
        suffix = f" in blocks of {max_block}" if is_cut else ""
        prefix = f"{shape[0]} × " if room.is_stack else ""
        if layer is None:
            rows, columns = sides
            text = f"{prefix}factors from gradients {rows} × {columns}{suffix}"
            words[block.weight] = text
            continue
        kind = "convolution patch" if layer.is_convolution else "dense"
        text = f"{prefix}{kind} {layer.num_inputs} → {layer.num_outputs}{suffix}"
        if layer.in_loop and not room.is_stack:
            text += " in a loop"
        if layer.bias is not None:
            text += f" with bias {paths[layer.bias]}"
            words[layer.bias] = f"bias of {paths[layer.weight]}"
        words[layer.weight] = text
    return words
