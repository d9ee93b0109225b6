"""What a program is made of: its sites, what each is computed from, the plates it stands in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
from pyro.infer.inspect import TrackProvenance
from pyro.ops.provenance import track_provenance
from torch import Tensor

from ppvae.check.programs import check_programs, failed
from ppvae.pairs import FAILURES, kind, own_path, provenance_of, sample_sites, trace, unnoticed
from ppvae.wrapped import argument_labels, title

__all__ = ["Structure", "structure"]


@dataclass(frozen=True)
class Structure:
    """A program as a directed graph. :func:`ppvae.plots.plates` draws it.

    Attributes:
        program: its name.
        parents: by site, in the order of the program, the sites and inputs that its distribution is
            directly computed from.
        inputs: the arguments that sites are computed from and that are no sites.
        observed: the sites with a value given.
        plates: by plate, outermost first, the sites in it.
        distributions: by site, the name of its distribution.
    """

    program: str
    parents: dict[str, tuple[str, ...]]
    inputs: tuple[str, ...]
    observed: tuple[str, ...]
    plates: dict[str, tuple[str, ...]]
    distributions: dict[str, str]

    def __str__(self) -> str:
        lines = [self.program]
        for site, parents in self.parents.items():
            given = f" | {', '.join(parents)}" if parents else ""
            seen = ", observed" if site in self.observed else ""
            lines.append(f"  {site}{given} ~ {self.distributions[site]}{seen}")
        lines += [f"  plate {plate!r}: {', '.join(s)}" for plate, s in self.plates.items()]
        return "\n".join(lines)


def structure(program: Callable[..., Any], *args: Any, **kwargs: Any) -> Structure:
    """Find a program's graph by running it once on data, following what is computed from what.

    What a graph shows is that one run: a program that branches has another with other arguments.
    Draws, modes and buffers are left as they were.

    Args:
        program: a model or a guide.
        *args: as it is called; **kwargs likewise.

    Raises:
        TypeError: it is no program.
        PairError: it does not run on these arguments.

    Example:
        >>> import torch
        >>> from ppvae import conditionals, models, nets
        >>> from ppvae.check import structure
        >>> likelihood = conditionals.Bernoulli(nets.mlp(2 + 3, 5))
        >>> model = models.CVAE(likelihood, latent_dim=2, condition=nets.OneHot(3))
        >>> print(structure(model, torch.zeros(4, 5), torch.tensor([0, 1, 2, 0])))
        CVAE
          z ~ Normal
          x | z, y ~ Bernoulli, observed
          plate 'data': z, x
    """
    check_programs(program=program)
    names = argument_labels(program, len(args))
    by_name = dict(zip(names, args, strict=True)) | kwargs
    tracked = {
        # An argument and the site that is observed at it are one node.
        name: track_provenance(value, frozenset({name})) if isinstance(value, Tensor) else value
        for name, value in by_name.items()
    }
    by_position = tuple(tracked.pop(name) for name in names)
    unchecked = pyro.validation_enabled(False)  # values need not be in the support
    with own_path(), unnoticed(program, program), unchecked, TrackProvenance():
        try:
            sites = sample_sites(trace(program, by_position, tracked))
            origins = {name: provenance_of(site) for name, site in sites.items()}
        except FAILURES as error:
            raise failed("program", program, args, kwargs, error) from error
    nodes = [*sites, *(name for name in by_name if name not in sites)]
    parents = {
        name: tuple(n for n in nodes if n in found and n != name) for name, found in origins.items()
    }
    inputs = tuple(n for n in nodes if n not in sites and any(n in p for p in parents.values()))
    plates: dict[str, list[str]] = {}
    for name, site in sites.items():
        for frame in site["cond_indep_stack"]:
            plates.setdefault(frame.name, []).append(name)
    return Structure(
        title(program),
        parents,
        inputs,
        tuple(name for name, site in sites.items() if site["is_observed"]),
        {plate: tuple(members) for plate, members in plates.items()},
        {name: kind(site["fn"]) for name, site in sites.items()},
    )
