"""Pictures of what training and diagnosis return: ``f(values, ax=None) -> ax``.

Values are torch tensors (any device, with or without gradient), numpy arrays or lists. Nothing is
estimated here. ``ax=None`` makes a figure of its own; pass ``ax`` to compose several plots, best on
``plt.subplots(..., layout="constrained")``. Images are rows of pixels in [0, 1], laid out by
``shape``: ``(H, W)``, ``(1, H, W)`` or ``(3, H, W)``; NaN pixels are missing and drawn tinted.
"""

from ppvae.plots.curves import khat, latent_scatter, training_curve
from ppvae.plots.estimators import (
    bound_against_particles,
    snr_against_particles,
    variance_against_time,
)
from ppvae.plots.images import (
    class_grid,
    image_grid,
    interpolation,
    manifold,
    quadrant_completion,
    reconstructions,
)

__all__ = [
    "bound_against_particles",
    "class_grid",
    "image_grid",
    "interpolation",
    "khat",
    "latent_scatter",
    "manifold",
    "quadrant_completion",
    "reconstructions",
    "snr_against_particles",
    "training_curve",
    "variance_against_time",
]
