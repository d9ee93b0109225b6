"""What a trained pair is worth: held-out evidence, Pareto k-hat, ArviZ export."""

from ppvae.diagnostics.arviz_bridge import to_arviz
from ppvae.diagnostics.evidence import Evidence, log_evidence
from ppvae.diagnostics.psis import khat

__all__ = ["Evidence", "khat", "log_evidence", "to_arviz"]
