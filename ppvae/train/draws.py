"""What an auxiliary learns from: fresh runs of the pair that it stands beside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from ppvae.auxiliary import own_parameters
from ppvae.pairs import (
    PARTICLE_PLATE,
    Program,
    Site,
    particle_plate,
    sample_sites,
    simulate,
    structure,
    trace,
)
from ppvae.program import method_owners


class Draws:
    """What an auxiliary learns from: fresh runs of the pair, which leave its buffers unmoved.

    Args:
        model, guide, args, kwargs: the pair, and what it is called with.
        count: how often an auxiliary will draw: each run of the guide has as many particles, so
            that its networks see the batch once.

    Attributes:
        args: the batch.
    """

    def __init__(
        self, model: Program, guide: Program, args: tuple, kwargs: dict, count: int = 1
    ) -> None:
        self.args = args
        self._model, self._guide, self._kwargs, self._count = model, guide, kwargs, count
        self._runs: list[dict[str, Site]] = []
        self._particle = self._asked = 0

    def each(self) -> Iterator[Draws]:
        """Itself, once for each time an auxiliary draws."""
        for particle in range(self._count):
            self._particle, self._asked = particle, 0
            yield self

    def guide(self, site: str) -> Tensor:
        """A draw of one of the guide's sites, ``(N, ...)``, independent of all others."""
        if self._asked == len(self._runs):
            found = structure(self._model, self._guide, self.args, self._kwargs)
            with _buffers_kept(self._guide), particle_plate(found, self._count):
                self._runs.append(sample_sites(trace(self._guide, self.args, self._kwargs)))
        sites = self._runs[self._asked]
        self._asked += 1
        if site not in sites:
            raise ValueError(
                f"an auxiliary asks for site {site!r} of the guide, which has {sorted(sites)}"
            )
        value: Tensor = sites[site]["value"]
        return value if self._count == 1 else _of_particle(sites[site], self._particle)

    def model(self) -> dict[str, Tensor]:
        """A draw of every site of the model, latents and data, ``(N, ...)`` each."""
        return {name: site["value"] for name, site in self.model_sites().items()}

    def guide_sites(self) -> dict[str, Site]:
        """All sites of a run of the guide, by name: ``"fn"`` and ``"value"``, as Pyro has them."""
        with _buffers_kept(self._guide):
            return sample_sites(trace(self._guide, self.args, self._kwargs))

    def model_sites(self) -> dict[str, Site]:
        """All sites of a run of the model that draws its data, too."""
        with _buffers_kept(self._model):
            _, dream = simulate(self._model, self.args, self._kwargs)
        return sample_sites(dream)

    def trained_in_model(self) -> list[str]:
        """Names of the trainable parameters that are the model's own."""
        if not isinstance(self._model, nn.Module):  # a function may own the guide's as well
            return []
        return [name for name, p in own_parameters(self._model).items() if p.requires_grad]


def _of_particle(site: Site, particle: int) -> Tensor:
    """The value of one of K particles, of the shape that it has without their plate."""
    dims = [-f.dim for f in site["cond_indep_stack"] if f.name != PARTICLE_PLATE and f.dim]
    value: Tensor = site["value"][particle]
    between = value.dim() - site["fn"].event_dim - max(dims, default=0)
    return value.reshape(value.shape[between:])  # dims of plates that the site is not in


@contextmanager
def _buffers_kept(program: Program) -> Iterator[None]:
    modules = [program] if isinstance(program, nn.Module) else method_owners(program)
    kept = [(b, b.clone()) for module in modules for b in module.buffers()]
    yield
    for buffer, value in kept:
        buffer.copy_(value)
