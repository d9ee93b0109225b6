"""Networks beside a pair: density ratios, codebooks; what they learn by, and whose they are.

They stand inside a program, or in what an estimator remembers, and have a rule of their own, which
:class:`ppvae.SVI` carries out after each step of the pair. To the pair they are constants.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn
from torch.distributions import TransformedDistribution
from torch.func import functional_call

from ppvae.arguments import takes_numbers

Inputs = Tensor | Sequence[Tensor]


class Auxiliary(nn.Module):
    """A module beside a pair, with a rule of its own after each step of the pair.

    Its parameters are never the pair's: the pair's optimiser does not hold them, and no check asks
    them for a gradient. After each step of the pair :class:`ppvae.SVI` draws ``steps`` times, takes
    with each draw the loss and a step of its own optimiser (:class:`ppvae.Beside`), and then calls
    :meth:`update`. A subclass has whichever of the four methods it needs. What it computes for the
    pair must not depend on its parameters: detach them, as :class:`Ratio` does. What it remembers
    are buffers, filled in place; what is frozen when ``SVI`` meets it is not trained.

    Raises:
        RuntimeError: one of Pyro's own engines runs it, which would never train it.

    Example:
        >>> class Mean(Auxiliary):  # of a latent's draws, over all steps
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.register_buffer("sums", torch.zeros(2))
        ...         self.register_buffer("seen", torch.zeros(2))
        ...     def draw(self, draws):
        ...         z = draws.guide("z")
        ...         self.seen.copy_(torch.stack([z.sum(), torch.tensor(float(z.numel()))]))
        ...         return ()
        ...     def update(self, total):
        ...         total([self.seen])
        ...         self.sums += self.seen
        ...     def report(self):
        ...         return {"mean_code": self.sums[0] / self.sums[1]}
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.refuse_stock_engine()
        return super().__call__(*args, **kwargs)

    def refuse_stock_engine(self) -> None:
        """Raise ``RuntimeError`` where one of Pyro's own engines runs what it stands in."""
        if any(getattr(handler, "param_only", False) for handler in _PYRO_STACK):
            raise RuntimeError(
                f"{type(self).__name__} has a loss of its own, and pyro.infer.SVI would never "
                "train it: use ppvae.SVI"
            )

    def draw(self, draws: Any) -> tuple[Tensor, ...]:
        """What :meth:`loss` is a function of, drawn anew without gradients.

        Args:
            draws: ``draws.args`` is the batch; ``draws.guide("z")`` runs the guide and is the
                draw of a site, ``(N, ...)``; ``draws.model()`` runs the model and holds the draw of
                each site by name, data included. ``draws.guide_sites()`` and
                ``draws.model_sites()`` are Pyro's sites of such a run, with their distributions.
        """
        return ()

    def loss(self, *drawn: Tensor) -> Tensor | None:
        """Its own loss, summed over rows; None: it has none."""
        return None

    def update(self, total: Callable[[list[Tensor]], None]) -> None:
        """Change buffers, once after each step of the pair.

        Args:
            total: replaces each tensor of a list by its sum over all processes.
        """

    def report(self) -> dict[str, Tensor]:
        """Numbers for the history, whose rows have their means over an epoch's steps."""
        return {}


class Ratio(Auxiliary):
    r"""A network that learns the logarithm of a ratio of densities, from draws of both.

    .. math:: T^*(u) = \log a(u) - \log b(u) = \arg\min_T \;
              \mathbb E_a[\operatorname{softplus}(-T)] + \mathbb E_b[\operatorname{softplus}(T)]

    It is logistic regression of which of the two a point comes from: 2 log 2 = 1.386 nats per row
    where nothing tells them apart, 2 log 2 - 2 JSD(a, b) at the optimum. Called from a pair, or
    from an estimator, it is T with its weights held, in evaluation mode: gradients reach the
    inputs, and never the network. Its own loss runs the network in the mode that it has.

    The history shows ``ratio_loss``, nats per row, and ``ratio_accuracy``, the share of points that
    the sign of T assigns right.

    Args:
        net: from the inputs, ``(..., D)`` each, to ``(..., 1)``.
        contrast: from draws (see :meth:`Auxiliary.draw`) to inputs from the numerator's density a
            and to as many from the denominator's b: a tensor, or a tuple of them, each.

    Raises:
        ValueError: the network does not give one number per row; a numerator and denominator of
            different shapes.

    Source: Sugiyama, Suzuki & Kanamori, Density Ratio Estimation in Machine Learning, 2012,
    section 4; Goodfellow et al., Generative Adversarial Networks, 2014.

    Example:
        >>> ratio = Ratio(nn.Linear(2, 1), lambda draws: (draws.guide("z"), draws.model()["z"]))
        >>> z = torch.zeros(5, 2, requires_grad=True)
        >>> ratio(z).sum().backward()
        >>> ratio(z).shape, z.grad.shape, ratio.net.weight.grad
        (torch.Size([5]), torch.Size([5, 2]), None)
    """

    seen: Tensor

    @takes_numbers
    def __init__(self, net: nn.Module, contrast: Callable[[Any], tuple[Inputs, Inputs]]) -> None:
        super().__init__()
        self.net, self.contrast = net, contrast
        self.register_buffer("seen", torch.zeros(2), persistent=False)  # loss, accuracy

    def forward(self, *inputs: Tensor) -> Tensor:
        """T of each row, ``(...)``, a constant function as far as gradients are concerned."""
        return self.held()(*inputs)

    def held(self) -> Callable[..., Tensor]:
        """T as a function, with the weights that the network has now, for a call later on.

        A distribution whose ``log_prob`` is asked for when the program has ended needs it.
        """
        self.refuse_stock_engine()
        tensors = {n: p.detach() for n, p in self.net.named_parameters()}
        tensors |= dict(self.net.named_buffers())

        def log_ratio(*inputs: Tensor) -> Tensor:
            with _evaluating(self.net):
                return _one_per_row(functional_call(self.net, tensors, inputs), inputs)

        return log_ratio

    def draw(self, draws: Any) -> tuple[Tensor, ...]:
        numerator, denominator = map(_as_tuple, self.contrast(draws))
        shapes = [[tuple(t.shape) for t in side] for side in (numerator, denominator)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"a ratio compares draws of one shape: its contrast gave {shapes[0]} for the "
                f"numerator and {shapes[1]} for the denominator"
            )
        return *numerator, *denominator

    def loss(self, *drawn: Tensor) -> Tensor:
        half = len(drawn) // 2
        sides = drawn[:half], drawn[half:]
        if next(self.net.buffers(), None) is None:
            both = tuple(map(torch.cat, zip(*sides, strict=True)))  # one pass costs less than two
            numerator, denominator = _one_per_row(self.net(*both), both).chunk(2)
        else:  # batch norm: a batch is of one density
            numerator, denominator = (_one_per_row(self.net(*side), side) for side in sides)
        loss = F.softplus(-numerator).sum() + F.softplus(denominator).sum()
        with torch.no_grad():
            right = ((numerator > 0).float().mean() + (denominator <= 0).float().mean()) / 2
            self.seen.copy_(torch.stack([loss / numerator.numel(), right.to(loss)]))
        return loss

    def report(self) -> dict[str, Tensor]:
        return {"ratio_loss": self.seen[0], "ratio_accuracy": self.seen[1]}


def drawn_with(ratio: Ratio, sites: Mapping[str, dict[str, Any]], where: str) -> tuple[Any, Tensor]:
    """The distribution and the draw of the one site whose density a ratio stands for.

    Args:
        ratio: which distributions of that kind have as an attribute.
        sites: of a run, as Pyro has them.
        where: whose sites they are, for the message.

    Raises:
        ValueError: no site is drawn so, or several are.
    """
    found = []
    for site in sites.values():
        fn = site["fn"]
        while hasattr(fn, "base_dist") and not isinstance(fn, TransformedDistribution):
            fn = fn.base_dist
        if getattr(fn, "ratio", None) is ratio:
            found.append((fn, site["value"]))
    if len(found) != 1:
        raise ValueError(
            f"a ratio learns from the one site of the {where} that its own distribution draws, as "
            f"it is, and {len(found)} of {sorted(sites)} are drawn so: give each site a module of "
            "its own, and put a transform into what draws"
        )
    return found[0]


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a pair, or of an auxiliary, by name: without those of auxiliaries in it.

    Example:
        >>> pair = nn.ModuleDict({"net": nn.Linear(2, 1), "ratio": Ratio(nn.Linear(2, 1), None)})
        >>> list(own_parameters(pair))
        ['net.weight', 'net.bias']
    """
    others = [part for part in auxiliaries(module).values() if part is not module]
    beside = {id(p) for part in others for p in part.parameters()}
    return {name: p for name, p in module.named_parameters() if id(p) not in beside}


def auxiliaries(module: nn.Module) -> dict[str, Auxiliary]:
    """The auxiliaries in a module, by name, in its order."""
    return {name: part for name, part in module.named_modules() if isinstance(part, Auxiliary)}


def _as_tuple(inputs: Inputs) -> tuple[Tensor, ...]:
    return (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)


def _one_per_row(output: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    rows = {tensor.shape[0] for tensor in inputs}  # with particles, not of every input
    if not isinstance(output, Tensor):
        raise TypeError(f"net: the network of a ratio gives a tensor, got {type(output).__name__}")
    if output.dim() < 2 or output.shape[-1] != 1 or output.shape[0] not in rows:
        raise ValueError(
            f"the network of a ratio must give one number per row, (..., 1): of inputs "
            f"{[tuple(t.shape) for t in inputs]} it gave {tuple(output.shape)}"
        )
    return output.squeeze(-1)


@contextmanager
def _evaluating(net: nn.Module) -> Iterator[None]:
    """``eval()``, and then each module's own mode again."""
    modes = [(part, part.training) for part in net.modules()]
    try:
        net.eval()
        yield
    finally:
        for part, mode in modes:
            part.training = mode
