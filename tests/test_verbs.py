"""encode, reconstruct, generate, log_prob: containers, pieces, what they leave as it was; save."""

import json
import math
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import oracles
import ppvae
from ppvae import conditionals, data, diagnostics, guides, models, nets
from ppvae.train.checkpoint import CheckpointError
from ppvae.verbs.sites import needs_draws
from registry import ALL_PAIRS, CODES, ENUMERATED, TutorialVAE, build, owners
from test_table import people

N, D = 12, 4


def pair(seed: int = 0):
    torch.manual_seed(seed)
    model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, D)), latent_dim=2)
    return model, guides.Normal(nets.mlp(D, 8, 4))


def rows() -> torch.Tensor:
    return torch.bernoulli(torch.full((N, D), 0.5), generator=torch.Generator().manual_seed(1))


def conditional():
    torch.manual_seed(0)
    model = models.CVAE(
        conditionals.Bernoulli(nets.mlp(2 + 3, 8, D)), latent_dim=2, condition=nets.OneHot(3)
    )
    return model, guides.Normal(nets.mlp(D + 3, 8, 4), condition=nets.OneHot(3))


# ------------------------------------------------------------------------------ values


def test_codes_are_the_means_of_the_guide():
    guide = pair()[1]
    x = rows()
    assert torch.equal(ppvae.encode(guide, x), guide.posterior(x).mean.detach())


def test_codes_of_a_latent_below_another_are_those_of_a_linear_oracle(float64):
    """q(z2 | z1) q(z1 | x): the mean of z2 has no closed form here, and its mean is linear."""

    def guide(x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(2 * x, 1.0))
            pyro.sample("z2", dist.Normal(3 * z1 + 1, 0.5))

    x = torch.tensor([0.5, -1.0, 2.0])
    draws = 4000
    found = ppvae.encode(guide, x, num_draws=draws)
    assert list(found) == ["z1", "z2"]
    se = 3 / draws**0.5  # of a mean of E[z2 | z1], whose sd is 3
    assert ((found["z2"] - (6 * x + 1)).abs() < 5 * se).all()
    assert ((found["z1"] - 2 * x).abs() < 1e-12).all()  # its own law is closed in every pass


def test_codes_of_a_law_without_a_mean_are_means_of_draws(float64):
    class Drawn(dist.Normal):
        @property
        def mean(self):
            raise NotImplementedError

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", Drawn(x, 2.0))

    x = torch.tensor([0.5, -1.0, 2.0])
    found = ppvae.encode(guide, x, num_draws=4000)
    assert ((found - x).abs() < 5 * 2 / 4000**0.5).all()
    assert (found != x).all()


def test_codes_of_classes_are_their_probabilities():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Categorical(logits=x))

    x = torch.randn(5, 3)
    assert torch.allclose(ppvae.encode(guide, x), x.softmax(-1))
    assert ppvae.encode(guide, x, statistic="sample").dtype == torch.int64


def test_reconstructions_are_means_at_means():
    model, guide = pair()
    x = rows()
    expected = model.likelihood(guide.posterior(x).mean).mean.detach()
    assert torch.equal(ppvae.reconstruct(model, guide, x), expected)
    drawn = ppvae.reconstruct(model, guide, x, statistic="sample")
    assert set(drawn.unique().tolist()) == {0.0, 1.0}


def test_draws_have_the_law_of_the_guide_and_the_model(float64):
    model = oracles.LinearModel(2, 3)
    guide = oracles.LinearGuide(model)
    x = model.draw(1).expand(20_000, -1)
    z = ppvae.encode(guide, x, statistic="sample")
    mean = ppvae.encode(guide, x[:1])
    oracles.assert_mean(z[:, 0], mean[0, 0].item())
    drawn = ppvae.generate(model, 20_000, like=x[:2], seed=3)
    by_hand = model.draw(20_000)
    gap = drawn.mean(0) - by_hand.mean(0)
    se = (drawn.var(0) + by_hand.var(0)).sqrt() / 20_000**0.5
    assert (gap.abs() < 5 * se).all()
    assert not torch.equal(drawn[0], drawn[1])


def test_conditions_pass_through():
    model, guide = conditional()
    x, y = rows(), torch.arange(N) % 3
    at = guide.posterior(x, y).mean
    assert torch.equal(ppvae.encode(guide, x, y), at.detach())
    expected = model.likelihood(at, model.condition(y)).mean.detach()
    found = ppvae.reconstruct(model, guide, {"y": y.numpy(), "x": x.numpy()})
    assert np.array_equal(found, expected.numpy())
    drawn = ppvae.generate(model, None, y.numpy(), seed=0)
    assert isinstance(drawn, np.ndarray)
    assert drawn.shape == (N, D)
    with pytest.raises(ValueError, match=r"size is 5 and the conditions have \[12\] rows"):
        ppvae.generate(model, 5, y)


def test_log_prob_is_that_of_log_evidence():
    model, guide = pair()
    x = rows()
    expected = diagnostics.log_evidence(model, guide, x, num_particles=50, seed=0)
    nats, se = ppvae.log_prob(model, guide, x, num_particles=50, with_se=True)
    assert torch.equal(nats, expected.log_evidence)
    assert torch.equal(se, expected.log_evidence_se)


def test_generate_tells_a_program_without_size_what_to_do():
    program = TutorialVAE()
    with pytest.raises(TypeError, match=r"takes no size.*give like=x"):
        ppvae.generate(program.model, 5)
    x = torch.ones(2, 5)
    with pytest.raises(TypeError, match="takes no size"):
        ppvae.generate(lambda x: program.model(x), 5)
    assert ppvae.generate(program.model, 7, like=x, max_rows=3).shape == (7, 5)


def test_seeds():
    model = pair()[0]
    torch.manual_seed(0)
    assert not torch.equal(ppvae.generate(model, 9), ppvae.generate(model, 9))
    before = torch.get_rng_state()
    assert torch.equal(ppvae.generate(model, 9, seed=1), ppvae.generate(model, 9, seed=1))
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------ laws


@pytest.mark.parametrize("name", [*ALL_PAIRS, *CODES, *ENUMERATED])
def test_pieces_equal_the_whole_and_nothing_moves(name):
    model, guide, args = build(name)
    for module in owners(model, guide):
        module.train()
    states = [{k: v.clone() for k, v in m.state_dict().items()} for m in owners(model, guide)]
    stream = torch.get_rng_state()
    whole = ppvae.encode(guide, *args, num_draws=3)
    found = ppvae.reconstruct(model, guide, *args)
    assert torch.equal(torch.get_rng_state(), stream)
    for module, state in zip(owners(model, guide), states, strict=True):
        assert all(part.training for part in module.modules())
        assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())
    if name in ("semi_amortized", "per_datapoint"):
        return
    if "semi_implicit" not in name:  # a law without a mean is drawn
        pieces = ppvae.reconstruct(model, guide, *args, max_rows=2)
        torch.testing.assert_close(pieces, found, rtol=1e-5, atol=1e-5)
    parts = ppvae.encode(guide, *args, num_draws=3, max_rows=2)
    if not needs_draws(guide, args):
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


def test_batch_norm_is_left_as_it_was():
    net = nets.flat_batch(nn.Sequential(nn.Linear(D, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)))
    guide = guides.Normal(net)
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    found = ppvae.encode(guide, rows())
    assert torch.equal(found[:3], ppvae.encode(guide, rows()[:3]))  # evaluation mode
    assert guide.training
    assert all(torch.equal(value, before[name]) for name, value in guide.state_dict().items())


# ------------------------------------------------------------------------------ containers


def test_the_container_that_came_in_goes_out():
    model, guide = pair()
    x = rows()
    frame = pd.DataFrame(
        x.numpy(), columns=list("abcd"), index=pd.Index(range(5, 5 + N), name="id")
    )
    codes, back = ppvae.encode(guide, x), ppvae.reconstruct(model, guide, x)
    nats = ppvae.log_prob(model, guide, x, num_particles=5)
    assert np.array_equal(ppvae.encode(guide, x.numpy()), codes.numpy())
    assert np.array_equal(ppvae.reconstruct(model, guide, x.numpy()), back.numpy())
    framed = ppvae.encode(guide, frame)
    assert framed.index.equals(frame.index)
    assert list(framed) == ["z0", "z1"]
    assert np.array_equal(framed.to_numpy(), codes.numpy())
    framed = ppvae.reconstruct(model, guide, frame)
    assert framed.index.equals(frame.index)
    assert list(framed) == list("abcd")
    column = ppvae.log_prob(model, guide, frame, num_particles=5)
    assert column.name == "log_prob"
    assert np.array_equal(column.to_numpy(), nats.numpy())
    assert column.index.equals(frame.index)
    assert isinstance(ppvae.encode(guide, torch.utils.data.TensorDataset(x)), torch.Tensor)


def test_polars_goes_out_as_polars():
    pl = pytest.importorskip("polars")
    model, guide = pair()
    frame = pl.DataFrame(rows().numpy(), schema=list("abcd"))
    assert ppvae.encode(guide, frame).columns == ["z0", "z1"]
    assert ppvae.reconstruct(model, guide, frame).columns == list("abcd")
    assert isinstance(ppvae.log_prob(model, guide, frame, num_particles=5), pl.Series)


def table_pair(table):
    kinds = conditionals.heads_for(table)
    torch.manual_seed(0)
    head = conditionals.Columns(nets.mlp(2, 8, conditionals.Columns.width(kinds)), kinds)
    features = nets.Columns(table)
    net = nn.Sequential(features, nets.mlp(features.out_features, 8, 4))
    return models.VAE(head, latent_dim=2), guides.Normal(net)


def test_a_table_of_words_goes_in_and_out():
    frame = people()
    table = data.Table.fit(frame)
    model, guide = table_pair(table)
    codes = ppvae.encode(guide, frame, table=table)
    assert codes.index.equals(frame.index)
    back = ppvae.reconstruct(model, guide, frame, table=table)
    assert list(back) == list(frame)
    assert back.index.equals(frame.index)
    assert set(back.job) <= {"clerk", "nurse", "smith"}
    assert isinstance(back.grade.dtype, pd.CategoricalDtype)
    floats = frame.dtypes.replace({frame.change.dtype: np.dtype(float)})  # a number has fractions
    floats["visits"] = frame.visits.dtype
    drawn = ppvae.reconstruct(model, guide, frame, table=table, statistic="sample")
    assert drawn.dtypes.equals(floats)
    new = ppvae.generate(model, 9, table=table, seed=0)
    assert new.dtypes.equals(floats)
    assert len(new) == 9
    nats = ppvae.log_prob(model, guide, frame, table=table, num_particles=9)
    assert nats.index.equals(frame.index)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m, g: ppvae.encode(g, rows(), statistic="mode"), ValueError, "'mean' or 'sample'"),
        (lambda m, g: ppvae.encode(g, rows() * float("nan")), ValueError, "site 'z' of row 0"),
        (lambda m, g: ppvae.encode(g), ValueError, "no data"),
        (lambda m, g: ppvae.encode(g, rows(), max_rows=0), ValueError, "max_rows"),
        (lambda m, g: ppvae.generate(m, None), ValueError, "size is None"),
        (lambda m, g: ppvae.generate(m, 0), ValueError, "size must be at least 1"),
        (lambda m, g: ppvae.encode(lambda x: None, rows()), ValueError, "nothing to give back"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call(*pair())


# ------------------------------------------------------------------------------ save and load


def weights(model, guide, args, draws=3):
    torch.manual_seed(7)
    return ppvae.log_weights(model, guide, *args, num_particles=draws).log_w.detach()


OWN = {  # pairs with parts that are not the package's: tests' own, or zuko's
    "vae_categorical",
    "vae_counts",
    "vae_shares",
    "vae_levels",
    "vae_columns",
    "spline",
    "ladder",
    "pyro_modules",
    "tutorial",
}


@pytest.mark.parametrize("name", [*ALL_PAIRS, *CODES, *ENUMERATED])
def test_a_saved_pair_has_the_same_weights(name, tmp_path):
    model, guide, args = build(name)
    ppvae.save(tmp_path, model, guide)
    draws = 1 if name in CODES else 3
    expected = weights(model, guide, args, draws)
    made = build(name)[:2]
    loaded = ppvae.load(tmp_path, make=lambda: made)
    assert torch.equal(weights(loaded.model, loaded.guide, args, draws), expected)
    if name in OWN:
        with pytest.raises(TypeError, match=r"which is not ppvae's.*give make="):
            ppvae.load(tmp_path)
    else:
        loaded = ppvae.load(tmp_path)
        assert torch.equal(weights(loaded.model, loaded.guide, args, draws), expected)
        assert repr(loaded.model) == repr(model)
        names = [name for name, _ in guide.named_parameters()]
        assert [name for name, _ in loaded.guide.named_parameters()] == names


def test_what_is_shared_is_shared_again(tmp_path):
    torch.manual_seed(0)
    guide = guides.Normal(nets.mlp(D, 8, 4))
    prior = conditionals.VampPrior(guide.conditional, 3, D, mean=0.5, std=0.1)
    model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, D)), prior=prior)
    model.likelihood.net.requires_grad_(False)
    model.eval()
    ppvae.save(tmp_path, model, guide)
    again = ppvae.load(tmp_path)
    assert any(part is again.guide.conditional for part in again.model.modules())
    own = {id(p) for p in again.guide.parameters()}
    assert own & {id(p) for p in again.model.parameters()} == own
    assert not any(p.requires_grad for p in again.model.likelihood.net.parameters())
    assert not again.model.likelihood.training
    assert again.guide.training is guide.training


def test_tied_weights_are_tied_again(tmp_path):
    one, two = nn.Linear(D, D), nn.Linear(D, D)
    two.weight = one.weight
    guide = guides.Normal(nn.Sequential(one, two))
    ppvae.save(tmp_path, pair()[0], guide)
    net = ppvae.load(tmp_path).guide.conditional.net
    assert net[0].weight is net[1].weight
    assert net[0].bias is not net[1].bias


def test_a_new_process_has_the_same_weights(tmp_path):
    frame = people()
    table = data.Table.fit(frame)
    model, guide = table_pair(table)
    x = table.to_tensor(frame)
    ppvae.save(tmp_path / "pair", model, guide, table)
    frame.to_pickle(tmp_path / "frame.pkl")
    torch.save(weights(model, guide, (x,)), tmp_path / "weights.pt")
    script = f"""
import pandas, torch, ppvae
model, guide, table = ppvae.load({str(tmp_path / "pair")!r})
x = table.to_tensor(pandas.read_pickle({str(tmp_path / "frame.pkl")!r}))
torch.manual_seed(7)
found = ppvae.log_weights(model, guide, x, num_particles=3).log_w
assert torch.equal(found, torch.load({str(tmp_path / "weights.pt")!r}))
assert "pickle" not in str(table)
"""
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ)
    assert ppvae.load(tmp_path / "pair").table == table


def test_every_module_of_a_described_room_is_imported_with_ppvae():
    """Else a class of it would be known here, and not in a new process."""
    from ppvae.verbs.described import _ROOMS

    for room in _ROOMS:
        package = sys.modules[f"ppvae.{room}"]
        for found in pkgutil.iter_modules(getattr(package, "__path__", [])):
            assert f"ppvae.{room}.{found.name}" in sys.modules


def changed(folder: Path, change) -> None:
    """Write a description anew, with a digest that fits it."""
    from ppvae.train.checkpoint import digest, read_tensors

    path = folder / "pair.json"
    content = json.loads(path.read_text())
    change(content)
    name, _ = content.pop("weights"), content.pop("digest")
    content["digest"] = digest([content, read_tensors(folder / name)])
    content["weights"] = name
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "name", ["os.system", "builtins.eval", "torch.nn.functional", "ppvae.fit", "ppvae.data.Table"]
)
def test_names_in_the_file_are_not_imported(tmp_path, name):
    ppvae.save(tmp_path, *pair())
    changed(tmp_path, lambda content: content["modules"][0].update({"class": name}))
    with pytest.raises(CheckpointError, match="is no class or function of ppvae"):
        ppvae.load(tmp_path)
    ppvae.save(tmp_path, *pair())
    attribute = {"positive": {"known": name}}
    changed(tmp_path, lambda content: content["modules"][0]["attributes"].update(attribute))
    with pytest.raises(CheckpointError, match="is no class or function of ppvae"):
        ppvae.load(tmp_path)


def test_hooks_are_not_data(tmp_path):
    model, guide = pair()
    guide.register_forward_hook(lambda *args: None)
    ppvae.save(tmp_path, model, guide)
    with pytest.raises(TypeError, match="guide has hooks"):
        ppvae.load(tmp_path)


def test_a_saved_pair_is_replaced_at_once(tmp_path, monkeypatch):
    ppvae.save(tmp_path, *pair(0))
    expected = weights(*ppvae.load(tmp_path)[:2], (rows(),))

    def dies(target, content):
        if target.name == "pair.json":
            raise KeyboardInterrupt
        real(target, content)

    real = ppvae.verbs.saved.replace_file
    monkeypatch.setattr(ppvae.verbs.saved, "replace_file", dies)
    with pytest.raises(KeyboardInterrupt):
        ppvae.save(tmp_path, *pair(1))
    monkeypatch.undo()
    assert torch.equal(weights(*ppvae.load(tmp_path)[:2], (rows(),)), expected)
    ppvae.save(tmp_path, *pair(1))
    assert len(list(tmp_path.glob("*.pt"))) == 1
    assert not torch.equal(weights(*ppvae.load(tmp_path)[:2], (rows(),)), expected)


def test_a_damaged_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no pair in"):
        ppvae.load(tmp_path)
    path = ppvae.save(tmp_path, *pair())
    text = path.read_text()
    path.write_text(text.replace('"training": true', '"training": false'))
    with pytest.raises(CheckpointError, match="not what was written"):
        ppvae.load(tmp_path)
    path.write_text(text[:100])
    with pytest.raises(CheckpointError, match="damaged"):
        ppvae.load(tmp_path)
    path.write_text(text.replace('"format": 1', '"format": 2'))
    with pytest.raises(CheckpointError, match="update ppvae"):
        ppvae.load(tmp_path)
    path.write_text(text.replace("weights-", "../weights-"))
    with pytest.raises(CheckpointError, match="no file of its folder"):
        ppvae.load(tmp_path)
    path.write_text(text)
    (weights_file,) = tmp_path.glob("*.pt")
    content = bytearray(weights_file.read_bytes())
    content[len(content) // 2] ^= 1
    weights_file.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        ppvae.load(tmp_path)


class Own(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(D, width)

    def forward(self, x):
        return self.layer(x)


def test_make_is_asked_for_and_checked(tmp_path, monkeypatch):
    def make(width=4):
        torch.manual_seed(3)
        return pair()[0], guides.Normal(Own(width))

    model, guide = make()
    ppvae.save(tmp_path, model, guide)
    with pytest.raises(
        ValueError, match=r"guide.conditional.net.layer.weight' is \[8, 4\] and was"
    ):
        ppvae.load(tmp_path, make=lambda: (model, guides.Normal(Own(8))))
    with pytest.raises(ValueError, match=r"make.. gives another pair: 'guide.conditional.net"):
        ppvae.load(tmp_path, make=lambda: pair())
    with pytest.raises(TypeError, match="make must give"):
        ppvae.load(tmp_path, make=lambda: model)
    again = ppvae.load(tmp_path, make=make)
    assert torch.equal(weights(*again[:2], (rows(),)), weights(model, guide, (rows(),)))
    monkeypatch.setattr("ppvae.verbs.saved.inspect.getsource", lambda kind: "other")
    with pytest.warns(UserWarning, match="the source of test_verbs.Own is not what it was"):
        ppvae.load(tmp_path, make=make)


def test_a_table_that_no_file_holds(tmp_path):
    frame = pd.DataFrame({"a": pd.cut([1.0, 2.0, 3.0, 9.0], 3)})
    table = data.Table.fit(frame, {"a": "category"})
    with pytest.raises(TypeError, match="levels are words or numbers"):
        ppvae.save(tmp_path, *pair(), table)


@pytest.mark.parametrize("masked", [False, True])
def test_rows_of_a_program_that_takes_size_by_keyword_alone(masked):
    def program(x=None, *, size=None):
        with pyro.plate("data", size if x is None else len(x)):
            return pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1), obs=x)

    drawn = ppvae.generate(models.Masked(program) if masked else program, 5, seed=0)
    assert torch.equal(drawn, ppvae.generate(program, 5, seed=0))
    model, _ = conditional()
    y = torch.arange(4) % 3
    of_y = ppvae.generate(models.Masked(model), None, y, seed=0)
    assert torch.equal(of_y, ppvae.generate(model, None, y, seed=0))
    with pytest.raises(TypeError, match="Masked takes no size"):
        ppvae.generate(models.Masked(TutorialVAE().model), 5)


def test_a_pair_with_a_recurrent_prior_is_described(tmp_path):
    """A GRU holds weak references to its weights, which its class makes anew."""
    book = nets.Codebook(8, dim=2)
    encoder = nn.Sequential(nn.Linear(16, 18), nn.Unflatten(-1, (2, 3, 3)))
    prior = conditionals.CodePrior(book, (3, 3), nets.CausalGRU(8, (3, 3), hidden=8))
    decoder = nn.Sequential(nn.Flatten(-3), nn.Linear(18, 16))
    model, guide = (
        models.VAE(conditionals.Bernoulli(decoder), prior=prior),
        guides.Quantized(encoder, book),
    )
    x = torch.ones(4, 16)
    ppvae.save(tmp_path, model, guide)
    again = ppvae.load(tmp_path)
    found, expected = (ppvae.log_weights(*p[:2], x).log_w for p in (again, (model, guide)))
    assert torch.equal(found, expected)
    assert math.isfinite(ppvae.SVI(again.model, again.guide).step(x))


def test_odd_arguments_of_the_verbs_are_named(tmp_path):
    model, guide, (x, *_) = build("vae_bernoulli")
    for call, name in (
        (lambda: ppvae.encode(3, x), "guide"),
        (lambda: ppvae.encode(guide, x, statistic=np.array(["mean"])), "statistic"),
        (lambda: ppvae.reconstruct(model, guide, x, table=3), "table"),
        (lambda: ppvae.generate(model, 3, like=math.inf), "like"),
        (lambda: ppvae.log_prob(model, guide, x, with_se=np.ones(2)), "with_se"),
        (lambda: ppvae.load(tmp_path, make=nn.Linear(1, 1)), "make"),
        (lambda: ppvae.save(3, model, guide), "folder"),
        (lambda: ppvae.save(tmp_path, model, 3), "guide"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{name} "):
            call()
