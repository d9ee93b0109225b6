"""Pyro's automatic guides, with parameters that belong to datapoints, not to batch positions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppvae.arguments import require_programs
from ppvae.local import Indexed
from ppvae.pairs import DATA_PLATE, FAILURES, reason, sample_sites
from ppvae.program import Program, local_parameters


class Auto(Program):
    r"""A Pyro autoguide that keeps plates, ready for minibatches.

    .. math:: z_n = T^{-1}(u_n), \qquad u_n \sim N(\mu_n, \operatorname{diag}\sigma_n^2)
              \quad (\mathrm{AutoNormal})

    A bare autoguide has one row of parameters for each *position* in the batch, made when it is
    first called: shuffled minibatches would all train the same few rows. Here it is set up on the
    whole data set at once, and is called with row numbers last, like
    :class:`~ppvae.guides.PerDatapoint`, with the model in :class:`ppvae.local.Indexed`. It covers
    models with several latents and with constrained ones.

    Args:
        make: an autoguide that keeps plates: ``AutoNormal``, ``AutoDelta``, or a
            ``functools.partial`` of one. Those that flatten all latents into one vector
            (``AutoMultivariateNormal``, ``AutoLowRankMultivariateNormal``, ``AutoIAFNormal``) have
            no weight per datapoint; use them bare, on the full data, with ``joint=True``.
        model: a Pyro program, not yet ``Indexed``.
        *data: all rows, as the model is called.

    Raises:
        ValueError: the autoguide does not keep the plate ``"data"``; the model fails on the data.
        TypeError: the model is no program, or the data are no rows.

    Example:
        >>> import torch, ppvae
        >>> from pyro.infer.autoguide import AutoNormal
        >>> from ppvae import conditionals, guides, models, nets
        >>> from ppvae.local import Indexed
        >>> x = torch.bernoulli(torch.full((20, 4), 0.5))
        >>> model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
        >>> guide = guides.Auto(AutoNormal, model, x)
        >>> svi = ppvae.SVI(Indexed(model), guide)
        >>> history = ppvae.fit(svi, (x, torch.arange(20)), epochs=2, batch_size=5, progress=False)
        >>> guide.auto.locs.z.shape
        torch.Size([20, 2])
    """

    def __init__(
        self, make: Callable[..., AutoGuide], model: Callable[..., Any], *data: Tensor
    ) -> None:
        super().__init__()
        require_programs(model=model)
        if not callable(make):
            raise TypeError(f"make must make a guide, as AutoNormal does, got {make!r}")
        if not data or not _is_rows(data[0]):
            seen = ", ".join(type(value).__name__ for value in data) or "nothing"
            raise TypeError(f"data must be tensors whose rows are datapoints, got {seen}")
        self.num_rows = len(data[0])
        plates = functools.partial(_plate_of_rows, self.num_rows)
        index = torch.arange(self.num_rows, device=data[0].device)
        flattens = ValueError(
            f"make: {getattr(make, '__name__', make)} flattens all latents into one vector, "
            f"outside the plate {DATA_PLATE!r}: use AutoNormal, or pass it bare: "
            "svi.step(x, joint=True)"
        )
        try:
            self.auto = make(Indexed(model), create_plates=plates)
        except TypeError as error:  # it takes no plates
            raise flattens from error
        if not callable(self.auto):
            raise TypeError(f"make must make a guide, as AutoNormal does, and it gave {self.auto}")
        try:
            with local_parameters(), torch.no_grad():
                drawn = pyro.poutine.trace(self.auto).get_trace(*data, index)
        except FAILURES as error:
            raise ValueError(f"the model fails on the data: {reason(error)}") from error
        for site in sample_sites(drawn).values():
            if DATA_PLATE not in {frame.name for frame in site["cond_indep_stack"]}:
                raise flattens

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Draw the latents of the rows whose numbers are the last argument."""
        with _AsBatch():
            return self.auto(*args, **kwargs)


def _is_rows(value: Any) -> bool:
    """Whether it is a tensor of at least one row."""
    if not isinstance(value, Tensor) or value.is_nested:
        return False
    return value.dim() > 0 and len(value) > 0


def _plate_of_rows(num_rows: int, *args: Tensor, size: int | None = None) -> Any:
    return pyro.plate(DATA_PLATE, num_rows, subsample=args[-1], dim=-1)


class _AsBatch(Messenger):
    """Pyro picks rows of parameters in a subsampled plate, and scales it; here a batch is plain."""

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            msg["stop"] = True  # no other handler needs the row numbers
            return
        frames = msg["cond_indep_stack"]
        for frame in frames:
            if frame.name == DATA_PLATE:
                msg["scale"] = msg["scale"] * (frame.size / frame.full_size)
        msg["cond_indep_stack"] = tuple(
            frame._replace(full_size=frame.size) if frame.name == DATA_PLATE else frame
            for frame in frames
        )
