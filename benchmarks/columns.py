"""What is compared: ppvae and its peers, each taking optimisation steps of the same workload.

Every builder takes a workload and a device and returns a :class:`Column`. All start from the same
parameters, compute the same estimator in float32 (the sampled ELBO for K = 1, the IWELBO
otherwise; pythae's differs as said there), and take steps of Adam(1e-3). The loss of a step is not
read, except where a peer does so itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from workloads import Networks, Workload

import ppvae

LR = 1e-3
NUM_BATCHES = 8


class NotOffered(Exception):
    """The peer has nothing that computes this workload."""


class CannotRun(Exception):
    """Something the column needs is not here: a package, a GPU."""


@dataclass
class Column:
    """One way to train.

    Attributes:
        step: takes an optimisation step on one of ``batches`` and returns its loss, unread.
        batches: the batches as this column takes them.
        wait: returns when all steps that were asked for are done.
        loss_scale: what the loss is multiplied by to be a sum over the batch.
    """

    step: Callable[[Any], Any]
    batches: Sequence[Any]
    wait: Callable[[], object]
    loss_scale: float = 1.0

    def run(self, steps: int) -> None:
        """So many steps over the batches in turn, done on return."""
        for i in range(steps):
            self.step(self.batches[i % len(self.batches)])
        self.wait()


def waiter(device: torch.device) -> Callable[[], object]:
    """A function that returns when the device has done what torch asked of it."""
    return functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else int


def _torch_column(step: Callable[[Any], Any], workload: Workload, device: torch.device) -> Column:
    return Column(step, workload.batches(NUM_BATCHES, device), waiter(device))


# ------------------------------------------------------------------------------ ppvae


def ours(
    workload: Workload, device: torch.device, compile: bool, undisturbed: bool = False
) -> Column:
    """``ppvae.SVI``, as in the quickstart; ``undisturbed``: steps as ``ppvae.fit`` takes them."""
    model, guide = workload.pair(workload.networks(device))
    adam = functools.partial(torch.optim.Adam, lr=LR)
    svi = ppvae.SVI(model, guide, adam, workload.bound, compile=compile)

    def step(x: Tensor) -> Tensor:
        svi.undisturbed = undisturbed
        return svi.update(x)

    return _torch_column(step, workload, device)


# ------------------------------------------------------------------------------ by hand


def handwritten_loss(networks: Networks, x: Tensor, num_particles: int) -> Tensor:
    """Minus the bound, summed over the batch, as an expert writes it.

    Noise is used again for log q, constants that cancel are left out, the particles' plate appears
    with the first draw so that the first encoder sees each datapoint once, the sign 1 - 2x is
    formed before particles broadcast it, and the cross-entropy is one softplus (it measured faster
    here than ``binary_cross_entropy_with_logits`` for K > 1, and the same for K = 1).
    """
    draws = (num_particles,) if num_particles > 1 else ()
    below, latents, log_ratio = x, [], []
    for encoder in networks.encoders:
        loc, log_scale = encoder(below).chunk(2, -1)
        noise = torch.randn(draws + loc.shape, device=x.device)
        draws, below = (), loc + log_scale.exp() * noise
        latents.append(below)
        log_ratio.append(0.5 * noise.square() + log_scale)
    for layer, decoder in enumerate(networks.decoders[1:]):
        loc, log_scale = decoder(latents[layer + 1]).chunk(2, -1)
        squares = ((latents[layer] - loc) * (-log_scale).exp()).square()
        log_ratio[layer] = log_ratio[layer] - 0.5 * squares - log_scale
    log_ratio[-1] = log_ratio[-1] - 0.5 * latents[-1].square()
    costs = F.softplus((1 - 2 * x) * networks.decoders[0](latents[0]))
    if num_particles == 1:
        return costs.sum() - sum(terms.sum() for terms in log_ratio)
    log_w = sum(terms.sum(-1) for terms in log_ratio) - costs.sum(-1)
    return x.shape[0] * math.log(num_particles) - log_w.logsumexp(0).sum()


def handwritten(
    workload: Workload, device: torch.device, compile: bool = False, mode: str | None = None
) -> Column:
    """Fused Adam around the loss above; compiled, the loss is one graph and so is its gradient."""
    networks = workload.networks(device)
    optimizer = torch.optim.Adam(networks.parameters(), lr=LR, fused=True)
    loss_of: Callable[[Networks, Tensor, int], Tensor] = handwritten_loss
    if compile:
        loss_of = torch.compile(handwritten_loss, fullgraph=True, dynamic=False, mode=mode)

    def step(x: Tensor) -> Tensor:
        if mode == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        optimizer.zero_grad()
        loss = loss_of(networks, x, workload.num_particles)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return _torch_column(step, workload, device)


def reduce_overhead(workload: Workload, device: torch.device) -> Column:
    """The compiled loss and gradient as CUDA graphs of ``torch.compile``'s own making."""
    _require_cuda(device)
    return handwritten(workload, device, compile=True, mode="reduce-overhead")


def cuda_graph(workload: Workload, device: torch.device) -> Column:
    """The whole step, optimiser included, captured by hand in one CUDA graph."""
    _require_cuda(device)
    networks = workload.networks(device)
    optimizer = torch.optim.Adam(networks.parameters(), lr=LR, fused=True, capturable=True)
    start = [p.detach().clone() for p in networks.parameters()]
    static_x = workload.batches(1, device)[0].clone()

    def eager() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = handwritten_loss(networks, static_x, workload.num_particles)
        loss.backward()
        optimizer.step()
        return loss.detach()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # lazy initialisation must not be captured
        for _ in range(3):
            eager()
    torch.cuda.current_stream().wait_stream(side)
    optimizer.zero_grad(set_to_none=True)  # so that gradients live in the graph's own memory
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static_loss = eager()
    with torch.no_grad():  # forget the steps that were taken to warm up
        for p, value in zip(networks.parameters(), start, strict=True):
            p.copy_(value)
        for state in optimizer.state.values():
            for value in state.values():
                value.zero_()

    def step(x: Tensor) -> Tensor:
        static_x.copy_(x)
        graph.replay()
        return static_loss

    return _torch_column(step, workload, device)


def _require_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise CannotRun("needs --device cuda")


# ------------------------------------------------------------------------------ stock Pyro


class StockPair:
    """Model and guide as Pyro's own VAE example writes them, for one latent layer or several."""

    def __init__(self, workload: Workload, device: torch.device) -> None:
        self.networks = workload.networks(device)
        self.top = workload.family.latents[-1]
        self.event_dim = len(workload.family.shape)

    def model(self, x: Tensor) -> None:
        pyro.module("decoders", self.networks.decoders)
        with pyro.plate("data", x.shape[0]):
            loc = x.new_zeros(x.shape[0], self.top)
            layer = len(self.networks.decoders)
            z = pyro.sample(f"z{layer}", dist.Normal(loc, torch.ones_like(loc)).to_event(1))
            for decoder in reversed(self.networks.decoders[1:]):
                layer -= 1
                loc, log_scale = decoder(z).chunk(2, -1)
                z = pyro.sample(f"z{layer}", dist.Normal(loc, log_scale.exp()).to_event(1))
            logits = self.networks.decoders[0](z)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(self.event_dim), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoders", self.networks.encoders)
        with pyro.plate("data", x.shape[0]):
            below = x
            for layer, encoder in enumerate(self.networks.encoders, 1):
                loc, log_scale = encoder(below).chunk(2, -1)
                below = pyro.sample(f"z{layer}", dist.Normal(loc, log_scale.exp()).to_event(1))


def stock_svi(workload: Workload, device: torch.device) -> pyro.infer.SVI:
    """``pyro.infer.SVI`` with ``Trace_ELBO``, or ``RenyiELBO(alpha=0)`` for K > 1."""
    pyro.clear_param_store()
    pair = StockPair(workload, device)
    K = workload.num_particles
    loss = (
        pyro.infer.Trace_ELBO()
        if K == 1
        else pyro.infer.RenyiELBO(alpha=0, num_particles=K, vectorize_particles=True)
    )
    return pyro.infer.SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": LR}), loss)


def stock(workload: Workload, device: torch.device) -> Column:
    """Its step, with Pyro's validation off, as its documentation advises for speed."""
    svi = stock_svi(workload, device)

    def step(x: Tensor) -> float:
        with pyro.validation_enabled(False):
            return svi.step(x)

    return _torch_column(step, workload, device)


# ------------------------------------------------------------------------------ NumPyro


def numpyro_svi(workload: Workload) -> Any:
    """``numpyro.infer.SVI`` of the same pair, images channels last, on JAX's default device."""
    import numpyro
    import numpyro.distributions as ndist
    from jax import numpy as jnp
    from jax_networks import from_torch

    networks = workload.networks()
    ups, encode = zip(*(from_torch(net) for net in networks.encoders), strict=True)
    downs, decode = zip(*(from_torch(net) for net in networks.decoders), strict=True)
    event_dim, top = len(workload.family.shape), workload.family.latents[-1]

    def normal(outputs: Any) -> Any:
        loc, log_scale = jnp.split(outputs, 2, -1)
        return ndist.Normal(loc, jnp.exp(log_scale)).to_event(1)

    def model(x: Any) -> None:
        parameters = numpyro.param("decoders", downs)
        with numpyro.plate("data", x.shape[0]):
            layer = len(decode)
            z = numpyro.sample(f"z{layer}", ndist.Normal(jnp.zeros(top), 1.0).to_event(1))
            for layer in range(len(decode) - 1, 0, -1):
                z = numpyro.sample(f"z{layer}", normal(decode[layer](parameters[layer], z)))
            logits = decode[0](parameters[0], z)
            numpyro.sample("x", ndist.Bernoulli(logits=logits).to_event(event_dim), obs=x)

    def guide(x: Any) -> None:
        parameters = numpyro.param("encoders", ups)
        with numpyro.plate("data", x.shape[0]):
            below = x
            for layer, apply in enumerate(encode):
                outputs = apply(parameters[layer], below)
                below = numpyro.sample(f"z{layer + 1}", normal(outputs))

    K = workload.num_particles
    loss = numpyro.infer.Trace_ELBO() if K == 1 else numpyro.infer.RenyiELBO(num_particles=K)
    return numpyro.infer.SVI(model, guide, numpyro.optim.Adam(LR), loss)


def numpyro_batch(x: Tensor) -> Any:
    """A batch for the pair above."""
    from jax import numpy as jnp

    return jnp.asarray((x.movedim(1, -1) if x.dim() == 4 else x).contiguous().cpu().numpy())


def numpyro_jit(workload: Workload, device: torch.device) -> Column:
    """``jax.jit(svi.update)``; the old state's memory is given to the new one."""
    try:
        import jax
        import numpyro  # noqa: F401
    except ImportError as error:
        raise CannotRun(f"{error.name} is not installed") from error
    if device.type == "cuda" and jax.default_backend() != "gpu":
        raise CannotRun("this JAX has no CUDA")
    svi = numpyro_svi(workload)
    batches = [numpyro_batch(x) for x in workload.batches(NUM_BATCHES)]
    state = svi.init(jax.random.PRNGKey(0), batches[0])
    update = jax.jit(svi.update, donate_argnums=0)

    def step(x: Any) -> Any:
        nonlocal state
        state, loss = update(state, x)
        return loss

    return Column(step, batches, lambda: jax.block_until_ready(state))


# ------------------------------------------------------------------------------ pythae


def pythae_model(workload: Workload, device: torch.device) -> nn.Module:
    """pythae's ``VAE`` or ``IWAE`` around the same networks.

    It takes the decoder's output through a sigmoid and the encoder's as a log-variance, so the
    parameters of that half are doubled. Its VAE has the closed-form KL. Its IWAE returns
    sum_k w~_k log w_k with w~ detached, which has the gradient of the IWELBO but not its value.
    Its losses are means over the batch.
    """
    from pythae.models import IWAE, VAE, IWAEConfig, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    if len(workload.family.latents) > 1:
        raise NotOffered("pythae has no VAE with several latent layers")
    networks = workload.networks(device)
    latent_dim = workload.family.latents[0]
    with torch.no_grad():
        networks.encoders[0][-1].weight[latent_dim:] *= 2
        networks.encoders[0][-1].bias[latent_dim:] *= 2

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.layers = networks.encoders[0]

        def forward(self, x: Tensor) -> ModelOutput:
            loc, log_covariance = self.layers(x).chunk(2, -1)
            return ModelOutput(embedding=loc, log_covariance=log_covariance)

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(networks.decoders[0], nn.Sigmoid())

        def forward(self, z: Tensor) -> ModelOutput:
            return ModelOutput(reconstruction=self.layers(z))

    common = {
        "input_dim": workload.family.shape,
        "latent_dim": latent_dim,
        "reconstruction_loss": "bce",
    }
    if workload.num_particles == 1:
        model = VAE(VAEConfig(**common), Encoder(), Decoder())
    else:
        config = IWAEConfig(number_samples=workload.num_particles, **common)
        model = IWAE(config, Encoder(), Decoder())
    return model.to(device)


def pythae(workload: Workload, device: torch.device) -> Column:
    """The step of its trainer, ``torch.optim.Adam`` as by default, without loader and callbacks."""
    try:
        from pythae.data.datasets import DatasetOutput
    except ImportError as error:
        raise CannotRun(f"{error.name} is not installed") from error
    model = pythae_model(workload, device)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)

    def step(inputs: DatasetOutput) -> Tensor:
        loss = model(inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    column = _torch_column(step, workload, device)
    column.batches = [DatasetOutput(data=x) for x in column.batches]
    column.loss_scale = workload.batch
    return column


PEERS: dict[str, Callable[[Workload, torch.device], Column]] = {
    "hand": handwritten,
    "hand-compile": functools.partial(handwritten, compile=True),
    "hand-overhead": reduce_overhead,
    "hand-graph": cuda_graph,
    "pyro": stock,
    "numpyro": numpyro_jit,
    "pythae": pythae,
}
COLUMNS: dict[str, Callable[[Workload, torch.device], Column]] = {
    "ppvae-eager": functools.partial(ours, compile=False),
    "ppvae-compiled": functools.partial(ours, compile=True),
    "ppvae-fit": functools.partial(ours, compile=True, undisturbed=True),
    **PEERS,
}
