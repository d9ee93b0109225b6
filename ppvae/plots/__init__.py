"""Pictures of what training and diagnosis return: ``f(values, ax=None) -> ax``.

Values are torch tensors (any device, with or without gradient), numpy arrays or lists. Nothing is
estimated here. ``ax=None`` makes a figure of its own; pass ``ax`` to compose several plots, best on
``plt.subplots(..., layout="constrained")``. Images are rows of pixels in [0, 1], laid out by
``shape``: ``(H, W)``, ``(1, H, W)`` or ``(3, H, W)``; NaN pixels are missing and drawn tinted.
"""

from ppvae.plots.codes import code_maps, code_usage
from ppvae.plots.curves import khat, latent_scatter, seed_curves, training_curve
from ppvae.plots.diagnostics import (
    coverage,
    khat_histogram,
    khat_images,
    kl_per_unit,
    predictive_check,
    rate_distortion,
    ratio_calibration,
    sbc_ecdf,
    worst_points,
)
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
from ppvae.plots.models import em_steps, gaussian_components, levels_over_training
from ppvae.plots.posteriors import gap_bars, posterior_contours, posterior_intervals
from ppvae.plots.programs import plates

__all__ = [
    "bound_against_particles",
    "class_grid",
    "code_maps",
    "code_usage",
    "coverage",
    "em_steps",
    "gap_bars",
    "gaussian_components",
    "image_grid",
    "interpolation",
    "khat",
    "khat_histogram",
    "khat_images",
    "kl_per_unit",
    "latent_scatter",
    "levels_over_training",
    "manifold",
    "plates",
    "posterior_contours",
    "posterior_intervals",
    "predictive_check",
    "quadrant_completion",
    "rate_distortion",
    "ratio_calibration",
    "reconstructions",
    "sbc_ecdf",
    "seed_curves",
    "snr_against_particles",
    "training_curve",
    "variance_against_time",
    "worst_points",
]
