"""The experiments behind the claims; `CLAIMS` has them by name, in reading order."""

from experiments.evidence.autoencoder import AUTOENCODER
from experiments.evidence.claim import Claim
from experiments.evidence.cost import COST
from experiments.evidence.deep_linear import DEEP_LINEAR
from experiments.evidence.divergence import DIVERGENCE
from experiments.evidence.empirical_fisher import EMPIRICAL_FISHER
from experiments.evidence.fisher_efficiency import FISHER_EFFICIENCY
from experiments.evidence.flow import FLOW
from experiments.evidence.gallery import GALLERY
from experiments.evidence.invariance import INVARIANCE
from experiments.evidence.order import ORDER
from experiments.evidence.outliers import OUTLIERS
from experiments.evidence.spaces import SPACES
from experiments.evidence.step_size import STEP_SIZE

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
