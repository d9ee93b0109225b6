"""How far the codes of a guide are from independent: the total correlation of q(z)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppvae.arguments import takes_numbers
from ppvae.check.programs import check_programs, require_runs
from ppvae.diagnostics.rows import check_at_least, check_data, evaluating, standard_error
from ppvae.elbo.disentangling import code_covariance
from ppvae.elbo.kl import independent_units
from ppvae.intake import takes_rows
from ppvae.pairs import Program, sample_sites, trace


class TotalCorrelation(NamedTuple):
    r""":math:`\mathrm{KL}(q(z) \,\|\, \prod_j q(z_j))` in nats, two ways; 0 for independent codes.

    Attributes:
        gaussian: of a Gaussian with the mean and covariance of q(z), exact: what is linear.
        aggregate: of q(z) itself, the mixture over the given datapoints, by draws of it; for these
            datapoints unbiased. For few of them it is large: a mixture of N points apart
            has up to (D - 1) log N.
        standard_error: of ``aggregate``, over draws and datapoints.
    """

    gaussian: float
    aggregate: float
    standard_error: float


@takes_numbers
@takes_rows
def total_correlation(
    guide: Program,
    *args: Any,
    num_draws: int = 2000,
    max_pairs: int = 1_000_000,
    seed: int | None = 0,
) -> TotalCorrelation:
    r"""The total correlation of the aggregated posterior of the given datapoints.

    .. math:: \tfrac12 \Big(\sum_j \log S_{jj} - \log\det S\Big), \qquad
              \mathbb E_{q(z)}\Big[\log q(z) - \sum_j \log q(z_j)\Big], \qquad
              q(z) = \frac1N \sum_n q(z \mid x_n)

    with S the covariance of q(z). Neither is the other: the first sees linear dependence only.

    Args:
        guide: draws one latent, a vector or map of independent dimensions given x.
        *args: data as it is called, N >= 2 rows: a few thousand, which are encoded at once.
        num_draws: of q(z); spread evenly over the rows.
        max_pairs: densities q(z | x) computed at once, which bounds the memory.
        seed: of the draws; None for torch's stream.

    Raises:
        ValueError: another latent beside it, or dimensions that depend on each other given x; bad
            numbers.
        PairError: data that the guide cannot be called with.

    Source: Watanabe, Information Theoretical Analysis of Multivariate Correlation, 1960; for q(z):
        Chen et al. 2018, Locatello et al. 2019 (the fitted Gaussian).

    Example:
        >>> from ppvae import diagnostics, guides
        >>> guide = guides.Normal(torch.nn.Linear(2, 2 * 2))
        >>> _ = guide.requires_grad_(False)
        >>> _ = guide.conditional.net.bias.zero_()
        >>> _ = guide.conditional.net.weight.copy_(torch.eye(4, 2))  # the code is x
        >>> _ = guide.conditional.net.weight[2:].zero_()
        >>> square = torch.tensor([[-9., -9.], [9., -9.], [-9., 9.], [9., 9.]])
        >>> diagonal = square[[0, 3]]  # one dimension tells the other: log 2
        >>> found = [diagnostics.total_correlation(guide, x) for x in (square, diagonal)]
        >>> [round(tc.aggregate, 3) for tc in found]
        [0.0, 0.693]
    """
    check_programs(guide=guide)
    check_at_least(1, num_draws=num_draws, max_pairs=max_pairs)
    rows = check_data(guide, args)
    check_at_least(2, rows=rows)
    require_runs(args, guide=guide)
    with evaluating(guide, guide, args, seed):
        units, dims = _units(guide, args)
        covariance = code_covariance(units, with_variance=True, dims=dims).double()
        chosen = torch.linspace(0, rows - 1, min(rows, num_draws)).round().long()
        repeats = -(-num_draws // len(chosen))
        draws = units.sample((repeats,))[:, chosen.to(covariance.device)].flatten(0, 1)
        values = torch.cat([_log_ratio(units, z) for z in draws.split(max(1, max_pairs // rows))])
    gaussian = 0.5 * (covariance.diagonal().log().sum() - covariance.logdet())
    by_datapoint = values.reshape(repeats, -1).mean(0)
    return TotalCorrelation(gaussian.item(), values.mean().item(), standard_error(by_datapoint))


def _log_ratio(units: Any, draws: Tensor) -> Tensor:
    """Log of q(z) over the product of its marginals, at draws ``(m, *event)``; ``(m,)``."""
    densities = units.log_prob(draws.unsqueeze(1)).flatten(2).double()  # (m, N, D)
    by_unit = densities.logsumexp(1) - math.log(densities.shape[1])
    joint: Tensor = densities.sum(-1).logsumexp(1) - math.log(densities.shape[1])
    return joint - by_unit.sum(-1)


def _units(guide: Program, args: tuple[Any, ...]) -> tuple[Any, int]:
    """q(z | x) of each row and unit, of batch shape ``(N, *event)``; and the event's dims."""
    sites = sample_sites(trace(guide, args, {}))
    found = [independent_units(site) for site in sites.values()]
    only = found[0] if len(found) == 1 else None
    if only is None or len(only[0].batch_shape) != 1 + only[2]:
        kinds = {name: type(site["fn"]).__name__ for name, site in sites.items()}
        raise ValueError(
            f"the guide draws {kinds}, and total_correlation is of one latent, a vector or "
            "map of dimensions that are independent given x (.to_event(1)), in no inner plate"
        )
    return only[0], only[2]
