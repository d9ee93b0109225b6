"""Imputation where latents are summed out: their probabilities at each particle, and draws."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ppvae.diagnostics.rows import rows_first
from ppvae.enumeration import conditional, draw
from ppvae.pairs import PARTICLE_PLATE, Site, sample_sites
from ppvae.terms import Term
from ppvae.weights import LogWeights


class Classes:
    r"""Latents that the weights of a pair sum out, p(c | x, z_k) at each draw z_k of the guide.

    Args:
        weights: of some particles of some datapoints.
        name: the observed site that is imputed.

    Raises:
        ValueError: a latent that is summed out lies in a plate inside of a datapoint.
    """

    def __init__(self, weights: LogWeights, name: str) -> None:
        self.weights = weights
        inside = {n for (_, n), factor in weights.factors.items() if factor.plates}
        if inside:
            raise ValueError(
                f"latents {sorted(inside)} are summed out in plates inside of a datapoint, and "
                f"{name!r} is imputed from their joint posterior: give a guide that draws them, "
                "without infer={'enumerate': ...}"
            )

    def letters(self, site: Site) -> str:
        """Of the dims that a site has for latents which are summed out."""
        left, ids = self.weights.leftmost, site["infer"].get("_dim_to_id", {})
        shape = site["fn"].batch_shape
        dims = [d for d in range(-len(shape), left) if shape[d] > 1]
        return "".join(self.weights.letters["latent", ids[d]] for d in dims)

    def rows(self, site: Site, values: Tensor, own: int = 0, columns: Any = None) -> Tensor:
        """Values of a site as ``(particles, datapoints, *classes, rest)``; see ``rows_first``."""
        found = rows_first(site, values, own, columns if isinstance(columns, list) else None)
        plates = [frame.name for frame in site["cond_indep_stack"]]
        found = found if PARTICLE_PLATE in plates else found[None]
        beyond = max(len(site["fn"].batch_shape) + self.weights.leftmost, 0)
        sizes = found.shape[2 : 2 + beyond]
        return found.reshape(
            *found.shape[:2], *(s for s in sizes if s > 1), *found.shape[2 + beyond :]
        )

    def probabilities(self, site: Site) -> Tensor:
        """p(c | x, z_k) of those that a site depends on, ``(K or 1, N or 1, *classes)``."""
        kept = self.letters(site)
        if not kept:
            return torch.ones(1, 1, dtype=torch.float64, device=self.weights.log_w.device)
        terms = [t._replace(values=t.values.double()) for t in self._terms()]
        return conditional(terms, self.weights.enumerated.values(), kept)

    def draw(self, index: Tensor) -> dict[str, Tensor]:
        """Which value each has at particles ``index``, ``(S, n)``: by letter, ``(S, n)``."""
        if not self.weights.enumerated:
            return {}
        count, rows = self.weights.log_w.shape
        every = torch.arange(rows, device=index.device)
        chosen = [
            t._replace(values=t.values.expand(*t.values.shape[:-2], count, rows)[..., index, every])
            for t in self._terms()
        ]
        drawn = draw(chosen, set(self.weights.enumerated.values()))
        return {letter: found.values.expand(index.shape) for letter, found in drawn.items()}

    def at(self, site: Site, index: Tensor, classes: dict[str, Tensor]) -> Tensor:
        """A site's values at some particles and classes of each datapoint, ``(S, n, rest)``."""
        values = self.rows(site, site["value"])
        every = torch.arange(index.shape[1], device=index.device)
        return values[(index, every, *(classes[letter] for letter in self.letters(site)))]

    def values(self, classes: dict[str, Tensor]) -> dict[str, Tensor]:
        """The latents that are summed out, by name, where they have these values."""
        found = {}
        for name, letter in self.weights.enumerated.items():
            site = sample_sites(self.weights.model_trace)[name]
            dim = site["infer"]["_enumerate_dim"] - site["fn"].event_dim
            support = site["value"].movedim(dim, 0)
            event = support.shape[support.dim() - site["fn"].event_dim :]
            one = support.reshape(len(support), -1, *event)[:, 0]  # of all batch dims the same
            found[name] = one[classes[letter]]
        return found

    def _terms(self) -> list[Term]:
        """What log p(x, c, z) - log q(z | x) is the sum of."""
        drawn = [
            t._replace(values=-t.values)
            for name, t in self.weights.q.items()
            if name not in self.weights.enumerated
        ]
        return [*self.weights.model_factors().values(), *drawn]
