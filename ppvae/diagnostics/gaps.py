"""Where a guide loses nats: its family, or the network that serves all datapoints at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ppvae.arguments import takes_numbers
from ppvae.diagnostics.ais import ais, reverse_ais
from ppvae.diagnostics.chains import PosteriorDraws
from ppvae.diagnostics.rows import (
    bound,
    check_at_least,
    check_log_evidence,
    check_pair_and_data,
    count_rows,
    rows_per_piece,
    standard_error,
    take,
)
from ppvae.intake import takes_rows
from ppvae.local import Indexed, fit_local
from ppvae.pairs import evaluation_mode, seeded
from ppvae.weights import whole_weights

OWN = "own family"


@dataclass(frozen=True)
class Gaps:
    r"""The inference gap of each of N datapoints, split in two. Nats, float64, on the CPU.

    .. math:: \underbrace{\log p(x) - L[q]}_{\text{total}} =
              \underbrace{\log p(x) - L[q^*]}_{\text{approximation}} +
              \underbrace{L[q^*] - L[q]}_{\text{amortisation}}

    Attributes:
        log_evidence: ``(N,)``, the estimate of log p(x) used.
        log_evidence_se: ``(N,)``, its Monte-Carlo standard error; 0 if it was given.
        upper, upper_se: ``(N,)``, an estimate from above, NaN where the reference did not converge,
            and its standard error; or None. See ``note``.
        elbo, elbo_se: ``(N,)``, L[q] of the guide.
        local, local_se: by family, ``(N,)``: L[q*] of the best q of each family for each
            datapoint. The first is the one that splits the total.
        note: what ``log_evidence`` and ``upper`` are.
    """

    log_evidence: Tensor
    log_evidence_se: Tensor
    upper: Tensor | None
    upper_se: Tensor | None
    elbo: Tensor
    elbo_se: Tensor
    local: dict[str, Tensor]
    local_se: dict[str, Tensor]
    note: str = field(repr=False)

    @property
    def total(self) -> Tensor:
        """log p(x) - L[q] = KL(q || p(z | x)), ``(N,)``."""
        return self.log_evidence - self.elbo

    @property
    def approximation(self) -> Tensor:
        """log p(x) - L[q*], ``(N,)``: what no q of the family could avoid."""
        return self.log_evidence - next(iter(self.local.values()))

    @property
    def amortisation(self) -> Tensor:
        """L[q*] - L[q], ``(N,)``: what the network gives away by serving all datapoints."""
        return next(iter(self.local.values())) - self.elbo

    @property
    def approximation_se(self) -> Tensor:
        """Monte-Carlo standard error of :attr:`approximation`, ``(N,)``."""
        return (self.log_evidence_se.square() + self._first_se.square()).sqrt()

    @property
    def amortisation_se(self) -> Tensor:
        """Monte-Carlo standard error of :attr:`amortisation`, ``(N,)``."""
        return (self.elbo_se.square() + self._first_se.square()).sqrt()

    @property
    def _first_se(self) -> Tensor:
        return next(iter(self.local_se.values()))

    def table(self) -> Any:
        """Means over datapoints as a ``pandas.DataFrame``, nats per datapoint.

        One row per quantity, with its standard error over datapoints (``se``: for the population
        they come from) and its Monte-Carlo error (``mc_se``: for these very datapoints).
        """
        import pandas

        def row(values: Tensor, *errors: Tensor) -> dict[str, float]:
            monte_carlo = sum((e.square() for e in errors), torch.zeros_like(values))
            return {
                "mean": values.mean().item(),
                "se": standard_error(values),
                "mc_se": monte_carlo.mean().sqrt().item() / math.sqrt(max(len(values), 1)),
            }

        rows = {"log p(x)": row(self.log_evidence, self.log_evidence_se)}
        if self.upper is not None and self.upper_se is not None:
            has = ~self.upper.isnan()
            width = (self.upper - self.log_evidence)[has]
            rows["upper - lower"] = row(width, self.log_evidence_se[has], self.upper_se[has])
        rows["L[q]"] = row(self.elbo, self.elbo_se)
        for name, values in self.local.items():
            rows[f"L[q*], {name}"] = row(values, self.local_se[name])
        rows["total gap"] = row(self.total, self.log_evidence_se, self.elbo_se)
        rows["approximation gap"] = row(self.approximation, self.approximation_se)
        rows["amortisation gap"] = row(self.amortisation, self.amortisation_se)
        for name, values in list(self.local.items())[1:]:
            rows[f"approximation gap, {name}"] = row(
                self.log_evidence - values, self.log_evidence_se, self.local_se[name]
            )
        return pandas.DataFrame.from_dict(rows, orient="index")

    def __repr__(self) -> str:
        table = self.table()
        lines = [f"Inference gaps of {len(self.elbo)} datapoints [nats per datapoint]"]
        lines += [
            f"{name:<34}{r['mean']:10.3f} ± {r['se']:.3f} over datapoints, ± {r['mc_se']:.3f} "
            "Monte Carlo"
            for name, r in table.iterrows()
        ]
        difference = self.approximation - self.amortisation
        if not abs(difference.mean().item()) >= 2 * standard_error(difference):
            verdict = "neither dominates beyond its standard error"
        elif difference.mean() > 0:
            verdict = "the family dominates: try a richer q (full covariance, flow, mixture)"
        else:
            verdict = "amortisation dominates: try a larger or longer trained encoder, or refine q"
        return "\n".join([*lines, f"log p(x) is {self.note}", f"verdict: {verdict}"])


@takes_numbers
@takes_rows
def gaps(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    local: Mapping[str, nn.Module] | None = None,
    log_evidence: Tensor | None = None,
    reference: PosteriorDraws | None = None,
    num_particles: int = 2_000,
    steps: int | None = None,
    lr: float = 0.05,
    natural: bool = False,
    num_chains: int = 16,
    num_temperatures: int = 200,
    start: Literal["guide", "prior"] = "guide",
    max_rows: int = 10_000,
    seed: int | None = None,
    **kwargs: Any,
) -> Gaps:
    r"""Split log p(x) - ELBO into an approximation gap and an amortisation gap.

    q* is the q of the guide's own family whose parameters are optimised for one datapoint alone,
    the model held fixed (:func:`ppvae.local.fit_local`, all datapoints at once). log p(x) is
    annealed importance sampling from q*: a stochastic lower bound, so that what it lacks makes the
    approximation gap look smaller, never larger. With ``reference``, reverse annealing from these
    draws gives an estimate from above.

    Args:
        model, guide: Pyro programs.
        *args: data, as both are called.
        local: guides with parameters per datapoint, by the name of their family, called with
            ``(*args, row numbers)`` and *optimised in place*. The first splits the total. None:
            ``{"own family": guide.local(*args)}``; to add a richer family pass that and another.
        log_evidence: ``(N,)``, log p(x) where it is known, as from
            :func:`~ppvae.diagnostics.quadrature`; None estimates it.
        reference: draws of :func:`~ppvae.diagnostics.hmc` at these data, for the upper side.
        num_particles: draws per datapoint for each ELBO, >= 2.
        steps, lr, natural: of the local optimisation; ``natural=True`` is many times faster for
            families of normals (:func:`ppvae.local.fit_local`).
        num_chains, num_temperatures: of annealing, see :func:`~ppvae.diagnostics.ais`.
        start: where annealing starts: q*, or the prior, for families that have no density at given
            latents.
        max_rows: largest number of (particle, datapoint) rows computed at once.
        seed: draw with this seed and leave the random stream as it was; None: draw from it.
        **kwargs: passed to both programs whole: tables, flags. Only ``args`` are cut by rows.

    Returns:
        :class:`~ppvae.diagnostics.Gaps`.

    Raises:
        ValueError: the guide has no method ``local`` and none was passed; ``log_evidence`` or
            ``reference`` are of other data; as :func:`~ppvae.diagnostics.ais`.
        PairError: empty, NaN or infinite data.

    Source: Cremer, Li & Duvenaud, Inference Suboptimality in Variational Autoencoders, 2018.

    Example:
        >>> import torch
        >>> from ppvae import conditionals, diagnostics, guides, models, nets
        >>> model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
        >>> guide = guides.Normal(nets.mlp(4, 8, 2 * 2))  # neither is trained
        >>> x = torch.bernoulli(torch.full((5, 4), 0.5))
        >>> result = diagnostics.gaps(model, guide, x, steps=200, num_temperatures=20, seed=0)
        >>> bool((result.amortisation > result.approximation).all())
        True
    """
    amortised = guide
    model, guide = bound(model, guide, kwargs)
    check_at_least(2, num_particles=num_particles)
    rows = check_pair_and_data(model, guide, args)
    _check_given(rows, log_evidence, reference, local)
    families = {OWN: own_family(amortised, *args)} if local is None else local
    indexed = Indexed(model)
    index = torch.arange(rows, device=next(a.device for a in args if isinstance(a, Tensor)))
    annealing: dict[str, Any] = {
        "start": start,
        "num_chains": num_chains,
        "num_temperatures": num_temperatures,
        "max_rows": max_rows,
    }
    upper = upper_se = None
    with seeded(seed, *args):
        elbo, elbo_se = _elbo(model, guide, args, num_particles, max_rows)
        best, best_se = {}, {}
        for name, family in families.items():
            fit_local(indexed, family, *args, index, steps=steps, lr=lr, natural=natural, seed=None)
            best[name], best_se[name] = _elbo(
                indexed, family, (*args, index), num_particles, max_rows
            )
        first = next(iter(families.values()))
        if log_evidence is not None:
            value, note = log_evidence.detach().double().cpu(), "as given"
            se = torch.zeros_like(value)
        else:
            lower = ais(indexed, first, *args, index, **annealing)
            value, se = lower.log_evidence, lower.log_evidence_se
            origin = "q*" if start == "guide" else "the prior"
            note = f"a stochastic lower bound: AIS, {num_temperatures} temperatures from {origin}"
        if reference is not None:
            above = reverse_ais(indexed, first, *args, index, draws=reference, **annealing)
            upper, upper_se = above.log_evidence, above.log_evidence_se
            note += f"; the upper side: reverse AIS from {reference.method} draws, if exact"
    return Gaps(value, se, upper, upper_se, elbo, elbo_se, best, best_se, note)


def _check_given(
    rows: int,
    log_evidence: Tensor | None,
    reference: PosteriorDraws | None,
    local: Mapping[str, nn.Module] | None,
) -> None:
    if log_evidence is not None:
        check_log_evidence(log_evidence, rows)
    if reference is not None and reference.num_datapoints != rows:
        raise ValueError(
            f"reference is of {reference.num_datapoints} datapoints, but the data have {rows}; run "
            "hmc on these very data"
        )
    if local is not None and not local:
        raise ValueError('local must name at least one family, e.g. {"own family": guide.local(x)}')


def own_family(guide: Any, *args: Any) -> nn.Module:
    """The guide's family with parameters per datapoint; raises ``ValueError`` with the cure."""
    if not hasattr(guide, "local"):
        raise ValueError(
            f"{type(guide).__name__} has no method local(x) that gives its family with parameters "
            "per datapoint; use guides.Normal or guides.Amortized, or pass "
            "local={name: guides.PerDatapoint(...)}"
        )
    family: nn.Module = guide.local(*args)
    return family


def _elbo(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    num_particles: int,
    max_rows: int,
) -> tuple[Tensor, Tensor]:
    """The ELBO of each datapoint and its Monte-Carlo standard error, ``(N,)`` each."""
    means, errors = [], []
    with torch.no_grad(), evaluation_mode(model, guide):
        for part in torch.arange(count_rows(args)).split(rows_per_piece(num_particles, max_rows)):
            batch = take(args, part)
            log_w = whole_weights(model, guide, batch, {}, num_particles).log_w.double()
            means.append(log_w.mean(0).cpu())
            errors.append((log_w.std(0) / math.sqrt(num_particles)).cpu())
    return torch.cat(means), torch.cat(errors)
