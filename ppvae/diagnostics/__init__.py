"""What a trained pair is worth: its report, evidence, reference posteriors, calibration, ArviZ."""

from ppvae.diagnostics.ais import Sandwich, ais, bdmc, reverse_ais
from ppvae.diagnostics.annealing import AnnealedEvidence, sigmoid_schedule
from ppvae.diagnostics.arviz_bridge import to_arviz
from ppvae.diagnostics.calibration import Calibration, sbc
from ppvae.diagnostics.chains import PosteriorDraws, chains_to_arviz
from ppvae.diagnostics.compare_posteriors import PosteriorComparison, compare_posteriors
from ppvae.diagnostics.diagnose import diagnose
from ppvae.diagnostics.evidence import Evidence, log_evidence
from ppvae.diagnostics.gaps import Gaps, gaps
from ppvae.diagnostics.given_globals import (
    JointEvidence,
    LogPredictive,
    given_globals,
    joint_evidence,
    log_predictive,
)
from ppvae.diagnostics.hmc import hmc
from ppvae.diagnostics.metropolis import metropolis
from ppvae.diagnostics.missing import Imputation, impute
from ppvae.diagnostics.nuts import nuts
from ppvae.diagnostics.predictive import PredictiveCheck, predictive_check
from ppvae.diagnostics.psis import khat
from ppvae.diagnostics.quadrature import Quadrature, quadrature
from ppvae.diagnostics.report import Report
from ppvae.diagnostics.simulated import Divergence, simulated_divergence
from ppvae.diagnostics.summaries import Aggregate
from ppvae.diagnostics.total_correlation import TotalCorrelation, total_correlation
from ppvae.diagnostics.two_sample import LocalTest, local_c2st

__all__ = [
    "Aggregate",
    "AnnealedEvidence",
    "Calibration",
    "Divergence",
    "Evidence",
    "Gaps",
    "Imputation",
    "JointEvidence",
    "LocalTest",
    "LogPredictive",
    "PosteriorComparison",
    "PosteriorDraws",
    "PredictiveCheck",
    "Quadrature",
    "Report",
    "Sandwich",
    "TotalCorrelation",
    "ais",
    "bdmc",
    "chains_to_arviz",
    "compare_posteriors",
    "diagnose",
    "gaps",
    "given_globals",
    "hmc",
    "impute",
    "joint_evidence",
    "khat",
    "local_c2st",
    "log_evidence",
    "log_predictive",
    "metropolis",
    "nuts",
    "predictive_check",
    "quadrature",
    "reverse_ais",
    "sbc",
    "sigmoid_schedule",
    "simulated_divergence",
    "to_arviz",
    "total_correlation",
]
