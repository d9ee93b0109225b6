"""The prior that makes the bound largest, the aggregate posterior, by a density ratio."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppvae.arguments import require_has, takes_numbers
from ppvae.auxiliary import Ratio
from ppvae.conditionals.heads import full_precision
from ppvae.distributions import NoInverse, promoted
from ppvae.pairs import Program, evaluation_mode, own_path, sample_sites, seeded, trace
from ppvae.terms import not_a_density, unmasked

_AT_ONCE = 2**16  # candidates for which the network is run at once


class Normaliser(NamedTuple):
    r"""The normaliser of an :class:`OptimalPrior`.

    Attributes:
        log_z: :math:`\log Z`, nats.
        standard_error: of it, over the draws.
    """

    log_z: float
    standard_error: float


class OptimalPrior(nn.Module):
    r"""The implicit optimal prior: a base density times the ratio of the aggregate posterior to it.

    .. math:: \log p^*(z) = \log p_0(z) + T(z) - \log Z, \qquad
              T(z) \approx \log \frac{q(z)}{p_0(z)}, \quad q(z) = \frac1N \sum_n q(z \mid x_n)

    Of all priors q(z) gives the largest mean ELBO. T is a :class:`ppvae.Ratio`, ``self.ratio``:
    :class:`ppvae.SVI` trains it after each step of the pair, on draws of the guide for the batch
    against as many of the base (``beside=ppvae.Beside(steps=10)``). To the pair it is a constant,
    so any estimator runs on this prior as on another.

    **In training** the normaliser is a constant, which changes no gradient, and it is left out (or
    is what was last found). So what is shown is no bound, and may lie above log p(x). **To
    evaluate** call :meth:`normalize` after training. It writes log Z into a buffer, with a
    fingerprint of all that Z depends on: the numbers in the network and the base. The fingerprint
    is compared where a number is to be reported; if they differ, since the network was trained,
    loaded or changed by hand, the distribution's ``unnormalised`` says so, and evaluation raises.
    Copies and saved states have the buffers, and stay normalised.

    **Draws** are approximate: of ``num_candidates`` draws of the base one is taken, in proportion
    to e^T (sampling-importance-resampling). Their distribution tends to p* as the candidates become
    many beside the largest value of e^T / Z. Draws of the aggregate posterior itself are those of
    ``guide(x)`` for rows x of the data.

    Args:
        base: p0, a prior such as :class:`StandardNormal`, whose event is a vector or map, and whose
            parameters, if it has any, are frozen: they would change Z.
        net: T, from ``(N, D)``, or ``(N, C, H, W)``, to ``(N, 1)``; it may have
            dropout, which is off in the density.
        latent: the name that the latent has in the guide.
        num_candidates: of a draw, >= 1.

    Raises:
        TypeError: base is no module that gives a distribution with a density.
        ValueError: its event is a single number, or it would be trained; the network does not
            give one number per row; ``num_candidates`` out of range.
        RuntimeError: one of Pyro's own engines runs it, which would never train T.

    Source: Takahashi, Iwata, Yamanaka, Yamada & Yagi, Variational Autoencoder with Implicit Optimal
        Priors, 2019, section 3.

    Example:
        >>> from ppvae import conditionals, guides, models, nets
        >>> prior = OptimalPrior(conditionals.StandardNormal(2), nets.mlp(2, 16, 1))
        >>> model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), prior=prior)
        >>> guide, x = guides.Normal(nets.mlp(4, 8, 2 * 2)), torch.eye(4)
        >>> prior().unnormalised
        'its normaliser is not known: call prior.normalize(guide, x) after training'
        >>> log_z, standard_error = prior.normalize(guide, x)
        >>> standard_error < 0.01, prior().unnormalised
        (True, '')
        >>> prior().expand((5, 10)).sample().shape
        torch.Size([5, 10, 2])
    """

    log_z: Tensor
    log_z_error: Tensor
    fingerprint: Tensor

    @takes_numbers(num_candidates=1)
    def __init__(
        self, base: nn.Module, net: nn.Module, latent: str = "z", num_candidates: int = 1_000
    ) -> None:
        super().__init__()
        require_has("net", net, "named_parameters", "nets.mlp(...)")
        self.base, self.latent, self.num_candidates = base, latent, num_candidates
        self.ratio = Ratio(net, _AgainstBase(base, latent))
        self.register_buffer("log_z", torch.zeros(()))
        self.register_buffer("log_z_error", torch.zeros(()))
        self.register_buffer("fingerprint", torch.zeros((), dtype=torch.int64))
        _check_base(base)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            z = base().expand((2,)).sample()
            shape = self.ratio(z).shape
        if shape != (2,):  # of a map a number for each of its rows
            seen = f"of {tuple(z.shape)} it gave {(*shape, 1)}"
            raise ValueError(
                f"the network of OptimalPrior must give one number per row, (N, 1): {seen}; begin "
                "it with nn.Flatten()"
            )

    def forward(self, *context: Tensor) -> Tilted:
        p0, tilt = self.base(), self._tilt()
        return Tilted(p0, tilt, self.log_z, self.num_candidates, self._unnormalised)

    @torch.no_grad()
    def normalize(
        self,
        guide: Program,
        *args: Any,
        num_draws: int = 20_000,
        max_rows: int = 1_000,
        max_pairs: int = 100_000,
        seed: int | None = 0,
    ) -> Normaliser:
        r"""Compute log Z at the weights as they are now, keep it, and return it.

        .. math:: Z = \mathbb E_{p_0}[e^T] = \mathbb E_r\Big[\frac{p_0(z)\, e^{T(z)}}{r(z)}\Big],
                  \qquad r(z) = \tfrac12 p_0(z) + \tfrac1{2M} \sum_{i=1}^M q(z \mid x_i)

        Half of the draws are the base's, half the guide's, equally many for each row. Any rows give
        an unbiased estimate of Z; those of the training set have draws where e^T is large. The
        logarithm lies below log Z by about half the square of the standard error, so that reported
        numbers are too large by as much.

        Args:
            guide: which the pair was trained with.
            *args: data as it is called.
            num_draws: of r, >= 4, rounded up to a multiple of twice the rows.
            max_rows: M at most; of more rows so many are chosen at random.
            max_pairs: densities q(z | x_i) computed at once, which bounds the memory.
            seed: of rows and draws; None for torch's stream.

        Returns:
            log Z and its standard error, nats. They are buffers, too: ``prior.log_z`` and
            ``prior.log_z_error``.

        Raises:
            ValueError: no data; the guide has no such latent, or in other plates than the data's,
                or of another shape; numbers out of range; Z is not finite.

        Example:
            >>> from ppvae import conditionals, guides
            >>> prior = OptimalPrior(conditionals.StandardNormal(1), nn.Linear(1, 1))
            >>> _ = nn.init.constant_(prior.ratio.net.weight, 0.5)  # T = z / 2: Z = exp(1/8)
            >>> _ = nn.init.zeros_(prior.ratio.net.bias)
            >>> found = prior.normalize(guides.Normal(nn.Linear(3, 2)), torch.randn(50, 3))
            >>> abs(found.log_z - 1 / 8) < 4 * found.standard_error < 0.04
            True
        """
        for name, value, least in (
            ("num_draws", num_draws, 4),
            ("max_rows", max_rows, 1),
            ("max_pairs", max_pairs, 1),
        ):
            if not isinstance(value, int) or value < least:
                raise ValueError(
                    f"normalize: {name} must be at least {least}, and whole, got {value!r}"
                )
        with own_path(), evaluation_mode(guide, self), seeded(seed, self.log_z, *args):
            with pyro.validation_enabled(False):
                posterior, rows = self._posterior(guide, args, max_rows)
                repeats = -(-num_draws // (2 * rows))
                by_guide = posterior.sample((repeats,)).flatten(0, 1)
                by_base = self.base().expand((len(by_guide),)).sample()
                at_once = max(1, max_pairs // rows)
                try:
                    values = [
                        torch.cat(
                            [self._log_weight(posterior, z, rows) for z in draws.split(at_once)]
                        )
                        for draws in (by_base, by_guide)
                    ]
                except NoInverse as error:
                    raise ValueError(
                        f"normalize needs the guide's density at other draws than its own: {error};"
                        " give it a guide that has one, such as a normal trained on this model"
                    ) from error
        largest = torch.cat(values).max()
        halves = [(v - largest).exp() for v in values]
        mean = torch.stack([half.mean() for half in halves]).mean()
        variance = torch.stack([half.var() / len(half) for half in halves]).sum() / 4
        found = Normaliser((largest + mean.log()).item(), (variance.sqrt() / mean).item())
        if not torch.tensor(found).isfinite().all():
            raise ValueError(
                f"the normaliser of this prior is {found}: the network's T is not finite at its "
                "draws, or e^T cannot be integrated"
            )
        self.log_z.fill_(found.log_z)
        self.log_z_error.fill_(found.standard_error)
        self.fingerprint.fill_(self._fingerprint())
        return found

    def _posterior(self, guide: Program, args: tuple[Any, ...], max_rows: int) -> tuple[Any, int]:
        """q(z | x_i) of at most so many rows, of batch shape ``(M,)``; and M."""
        rows = next((len(arg) for arg in args if isinstance(arg, Tensor) and arg.dim()), 0)
        if not rows:
            raise ValueError("normalize needs the data, one row per datapoint: (guide, x)")
        if rows > max_rows:
            chosen = torch.randperm(rows)[:max_rows]
            args = tuple(
                arg[chosen.to(arg.device)]
                if isinstance(arg, Tensor) and arg.dim() and len(arg) == rows
                else arg
                for arg in args
            )
            rows = max_rows
        sites = sample_sites(trace(guide, args, {}))
        if self.latent not in sites:
            raise ValueError(
                f"the guide has no latent {self.latent!r}, but {sorted(sites)}: give "
                "OptimalPrior(..., latent=...)"
            )
        posterior, event = unmasked(sites[self.latent]["fn"]), self.base().event_shape
        if (posterior.batch_shape, posterior.event_shape) != ((rows,), event):
            raise ValueError(
                f"latent {self.latent!r} of the guide has batch shape "
                f"{tuple(posterior.batch_shape)} and event shape {tuple(posterior.event_shape)}; "
                f"for {rows} rows the prior needs ({rows},) and {tuple(event)}"
            )
        for why in ("estimated", "unnormalised"):
            if reason := not_a_density(posterior, why):
                raise ValueError(
                    f"latent {self.latent!r} of the guide has no density to weigh draws by "
                    f"({reason}): give normalize a guide that has one, such as a normal trained on "
                    "this model"
                )
        return posterior, rows

    def _log_weight(self, posterior: Any, z: Tensor, rows: int) -> Tensor:
        """log p0 + T - log r at draws ``(m, D)``; ``(m,)``, float64."""
        base = self.base().expand((len(z),)).log_prob(z).double()
        each = posterior.log_prob(z.unsqueeze(1).expand(len(z), rows, *z.shape[1:])).double()
        aggregate = each.logsumexp(1) - math.log(rows)
        r = torch.logaddexp(base, aggregate) - math.log(2)
        return base + self._tilt()(z).double() - r

    def _tilt(self) -> Callable[[Tensor], Tensor]:
        """T of ``(..., *event)``, ``(...)``, float32 at least, with the weights as they are now."""
        log_ratio, dims = self.ratio.held(), len(self.base().event_shape)
        return lambda z: full_precision(log_ratio(self._as_rows(z, dims))).reshape(z.shape[:-dims])

    def _as_rows(self, z: Tensor, dims: int) -> Tensor:
        """What the network is given: one batch dimension, and its own precision."""
        like = next((p for p in self.ratio.net.parameters() if p.is_floating_point()), z)
        z = z.to(like.dtype) if like.dtype != full_precision(like).dtype else promoted(z, like)
        if z.dtype != like.dtype:
            raise TypeError(
                f"OptimalPrior: z is {z.dtype} and the network {like.dtype}; give "
                f"z.to({like.dtype}), or make the pair {z.dtype} by model.to({z.dtype}) and "
                f"guide.to({z.dtype})"
            )
        return z.reshape(-1, *z.shape[-dims:])

    @torch.no_grad()
    def _fingerprint(self) -> int:
        """A hash of the numbers in network and base, whatever their precision."""
        digest = hashlib.blake2b(digest_size=8)
        for part in (self.ratio.net, self.base):
            for tensor in (*part.parameters(), *part.buffers()):
                digest.update(tensor.double().cpu().contiguous().numpy().tobytes())
        return int.from_bytes(digest.digest(), "little", signed=True)

    def _unnormalised(self) -> str:
        """Why the density is none; empty: it is one."""
        kept = int(self.fingerprint)
        if kept == 0:
            return "its normaliser is not known: call prior.normalize(guide, x) after training"
        if kept != self._fingerprint():
            return "its normaliser is of other weights: call prior.normalize(guide, x) again"
        return ""


class Tilted(dist.TorchDistribution):
    r"""A density times the exponential of a function, over its normaliser.

    .. math:: p(z) = p_0(z)\, e^{T(z)} / Z

    Args:
        base: p0, a distribution of vectors or maps.
        log_tilt: T, from ``(..., *event)`` to ``(...)``.
        log_z: log Z, 0-d.
        num_candidates: of each draw: draws of the base, of which one is taken in proportion to e^T.
        unnormalised: says why ``log_z`` is not the normaliser, or gives an empty word.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = False

    def __init__(
        self,
        base: Any,
        log_tilt: Callable[[Tensor], Tensor],
        log_z: Tensor,
        num_candidates: int,
        unnormalised: Callable[[], str],
    ) -> None:
        self.base, self.log_tilt, self.log_z = base, log_tilt, log_z
        self.num_candidates, self._reason = num_candidates, unnormalised
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    @property
    def unnormalised(self) -> str:
        """Why ``log_prob`` is no log-density, and the cure; empty: it is one."""
        return self._reason()

    @property
    def support(self) -> Any:
        return self.base.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> Tilted:
        base = self.base.expand(torch.Size(batch_shape))
        return Tilted(base, self.log_tilt, self.log_z, self.num_candidates, self._reason)

    def log_prob(self, value: Tensor) -> Tensor:
        log_p0: Tensor = self.base.log_prob(value)
        return log_p0 + self.log_tilt(value) - self.log_z

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Of ``num_candidates`` draws of the base one, in proportion to e^T, for each draw.

        That is the one of largest T + g, with g independent Gumbel noise; candidates are made in
        portions.
        """
        event = (None,) * len(self.event_shape)
        rows = max(1, (torch.Size(sample_shape) + self.batch_shape).numel())
        portion = max(1, _AT_ONCE // rows)
        best: Tensor | None = None
        chosen: Tensor | None = None
        for start in range(0, self.num_candidates, portion):
            number = min(portion, self.num_candidates - start)
            z = self.base.sample((number, *sample_shape))
            score = self.log_tilt(z)
            score = score - torch.empty_like(score).exponential_().log()
            score, index = score.max(0)
            z = z.gather(0, index[(None, ..., *event)].expand(1, *z.shape[1:])).squeeze(0)
            if best is not None and chosen is not None:
                z = torch.where((score > best)[(..., *event)], z, chosen)
                score = torch.maximum(score, best)
            best, chosen = score, z
        assert chosen is not None
        return chosen


@dataclass(frozen=True)
class _AgainstBase:
    """Draws of a latent, and as many of the base: the contrast of the ratio."""

    base: nn.Module
    latent: str

    def __call__(self, draws: Any) -> tuple[Tensor, Tensor]:
        z = draws.guide(self.latent)
        return z, self.base().expand(z.shape[:1]).sample()


def _check_base(base: Any) -> None:
    """Raise unless it gives vectors or maps, with a density, and has nothing to train."""
    p0: Any = None
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            p0 = base() if isinstance(base, nn.Module) else None
            p0.log_prob(p0.expand((2,)).sample())
    except (AttributeError, NotImplementedError, TypeError) as error:
        raise TypeError(
            "OptimalPrior(base): give a prior that can be drawn and has a density, such as "
            f"conditionals.StandardNormal(2), got {type(base).__name__}"
        ) from error
    if not p0.event_shape:
        raise ValueError(
            "OptimalPrior is the prior of a latent that is a vector or map: base has event shape ()"
        )
    trained = [name for name, p in base.named_parameters() if p.requires_grad]
    if trained:
        raise ValueError(
            f"OptimalPrior: base has parameters {trained} that would be trained, and the "
            "normaliser depends on them: freeze them, base.requires_grad_(False)"
        )
