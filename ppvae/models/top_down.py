"""A deep hierarchy's model: latents from the top down, each given all that are above it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from ppvae.arguments import number, require_has, takes_numbers
from ppvae.chain import Chain, require_distribution
from ppvae.conditionals import SoftNormal
from ppvae.program import Program, data_plate


class TopDown(Program):
    r"""A hierarchy of L feature maps, each drawn given all those above it, ``"z1"`` the last.

    .. math:: p(x, z) = p(z_L) \prod_{l=1}^{L-1} p_\theta(z_l \mid z_{l+1}, \dots, z_L) \;
              p_\theta(x \mid z_1, \dots, z_L)

    What the latents above have left is h, which a path carries down; see
    :class:`ppvae.nets.TopDown`. Which hierarchy it is, NVAE's or another, is a matter of the path's
    groups. The guide for it is :class:`ppvae.guides.TopDown`.

    Args:
        path: a :class:`ppvae.nets.TopDown`.
        likelihood: the conditional of the path's last h, p(x | z).
        normal: the conditional of a group's parameters s, p(z_l | ...); by default
            ``conditionals.SoftNormal()``.

    Attributes:
        shapes: event shape of every latent, top first, and of ``"x"``, as they were found when
            the path was walked once.
        integer: whether x is of integers, as ``conditionals.Categorical`` has them.
        balance: for :class:`ppvae.elbo.Balanced`, by latent: 4^i / n at the i-th size from the top,
            where n latents have that size, over the smallest of these.

    Raises:
        ValueError: a group fails for the h that it is given, or draws no latent, or two; the
            likelihood fails for the last h.
        TypeError: the likelihood or ``normal`` gives no distribution.

    Source: Vahdat & Kautz, NVAE, 2020; Child, Very Deep VAEs, 2021.

    Example:
        >>> from ppvae import conditionals, models, nets
        >>> parts = nets.nvae((1, 28, 28), groups=(1, 2), channels=4)
        >>> model = models.TopDown(parts.path, conditionals.Bernoulli(parts.out, event_dim=3))
        >>> model.shapes
        {'z3': (4, 4, 4), 'z2': (4, 7, 7), 'z1': (4, 7, 7), 'x': (1, 28, 28)}
        >>> model(size=5).shape
        torch.Size([5, 1, 28, 28])
    """

    path: Any  # of a TopDown in ppvae.nets, which this room does not import

    @takes_numbers
    def __init__(
        self, path: nn.Module, likelihood: nn.Module, normal: nn.Module | None = None
    ) -> None:
        super().__init__()
        require_has("path", path, "start names", "nets.TopDown(start, groups)")
        require_has("likelihood", likelihood, "parameters", "conditionals.Bernoulli(net)")
        self.path, self.likelihood = path, likelihood
        self.normal = SoftNormal() if normal is None else normal
        self.shapes, self.integer = self._walked_once()
        places = [shape[-2:] for name, shape in self.shapes.items() if name != "x"]
        scale, count = {size: i for i, size in enumerate(dict.fromkeys(places))}, Counter(places)
        weights = [4 ** scale[size] / count[size] for size in places]
        self.balance = {n: w / min(weights) for n, w in zip(self.path.names, weights, strict=True)}

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """Observe ``x``, ``(N, ...)``; or draw ``size`` new rows if x is None. Returns x.

        With both, x is a minibatch of a data set of ``size`` rows.
        """
        with data_plate(x, size=size):
            h = self._walk(lambda name, fn: pyro.sample(name, fn))
            value: Tensor = pyro.sample("x", self.likelihood(h), obs=x)
        return value

    def decode(
        self,
        size: int = 1,
        temperature: float = 1.0,
        given: Mapping[str, Tensor] | None = None,
    ) -> Any:
        r"""p(x | z) at latents drawn from the prior, those that are given apart.

        .. math:: z_l = \mu_l + t\, \sigma_l \epsilon

        The networks run in the mode that they have: ``model.eval()`` first, or batch norm takes
        its statistics from these latents.

        Args:
            size: how many rows, unless some are given.
            temperature: t >= 0; below 1 the pictures are of more likely latents, at 0 of means.
            given: latents by name, ``(..., C, H, W)`` with the same leading dimensions, or some
                that broadcast.

        Raises:
            ValueError: a negative temperature; a name or shape that the model has not.

        Example:
            >>> from ppvae import conditionals, models, nets
            >>> parts = nets.nvae((1, 8, 8), groups=(1, 1), channels=4, blocks=1)
            >>> model = models.TopDown(parts.path, conditionals.Bernoulli(parts.out, event_dim=3))
            >>> top = torch.zeros(1, *model.shapes["z2"])  # held, while the others are drawn
            >>> model.eval().decode(6, temperature=0.7, given={"z2": top}).mean.shape
            torch.Size([6, 1, 8, 8])
        """
        given = {} if given is None else given
        temperature = number("temperature", temperature, float)
        if not temperature >= 0:
            raise ValueError(f"temperature scales standard deviations: >= 0, got {temperature}")
        for name, z in given.items():
            if name == "x" or tuple(z.shape[-3:]) != self.shapes.get(name):
                latents = {n: shape for n, shape in self.shapes.items() if n != "x"}
                seen = f"{name!r} of shape {tuple(z.shape)}"
                raise ValueError(f"given has {seen}, and the latents are (..., *shape): {latents}")
        leading = torch.broadcast_shapes((size,), *(z.shape[:-3] for z in given.values()))

        def draw(name: str, stats: Tensor, h: Tensor) -> Tensor:
            if name in given:
                return given[name]
            fn = self.normal(stats)
            fn = fn.expand(torch.broadcast_shapes(leading, fn.batch_shape))
            z: Tensor = fn.mean + temperature * (fn.sample() - fn.mean)
            return z

        return self.likelihood(self.path(draw))

    def _walk(self, sample: Callable[[str, Any], Tensor]) -> Tensor:
        """The last h. The guide's walk is used as far as the latents are the very ones it drew."""
        drawn: dict[str, Tensor] = {}
        kept = self.path.recall()
        if kept is not None:
            steps, h = kept
            for name, (stats, z) in steps.items():
                drawn[name] = sample(name, self.normal(stats))
                if drawn[name] is not z:
                    break
            else:
                return h

        def draw(name: str, stats: Tensor, h: Tensor) -> Tensor:
            return drawn[name] if name in drawn else sample(name, self.normal(stats))

        return self.path(draw)

    def _walked_once(self) -> tuple[dict[str, tuple[int, ...]], bool]:
        """Event shapes, by a walk on zeros; raises if groups do not fit."""
        chain = Chain("h", tuple(self.path.start.shape), like=self)
        shapes: dict[str, tuple[int, ...]] = {}
        for name, group in zip(self.path.names, self.path.groups, strict=True):
            drawn: list[Tensor] = []

            def draw(stats: Tensor, h: Tensor, drawn: list[Tensor] = drawn) -> Tensor:
                fn = require_distribution("normal", self.normal(stats))
                drawn.append(torch.zeros_like(fn.mean))
                return drawn[-1]

            chain.follow(f"the group of {name}", "h", _Called(group, draw))
            if len(drawn) != 1:
                raise ValueError(f"the group of {name} draws {len(drawn)} latents: each draws one")
            shapes[name] = tuple(drawn[0].shape[drawn[0].dim() - 3 :])
        chain.follow("p(x | z)", "x", self.likelihood, argument="likelihood")
        return shapes | {"x": chain.shapes["x"]}, chain.integer


class _Called(nn.Module):
    """A group as a module of h alone."""

    def __init__(self, group: nn.Module, draw: Any) -> None:
        super().__init__()
        self.group, self.draw = group, draw

    def forward(self, h: Tensor) -> Tensor:
        h = self.group(h, self.draw)
        return h
