"""What a report's numbers say, and what to do next, in sentences."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ppvae.diagnostics.missing import SUFFIX
from ppvae.diagnostics.psis import MIN_TAIL

Report = Any  # report.Report, which imports this


def verdict(report: Report) -> list[str]:
    """One sentence or two on each of globals, weights, units, prior and simulations."""
    said = [*_about_globals(report), *_about_weights(report), *_about_units(report)]
    return said + _about_prior(report) + _about_simulations(report)


def _about_globals(report: Report) -> list[str]:
    joint = report.joint
    if joint is None:
        return []
    count = len(joint.log_weights)
    if math.isnan(joint.khat):
        return [f"{count} draws of the globals are too few for their k-hat: pass num_globals=21."]
    if joint.khat <= 0.7:
        return [f"k-hat <= 0.7 of the globals: log p(X) can be trusted at {count} draws of them."]
    return [
        f"k-hat {joint.khat:.2f} of the globals: log p(X) is only a lower bound, and intervals of "
        "the globals are the guide's more than the data's. Try AutoMultivariateNormal for them, a "
        "guide of the rows that sees them (guides.Global(sees_globals=True)), or more particles."
    ]


def _about_weights(report: Report) -> list[str]:
    bad, gap = report.unreliable, report.gap.mean().item()
    said = [
        f"k-hat <= 0.7 on all points: {report.log_p} and its standard errors can be trusted at "
        f"K = {report.num_particles}."
        if bad == 0
        else f"k-hat > 0.7 on {share(bad)} of points: there {report.log_p} is only a lower bound, "
        "and its standard error means little. Try a flow guide or more particles; worst(10) "
        "names the points."
    ]
    if (ties := report.khat.isposinf() & (report.ess >= MIN_TAIL)).any():
        said.append(
            f"On {share(ties.double().mean())} of points k-hat is infinite because the "
            "largest weights are equal, not because few count: there go by the ESS. If a "
            "discrete latent makes them equal, mark it "
            'infer={"enumerate": "parallel"}, and it is summed out.'
        )
    if not math.isfinite(gap):
        said.append(
            f"The ELBO is minus infinity on {share(report.elbo.isneginf().double().mean())} of "
            "points: the guide draws latents at which p(x, z) = 0. Give it the support of "
            "prior and likelihood."
        )
    elif gap > 1:
        more = "at least " if bad > 0.05 else ""
        where = "" if report.joint is None else " at one draw (diagnostics.given_globals)"
        said.append(
            f"The guide loses {more}{gap:.1f} nats per datapoint: diagnostics.gaps{where} tells "
            "whether to its family (try a flow) or to amortisation (try a larger encoder)."
        )
    return said


def _about_units(report: Report) -> list[str]:
    said = []
    for name, units in report.collapsed.items():
        count, all_units = int(units.sum()), len(units)
        if name.endswith(SUFFIX):  # drawn from the model's own law, as it should
            continue
        if count == all_units:
            said.append(
                f"Posterior collapse: q = p on every unit of {name!r}, so the model ignores "
                "it. Try elbo.LinearWarmup or elbo.FreeBits, or a weaker decoder."
            )
        elif count:
            said.append(
                f"{count} of {all_units} units of {name!r} are collapsed: the model does not "
                "use them. If it should, try elbo.LinearWarmup or elbo.FreeBits; if not, make "
                "the latent smaller."
            )
    used = [name for name in report.activity if not name.endswith(SUFFIX)]
    used = [n for n in used if n not in report.collapsed or not report.collapsed[n].all()]
    if used and not report.active_units:
        said.append(
            f"No unit is active: the posterior means of {', '.join(map(repr, used))} hardly "
            "change from one datapoint to the next. Train for longer, or as for a collapse."
        )
    return said


def _about_prior(report: Report) -> list[str]:
    found = report.aggregate
    if found is None:
        return []
    near = max(found.ceiling - 1, found.ceiling / 2)
    if found.mutual_information > near:
        return [
            f"The mutual information is at its ceiling, log N = {found.ceiling:.1f}: pass more "
            "datapoints to measure it."
        ]
    if report.marginal_kl > max(1.0, 0.1 * found.mutual_information):
        return [
            f"The prior is {report.marginal_kl:.1f} nats from where the guide puts the data, so "
            "new draws will look worse than reconstructions. Try a learned prior: "
            "conditionals.VampPrior or conditionals.Mixture."
        ]
    return []


def _about_simulations(report: Report) -> list[str]:
    found = report.divergence
    if found is None:
        return []
    if not math.isfinite(found.mean):
        return found.verdict
    if found.mean < max(3 * found.mean_se, 1.0):
        return []
    why = "may miss a mode, which k-hat cannot see" if not report.unreliable else "is off too"
    return [
        f"On the model's own draws the guide is {found.mean:.1f} nats from the posterior, "
        f"as a normal is that is shifted by {found.shift:.1f} standard deviations. On yours it "
        f"{why}, or they look unlike the model's: diagnostics.sbc says in what way it is wrong, "
        "predictive_check whether they do."
    ]


def share(value: float | Tensor) -> str:
    """A percentage that reads 0 or 100 only where it is exactly that."""
    value = float(value)
    if math.isnan(value):
        return "none"
    if 0 < value < 0.01 or 0.99 < value < 1:
        return f"{100 * value:.2g} %" if value < 0.5 else f"{100 * value:.3g} %"
    return f"{100 * value:.0f} %"
