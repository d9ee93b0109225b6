"""Bounds on log p(x) and their gradients, for any model/guide pair.

Every estimator is a small frozen value that works in ``ppvae.SVI``, in stock ``pyro.infer.SVI``
and as a module: ``elbo.IWELBO(num_particles=8)(model, guide)(x)``.
"""

from ppvae.elbo.estimator import Estimator, Objective
from ppvae.elbo.importance import IWELBO, RenyiELBO
from ppvae.elbo.schedules import LinearWarmup
from ppvae.elbo.standard import ELBO

__all__ = ["ELBO", "IWELBO", "Estimator", "LinearWarmup", "Objective", "RenyiELBO"]
