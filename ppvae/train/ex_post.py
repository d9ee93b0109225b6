"""A prior for the codes of a pair that is trained already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from ppvae.arguments import number
from ppvae.check.pair import check_shapes
from ppvae.check.programs import check_programs, require_runs
from ppvae.global_latents import require_of_rows
from ppvae.intake import part_of, tensors
from ppvae.pairs import evaluation_mode, own_path, sample_sites, seeded, trace
from ppvae.program import Program, data_plate
from ppvae.train.fit import fit
from ppvae.train.history import History
from ppvae.train.svi import SVI

_ROWS = 1000  # that the guide is run on at once


def fit_prior(
    prior: nn.Module,
    guide: Callable[..., Any],
    data: Any,
    *,
    epochs: int,
    optim: Any = torch.optim.Adam,
    latent: str = "z",
    seed: int = 0,
    **options: Any,
) -> History:
    r"""Fit a prior to the codes of a trained guide: maximum likelihood, one draw of each row.

    .. math:: \max_\psi\; \frac1N \sum_n \log p_\psi(z_n), \qquad z_n \sim q(z \mid x_n)

    An autoencoder has no p(z) to draw from, and the aggregate of a VAE's q(z | x) is not its
    prior: ``models.VAE(model.likelihood, prior=prior)`` is then a model that draws images, and
    whose ELBO with the same guide is at least as good as that of the prior before, if this one
    can be it. Decoder and encoder are not run again, so it is also the quick way to the second
    stage of a VQ-VAE.

    Args:
        prior: called without arguments: ``conditionals.Mixture``, a ``posteriors.Flow`` of
            ``nets.Constant``, ``conditionals.CodePrior`` with a network. It is changed in place.
        guide: a program; it is run in evaluation mode, and stays as it is.
        data: a ``ppvae.data.Dataset`` (its ``train``), a split, a tensor, or a tuple of tensors as
            the guide is called with; arrays, frames and the other containers of :func:`ppvae.fit`.
        epochs: passes over the codes, >= 1.
        optim: as that of :class:`ppvae.SVI`.
        latent: the name of the guide's site.
        seed: of the draws, and as in :func:`ppvae.fit`.
        **options: for :func:`ppvae.fit`, such as ``batch_size``, ``checkpoint``, ``progress``.

    Returns:
        The :class:`ppvae.History` of mean log p(z), nats per row.

    Raises:
        TypeError, PairError: the data are none, or the guide does not run on them.
        ValueError: the guide has no such site, or draws NaN or infinity there; the prior is over
            values of another shape; else as :func:`ppvae.fit`.

    Source: Ghosh et al., From Variational to Deterministic Autoencoders, 2020, section 4.1.

    Example:
        >>> import torch, ppvae
        >>> from ppvae import conditionals, guides, models, nets
        >>> decoder, encoder = nets.mlp(2, 16, 64), nets.mlp(64, 16, 2)
        >>> model = models.Autoencoder(conditionals.Bernoulli(decoder), latent_dim=2)
        >>> prior = conditionals.Mixture(5, 2)
        >>> x = torch.bernoulli(torch.full((200, 64), 0.5))
        >>> history = ppvae.fit_prior(prior, guides.PointMass(encoder), x, epochs=2, progress=False)
        >>> models.VAE(model.likelihood, prior=prior)(size=3).shape
        torch.Size([3, 64])
    """
    data = part_of(data, "train", data)
    given = data if isinstance(data, (tuple, list)) else (data,)
    check_programs(prior=prior, guide=guide)
    if not isinstance(latent, str):
        raise TypeError(f"latent must be the name of a site of the guide, got {latent!r}")
    args = tensors(given, guide)
    if wrong := [type(part).__name__ for part in args if not isinstance(part, Tensor)]:
        raise TypeError(f"data must be arrays, tensors or frames for the guide, got {wrong[0]}")
    check_shapes(guide, args)
    require_runs([part[:2] for part in args], guide=guide)
    codes = _codes(guide, args, latent, number("seed", seed, int))
    _check_shape(prior, codes, latent)
    svi = SVI(_Observed(prior), _Nothing(), optim)
    return fit(svi, codes, epochs=epochs, seed=seed, **options)


class _Observed(Program):
    """The prior alone, its latent observed."""

    def __init__(self, prior: nn.Module) -> None:
        super().__init__()
        self.prior = prior

    def forward(self, z: Tensor, size: int | None = None) -> Tensor:
        with data_plate(z, size=size):
            value: Tensor = pyro.sample("z", self.prior(), obs=z)
        return value


class _Nothing(Program):
    """A guide without latents."""

    def forward(self, z: Tensor, size: int | None = None) -> None:
        pass


@torch.no_grad()
def _codes(guide: Any, args: tuple[Tensor, ...], latent: str, seed: int) -> Tensor:
    """A draw of the latent for each row."""
    parts = []
    quiet = pyro.validation_enabled(False)  # NaN is reported below
    with own_path(), evaluation_mode(guide), seeded(seed, *args), quiet:
        for rows in zip(*(tensor.split(_ROWS) for tensor in args), strict=True):
            sites = sample_sites(trace(guide, rows, {}))
            require_of_rows(sites, "the codes of rows depend on its draw")
            if latent not in sites:
                raise ValueError(
                    f"fit_prior(latent={latent!r}): the guide has no such site, but {sorted(sites)}"
                )
            parts.append(sites[latent]["value"])
    codes = torch.cat(parts)
    broken = int((~codes.isfinite()).flatten(1).any(1).sum())
    if broken:
        raise ValueError(
            f"fit_prior: the guide draws NaN or infinity in {latent!r} for {broken} of "
            f"{len(codes)} rows: look at the data and at its encoder's outputs"
        )
    return codes


def _check_shape(prior: nn.Module, codes: Tensor, latent: str) -> None:
    """Raise ``ValueError`` unless the prior is over values of the codes' shape."""
    try:
        expected = prior().event_shape
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise TypeError(
            "prior must give a distribution when it is called without arguments, as "
            f"conditionals.Mixture does, got {type(prior).__name__} ({error})"
        ) from error
    if expected != codes.shape[1:]:
        raise ValueError(
            f"fit_prior: the prior is over values of shape {tuple(expected)}, and the guide's "
            f"{latent!r} has {tuple(codes.shape[1:])}: make the prior of that shape"
        )
