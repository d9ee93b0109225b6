"""What every estimator shares: from a pair's log-weights to a loss with the right gradient."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import pyro.infer
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from ppvae.elbo import gradients
from ppvae.elbo.discrete import THROUGH, Antithetic, Bits
from ppvae.elbo.state import State
from ppvae.enumeration import sum_of
from ppvae.pairs import DATA_PLATE, Leaves, Memory, is_rounded, kind, own_path
from ppvae.program import method_owners, stored
from ppvae.terms import NoInverse
from ppvae.weights import LogWeights, weigh, whole_weights
from ppvae.wrapped import innermost


@dataclass(frozen=True, eq=False)
class Estimator(pyro.infer.ELBO):
    r"""A bound on log p(x) for each datapoint, and how its gradient is estimated.

    A leaf implements :meth:`bound`, from log-weights ``(K, N)`` to one value per datapoint
    ``(N,)`` in nats, larger is better. The loss is Pyro's: minus the sum over the batch, times
    N_total / N if the data plate is subsampled (outside the logarithm).

    .. math:: \text{loss} = -\tfrac{N_\text{total}}{N} \sum_n B(\log w_{1n}, \dots, \log w_{Kn})

    Args:
        num_particles: K >= 1 draws from the guide per datapoint.
        gradient: how the guide's gradient is estimated, see :mod:`ppvae.elbo.gradients`.
    """

    num_particles: int = 1
    gradient: str = "pathwise"

    gradients: ClassVar[tuple[str, ...]] = ("pathwise", "dreg", "score", "vimco")
    # +1: a bound from below, maximised; -1: a bound from above, minimised by the guide alone.
    sign: ClassVar[int] = 1

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if "beta" in kwargs and "beta" not in cls.__dataclass_fields__:
            raise TypeError(
                f"{cls.__name__} has no beta: only the ELBO is a likelihood minus a KL, so only "
                "there a weight on the KL has a meaning; use elbo.ELBO(beta=...)"
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not isinstance(self.num_particles, Integral) or not 1 <= self.num_particles < 2**63:
            raise ValueError(
                f"{name}: num_particles must be at least 1 and a whole number, got "
                f"{self.num_particles!r}"
            )
        if not isinstance(self.gradient, str) or self.gradient not in self.gradients:
            hint = "" if isinstance(self.gradient, str) else "; name other arguments: num_groups=8"
            raise ValueError(
                f"{name}: gradient={self.gradient!r} is not defined; use one of "
                f"{self.gradients}{hint}"
            )
        if self.gradient in ("vimco", "vargrad", "disarm") and self.num_draws < 2:
            raise ValueError(
                f'{name}: gradient="{self.gradient}" compares particles, so it needs num_particles '
                '>= 2; use gradient="score" for one particle'
            )
        if self.gradient == "disarm" and self.num_draws % 2:
            raise ValueError(
                f'{name}: gradient="disarm" draws in pairs, so num_particles must be even, got '
                f"{self.num_particles}"
            )

        own = type(self)
        undefined = own.dreg_coefficient is Estimator.dreg_coefficient
        if (
            self.gradient in ("dreg", "gdreg")
            and undefined
            and own.surrogate is Estimator.surrogate
        ):
            raise TypeError(
                f"{name} takes gradient={self.gradient!r} and defines no dreg_coefficient: define "
                "it, or leave the gradient out of its ``gradients``"
            )

    @property
    def num_draws(self) -> int:
        """Draws per datapoint: K, unless they come in groups."""
        return self.num_particles

    # -- what a leaf defines ---------------------------------------------------------------------
    @abstractmethod
    def bound(self, log_w: Tensor) -> Tensor:
        """The bound of each datapoint: log-weights ``(K, N)`` to ``(N,)``, in nats."""

    def bound_of_others(self, log_w: Tensor, put: Tensor | None = None) -> Tensor:
        """The bound without particle k, or with ``put[k]`` in its place, for each k: ``(K, N)``.

        It is the baseline of the score functions: what does not depend on z_k adds no bias. This
        is K bounds in turn; where a bound is made of sums, :mod:`ppvae.elbo.importance` has a way
        that takes the time of two.
        """
        middle = log_w[:0].expand(len(log_w), 0, *log_w.shape[1:]) if put is None else put[:, None]
        rows = (torch.cat([log_w[:k], middle[k], log_w[k + 1 :]]) for k in range(len(log_w)))
        return torch.stack([self.bound(row) for row in rows])

    def dreg_coefficient(self, log_w: Tensor) -> Tensor:
        r""":math:`c_k - \partial c_k / \partial \ell_k` of the bound, ``(K, N)``."""
        raise NotImplementedError(f"{type(self).__name__} defines no dreg_coefficient")

    def effective(self, weights: LogWeights, state: State) -> Tensor:
        """The log-weights that enter :meth:`bound`, ``(K, N)``; a linear bound may temper them."""
        for site, why in weights.estimated.items():
            raise ValueError(
                f"{type(self).__name__} is not linear in the log-weights, and the log-density of "
                f"site {site!r} is an estimate, whose error would not average out: use elbo.ELBO. "
                f"{why}"
            )
        for program, site in weights.site_scales:
            raise ValueError(
                f"{type(self).__name__} is not linear in the log-weights, so the scale on site "
                f"{site!r} of the {program} has no meaning under it (inside the logarithm it is "
                "not a bound). Remove poutine.scale and inner subsampled plates: minibatches need "
                "no scale but the data plate's, and a weight on the KL is elbo.ELBO(beta=...)"
            )
        for site in weights.enumerated:
            if (
                torch.is_grad_enabled()
                and site in weights.log_q
                and weights.log_q[site].requires_grad
            ):
                raise ValueError(
                    f"latent {site!r} is enumerated, so {type(self).__name__} sums it out exactly "
                    "and the guide's conditional of it cancels: it would never be trained. Leave "
                    "it out of the guide (enumerated in the model only), or use elbo.ELBO"
                )
        return weights.log_w

    def new_state(self) -> State:
        """The state before the first step."""
        return State()

    def advance(self, state: State) -> None:
        """Change what the estimator learns itself, once after each training loss."""

    # -- values and losses -----------------------------------------------------------------------
    def evaluate(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """The bound on log p(x) of each datapoint, ``(N,)`` nats, no gradient.

        Every term has weight 1, whatever ``poutine.scale`` or this estimator weighs it by. Of a
        pair with global latents it is the bound given one draw of them: its mean over q(g) bounds
        the log of the mean of p(x | g), the predictive density of a new row.

        Raises:
            ValueError: a plate subsamples itself, so part of a datapoint or of the data is missing;
                a log-density is estimated, or not normalised.
        """
        with torch.no_grad():
            weights = whole_weights(model, guide, args, kwargs, self.num_draws, with_globals=True)
            return self.bound(weights.log_w)

    def loss_tensor(
        self, model: Callable, guide: Callable, args: tuple, kwargs: dict, state: State
    ) -> Tensor:
        """The loss as a differentiable scalar; with a gradient it counts as a training step."""
        try:
            # called as Pyro's own estimators are: what a program puts into the store stays there
            with own_path(stored):
                value = self.surrogate(model, guide, args, kwargs, state)
        except NoInverse as error:
            raise ValueError(
                f"{type(self).__name__}(gradient={self.gradient!r}) needs densities at given "
                f'values: {error}. Use gradient="pathwise" of elbo.ELBO or elbo.IWELBO; in a model '
                "only a distribution with a density everywhere"
            ) from error
        if state.learning:
            self.advance(state)
            state.count()
        return -value if self.sign > 0 else value

    def surrogate(
        self, model: Callable, guide: Callable, args: tuple, kwargs: dict, state: State
    ) -> Tensor:
        """The bound summed over the data set, with the gradient asked for; a scalar."""
        K = self.num_draws
        if self.gradient in ("stl", "dreg", "gdreg") and torch.is_grad_enabled():
            leaves = Leaves()
            weights = weigh(model, guide, args, kwargs, K, leaves=leaves, with_globals=True)
            value = self._along_path(weights, leaves, state)
        elif self.gradient == "vargrad" and torch.is_grad_enabled():
            weights = weigh(model, guide, args, kwargs, K, leaves=Leaves(), with_globals=True)
            value = self._log_variance(weights, state)
        else:
            bits = _BITS[self.gradient]() if self.gradient in _BITS else None
            weights = weigh(
                model, guide, args, kwargs, K, leaves=bits, along_path=True, with_globals=True
            )
            if bits is not None:
                self._require_no_globals(weights)
            log_w = self.effective(weights, state)
            value = self.bound(log_w).sum()
            if weights.global_q:
                self.require_global_draws(weights)
                value = value + self.log_global(weights) / state.times(weights)
            if isinstance(bits, Antithetic):
                value = gradients.with_gradient(value, value + bits.surrogate(weights, log_w))
            elif self.gradient in ("score", "vimco"):
                scored = gradients.scored_log_q(weights)
                vimco = self.gradient == "vimco"
                score = gradients.score(self.bound, self.bound_of_others, log_w, scored, vimco)
                value = gradients.with_gradient(value, value + score)
            elif bits is None:
                self.require_reparameterised(weights)
        return value if weights.scale == 1 else weights.scale * value

    def _log_variance(self, weights: LogWeights, state: State) -> Tensor:
        self._require_no_enumeration(weights)
        self._require_no_globals(weights)
        log_w = self.effective(weights, state)
        value = self.bound(log_w.detach()).sum()
        for_model = self.bound(self.effective(weights.stop_guide(), state)).sum()
        return gradients.with_gradient(value, for_model + gradients.log_variance(weights, log_w))

    def _require_no_enumeration(self, weights: LogWeights) -> None:
        if weights.enumerated.keys() & weights.q.keys():
            raise ValueError(
                f'gradient="{self.gradient}" drops the gradient of log q, which an enumerated '
                'latent in the guide needs; use gradient="pathwise"'
            )

    def _require_no_globals(self, weights: LogWeights) -> None:
        if weights.global_q:
            raise ValueError(
                f'gradient="{self.gradient}" is defined for latents of rows, and '
                f'{sorted(weights.global_q)} are global; use gradient="pathwise", or "score" where '
                "a latent of rows is discrete"
            )

    def _along_path(self, weights: LogWeights, leaves: Leaves, state: State) -> Tensor:
        self.require_reparameterised(weights)
        if self.gradient == "stl":
            self._require_no_enumeration(weights)
        elif self.gradient == "gdreg":
            self._require_no_globals(weights)
            if weights.enumerated:
                raise ValueError(
                    'gradient="gdreg" goes through the sampler of each prior, and '
                    f'{sorted(weights.enumerated)} are summed out; use gradient="dreg"'
                )
        log_w = self.effective(weights, state)
        value, c = gradients.coefficient(self.bound, log_w)
        coefficient = c if self.gradient == "stl" else self.dreg_coefficient(log_w.detach())
        for_model = (c * self.effective(weights.stop_guide(), state)).sum()
        apart = None
        if weights.global_q:  # without the score of q(g), whose mean is 0
            times = state.times(weights)
            apart = self.log_global(weights) / times
            value = value + apart.detach()
            for_model = for_model + sum_of([*weights.global_p.values()]) / times
        if self.gradient == "gdreg":
            for_model = gradients.through_priors(c, coefficient, log_w, weights, leaves, for_model)
        for_guide = gradients.through_draws(coefficient, log_w, leaves, hidden=c, apart=apart)
        return gradients.with_gradient(value, for_model + for_guide)

    def log_global(self, weights: LogWeights) -> Tensor:
        """log p(g) - log q(g) of the global latents, 0-d; a leaf may put their means in place."""
        found = weights.log_global
        assert found is not None
        return found

    def require_global_draws(self, weights: LogWeights) -> None:
        """Raise ``ValueError`` for a global latent that is not drawn along a sample path."""
        for name in weights.global_q if torch.is_grad_enabled() else ():
            fn = weights.guide_trace.nodes[name]["fn"]
            if not fn.has_rsample:
                raise ValueError(
                    f"latent {name!r} is global, and {kind(fn)} has no reparameterised sampler: "
                    "its score would be multiplied by the bound of all rows, which is all noise. "
                    "Draw it from a continuous distribution, or use joint=True"
                )

    def require_reparameterised(self, weights: LogWeights) -> None:
        """Raise ``ValueError`` for a drawn site whose draws have not the gradient asked for."""
        if not torch.is_grad_enabled():
            return
        self.require_global_draws(weights)
        for name in weights.log_q.keys() - weights.enumerated.keys():
            site = weights.guide_trace.nodes[name]
            if not site["fn"].has_rsample:
                raise ValueError(
                    f"{type(self).__name__}(gradient={self.gradient!r}) cannot differentiate "
                    f"through site {name!r}: {kind(site['fn'])} has no reparameterised sampler. "
                    f"Use {gradients.without_path(self.gradients)}, or sum the site out with "
                    'infer={"enumerate": "parallel"}'
                )
            if self.gradient in ("dreg", "gdreg") and is_rounded(site):
                raise ValueError(
                    f'{type(self).__name__}(gradient="{self.gradient}") puts a slope of the draw '
                    f"in the place of the score at site {name!r}, and draws of {kind(site['fn'])}, "
                    'straight-through, have none; use gradient="pathwise"'
                )

    # -- the interface of pyro.infer.ELBO --------------------------------------------------------
    def __call__(self, model: Callable, guide: Callable) -> Objective:
        """An ``nn.Module`` whose ``forward(*args)`` is the loss."""
        return Objective(model, guide, self)

    def differentiable_loss(
        self, model: Callable, guide: Callable, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The loss as a differentiable scalar."""
        return self.loss_tensor(model, guide, args, kwargs, self.stock_state(model, guide))

    def stock_state(self, model: Callable, guide: Callable) -> State:
        """What is remembered for a pair in stock Pyro, which holds no state of a loss itself.

        The step count of schedules and a constraint's multiplier; save its ``state_dict()`` beside
        Pyro's parameter store.
        """
        known = _stock_states.setdefault(self, Memory()).of(innermost(model), innermost(guide))
        if "state" not in known:
            known["state"] = self.new_state()
        state: State = known["state"]
        return state

    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """The loss as a number."""
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """The loss as a number; adds its gradient to the parameters'. One step of stock SVI."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward()
        return loss.item()

    def _get_trace(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("ppvae's estimators draw their traces in ppvae.log_weights")


_BITS: dict[str, type[Bits]] = {"disarm": Antithetic, **THROUGH}

# Stock Pyro engines hold no state of a loss.
_stock_states: WeakKeyDictionary[Estimator, Memory] = WeakKeyDictionary()


class Objective(nn.Module):
    """A pair, an estimator and its state as one module whose ``forward(*args)`` is the loss.

    Made by calling an estimator: ``elbo.IWELBO(num_particles=8)(model, guide)``. The loss is
    summed over the batch, as in Pyro. In training mode each loss with a gradient counts as a step.

    Attributes:
        num_rows: of the data set that batches are cut from, for global latents; None: a batch is
            all data, unless the data plate has a size. :class:`ppvae.SVI` and ``fit`` set it.

    Example:
        >>> from ppvae import conditionals, elbo, guides, models, nets
        >>> import torch
        >>> model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
        >>> guide = guides.Normal(nets.mlp(4, 8, 2 * 2))
        >>> loss = elbo.ELBO()(model, guide)(torch.ones(5, 4))
        >>> loss.shape, loss.requires_grad
        (torch.Size([]), True)
    """

    def __init__(self, model: Callable, guide: Callable, elbo: Estimator) -> None:
        super().__init__()
        if not isinstance(elbo, Estimator):
            raise TypeError(f"elbo must be an estimator, as elbo.ELBO(), got {elbo!r}")
        self.model, self.guide, self.elbo = model, guide, elbo
        self.state = elbo.new_state()
        self.owners = method_owners(model, guide)
        self.regularizer: nn.Module | None = None  # of ppvae.SVI
        self.num_rows: int | None = None

    @property
    def step(self) -> int:
        """Training losses computed so far."""
        return self.state.step

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self.state.num_rows = self.num_rows
        if self.regularizer is None or not self.state.learning:
            return self.elbo.loss_tensor(self.model, self.guide, args, kwargs, self.state)
        # the handler that looks at the plate is no engine that parameters are announced to
        with own_path(stored), DataPlate() as plate:
            loss = self.elbo.loss_tensor(self.model, self.guide, args, kwargs, self.state)
        size = plate.found("SVI(regularizer=...) adds a penalty").full_size
        return loss + size * self.regularizer()


class DataPlate(Messenger):
    """Finds the plate ``"data"`` of the sites that are run inside.

    Attributes:
        frame: of the plate; None: no site was in one.
    """

    frame: Any = None

    def _pyro_sample(self, msg: Any) -> None:
        for frame in msg["cond_indep_stack"]:
            if frame.name == DATA_PLATE:
                self.frame = frame

    def found(self, asked_by: str) -> Any:
        """The frame; raises ``ValueError`` if there was no such plate."""
        if self.frame is None:
            raise ValueError(
                f'{asked_by} per datapoint, and no site of the pair is in a plate named "data", '
                "which would say how many there are"
            )
        return self.frame
