"""What a trained pair is used for: encode, reconstruct, generate, log_prob.

Functions of a pair, as everything here. The container that came in goes out: an array for an array,
a frame with its index for a frame. They run in evaluation mode, in pieces that give what all rows
at once would, and leave the random stream, modes and buffers as they were.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ppvae.arguments import takes_numbers
from ppvae.check.programs import check_programs
from ppvae.diagnostics.evidence import log_evidence
from ppvae.diagnostics.rows import (
    bound,
    check_at_least,
    check_pair_and_data,
    check_rows,
    evaluating,
    pieces,
    take,
)
from ppvae.global_latents import require_of_rows
from ppvae.intake import Container, tensors
from ppvae.pairs import replay, sample_sites, trace, unconditioned
from ppvae.verbs.sites import (
    AtMeans,
    drawn_data,
    dtype_of,
    latents,
    mean_of,
    needs_draws,
    require_choice,
    require_numbers,
    rows_of,
    typical,
)
from ppvae.wrapped import argument_names, title


@takes_numbers
def encode(
    guide: Callable[..., Any],
    *args: Any,
    statistic: str = "mean",
    num_draws: int = 100,
    table: Any = None,
    max_rows: int = 10_000,
    seed: int | None = 0,
    **kwargs: Any,
) -> Any:
    r"""The codes of rows: the mean of q(z | x), or draws of it.

    .. math:: \bar z_n = \mathrm E_{q(z \mid x_n)}\, z \qquad\text{or}\qquad z_n \sim q(z \mid x_n)

    Means are exact where q's law has a closed mean and depends on no other latent. Elsewhere they
    are averages over ``num_draws`` passes, of that law's mean or, where it has none, of its draws.
    Of unordered classes the mean is that of the one-hot code: their probabilities.

    Args:
        guide: a Pyro program.
        *args: data as it is called: x, or x and its conditions; any container of
            :func:`ppvae.fit`.
        statistic: "mean" or "sample".
        num_draws: S >= 1, for means that have no closed form.
        table: the ``data.Table`` of a frame with words.
        max_rows: largest number of rows computed at once.
        seed: draw with this seed and leave the random stream as it was; None: draw from it.
        **kwargs: passed to the guide whole.

    Returns:
        ``(N, *event)``, in the container of the first argument: frames have columns ``z0``, ``z1``,
        ... and the index of the rows. Of several latents a dictionary by site.

    Raises:
        ValueError: NaN or empty data; no latent in the plate ``"data"``; a code that is no number.

    Example:
        >>> import pandas as pd, torch
        >>> from ppvae import guides
        >>> guide = guides.Normal(torch.nn.Linear(2, 2))
        >>> frame = pd.DataFrame({"a": [0.5, 1.0], "b": [2.0, 3.0]}, index=["p", "q"])
        >>> codes = encode(guide, frame)
        >>> codes.index.tolist(), codes.columns.tolist()
        (['p', 'q'], ['z0'])
        >>> type(encode(guide, frame.to_numpy())).__name__
        'ndarray'
    """
    require_choice("statistic", statistic, ("mean", "sample"))
    check_at_least(1, num_draws=num_draws, max_rows=max_rows)
    check_programs(guide=guide)
    box = Container(args, table)
    args = box.tensors(guide)
    guide, _ = bound(guide, guide, kwargs)
    rows = check_rows(guide, args)
    found: dict[str, list[Tensor]] = {}
    with evaluating(guide, guide, args, seed):
        passes = 1
        if statistic == "mean" and needs_draws(guide, take(args, slice(2))):
            passes = num_draws
        for part, _ in pieces(rows, 1, max_rows):
            sums: dict[str, Tensor] = {}
            for _ in range(passes):
                for name, site in latents(guide, take(args, part)).items():
                    values, extra = site["value"], 0
                    if statistic == "mean":
                        values, extra = mean_of(site)
                    values = rows_of(name, site, values, extra)
                    values = values if passes == 1 else values.double() / passes
                    sums[name] = sums[name] + values if name in sums else values
            for name, values in sums.items():
                require_numbers(name, values, part.start)
                found.setdefault(name, []).append(values.to(dtype_of(args, values)))
    return box.each({name: torch.cat(values) for name, values in found.items()})


@takes_numbers
def reconstruct(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    statistic: str = "mean",
    table: Any = None,
    max_rows: int = 10_000,
    seed: int | None = 0,
    **kwargs: Any,
) -> Any:
    r"""Rows after the pair's bottleneck: the mean of p(x | z) at the mean of q(z | x), or draws.

    .. math:: \hat x_n = \mathrm E[x \mid z = \bar z_n] \qquad\text{or}\qquad
              z_n \sim q(z \mid x_n),\ \hat x_n \sim p(x \mid z_n)

    A latent without a mean is drawn, of classes the most probable is taken; so are classes in x.

    Args:
        model, guide: Pyro programs.
        *args: data, as both are called; conditions are used as they are.
        statistic: "mean" or "sample".
        table, max_rows, seed, kwargs: as :func:`encode` has them. With a table whole codes come
            back as levels, the nearest of a mean.

    Returns:
        ``(N, *event)``, in the container of the first argument; a frame has its columns and index.
        Of several observed sites a dictionary by site.

    Raises:
        PairError, ValueError: the data or the pair do not fit; x cannot be drawn, or has no mean.

    Example:
        >>> import numpy as np
        >>> from ppvae import conditionals, guides, models, nets
        >>> model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
        >>> guide = guides.Normal(nets.mlp(4, 8, 2 * 2))
        >>> reconstruct(model, guide, np.ones((3, 4))).shape  # probabilities
        (3, 4)
    """
    require_choice("statistic", statistic, ("mean", "sample"))
    check_at_least(1, max_rows=max_rows)
    box = Container(args, table)
    args = box.tensors(model, guide)
    model, guide = bound(model, guide, kwargs)
    rows = check_pair_and_data(model, guide, args, estimates=True)
    found: dict[str, list[Tensor]] = {}
    free = unconditioned(model) if statistic == "sample" else model
    with evaluating(model, guide, args, seed):
        for part, _ in pieces(rows, 1, max_rows):
            batch = take(args, part)
            with AtMeans(statistic == "mean"):
                drawn = trace(guide, batch, {})
                sites = sample_sites(replay(free, drawn, batch, {}))
            for name, site in sites.items():
                if not (site["is_observed"] or site["infer"].get("was_observed")):
                    continue
                values = site["value"] if statistic == "sample" else typical(site["fn"])
                values = rows_of(name, site, values)
                require_numbers(name, values, part.start, " has no mean: take statistic='sample'")
                found.setdefault(name, []).append(values)
    return box.each({name: torch.cat(values) for name, values in found.items()}, like_data=True)


@takes_numbers
def generate(
    model: Callable[..., Any],
    size: int | None,
    *conditions: Any,
    like: Any = None,
    table: Any = None,
    max_rows: int = 10_000,
    seed: int | None = None,
    **kwargs: Any,
) -> Any:
    r"""New rows: z from the prior, x from p(x | z).

    .. math:: z \sim p(z),\qquad x \sim p(x \mid z)

    Args:
        model: a Pyro program. The package's take ``size``; one of your own that does not is called
            with rows of ``like``, and told to draw in their place.
        size: how many rows; None: one for each row of the conditions.
        *conditions: what the model takes behind x, one row for each new one.
        like: rows of data, of which only shape and dtype count.
        table: the rows of a ``data.Table`` come as its frame.
        max_rows: largest number of rows drawn at once.
        seed: draw with this seed and leave the random stream as it was; None: draw from it, so
            that a second call gives other rows.
        **kwargs: passed to the model whole.

    Returns:
        ``(size, *event)``, in the container of ``like``, else of the first condition, else a
        tensor.

    Raises:
        TypeError: the model takes no ``size``, and ``like`` is not given.
        ValueError: the numbers of rows differ; x cannot be drawn; a latent lies outside the data
            plate.

    Example:
        >>> from ppvae import conditionals, models, nets
        >>> model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
        >>> generate(model, 5, seed=0).shape
        torch.Size([5, 4])
    """
    box = Container((like,) if like is not None else conditions, table)
    rows, *behind = tensors((box.coded(like), *conditions), model)
    lengths = {len(value) for value in behind if isinstance(value, Tensor)}
    size = next(iter(lengths), None) if size is None else size
    if size is None or lengths - {size}:
        raise ValueError(f"size is {size} and the conditions have {sorted(lengths)} rows: agree")
    check_at_least(1, size=size, max_rows=max_rows)
    model, _ = bound(model, model, kwargs)
    if like is not None:
        if not isinstance(rows, Tensor) or not rows.dim() or not len(rows):
            raise TypeError(f"like must be rows of data, an array or a frame, got {like!r:.60}")
        rows = rows[torch.arange(size) % len(rows)]
    elif "size" not in argument_names(model, by_keyword=True):
        raise TypeError(
            f"model: {title(model)} takes no size; nothing says how long a row is: give like=x, "
            "rows of data, in whose place new ones are drawn"
        )
    found = []
    with evaluating(model, model, (rows, *behind), seed):
        for part, _ in pieces(size, 1, max_rows):
            batch = take(behind, part)  # other arguments are as they are
            count = part.stop - part.start
            if like is not None:
                drawn = trace(unconditioned(model), (rows[part], *batch), {})
            # a condition says how many rows there are, and size would be that of the data set
            elif batch:
                drawn = trace(model, (None, *batch), {})
            else:
                drawn = trace(model, (), {"size": count})
            why = "the model alone draws it from its prior, whatever the guide has learned"
            require_of_rows(sample_sites(drawn), why)
            if like is not None:
                found.append(drawn_data(drawn))
                continue
            x = drawn.nodes["_RETURN"]["value"]
            if not isinstance(x, Tensor) or len(x) != count:
                raise TypeError(f"{title(model)} does not return its x: give like=x, rows of data")
            found.append(x)
    return box.one(torch.cat(found), "x", like_data=True)


@takes_numbers
def log_prob(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_particles: int = 1000,
    with_se: bool = False,
    table: Any = None,
    max_rows: int = 2_500,
    seed: int | None = 0,
    **kwargs: Any,
) -> Any:
    r"""log p(x) of each row, nats, by importance sampling: :func:`ppvae.diagnostics.log_evidence`.

    That gives k-hat and the effective sample size too, which say where the estimate is one.

    Args:
        model, guide: Pyro programs.
        *args: data, as both are called; any container of :func:`ppvae.fit`.
        num_particles: K >= 2.
        with_se: return the standard errors beside.
        table, max_rows, seed, kwargs: as :func:`encode` has them; of ``max_rows`` (particle,
            datapoint) rows.

    Returns:
        ``(N,)``, in the container of the first argument: of a frame a column with its index.

    Raises:
        ValueError: as :func:`ppvae.diagnostics.log_evidence`.

    Example:
        >>> import numpy as np
        >>> from ppvae import conditionals, guides, models, nets
        >>> model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
        >>> guide = guides.Normal(nets.mlp(4, 8, 2 * 2))
        >>> nats, se = log_prob(model, guide, np.ones((3, 4)), with_se=True)
        >>> nats.shape, bool((se < 0.2).all())
        ((3,), True)
    """
    if not isinstance(with_se, bool):
        raise TypeError(f"with_se must be True or False, got {with_se!r}")
    box = Container(args, table)
    options: dict[str, Any] = {
        "num_particles": num_particles,
        "max_rows": max_rows,
        "seed": seed,
    }
    found = log_evidence(model, guide, *box.tensors(model, guide), **options, **kwargs)
    nats = box.one(found.log_evidence, name="log_prob")
    return (nats, box.one(found.log_evidence_se, name="se")) if with_se else nats
