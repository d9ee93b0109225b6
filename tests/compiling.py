"""What the tests of the compiled step share: small pairs, runs of them, and their comparison."""

import functools
import shutil

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

import ppvae
from ppvae import conditionals, guides, models, nets

inductor = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler"
)
N, D, Z = 6, 5, 2
# Gradients of any size make a step of a known length, and rounding is not blown up as by Adam.
SGD = functools.partial(torch.optim.SGD, lr=0.1)
ADAM = functools.partial(torch.optim.Adam, lr=1e-2)


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = normal(N, D)


def run(svi, batches, seed=3, between=None, **kwargs):
    """Losses, what is left in the modules, which gradients are there, and the random stream."""
    torch.manual_seed(seed)
    losses = []
    for i, batch in enumerate(batches):
        if between is not None:
            between(i, svi)
        losses.append(svi.step(*batch, **kwargs))
    grads = {name: p.grad for name, p in svi.objective.named_parameters()}
    return losses, tensors(svi.objective), grads, torch.get_rng_state()


def tensors(module):
    return {k: v.clone() for k, v in module.state_dict().items() if torch.is_tensor(v)}


def assert_equal_runs(eager, compiled, rtol=1e-4, atol=1e-5):
    assert compiled[0] == pytest.approx(eager[0], rel=rtol, abs=atol)
    for name, value in eager[1].items():
        torch.testing.assert_close(
            compiled[1][name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )
    for name, grad in eager[2].items():
        assert (grad is None) == (compiled[2][name] is None), name
    assert torch.equal(eager[3], compiled[3]), "the random stream was moved"


def assert_compiled_is_eager(
    make, batches, loss=None, between=None, optim=SGD, clip_norm=1.0, rtol=1e-4, kwargs=None
):
    """``make() -> (model, guide)`` gives equal parameters each time; returns the compiled SVI."""
    runs = []
    for compile in (False, True):
        svi = ppvae.SVI(*make(), optim, loss, clip_norm=clip_norm, compile=compile)
        runs.append(run(svi, batches, between=between, **(kwargs or {})))
    assert_equal_runs(*runs, rtol=rtol)
    assert svi.build_seconds > 0
    assert all(graph is not None for graph in svi._compiled._graphs.values())
    assert not fakes(svi.objective)
    return svi


def fakes(root):
    """Where tensors without values, which only a tracer makes, are left in an object."""
    seen, pending, found = set(), [(root, "")], []
    while pending:
        thing, path = pending.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            found += [path] if isinstance(thing, FakeTensor) else []
        elif isinstance(thing, dict):
            pending += [(value, f"{path}[{key!r}]") for key, value in thing.items()]
        elif isinstance(thing, list | tuple | set):
            pending += [(value, f"{path}[{i}]") for i, value in enumerate(thing)]
        elif hasattr(thing, "__dict__") and not isinstance(thing, type):
            pending += [(value, f"{path}.{key}") for key, value in vars(thing).items()]
    return found


class Free(ppvae.Program):
    """A program from a function of itself and the data, with modules and tensors as attributes."""

    def __init__(self, body, **attributes):
        super().__init__()
        self.body = body
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, *args):
        return self.body(self, *args)


def standard(x, name="z"):
    return pyro.sample(name, dist.Normal(x.new_zeros(Z), 1.0).to_event(1))


def observe(x, loc):
    pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)


def decode(self, x, *rest):
    with pyro.plate("data", len(x)):
        observe(x, self.net(standard(x)))


def encode(self, x, *rest):
    with pyro.plate("data", len(x)):
        loc, raw = self.net(x).chunk(2, -1)
        pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))


def plain():
    torch.manual_seed(0)
    return Free(decode, net=nn.Linear(Z, D)), Free(encode, net=nn.Linear(D, 2 * Z))


def vae():
    torch.manual_seed(0)
    model = models.VAE(conditionals.Normal(nets.mlp(Z, 8, D), 0.7), latent_dim=Z)
    return model, guides.Normal(nets.mlp(D, 8, 2 * Z))


def with_model(body, **attributes):
    return Free(body, net=nn.Linear(Z, D), **attributes), Free(encode, net=nn.Linear(D, 2 * Z))


def parameter(*shape):
    return nn.Parameter(torch.zeros(*shape))


def looks_at_a_value():
    def body(self, x):
        with pyro.plate("data", len(x)):
            z = standard(x)
            if float(self.log_scale) < 100.0:
                observe(x, self.net(z))

    torch.manual_seed(0)
    model, guide = with_model(body)
    model.register_buffer("log_scale", torch.zeros(()))
    return model, guide
