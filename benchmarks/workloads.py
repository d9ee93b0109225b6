"""What the speed benchmarks run: networks, the ppvae pair made of them, and batches.

A workload is a family of networks, a batch size and a number of particles. Its networks exist once,
as plain ``nn.Sequential``s that every column starts from, so that all columns begin at the same
parameters; the pair is what a user of ppvae writes for the same networks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise

import pyro
import torch
from torch import Tensor, nn

import ppvae
from ppvae import conditionals, elbo, guides, models, nets


class Networks(nn.Module):
    """An encoder and a decoder per latent layer, lowest first, and nothing else.

    Encoder l maps what is below (the data, or the latent before it) to loc and log sigma. Decoder 0
    maps the lowest latent to the logits of the data, the others map to loc and log sigma of the
    latent below.
    """

    def __init__(self, encoders: list[nn.Sequential], decoders: list[nn.Sequential]) -> None:
        super().__init__()
        self.encoders, self.decoders = nn.ModuleList(encoders), nn.ModuleList(decoders)


class Family(ABC):
    """Networks, and the pair that a user of ppvae writes with them."""

    shape: tuple[int, ...]  # of one datapoint
    latents: tuple[int, ...]  # sizes, lowest first

    @abstractmethod
    def networks(self) -> Networks:
        """Plain networks, fresh parameters."""

    @abstractmethod
    def pair(self) -> tuple[ppvae.Program, ppvae.Program]:
        """Model and guide; their parameters, guide's first, are in the order of the networks'."""


class MLP(Family):
    """One latent layer, multi-layer perceptrons with tanh: the VAE of Burda et al. (2016)."""

    def __init__(self, data: int = 784, hidden: tuple[int, ...] = (200, 200), latent: int = 50):
        self.shape, self.latents = (data,), (latent,)
        self._up, self._down = (data, *hidden, 2 * latent), (latent, *hidden[::-1], data)

    def networks(self) -> Networks:
        return Networks([_mlp(self._up, nn.Tanh)], [_mlp(self._down, nn.Tanh)])

    def pair(self) -> tuple[ppvae.Program, ppvae.Program]:
        decoder = nets.mlp(*self._down, activation=nn.Tanh)
        encoder = nets.mlp(*self._up, activation=nn.Tanh)
        model = models.VAE(conditionals.Bernoulli(decoder), self.latents[0])
        return model, guides.Normal(encoder)


class Conv(Family):
    """One latent layer of 32; two strided convolutions each way, 28 x 28 images, ReLU."""

    shape, latents = (1, 28, 28), (32,)

    def networks(self) -> Networks:
        encoder = nn.Sequential(
            nn.Conv2d(1, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 7 * 7, 256),
            nn.ReLU(),
            nn.Linear(256, 2 * 32),
        )
        decoder = nn.Sequential(
            nn.Linear(32, 256),
            nn.ReLU(),
            nn.Linear(256, 64 * 7 * 7),
            nn.Unflatten(1, (64, 7, 7)),
            nn.ReLU(),
            nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(32, 1, 4, stride=2, padding=1),
        )
        return Networks([encoder], [decoder])

    def pair(self) -> tuple[ppvae.Program, ppvae.Program]:
        likelihood = conditionals.Bernoulli(nets.conv_decoder(32), event_dim=3)
        return models.VAE(likelihood, 32), guides.Normal(nets.conv_encoder(2 * 32))


class Hierarchical(Family):
    """Several latent layers, bottom-up guide; sizes of Sonderby et al. (2016) for five layers."""

    def __init__(
        self,
        latents: tuple[int, ...] = (64, 32, 16, 8, 4),
        hidden: tuple[int, ...] = (512, 256, 128, 64, 32),
        data: int = 784,
    ):
        self.shape, self.latents = (data,), latents
        sizes = list(pairwise((data, *latents)))
        self._up = [(low, h, h, 2 * high) for (low, high), h in zip(sizes, hidden, strict=True)]
        self._down = [
            (high, h, h, 2 * low if layer else low)
            for layer, ((low, high), h) in enumerate(zip(sizes, hidden, strict=True))
        ]

    def networks(self) -> Networks:
        return Networks(
            [_mlp(sizes, nn.ReLU) for sizes in self._up],
            [_mlp(sizes, nn.ReLU) for sizes in self._down],
        )

    def pair(self) -> tuple[ppvae.Program, ppvae.Program]:
        guide = BottomUp([nets.mlp(*sizes) for sizes in self._up])
        return TopDown([nets.mlp(*sizes) for sizes in self._down], self.latents[-1]), guide


class TopDown(ppvae.Program):
    """p(z_L) ... p(z_1 | z_2) p(x | z_1), as a user writes it."""

    def __init__(self, decoders: list[nn.Module], top: int) -> None:
        super().__init__()
        self.likelihood = conditionals.Bernoulli(decoders[0])
        self.latents = nn.ModuleList(conditionals.Normal(net) for net in decoders[1:])
        self.prior = conditionals.StandardNormal(top)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample(f"z{len(self.latents) + 1}", self.prior())
            for layer in range(len(self.latents), 0, -1):
                z = pyro.sample(f"z{layer}", self.latents[layer - 1](z))
            pyro.sample("x", self.likelihood(z), obs=x)


class BottomUp(ppvae.Program):
    """q(z_1 | x) q(z_2 | z_1) ... q(z_L | z_{L-1}), as a user writes it."""

    def __init__(self, encoders: list[nn.Module]) -> None:
        super().__init__()
        self.latents = nn.ModuleList(conditionals.Normal(net) for net in encoders)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            below = x
            for layer, latent in enumerate(self.latents, 1):
                below = pyro.sample(f"z{layer}", latent(below))


def _mlp(sizes: tuple[int, ...], activation: type[nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(sizes):
        layers += [nn.Linear(width_in, width_out), activation()]
    return nn.Sequential(*layers[:-1])


@dataclass(frozen=True)
class Workload:
    """A family of networks, a batch size, and K: the sampled ELBO for 1, else the IWELBO."""

    name: str
    family: Family
    batch: int
    num_particles: int = 1

    def networks(self, device: torch.device | None = None) -> Networks:
        """The networks that all columns start from: the same parameters at each call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.family.networks().to(device)

    def pair(self, start: Networks) -> tuple[ppvae.Program, ppvae.Program]:
        """The pair, at the parameters of ``start`` and on its device."""
        model, guide = self.family.pair()
        own = [*guide.parameters(), *model.parameters()]
        given = list(start.parameters())
        with torch.no_grad():
            for mine, theirs in zip(own, given, strict=True):
                mine.copy_(theirs)
        return model.to(given[0].device), guide.to(given[0].device)

    @property
    def bound(self) -> elbo.Estimator:
        """What is maximised."""
        if self.num_particles == 1:
            return elbo.ELBO()
        return elbo.IWELBO(num_particles=self.num_particles)

    def batches(self, count: int, device: torch.device | None = None) -> list[Tensor]:
        """Random binary batches, the same at each call."""
        generator = torch.Generator().manual_seed(1)
        grey = torch.full((count, self.batch, *self.family.shape), 0.13)
        return list(torch.bernoulli(grey, generator=generator).to(device))


WORKLOADS = [
    Workload("mlp-128-1", MLP(), 128),
    Workload("mlp-20-50", MLP(), 20, 50),
    Workload("mlp-100-5", MLP(), 100, 5),
    Workload("conv-128-1", Conv(), 128),
    Workload("hierarchical-128-1", Hierarchical(), 128),
    Workload("mlp-20-500", MLP(), 20, 500),
]
