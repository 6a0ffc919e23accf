"""Several likelihoods side by side: the heads of a model, or blocks of residuals.

    H = blockdiag(w₁ H₁, ..., w_k H_k)

Knows its blocks only through the interface of `Likelihood`.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from ngd_jax.likelihoods.base import Likelihood
from ngd_jax.likelihoods.checks import check_dict, check_nonnegative, describe
from ngd_jax.likelihoods.numerics import wide_together
from ngd_jax.tree import widen
from ngd_jax.types import Array, KeyArray, PyTree

__all__ = ["Product"]

_Value = TypeVar("_Value")


class _FrozenMapping(Mapping[str, _Value]):
    """A mapping with sorted names that can be hashed, because it is a tuple inside."""

    def __init__(self, items: Mapping[str, _Value]):
        self._items = tuple(sorted(items.items()))

    def __getitem__(self, name: str) -> _Value:
        return dict(self._items)[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(self._items)

    def __repr__(self) -> str:
        return repr(dict(self._items))


@dataclasses.dataclass(frozen=True, init=False)
class Product(Likelihood):
    """Independent blocks of outputs, each with its own likelihood and weight.

    Outputs, targets, tangents, coefficients and samples are dicts with exactly the
    names of the blocks. Blocks may have batches of different shapes (residuals in the
    interior and on the boundary of a domain): the Fisher then averages every block over
    its own batch. `kl` and `log_prob` add values example by example and therefore need
    one batch shape for all blocks.

    Args:
      blocks: Likelihoods by name; at least one. Products may be nested.
      weights: A number, zero or above, for every name; 1.0 for all by default. A weight
        multiplies the log-probability, the KL and the metric of its block.

    Attributes:
      centered: Whether any block is; see `blocks` for each.
      kl_curvature: The largest of the blocks. Where blocks differ it is an upper bound,
        so that a step scaled by it is on the safe side.

    Raises:
      TypeError, ValueError: for blocks that are not likelihoods, and for weights that
        are negative or whose names are not those of the blocks.

    Example:
      >>> import jax.numpy as jnp
      >>> from ngd_jax.likelihoods import Categorical, Gaussian, Product
      >>> heads = {"label": Categorical(), "box": Gaussian()}
      >>> likelihood = Product(heads, weights={"label": 1.0, "box": 0.5})
      >>> outputs = {"label": jnp.zeros((8, 10)), "box": jnp.zeros((8, 4))}
      >>> likelihood.batch_shape(outputs)
      (8,)
      >>> likelihood.kl(outputs, {**outputs, "box": jnp.ones((8, 4))})[0]
      Array(1., dtype=float32)
    """

    blocks: Mapping[str, Likelihood]
    weights: Mapping[str, float]

    def __init__(
        self,
        blocks: Mapping[str, Likelihood],
        weights: Mapping[str, float] | None = None,
    ):
        if not isinstance(blocks, Mapping) or not blocks:
            raise TypeError(
                "`blocks` must be a dict of at least one likelihood, like "
                f"{{'label': Categorical()}}, got {blocks!r}."
            )
        for name, block in blocks.items():
            if not isinstance(name, str):
                raise TypeError(f"`blocks` must have strings as keys, got {name!r}.")
            if not isinstance(block, Likelihood):
                raise TypeError(
                    f"`blocks[{name!r}]` must be a Likelihood, got {block!r}; "
                    f"construct it, as in Categorical()."
                )
        weights = dict.fromkeys(blocks, 1.0) if weights is None else weights
        if not isinstance(weights, Mapping) or set(weights) != set(blocks):
            raise ValueError(
                f"`weights` must have exactly the names of the blocks, "
                f"{sorted(blocks)}, got {weights!r}."
            )
        for name, weight in weights.items():
            check_nonnegative(f"weights[{name!r}]", weight)
        weights = {name: float(weight) for name, weight in weights.items()}
        object.__setattr__(self, "blocks", _FrozenMapping(blocks))
        object.__setattr__(self, "weights", _FrozenMapping(weights))

    # A property here, a constant in every other likelihood: it depends on the blocks.
    @property
    def centered(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the metric of any block is a covariance over the examples."""
        return any(block.centered for block in self.blocks.values())

    @property
    def kl_curvature(  # pyright: ignore[reportIncompatibleVariableOverride]
        self,
    ) -> float:
        """The largest ratio of KL Hessian to metric among the blocks."""
        return max(block.kl_curvature for block in self.blocks.values())

    def batch_shape(self, outputs: dict[str, Any]) -> Any:
        """The batch shape that all blocks share, or a dict of shapes if they differ.

        Raises:
          TypeError, ValueError: where the outputs are no dict with exactly the names of
            the blocks, or do not fit their block.
        """
        self._check(outputs, name="outputs")
        shapes = {
            name: block.batch_shape(outputs[name])
            for name, block in self.blocks.items()
        }
        first, *others = shapes.values()
        return first if all(shape == first for shape in others) else shapes

    def log_prob(self, outputs: dict[str, Any], targets: dict[str, Any]) -> Array:
        """Σ w log p over the blocks, in nats, of their common batch shape.

        Raises:
          TypeError, ValueError: where outputs or targets do not fit, or the blocks have
            different batch shapes.
        """
        self._check_one_batch(outputs, method="log_prob")
        self._check(targets, name="targets")
        return self._weighted_sum(
            {
                name: block.log_prob(outputs[name], targets[name])
                for name, block in self.blocks.items()
            }
        )

    def kl(self, outputs_p: dict[str, Any], outputs_q: dict[str, Any]) -> Array:
        """Σ w KL(p‖q) over the blocks, in nats, of their common batch shape.

        Raises:
          TypeError, ValueError: where the outputs do not fit, or the blocks have
            different batch shapes.
        """
        self._check_one_batch(outputs_p, method="kl")
        self._check(outputs_q, name="outputs_q")
        return self._weighted_sum(
            {
                name: block.kl(outputs_p[name], outputs_q[name])
                for name, block in self.blocks.items()
            }
        )

    def fisher_vp(self, outputs: dict[str, Any], tangents: dict[str, Any]):
        """The products w H t for every block, in the dtypes of `tangents`.

        Raises:
          TypeError, ValueError: where outputs or tangents do not fit.
        """
        return self._map("fisher_vp", outputs, tangents, name="tangents", power=1.0)

    def sqrt_fisher_vp(self, outputs: dict[str, Any], coefficients: dict[str, Any]):
        """The products √w B u for every block, in the dtypes of `coefficients`.

        Raises:
          TypeError, ValueError: where outputs or coefficients do not fit.
        """
        return self._map(
            "sqrt_fisher_vp", outputs, coefficients, name="coefficients", power=0.5
        )

    def sqrt_fisher_tvp(self, outputs: dict[str, Any], tangents: dict[str, Any]):
        """The products √w Bᵀ t for every block, in the dtypes of `tangents`.

        Raises:
          TypeError, ValueError: where outputs or tangents do not fit.
        """
        return self._map(
            "sqrt_fisher_tvp", outputs, tangents, name="tangents", power=0.5
        )

    def sqrt_fisher_solve(self, outputs: dict[str, Any], cotangents: dict[str, Any]):
        """The coefficients B⁺ c / √w for every block; zeros where its weight is zero.

        Raises:
          TypeError, ValueError: where outputs or cotangents do not fit.
        """
        self._check(outputs, name="outputs")
        self._check(cotangents, name="cotangents")
        coefficients = {}
        for name, block in self.blocks.items():
            weight = self.weights[name]
            factor = weight**-0.5 if weight > 0 else 0.0
            part = block.sqrt_fisher_solve(outputs[name], cotangents[name])
            coefficients[name] = jax.tree.map(lambda u, f=factor: f * u, part)
        return coefficients

    def sample(self, key: KeyArray, outputs: dict[str, Any]) -> dict[str, PyTree]:
        """Draws targets for every block, each with its own key."""
        self._check(outputs, name="outputs")
        keys = jax.random.split(key, len(self.blocks))
        return {
            name: block.sample(keys[i], outputs[name])
            for i, (name, block) in enumerate(self.blocks.items())
        }

    def _check(self, tree: Any, *, name: str) -> None:
        check_dict(self, tree, tuple(self.blocks), name=name)

    def _check_one_batch(self, outputs: dict[str, Any], *, method: str) -> None:
        shapes = self.batch_shape(outputs)
        if isinstance(shapes, dict):
            raise ValueError(  # noqa: TRY004  # shapes, not types, are at fault
                f"`{method}` of {self!r} adds values example by example, but the "
                f"blocks of `outputs` have their own batches, {shapes}, got "
                f"{describe(outputs)}. Call `{method}` of each block and take its mean "
                f"first; the Fisher functions average every block over its own batch."
            )

    def _weighted_sum(self, values: dict[str, Array]) -> Array:
        wide = wide_together(*(values[name] for name in self.blocks))
        terms = zip(self.blocks, wide, strict=True)
        return sum(
            (self.weights[name] * value for name, value in terms),
            start=jnp.zeros_like(wide[0]),
        )

    def _map(
        self,
        method: str,
        outputs: dict[str, Any],
        vector: dict[str, Any],
        *,
        name: str,
        power: float,
    ) -> dict[str, PyTree]:
        self._check(outputs, name="outputs")
        self._check(vector, name=name)

        products = {}
        for block_name, block in self.blocks.items():
            # Wide until the weight is in, so that narrow dtypes are rounded once.
            wide = getattr(block, method)(
                outputs[block_name], widen(vector[block_name])
            )
            factor = self.weights[block_name] ** power
            products[block_name] = jax.tree.map(
                lambda x, like, factor=factor: (factor * x).astype(like.dtype),
                wide,
                vector[block_name],
            )
        return products
