"""Several likelihoods side by side: the heads of a model, or blocks of residuals.

    H = blockdiag(w₁ H₁, ..., w_k H_k)

Knows its blocks only through the interface of `Likelihood`.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias, TypeVar

import jax

from ngd_jax.likelihoods import numerics
from ngd_jax.likelihoods.base import Likelihood
from ngd_jax.likelihoods.checks import check_dict, check_number, message
from ngd_jax.types import Array, KeyArray

__all__ = ["Product"]

_Value = TypeVar("_Value")
_Dict: TypeAlias = dict[str, Any]


class _FrozenMapping(Mapping[str, _Value]):
    """A mapping with sorted names that cannot be changed, and so can be hashed."""

    def __init__(self, items: Mapping[str, _Value]):
        self._items = dict(sorted(items.items()))

    def __getitem__(self, name: str) -> _Value:
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(tuple(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)


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
      kl_curvature: The largest of the blocks: an upper bound where blocks differ, so
        that a step scaled by it is not too long.

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
            rule = "`blocks` must be a dict of at least one likelihood by name"
            raise TypeError(f"{rule}, got {blocks!r}.")
        for name, block in blocks.items():
            if not isinstance(name, str):
                raise TypeError(f"`blocks` must have strings as keys, got {name!r}.")
            if not isinstance(block, Likelihood):
                rule = f"`blocks[{name!r}]` must be a Likelihood, as in Categorical()"
                raise TypeError(f"{rule}, got {block!r}.")
        weights = dict.fromkeys(blocks, 1.0) if weights is None else weights
        if not isinstance(weights, Mapping) or set(weights) != set(blocks):
            rule = f"have exactly the names of the blocks, {sorted(blocks)}"
            raise ValueError(f"`weights` must {rule}, got {weights!r}.")
        for name, weight in weights.items():
            check_number(f"weights[{name!r}]", weight)
        weights = {name: float(weight) for name, weight in weights.items()}
        object.__setattr__(self, "blocks", _FrozenMapping(blocks))
        object.__setattr__(self, "weights", _FrozenMapping(weights))
        # Constants of the class in every other likelihood; here they depend on blocks.
        centered = any(block.centered for block in blocks.values())
        object.__setattr__(self, "centered", centered)
        kl_curvature = max(block.kl_curvature for block in blocks.values())
        object.__setattr__(self, "kl_curvature", kl_curvature)

    def batch_shape(self, outputs: _Dict) -> Any:
        """The batch shape that all blocks share, or a dict of shapes if they differ.

        Raises:
          TypeError, ValueError: if the outputs are not a dict with exactly the names of
            the blocks, or do not fit their blocks.
        """
        check_dict(self, outputs, self.blocks, name="outputs")
        shapes = {
            name: block.batch_shape(outputs[name])
            for name, block in self.blocks.items()
        }
        first, *others = shapes.values()
        return first if all(shape == first for shape in others) else shapes

    def log_prob(self, outputs: _Dict, targets: _Dict) -> Array:
        """Σ w log p over the blocks, in nats, of their common batch shape.

        Raises:
          TypeError, ValueError: if outputs or targets do not fit, or the blocks have
            different batch shapes.
        """
        return self._total("log_prob", outputs, targets, "targets")

    def kl(self, outputs_p: _Dict, outputs_q: _Dict) -> Array:
        """Σ w KL(p‖q) over the blocks, in nats, of their common batch shape.

        Raises:
          TypeError, ValueError: if the outputs do not fit, or the blocks have different
            batch shapes.
        """
        return self._total("kl", outputs_p, outputs_q, "outputs_q")

    def sample(self, key: KeyArray, outputs: _Dict) -> _Dict:
        """Draws targets for every block, each with its own key."""
        check_dict(self, outputs, self.blocks, name="outputs")
        keys = jax.random.split(key, len(self.blocks))
        pairs = zip(keys, self.blocks.items(), strict=True)
        return {name: block.sample(key, outputs[name]) for key, (name, block) in pairs}

    def _fisher_vp(self, outputs: _Dict, tangents: _Dict) -> _Dict:
        """The products w H t of every block."""
        return self._scaled("fisher_vp", outputs, tangents, 1.0)

    def _sqrt_fisher_vp(self, outputs: _Dict, coefficients: _Dict) -> _Dict:
        """The products √w B u of every block."""
        return self._scaled("sqrt_fisher_vp", outputs, coefficients, 0.5)

    def _sqrt_fisher_tvp(self, outputs: _Dict, tangents: _Dict) -> _Dict:
        """The products √w Bᵀ t of every block."""
        return self._scaled("sqrt_fisher_tvp", outputs, tangents, 0.5)

    def _sqrt_fisher_solve(self, outputs: _Dict, cotangents: _Dict) -> _Dict:
        """The coefficients B⁺ c / √w of every block; zeros where its weight is zero."""
        return self._scaled("sqrt_fisher_solve", outputs, cotangents, -0.5)

    def _scaled(self, method: str, outputs: _Dict, other: _Dict, power: float) -> _Dict:
        """The results of `method` of every block, times its weight to the `power`."""
        products = {}
        for name, block in self.blocks.items():
            weight = self.weights[name]
            factor = weight**power if weight > 0 else 0.0
            part = getattr(block, method)(outputs[name], other[name])
            products[name] = jax.tree.map(lambda x, factor=factor: factor * x, part)
        return products

    def _total(self, method: str, outputs: _Dict, other: _Dict, name: str) -> Array:
        """Σ w `method`(outputs, other) over the blocks, example by example."""
        shapes = self.batch_shape(outputs)
        if isinstance(shapes, dict):
            rule = f"share a batch for `{method}`, but have their own batches {shapes}"
            advice = f"call `{method}` of each block and take its mean first"
            text = message(self, "outputs", rule, outputs, advice)
            raise ValueError(text)  # noqa: TRY004  # shapes, not types, are at fault
        check_dict(self, other, self.blocks, name=name)
        terms = self._scaled(method, outputs, other, 1.0)
        first, *rest = numerics.wide_together(*terms.values())
        return sum(rest, start=first)
