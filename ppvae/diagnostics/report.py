"""``Report``: what :func:`ppvae.diagnose` found, as numbers, sentences, tables and pages."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppvae.diagnostics import html
from ppvae.diagnostics.arviz_bridge import export_rows
from ppvae.diagnostics.arviz_versions import elpd
from ppvae.diagnostics.evidence import Evidence
from ppvae.diagnostics.given_globals import JointEvidence
from ppvae.diagnostics.missingness import by_missingness
from ppvae.diagnostics.rows import spread, standard_error
from ppvae.diagnostics.simulated import Divergence
from ppvae.diagnostics.summaries import Aggregate
from ppvae.diagnostics.verdict import share, verdict
from ppvae.wrapped import title as name_of

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

COLLAPSED_KL, COLLAPSED_SHARE = 0.01, 0.99  # nats, of the datapoints: Lucas et al. 2019


@dataclass(frozen=True, eq=False, repr=False)
class Report(Evidence):
    r"""What :func:`ppvae.diagnose` found: :class:`Evidence` and what else the draws tell.

    Tensors are float64 on the CPU; values are in nats per datapoint. Dictionaries are by latent
    site; what a pair does not have is not in them, and ``absent`` says why.

    Attributes:
        kl: KL(q || p) of every latent given those it depends on, ``(N,)``; latents summed out
            together are one entry, ``"c+z"``.
        kl_per_dimension: the same by unit, ``(N, D)``, for vectors of independent units.
        reconstruction: :math:`E_q \log p(x \mid z)`, ``(N,)``; minus the distortion. None where it
            cannot be told from the KL.
        posterior_mean: :math:`E_q[z_d \mid x]`, ``(N, D)``.
        activity: variance over the datapoints of ``posterior_mean``, ``(D,)``.
        threshold: what ``activity`` exceeds for an active unit.
        marginal_mean, marginal_sd: of the aggregated posterior q(z), by unit, ``(D,)``.
        aggregate: mutual information and the fit of q(z) to the prior,
            :class:`~ppvae.diagnostics.summaries.Aggregate`; None where it is absent.
        divergence: of guide and posterior on the model's own data,
            :class:`~ppvae.diagnostics.simulated.Divergence`; None where it is absent.
        absent: by quantity that this pair does not have, the reason.
        pair: model, guide and args.
        seed: that the draws were made with; None: from the random stream as it was.
        joint: of a pair with latents outside the data plate, what its draws of them tell:
            :class:`~ppvae.diagnostics.JointEvidence`. All other numbers are then of the rows given
            the globals, averaged over these draws: ``log_evidence`` is E_q(g) log p(x | g), with
            the standard error over the draws, and ``khat`` the worst of them.
    """

    kl: dict[str, Tensor]
    kl_per_dimension: dict[str, Tensor]
    reconstruction: Tensor | None
    posterior_mean: dict[str, Tensor]
    activity: dict[str, Tensor]
    threshold: float
    marginal_mean: dict[str, Tensor]
    marginal_sd: dict[str, Tensor]
    aggregate: Aggregate | None
    divergence: Divergence | None
    absent: dict[str, str]
    pair: tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]] = field(repr=False)
    seed: int | None = None
    joint: JointEvidence | None = None

    # -- per datapoint -------------------------------------------------------------------------

    @property
    def mean_mc_se(self) -> float:
        """Monte-Carlo standard error of :attr:`mean` for these very datapoints."""
        if self.joint is None:
            return super().mean_mc_se
        of_rows = self.joint.log_weights - self.joint.log_global  # the rows share their draws
        return standard_error(of_rows) / len(self.khat)

    @property
    def rate(self) -> Tensor | None:
        """The rate, KL(q(z | x) || p(z)) of all latents together, ``(N,)``."""
        return torch.stack(list(self.kl.values())).sum(0) if self.kl else None

    def worst(self, count: int = 10) -> Tensor:
        """Indices of the datapoints with the largest k-hat, worst first, ``(count,)``."""
        k = self.khat.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
        return k.argsort(descending=True, stable=True)[:count]

    def table(self) -> pandas.DataFrame:
        """One row per datapoint: every ``(N,)`` quantity, in nats."""
        import pandas

        columns = {
            "log_evidence": self.log_evidence,
            "log_evidence_se": self.log_evidence_se,
            "elbo": self.elbo,
            "gap": self.gap,
            "gap_se": self.gap_se,
            "ess": self.ess,
            "khat": self.khat,
            **{f"kl_{name}": kl for name, kl in self.kl.items()},
        }
        if self.reconstruction is not None:
            columns["reconstruction"] = self.reconstruction
        frame = pandas.DataFrame({name: column.numpy() for name, column in columns.items()})
        return frame.rename_axis("datapoint")

    def by_missingness(self, bins: int | Sequence[float] = 4) -> pandas.DataFrame:
        """Evidence, gap, KL, ESS and k-hat of rows with about the same share of missing values.

        Log p(x) is of the observed part, so rows with different masks do not compare: nats per
        observed value do roughly. Of a model of the mask, too, its nats are among them.

        Args:
            bins: how many intervals of the share missing, of as many rows each where shares
                differ; or their edges in ascending order, as ``(0, 0.25, 0.5, 1)``.

        Raises:
            ValueError: the pair hides no values; the edges do not ascend.
        """
        return by_missingness(self, self.pair, self.rate, bins)

    # -- units and the aggregated posterior ----------------------------------------------------

    @property
    def active(self) -> dict[str, Tensor]:
        """Which units are active, ``(D,)`` bool: ``activity`` above the threshold."""
        return {name: variance > self.threshold for name, variance in self.activity.items()}

    @property
    def active_units(self) -> int:
        """How many units are active, over all latents."""
        return sum(int(units.sum()) for units in self.active.values())

    @property
    def collapsed(self) -> dict[str, Tensor]:
        """Which units are collapsed, ``(D,)`` bool: a KL below 0.01 nats on 99 % of datapoints.

        Source: Lucas, Tucker, Grosse & Norouzi, Don't blame the ELBO!, 2019, definition 1.
        """
        return {
            name: (kl < COLLAPSED_KL).double().mean(0) >= COLLAPSED_SHARE
            for name, kl in self.kl_per_dimension.items()
        }

    @property
    def mutual_information(self) -> float:
        """Of datapoint and latents under the guide, nats; see ``aggregate``. NaN if absent."""
        return math.nan if self.aggregate is None else self.aggregate.mutual_information

    @property
    def marginal_kl(self) -> float:
        r"""KL(q(z) || p(z)) of the aggregated posterior, nats: mean rate less mutual information.

        Of these N datapoints; for the distribution they come from an upper bound in expectation.
        NaN where the prior differs by datapoint, as p(z | y) does, or a latent is masked.
        """
        rate, found = self.rate, self.aggregate
        if rate is None or found is None or found.prior_differs or found.masked:
            return math.nan
        return rate.mean().item() - found.mutual_information

    @property
    def rate_distortion(self) -> tuple[float, float]:
        """(mean rate, mean distortion): one point of the plane, nats; their sum is -ELBO."""
        rate, reconstruction = self.rate, self.reconstruction
        if rate is None or reconstruction is None:
            return math.nan, math.nan
        return rate.mean().item(), -reconstruction.mean().item()

    # -- what to do ----------------------------------------------------------------------------

    @property
    def verdict(self) -> list[str]:
        """What the numbers say, and what to do next, one sentence or two each."""
        return verdict(self)

    def __repr__(self) -> str:
        head = f"{'nats per datapoint':24s}{'mean':>10s}{'± s.e.':>10s}"
        head += "".join(f"{q:>10s}" for q in ("5 %", "median", "95 %"))
        lines = [
            f"Report of {len(self.khat)} datapoints, {self.draws}",
            "",
            head,
            *(_row(name, column) for name, column in self.columns()),
            "",
            *(f"{name:24s}{value}" for name, value in self.facts()),
            *self._globals(10),
            "",
            "Verdict",
            *(f"- {sentence}" for sentence in self.verdict),
        ]
        if self.absent:
            lines += ["", "Absent", *(f"- {what}: {why}." for what, why in self.absent.items())]
        return "\n".join(lines)

    @property
    def draws(self) -> str:
        """How many there were, in words."""
        given = "" if self.joint is None else f" at each of {len(self.joint.log_weights)} draws of "
        return f"K = {self.num_particles} particles{given and given + 'the globals'}"

    @property
    def log_p(self) -> str:
        """What ``log_evidence`` is called."""
        return "log p(x)" if self.joint is None else "log p(x | g)"

    def _globals(self, count: int) -> list[str]:
        """The first lines of the table of the globals."""
        if self.joint is None:
            return []
        table = self.joint.table
        lines = table.head(count).to_string(float_format="{:.3f}".format).splitlines()
        if len(table) > count:
            lines.append(f"and {len(table) - count} more: report.joint.table")
        return ["", "Globals", *lines]

    def columns(self) -> list[tuple[str, Tensor]]:
        """Every quantity per datapoint, by the names in the tables."""
        columns = [(self.log_p, self.log_evidence), ("ELBO", self.elbo), ("gap", self.gap)]
        columns += [(f"KL of {name!r}", kl) for name, kl in self.kl.items()]
        if self.reconstruction is not None:
            columns.append(("reconstruction", self.reconstruction))
        return [*columns, ("ESS [draws]", self.ess), ("Pareto k-hat", self.khat)]

    def facts(self) -> list[tuple[str, str]]:
        """Every quantity of all datapoints together: its name, and its value in words."""
        said = [("k-hat > 0.7", f"{share(self.unreliable)} of points")]
        if (joint := self.joint) is not None:
            value = f"{joint.log_evidence:.2f} ± {joint.se:.2f} (ELBO {joint.elbo:.2f}, k-hat "
            value += f"{joint.khat:.2f}, ESS {joint.ess:.0f} of {len(joint.log_weights)} draws)"
            said = [("log p(X) of all rows", value), *said]
            said += [(f"KL of global {name!r}", f"{kl:.2f}") for name, kl in joint.kl.items()]
        for name, units in self.active.items():
            value = f"{int(units.sum())} of {len(units)} active (variance of the mean > "
            value += f"{self.threshold:g})"
            if name in self.collapsed:
                value += f", {int(self.collapsed[name].sum())} collapsed"
            said.append((f"units of {name!r}", value))
        if self.aggregate is not None:
            found = self.aggregate
            value = f"{found.mutual_information:.2f} ± {found.mutual_information_se:.2f} (upper "
            value += f"bound {found.mutual_information_upper:.2f}; ceiling log N = "
            said.append(("mutual information", value + f"{found.ceiling:.2f})"))
        if not math.isnan(self.marginal_kl):
            said.append(("KL(q(z) || p(z))", f"{self.marginal_kl:.2f}"))
        if self.divergence is not None:
            value = f"{self.divergence.mean:.2f} ± {self.divergence.mean_se:.2f} "
            value += f"({len(self.divergence.values)} simulations of the model)"
            said.append(("KL(p || q) + KL(q || p)", value))
        rate, distortion = self.rate_distortion
        if not math.isnan(rate):
            said.append(("rate, distortion", f"{rate:.2f}, {distortion:.2f}"))
        return said

    # -- elsewhere -----------------------------------------------------------------------------

    def to_arviz(self, datapoints: Any = None, num_draws: int = 100, **options: Any) -> Any:
        """Draws for ArviZ, with this report's numbers beside them.

        As :func:`ppvae.diagnostics.to_arviz`, with ``log_likelihood``, ``khat`` and ``ess`` taken
        from this report's K particles.

        Args:
            datapoints: which, as indices, a slice or a mask, e.g. ``report.worst(10)``; all by
                default.
            num_draws: draws per datapoint.
            **options: as in :func:`ppvae.diagnostics.to_arviz`: ``coords``, ``dims``, ``seed``, ...

        Raises:
            ValueError: no datapoint is chosen, one does not exist, or all of them would take more
                than a gigabyte; the pair has global latents.
        """
        self._require_no_globals()
        return export_rows(self.pair, self, datapoints, num_draws, **options)

    def to_elpd(self) -> Any:
        """Log p(x) as ArviZ's ``ELPDData``, for ``az.compare`` and ``az.plot_khat``.

        For datapoints that the pair was not trained on, the sum of log p(x) *is* the expected log
        predictive density: nothing has to be left out. ArviZ knows these numbers by the name of
        leave-one-out, so they stand there as ``elpd_loo``; ``p_loo`` has no meaning and is NaN.

        Raises:
            ImportError: ArviZ is not installed.
            ValueError: the pair has global latents.
        """
        self._require_no_globals()
        return elpd(self)

    def _require_no_globals(self) -> None:
        if self.joint is not None:
            raise ValueError(
                "E_q(g) log p(x | g) is no predictive density: diagnostics.log_predictive has that "
                "of new rows, arviz.loo of diagnostics.to_arviz(model, guide, *args) of these"
            )

    def plot(self, image_shape: Sequence[int] | None = None) -> Figure:
        """The pictures of this report in one figure.

        Args:
            image_shape: of one datapoint, such as ``(28, 28)``, to draw the worst ones.
        """
        return html.figure(self._pictures(image_shape))

    def to_html(
        self, path: str | Path, image_shape: Sequence[int] | None = None, title: str | None = None
    ) -> Path:
        """Write one self-contained page: verdict, tables that sort, pictures.

        Args:
            path: of the file; an older one is replaced.
            image_shape: of one datapoint, such as ``(28, 28)``, to draw the worst ones.
            title: of the page.

        Returns:
            The path.
        """
        return html.write(Path(path), self._page(image_shape, title))

    def _repr_html_(self) -> str:
        return html.framed(self._page(None, None))

    def _page(self, image_shape: Sequence[int] | None, title: str | None) -> str:
        return html.render(
            title=title or "Can this posterior be trusted?",
            report=self,
            pictures=self._pictures(image_shape),
            summary=self._summary(),
            globals=self.joint and self.joint.table.rename_axis("global").reset_index(),
            units={site: self._units(site) for site in self.activity},
            datapoints=self._worst_rows(100),
            origin=self._origin(),
        )

    def _origin(self) -> str:
        """Of which pair, data and draws this is, with which versions, and when it was written."""
        model, guide, args = self.pair
        data = ", ".join(str(tuple(arg.shape)) for arg in args if isinstance(arg, Tensor))
        draws = f"{self.draws}, seed {self.seed}"
        versions = ", ".join(
            f"{name} {importlib.metadata.version(name)}" for name in ("ppvae", "torch", "pyro-ppl")
        )
        now = datetime.datetime.now().isoformat(" ", "minutes")
        return f"{name_of(model)} and {name_of(guide)}; data {data}; {draws}; {versions}; {now}"

    def _pictures(self, image_shape: Sequence[int] | None) -> list[html.Picture]:
        x = next(arg for arg in self.pair[2] if isinstance(arg, Tensor))
        worst = html.worst_picture(x, self.khat, self.worst(10), image_shape)
        pictures = [html.khat_picture(self.khat, self.unreliable), *([worst] if worst else [])]
        pictures += [
            html.units_picture(site, kl, self.active.get(site))
            for site, kl in self.kl_per_dimension.items()
        ]
        if math.isfinite(sum(self.rate_distortion)):
            pictures.append(html.plane_picture(*self.rate_distortion))
        return pictures

    def _summary(self) -> pandas.DataFrame:
        import pandas

        heads = ["quantity", "mean", "± s.e.", "5 %", "median", "95 %"]
        return pandas.DataFrame(
            [[name, *spread(column)] for name, column in self.columns()], columns=heads
        )

    def _units(self, site: str) -> pandas.DataFrame:
        import pandas

        columns: dict[str, Any] = {"unit": range(len(self.activity[site]))}
        if site in self.kl_per_dimension:
            columns["mean KL"] = self.kl_per_dimension[site].mean(0)
        columns["activity"] = self.activity[site]
        columns["active"] = ["yes" if a else "no" for a in self.active[site]]
        if site in self.collapsed:
            columns["collapsed"] = ["yes" if c else "no" for c in self.collapsed[site]]
        columns["mean of q(z)"] = self.marginal_mean[site]
        columns["sd of q(z)"] = self.marginal_sd[site]
        if self.aggregate is not None and site in self.aggregate.ks:
            columns["distance to the prior (KS)"] = self.aggregate.ks[site]
        return pandas.DataFrame(columns)

    def _worst_rows(self, count: int) -> pandas.DataFrame:
        """The rows of :meth:`table` with the largest k-hat, worst first."""
        heads = {
            "log_evidence": self.log_p,
            "log_evidence_se": "± s.e.",
            "elbo": "ELBO",
            "gap_se": "± s.e. of gap",
            "ess": "ESS",
            "khat": "k-hat",
            **{f"kl_{site}": f"KL of {site}" for site in self.kl},
        }
        worst = self.table().iloc[self.worst(count).numpy()]
        return worst.rename(columns=heads).reset_index()


def _row(name: str, column: Tensor) -> str:
    # + 0.0 turns minus zero into zero.
    shown = ["-" if math.isnan(v) else f"{round(v, 2) + 0.0:.2f}" for v in spread(column)]
    return f"{name:24s}" + "".join(f"{value:>10s}" for value in shown)
