"""Kronecker-factored blocks of F as a preconditioner: K-FAC's metric inside of CG."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ngd_jax import tree
from ngd_jax.arguments import check_count
from ngd_jax.fisher.layers import Layer, LayerSums, backward_pass
from ngd_jax.preconditioners.base import check_key, random_like
from ngd_jax.types import Array, ArrayLike, KeyArray, MatVec, Params, PyTree, Scalar

__all__ = ["Kronecker", "KroneckerState"]

# What is estimated from single samples is at least this part of its mean over a leaf.
_SMALLEST_SHARE = 0.1
# Where the default is TF32, a barely positive matrix would lose its Cholesky factor.
_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class _Averages(NamedTuple):
    """Of a weight as a matrix: means of a aᵀ and a, and Σ δ δᵀ, for either side.

    Of a long side the diagonal, as a vector.
    """

    rows: Array
    columns: Array
    mean: Array


class _Inverses(NamedTuple):
    """(rows + ε)⁻¹ and (columns + ε)⁻¹; that times a mean; and 1 + ε less its share."""

    rows: "Array | _DiagonalInverse"
    columns: "Array | _DiagonalInverse"
    solved_mean: Array
    rest: Array


class _DiagonalInverse(NamedTuple):
    """(diag(v) + ā āᵀ)⁻¹ = diag(d) - u uᵀ."""

    diagonal: Array
    along_mean: Array


class KroneckerState(NamedTuple):
    """What `Kronecker` keeps.

    Attributes:
      num_batches: int32, that the averages have seen.
      age: int32, steps that the inverses have served, this one included.
      diagonal: an average estimate of diag F, real, shaped like the parameters; zero
        where factors have its place.
      averages: for every leaf that may be the weight of a dense layer or a convolution
        its factors; () for the others.
      inverses: the same, of the damped factors.
    """

    num_batches: Array
    age: Array
    diagonal: PyTree
    averages: PyTree
    inverses: PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class Kronecker:
    """Blocks of layers as products of small matrices: M = (A + ε) ⊗ (G + ε').

        A = E[a aᵀ],    G = E[δ δᵀ],    ε = π √λ,    ε' = √λ / π

    a are the inputs of a dense layer or the patches of a convolution, a one behind them
    where there is a bias, δ the cotangents of the outputs, and
    π² = (tr A / dim A) / (tr G / dim G). Weights of examples are in G; A counts all
    examples alike. Layers are found in the program of the gradient, in whatever library
    the model is written. What belongs to none of them (norms, embeddings, weights that
    are used twice) has an estimate of the diagonal.

    The factors are averages over the batches of many steps, so that M knows of more
    examples than the F of this batch. They cost a backward pass and the products a aᵀ
    and δ δᵀ at every step, an inverse of each at some of them. With it, one to three
    steps of CG do; `ApproximateInverse(Kronecker())` is K-FAC with the exact length
    along its direction.

    Attributes:
      key: a typed key, as of `jax.random.key`: the cotangents have random signs. None
        for `jax.random.key(0)`: all that is asked of them is that they go with nothing
        in the data.
      decay: weight of what was before in the averages; they are plain means until
        1 / (1 - decay) batches are seen.
      refresh_every: steps from one inverse to the next, at most: in the beginning there
        is one after batch 1, 2, 3, 5, 8, 12, each time half as many have come in again.
      max_size: of longer a, A is their mean's ā āᵀ and their variances, and of longer
        δ, G is its diagonal; a weight with two such sides is left to the diagonal of F.
        A weight of m times n numbers takes 2 (m² + n²) numbers in the state, and m or n
        in place of the square of a long side.

    Raises:
      ValueError, TypeError: on numbers out of range, and on what is not a typed key.

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
      curvature, 2015: sections 3 (factors), 5 (averages) and 6.3 (π).
    """

    key: KeyArray | None = None
    decay: float = 0.95
    refresh_every: int = 5
    max_size: int = 2048

    def __post_init__(self) -> None:
        if self.key is not None:
            check_key(self.key, "Kronecker")
        check_count("refresh_every", self.refresh_every)
        check_count("max_size", self.max_size)
        if not 0 <= self.decay < 1:
            raise ValueError(f"`decay` must be in [0, 1), got {self.decay}.")

    def init(self, params: Params) -> KroneckerState:
        """The state before anything is built, with which M = I."""
        leaves = [self._start(leaf) for leaf in jax.tree.leaves(params)]
        # `optax.tree.map_params` takes what this makes of no parameters for a prefix of
        # every state: a leaf there stands for all that is not shaped like them.
        averages, inverses = (
            zip(*leaves, strict=True) if leaves else [jnp.zeros(())] * 2
        )
        return KroneckerState(
            num_batches=jnp.zeros((), jnp.int32),
            age=jnp.asarray(self.refresh_every, jnp.int32),
            diagonal=jax.tree.map(_real_zeros, params),
            averages=averages,
            inverses=inverses,
        )

    def prepare(
        self, fisher: Any, state: KroneckerState, damping: ArrayLike
    ) -> tuple[MatVec, KroneckerState]:
        """The map v -> M⁻¹ v for this step, and the state; see `Preconditioner`."""
        if not jax.tree.leaves(state.diagonal):
            return lambda vector: vector, state
        layers, state = self._observe(fisher, state)
        dtype = tree.accumulator_dtype(state.diagonal)
        damping = jnp.asarray(damping).astype(dtype)
        # While the averages are young, half as many batches again change them a lot.
        half = (state.num_batches - state.age + 1) // 2
        state = jax.lax.cond(
            (state.age >= jnp.minimum(half, self.refresh_every))
            & (state.num_batches > 0),
            lambda state: _invert(layers, state, damping),
            lambda state: state._replace(age=state.age + 1),
            state,
        )
        return _matvec(layers, state, damping), state

    def __call__(self, fisher: Any, damping: ArrayLike) -> MatVec:
        """The map v -> M⁻¹ v, built for this Fisher and not kept."""
        return self.prepare(fisher, self.init(fisher.params), damping)[0]

    def _start(self, leaf: ArrayLike) -> tuple[Any, Any]:
        rows, columns = _sides(jnp.shape(leaf))
        is_real = not jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating)
        if not 1 <= min(rows, columns) <= self.max_size or not is_real:
            return (), ()
        dtype = tree.wide_dtype(leaf)
        mean = jnp.zeros(rows, dtype)
        averages = _Averages(self._zero(rows, dtype), self._zero(columns, dtype), mean)
        inverses = _Inverses(
            self._identity(rows, dtype),
            self._identity(columns, dtype),
            mean,
            jnp.ones((), dtype),
        )
        return averages, inverses

    def _zero(self, size: int, dtype: Any) -> Array:
        return jnp.zeros(size if size > self.max_size else (size, size), dtype)

    def _identity(self, size: int, dtype: Any) -> Any:
        if size > self.max_size:
            return _DiagonalInverse(jnp.ones(size, dtype), jnp.zeros(size, dtype))
        return jnp.eye(size, dtype=dtype)

    def _observe(
        self, fisher: Any, state: KroneckerState
    ) -> tuple[list[Layer], KroneckerState]:
        """Adds this batch to the averages."""
        coefficients = jax.eval_shape(fisher.sqrt_matvec, fisher.params)
        key = jax.random.key(0) if self.key is None else self.key
        key = jax.random.fold_in(key, state.num_batches)
        signs = random_like(jax.random.rademacher, key, coefficients)
        found, passed = backward_pass(
            fisher, fisher.sqrt_cotangents(signs), max_size=self.max_size
        )

        known = [
            (layer, sums)
            for layer, sums in zip(found, passed.layers, strict=True)
            if _is_layer_of(layer, state.averages[layer.weight])
        ]
        layers = [layer for layer, _ in known]
        # What is read of the others alone is computed.
        places = set(range(len(passed.squares))) - _factored(layers)
        squares = {place: passed.squares[place] for place in places}
        is_finite = _is_finite([sums for _, sums in known], squares)
        count = state.num_batches + 1
        dtype = tree.accumulator_dtype(state.diagonal)
        share = jnp.maximum(1 / count.astype(dtype), 1 - self.decay)

        def mix(old: Array, new: Array) -> Array:
            mixed = old + share.astype(old.dtype) * (new.astype(old.dtype) - old)
            return jnp.where(is_finite, mixed, old)

        averages = list(state.averages)
        for layer, sums in known:
            old, new = averages[layer.weight], _averages(layer, sums)
            averages[layer.weight] = jax.tree.map(mix, old, new)
        diagonal, structure = jax.tree.flatten(state.diagonal)
        for place, square in squares.items():
            diagonal[place] = mix(diagonal[place], square)
        return layers, state._replace(
            num_batches=jnp.where(is_finite, count, state.num_batches),
            diagonal=jax.tree.unflatten(structure, diagonal),
            averages=tuple(averages),
        )


def _is_layer_of(layer: Layer, averages: Any) -> bool:
    """Whether a layer has the factors for which there is room in the state."""
    sides = layer.num_inputs, layer.num_outputs
    if not layer.inputs_first:
        sides = sides[::-1]
    return averages != () and sides == (len(averages.rows), len(averages.columns))


def _factored(layers: list[Layer]) -> set[int]:
    """The places of the parameters that have no need of the diagonal."""
    places = {layer.weight for layer in layers}
    for layer in layers:
        if layer.bias is not None and _has_bias(layer):
            places.add(layer.bias)
    return places


def _is_finite(layers: list[LayerSums], squares: PyTree) -> Array:
    """Whether all of it is: a sum of squares is where what it is made of is."""
    diagonals = [
        _diagonal(factor) for sums in layers for factor in (sums.inputs, sums.outputs)
    ]
    return tree.all_finite((diagonals, squares))


def _diagonal(factor: Array) -> Array:
    """Of a matrix, or of what is a diagonal already."""
    return jnp.diagonal(factor) if factor.ndim == 2 else factor


def _sides(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a weight as a matrix, split where they are most alike."""
    splits = [
        (math.prod(shape[:axis]), math.prod(shape[axis:]))
        for axis in range(1, len(shape))
    ]
    return min(splits, key=sum, default=(0, 0))


def _real_zeros(leaf: ArrayLike) -> Array:
    return jnp.zeros(jnp.shape(leaf), jnp.finfo(tree.wide_dtype(leaf)).dtype)


def _averages(layer: Layer, sums: LayerSums) -> _Averages:
    inputs, outputs = sums.inputs / sums.num_terms, sums.outputs
    if not layer.inputs_first:
        return _Averages(outputs, inputs, jnp.zeros(layer.num_outputs, outputs.dtype))
    mean = sums.input / sums.num_terms
    is_used = _has_bias(layer) or inputs.ndim == 1
    return _Averages(inputs, outputs, mean if is_used else jnp.zeros_like(mean))


def _has_bias(layer: Layer) -> bool:
    """Whether the bias shares the block of its weight."""
    return layer.bias is not None and layer.inputs_first


def _invert(
    layers: list[Layer], state: KroneckerState, damping: Scalar
) -> KroneckerState:
    """New inverses; the old ones, still due, where these are not finite."""
    inverses = list(state.inverses)
    for layer in layers:
        inverses[layer.weight] = _inverses(
            state.averages[layer.weight], damping, _has_bias(layer)
        )
    is_finite = tree.all_finite(inverses)
    return state._replace(
        age=jnp.where(is_finite, 1, state.age),
        inverses=tree.select(is_finite, tuple(inverses), state.inverses),
    )


def _inverses(averages: _Averages, damping: Scalar, has_bias: bool) -> _Inverses:
    rows, columns, mean = averages
    extent = len(rows) + has_bias
    row_size = (jnp.sum(_diagonal(rows)) + has_bias) / extent
    column_size = jnp.mean(_diagonal(columns))
    is_usable = (row_size > 0) & (column_size > 0)
    ratio = jnp.where(is_usable, row_size / jnp.where(is_usable, column_size, 1), 1)
    root, balance = jnp.sqrt(damping).astype(rows.dtype), jnp.sqrt(ratio)
    tiny = jnp.finfo(rows.dtype).eps
    on_rows = root * balance + tiny * extent * row_size
    on_columns = root / balance + tiny * len(columns) * column_size
    inverse = _inverse(rows, on_rows, mean)
    solved_mean = _multiply(inverse, mean)
    return _Inverses(
        inverse,
        _inverse(columns, on_columns, jnp.zeros(len(columns), columns.dtype)),
        solved_mean,
        1 + on_rows - _matmul(mean, solved_mean),
    )


def _inverse(factor: Array, shift: Scalar, mean: Array) -> Any:
    """(factor + shift)⁻¹, symmetric; the mean is of use to a long side alone."""
    if factor.ndim == 1:
        inverse = 1 / (jnp.maximum(factor - mean**2, 0) + shift)
        image = inverse * mean
        return _DiagonalInverse(inverse, image / jnp.sqrt(1 + jnp.vdot(mean, image)))
    identity = jnp.eye(len(factor), dtype=factor.dtype)
    root = jax.scipy.linalg.cholesky(factor + shift * identity, lower=True)
    return jax.scipy.linalg.cho_solve((root, True), identity)


def _multiply(inverse: Any, values: Array) -> Array:
    """The inverse of a factor times a vector or the columns of a matrix."""
    if not isinstance(inverse, _DiagonalInverse):
        return _matmul(inverse, values)
    diagonal, u = (x.reshape(-1, *(1,) * (values.ndim - 1)) for x in inverse)
    return diagonal * values - u * jnp.sum(u * values, axis=0, keepdims=True)


def _matvec(layers: list[Layer], state: KroneckerState, damping: Scalar) -> MatVec:
    diagonals, structure = jax.tree.flatten(state.diagonal)
    is_seen = state.num_batches > 0
    scales = [jnp.where(is_seen, _damped(one, damping), 1) for one in diagonals]

    def matvec(vector: PyTree) -> PyTree:
        leaves = jax.tree.leaves(tree.widen(vector))
        images = [leaf / scale for leaf, scale in zip(leaves, scales, strict=True)]
        for layer in layers:
            inverses = state.inverses[layer.weight]
            weight = leaves[layer.weight]
            matrix = weight.reshape(len(inverses.solved_mean), -1)
            matrix = _multiply(inverses.columns, matrix.T).T
            image = _multiply(inverses.rows, matrix)
            if layer.bias is not None and _has_bias(layer):
                # The inverse of [[A, ā], [āᵀ, 1]], bordered.
                bias = _multiply(inverses.columns, leaves[layer.bias])
                bias = (bias - _matmul(inverses.solved_mean, matrix)) / inverses.rest
                image -= jnp.outer(inverses.solved_mean, bias)
                images[layer.bias] = bias
            images[layer.weight] = image.reshape(weight.shape)
        return jax.tree.unflatten(structure, images)

    return matvec


def _damped(diagonal: Array, damping: Scalar) -> Array:
    """The diagonal of F + λI, positive, whatever single samples say."""
    floored = jnp.maximum(diagonal, _SMALLEST_SHARE * jnp.mean(diagonal))
    damped = floored + damping.astype(diagonal.dtype)
    return jnp.where(damped > 0, damped, 1)
