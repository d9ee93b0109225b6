"""Guides: programs that draw a model's latents from q(z | x)."""

from ppvae.guides.amortized import Amortized, Normal
from ppvae.guides.auto import Auto
from ppvae.guides.bottom_up import BottomUp
from ppvae.guides.global_latents import Global
from ppvae.guides.ladder import Ladder
from ppvae.guides.m2 import M2, Labelled, log_q_of_labels
from ppvae.guides.moment_match import moment_match
from ppvae.guides.per_datapoint import PerDatapoint
from ppvae.guides.point_mass import PointMass
from ppvae.guides.prior import Prior
from ppvae.guides.quantized import Quantized, QuantizedLevels
from ppvae.guides.responsibilities import Responsibilities
from ppvae.guides.semi_amortized import SemiAmortized
from ppvae.guides.top_down import TopDown
from ppvae.guides.with_missing import WithMissing

__all__ = [
    "M2",
    "Amortized",
    "Auto",
    "BottomUp",
    "Global",
    "Labelled",
    "Ladder",
    "Normal",
    "PerDatapoint",
    "PointMass",
    "Prior",
    "Quantized",
    "QuantizedLevels",
    "Responsibilities",
    "SemiAmortized",
    "TopDown",
    "WithMissing",
    "log_q_of_labels",
    "moment_match",
]
