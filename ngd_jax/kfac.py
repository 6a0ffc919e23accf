"""K-FAC: blocks of F as Kronecker products, as a preconditioner and as a solver.

    F ≈ M = A ⊗ G,    (A + ε) ⊗ (G + ε'),    ε = π √λ,    ε' = √λ / π

for every matrix of the parameters; vectors have a diagonal. Where `layers` proves a
dense layer or a convolution, A = E[a aᵀ] and G = E[δ δᵀ] are of its inputs and of the
cotangents of its outputs; any other matrix has factors of its gradients. M is symmetric
positive definite for every model. Owns these factors; must not look into programs.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ngd_jax import tree
from ngd_jax.fisher import linearize, sum_microbatches
from ngd_jax.layers import Layer, LayerValues, backward_pass
from ngd_jax.metric import check_count
from ngd_jax.solvers.protocol import (
    RightHandSide,
    Solution,
    Solver,
    SolverInfo,
    SolverStatus,
)
from ngd_jax.types import Array, ArrayLike, MatVec, Params, PyTree, Scalar

__all__ = ["KFAC", "Kronecker", "KroneckerState", "claims"]

# An entry of an estimated diagonal counts as at least this part of the leaf's mean.
_SMALLEST_SHARE = 0.1
# Numbers that factors for a split may take that no layer may turn out to have.
_SPARE_NUMBERS = 2**16
# Where the default is TF32, a barely positive matrix would lose its Cholesky factor.
_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class _Long(NamedTuple):
    """A factor of a long side, of which only averages of x² and of x are kept."""

    square: Array
    mean: Array


class _LongInverse(NamedTuple):
    """diag(d) - c s sᵀ, the inverse of diag(v) + x̄ x̄ᵀ.

    Attributes:
      diagonal: d = 1 / v.
      solved: s = d x̄ / c.
      downdate: c = 1 + x̄ᵀ (d x̄).
    """

    diagonal: Array
    solved: Array
    downdate: Array


class _Pair(NamedTuple):
    """Something of the rows and of the columns of a matrix."""

    rows: Any
    columns: Any


class KroneckerState(NamedTuple):
    """What `Kronecker` keeps, by groups of leaves of one shape.

    Matrices r × c of one group have their factors in two arrays `[K, r + 1, r + 1]` and
    `[K, c + 1, c + 1]`; the last row and column are those of a bias, whose input is 1.
    A matrix that may be split in two ways is in two groups.

    Attributes:
      num_batches: int32, that the averages have seen.
      age: int32, steps that the inverses have served, this one included.
      averages: of a group of matrices the factors of both sides; of a group of vectors
        estimates of the diagonal of F.
      inverses: of a group of matrices the inverses of the damped factors.
    """

    num_batches: Array
    age: Array
    averages: PyTree
    inverses: PyTree


class _Block(NamedTuple):
    """A block of M; static.

    Attributes:
      weight: the place of a matrix or a vector among the leaves.
      split: the axis where rows and columns part; None for vectors.
      layer: the layer that it belongs to; None for factors of gradients.
    """

    weight: int
    split: int | None
    layer: Layer | None

    @property
    def bias(self) -> int | None:
        """The place of the bias that shares the block."""
        return None if self.layer is None else self.layer.bias

    @property
    def is_turned(self) -> bool:
        """Whether the rows are outputs, and the columns inputs."""
        return self.layer is not None and not self.layer.inputs_first


class _Group(NamedTuple):
    """Leaves that are handled together; static.

    Attributes:
      shape: (rows, columns), or (size,) of vectors.
      dtype: of the leaves, float32 or wider.
      members: of each the place among the leaves, and the axis of its shape where rows
        and columns part; None for vectors.
      blocks: of each the block that it is; None if it is none, or not known.
    """

    shape: tuple[int, ...]
    dtype: Any
    members: tuple[tuple[int, int | None], ...]
    blocks: tuple[_Block | None, ...]

    @property
    def real_dtype(self) -> Any:
        """The dtype of factors and diagonals."""
        return jnp.finfo(self.dtype).dtype

    @property
    def is_matrices(self) -> bool:
        """Whether they are matrices."""
        return len(self.shape) == 2

    @property
    def is_used(self) -> bool:
        """Whether there is a block among them."""
        return any(block is not None for block in self.blocks)


@dataclasses.dataclass(frozen=True)
class Kronecker:
    """Blocks of layers as products of small matrices: M = (A + ε) ⊗ (G + ε').

        A = E[a aᵀ],    G = E[δ δᵀ],    ε = π √λ,    ε' = √λ / π

    a are the inputs of a dense layer or the patches of a convolution, followed by a one
    if there is a bias, δ the cotangents of the outputs for random signs in the space
    where F is a square, and π² = (tr A / dim A) / (tr G / dim G). Weights of examples
    are in G; A counts all examples alike. Layers are found in the program of the
    gradient, whatever library the model is written in. A matrix of no layer (embedding,
    tied or scanned weight) has factors of its gradients γ for such signs,

        L = E[γ γᵀ],    R = E[γᵀ γ],    F ≈ L ⊗ R / tr L,

    and a vector of no layer has an estimate of the diagonal of F.

    The factors are averages over the batches of many steps, so that M knows of more
    examples than the F of this batch. They cost a backward pass and the products a aᵀ
    and δ δᵀ at some steps, and an inverse of each at fewer. As a preconditioner of
    `CG`, one to three steps of CG are enough; `KFAC` is K-FAC itself.

    Attributes:
      decay: weight of the past in the averages, which are plain means until
        1 / (1 - decay) batches are seen.
      refresh_every: steps from one inverse to the next, at most: in the beginning there
        is one after batch 1, 2, 3, 5, 8, 12, each time half as many have come in again,
        and always with a batch that is observed.
      observe_every: steps from one batch in the averages to the next, once there are
        1 / (1 - decay) in them.
      max_size: of longer a, A is their mean's ā āᵀ and their variances, and of longer
        δ, G is its diagonal. A weight of m times n numbers takes 2 (m² + n²) numbers in
        the state, and m or n in place of the square of a long side; with more than two
        axes some more, as it is not known in advance where inputs and outputs part.

    Raises:
      ValueError, TypeError: for numbers out of range.

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

    decay: float = 0.95
    refresh_every: int = 20
    observe_every: int = 5
    max_size: int = 2048

    def __post_init__(self) -> None:
        check_count("refresh_every", self.refresh_every)
        check_count("observe_every", self.observe_every)
        check_count("max_size", self.max_size)
        if not 0 <= self.decay < 1:
            raise ValueError(f"`decay` must be in [0, 1), got {self.decay}.")

    def init(self, params: Params) -> KroneckerState:
        """The state before anything is built, with which M = I."""
        groups = _groups(jax.tree.leaves(params), self.max_size)
        # `optax.tree.map_params` takes what this makes of no parameters for a prefix of
        # every state: a leaf there stands for all that is not shaped like them.
        averages = tuple(map(self._zeros, groups)) if groups else jnp.zeros(())
        inverses = tuple(map(self._identities, groups)) if groups else jnp.zeros(())
        return KroneckerState(
            num_batches=jnp.zeros((), jnp.int32),
            age=jnp.asarray(self.refresh_every, jnp.int32),
            averages=averages,
            inverses=inverses,
        )

    def prepare(
        self, fisher: Any, state: KroneckerState, damping: ArrayLike
    ) -> tuple[MatVec, KroneckerState]:
        """The map v -> M⁻¹ v for this step, and the state; see `Preconditioner`."""
        groups = _groups(jax.tree.leaves(fisher.params), self.max_size)
        if not groups:
            return lambda vector: vector, state
        # The mean of few batches is worth every batch; a long memory changes slowly.
        is_young = state.num_batches < 1 / (1 - self.decay)
        is_observed = is_young | (state.age % self.observe_every == 0)
        num_batches, averages = jax.lax.cond(
            is_observed,
            lambda: self._observe(fisher, state, groups),
            lambda: (state.num_batches, state.averages),
        )
        state = state._replace(num_batches=num_batches, averages=averages)
        damping = jnp.asarray(damping).astype(tree.accumulator_dtype(state.averages))
        weights = _damping_weights(fisher)
        # While the averages are young, half as many batches again change them a lot.
        half = (state.num_batches - state.age + 1) // 2
        is_due = state.age >= jnp.minimum(half, self.refresh_every)
        age, inverses = jax.lax.cond(
            is_due & is_observed & (state.num_batches > 0),
            lambda: _refresh(groups, state, damping, weights),
            lambda: (state.age + 1, state.inverses),
        )
        state = state._replace(age=age, inverses=inverses)
        return _matvec(fisher, groups, state, damping, weights), state

    def __call__(self, fisher: Any, damping: ArrayLike) -> MatVec:
        """The map v -> M⁻¹ v, built for this Fisher and not kept."""
        return self.prepare(fisher, self.init(fisher.params), damping)[0]

    def _zeros(self, group: _Group) -> Any:
        count = len(group.members)
        if not group.is_matrices:
            return jnp.zeros((count, *group.shape), group.real_dtype)

        def side(size: int) -> Any:
            vectors = (count, size + 1)
            if size > self.max_size:
                return _Long(*(jnp.zeros(vectors, group.real_dtype) for _ in range(2)))
            return jnp.zeros((*vectors, size + 1), group.real_dtype)

        return _Pair(*map(side, group.shape))

    def _identities(self, group: _Group) -> Any:
        count, dtype = len(group.members), group.real_dtype

        def side(size: int) -> Any:
            vectors = (count, size + 1)
            if size > self.max_size:
                zeros = jnp.zeros(vectors, dtype)
                return _LongInverse(
                    jnp.ones(vectors, dtype), zeros, jnp.zeros(count, dtype)
                )
            return jnp.tile(jnp.eye(size + 1, dtype=dtype), (count, 1, 1))

        return _Pair(*map(side, group.shape)) if group.is_matrices else ()

    def _observe(
        self, fisher: Any, state: KroneckerState, groups: list[_Group]
    ) -> tuple[Array, PyTree]:
        """Adds this batch to the averages, if what it adds is finite.

        Which block each member of the groups is, is entered in `groups`.
        """
        blocks, factors = _statistics(fisher, state.num_batches, self.max_size)
        # A sum of finite numbers is finite but for what no average should see either.
        sums = map(_sum, jax.tree.leaves(factors))
        dtype = tree.accumulator_dtype(state.averages)
        is_finite = jnp.isfinite(sum(x.astype(dtype) for x in sums))
        count = state.num_batches + 1
        share = jnp.maximum(1 / count.astype(dtype), 1 - self.decay)

        def mix(old: Array, *new: Array | None) -> Array:
            filled = [
                old[k]
                if x is None
                else jnp.pad(x, [(0, len(old[k]) - len(x))] * x.ndim)
                for k, x in enumerate(new)
            ]
            change = jnp.stack(filled).astype(old.dtype) - old
            return jnp.where(is_finite, old + share.astype(old.dtype) * change, old)

        # What no batch has a factor for stays as it is.
        found = {
            (block.weight, block.split): (block, factor)
            for block, factor in zip(blocks, factors, strict=True)
        }
        averages = []
        for place, (group, old) in enumerate(zip(groups, state.averages, strict=True)):
            new = [found.get(member, (None, None)) for member in group.members]
            groups[place] = group._replace(blocks=tuple(block for block, _ in new))
            if groups[place].is_used:
                none = jax.tree.map(lambda _: None, old)
                filled = [none if factor is None else factor for _, factor in new]
                old = jax.tree.map(mix, old, *filled)
            averages.append(old)
        return jnp.where(is_finite, count, state.num_batches), tuple(averages)


def claims(fisher: Any, *, max_size: int = 2048) -> list[str]:
    """What every leaf of the parameters is taken for, in words.

    Args:
      fisher: of the model, at any parameters.
      max_size: as of `Kronecker`.

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
    blocks: list[_Block] = []

    def trace() -> Array:
        blocks[:] = _statistics(fisher, jnp.zeros((), jnp.int32), max_size)[0]
        return jnp.zeros(())

    jax.eval_shape(trace)
    leaves = jax.tree.leaves_with_path(fisher.params)
    paths = [jax.tree_util.keystr(path) for path, _ in leaves]
    shapes = [jnp.shape(leaf) for _, leaf in leaves]
    words = ["diagonal"] * len(paths)
    for block in blocks:
        layer = block.layer
        if block.split is None:
            continue
        if layer is None:
            rows, columns = _sides(shapes[block.weight], block.split)
            words[block.weight] = f"factors from gradients {rows} × {columns}"
            continue
        kind = "convolution patch" if layer.is_convolution else "dense"
        text = f"{kind} {layer.num_inputs} → {layer.num_outputs}"
        if layer.bias is not None:
            text += f" with bias {paths[layer.bias]}"
            words[layer.bias] = f"bias of {paths[layer.weight]}"
        words[layer.weight] = text
    return words


# --- Statistics of one batch


def _splits(leaf: ArrayLike, max_size: int) -> list[int]:
    """The axes where the shape of a matrix may part; none for what has a diagonal.

    A matrix of two axes has one. The inputs and outputs of a kernel of more part after
    the first axis or before the last, and which it is only the program of the model can
    tell. The split that is the more square always has room in the state, the other one
    where it does not take more than a few times the numbers of the weight itself.
    """
    shape = jnp.shape(leaf)
    if jnp.iscomplexobj(leaf) or len(shape) < 2 or 0 in shape:
        return []
    candidates = sorted({1, len(shape) - 1})
    best = min(candidates, key=lambda k: sum(n**2 for n in _sides(shape, k)))

    def numbers(split: int) -> int:
        sides = _sides(shape, split)
        return sum(n if n > max_size else n**2 for n in sides)

    limit = max(_SPARE_NUMBERS, 4 * math.prod(shape))
    return [k for k in candidates if k == best or numbers(k) <= limit]


def _sides(shape: tuple[int, ...], split: int) -> tuple[int, int]:
    return math.prod(shape[:split]), math.prod(shape[split:])


def _groups(leaves: list[Any], max_size: int) -> list[_Group]:
    """The groups of all leaves with entries, a function of their shapes alone."""
    members: dict[tuple, list[tuple[int, int | None]]] = {}
    for place, leaf in enumerate(leaves):
        shape, dtype = jnp.shape(leaf), tree.wide_dtype(leaf)
        for split in _splits(leaf, max_size):
            key = (_sides(shape, split), dtype)
            members.setdefault(key, []).append((place, split))
        if not _splits(leaf, max_size) and 0 not in shape:
            key = ((math.prod(shape),), dtype)
            members.setdefault(key, []).append((place, None))
    return [
        _Group(shape, dtype, tuple(found), (None,) * len(found))
        for (shape, dtype), found in members.items()
    ]


def _blocks(layers: list[Layer], params: Params, max_size: int) -> list[_Block]:
    """One for every leaf that is not the bias of another one, in order."""
    leaves = jax.tree.leaves(params)
    splits = [_splits(leaf, max_size) for leaf in leaves]
    # A layer for whose split there is no room is none: it has factors of gradients.
    fitting = {one.weight: one for one in layers if one.split in splits[one.weight]}
    biases = {layer.bias for layer in fitting.values()}
    blocks = []
    for place, own in enumerate(splits):
        if place in biases or 0 in jnp.shape(leaves[place]):
            continue
        layer = fitting.get(place)
        split = layer.split if layer is not None else own[-1] if own else None
        blocks.append(_Block(place, split, layer))
    return blocks


def _statistics(
    fisher: Any, count: Array, max_size: int
) -> tuple[list[_Block], list[Any]]:
    """The blocks; and of each its factors, or squares, on this batch.

    With scales, of the parameters before they were scaled.
    """
    at = fisher if fisher.scales is None else fisher.base
    like = jax.eval_shape(at.metric.sqrt_matvec, at.outputs)
    cotangents = at.sqrt_cotangents(_random_signs(count, like))
    leaves = jax.tree.leaves(at.params)
    blocks: list[_Block] = []

    def on_part(data: PyTree) -> Any:
        batch, cotangents = data
        pull = at.pullback
        if at.chunks is not None:
            pull = linearize(at.model_fn, at.params, batch).pull
        layers, values, gradients = backward_pass(
            pull, cotangents, at.params, keep_terms=True
        )
        blocks[:] = _blocks(layers, at.params, max_size)
        by_weight = dict(zip((one.weight for one in layers), values, strict=True))
        gradients = jax.tree.leaves(gradients)
        num_examples = max(
            (len(x) for x in jax.tree.leaves(cotangents) if x.ndim), default=1
        )

        def sums(block: _Block) -> tuple:
            if block.layer is not None:
                has_bias = block.bias is not None
                return _layer_sums(by_weight[block.weight], has_bias, max_size)
            gradient = jnp.asarray(gradients[block.weight])
            shape = jnp.shape(leaves[block.weight])
            samples = _samples(gradient, shape, num_examples)
            if block.split is None:
                return (jnp.sum(_mean_square(samples), 0).reshape(-1),)
            return _gradient_sums(samples, block.split, max_size)

        return [sums(block) for block in blocks]

    sums = sum_microbatches(on_part, (at.batch, cotangents), at.chunks)
    return blocks, [
        _factors(block, one) for block, one in zip(blocks, sums, strict=True)
    ]


def _samples(gradient: Array, shape: tuple[int, ...], num_examples: int) -> Array:
    """A gradient by examples, `[N, *shape]`, where it has such terms; else `[1, ...]`.

    The terms of an example's places are not independent of each other, and add up.
    """
    if gradient.ndim == len(shape):
        return gradient[None]
    if len(gradient) % num_examples:
        return jnp.sum(gradient, 0, keepdims=True)
    return jnp.sum(gradient.reshape(num_examples, -1, *shape), 1)


def _layer_sums(values: LayerValues, has_bias: bool, max_size: int) -> tuple:
    """Σ a aᵀ and Σ δ δᵀ, a with a one for a bias; and the number of terms."""
    a, delta = values
    number = jnp.asarray(len(a), a.dtype)
    if has_bias:
        inputs = _gram(jnp.pad(a, ((0, 0), (0, 1)), constant_values=1), max_size + 1)
    else:
        inputs = _gram(a, max_size)
    outputs = _gram(delta, max_size)
    if isinstance(outputs, _Long):
        outputs = outputs._replace(mean=jnp.zeros_like(outputs.mean))
    return inputs, outputs, number


def _gradient_sums(samples: Array, split: int, max_size: int) -> tuple:
    """Σ γ γᵀ and Σ γᵀ γ of samples `[N, *shape]`."""
    rows, columns = _sides(samples.shape[1:], split)
    matrices = samples.reshape(-1, rows, columns)
    sums = []
    for axis, size in ((1, rows), (2, columns)):
        square = _gram(jnp.moveaxis(matrices, axis, -1).reshape(-1, size), max_size)
        if isinstance(square, _Long):
            square = square._replace(mean=jnp.zeros_like(square.mean))
        elif samples.size == size:
            # A single vector tells the squares of its entries, and nothing beside.
            square *= jnp.eye(size, dtype=square.dtype)
        sums.append(square)
    return tuple(sums)


def _factors(block: _Block, sums: tuple) -> Any:
    """Means over the batch: of rows and of columns, or of squares."""
    if block.split is None:
        return sums[0]
    if block.layer is None:
        return _Pair(*sums)
    inputs, outputs, number = sums
    inputs = jax.tree.map(lambda x: x / number, inputs)
    return _Pair(outputs, inputs) if block.is_turned else _Pair(inputs, outputs)


def _gram(rows: Array, max_size: int) -> Any:
    """Σ row rowᵀ; of long rows Σ row² and Σ row."""
    if rows.shape[1] > max_size:
        return _Long(jnp.sum(rows**2, 0), jnp.sum(rows, 0))
    return tree.contract(rows, rows, (0,), (0,))


def _sum(values: Array) -> Array:
    """The sum of all entries, as products: much less to compile than a reduction."""
    for _ in range(values.ndim):
        values = jnp.ones(len(values), values.dtype) @ values
    return values


def _mean_square(leaf: Array) -> Array:
    """Squares; of complex numbers the mean of both parts, since one serves for both."""
    leaf = leaf.astype(tree.wide_dtype(leaf))
    if jnp.iscomplexobj(leaf):
        return (jnp.real(leaf) ** 2 + jnp.imag(leaf) ** 2) / 2
    return leaf**2


def _random_signs(count: Array, like: PyTree) -> PyTree:
    """±1 by a hash of the place and of the batch's number.

    Any signs that are independent of the data and of each other do, and this takes one
    kernel, where a generator of random numbers takes many. The hash is the finalizer of
    MurmurHash3, of which every input bit changes every output bit in half of all cases.
    """

    def mixed(bits: Array) -> Array:
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            bits = (bits ^ (bits >> shift)) * np.uint32(factor)
        return bits ^ (bits >> 16)

    seed, start = mixed(count.astype(jnp.uint32) + np.uint32(1)), 0
    leaves, structure = jax.tree.flatten(like)
    signs = []
    for leaf in leaves:
        parts = 2 if jnp.issubdtype(leaf.dtype, jnp.complexfloating) else 1
        size = parts * math.prod(leaf.shape)
        places = jnp.arange(start, start + size, dtype=jnp.uint32)
        bits = mixed(mixed(places) + seed) & 1
        real = 1 - 2 * bits.astype(jnp.finfo(leaf.dtype).dtype)
        real = real.reshape(parts, *leaf.shape)
        signs.append(jax.lax.complex(*real) if parts == 2 else real[0])
        start += size
    return jax.tree.unflatten(structure, signs)


# --- The inverse


def _damping_weights(fisher: Any) -> list[ArrayLike]:
    """S⁻² of every leaf: in coordinates θ = S φ, M_φ + λ I = S (M + λ S⁻²) S."""
    if fisher.scales is None:
        return [1.0] * len(jax.tree.leaves(fisher.params))
    return [1 / scale**2 for scale in jax.tree.leaves(tree.widen(fisher.scales))]


def _refresh(
    groups: list[_Group],
    state: KroneckerState,
    damping: Scalar,
    weights: list[ArrayLike],
) -> tuple[Array, PyTree]:
    """Age 1 and new inverses; the old ones, still due, where these are not finite."""
    inverses, witnesses = list(state.inverses), []
    for place, group in enumerate(groups):
        if group.is_matrices and group.is_used:
            sides, shifts = _damped(group, state.averages[place], damping, weights)
            inverses[place] = _Pair(*map(_inverse, sides, shifts))
            # No entry of an inverse is above 1 / ε, and a Cholesky factorisation that
            # breaks down leaves not a single number: one entry tells of all.
            witnesses += [1 / shift for shift in shifts]
            witnesses += [
                side.diagonal if isinstance(side, _LongInverse) else side[:, 0, 0]
                for side in inverses[place]
            ]
    sums = [jnp.sum(x).astype(damping.dtype) for x in witnesses]
    is_finite = jnp.isfinite(sum(sums, jnp.zeros_like(damping)))
    age = jnp.where(is_finite, 1, state.age)
    return age, tree.select(is_finite, tuple(inverses), state.inverses)


def _damped(
    group: _Group, averages: _Pair, damping: Scalar, weights: list[ArrayLike]
) -> tuple[_Pair, _Pair]:
    """The factors of both sides, and ε of each."""
    rows, columns = averages
    row_trace, column_trace = _trace(rows), _trace(columns)
    of_gradients = [b is not None and b.layer is None for b in group.blocks]
    if any(of_gradients):  # L ⊗ R / tr L
        divides = np.array(of_gradients) & (row_trace > 0)
        factor = 1 / jnp.where(divides, row_trace, 1)
        columns = jax.tree.map(functools.partial(_times, factor), columns)
        column_trace *= factor
    row_size = row_trace / _lengths(group, is_turned=False)
    column_size = column_trace / _lengths(group, is_turned=True)
    is_usable = (row_size > 0) & (column_size > 0)
    ratio = jnp.where(is_usable, row_size / jnp.where(is_usable, column_size, 1), 1)
    balance = jnp.sqrt(ratio)
    root = jnp.sqrt(damping * _mean_weights(group, weights)).astype(balance.dtype)
    tiny = jnp.finfo(balance.dtype).eps
    shifts = root * balance + tiny * row_trace, root / balance + tiny * column_trace
    return _Pair(rows, columns), _Pair(*(jnp.where(x > 0, x, 1) for x in shifts))


def _lengths(group: _Group, *, is_turned: bool) -> np.ndarray:
    """The number of rows of every block, or of columns; with a bias, if it has one."""
    has_bias = [
        block is not None and block.bias is not None and block.is_turned == is_turned
        for block in group.blocks
    ]
    return group.shape[is_turned] + np.array(has_bias)


def _mean_weights(group: _Group, weights: list[ArrayLike]) -> Array:
    """One number for all of a block, so that it stays a product."""

    def mean(block: _Block | None) -> ArrayLike:
        if block is None:
            return 1.0
        own = [weights[x] for x in (block.weight, block.bias) if x is not None]
        return sum(map(jnp.sum, own)) / sum(map(jnp.size, own))

    return jnp.stack([jnp.asarray(mean(block)) for block in group.blocks])


def _times(factors: Array, values: Array) -> Array:
    """Every entry along the first axis times a number of its own."""
    return values * factors.reshape(-1, *(1,) * (values.ndim - 1))


def _trace(side: Any) -> Array:
    """The trace of each."""
    if isinstance(side, _Long):
        return jnp.sum(side.square, 1)
    # As a product: `jnp.trace` is a gather and a reduction.
    identity = jnp.eye(side.shape[-1], dtype=side.dtype)
    return tree.contract(side, identity, (1, 2), (0, 1))


def _inverse(side: Any, shift: Array) -> Any:
    """(A + ε)⁻¹ of each."""
    if isinstance(side, _Long):
        square, mean = side
        diagonal = 1 / (jnp.maximum(square - mean**2, 0) + shift[:, None])
        scaled = diagonal * mean
        downdate = 1 + jnp.sum(mean * scaled, 1)
        return _LongInverse(diagonal, scaled / downdate[:, None], downdate)
    if len(side) == 1:
        return _inverse_of_one(side[0], shift[0])[None]
    # One after the other: one program for all, and no batched LAPACK, which hung.
    return jax.lax.map(lambda one: _inverse_of_one(*one), (side, shift))


def _inverse_of_one(square: Array, shift: Array) -> Array:
    identity = jnp.eye(len(square), dtype=square.dtype)
    # LAPACK goes along columns: the transpose of what is symmetric spares a copy.
    damped = (square + shift * identity).T
    root = jax.lax.linalg.cholesky(damped, symmetrize_input=False)
    half = jax.lax.linalg.triangular_solve(root, identity, left_side=True, lower=True)
    return _matmul(half.T, half)


def _multiply(inverse: Any, values: Array) -> Array:
    """Inverses times the columns of matrices, `[K, n, n]` times `[K, n, m]`."""
    if not isinstance(inverse, _LongInverse):
        return _matmul(inverse, values)
    solved = inverse.solved[:, :, None]
    along = jnp.sum(solved * values, axis=1, keepdims=True)
    along *= inverse.downdate[:, None, None]
    return inverse.diagonal[:, :, None] * values - solved * along


def _matvec(
    fisher: Any,
    groups: list[_Group],
    state: KroneckerState,
    damping: Scalar,
    weights: list[ArrayLike],
) -> MatVec:
    scales = None if fisher.scales is None else tree.widen(fisher.scales)
    is_seen, diagonals = state.num_batches > 0, {}
    for place, group in enumerate(groups):
        if group.is_used and not group.is_matrices:
            diagonal = _diagonals(group, state.averages[place], damping, weights)
            diagonals[place] = jnp.where(is_seen, diagonal, 1)

    def matvec(vector: PyTree) -> PyTree:
        vector = tree.widen(vector)
        if scales is not None:
            vector = jax.tree.map(jnp.divide, vector, scales)
        leaves, structure = jax.tree.flatten(vector)
        results = list(leaves)
        for place, group in enumerate(groups):
            if not group.is_used:
                continue
            if group.is_matrices:
                rows, columns = state.inverses[place]
                image = _multiply(rows, _bordered(group, leaves))
                image = _multiply(columns, image.mT).mT
            else:
                own = [leaves[b.weight].reshape(-1) for b in group.blocks if b]
                image = jnp.stack(own) / diagonals[place]
            _spread(group, image, results)
        image = jax.tree.unflatten(structure, results)
        if scales is not None:
            image = jax.tree.map(jnp.divide, image, scales)
        return image

    return matvec


def _bordered(group: _Group, leaves: list[Array]) -> Array:
    """`[K, rows + 1, columns + 1]`: matrices, with a bias beside its inputs."""

    def one(block: _Block | None) -> Array:
        if block is None:
            return jnp.zeros([size + 1 for size in group.shape], group.dtype)
        matrix = leaves[block.weight].reshape(group.shape)
        if block.bias is None:
            return jnp.pad(matrix, ((0, 1), (0, 1)))
        bias = leaves[block.bias].reshape(-1)
        if block.is_turned:
            return jnp.pad(jnp.column_stack([matrix, bias]), ((0, 1), (0, 0)))
        return jnp.pad(jnp.vstack([matrix, bias]), ((0, 0), (0, 1)))

    return jnp.stack([one(block) for block in group.blocks])


def _spread(group: _Group, image: Array, results: list[Array]) -> None:
    """Inverse of `_bordered`, and of a stack of vectors, into the places of leaves."""
    own = [block for block in group.blocks if block is not None or group.is_matrices]
    for block, value in zip(own, image, strict=True):
        if block is None:
            continue
        shape = results[block.weight].shape
        if not group.is_matrices:
            results[block.weight] = value.reshape(shape)
            continue
        results[block.weight] = value[:-1, :-1].reshape(shape)
        if block.bias is not None:
            bias = value[:-1, -1] if block.is_turned else value[-1, :-1]
            results[block.bias] = bias.reshape(results[block.bias].shape)


def _diagonals(
    group: _Group, averages: Array, damping: Scalar, weights: list[ArrayLike]
) -> Array:
    """The diagonal of F + λI, positive, whatever single samples say."""
    own = [(k, block) for k, block in enumerate(group.blocks) if block is not None]
    diagonal = jnp.stack([averages[k] for k, _ in own])
    weight = jnp.stack([jnp.ravel(weights[block.weight]) for _, block in own])
    mean = jnp.mean(diagonal, 1, keepdims=True)
    damped = jnp.maximum(diagonal, _SMALLEST_SHARE * mean)
    damped += (damping * weight).astype(diagonal.dtype)
    return jnp.where(damped > 0, damped, 1)


@dataclasses.dataclass(frozen=True)
class KFAC(Solver):
    """K-FAC: one step along M⁻¹ g, of exact length in F.

        z = M⁻¹ g,    d = α z,    α = gᵀ z / zᵀ (F + λI) z

    M as of `Kronecker`. `exact_length` costs one `jvp` of the model; without it
    d = M⁻¹ g costs none, for step sizes that come from elsewhere: a rate, a radius, or
    `contrib.QuadraticModelRate`, which minimises over every multiple of d itself.

    The residual is not computed, as that would take the other half of a product with F:
    `relative_residual` is infinity and the status UNCHECKED. Where it is of interest,
    `CG(max_steps=1, rtol=0, preconditioner=Kronecker())` takes the same step.

    Attributes:
      decay, refresh_every, observe_every, max_size: as of `Kronecker`.
      exact_length: whether α minimises ½ dᵀ (F + λI) d - gᵀ d, or is 1.

    Raises:
      ValueError, TypeError: for numbers out of range.

    Example:
      >>> import jax.numpy as jnp, ngd_jax as ngd
      >>> x = jnp.array([[1.0, 0.0], [0.0, 3.0]])
      >>> fisher = ngd.linearize_fisher(
      ...     lambda w, x: x @ w, jnp.ones((2, 1)), x, ngd.Gaussian()
      ... )
      >>> d, info = KFAC()(fisher, jnp.array([[1.0], [9.0]]), damping=0.0)
      >>> d.ravel().round(3)  # F = diag(1/2, 9/2)
      Array([2., 2.], dtype=float32)

    References:
      Martens and Grosse, Optimizing neural networks with Kronecker-factored approximate
      curvature, 2015, section 6.4.
    """

    decay: float = 0.95
    refresh_every: int = 20
    observe_every: int = 5
    max_size: int = 2048
    exact_length: bool = True

    def __post_init__(self) -> None:
        self._kronecker()  # raises

    def _kronecker(self) -> Kronecker:
        return Kronecker(
            self.decay, self.refresh_every, self.observe_every, self.max_size
        )

    def init(self, params: Params) -> KroneckerState:
        """The state before the first solve."""
        return self._kronecker().init(params)

    def solve(
        self, fisher: Any, rhs: RightHandSide, *, damping: ArrayLike, state: PyTree = ()
    ) -> Solution:
        """One step along M⁻¹ g, from the best multiple of a guess; see `Solver`."""
        kronecker = self._kronecker()
        if not isinstance(state, KroneckerState):
            precondition = kronecker(fisher, damping)
        else:
            precondition, state = kronecker.prepare(fisher, state, damping)
        residual, start, pushed = rhs.gradient, None, None
        if rhs.guess is not None:
            product, pushed = fisher.matvec_and_push(rhs.guess)
            product = tree.axpy(damping, rhs.guess, product)
            square = tree.vdot(rhs.guess, product)
            safe = jnp.where(square > 0, square, 1)
            share = jnp.where(square > 0, tree.vdot(residual, rhs.guess) / safe, 0)
            start, pushed = tree.scale(share, rhs.guess), tree.scale(share, pushed)
            residual = tree.axpy(-share, product, residual)

        direction, is_usable = precondition(residual), jnp.asarray(True)
        if self.exact_length:
            # In units of its largest entry: its square could over- or underflow.
            direction, _, _ = tree.in_units(direction)
            along = fisher.pushforward(direction)
            curvature = fisher.inner(along, along)
            curvature += damping * tree.vdot(direction, direction)
            slope = tree.vdot(residual, direction)
            # NaN and infinity pass, and are reported by `solve_scaled`.
            is_usable = ~((curvature <= 0) | (slope <= 0))
            length = jnp.where(is_usable, slope / curvature, 0)
            direction, along = tree.scale(length, (direction, along))
            pushed = along if pushed is None else tree.axpy(1.0, along, pushed)
        else:
            pushed = None
        if start is not None:
            direction = tree.axpy(1.0, direction, start)
        status = jnp.where(is_usable, SolverStatus.UNCHECKED, SolverStatus.BREAKDOWN)
        is_zero = ~is_usable & (rhs.guess is None)
        info = SolverInfo(
            num_steps=is_usable.astype(jnp.int32),
            relative_residual=jnp.where(is_zero, 1.0, jnp.inf),
            status=status,
        )
        return Solution(direction, pushed, info, state)
