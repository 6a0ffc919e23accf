"""The cheapest solver that fits, chosen by shapes while a step is being traced.

    CG:           a steps
    SampleSpace:  b M² / N + c M³ / (18 N P) + d
    Cholesky:     a P + c P² / (18 N)

in gradients, for N examples, M coefficients and P parameters. A gradient is taken to be
6NP operations, as that of a network whose weights are used once for an example; with
shared weights a gradient costs more and the direct solvers seem dearer than they are.
For dense layers, whose rows are outer products, b M² / N is less by R/P, where R are
the multiplications for a product of two rows, and a P is e M S / (3 N P), where S are
those for what one row adds to F.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from ngd_jax.fisher import average
from ngd_jax.fisher.build import linearize_fisher
from ngd_jax.fisher.coefficients import real_size
from ngd_jax.fisher.dense_root import FEW_ROWS
from ngd_jax.fisher.gram import MEMORY, gram_matrix
from ngd_jax.fisher.operator import Kind
from ngd_jax.fisher.outer_squares import Multiplications, count_multiplications
from ngd_jax.fisher.rows import NoRowsError
from ngd_jax.likelihoods import Likelihood
from ngd_jax.solvers.cg import CG
from ngd_jax.solvers.direct import Cholesky
from ngd_jax.solvers.interface import (
    Solver,
    SolverInfo,
    SolverStatus,
    SolverWithImages,
    check_system,
)
from ngd_jax.solvers.sample_space import SampleSpace, solve_in_sample_space
from ngd_jax.types import ArrayLike, Batch, ModelFn, Params, PyTree, Scalar

__all__ = ["Auto", "Choice"]


class Choice(NamedTuple):
    """What `Auto` takes, and why.

    Attributes:
      solver: the solver.
      reason: one sentence with the numbers.
    """

    solver: Solver
    reason: str


@dataclasses.dataclass(frozen=True)
class Auto(SolverWithImages):
    """`CG`, `SampleSpace` or `Cholesky`, by their cost for the shapes at hand.

    A direct solver is exact, CG as good as its budget; so a direct one is taken where
    its cost is at most `exactness` times that of the budget, the cheaper of the two.
    Where the choice is SampleSpace and the model turns out to mix its examples, the
    step is solved by CG: at trace time where that can be seen, else at run time.

    Costs are in gradients; see the head of this module for the formulas.

    Attributes:
      cg: what to take where there are many samples and many parameters. Its state is
        the state of this solver.
      sample_space: what to take for few samples.
      cholesky: what to take for few parameters.
      exactness: how many times the cost of CG an exact solution is worth.
      product_cost: a, gradients for a product with F. 4/3 is the count of operations
        at most; 0.3 to 1.6 were measured on multilayer perceptrons on a CPU.
      gram_cost: b, gradients for the Gram matrix in units of M² / N. 1/3 is the count
        of operations without symmetry; 0.04 to 1.8 were measured, growing with P, and
        0.1 to 0.4 in units of M² R / (N P) for dense layers.
      square_cost: e, gradients for F of dense layers in units of its operations.
      factor_cost: c, gradients for a factorisation in units of its operations.
      solve_cost: d, gradients for what SampleSpace does beside both.
      memory: bytes that the matrix of a direct solver may take.

    Example:
      >>> import jax, jax.numpy as jnp, ngd_jax as ngd
      >>> def model_fn(w, x):
      ...     return jnp.tanh(x @ w[0]) @ w[1]
      >>> w = jnp.ones((3, 1000)), jnp.ones((1000, 1))
      >>> x = jnp.ones((32, 3))
      >>> choice = Auto().choose_for(model_fn, w, x, ngd.Gaussian())
      >>> choice.solver
      SampleSpace(block_size=None)
      >>> print(choice.reason)
      SampleSpace of 4000 parameters and 32 samples, in gradients: 20 for the budget of
      CG, 9 for SampleSpace, 42075 for Cholesky; a direct solver may cost 4 times CG
      and 1 GiB.
      >>> Auto().choose_for(model_fn, w, jnp.ones((4096, 3)), ngd.Gaussian()).solver
      CG(...)
    """

    cg: CG = CG()  # noqa: RUF009  # frozen
    sample_space: SampleSpace = SampleSpace()  # noqa: RUF009  # frozen
    cholesky: Cholesky = Cholesky()  # noqa: RUF009  # frozen
    exactness: float = 4.0
    product_cost: float = 1.0
    gram_cost: float = 0.3
    square_cost: float = 0.7
    factor_cost: float = 1.5
    solve_cost: float = 4.5
    memory: int = 2**30

    uses_coefficients: ClassVar[bool] = True

    @property
    def uses_objective(self) -> bool:
        """Whether the loss is of use: where CG looks at it."""
        return bool(getattr(self.cg, "uses_objective", False))

    def choose(self, fisher: Any) -> Choice:
        """What is taken for this Fisher."""
        return self._choose(_sizes(fisher), _multiplications(fisher))

    def choose_for(
        self,
        model_fn: ModelFn,
        params: Params,
        batch: Batch,
        likelihood: Likelihood,
        *,
        kind: Kind = "exact",
        targets: PyTree | None = None,
    ) -> Choice:
        """What is taken for this model and batch, arrays or shapes; computes nothing.

        Args:
          model_fn, params, batch, likelihood, kind, targets: as for `linearize_fisher`.
        """
        found: list[Choice] = []

        def trace(params: Params, batch: Batch, targets: PyTree | None) -> None:
            key = jax.random.key(0)  # nothing is drawn
            fisher = linearize_fisher(
                model_fn, params, batch, likelihood, kind=kind, key=key, targets=targets
            )
            found.append(self.choose(fisher))

        jax.eval_shape(trace, params, batch, targets)
        return found[0]

    def init(self, params: PyTree) -> PyTree:
        """The state of `cg`: the choice is not known before a batch is seen."""
        return self.cg.init(params)

    def solve_with_image(
        self,
        fisher: Any,
        rhs: PyTree,
        *,
        damping: ArrayLike,
        x0: PyTree | None = None,
        coefficients: PyTree | None = None,
        objective: Callable[[PyTree], Scalar] | None = None,
        state: PyTree = (),
    ) -> tuple[PyTree, PyTree | None, SolverInfo, PyTree]:
        """Solves (F + λI) d = g; J d is known where CG does. See `StatefulSolver`."""
        check_system(rhs, damping, x0)
        solver = self.choose(fisher).solver
        by_cg = functools.partial(
            self.cg.solve_with_image,
            fisher,
            rhs,
            damping=damping,
            x0=x0,
            objective=objective,
            state=state,
        )
        if isinstance(solver, Cholesky):
            solution, info = solver(fisher, rhs, damping=damping)
            return solution, None, info, state
        if isinstance(solver, CG):
            return by_cg()
        try:
            gram = gram_matrix(fisher, self.sample_space.block_size)
        except NoRowsError:
            return by_cg()
        solution, info = solve_in_sample_space(
            fisher, gram, rhs, damping=damping, coefficients=coefficients
        )
        direct = solution, None, info, state

        def by_products() -> tuple[PyTree, None, SolverInfo, PyTree]:
            solution, _, info, state = by_cg()
            return solution, None, info, state

        is_mixed = info.status == SolverStatus.NOT_SEPARABLE
        return jax.lax.cond(is_mixed, by_products, lambda: direct)

    def _choose(self, sizes: "_Sizes", of_layers: Multiplications | None) -> Choice:
        """The rule; see the class."""
        cg = self.cg.max_steps * self.product_cost
        # 6NP operations are a gradient, n³/3 a factorisation.
        num_params = max(1, sizes.params)
        factor = self.factor_cost / (18 * sizes.examples * num_params)
        rows = sizes.samples / sizes.examples
        cholesky = self.product_cost * sizes.params
        if of_layers and of_layers.square and rows <= FEW_ROWS:
            cholesky = self.square_cost * rows * of_layers.square / (3 * num_params)
        cholesky += factor * sizes.params**3
        gram = self.gram_cost * rows * sizes.samples
        if of_layers and self.sample_space.block_size is None:
            gram *= of_layers.gram / num_params
        samples = self.solve_cost + factor * sizes.samples**3 + gram

        costs: dict[Solver, float] = {}
        if 0 < sizes.params**2 * sizes.itemsize <= self.memory:
            costs[self.cholesky] = cholesky
        if sizes.has_rows and sizes.samples**2 * sizes.itemsize <= self.memory:
            costs[self.sample_space] = samples
        direct = min(costs, key=costs.__getitem__, default=None)
        is_direct = direct is not None and costs[direct] <= self.exactness * cg
        has_rows = "" if sizes.has_rows else ", of which single examples have no rows"
        reason = (
            f"of {sizes.params} parameters and {sizes.samples} samples{has_rows}, in "
            f"gradients: {cg:.0f} for the budget of CG, {samples:.0f} for SampleSpace, "
            f"{cholesky:.0f} for Cholesky; a direct solver may cost "
            f"{self.exactness:g} times CG and {self.memory / 2**30:.3g} GiB."
        )
        solver = direct if is_direct and direct is not None else self.cg
        return Choice(solver, f"{type(solver).__name__} {reason}")


class _Sizes(NamedTuple):
    """What the costs depend on.

    Attributes:
      examples: N.
      samples: M, the number of real coefficients.
      params: P, the number of real parameters.
      itemsize: bytes of a number.
      has_rows: whether the batch can be cut to single examples, and the rows of one
        fit into memory.
    """

    examples: int
    samples: int
    params: int
    itemsize: int
    has_rows: bool


def _multiplications(fisher: Any) -> Multiplications | None:
    try:
        return count_multiplications(fisher, MEMORY)
    except NoRowsError:
        return None


def _sizes(fisher: Any) -> _Sizes:
    likelihood, outputs = fisher.likelihood, fisher.outputs
    params, batch = fisher.params, fisher.batch
    examples: dict[int, int] = {}
    rows: dict[int, int] = {}
    for (term, _), out in zip(
        average.terms(likelihood), average.split(likelihood, outputs), strict=True
    ):
        shape = tuple(term.batch_shape(out))
        leading, count = (*shape, 0)[0], math.prod(shape)
        # Terms of as many examples are heads of one model on the same batch.
        examples[leading] = max(examples.get(leading, 0), count)
        size = real_size(out) if fisher.kind == "exact" else count
        rows[leading] = rows.get(leading, 0) + size
    num_params = real_size(params)
    leaves = jax.tree.leaves((params, outputs))
    itemsize = max(4, *(jnp.finfo(leaf.dtype).dtype.itemsize for leaf in leaves))
    shapes = [jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)]
    is_cut = all(size == 1 or (size,) in shapes for size in examples)
    largest = max(rows[size] // max(1, size) for size in rows)
    return _Sizes(
        examples=sum(examples.values()),
        samples=sum(rows.values()),
        params=num_params,
        itemsize=itemsize,
        has_rows=is_cut and 0 < 2 * largest * num_params * itemsize <= MEMORY,
    )
