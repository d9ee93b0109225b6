"""A guide for global latents, beside an encoder for those of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from ppvae.pairs import is_global, sample_sites, unnoticed
from ppvae.program import Program, local_parameters


class Global(Program):
    r"""One of Pyro's autoguides for the global latents, and a guide of the others.

    .. math:: q(g)\, \prod_n q(z_n \mid x_n)\quad\text{or}\quad q(g)\, \prod_n q(z_n \mid x_n, g)

    Global is what the model draws outside the plate ``"data"``. All autoguides will do, those that
    flatten latents into one vector too: ``AutoNormal``, ``AutoMultivariateNormal``,
    ``AutoLowRankMultivariateNormal``, ``AutoDelta`` (a point: no evidence).

    Args:
        make: an autoguide, or a ``functools.partial`` of one.
        model: a Pyro program.
        *data: rows as the model is called, to find the latents and set the autoguide up.
        local: the guide of the latents in the plate ``"data"``, called as the model is; None: there
            are none.
        sees_globals: call it with the draws of the globals first, a dictionary by name; they have
            no dims for particles and rows.

    Raises:
        ValueError: the model draws nothing outside the plate ``"data"``; no ``local`` for latents
            inside of it.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> import ppvae
        >>> from ppvae import guides, nets
        >>> def model(x):  # factor analysis with a prior on its loadings
        ...     W = pyro.sample("W", dist.Normal(torch.zeros(4, 2), 1.).to_event(2))
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.).to_event(1))
        ...         pyro.sample("x", dist.Normal(z @ W.T, 0.5).to_event(1), obs=x)
        >>> x = torch.randn(40, 4)
        >>> guide = guides.Global(AutoNormal, model, x, local=guides.Normal(nets.mlp(4, 4)))
        >>> history = ppvae.fit(ppvae.SVI(model, guide), x, epochs=1, progress=False)
        >>> guide.auto.locs.W.shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        make: Callable[..., AutoGuide],
        model: Callable[..., Any],
        *data: Tensor,
        local: Callable[..., Any] | None = None,
        sees_globals: bool = False,
    ) -> None:
        super().__init__()
        if local is not None and not callable(local):
            raise TypeError(f"local must be a guide, a program, got {type(local).__name__}")
        with local_parameters(), unnoticed(model, model):
            sites = sample_sites(pyro.poutine.trace(model).get_trace(*data))
        latents = {name: site for name, site in sites.items() if not site["is_observed"]}
        names = [name for name, site in latents.items() if is_global(site)]
        if not names:
            raise ValueError(
                f"the model draws nothing outside the plate 'data', but {sorted(latents)} in it: "
                "use guides.Auto, or an encoder"
            )
        if local is None and len(names) < len(latents):
            raise ValueError(
                f"local is None, and the model draws {sorted(latents.keys() - set(names))} for "
                "each row: give their guide, local=guides.Normal(...)"
            )
        self.auto = make(pyro.poutine.block(model, expose=names))
        with local_parameters(), torch.no_grad():
            self.auto(*data)
        self.local, self.sees_globals = local, sees_globals

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Draw the globals, then the latents of the rows."""
        drawn = self.auto(*args, **kwargs)
        if self.local is None:
            return drawn
        before = (drawn,) if self.sees_globals else ()
        return self.local(*before, *args, **kwargs)
