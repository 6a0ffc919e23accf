"""Exact where that is cheap, else approximate: chosen by shapes while a step is traced.

    Cholesky:    M P² + P³ / 3 operations,    a step of CG:  6 N P

for N examples, M real outputs of all of them and P real parameters. F of the batch has
at most rank M. Where M is far below P, it says little of the F of all data, and a step
along the averaged factors is worth more than steps of CG towards a solution that fits
this batch. Only solvers that are right for any model are chosen among, so that the
choice cannot make a step wrong.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ngd_jax.coordinates import real_size
from ngd_jax.fisher import linearize_fisher
from ngd_jax.kfac import KFAC, Kronecker
from ngd_jax.likelihoods import Likelihood
from ngd_jax.metric import Kind
from ngd_jax.per_example import coefficient_shapes
from ngd_jax.solvers.cg import CG
from ngd_jax.solvers.cholesky import Cholesky
from ngd_jax.solvers.protocol import RightHandSide, Solution, Solver
from ngd_jax.types import ArrayLike, Batch, ModelFn, Params, PyTree

__all__ = ["Auto", "Choice"]

# More steps would fit this batch, and lose what the factors know from earlier ones. The
# state is that of KFAC(), whose factors have the same settings.
_BY_FACTORS = CG(3, preconditioner=Kronecker())
# For each parameter: the batch says too little of F for more than one step.
_FEW_OUTPUTS = 0.1


class Choice(NamedTuple):
    """What `Auto` takes, and why.

    Attributes:
      solver: the solver.
      reason: one sentence with the numbers.
    """

    solver: Solver
    reason: str


@dataclasses.dataclass(frozen=True)
class Auto(Solver):
    """`Cholesky` where it is cheap, else CG or K-FAC, by the shapes at hand.

    Cholesky is exact, and taken if its operations are at most `exactness` times those
    of the budget of `otherwise`, or so few that they do not matter. `SampleSpace` is
    cheaper for few examples and never chosen, because it is right only for models that
    do not mix their examples. Choose it yourself for those.

    Attributes:
      otherwise: what to take for many parameters. Its state is the state of this
        solver. None for `CG(3, preconditioner=Kronecker())`, or, where the batch has
        fewer than 0.1 outputs for each parameter, `KFAC()`, one step along the same
        factors.
      exactness: how many times the cost of `otherwise` an exact solution is worth.
      free: operations that do not matter: a few milliseconds of one CPU core.
      memory: bytes that the matrix of Cholesky may take.

    Example:
      >>> import jax, jax.numpy as jnp, ngd_jax as ngd
      >>> def model_fn(w, x):
      ...     return jnp.tanh(x @ w[0]) @ w[1]
      >>> x, w = jnp.ones((512, 3)), (jnp.ones((3, 9)), jnp.ones((9, 1)))
      >>> choice = Auto().choose_for(model_fn, w, x, ngd.Gaussian())
      >>> choice.solver
      Cholesky(verify=True)
      >>> print(choice.reason)
      Cholesky, with 36 parameters and 512 outputs of 512 examples: an exact solve takes
      6.8e+05 operations. It may take 1e+08, or 4 times the 3.3e+05 of 3 steps of CG,
      and 1 GiB.
      >>> w = (jnp.ones((3, 1000)), jnp.ones((1000, 1)))
      >>> Auto().choose_for(model_fn, w, x, ngd.Gaussian()).solver
      CG(...)
      >>> print(Auto().choose_for(model_fn, w, x[:64], ngd.Gaussian()).reason)
      KFAC, ...
    """

    otherwise: Solver | None = None
    exactness: float = 4.0
    free: float = 1e8
    memory: int = 2**30

    @property
    def uses_objective(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether `otherwise` needs the loss."""
        return self._iterative.uses_objective

    @property
    def warm_start(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        """That of `otherwise`."""
        return self._iterative.warm_start

    @property
    def _iterative(self) -> Solver:
        return _BY_FACTORS if self.otherwise is None else self.otherwise

    def choose(self, fisher: Any) -> Choice:
        """What is taken for this Fisher."""
        num_params = real_size(fisher.params)
        num_outputs = real_size(coefficient_shapes(fisher))
        num_examples = sum(math.prod(mu.shape) for mu in fisher.measure)
        steps = getattr(self._iterative, "max_steps", 1)
        iterative = steps * 6 * num_examples * num_params
        direct = num_outputs * num_params**2 + num_params**3 / 3
        leaves = jax.tree.leaves((fisher.params, fisher.outputs))
        itemsize = max(4, *(jnp.finfo(leaf.dtype).dtype.itemsize for leaf in leaves))
        is_cheap = direct <= max(self.exactness * iterative, self.free)
        rows = max(num_params, num_outputs)
        is_small = 0 < num_params * rows * itemsize <= self.memory
        name = type(self._iterative).__name__
        reason = (
            f"with {num_params} parameters and {num_outputs} outputs of {num_examples} "
            f"examples: an exact solve takes {direct:.2g} operations. It may take "
            f"{self.free:.2g}, or {self.exactness:g} times the {iterative:.2g} of "
            f"{steps} steps of {name}, and {self.memory / 2**30:.3g} GiB."
        )
        if is_cheap and is_small:
            solver = Cholesky()
        elif self.otherwise is None and num_outputs < _FEW_OUTPUTS * num_params:
            solver = KFAC()
            reason += f" There are fewer than {_FEW_OUTPUTS:g} outputs per parameter."
        else:
            solver = self._iterative
        return Choice(solver, f"{type(solver).__name__}, {reason}")

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
        """The state of `otherwise`: the choice is not known before a batch is seen."""
        return self._iterative.init(params)

    def solve(
        self, fisher: Any, rhs: RightHandSide, *, damping: ArrayLike, state: PyTree = ()
    ) -> Solution:
        """Solves (F + λI) d = g by the solver chosen."""
        solver = self.choose(fisher).solver
        if isinstance(solver, Cholesky):
            return solver.solve(fisher, rhs, damping=damping)._replace(state=state)
        return solver.solve(fisher, rhs, damping=damping, state=state)
