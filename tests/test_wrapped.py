"""Programs inside Pyro's handlers, ``functools.partial``, lambdas and other callables."""

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from torch import Tensor, nn

import ppvae
from ppvae import check_pair, conditionals, diagnostics, elbo, guides, models, nets
from ppvae.program import all_modules, module_of, outside_networks
from ppvae.wrapped import argument_labels, title

X = torch.bernoulli(torch.full((12, 6), 0.5), generator=torch.Generator().manual_seed(0))
ADAM = functools.partial(torch.optim.Adam, lr=1e-2)


def vae(**options: Any):
    torch.manual_seed(0)
    model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 6)), latent_dim=2)
    return model, guides.Normal(nets.mlp(6, 8, 4, **options))


def decode(net: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=net(z)).to_event(1), obs=x)


def encode(net: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(net(x), 1.0).to_event(1))


@dataclasses.dataclass
class Calls:
    """Not hashable, as every plain dataclass."""

    run: Callable[..., None]
    net: nn.Module

    def __call__(self, x: Tensor) -> None:
        self.run(self.net, x)


@dataclasses.dataclass(slots=True)
class Slots:
    """Nothing weak can refer to it, either."""

    run: Callable[..., None]
    nets: dict[str, nn.Module]

    def __call__(self, x: Tensor) -> None:
        self.run(self.nets["net"], x)


class Holder:
    """Programs are methods of an object that is no module."""

    def __init__(self) -> None:
        self.decoder, self.encoder = nn.Linear(2, 6), nn.Linear(6, 2)

    def model(self, x: Tensor) -> None:
        decode(self.decoder, x)

    def guide(self, x: Tensor) -> None:
        encode(self.encoder, x)


class Tutorial(nn.Module):
    """As in Pyro's tutorial of the VAE."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder, self.encoder = nn.Linear(2, 6), nn.Linear(6, 2)

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        decode(self.decoder, x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        encode(self.encoder, x)


class Decorated(ppvae.Program):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 2)

    @poutine.scale(scale=1.0)
    def forward(self, x: Tensor) -> None:
        encode(self.net, x)


decoder_of_this_file = nn.Linear(2, 6)


def announces(x: Tensor) -> None:
    pyro.module("decoder", decoder_of_this_file)
    decode(decoder_of_this_file, x)


def announcing(net: nn.Module):
    def guide(x: Tensor) -> None:
        known = pyro.module("encoder", net)
        encode(known, x)

    return guide


def nets_of(*sizes: tuple[int, int]) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Linear(*size) for size in sizes]


def pair_of(kind: type, **options: Any):
    decoder, encoder = nets_of((2, 6), (6, 2))
    if kind is Slots:
        return Slots(decode, {"net": decoder}), Slots(encode, {"net": encoder})
    return kind(decode, decoder), kind(encode, encoder)


def methods(owner: Any):
    return owner.model, owner.guide


def wrapping(wrap: Callable[[Any], Any]):
    return lambda: tuple(wrap(program) for program in vae())


def by_default_argument():
    owner = Tutorial()
    return (lambda x, vae=owner: vae.model(x)), owner.guide


def by_wraps():
    model, guide = vae()

    @functools.wraps(model.forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    return wrapped, guide


def by_helper():
    model, guide = vae()

    def helper(x: Tensor) -> Any:
        return model(x)

    def outer(x: Tensor) -> Any:
        return helper(x)

    return outer, guide


def by_binding():
    decoder, encoder = nets_of((2, 6), (6, 2))
    return functools.partial(decode, decoder), functools.partial(encode, encoder)


def nested(program: Any) -> Any:
    return poutine.mask(functools.partial(poutine.scale(program, scale=1.0)), mask=MASK)


MASK = torch.tensor(True)
# Makes a pair, and how many parameter tensors it trains.
PAIRS: dict[str, tuple[Callable[[], Any], int]] = {
    "scale": (wrapping(functools.partial(poutine.scale, scale=0.5)), 8),
    "mask": (wrapping(functools.partial(poutine.mask, mask=MASK)), 8),
    "block": (wrapping(functools.partial(poutine.block, hide=["nothing"])), 8),
    "infer_config": (wrapping(lambda p: poutine.infer_config(p, config_fn=lambda site: {})), 8),
    "config_enumerate": (wrapping(config_enumerate), 8),
    "reparam": (wrapping(lambda p: poutine.reparam(p, config={})), 8),
    "nested": (wrapping(nested), 8),
    "partial": (wrapping(functools.partial), 8),
    "partial of a scale": (wrapping(lambda p: functools.partial(poutine.scale(p, scale=1.0))), 8),
    "partial with size": (wrapping(lambda p: functools.partial(p, size=24)), 8),
    "lambda": (wrapping(lambda p: lambda x: p(x)), 8),
    "helper": (by_helper, 8),
    "wraps": (by_wraps, 8),
    "default argument": (by_default_argument, 4),
    "bound networks": (by_binding, 4),
    "dataclass": (lambda: pair_of(Calls), 4),
    "dataclass with slots": (lambda: pair_of(Slots), 4),
    "methods of an object": (lambda: methods(Holder()), 4),
    "methods of a module": (lambda: methods(Tutorial()), 4),
    "scaled methods": (lambda: tuple(poutine.scale(m, scale=0.5) for m in methods(Tutorial())), 4),
    "decorated forward": (lambda: (vae()[0], Decorated()), 6),
    "pyro.module": (lambda: (announces, announcing(nn.Linear(6, 2))), 4),
}


def parameters(svi: ppvae.SVI) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in svi.objective.parameters()]


@pytest.mark.parametrize("name", PAIRS)
def test_every_entry_point_takes_it(name) -> None:
    make, count = PAIRS[name]
    model, guide = make()
    svi = ppvae.SVI(model, guide, ADAM)
    before = parameters(svi)
    assert len(before) == count
    svi.step(X)
    assert all(not torch.equal(a, b) for a, b in zip(before, parameters(svi), strict=True))
    if name != "default argument":  # there the model's function has the encoder, too
        assert f"gradients reach all {count}" in repr(check_pair(model, guide, X))
    ppvae.fit(svi, X, epochs=1, batch_size=4, progress=False)
    assert diagnostics.log_evidence(model, guide, X, num_particles=20).log_evidence.isfinite().all()
    assert ppvae.diagnose(model, guide, X, num_particles=30).log_evidence.isfinite().all()
    assert elbo.ELBO(3)(model, guide)(X).requires_grad
    assert elbo.IWELBO(3).evaluate(model, guide, X).shape == (12,)


@pytest.mark.parametrize("name", PAIRS)
def test_state_and_copies(name) -> None:
    make, _ = PAIRS[name]
    svi = ppvae.SVI(*make(), ADAM)
    svi.step(X)
    state = copy.deepcopy(svi.state_dict())
    torch.manual_seed(1)
    right = [svi.step(X) for _ in range(2)]
    ended = parameters(svi)
    svi.load_state_dict(state)
    torch.manual_seed(1)
    assert [svi.step(X) for _ in range(2)] == right
    assert all(torch.equal(a, b) for a, b in zip(ended, parameters(svi), strict=True))


def test_a_deep_copy_of_a_wrapped_pair_is_on_its_own() -> None:
    svi = ppvae.SVI(*PAIRS["scale"][0](), ADAM)
    svi.step(X)
    before = parameters(svi)
    twin = copy.deepcopy(svi)
    twin.step(X)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(svi), strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(before, parameters(twin), strict=True))


def test_a_run_is_resumed_bit_for_bit(tmp_path) -> None:
    def run(epochs: int, folder: str, resume: bool = False) -> list[Tensor]:
        pyro.set_rng_seed(2)
        svi = ppvae.SVI(*PAIRS["nested"][0](), ADAM)
        where = tmp_path / folder
        ppvae.fit(
            svi, X, epochs=epochs, batch_size=4, progress=False, checkpoint=where, resume=resume
        )
        return parameters(svi)

    whole = run(4, "whole")
    run(2, "parts")
    parts = run(4, "parts", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("name", ["scale", "partial", "lambda", "dataclass"])
def test_a_compiled_step_is_the_eager_one(traced, name) -> None:
    make, _ = PAIRS[name]
    losses = []
    for compile in (False, True):
        svi = ppvae.SVI(*make(), ADAM, compile=compile)
        torch.manual_seed(1)
        losses.append([svi.step(X) for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("name", ["scale", "mask", "partial", "lambda", "helper", "wraps"])
def test_evaluation_mode_reaches_what_is_inside(name) -> None:
    """With dropout, evidence of a wrapped pair is that of the pair."""
    wrapped = PAIRS[name][0]()
    plain = [module_of(program) for program in wrapped]
    for module in plain:
        for layer in module.modules():
            if isinstance(layer, nn.Linear):
                layer.register_forward_hook(
                    lambda layer, _, out: nn.functional.dropout(out, 0.5, layer.training)
                )
    found = [
        diagnostics.log_evidence(*pair, X, num_particles=50, seed=0).log_evidence
        for pair in (plain, wrapped)
    ]
    torch.testing.assert_close(found[0], found[1])
    assert all(module.training for module in plain)


def test_evaluation_mode_reaches_networks_from_outside() -> None:
    net = nn.Sequential(nn.Linear(6, 2), nn.Dropout(0.5))

    def guide(x: Tensor) -> None:
        encode(net, x)

    model, modes = vae()[0], []
    net[1].register_forward_hook(lambda layer, *_: modes.append(layer.training))
    diagnostics.log_evidence(model, guide, X, num_particles=10)
    assert modes and not any(modes) and net[1].training


def test_an_exact_pair_is_scaled_in_training_only() -> None:
    """``poutine.scale`` weighs what is maximised, and nothing that is reported."""
    model, guide = vae()
    scaled = [poutine.scale(program, scale=0.5) for program in (model, guide)]
    torch.manual_seed(0)
    plain = elbo.ELBO().loss(model, guide, X)
    torch.manual_seed(0)
    assert elbo.ELBO().loss(*scaled, X) == pytest.approx(plain / 2, rel=1e-6)
    found = [diagnostics.log_evidence(*p, X, seed=0).mean for p in ((model, guide), scaled)]
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_conditioned_and_with_a_size() -> None:
    class Free(ppvae.Program):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 6)

        def forward(self, rows: int) -> None:
            with pyro.plate("data", rows):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=self.net(z)).to_event(1))

    free, net = Free(), nn.Linear(6, 2)
    model = functools.partial(poutine.condition(free, data={"x": X}), len(X))
    guide = functools.partial(encode, net, X)
    svi = ppvae.SVI(model, guide, ADAM)
    torch.manual_seed(0)
    loss = svi.step()

    def observed(x: Tensor) -> None:
        decode(free.net, x)

    svi.load_state_dict(svi.state_dict())
    assert len(list(svi.objective.parameters())) == 4
    assert loss > 0
    weights = ppvae.log_weights(model, guide)
    drawn = poutine.replay(functools.partial(encode, net), trace=weights.guide_trace)
    torch.testing.assert_close(ppvae.log_weights(observed, drawn, X).log_w, weights.log_w)


@pytest.mark.parametrize("wrap", [lambda p: p, lambda p: functools.partial(p)])
def test_what_do_replaces_integrates_to_one(wrap) -> None:
    """log p(x) under an intervention on the cluster is that with the cluster fixed."""

    class Clusters(ppvae.Program):
        def __init__(self) -> None:
            super().__init__()
            self.loc = nn.Parameter(torch.tensor([-1.0, 2.0]))

        def forward(self, x: Tensor, fixed: Tensor | None = None) -> None:
            with pyro.plate("data", len(x)):
                c = pyro.sample("c", dist.Categorical(torch.tensor([0.3, 0.7])))
                c = c if fixed is None else fixed
                z = pyro.sample("z", dist.Normal(self.loc[c], 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    class Posterior(ppvae.Program):
        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal((x + 2.0) / 2, 0.5**0.5))

    x, ones = torch.tensor([0.3, -1.0, 4.0]), torch.ones(3, dtype=torch.long)
    model = wrap(poutine.do(Clusters(), data={"c": ones}))
    log_w = ppvae.log_weights(model, Posterior(), x, num_particles=5).log_w
    right = dist.Normal(2.0, 2**0.5).log_prob(x)  # the guide is the exact posterior
    torch.testing.assert_close(log_w, right.expand(5, 3))
    before = module_of(model).loc.detach().clone()
    ppvae.SVI(model, Posterior(), ADAM).step(x)
    assert (module_of(model).loc != before).tolist() == [False, True]


# ------------------------------------------------------------------------------ what is inside


def test_module_of() -> None:
    model, guide = vae()
    tutorial, holder = Tutorial(), Holder()
    assert module_of(model) is model
    for wrap in (
        lambda p: poutine.scale(p, scale=2.0),
        functools.partial,
        lambda p: config_enumerate(functools.partial(p)),
        lambda p: poutine.trace(p),
        lambda p: poutine.reparam(p, config={}),
        lambda p: lambda *args: p(*args),
    ):
        assert module_of(wrap(model)) is model
    assert module_of(poutine.scale(tutorial.model, scale=2.0)) is tutorial
    assert module_of(Calls(decode, model)) is model
    assert list(module_of(holder.model)) == [holder.decoder, holder.encoder]
    assert list(module_of(functools.partial(decode, [model, {"a": guide}]))) == [model, guide]
    assert module_of(decode) is None and module_of(print) is None and module_of(None) is None


def test_a_bare_network_from_outside_is_run_but_not_owned() -> None:
    net, frozen = nn.Linear(6, 2), nn.Linear(6, 6)

    def guide(x: Tensor) -> None:
        encode(net, frozen(x).detach())

    assert module_of(guide) is None
    assert outside_networks(guide) == {"net": net, "frozen": frozen}
    assert {id(net), id(frozen)} <= {id(module) for module in all_modules(guide)}
    for use in (check_pair, lambda *pair: ppvae.SVI(*pair[:2], ADAM).step(X)):
        with pytest.raises(ValueError, match="of 'net', outside of guide, that neither model nor"):
            use(vae()[0], guide, X)
    bound = functools.partial(lambda net, x: encode(net, frozen(x).detach()), net)
    assert list(ppvae.SVI(vae()[0], bound).objective.parameters())[-1] is net.bias


def test_only_what_is_announced_belongs_to_a_function() -> None:
    own, other = nn.Linear(6, 2), nn.Linear(6, 2)

    def guide(x: Tensor) -> None:
        pyro.module("own", own)
        encode(lambda value: own(value) + other(value), x)

    assert module_of(guide) is own and outside_networks(guide) == {"other": other}


def test_names_of_arguments_and_programs() -> None:
    model, _ = vae()
    scaled = poutine.scale(model, scale=1.0)
    bound = functools.partial(decode, nn.Linear(2, 6))
    for program in (model, scaled, bound, lambda x: model(x), Decorated(), Tutorial().model):
        assert argument_labels(program, 1) == ["x"]
    assert argument_labels(functools.partial(scaled), 2) == ["x", "offset"]
    assert argument_labels(print, 1) == ["argument 0"]
    assert title(scaled) == "VAE" and title(functools.partial(decode)) == "decode"
    assert title(Tutorial().model) == "Tutorial.model" and title(lambda x: x) == "<lambda>"
    with pytest.raises(ppvae.PairError, match=r"argument 'x' is empty"):
        check_pair(scaled, vae()[1], X[:0])
    with pytest.raises(ppvae.PairError, match=r"the guide \(Normal\) fails when called with \(x:"):
        check_pair(scaled, poutine.scale(vae()[1], scale=1.0), X[:, :3])


def test_a_schedule_goes_on_for_a_program_that_is_wrapped_anew() -> None:
    model, guide = vae()
    steps: list[int] = []
    estimator = elbo.ELBO(beta=lambda step: steps.append(step) or 1.0)
    for pair in ((model, guide), pair_of(Calls), pair_of(Slots)):
        steps.clear()
        for _ in range(3):
            estimator.differentiable_loss(*(functools.partial(p) for p in pair), X)
        assert steps == [0, 1, 2]
