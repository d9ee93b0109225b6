"""Pyro's NUTS on single datapoints: an oracle that shares no code with our samplers."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from pyro import poutine
from pyro.infer import MCMC
from pyro.infer import NUTS as PyroNUTS
from torch import Tensor

from ppvae.arguments import takes_numbers
from ppvae.check.sites import is_angle
from ppvae.diagnostics.arviz_versions import require_arviz
from ppvae.diagnostics.chains import PosteriorDraws, convergence, joined
from ppvae.diagnostics.joint import require_coordinates
from ppvae.diagnostics.rows import bound, check_at_least, check_data, take
from ppvae.global_latents import require_of_rows
from ppvae.intake import takes_rows
from ppvae.pairs import (
    DATA_PLATE,
    evaluation_mode,
    is_discrete,
    kind,
    own_path,
    sample_sites,
    seeded,
    trace,
)
from ppvae.weights import require_densities, require_whole


@takes_numbers
@takes_rows
def nuts(
    model: Callable[..., Any],
    *args: Any,
    num_chains: int = 4,
    num_warmup: int = 300,
    num_draws: int = 500,
    seed: int | None = None,
    **kwargs: Any,
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
        **kwargs: passed to the model whole: tables, flags. Only ``args`` are cut by rows.

    Returns:
        :class:`~ppvae.diagnostics.PosteriorDraws`; ``unconstrained`` holds the latents side by
        side, as they are (NUTS does not give its own coordinates), ``log_joint`` is log p(x, z)
        without Jacobian, and ``step_size`` the last chain's.

    Raises:
        PairError: empty, NaN or infinite data.
        ValueError: too few chains or draws for the gates; a discrete latent, an angle, or
            one on a sphere.

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
    model, _ = bound(model, model, kwargs)
    check_at_least(2, num_chains=num_chains)  # which R-hat compares
    check_at_least(8, num_draws=num_draws)  # for R-hat and ESS
    rows = check_data(model, args)
    require_arviz()
    _refuse_others(model, take(args, slice(1)))
    started = time.perf_counter()
    with seeded(seed, *args), own_path(), evaluation_mode(model):
        parts = [
            _one_datapoint(model, take(args, slice(n, n + 1)), num_chains, num_warmup, num_draws)
            for n in range(rows)
        ]
    return replace(joined(parts), seconds=time.perf_counter() - started)


def _refuse_others(model: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Raise ``ValueError`` for latents that Pyro's NUTS does not draw, or not from the posterior.

    It sums discrete ones out, and draws then have no log p(x, z); it takes an angle for a real
    number, over which its density has no integral.
    """
    with own_path(), evaluation_mode(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
        drawn = trace(model, args, {})
    require_whole({"model": drawn}, args, {})
    require_densities(drawn)
    require_of_rows(sample_sites(drawn), "there is no posterior per datapoint")
    for name, site in sample_sites(drawn).items():
        if site["is_observed"]:
            continue
        fn = site["fn"]
        if is_discrete(fn):
            raise ValueError(
                f"latent {name!r} is discrete ({kind(fn)}); mark it "
                'infer={"enumerate": "parallel"} in the model and use diagnostics.hmc, which sums '
                "it out"
            )
        if is_angle(fn):
            raise ValueError(
                f"latent {name!r} is an angle ({kind(fn)}), which Pyro's NUTS takes for a real "
                "number; use diagnostics.hmc, which stays in (-pi, pi]"
            )
        require_coordinates(name, fn)


def _one_datapoint(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    num_chains: int,
    num_warmup: int,
    num_draws: int,
) -> PosteriorDraws:
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
    sites = sample_sites(trace(model, args, {}))
    draws = {}
    for name in chains[0]:
        stacked = torch.stack([chain[name] for chain in chains])  # (C, S, *plates, *event)
        data = next(f.dim for f in sites[name]["cond_indep_stack"] if f.name == DATA_PLATE)
        draws[name] = stacked.movedim(data - sites[name]["fn"].event_dim, 2)
    flat = torch.cat([value.reshape(*value.shape[:3], -1) for value in draws.values()], -1)
    log_joint = torch.stack(values).unsqueeze(-1)
    # A support may fix some numbers (the first of a Cholesky factor of correlations is 1); chains
    # that are stuck are so at different values.
    fixed = (flat == flat[:1, :1]).all(0).all(0).all(0)
    free = torch.cat([flat[..., ~fixed], log_joint.unsqueeze(-1)], -1)
    return PosteriorDraws(
        draws,
        flat,
        log_joint,
        *convergence(free),
        accept=torch.tensor([sum(accept) / len(accept)]),
        divergences=torch.tensor([divergences]),
        step_size=torch.tensor([float(kernel.step_size)]),
        reruns=torch.zeros(1, dtype=torch.long),
        method="NUTS (Pyro)",
        seconds=0.0,
    )


def _log_joint(
    model: Callable[..., Any], args: tuple[Any, ...], drawn: dict[str, Tensor]
) -> Tensor:
    """log p(x, z) of each draw, one after the other, ``(S,)``."""
    values = []
    with torch.no_grad():
        for s in range(len(next(iter(drawn.values())))):
            at_draw = poutine.condition(model, {name: value[s] for name, value in drawn.items()})
            values.append(torch.as_tensor(trace(at_draw, args, {}).log_prob_sum()))
    return torch.stack(values)
