"""Values that a mask hides, imputed from the posterior."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Categorical

from ppvae.arguments import takes_numbers
from ppvae.diagnostics.classes import Classes
from ppvae.diagnostics.evidence import Evidence, weigh
from ppvae.diagnostics.rows import (
    bound,
    check_at_least,
    check_pair_and_data,
    rows_first,
)
from ppvae.distributions import Columns
from ppvae.intake import Container
from ppvae.pairs import (
    DATA_PLATE,
    PARTICLE_PLATE,
    Site,
    law,
    sample_sites,
    shown,
    trace,
    unconditioned,
)
from ppvae.terms import unmasked
from ppvae.weights import LogWeights

SUFFIX = "_missing"  # of the latent that holds a site's hidden values, where the model draws them


@dataclass(frozen=True, eq=False, repr=False)
class Imputation:
    r"""What :func:`ppvae.impute` found: float64, on the CPU, of the data's shape ``(N, *event)``.

    Attributes:
        observed: which values were observed, bool.
        mean: :math:`E[x_d \mid x_{\mathrm{obs}}]`, and the value itself where it is observed. NaN
            for classes, and where p(x_d | z) has no mean (a Student t law of df <= 1).
        sd: the posterior's standard deviation, 0 where observed; infinite where p(x_d | z) has no
            variance (df <= 2).
        filled: ``mean``, rounded where values are whole numbers; of classes the most probable.
        draws: ``(S, N, *event)``, joint draws of each row's missing values beside the observed
            ones; None for ``num_draws=0``.
        evidence: of the observed part of each row, :class:`~ppvae.diagnostics.Evidence`.
        site: the observed site that was imputed.
        completed: ``filled`` in the container of the rows that came in: for a frame a frame of its
            columns and index, whose cells with a table are of its dtypes; for an array an array.
    """

    observed: Tensor
    mean: Tensor
    sd: Tensor
    filled: Tensor
    draws: Tensor | None
    evidence: Evidence
    site: str
    completed: Any = None

    @property
    def ess(self) -> Tensor:
        """Effective sample size of each row's weights, ``(N,)``."""
        return self.evidence.ess

    @property
    def khat(self) -> Tensor:
        """Pareto k-hat of each row's weights, ``(N,)``: above 0.7 the guide biases the row."""
        return self.evidence.khat

    @property
    def num_missing(self) -> int:
        """How many values were imputed."""
        return int((~self.observed).sum())

    def __repr__(self) -> str:
        share = self.num_missing / max(self.observed.numel(), 1)
        return (
            f"Imputation of {self.num_missing} values of {self.site!r}, {share:.0%} of all, by the "
            f"weights of this:\n{self.evidence!r}"
        )


@takes_numbers
def impute(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_particles: int = 1000,
    num_draws: int = 0,
    site: str | None = None,
    table: Any = None,
    max_rows: int = 10_000,
    seed: int | None = None,
    **kwargs: Any,
) -> Imputation:
    r"""The posterior of values that a mask hides, by self-normalised importance weights.

    .. math:: E[x_d \mid x_{\mathrm{obs}}] \approx \sum_k \tilde w_k\, E[x_d \mid z_k],\qquad
              \tilde w_k = w_k / \textstyle\sum_j w_j,\quad
              w_k = p(x_{\mathrm{obs}}, z_k) / q(z_k \mid x_{\mathrm{obs}})

    Draws are those of the same weights: z is resampled, then x drawn from p(x | z). Latents that
    are summed out are so here, too: E[x_d | z_k] is a mean over p(c | x_obs, z_k). What is
    imputed are the values of the observed site that are hidden by a mask, ``models.Masked``'s or
    that of a program of your own; where the model draws them itself, as the site
    ``"<name>_missing"`` (:class:`ppvae.models.MissingNotAtRandom`), by these draws. Programs run in
    evaluation mode.

    Args:
        model, guide: Pyro programs.
        *args: data, as both are called, e.g. ``x, observed``.
        num_particles: K >= 2; ``khat`` takes more than 20.
        num_draws: S joint draws of each row's missing values (multiple imputation).
        site: the observed site, if masks hide values of several.
        table: the ``data.Table`` of a frame with words.
        max_rows: largest number of (particle, datapoint) rows computed at once.
        seed: draw with this seed and leave the random stream as it was; None: draw from it.
        **kwargs: passed to both programs whole: tables, flags. Only ``args`` are cut by rows.

    Returns:
        :class:`~ppvae.diagnostics.Imputation`.

    Raises:
        ValueError: bad data or arguments; the pair does not fit; no site, or several, have values
            that are hidden; a latent is summed out in a plate inside of a datapoint.

    Warns:
        RuntimeWarning: p(x | z) has no mean at some missing values.

    Source: Mattei & Frellsen, MIWAE, 2019, section 4; Ipsen et al., not-MIWAE, 2021, section 3.2.

    Example:
        >>> import torch, ppvae
        >>> from ppvae import conditionals, guides, models, nets
        >>> likelihood = conditionals.Normal(nets.mlp(2, 8, 3), scale=0.5)
        >>> model = models.Masked(models.VAE(likelihood, latent_dim=2))
        >>> guide = guides.Normal(nets.Masked(nets.mlp(2 * 3, 8, 2 * 2)))
        >>> x = torch.tensor([[0.1, float("nan"), 0.3]])
        >>> found = ppvae.impute(model, guide, x, ~x.isnan(), num_draws=5, seed=0)
        >>> found.mean[0, [0, 2]], found.draws.shape, found.num_missing
        (tensor([0.1000, 0.3000], dtype=torch.float64), torch.Size([5, 1, 3]), 1)
    """
    box = Container(args, table)
    args = box.tensors(model, guide)
    model, guide = bound(model, guide, kwargs)
    check_at_least(2, num_particles=num_particles)
    check_at_least(0, num_draws=num_draws)
    if not isinstance(site, str | None):
        raise TypeError(f"site must be the name of an observed site, got {site!r}")
    rows = check_pair_and_data(model, guide, args)
    gathered = _Gathered(rows, num_draws, site)
    evidence = weigh(model, guide, args, num_particles, max_rows, seed, gathered)
    found = gathered.found()
    completed = box.one(found["filled"], "x", like_data=True)
    return Imputation(**found, evidence=evidence, completed=completed)


class _Gathered:
    """Means over the weights, gathered piece by piece from the pass over them.

    A piece, some particles of some datapoints, is normalised by itself, and counts in the mean of
    all pieces as much as its weights do.
    """

    def __init__(self, rows: int, num_draws: int, site: str | None) -> None:
        self.rows, self.num_draws, self.site = rows, num_draws, site
        self.log_total = torch.full((rows,), -math.inf, dtype=torch.float64)
        self.sums: dict[Any, Tensor] = {}  # weighted means, (N, ...)
        self.parts: list[tuple[Any, Any]] = []
        self.name = ""

    def __call__(self, part: slice, weights: LogWeights) -> None:
        """Take in the weights of some particles of the datapoints ``part``."""
        self.name, site, visible = hidden_site(weights.model_trace, self.site)
        classes = Classes(weights, self.name)
        self.parts = _parts(site["fn"])
        log_w = weights.log_w.double()
        total = log_w.logsumexp(0)
        possible = total > -math.inf  # else the evidence will be refused, with all pieces seen
        normal = torch.where(possible, (log_w - total).exp(), 1 / len(log_w))  # (K, n)
        both = torch.logaddexp(self.log_total[part].to(total), total)
        share = torch.where(possible, (total - both).exp(), 0.0)
        self.log_total[part] = both.cpu()
        drawn = weights.model_trace.nodes.get(self.name + SUFFIX)
        probabilities = classes.probabilities(site)
        each = _alongside(normal, probabilities) * probabilities  # (K, n, *classes)
        over = [0, *range(2, each.dim())]
        for key, values in self._moments(classes, site, drawn).items():  # (K, n, *classes, ...)
            w = _alongside(each, values)
            self._mix(key, part, share, torch.where(w > 0, w * values, 0.0).sum(over))
        for key, values in (("data", site["value"]), ("visible", visible)):
            one = classes.rows(site, values).double()[0]
            for _ in over[1:]:  # the same for every class
                one = one[:, 0]
            self._mix(key, part, torch.ones_like(share), one)
        if self.num_draws:
            which = torch.rand(self.num_draws, len(share), device=share.device) < share
            draws = self._draws(weights, classes, normal, drawn).double()  # (S, n, ...)
            self._mix("draws", part, which.T.double(), draws.movedim(0, 1))

    def _moments(self, classes: Classes, site: Site, drawn: Site | None) -> dict[Any, Tensor]:
        """First and second moments given each draw of z, and probabilities of classes."""
        fn = unmasked(site["fn"])
        try:
            mean, variance = fn.mean, fn.variance
        except NotImplementedError:  # one draw has the same expectation
            mean, variance = fn.sample(), None
        if drawn is not None:
            mean, variance = drawn["value"], None
        mean = classes.rows(site, mean).double()
        second = mean.square()
        if variance is not None:
            second = second + classes.rows(site, variance).double()
        found: dict[Any, Tensor] = {"first": mean, "second": second}
        for i, (one, columns) in enumerate(self.parts):
            if isinstance(one, Categorical):
                probabilities = one.probs
                if drawn is not None:
                    codes = drawn["value"][..., columns].long()
                    probabilities = torch.nn.functional.one_hot(codes, probabilities.shape[-1])
                found[i] = classes.rows(site, probabilities.double(), own=1, columns=columns)
        return found

    def _draws(
        self, weights: LogWeights, classes: Classes, normal: Tensor, drawn: Site | None
    ) -> Tensor:
        """Values at particles that are drawn by their weights, ``(S, n, ...)``."""
        index = torch.multinomial(normal.T, self.num_draws, replacement=True).T  # (S, n)
        chosen = classes.draw(index)
        if drawn is not None:
            return classes.at(drawn, index, chosen)
        z = classes.values(chosen)
        for name, site in sample_sites(weights.guide_trace).items():
            if name not in z:
                z[name] = classes.at(site, index, chosen)
        model, _, args, _ = weights.pair
        nesting = -weights.leftmost - (len(normal) > 1)
        with pyro.plate(PARTICLE_PLATE, len(index), dim=-1 - nesting), _At(z, nesting):
            site = trace(unconditioned(model), args, {}).nodes[self.name]
        return rows_first(site)

    def _mix(self, key: Any, part: slice, share: Tensor, values: Tensor) -> None:
        """Let values ``(n, ...)`` count for a share of what there is of these datapoints."""
        if key not in self.sums:
            self.sums[key] = values.new_zeros(self.rows, *values.shape[1:])
        share, old = _alongside(share, values), self.sums[key][part]
        keeps, takes = torch.where(share < 1, (1 - share) * old, 0.0), share * values
        self.sums[key][part] = keeps + torch.where(share > 0, takes, 0.0)

    def found(self) -> dict[str, Any]:
        """What :class:`Imputation` has beside its evidence."""
        visible, data = self.sums["visible"].bool(), self.sums["data"]
        mean, filled = self.sums["first"].clone(), self.sums["first"].clone()
        for i, (one, columns) in enumerate(self.parts):
            if isinstance(one, Categorical):
                mean[..., columns] = math.nan
                filled[..., columns] = self.sums[i].argmax(-1).double()
            elif one.support.is_discrete:
                filled[..., columns] = filled[..., columns].round()
        if absent := int((filled.isnan() & ~visible).sum()):
            warnings.warn(
                f"{absent} missing values have no mean, since p(x | z) has none there (a Student t "
                "law of df <= 1, say): use draws, or a head that has one, as StudentT(net, df=5.0)",
                RuntimeWarning,
                stacklevel=4,
            )
        sd = (self.sums["second"] - mean.square()).clamp(min=0).sqrt()
        draws = self.sums.get("draws")
        if draws is not None:
            draws = torch.where(visible[:, None], data[:, None], draws).movedim(0, 1).cpu()
        return {
            "observed": visible.cpu(),
            "mean": torch.where(visible, data, mean).cpu(),
            "sd": torch.where(visible, 0.0, sd).cpu(),
            "filled": torch.where(visible, data, filled).cpu(),
            "draws": draws,
            "site": self.name,
        }


class _At(Messenger):
    """Puts draws of each datapoint in the place of particles; ``(S, n, other dims, *event)``."""

    def __init__(self, z: dict[str, Tensor], nesting: int) -> None:
        super().__init__()
        self.z, self.nesting = z, nesting

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] not in self.z:
            return
        event_dim = msg["fn"].event_dim
        (frame,) = (f for f in msg["cond_indep_stack"] if f.name == DATA_PLATE)
        value = self.z[msg["name"]].movedim(1, frame.dim - event_dim)
        absent = self.nesting + 1 + event_dim - value.dim()
        msg["value"] = value.reshape(len(value), *(1,) * absent, *value.shape[1:])
        msg["done"] = True


def hidden_site(drawn: Any, name: str | None = None) -> tuple[str, Site, Tensor]:
    """The observed site of which a mask hides values: its name, itself, and what is not hidden.

    Raises:
        ValueError: there is none, or there are several and ``name`` is None.
    """
    found = {
        n: (n, site, visible)
        for n, site in sample_sites(drawn).items()
        if site["is_observed"] and (visible := shown(site, site["value"])) is not None
    }
    if name is None and len(found) == 1:
        return next(iter(found.values()))
    if name not in found:
        seen = f"site={name!r}" if name is not None else "no site is named"
        raise ValueError(
            f"{seen}, and a mask hides values of the observed sites {sorted(found)}: name one of "
            "them; if there is none, call the pair with a mask, models.Masked(model) with "
            "(x, observed)"
        )
    return found[name]


def _parts(fn: Any) -> list[tuple[Any, Any]]:
    """The laws of single values, and the columns that each is of."""
    inside = law(fn)
    if isinstance(inside, Columns):
        return [(part, list(at)) for part, at in zip(inside.parts, inside.places, strict=True)]
    return [(inside, slice(None))]


def _alongside(weights: Tensor, values: Tensor) -> Tensor:
    """Weights with as many dims as values, theirs being the first."""
    return weights.reshape(weights.shape + (1,) * (values.dim() - weights.dim()))
