"""``diagnose``: what a pair's draws tell about every datapoint and every latent unit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ppvae.arguments import takes_numbers
from ppvae.diagnostics.evidence import Evidence, require_alike, together, weigh
from ppvae.diagnostics.given_globals import Given, JointEvidence, all_rows_together, at_a_draw
from ppvae.diagnostics.psis import MIN_TAIL, tail_length
from ppvae.diagnostics.report import Report
from ppvae.diagnostics.rows import (
    bound,
    check_at_least,
    check_pair_and_data,
    evaluating,
    take,
)
from ppvae.diagnostics.simulated import over_simulations
from ppvae.diagnostics.summaries import Aggregate, AveragedTerms, SiteTerms, aggregate
from ppvae.intake import takes_rows
from ppvae.pairs import FAILURES, Program, reason, structure
from ppvae.terms import NoInverse

_SIMULATED_DRAWS = 10  # of the guide for each simulation


@takes_numbers
@takes_rows
def diagnose(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_particles: int = 1000,
    max_rows: int = 10_000,
    threshold: float = 0.01,
    num_aggregate: int = 1000,
    num_simulations: int = 1000,
    num_globals: int = 25,
    seed: int | None = None,
    fabric: Any = None,
    **kwargs: Any,
) -> Report:
    r"""Ask whether a pair's posterior can be trusted, datapoint by datapoint and unit by unit.

    One pass over K draws per datapoint gives log p(x) with its standard error, the effective
    sample size, Pareto k-hat, ELBO and gap, the KL of every latent, and the reconstruction. From
    these follow active units, collapse and the rate-distortion point; further draws give the
    mutual information

    .. math:: I_q(x; z) = E\,\log\frac{q(z \mid x)}{q(z)},\qquad
              E\,\mathrm{KL}(q(z \mid x) \,\|\, p(z)) = I_q(x; z) + \mathrm{KL}(q(z) \,\|\, p(z))

    with :math:`q(z) = \frac1N \sum_n q(z \mid x_n)` over the datapoints given. Where q and p have a
    closed-form KL that is valid, KL is that; elsewhere the mean over the draws. Where the
    model can draw x, the divergence of guide and posterior over simulations
    (:func:`~ppvae.diagnostics.simulated_divergence`) sees modes that no draw of the guide shows.
    Programs run in evaluation mode.

    Of a pair with latents outside the data plate all of this is of the rows given the globals,
    averaged over S draws of them: E_q(g) log p(x | g), and the worst k-hat of the S. Beside it
    stand the evidence of all rows together and a table of the globals, as :func:`joint_evidence`
    has them. Mutual information and simulations are left out.

    Args:
        model, guide: Pyro programs, ppvae's or your own.
        *args: data, as both are called; the first dimension of each tensor is the datapoints.
        num_particles: K >= 21: k-hat is a fit to the largest min(K / 5, 3 sqrt(K)) weights, and
            five are the least.
        max_rows: largest number of (particle, datapoint) rows computed at once, which bounds the
            memory: with a 784-200-200-784 decoder 10,000 rows take about 0.2 GB.
        threshold: a unit is active if the variance of its posterior mean exceeds this, > 0
            (Burda et al.: 0.01).
        num_aggregate: about so many draws of z, of datapoints spread over the data, for the mutual
            information, which takes ``num_aggregate * N`` densities q(z | x); 0 leaves it out.
        num_simulations: datapoints drawn from the model for the divergence, >= 100, of which each
            takes 11 decoder rows (the data take ``num_particles`` each); 0 leaves it out.
        num_globals: S >= 2 draws of latents outside the data plate, where there are some; each
            takes ``num_particles`` decoder rows for every datapoint, and 21 have a k-hat.
        seed: draw with this seed and leave the random stream as it was; None: draw from it.
        fabric: as of :func:`~ppvae.diagnostics.log_evidence`; every process gets the whole report.
            Mutual information and simulations each works out by itself, alike, so with several
            processes ``seed`` has to be given for them.
        **kwargs: passed to both programs whole: tables, flags. Only ``args`` are cut by rows.

    Returns:
        :class:`~ppvae.diagnostics.Report`; print it.

    Raises:
        ValueError: bad arguments or data; the pair does not fit; a weight is NaN or infinite. The
            message names argument, datapoint or site.

    Source: Burda, Grosse & Salakhutdinov 2016 (evidence, active units, appendix C); Vehtari et al.
    2024 (k-hat); Yao et al., Yes, but did it work?, 2018; Hoffman & Johnson 2016 (decomposition);
    Alemi et al., Fixing a broken ELBO, 2018 (rate and distortion); Domke 2021 (simulations).

    Example:
        >>> import pyro, pyro.distributions as dist, torch, ppvae
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.).to_event(1))
        ...         pyro.sample("x", dist.Normal(z, 1.).to_event(1), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.8).to_event(1))  # a little too wide
        >>> x = 2 ** 0.5 * torch.randn(500, 1)
        >>> report = ppvae.diagnose(model, guide, x, num_particles=200, seed=0)
        >>> report.active_units, bool((report.khat < 0.7).all())
        (1, True)
        >>> print(report.verdict[0])
        k-hat <= 0.7 on all points: log p(x) and its standard errors can be trusted at K = 200.
    """
    found, divergence, joint = None, None, None
    with together(fabric) as processes:
        model, guide = bound(model, guide, kwargs)
        check_at_least(1, num_particles=num_particles, max_rows=max_rows)
        if tail_length(num_particles) < MIN_TAIL:
            raise ValueError(
                f"num_particles={num_particles} is too few for k-hat: pass 21 or more, 1000 for "
                "numbers to report; diagnostics.log_evidence takes fewer"
            )
        if not threshold > 0:
            raise ValueError(f"threshold must be positive, got {threshold}")
        check_at_least(0, num_aggregate=num_aggregate)
        check_at_least(100 if num_simulations else 0, num_simulations=num_simulations)
        check_at_least(2, num_globals=num_globals)
        several = processes is not None and processes.size > 1
        if several and seed is None:
            raise ValueError("seed: give one, so that all processes report the same simulations")
        rows = check_pair_and_data(model, guide, args, with_globals=True)
        require_alike(
            *(processes, model, guide, args),
            num_particles=num_particles,
            num_aggregate=num_aggregate,
            num_simulations=num_simulations,
            max_rows=max_rows,
            seed=seed,
        )
        if structure(model, guide, args, {}).has_globals:
            if several:
                raise ValueError("fabric: a pair with global latents is diagnosed by one process")
            evidence, terms, joint = _over_globals(
                model, guide, args, rows, num_globals, num_particles, max_rows, seed
            )
            absent = terms.absent
            absent["mutual information"] = (
                "that of rows and latents is given the globals; diagnose the pair at one draw of "
                "them, diagnostics.given_globals"
            )
            absent["divergence over simulations"] = (
                "q of the globals is that of these data, and simulated rows would have others"
            )
        else:
            terms = SiteTerms(rows, num_particles)
            evidence = weigh(
                model, guide, args, num_particles, max_rows, seed, terms, processes=processes
            )
            if processes is not None:
                terms.gather(processes)
            absent = terms.absent
            if rows == 1:
                absent["activity and mutual information"] = "they take two datapoints"
            elif num_aggregate:
                found = _aggregate(model, guide, args, 10 * max_rows, num_aggregate, seed, absent)
            if num_simulations:
                try:
                    divergence = over_simulations(
                        model, guide, args, rows, num_simulations, _SIMULATED_DRAWS, max_rows, seed
                    )
                except (*FAILURES, NoInverse) as error:  # of a pair that is right on the data
                    absent["divergence over simulations"] = reason(error)
    mean, square, variance = (terms.column(q) for q in ("mean", "square", "variance"))
    marginal_mean = {site: value.mean(0) for site, value in mean.items()}
    second = {site: square[site].mean(0) + variance[site].mean(0) for site in mean}
    return Report(
        **vars(evidence),
        kl=terms.column("kl"),
        kl_per_dimension=terms.column("kl_per_dimension"),
        reconstruction=terms.column("reconstruction").get(""),
        posterior_mean=mean,
        activity=terms.activity(),
        threshold=threshold,
        marginal_mean=marginal_mean,
        marginal_sd={
            site: (second[site] - value.square()).clamp(min=0).sqrt()
            for site, value in marginal_mean.items()
        },
        aggregate=found,
        divergence=divergence,
        absent=absent,
        pair=(model, guide, args),
        seed=seed,
        joint=joint,
    )


def _over_globals(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    rows: int,
    num_globals: int,
    num_particles: int,
    max_rows: int,
    seed: int | None,
) -> tuple[Evidence, SiteTerms, JointEvidence]:
    """The columns of the rows given the globals, averaged over draws of these, and log p(X)."""
    each: list[Evidence] = []
    average = AveragedTerms(rows, num_particles)

    def draws() -> Iterator[Given]:
        for _ in range(num_globals):
            pair, weights = at_a_draw(model, guide, take(args, slice(max_rows)))
            terms = SiteTerms(rows, num_particles)
            each.append(weigh(*pair, args, num_particles, max_rows, None, terms))
            average.take_in(terms, 1 / num_globals)
            yield Given(weights.guide_trace, weights, each[-1].log_evidence)

    with evaluating(model, guide, args, seed):
        joint = all_rows_together(draws(), num_particles)
    names = ("log_evidence", "ess", "khat", "elbo", "gap")
    columns = {name: torch.stack([getattr(e, name) for e in each]) for name in names}
    mean = {name: column.mean(0) for name, column in columns.items()}
    error = {name: column.std(0) / num_globals**0.5 for name, column in columns.items()}
    evidence = Evidence(
        log_evidence=mean["log_evidence"],
        log_evidence_se=error["log_evidence"],
        ess=mean["ess"],
        khat=columns["khat"].amax(0),
        elbo=mean["elbo"],
        gap_se=error["gap"],
        num_particles=num_particles,
    )
    return evidence, average, joint


def _aggregate(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    max_pairs: int,
    num_draws: int,
    seed: int | None,
    absent: dict[str, str],
) -> Aggregate | None:
    """:func:`~ppvae.diagnostics.summaries.aggregate`; where there is none, ``absent`` says why."""
    try:
        found = aggregate(model, guide, args, max_pairs, num_draws, seed)
    except (NoInverse, NotImplementedError, KeyError) as error:
        absent["mutual information"] = (
            f"the guide has no density at points it has not drawn ({type(error).__name__}: {error})"
        )
        return None
    if found is None:
        absent["activity and mutual information"] = "the guide draws no latents"
    elif found.masked:
        absent["KL(q(z) || p(z))"] = (
            "a mask hides some of the latents, so the mean KL is not of all that the guide draws"
        )
    elif found.prior_differs:
        absent["KL(q(z) || p(z))"] = "the prior differs by datapoint, so there is no one p(z)"
    return found
