"""What ArviZ 0.x and 1.x call by other names."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ppvae.diagnostics.evidence import Evidence

Variables = dict[str, tuple[list[str], Any]]  # by name: dimensions, and an array


def require_arviz() -> None:
    """Raise ``ImportError`` with the cure if ArviZ is missing: before any work."""
    try:
        with warnings.catch_warnings():  # what it imports adds filters for the whole process
            import arviz  # noqa: F401
    except ImportError as error:
        raise ImportError("this needs ArviZ: pip install arviz") from error


def bundle(groups: Mapping[str, Variables], coords: dict[str, Any] | None = None) -> Any:
    """``InferenceData`` on ArviZ 0.x, ``DataTree`` on 1.x, of the groups that are not empty."""
    import arviz
    import xarray

    datasets: dict[str, Any] = {}
    for name, variables in groups.items():
        sizes = {d: n for ds, a in variables.values() for d, n in zip(ds, a.shape, strict=True)}
        index = {d: (coords or {}).get(d, np.arange(n)) for d, n in sizes.items()}
        if variables:
            datasets[name] = xarray.Dataset(variables, coords=index)
    if arviz.__version__.startswith("0."):
        return arviz.InferenceData(**datasets)
    return xarray.DataTree.from_dict(datasets)


def elpd(evidence: Evidence) -> Any:
    """Log p(x) as ArviZ's ``ELPDData``, see :meth:`ppvae.diagnostics.Report.to_elpd`."""
    require_arviz()
    import arviz
    import xarray

    count = len(evidence.khat)
    points, k = (
        xarray.DataArray(v.numpy(), dims=["datapoint"], coords={"datapoint": np.arange(count)})
        for v in (evidence.log_evidence, evidence.khat)
    )
    common = {
        "se": evidence.mean_se * count,
        "n_samples": evidence.num_particles,
        "n_data_points": count,
        "warning": bool(evidence.unreliable > 0),
        "pareto_k": k,
        "scale": "log",
        "good_k": 0.7,
    }
    total = float(points.sum())
    if arviz.__version__.startswith("0."):
        from arviz.stats.stats_utils import ELPDData

        values = {"elpd_loo": total, "se": 0.0, "p_loo": np.nan, "loo_i": points, **common}
        return ELPDData(data=list(values.values()), index=list(values))
    from arviz_stats.utils import ELPDDataLOO  # type: ignore[import-not-found, unused-ignore]

    return ELPDDataLOO(elpd=total, p=np.nan, elpd_i=points, **common)
