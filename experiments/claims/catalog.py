"""The experiments behind the claims: `CLAIMS` maps names to them, in reading order."""

from experiments.claims.autoencoder import AUTOENCODER
from experiments.claims.claim import Claim
from experiments.claims.cost import COST
from experiments.claims.deep_linear import DEEP_LINEAR
from experiments.claims.divergence import DIVERGENCE
from experiments.claims.empirical_fisher import EMPIRICAL_FISHER
from experiments.claims.fisher_efficiency import FISHER_EFFICIENCY
from experiments.claims.flow import FLOW
from experiments.claims.gallery import GALLERY
from experiments.claims.invariance import INVARIANCE
from experiments.claims.order import ORDER
from experiments.claims.outliers import OUTLIERS
from experiments.claims.spaces import SPACES
from experiments.claims.step_size import STEP_SIZE

__all__ = ["CLAIMS"]

CLAIMS: dict[str, Claim] = {
    claim.name: claim
    for claim in (
        DIVERGENCE,
        STEP_SIZE,
        OUTLIERS,
        INVARIANCE,
        COST,
        GALLERY,
        FLOW,
        DEEP_LINEAR,
        FISHER_EFFICIENCY,
        EMPIRICAL_FISHER,
        SPACES,
        AUTOENCODER,
        ORDER,
    )
}
