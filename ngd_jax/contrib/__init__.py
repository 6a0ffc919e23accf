"""Optional parts that the core does not need; each module stands alone.

* solvers: `BacktrackingCG` (Hessian-free), `DampingSearch`, `SVD`, `Lineax`;
* preconditioners of `CG`: `Nystrom`, `Jacobi`, `CholeskyFactor`;
* `curve_fit`: least squares as in SciPy;
* rules: `QuadraticModelRate` for the learning rate, `RelativeRadius` for `max_kl`;
* `march`: natural gradient with momentum and second moments;
* `presets`: settings under names from the literature.
"""

from ngd_jax.contrib import presets as presets
from ngd_jax.contrib.backtracking import BacktrackingCG
from ngd_jax.contrib.curve_fit import CurveFitResult, CurveFitStatus, curve_fit
from ngd_jax.contrib.damping_search import DampingSearch
from ngd_jax.contrib.factor import CholeskyFactor
from ngd_jax.contrib.jacobi import Jacobi
from ngd_jax.contrib.lineax import Lineax
from ngd_jax.contrib.march import MarchState, march
from ngd_jax.contrib.nystrom import Nystrom
from ngd_jax.contrib.quadratic_model_rate import QuadraticModelRate
from ngd_jax.contrib.relative_radius import RelativeRadius
from ngd_jax.contrib.svd import SVD

__all__ = [
    "SVD",
    "BacktrackingCG",
    "CholeskyFactor",
    "CurveFitResult",
    "CurveFitStatus",
    "DampingSearch",
    "Jacobi",
    "Lineax",
    "MarchState",
    "Nystrom",
    "QuadraticModelRate",
    "RelativeRadius",
    "curve_fit",
    "march",
    "presets",
]
