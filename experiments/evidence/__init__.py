"""The experiments behind the claims; `CLAIMS` has them by name, in reading order."""

from experiments.evidence.autoencoder import AUTOENCODER
from experiments.evidence.claim import Claim
from experiments.evidence.cost import COST
from experiments.evidence.divergence import DIVERGENCE
from experiments.evidence.order import ORDER

__all__ = ["CLAIMS"]

CLAIMS: dict[str, Claim] = {
    claim.name: claim for claim in (DIVERGENCE, COST, AUTOENCODER, ORDER)
}
