"""Likelihoods that can only be drawn from: simulators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from ppvae.arguments import takes_numbers
from ppvae.auxiliary import Ratio, drawn_with


class Simulator(nn.Module):
    r"""A likelihood p(x | z) that is a program, without a density: simulation-based inference.

    .. math:: T(x, z) \approx \log \frac{p(x \mid z)}{p(x)} = \log \frac{p(z \mid x)}{p(z)}

    ``sample`` runs the simulator. In the place of log p(x | z) stands T, a :class:`ppvae.Ratio`,
    which learns to tell draws (x, z) of the model from those with the z of another row, after each
    step of the pair: amortised ratio estimation (NRE, AALR). So the ELBO estimates

    .. math:: \mathbb E_q\big[T(x, z) + \log p(z) - \log q(z \mid x)\big]
              \approx -\mathrm{KL}\big(q(z \mid x) \,\|\, p(z \mid x)\big) \le 0

    and not a bound on log p(x), which does not appear. The guide may be one with a density or
    ``posteriors.Implicit``. Without T a guide learns q(z | x) of the model's draws by
    ``elbo.ReweightedWakeSleep(insomnia=0)``: neural posterior estimation (NPE). Judge either with
    :func:`ppvae.diagnostics.sbc`. Only the guide is trained: the prior and the simulator are given.

    Args:
        simulate: from all rows at once, z ``(B, Z)``, to x ``(B, *shape)``: any code, its noise
            drawn anew at each call, run without gradients. Noise of torch makes runs repeatable;
            ``compile=True`` takes code of tensors alone.
        net: T, from x and z, which may have particles, ``(K, N, Z)``, to ``(..., N, 1)``; networks
            of ``nets`` broadcast and concatenate the two.
        shape: of one x: a number for a vector, or a tuple.

    Raises:
        ValueError: a ``simulate`` with trainable parameters; when run, one that takes single rows,
            gives another shape, NaN or infinite values; when SVI meets it, a model with trainable
            parameters.

    Source: Hermans, Begy & Louppe, Likelihood-free MCMC with amortized approximate ratio
    estimators, 2020; Papamakarios & Murray, Fast epsilon-free inference of simulation models with
    Bayesian conditional density estimation, 2016, for NPE.

    Example:
        >>> import ppvae
        >>> from ppvae import guides, models, nets
        >>> def falls(z):  # times to fall from a height exp(z), measured twice
        ...     return (2 * z.exp() / 9.81).sqrt() + 0.05 * torch.randn(len(z), 2)
        >>> model = models.VAE(Simulator(falls, nets.mlp(2 + 1, 8, 1), shape=2), latent_dim=1)
        >>> svi = ppvae.SVI(model, guides.Normal(nets.mlp(2, 8, 2)), beside=ppvae.Beside(steps=2))
        >>> x = model(size=20)
        >>> history = ppvae.fit(svi, x, epochs=2, progress=False)
        >>> x.shape, model.likelihood(torch.zeros(5, 1)).log_prob(x[:5]).shape
        (torch.Size([20, 2]), torch.Size([5]))
    """

    @takes_numbers
    def __init__(
        self, simulate: Callable[[Tensor], Tensor], net: nn.Module, shape: int | tuple[int, ...]
    ) -> None:
        super().__init__()
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        if any(not isinstance(size, int) or size < 1 for size in shape):
            raise ValueError(f"Simulator: shape must be that of one x, got {shape}")
        if isinstance(simulate, nn.Module) and any(p.requires_grad for p in simulate.parameters()):
            raise ValueError(
                "Simulator: no gradient reaches the parameters of simulate, so they would never be "
                "trained: give simulate.requires_grad_(False)"
            )
        self.simulate, self.shape = simulate, torch.Size(shape)
        self.ratio = Ratio(net, self._draws_of_both)

    def forward(self, z: Tensor) -> Simulated:
        return Simulated(self, z)

    @torch.no_grad()
    def simulated(self, z: Tensor) -> Tensor:
        """What ``simulate`` makes of z ``(..., Z)``: x ``(..., *shape)``."""
        rows = z.reshape(-1, z.shape[-1])
        x = self.simulate(rows.clone())  # it may write on what it is given
        if hasattr(x, "__array__"):  # of NumPy, in its precision; or counts
            x = torch.as_tensor(x, device=z.device).to(z.dtype)
        wanted = (len(rows), *self.shape)
        seen = tuple(x.shape) if isinstance(x, Tensor) else f"a {type(x).__name__}"
        if seen != wanted:
            raise ValueError(
                f"simulate must take all rows of z at once and give x of shape {wanted}: of z "
                f"{tuple(rows.shape)} it gave {seen}. If it takes one row: "
                "lambda z: torch.stack([simulate(row) for row in z])"
            )
        if type(x) is Tensor:  # while a graph is traced there are no numbers
            bad = ~torch.isfinite(x).reshape(len(rows), -1).all(1)
            if bad.any():
                raise ValueError(
                    f"simulate gave NaN or infinite values in {int(bad.sum())} of {len(rows)} "
                    f"rows, the first of z = {[round(v, 4) for v in rows[bad][0].tolist()]}: have "
                    "it give a number for every z that the prior draws"
                )
        return x.reshape(z.shape[:-1] + self.shape)

    def _draws_of_both(self, draws: Any) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Draws (x, z) of the model, and the same x with the z of the row before."""
        if trained := draws.trained_in_model():
            raise ValueError(
                f"beside a Simulator the model's {trained} would be trained without log p(x), which"
                " is not in the objective: fix them, as model.prior.requires_grad_(False)"
            )
        fn, x = drawn_with(self.ratio, draws.model_sites(), "model")
        if len(x) < 2:
            raise ValueError(
                "a simulator's ratio puts the z of another row to each x, and this batch has one "
                "row: give batches of 2 rows or more, the last one included"
            )
        return (x, fn.z), (x, fn.z.roll(1, 0))

    def extra_repr(self) -> str:
        return f"shape={tuple(self.shape)}"


class Simulated(dist.TorchDistribution):
    """What :class:`Simulator` returns: its draws, and T(x, z) in the place of log p(x | z).

    Args:
        made_by: has the simulator and the ratio.
        z: ``(..., Z)``.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    estimated = (
        "a simulator has no density, and a classifier's log p(x | z) - log p(x) stands for it: the "
        "ELBO is then -KL(q || p(z | x)), at most 0; judge the guide by diagnostics.sbc"
    )

    def __init__(self, made_by: Simulator, z: Tensor, validate_args: bool | None = None) -> None:
        self.made_by, self.z = made_by, z
        self.ratio, self.log_ratio = made_by.ratio, made_by.ratio.held()
        super().__init__(z.shape[:-1], made_by.shape, validate_args)

    @constraints.dependent_property(is_discrete=False)  # of what kind x is the simulator knows
    def support(self) -> Any:
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> Simulated:
        new = self._get_checked_instance(Simulated, _instance)
        new.made_by, new.ratio, new.log_ratio = self.made_by, self.ratio, self.log_ratio
        batch_shape = torch.Size(batch_shape)
        new.z = self.z.expand(batch_shape + self.z.shape[-1:])
        super(Simulated, new).__init__(batch_shape, self.event_shape, False)
        new._validate_args = self._validate_args
        return new

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.made_by.simulated(self.z.expand(torch.Size(sample_shape) + self.z.shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """T(x, z), near log p(x | z) - log p(x)."""
        log_ratio = self.log_ratio(value, self.z)
        wanted = torch.broadcast_shapes(
            value.shape[: value.dim() - len(self.event_shape)], self.batch_shape
        )
        if log_ratio.shape != wanted:
            raise ValueError(
                f"Simulator: its network must give one number for each x and z, {(*wanted, 1)}, and"
                f" gave {(*log_ratio.shape, 1)}: let it broadcast x over particles, as nets do"
            )
        return log_ratio
