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


class _Factor(NamedTuple):
    """An average of x xᵀ, of a long side its diagonal, and of x."""

    square: Array
    mean: Array


class _Inverse(NamedTuple):
    """(A + ε)⁻¹ for one side of a matrix, and what a bias needs of it.

    Attributes:
      matrix: the inverse; of a long side, where it is diag(d) - c s sᵀ, only d.
      solved_mean: s = (A + ε)⁻¹ ā.
      downdate: c.
      rest: 1 + ε - āᵀ s, the Schur complement of the bias.
    """

    matrix: Array
    solved_mean: Array
    downdate: Array
    rest: Array


class _Pair(NamedTuple):
    """A factor, or its inverse, for the rows and for the columns of a matrix."""

    rows: Any
    columns: Any


class KroneckerState(NamedTuple):
    """What `Kronecker` keeps.

    Attributes:
      num_batches: int32, that the averages have seen.
      age: int32, steps that the inverses have served, this one included.
      averages: of every leaf of the parameters: for a vector an estimate of the
        diagonal of F; for a matrix, by the axis where it may be split into rows and
        columns, the factors of both sides.
      inverses: of every leaf likewise the inverses of the damped factors.
    """

    num_batches: Array
    age: Array
    averages: PyTree
    inverses: PyTree


class _Block(NamedTuple):
    """A block of M; static.

    Attributes:
      weight: the place of the matrix among the leaves.
      place: which of the splits of the matrix in the state is used.
      split: the axis where rows and columns part.
      layer: the layer that it belongs to; None for factors of gradients.
    """

    weight: int
    place: int
    split: int
    layer: Layer | None

    @property
    def bias(self) -> int | None:
        """The place of the bias that shares the block."""
        return None if self.layer is None else self.layer.bias

    @property
    def is_turned(self) -> bool:
        """Whether the rows are outputs, and the columns inputs."""
        return self.layer is not None and not self.layer.inputs_first

    def oriented(self, pair: _Pair) -> _Pair:
        """From rows and columns to inputs and outputs; and back."""
        return _Pair(pair.columns, pair.rows) if self.is_turned else pair

    def matrix(self, values: Array) -> Array:
        """From rows × columns to inputs × outputs; and back."""
        return values.T if self.is_turned else values


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
    and δ δᵀ at every step, and an inverse of each at some steps. As a preconditioner of
    `CG`, one to three steps of CG are enough; `KFAC` is K-FAC itself.

    Attributes:
      decay: weight of the past in the averages, which are plain means until
        1 / (1 - decay) batches are seen.
      refresh_every: steps from one inverse to the next, at most: in the beginning there
        is one after batch 1, 2, 3, 5, 8, 12, each time half as many have come in again.
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
    refresh_every: int = 5
    max_size: int = 2048

    def __post_init__(self) -> None:
        check_count("refresh_every", self.refresh_every)
        check_count("max_size", self.max_size)
        if not 0 <= self.decay < 1:
            raise ValueError(f"`decay` must be in [0, 1), got {self.decay}.")

    def init(self, params: Params) -> KroneckerState:
        """The state before anything is built, with which M = I."""
        leaves = jax.tree.leaves(params)
        # `optax.tree.map_params` takes what this makes of no parameters for a prefix of
        # every state: a leaf there stands for all that is not shaped like them.
        averages = tuple(map(self._zero, leaves)) if leaves else jnp.zeros(())
        inverses = tuple(map(self._identity, leaves)) if leaves else jnp.zeros(())
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
        if not jax.tree.leaves(fisher.params):
            return lambda vector: vector, state
        blocks, state = self._observe(fisher, state)
        damping = jnp.asarray(damping).astype(tree.accumulator_dtype(state.averages))
        weights = _damping_weights(fisher)
        # While the averages are young, half as many batches again change them a lot.
        half = (state.num_batches - state.age + 1) // 2
        state = jax.lax.cond(
            (state.age >= jnp.minimum(half, self.refresh_every))
            & (state.num_batches > 0),
            lambda state: _refresh(blocks, state, damping, weights),
            lambda state: state._replace(age=state.age + 1),
            state,
        )
        return _matvec(fisher, blocks, state, damping, weights), state

    def __call__(self, fisher: Any, damping: ArrayLike) -> MatVec:
        """The map v -> M⁻¹ v, built for this Fisher and not kept."""
        return self.prepare(fisher, self.init(fisher.params), damping)[0]

    def _zero(self, leaf: ArrayLike) -> Any:
        dtype, splits = tree.real_dtype(leaf), _splits(leaf, self.max_size)

        def side(size: int) -> _Factor:
            shape = (size,) if size > self.max_size else (size, size)
            return _Factor(jnp.zeros(shape, dtype), jnp.zeros(size, dtype))

        if not splits:
            return jnp.zeros(jnp.shape(leaf), dtype)
        return tuple(_Pair(*map(side, _sides(jnp.shape(leaf), k))) for k in splits)

    def _identity(self, leaf: ArrayLike) -> Any:
        dtype = tree.real_dtype(leaf)

        def side(size: int) -> _Inverse:
            is_long = size > self.max_size
            matrix = jnp.ones(size, dtype) if is_long else jnp.eye(size, dtype=dtype)
            zero, one = jnp.zeros((), dtype), jnp.ones((), dtype)
            return _Inverse(matrix, jnp.zeros(size, dtype), zero, one)

        splits = _splits(leaf, self.max_size)
        return tuple(_Pair(*map(side, _sides(jnp.shape(leaf), k))) for k in splits)

    def _observe(
        self, fisher: Any, state: KroneckerState
    ) -> tuple[list[_Block], KroneckerState]:
        """Adds this batch to the averages, if what it adds is finite."""
        blocks, (factors, squares) = _statistics(
            fisher, state.num_batches, self.max_size
        )
        dtype = tree.accumulator_dtype(state.averages)
        # A matrix of products is finite where its diagonal is, and a mean where the
        # mean of squares is: one sum tells whether all of this is.
        sums = [_trace(side.square) for pair in factors for side in pair]
        sums += [jnp.sum(square) for square in squares.values()]
        is_finite = jnp.isfinite(sum(x.astype(dtype) for x in sums))
        count = state.num_batches + 1
        share = jnp.maximum(1 / count.astype(dtype), 1 - self.decay)

        def mix(old: Array, new: Array) -> Array:
            mixed = old + share.astype(old.dtype) * (new.astype(old.dtype) - old)
            return jnp.where(is_finite, mixed, old)

        averages = list(state.averages)
        for block, pair in zip(blocks, factors, strict=True):
            pairs = list(averages[block.weight])
            pairs[block.place] = jax.tree.map(mix, pairs[block.place], pair)
            averages[block.weight] = tuple(pairs)
        for place, square in squares.items():
            averages[place] = mix(averages[place], square)
        return blocks, state._replace(
            num_batches=jnp.where(is_finite, count, state.num_batches),
            averages=tuple(averages),
        )


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
        blocks[:], _ = _statistics(fisher, jnp.zeros((), jnp.int32), max_size)
        return jnp.zeros(())

    jax.eval_shape(trace)
    leaves = jax.tree.leaves_with_path(fisher.params)
    paths = [jax.tree_util.keystr(path) for path, _ in leaves]
    shapes = [jnp.shape(leaf) for _, leaf in leaves]
    words = ["diagonal"] * len(paths)
    for block in blocks:
        layer = block.layer
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


def _blocks(layers: list[Layer], params: Params, max_size: int) -> list[_Block]:
    """One for every matrix that is not the bias of another one, in order."""
    leaves = jax.tree.leaves(params)
    splits = [_splits(leaf, max_size) for leaf in leaves]
    # A layer for whose split there is no room is none: it has factors of gradients.
    fitting = {one.weight: one for one in layers if one.split in splits[one.weight]}
    biases = {layer.bias for layer in fitting.values()}
    blocks = []
    for place, own in enumerate(splits):
        if own and place not in biases:
            layer = fitting.get(place)
            split = own[-1] if layer is None else layer.split
            blocks.append(_Block(place, own.index(split), split, layer))
    return blocks


def _statistics(
    fisher: Any, count: Array, max_size: int
) -> tuple[list[_Block], tuple[list[_Pair], dict[int, Array]]]:
    """The blocks; of each its factors on this batch; and squares of the other leaves.

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
        by_weight = {
            layer.weight: value for layer, value in zip(layers, values, strict=True)
        }
        num_examples = max(
            (len(x) for x in jax.tree.leaves(cotangents) if x.ndim), default=1
        )
        samples = [
            _samples(jnp.asarray(gradient), jnp.shape(leaf), num_examples)
            for gradient, leaf in zip(jax.tree.leaves(gradients), leaves, strict=True)
        ]
        sums = [
            _layer_sums(by_weight[block.weight], max_size)
            if block.layer is not None
            else _gradient_sums(samples[block.weight], block.split, max_size)
            for block in blocks
        ]
        places = {x for block in blocks for x in (block.weight, block.bias)}
        squares = {
            place: jnp.sum(_mean_square(sample), 0)
            for place, sample in enumerate(samples)
            if place not in places
        }
        return sums, squares

    sums, squares = sum_microbatches(on_part, (at.batch, cotangents), at.chunks)
    factors = [_factors(block, one) for block, one in zip(blocks, sums, strict=True)]
    return blocks, (factors, squares)


def _samples(gradient: Array, shape: tuple[int, ...], num_examples: int) -> Array:
    """A gradient by examples, `[N, *shape]`, where it has such terms; else `[1, ...]`.

    The terms of an example's places are not independent of each other, and add up.
    """
    if gradient.ndim == len(shape):
        return gradient[None]
    if len(gradient) % num_examples:
        return jnp.sum(gradient, 0, keepdims=True)
    return jnp.sum(gradient.reshape(num_examples, -1, *shape), 1)


def _layer_sums(values: LayerValues, max_size: int) -> tuple:
    a, delta = values
    number = jnp.asarray(len(a), a.dtype)
    return _gram(a, max_size), jnp.sum(a, 0), _gram(delta, max_size), number


def _gradient_sums(samples: Array, split: int, max_size: int) -> tuple:
    """Σ γ γᵀ and Σ γᵀ γ of samples `[N, *shape]`."""
    rows, columns = _sides(samples.shape[1:], split)
    matrices = samples.reshape(-1, rows, columns)
    sums = []
    for axis, size in ((1, rows), (2, columns)):
        square = _gram(jnp.moveaxis(matrices, axis, -1).reshape(-1, size), max_size)
        if samples.size == size and square.ndim == 2:
            # A single vector tells the squares of its entries, and nothing beside.
            square *= jnp.eye(size, dtype=square.dtype)
        sums.append(square)
    return tuple(sums)


def _factors(block: _Block, sums: tuple) -> _Pair:
    """Means over the batch."""
    if block.layer is None:
        left, right = sums
        return _Pair(
            _Factor(left, jnp.zeros(len(left), left.dtype)),
            _Factor(right, jnp.zeros(len(right), right.dtype)),
        )
    inputs, mean, outputs, number = sums
    mean = mean / number
    if block.bias is None and inputs.ndim == 2:  # of no use
        mean = jnp.zeros_like(mean)
    pair = _Pair(
        _Factor(inputs / number, mean),
        _Factor(outputs, jnp.zeros(len(outputs), outputs.dtype)),
    )
    return _Pair(*block.oriented(pair))


def _gram(rows: Array, max_size: int) -> Array:
    """Σ row rowᵀ, or its diagonal."""
    if rows.shape[1] > max_size:
        return jnp.sum(rows**2, 0)
    return tree.contract(rows, rows, (0,), (0,))


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


def _mean_weight(block: _Block, weights: list[ArrayLike]) -> ArrayLike:
    """One number for all of a block, so that it stays a product."""
    own = [weights[block.weight]]
    own += [] if block.bias is None else [weights[block.bias]]
    return sum(map(jnp.sum, own)) / sum(map(jnp.size, own))


def _refresh(
    blocks: list[_Block],
    state: KroneckerState,
    damping: Scalar,
    weights: list[ArrayLike],
) -> KroneckerState:
    """New inverses; the old ones, still due, where these are not finite."""
    new = [
        _inverted(
            block,
            state.averages[block.weight][block.place],
            damping * _mean_weight(block, weights),
        )
        for block in blocks
    ]
    # A positive matrix is finite where its diagonal is.
    sums = [_trace(side.matrix).astype(damping.dtype) for pair in new for side in pair]
    is_finite = jnp.isfinite(sum(sums, jnp.zeros_like(damping)))
    inverses = list(state.inverses)
    for block, pair in zip(blocks, new, strict=True):
        pairs = list(inverses[block.weight])
        pairs[block.place] = tree.select(is_finite, pair, pairs[block.place])
        inverses[block.weight] = tuple(pairs)
    return state._replace(
        age=jnp.where(is_finite, 1, state.age), inverses=tuple(inverses)
    )


def _inverted(block: _Block, pair: _Pair, damping: Scalar) -> _Pair:
    inputs, outputs = block.oriented(pair)
    has_bias = block.bias is not None
    m, n = len(inputs.mean) + has_bias, len(outputs.mean)
    input_trace = _trace(inputs.square) + has_bias
    if block.layer is None:  # L ⊗ R / tr L
        divisor = jnp.where(input_trace > 0, input_trace, 1)
        outputs = outputs._replace(square=outputs.square / divisor)
    input_size, output_size = input_trace / m, _trace(outputs.square) / n
    is_usable = (input_size > 0) & (output_size > 0)
    ratio = jnp.where(is_usable, input_size / jnp.where(is_usable, output_size, 1), 1)
    root, balance = jnp.sqrt(damping).astype(ratio.dtype), jnp.sqrt(ratio)
    tiny = jnp.finfo(ratio.dtype).eps

    def shift(value: Array, floor: Array) -> Array:
        total = value + tiny * floor
        return jnp.where(total > 0, total, 1)

    sides = (
        _inverse(inputs, shift(root * balance, m * input_size)),
        _inverse(outputs, shift(root / balance, n * output_size)),
    )
    return _Pair(*block.oriented(_Pair(*sides)))


def _inverse(factor: _Factor, shift: Scalar) -> _Inverse:
    square, mean = factor
    if square.ndim == 1:
        # (diag(v) + ā āᵀ)⁻¹ = diag(d) - c s sᵀ, s = d ā / c, c = 1 + āᵀ (d ā).
        diagonal = 1 / (jnp.maximum(square - mean**2, 0) + shift)
        scaled = diagonal * mean
        downdate = 1 + jnp.vdot(mean, scaled)
        return _Inverse(diagonal, scaled / downdate, downdate, shift + 1 / downdate)
    identity = jnp.eye(len(square), dtype=square.dtype)
    root = jax.lax.linalg.cholesky(square + shift * identity, symmetrize_input=False)
    half = jax.lax.linalg.triangular_solve(root, identity, left_side=True, lower=True)
    matrix = _matmul(half.T, half)
    solved = _matmul(matrix, mean)
    # Round-off aside, the first part is not negative.
    rest = jnp.maximum(1 - jnp.vdot(mean, solved), 0) + shift
    return _Inverse(matrix, solved, jnp.zeros_like(shift), rest)


def _multiply(inverse: _Inverse, values: Array) -> Array:
    """The inverse of a factor times a vector or the columns of a matrix."""
    matrix, solved = inverse.matrix, inverse.solved_mean
    if matrix.ndim == 2:
        return _matmul(matrix, values)
    matrix, solved = (
        x.reshape(-1, *(1,) * (values.ndim - 1)) for x in (matrix, solved)
    )
    along = jnp.sum(solved * values, axis=0, keepdims=True)
    return matrix * values - inverse.downdate * solved * along


def _matvec(
    fisher: Any,
    blocks: list[_Block],
    state: KroneckerState,
    damping: Scalar,
    weights: list[ArrayLike],
) -> MatVec:
    scales = None if fisher.scales is None else tree.widen(fisher.scales)
    is_seen = state.num_batches > 0
    places = {x for block in blocks for x in (block.weight, block.bias)}
    diagonals = {
        place: jnp.where(is_seen, _damped(average, damping * weights[place]), 1)
        for place, average in enumerate(state.averages)
        if place not in places
    }

    def matvec(vector: PyTree) -> PyTree:
        vector = tree.widen(vector)
        if scales is not None:
            vector = jax.tree.map(jnp.divide, vector, scales)
        leaves, structure = jax.tree.flatten(vector)
        results = list(leaves)
        for place, diagonal in diagonals.items():
            results[place] = leaves[place] / diagonal
        for block in blocks:
            pair = state.inverses[block.weight][block.place]
            inputs, outputs = block.oriented(pair)
            weight = leaves[block.weight]
            matrix = block.matrix(weight.reshape(_sides(weight.shape, block.split)))
            matrix = _multiply(outputs, matrix.T).T
            result = _multiply(inputs, matrix)
            if block.bias is not None:
                # The inverse of [[A, ā], [āᵀ, 1]], bordered.
                bias = leaves[block.bias]
                image = _multiply(outputs, bias.reshape(-1))
                image = (image - _matmul(inputs.solved_mean, matrix)) / inputs.rest
                result -= jnp.outer(inputs.solved_mean, image)
                results[block.bias] = image.reshape(bias.shape)
            results[block.weight] = block.matrix(result).reshape(weight.shape)
        image = jax.tree.unflatten(structure, results)
        if scales is not None:
            image = jax.tree.map(jnp.divide, image, scales)
        return image

    return matvec


def _damped(diagonal: Array, damping: Array) -> Array:
    """The diagonal of F + λI, positive, whatever single samples say."""
    floored = jnp.maximum(diagonal, _SMALLEST_SHARE * jnp.mean(diagonal))
    damped = floored + damping.astype(diagonal.dtype)
    return jnp.where(damped > 0, damped, 1)


def _trace(square: Array) -> Array:
    """Of a matrix, or of what is a diagonal already."""
    if square.ndim == 2:
        # `jnp.diagonal` is a gather.
        square = square.reshape(-1)[:: len(square) + 1]
    return jnp.sum(square)


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
      decay, refresh_every, max_size: as of `Kronecker`.
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
    refresh_every: int = 5
    max_size: int = 2048
    exact_length: bool = True

    def __post_init__(self) -> None:
        self._kronecker()  # raises

    def _kronecker(self) -> Kronecker:
        return Kronecker(self.decay, self.refresh_every, self.max_size)

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

        # In units of its largest entry: its square could over- or underflow.
        direction, unit, _ = tree.in_units(precondition(residual))
        length, is_usable = unit, jnp.asarray(True)
        if self.exact_length:
            along = fisher.pushforward(direction)
            curvature = fisher.inner(along, along)
            curvature += damping * tree.vdot(direction, direction)
            slope = tree.vdot(residual, direction)
            # NaN and infinity pass, and are reported by `solve_scaled`.
            is_usable = ~((curvature <= 0) | (slope <= 0))
            length = jnp.where(is_usable, slope / curvature, 0)
            along = tree.scale(length, along)
            pushed = along if pushed is None else tree.axpy(1.0, along, pushed)
        else:
            pushed = None
        direction = tree.scale(length, direction)
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
