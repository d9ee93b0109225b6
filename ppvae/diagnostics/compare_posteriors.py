"""A guide beside a reference posterior, datapoint by datapoint."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ppvae.arguments import takes_numbers
from ppvae.diagnostics.chains import PosteriorDraws
from ppvae.diagnostics.joint import Joint
from ppvae.diagnostics.rows import bound, check_at_least
from ppvae.intake import takes_rows
from ppvae.pairs import seeded


@dataclass(frozen=True)
class PosteriorComparison:
    r"""q(z | x) beside draws of p(z | x), N datapoints, d numbers each: the latents side by side.

    Lengths are in units of the reference's standard deviation of that latent and datapoint, so 0
    is a perfect mean and 1 a perfect spread. Rows where the reference did not converge are NaN.

    Attributes:
        names: of the d numbers: ``"z[0]"``, ``"z[1]"``, ...
        mean_error: ``(N, d)``, (mean of q - mean of p) / sd of p.
        sd_ratio: ``(N, d)``, sd of q / sd of p: below 1, q is too narrow.
        wasserstein1, wasserstein2: ``(N, d)``, distances of the marginals.
        sliced: ``(N,)``, root mean square of the 2-Wasserstein distance over random directions, of
            the d numbers together: it sees correlations, which the marginals do not.
        correlation_error: ``(N,)``, the largest difference of a correlation, q's from p's; 0 for
            d = 1.
        floor: ``(N,)``, ``sliced`` between one half of the reference's chains and the other: what
            the noise of finite draws alone gives; ``sliced`` below it means nothing.
        guide_draws, reference_draws: ``(S, N, d)``, for plots.
    """

    names: tuple[str, ...]
    mean_error: Tensor
    sd_ratio: Tensor
    wasserstein1: Tensor
    wasserstein2: Tensor
    sliced: Tensor
    correlation_error: Tensor
    floor: Tensor
    guide_draws: Tensor = field(repr=False)
    reference_draws: Tensor = field(repr=False)

    def table(self) -> Any:
        """One row per datapoint and latent, as a ``pandas.DataFrame``."""
        import pandas

        N, d = self.mean_error.shape
        columns = {
            name: getattr(self, name).flatten().tolist()
            for name in ("mean_error", "sd_ratio", "wasserstein1", "wasserstein2")
        }
        index = {
            "datapoint": [n for n in range(N) for _ in range(d)],
            "latent": list(self.names) * N,
        }
        return pandas.DataFrame(index | columns)

    def summary(self) -> Any:
        """One row per datapoint, as a ``pandas.DataFrame``: the worst latent, and all together."""
        import pandas

        return pandas.DataFrame(
            {
                "worst_mean_error": self.mean_error.abs().amax(-1).tolist(),
                "smallest_sd_ratio": self.sd_ratio.amin(-1).tolist(),
                "largest_sd_ratio": self.sd_ratio.amax(-1).tolist(),
                "correlation_error": self.correlation_error.tolist(),
                "sliced": self.sliced.tolist(),
                "floor": self.floor.tolist(),
            }
        )

    def __repr__(self) -> str:
        passed = ~self.sliced.isnan()
        N, d = self.mean_error.shape
        lines = [f"q(z | x) beside p(z | x): {N} datapoints, {d} latents [sd of the posterior]"]
        if not passed.any():
            return lines[0] + "\nverdict            no datapoint of the reference converged"
        ratio, shift = self.sd_ratio[passed], self.mean_error[passed].abs()
        far = self.sliced[passed] > 2 * self.floor[passed]
        lines += [
            f"mean error         median {shift.median().item():.2f}, largest "
            f"{shift.max().item():.2f}",
            f"sd ratio           median {ratio.median().item():.2f}, from {ratio.min().item():.2f} "
            f"to {ratio.max().item():.2f}",
            f"correlation error  median {self.correlation_error[passed].median().item():.2f}, "
            f"largest {self.correlation_error[passed].max().item():.2f}",
            f"sliced W2          median {self.sliced[passed].median().item():.2f}, noise alone "
            f"{self.floor[passed].median().item():.2f}",
        ]
        if not passed.all():
            lines.append(
                f"reference          {int((~passed).sum())} datapoints did not converge: NaN"
            )
        lines.append(f"verdict            {self._verdict(far, shift, ratio, passed)}")
        return "\n".join(lines)

    def _verdict(self, far: Tensor, shift: Tensor, ratio: Tensor, passed: Tensor) -> str:
        if not far.any():
            return "not told from the reference at this number of draws"
        faults = {
            "its means are off": (shift.amax(-1) > 0.5).double().mean().item(),
            "it is too narrow": (ratio.amin(-1) < 0.7).double().mean().item(),
            "it is too wide": (ratio.amax(-1) > 1.4).double().mean().item(),
            "it misses correlations": (self.correlation_error[passed] > 0.3).double().mean().item(),
        }
        shown = [f"{name} on {share:.0%}" for name, share in faults.items() if share > 0.05]
        what = "; ".join(shown) or "no single fault is large"
        return f"differs on {far.double().mean().item():.0%} of datapoints: {what}"


@takes_numbers
@takes_rows
def compare_posteriors(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    reference: PosteriorDraws,
    num_directions: int = 50,
    seed: int | None = None,
    **kwargs: Any,
) -> PosteriorComparison:
    r"""Compare the guide's q(z | x) with reference draws of p(z | x), per datapoint.

    As many draws are taken from the guide as the reference has, so that marginal distances come
    from the sorted draws of both,

    .. math:: W_p^p = \frac1S \sum_s |q_{(s)} - p_{(s)}|^p

    and the sliced distance is the same along random directions. Finite draws of equal
    distributions are not 0 apart: compare with ``floor``.

    Args:
        model, guide: Pyro programs.
        *args: the data of the reference, as both are called.
        reference: of :func:`~ppvae.diagnostics.hmc`, ``metropolis`` or ``nuts``.
        num_directions: random directions of the sliced distance.
        seed: draw with this seed and leave the random stream as it was; None: draw from it.
        **kwargs: passed to both programs whole: tables, flags. Only ``args`` are cut by rows.

    Returns:
        :class:`~ppvae.diagnostics.PosteriorComparison`.

    Raises:
        ValueError: the reference is of other data or another model.

    Source: Bonneel, Rabin, Peyré & Pfister, Sliced and Radon Wasserstein barycenters, 2015.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from ppvae import diagnostics
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0., 1.))
        ...         pyro.sample("x", dist.Normal(z, 1.), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5 * 0.5 ** 0.5))  # half as wide
        >>> x = torch.tensor([0., 2.])
        >>> draws = diagnostics.hmc(model, guide, x, seed=0)
        >>> result = diagnostics.compare_posteriors(model, guide, x, reference=draws, seed=0)
        >>> bool(((result.sd_ratio - 0.5).abs() < 0.05).all())
        True
    """
    model, guide = bound(model, guide, kwargs)
    joint = Joint(model, guide, *args)
    chains, kept, N = reference.unconstrained.shape[:3]
    if joint.num_datapoints != N or reference.draws.keys() != joint.layouts.keys():
        raise ValueError(
            f"the reference has {N} datapoints and latents {sorted(reference.draws)}, the data "
            f"{joint.num_datapoints} and the model {sorted(joint.layouts)}; run hmc on these data"
        )
    check_at_least(1, num_directions=num_directions)
    with seeded(seed, *args), torch.no_grad():
        names, q, p = _draws_side_by_side(joint, reference)
        directions = torch.randn(q.shape[-1], num_directions, dtype=torch.float64)
    directions = directions / directions.norm(dim=0)

    p = torch.where(reference.converged.unsqueeze(-1), p, math.nan)
    centre, sd = p.mean(0), p.std(0)
    q_scaled, p_scaled = (q - centre) / sd, (p - centre) / sd
    apart = q_scaled.sort(0).values - p_scaled.sort(0).values
    by_chain = p_scaled.unflatten(0, (chains, kept))
    half = chains // 2
    first, second = by_chain[:half].flatten(0, 1), by_chain[half : 2 * half].flatten(0, 1)
    missed = _correlations(q_scaled) - _correlations(p_scaled)
    return PosteriorComparison(
        names=tuple(names),
        mean_error=q_scaled.mean(0),
        sd_ratio=q_scaled.std(0),
        wasserstein1=apart.abs().mean(0),
        wasserstein2=apart.square().mean(0).sqrt(),
        sliced=_sliced(q_scaled, p_scaled, directions),
        correlation_error=missed.abs().flatten(1).amax(-1),
        floor=_sliced(first, second, directions),
        guide_draws=q,
        reference_draws=p,
    )


def _draws_side_by_side(
    joint: Joint, reference: PosteriorDraws
) -> tuple[list[str], Tensor, Tensor]:
    """Names of the d numbers, and draws of guide and reference, ``(S, N, d)`` each."""
    chains, kept, N = reference.unconstrained.shape[:3]
    total = chains * kept
    drawn = joint.constrain(
        torch.cat([joint.draw_q(min(500, total - s)) for s in range(0, total, 500)])
    )
    names, q, p = [], [], []
    for site in joint.layouts:
        q.append(drawn[site].double().cpu().reshape(total, N, -1))
        p.append(reference.flat(site).double().reshape(total, N, -1))
        size = p[-1].shape[-1]
        names += [site] if size == 1 else [f"{site}[{i}]" for i in range(size)]
    return names, torch.cat(q, -1), torch.cat(p, -1)


def _sliced(first: Tensor, second: Tensor, directions: Tensor) -> Tensor:
    """Root mean square over directions of the W2 between draws ``(S, N, d)``, ``(N,)``."""
    squares = [
        ((first @ d).sort(0).values - (second @ d).sort(0).values).square().mean(0)
        for d in directions.T
    ]
    return torch.stack(squares).mean(0).sqrt()


def _correlations(draws: Tensor) -> Tensor:
    """Correlation matrices of draws ``(S, N, d)``, ``(N, d, d)``."""
    centred = draws - draws.mean(0)
    scaled = centred / centred.square().mean(0).sqrt()
    return torch.einsum("snd,sne->nde", scaled, scaled) / len(draws)
