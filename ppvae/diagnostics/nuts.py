"""Pyro's NUTS on single datapoints: an oracle that shares no code with our samplers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from pyro.infer import MCMC
from pyro.infer import NUTS as PyroNUTS
from torch import Tensor

from ppvae.check.pair import check_tensors
from ppvae.diagnostics.arviz_bridge import require_arviz
from ppvae.diagnostics.chains import PosteriorDraws, convergence
from ppvae.pairs import evaluation_mode, own_path, sample_sites, seeded, trace


def nuts(
    model: Callable[..., Any],
    *args: Any,
    num_chains: int = 4,
    num_warmup: int = 300,
    num_draws: int = 500,
    seed: int | None = None,
) -> PosteriorDraws:
    """Draw from p(z | x) with Pyro's NUTS, one datapoint and one chain after the other.

    It takes seconds per datapoint and chain: for a few datapoints, to check
    :func:`~ppvae.diagnostics.hmc`, with which it shares no code but the gates. Chains start where
    Pyro starts them, near the prior.

    Args:
        model: a Pyro program with continuous latents in the plate ``"data"``.
        *args: data, as it is called.
        num_chains, num_warmup, num_draws: as in :func:`~ppvae.diagnostics.hmc`.
        seed: draw with this seed and leave the random stream as it was; None: draw from it.

    Returns:
        :class:`~ppvae.diagnostics.PosteriorDraws`; ``unconstrained`` holds the latents side by
        side, as they are (NUTS does not give its own coordinates), ``log_joint`` is log p(x, z)
        without Jacobian, and ``step_size`` the last chain's.

    Raises:
        PairError: empty, NaN or infinite data.
        ValueError: too few chains or draws for the gates; a discrete latent.

    Source: Hoffman & Gelman, The No-U-Turn Sampler, 2014; Pyro's implementation.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from ppvae import diagnostics
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0., 1.))
        ...         pyro.sample("x", dist.Normal(z, 1.), obs=x)
        >>> draws = diagnostics.nuts(model, torch.tensor([2.]), num_chains=2, num_warmup=50,
        ...                          num_draws=50, seed=0)
        >>> draws.draws["z"].shape
        torch.Size([2, 50, 1])
    """
    if num_chains < 2 or num_draws < 8:
        raise ValueError(
            f"R-hat and ESS need at least 2 chains of 8 draws, got {num_chains} of {num_draws}"
        )
    check_tensors(model, args)
    require_arviz()
    _refuse_discrete(model, args)
    rows = next((len(arg) for arg in args if isinstance(arg, Tensor)), 0)
    started = time.perf_counter()
    columns = []
    with seeded(seed, *args), own_path(), evaluation_mode(model):
        for n in range(rows):
            part = [arg[n : n + 1] if isinstance(arg, Tensor) else arg for arg in args]
            columns.append(_one(model, part, num_chains, num_warmup, num_draws))
    draws = {name: torch.stack([c[0][name] for c in columns], 2) for name in columns[0][0]}
    log_joint = torch.stack([c[1] for c in columns], 2)
    flat = torch.cat([value.flatten(3) if value.dim() > 3 else value.unsqueeze(-1)
                      for value in draws.values()], -1)  # fmt: skip
    rhat, ess = convergence(torch.cat([flat, log_joint.unsqueeze(-1)], -1))
    return PosteriorDraws(
        draws,
        flat,
        log_joint,
        rhat,
        ess,
        torch.tensor([c[2] for c in columns]),
        torch.tensor([c[3] for c in columns]),
        torch.tensor([c[4] for c in columns]),
        torch.zeros(rows, dtype=torch.long),
        "NUTS (Pyro)",
        time.perf_counter() - started,
    )


def _refuse_discrete(model: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Pyro's NUTS sums discrete latents out; its draws then have no log p(x, z) here."""
    with own_path(), evaluation_mode(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
        sites = sample_sites(trace(model, args, {}))
    for name, site in sites.items():
        if not site["is_observed"] and site["fn"].support.is_discrete:
            raise ValueError(
                f"latent {name!r} is discrete ({type(site['fn']).__name__}), and this is for "
                'continuous latents; mark it infer={"enumerate": "parallel"} in the model and '
                "use diagnostics.hmc, which sums it out"
            )


def _one(
    model: Callable[..., Any], args: list[Any], num_chains: int, num_warmup: int, num_draws: int
) -> tuple[dict[str, Tensor], Tensor, float, int, float]:
    """Chains of one datapoint: draws by site, log p(x, z), acceptance, divergences, step size."""
    chains: list[dict[str, Tensor]] = []
    values, accept, divergences = [], [], 0
    for _ in range(num_chains):
        kernel = PyroNUTS(model)
        mcmc = MCMC(kernel, num_draws, num_warmup, num_chains=1, disable_progbar=True)
        mcmc.run(*args)
        drawn = {name: value.detach() for name, value in mcmc.get_samples().items()}
        diagnosis = mcmc.diagnostics()
        accept.append(float(diagnosis["acceptance rate"]["chain 0"]))
        divergences += len(diagnosis["divergences"]["chain 0"])
        values.append(_log_joint(model, args, drawn))
        chains.append(drawn)
    sites = sample_sites(trace(model, tuple(args), {}))
    draws = {}
    for name in chains[0]:
        stacked = torch.stack([chain[name] for chain in chains])  # (C, S, *plates, *event)
        event = sites[name]["fn"].event_dim
        plates = stacked.shape[2 : stacked.dim() - event]
        data = next(f.dim for f in sites[name]["cond_indep_stack"] if f.name == "data")
        draws[name] = stacked.squeeze(2 + len(plates) + data)
    step = float(kernel.step_size)
    return draws, torch.stack(values), sum(accept) / len(accept), divergences, step


def _log_joint(model: Callable[..., Any], args: list[Any], drawn: dict[str, Tensor]) -> Tensor:
    """log p(x, z) of each draw, one after the other, ``(S,)``."""
    from pyro import poutine

    count = len(next(iter(drawn.values())))
    with torch.no_grad():
        return torch.stack(
            [
                torch.as_tensor(
                    poutine.trace(poutine.condition(model, {n: v[s] for n, v in drawn.items()}))
                    .get_trace(*args)
                    .log_prob_sum()
                )
                for s in range(count)
            ]
        )
