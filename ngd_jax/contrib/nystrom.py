"""A randomised low-rank approximation of F as a preconditioner.

    M⁻¹ = I - U (I - (λᵣ + λ)(Λ + λ)⁻¹) Uᵀ,    F ≈ U Λ Uᵀ

Its r vectors are trees with a leading axis, and the small algebra is done on Gram
matrices, so that sharded parameters stay where they are. Knows F only as a product.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ngd_jax import tree
from ngd_jax.metric import check_count
from ngd_jax.solvers.preconditioner import check_key, refresh
from ngd_jax.types import Array, ArrayLike, KeyArray, MatVec, Params, PyTree

__all__ = ["Nystrom", "NystromState"]

# The most vectors that are pushed through the model at once.
_LARGEST_CHUNK = 8
# The smallest (λᵣ + λ) / (Λ + λ), in units of machine precision.
_SMALLEST_RATIO = 10.0


class NystromState(NamedTuple):
    """The state of `Nystrom`.

    Attributes:
      num_builds: int32, attempts to build the approximation.
      age: int32, steps that the approximation has served, including this one.
      eigenvalues: Λ, `[r]`, descending; zeros before they are built.
      eigenvectors: U, shaped like the parameters with a leading axis r, float32 or
        wider; zeros before they are built.
    """

    num_builds: Array
    age: Array
    eigenvalues: Array
    eigenvectors: PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class Nystrom:
    """A low-rank F: M⁻¹ = I - U (I - (λᵣ + λ)(Λ + λ)⁻¹) Uᵀ with F ≈ U Λ Uᵀ.

    Products with r random vectors find roughly the r largest eigenvalues, and M brings
    them down to the smallest of these. A good choice if the spectrum of F falls fast,
    in whatever basis: the expected condition number is below 28 if r is more than twice
    the effective dimension tr(F (F + λI)⁻¹).

    It goes stale as F changes: on a small autoencoder, while training made large steps,
    one of rank 20 saved half of the products when new, and a third when two steps old.
    With a condition number above 1e8 an old one can cost more products than none.

    Attributes:
      rank: r, cut to the number of parameters. A build costs r products, and about
        10 r² P operations for P parameters; the state holds r vectors.
      key: a typed key, as from `jax.random.key`.
      refresh_every: the number of steps from one build to the next.

    Raises:
      ValueError, TypeError: for numbers out of range, or a key that is not typed.

    Example:
      >>> import jax, jax.numpy as jnp, ngd_jax as ngd
      >>> x = jnp.array([[30.0, 0.0], [0.0, 2.0]])
      >>> fisher = ngd.linearize_fisher(
      ...     lambda w, x: x @ w, jnp.ones(2), x, ngd.Gaussian(1, 0)
      ... )
      >>> precondition = Nystrom(2, jax.random.key(0))(fisher, 1.0)
      >>> precondition(jnp.array([451.0, 3.0])).round(2)  # F + λI = diag(451, 3)
      Array([3., 3.], dtype=float32)

    References:
      Frangella, Tropp and Udell, Randomized Nyström preconditioning, 2023 (arXiv
      2110.02820): algorithm 2.1 with its stabilising shift, equation 5.3, theorem 5.1.
      Stathopoulos and Wu, A block orthogonalization procedure with constant
      synchronization requirements, 2002 (orthonormal vectors by way of Gram matrices).
    """

    rank: int
    key: KeyArray
    refresh_every: int = 1

    def __post_init__(self) -> None:
        check_count("rank", self.rank)
        check_count("refresh_every", self.refresh_every)
        check_key(self.key, "Nystrom")

    def init(self, params: Params) -> NystromState:
        """The state before anything is built; M is then I."""
        rank = self._rank(params)

        def zeros(leaf: ArrayLike) -> Array:
            return jnp.zeros((rank, *jnp.shape(leaf)), tree.wide_dtype(leaf))

        return NystromState(
            num_builds=jnp.zeros((), jnp.int32),
            age=jnp.asarray(self.refresh_every, jnp.int32),
            eigenvalues=jnp.zeros((rank,), tree.accumulator_dtype(params)),
            eigenvectors=jax.tree.map(zeros, params),
        )

    def prepare(
        self, fisher: Any, state: NystromState, damping: ArrayLike
    ) -> tuple[MatVec, NystromState]:
        """The map v -> M⁻¹ v for this step, and the state; see `Preconditioner`."""
        state = refresh(
            state, self.refresh_every, lambda state: self._build(fisher, state)
        )
        return self._matvec(state, damping), state

    def __call__(self, fisher: Any, damping: ArrayLike) -> MatVec:
        """The map v -> M⁻¹ v, built for this Fisher and not kept."""
        return self.prepare(fisher, self.init(fisher.params), damping)[0]

    def _matvec(self, state: NystromState, damping: ArrayLike) -> MatVec:
        """The map v -> M⁻¹ v."""
        dtype = state.eigenvalues.dtype
        shifted = state.eigenvalues + jnp.asarray(damping).astype(dtype)
        is_used = shifted > 0
        ratio = jnp.where(is_used, shifted[-1] / jnp.where(is_used, shifted, 1.0), 1.0)
        # Below this, round-off in U decides the sign of M⁻¹.
        weights = 1.0 - jnp.maximum(ratio, _SMALLEST_RATIO * jnp.finfo(dtype).eps)
        basis = state.eigenvectors

        def precondition(vector: PyTree) -> PyTree:
            vector = tree.widen(vector)
            rows = jax.tree.map(lambda leaf: leaf[None], vector)
            coefficients = _gram(basis, rows) * weights[:, None]
            part = _combine(coefficients, basis)
            return jax.tree.map(lambda v, p: v - p[0], vector, part)

        return precondition

    def _rank(self, params: Params) -> int:
        dimensions = sum(
            jnp.size(leaf) * (2 if jnp.iscomplexobj(leaf) else 1)
            for leaf in jax.tree.leaves(params)
        )
        return min(self.rank, dimensions or self.rank)

    def _build(self, fisher: Any, state: NystromState) -> NystromState:
        """Algorithm 2.1; complex parameters count as their real and imaginary parts."""
        rank = len(state.eigenvalues)
        eps = jnp.finfo(state.eigenvalues.dtype).eps
        key = jax.random.fold_in(self.key, state.num_builds)

        # 1-2. Y = F Ω for an orthonormal Ω; in units in which no square underflows.
        test = _orthonormalize(
            tree.random_like(jax.random.normal, key, state.eigenvectors)
        )
        chunk = max(n for n in range(1, _LARGEST_CHUNK + 1) if rank % n == 0)
        # By hand, since the `batch_size` of `lax.map` fails for leaves without entries.
        blocks = jax.tree.map(
            lambda leaf: leaf.reshape(rank // chunk, chunk, *leaf.shape[1:]), test
        )
        products = jax.lax.map(jax.vmap(fisher.matvec), blocks)
        products = jax.tree.map(
            lambda leaf: leaf.reshape(rank, *leaf.shape[2:]), products
        )
        unit = tree.usable_unit(tree.max_abs(products))
        products = tree.divide(products, unit)

        # 3-4. Shifted, so that directions F does not see are small and not singular.
        shift = eps * jnp.sqrt(tree.vdot(products, products))
        products = tree.axpy(shift, test, products)

        # 5-6. B = Y (Ωᵀ Y)^(-1/2), so that B Bᵀ = Y (Ωᵀ Y)⁻¹ Yᵀ. By eigenvalues and not
        # by Cholesky, which fails where round-off has made one of them negative.
        core = _gram(test, products)
        values, vectors = jnp.linalg.eigh((core + core.T) / 2)
        floor = jnp.maximum(shift, jnp.finfo(values.dtype).tiny)
        root = vectors * jnp.maximum(values, floor)[None] ** -0.5
        root_of_products = _combine(root, products)

        # 7-8. B = U Σ Vᵀ, through an orthonormal basis of B; and Λ = Σ² - shift.
        basis = _orthonormalize(root_of_products)
        rotation, singular, _ = jnp.linalg.svd(_gram(basis, root_of_products))
        return state._replace(
            eigenvalues=jnp.maximum(singular**2 - shift, 0.0) * unit,
            eigenvectors=_contract(_combine(rotation, basis)),
        )


def _gram(a: PyTree, b: PyTree) -> Array:
    """⟨aᵢ, bⱼ⟩ = Re Σ conj(aᵢ) bⱼ, float32 or wider."""
    dtype = tree.accumulator_dtype((a, b))
    total = jnp.zeros((), dtype)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        axes = range(1, x.ndim)
        product = tree.contract(jnp.conj(x), y.astype(x.dtype), axes, axes)
        total = total + jnp.real(product).astype(dtype)
    return total


def _combine(matrix: Array, vectors: PyTree) -> PyTree:
    """The combinations Σᵢ matrixᵢⱼ vectorsᵢ."""
    return jax.tree.map(
        lambda leaf: tree.contract(matrix.astype(leaf.dtype), leaf, [0], [0]), vectors
    )


def _orthonormalize(vectors: PyTree) -> PyTree:
    """A basis of about the same span, by r × r Gram matrices and no QR of P × r.

    Directions that round-off cannot tell from zero stay shorter than 1.
    """

    def once(_: Array, vectors: PyTree) -> PyTree:
        values, rotation = jnp.linalg.eigh(_gram(vectors, vectors))
        largest = jnp.where(values[-1] > 0, values[-1], 1.0)
        floor = len(values) * jnp.finfo(values.dtype).eps * largest
        scale = jnp.maximum(values, floor)[None] ** -0.5
        return _combine(rotation * scale, vectors)

    # Each pass takes √ε off the condition number; the third is for nearly singular F.
    return jax.lax.fori_loop(0, 3, once, vectors)


def _contract(vectors: PyTree) -> PyTree:
    """Shortened, where needed, to a norm ‖U‖ of at most 1."""
    largest = jnp.linalg.eigvalsh(_gram(vectors, vectors))[-1]
    return tree.divide(vectors, jnp.sqrt(jnp.maximum(largest, 1.0)))
