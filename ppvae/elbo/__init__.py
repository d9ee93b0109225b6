"""Bounds on log p(x) and their gradients, for any model/guide pair.

Every estimator is a small frozen value that works in ``ppvae.SVI``, in stock ``pyro.infer.SVI``
and as a module: ``elbo.IWELBO(num_particles=8)(model, guide)(x)``.
"""

from ppvae.elbo.annealed import AnnealedELBO
from ppvae.elbo.chi import ChiUpperBound
from ppvae.elbo.disentangling import DIPELBO, TCELBO
from ppvae.elbo.estimator import Estimator, Objective
from ppvae.elbo.factor import FactorELBO
from ppvae.elbo.importance import CIWELBO, IWELBO, MIWELBO, PIWELBO, RenyiELBO
from ppvae.elbo.penalties import Balanced, Capacity, Constraint, FreeBits, Penalty, Tilt
from ppvae.elbo.plus import Plus
from ppvae.elbo.quantized import VQELBO
from ppvae.elbo.relaxed import RELAX
from ppvae.elbo.schedules import CyclicalWarmup, LinearWarmup
from ppvae.elbo.standard import ELBO
from ppvae.elbo.state import State
from ppvae.elbo.thermodynamic import ThermodynamicELBO
from ppvae.elbo.wake_sleep import ReweightedWakeSleep, SoftCVI

__all__ = [
    "CIWELBO",
    "DIPELBO",
    "ELBO",
    "IWELBO",
    "MIWELBO",
    "PIWELBO",
    "RELAX",
    "TCELBO",
    "VQELBO",
    "AnnealedELBO",
    "Balanced",
    "Capacity",
    "ChiUpperBound",
    "Constraint",
    "CyclicalWarmup",
    "Estimator",
    "FactorELBO",
    "FreeBits",
    "LinearWarmup",
    "Objective",
    "Penalty",
    "Plus",
    "RenyiELBO",
    "ReweightedWakeSleep",
    "SoftCVI",
    "State",
    "ThermodynamicELBO",
    "Tilt",
]
