"""`check_pair`: every fault is named, with what was seen and the cure, and nothing moves."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import nn

import oracles
import ppvae
from ppvae import PairError, check_pair, conditionals, elbo, guides, models, nets, posteriors
from ppvae.check.pair import check_batch, check_values
from registry import ALL_PAIRS, CODES, OWN_DRAWS, SOFT_CODES, build

X = torch.bernoulli(torch.full((5, 4), 0.5), generator=torch.Generator().manual_seed(1))


def vae(dim=4, latent=2, **options):
    model = models.VAE(conditionals.Bernoulli(nets.mlp(latent, 8, dim)), latent_dim=latent)
    return model, guides.Normal(nets.mlp(dim, 8, 2 * latent, **options))


def refused(model, guide, *args, match=(), **options):
    """The message of the refusal; each pattern of ``match`` must be in it."""
    with pytest.raises(PairError) as caught:
        check_pair(model, guide, *args, **options)
    message = str(caught.value)
    for part in (match,) if isinstance(match, str) else match:
        assert part in message
    assert "Trace Shapes" not in message
    return message


def test_a_failing_guide_is_named_whatever_the_model_does():
    class Lookup(ppvae.Program):
        def forward(self, x):
            return {}["z"]

    message = refused(Lookup(), vae(dim=3)[1], X)
    assert "guide" in message


class Toy(ppvae.Program):
    """z ~ N(0, I), x ~ Bernoulli; every part can be changed to a wrong one."""

    def __init__(self, latents=("z",), plate="data", event=1, dim=2, make=dist.Normal):
        super().__init__()
        self.latents, self.plate, self.event, self.dim, self.make = latents, plate, event, dim, make

    def draw(self, x, name):
        loc = torch.zeros(len(x), self.dim)
        pyro.sample(name, self.make(loc, torch.ones_like(loc)).to_event(self.event))

    def observe(self, x):
        """Nothing: a guide."""

    def forward(self, x):
        with pyro.plate(self.plate, len(x)):
            for name in self.latents:
                self.draw(x, name)
            self.observe(x)


class Model(Toy):
    def observe(self, x):
        pyro.sample("x", dist.Bernoulli(torch.full_like(x, 0.5)).to_event(1), obs=x)


def test_a_guide_that_covers_part_of_the_support_is_told():
    """Its draws are all valid, yet importance sampling never sees z < 0."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def positive(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(0.0, 1.0).expand([len(x)]))

    report = check_pair(model, positive, torch.randn(4))
    (note,) = report.notes
    assert "positive numbers in the guide and real numbers in the model" in note
    assert "the ELBO stays a lower bound, but log p(x)" in note and "-inf" not in note
    assert report.holds[0].endswith("with equal event shapes")

    def uniform(x, high=1.0):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def beta(x, high=1.0):
        with pyro.plate("data", len(x)):
            q = dist.Beta(2.0, 2.0) if high == 1 else dist.Uniform(0.0, high)
            pyro.sample("z", q.expand([len(x)]))

    assert check_pair(uniform, beta, torch.randn(4)).notes == ()
    assert check_pair(uniform, beta, torch.randn(4), high=0.5).notes != ()


def test_good_pairs_pass():
    check_pair(*vae(), X)
    check_pair(*vae(), X[:1])
    check_pair(Model(), Toy(), X)
    check_pair(Model(("z", "w")), Toy(("w", "z")), X)
    check_pair(*(program.double() for program in vae()), X.double())


# -- the pair ----------------------------------------------------------------------------------


def test_missing_and_extra_latents():
    refused(Model(("z", "w")), Toy(), X, match=("no site for the model's latent ['w']", "['z']"))
    refused(Model(), Toy(("z", "w")), X, match=("the guide samples ['w']", "r(a | z)"))
    refused(Model(), Toy(("zz",)), X, match=("latent ['z']", "['zz']"))
    refused(Toy(), Toy(), X, match="no observed site")


def test_event_shapes():
    refused(Model(), Toy(dim=3), X, match=("latent 'z'", "(3,) in the guide", "(2,) in the model"))
    model, _ = vae()
    _, guide = vae(latent=3)
    refused(model, guide, X, match=("'z'", "(3,) in the guide", "last layer"))


def test_support_of_the_guide():
    class HalfNormal(Model):
        def draw(self, x, name):
            pyro.sample(name, dist.HalfNormal(torch.ones(len(x), 2)).to_event(1))

    refused(HalfNormal(), Toy(), X, match=("outside the model's support", "numbers from 0"))


def test_plates():
    refused(Model(plate="rows"), Toy(), X, match=("'z' of the model", "'x' of the model", '"data"'))
    refused(Model(), Toy(plate="rows"), X, match=("'z' of the guide", "joint=True"))

    def with_global(kind):
        class Global(kind):
            def forward(self, x):
                pyro.sample("w", dist.Normal(0.0, 1.0))
                super().forward(x)

        return Global()

    pair = with_global(Model), with_global(Toy)
    assert "but ['w'], drawn once for all rows, lies in the plate" in repr(check_pair(*pair, X))
    check_pair(*pair, X, joint=True)
    refused(pair[0], Toy(("z", "w")), X, match=("'w' of the model lies outside", "joint=True"))


@pytest.mark.parametrize("rows", [1, 2, 4, 5])
def test_undeclared_event_dimensions(rows):
    # with as many rows as columns Pyro's own check of the plate sees nothing wrong
    class Undeclared(Model):
        def observe(self, x):
            pyro.sample("x", dist.Bernoulli(torch.full_like(x, 0.5)), obs=x)

    x = X.repeat(2, 1)[:rows]
    message = refused(Undeclared(), Toy(), x)
    assert "declare only some" in message if rows == 4 else "dim -1" in message
    message = refused(Model(event=0), Toy(event=0), x)
    assert ("declare only some" in message) == (rows == 2)


def test_widths():
    model, guide = vae()
    refused(model, vae(dim=3)[1], X, match=("guide (Normal)", "(5, 4)", "width 3"))
    message = refused(vae(dim=3)[0], guide, X, match=("site 'x'", "(5, 4)", "(5, 3)", "decoder"))
    assert "argument 'x'" in message
    odd = guides.Normal(nets.mlp(4, 8, 3))
    refused(model, odd, X, match=("guide (Normal)", "(5, 3)"))
    wrong_latent = models.VAE(conditionals.Bernoulli(nets.mlp(3, 8, 4)), latent_dim=2)
    refused(wrong_latent, guide, X, match=("model (VAE)", "width 3"))


def test_several_faults_at_once():
    class Both(Model):
        def observe(self, x):
            pyro.sample("x", dist.Bernoulli(torch.full((len(x), 3), 0.5)).to_event(1), obs=x)

    message = refused(Both(("z", "w")), Toy(plate="rows"), X)
    lines = message.splitlines()
    assert len(lines) == 3
    assert "['w']" in lines[0]
    assert "'z' of the guide" in lines[1]
    assert "(5, 3)" in lines[2]


def test_bare_pyro_param():
    def guide(x):
        loc = pyro.param("loc", torch.zeros(2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc.expand(len(x), 2), 1.0).to_event(1))

    refused(Model(), guide, X, match=("pyro.param('loc')", "torch.nn.Parameter"))
    assert len(pyro.get_param_store()) == 0


def test_pyro_module_stays_out_of_the_store():
    network = nn.Linear(4, 2)

    def guide(x):
        pyro.module("network", network)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(network(x), 1.0).to_event(1))

    check_pair(Model(), guide, X)
    assert len(pyro.get_param_store()) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_log_weights_that_are_no_numbers(bad):
    model, guide = vae()
    with torch.no_grad():
        guide.conditional.net.layers[-1].bias.fill_(bad)
    refused(model, guide, X)
    model, guide = vae()
    with torch.no_grad():
        model.likelihood.net.layers[-1].bias.fill_(float("nan"))
    refused(model, guide, X, match=("site 'x' of the model", "5 of 5 datapoints"))


def test_a_probability_of_zero_is_a_number():
    class Certain(Model):
        def observe(self, x):
            pyro.sample("x", dist.Delta(torch.zeros(len(x), 4)).to_event(1), obs=x)

    check_pair(Certain(), Toy(), torch.ones(5, 4))


# -- what the pair does when run -------------------------------------------------------------------


class Learned(Toy):
    """A guide with networks, and hooks to do something wrong with them."""

    def __init__(self, net=None, extra=None, batch=lambda x: x):
        super().__init__()
        self.net = net if net is not None else nn.Linear(4, 2)
        self.extra, self.batch = extra, batch

    def draw(self, x, name):
        pyro.sample(name, dist.Normal(self.net(self.batch(x)), 1.0).to_event(1))


def test_parameters_without_gradient():
    message = refused(Model(), Learned(extra=nn.Linear(4, 2)), X)
    assert message.count("gets no gradient") == 2
    assert "'guide.extra.weight'" in message and "requires_grad_(False)" in message

    class Detached(Learned):
        def draw(self, x, name):
            pyro.sample(name, dist.Normal(self.net(x).detach(), 1.0).to_event(1))

    refused(Model(), Detached(), X, match=("'guide.net.weight'", "'guide.net.bias'", "detach()"))
    check_pair(Model(), Learned(extra=nn.Linear(4, 2).requires_grad_(False)), X)
    # both of a pair's faults, and a parameter of both programs once
    shared = nn.Linear(4, 2)
    model = Model()
    model.shared = shared
    message = refused(model, Learned(extra=shared), X)
    assert message.count("gets no gradient") == 2 and "'model.shared.weight'" in message


def test_score_only_parameters_get_a_gradient():
    check_pair(DiscreteModel(), DiscreteGuide(), X)


class DiscreteModel(ppvae.Program):
    def forward(self, x):
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Bernoulli(torch.full((4,), 0.5)).to_event(1))
            pyro.sample("x", dist.Bernoulli(0.2 + 0.6 * h).to_event(1), obs=x)


class DiscreteGuide(ppvae.Program):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 4)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Bernoulli(logits=self.net(x)).to_event(1))


@pytest.mark.parametrize(
    "batch",
    [
        lambda x: x - x.mean(0),
        lambda x: x.cumsum(0),
        lambda x: x.flip(0),
        lambda x: x.roll(1, 0),
        lambda x: torch.softmax(x @ x.T, -1) @ x,
    ],
    ids=["mean", "rows before", "flip", "roll", "attention"],
)
def test_leakage_in_the_guide(batch):
    x = torch.bernoulli(torch.full((7, 4), 0.5))
    refused(Model(), Learned(batch=batch), x, match=("site 'z' of the guide", "others", "own data"))


def test_leakage_in_the_model():
    class Mixing(ppvae.Program):
        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                logits = z[..., :1] + z.mean(-2, keepdim=True)[..., 1:] * torch.ones(4)
                pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    message = refused(Mixing(), Toy(), X)
    assert "site 'x' of the model" in message and "of the guide" not in message
    assert "changes with the data or draws of the others" in message


def test_leakage_by_labels_and_keywords():
    class ByLabel(Toy):
        def draw(self, x, name):
            y = self.y.to(x)
            pyro.sample(name, dist.Normal((y - y.mean())[:, None].expand(-1, 2), 1.0).to_event(1))

        def forward(self, x, y):
            self.y = y
            super().forward(x)

    class Ignoring(Model):
        def forward(self, x, y):
            super().forward(x)

    refused(Ignoring(), ByLabel(), X, Y, match="site 'z' of the guide")
    refused(Ignoring(), ByLabel(), X, y=Y, match="site 'z' of the guide")


def test_batch_norm_leaks_only_without_running_statistics():
    norm = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
    check_pair(Model(), Learned(norm), X)
    norm = nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2))
    refused(Model(), Learned(norm), X, match=("site 'z' of the guide", "running statistics"))


def test_equal_rows_show_no_leakage_and_say_so():
    leaks = Learned(batch=lambda x: x - x.mean(0))
    for x in (X[:1], torch.ones(5, 4)):
        report = check_pair(Model(), leaks, x)
        assert sum("two different rows" in note for note in report.notes) == 1
        assert "two different rows" in repr(report)


def test_particles():
    class Decoder(Model):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=self.net(z)).to_event(1), obs=x)

    unfolded = nn.Sequential(nn.Linear(2, 4), nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 1, 1))
    unfolded = nn.Sequential(unfolded, nn.Flatten())
    refused(Decoder(unfolded), Toy(), X, match=("with one particle but not with 3", "flat_batch"))
    check_pair(Decoder(nets.flat_batch(unfolded)), Toy(), X)

    class Attends(nn.Module):  # over dim 0: particles, if there are several
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(2, 4)

        def forward(self, z):
            return self.net(z - z.mean(0)) if z.dim() > 2 else self.net(z)

    message = refused(Decoder(Attends()), Toy(), X)
    assert "site 'x' of the model: 3 particles" in message and "one by one" in message


def test_noise_outside_sites_is_noted_not_blamed():
    noisy = Learned(batch=lambda x: x + torch.randn_like(x))
    report = check_pair(Model(), noisy, X)
    assert "draws noise outside its sites" in repr(report)


def test_gradients_that_are_possible():
    report = check_pair(*vae(), X)
    assert report.gradients == dict.fromkeys(("pathwise", "stl", "dreg", "score", "vimco"), "")
    gradients = check_pair(DiscreteModel(), DiscreteGuide(), X).gradients
    assert [name for name, reason in gradients.items() if not reason] == ["score", "vimco"]
    assert gradients["pathwise"] == "Bernoulli at latent 'h' has no reparameterised sampler"


@pytest.mark.parametrize("gradient", ["pathwise", "dreg", "score", "vimco"])
@pytest.mark.parametrize("pair", ["normal", "discrete", "flow without inverse"])
def test_the_report_tells_which_estimators_will_raise(pair, gradient):
    if pair == "normal":
        model, guide = vae()
    elif pair == "discrete":
        model, guide = DiscreteModel(), DiscreteGuide()
    else:
        layers = [dist.transforms.planar(2)]
        flow = posteriors.Flow(nets.mlp(4, 8, 4), layers, 2)
        model, guide = vae()[0], guides.Amortized(flow)
    reason = check_pair(model, guide, X).gradients[gradient]
    loss = elbo.IWELBO(3, gradient)(model, guide)
    if reason:
        with pytest.raises(ValueError, match=r"reparameterised|no inverse"):
            loss(X)
    else:
        loss(X).backward()


@pytest.mark.parametrize("pair", [*ALL_PAIRS, *CODES, *SOFT_CODES])
def test_no_false_alarm(pair):
    model, guide, args = build(pair)
    for rows in (slice(None), slice(1)):
        report = check_pair(model, guide, *[arg[rows] for arg in args])
        assert "gradients reach all" in repr(report)
        defined = {name for name, reason in report.gradients.items() if not reason}
        if pair in CODES:  # of one draw
            assert defined == {"pathwise"} and "all draws are equal" in repr(report)
            assert ("other rows" in repr(report)) == (rows == slice(None))
            continue
        without_path = {"score", "vimco"}
        assert defined == (without_path if pair in SOFT_CODES else report.gradients.keys())
        if pair in OWN_DRAWS:
            assert "are not checked: draws cannot be weighed again" in repr(report)
            continue
        assert "one by one" in repr(report)
        assert ("other rows" in repr(report)) == (rows == slice(None))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("bottom_up", [True, False])
def test_no_false_alarm_with_several_latents(bottom_up):
    model = oracles.TwoLevelModel()
    check_pair(model, oracles.TwoLevelGuide(model, bottom_up), torch.linspace(-2, 2, 5))
    check_pair(oracles.MixtureModel(), oracles.MixtureGuide(), torch.linspace(-2, 2, 5))
    check_pair(oracles.BeliefNet(), oracles.BeliefGuide(), torch.eye(4))


def test_the_report_reads_well():
    text = repr(check_pair(*cvae(), X, Y))
    assert text.splitlines()[0] == "The pair fits together."
    assert all(len(line) <= 100 and line.startswith("  ") for line in text.splitlines()[1:])
    assert "latents ['z']" in text and "data ['x']" in text


# -- the data ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (torch.full((5, 4), float("nan")), ("'x'", "20 NaN or infinite", "5 rows", "row 0")),
        (X.index_fill(0, torch.tensor([3]), float("inf")), ("4 NaN", "1 rows", "row 3")),
        (torch.tensor([1.0, float("nan")]), ("1 NaN", "row 1")),
        (torch.ones(0, 4), ("'x' is empty", "(0, 4)")),
        (torch.ones(5, 0), ("'x' is empty", "(5, 0)")),
        (torch.tensor(1.0), ("'x' is a single number", "as a Python number")),
        (X + 1, ("argument 'x'", "{0, 1}", "[2.0]", "Rescale or binarise")),
        (-X, ("{0, 1}", "[-1.0]")),
        (X / 2, ("site 'x'", "[0.5]")),
        (X[0], ("argument 'x'", "(4,)", "generates (4, 4)")),
        (X[:, :, None], ("guide (Normal)", "(5, 4, 1)")),
        (X.reshape(5, 1, 2, 2), ("(5, 1, 2, 2)", "flatten")),
        (X[:, :3], ("(5, 3)", "width 4")),
        (X.double(), ("float64", "give x.to(torch.float32)")),
        (X.byte(), ("uint8", "give x.to(torch.float32)")),
        ([1.0, 2.0], ("x: list",)),
        (None, ("x: NoneType",)),
    ],
)
def test_bad_data(x, match):
    refused(*vae(), x, match=match)


def test_too_few_and_too_many_arguments():
    refused(*vae(), match="missing 1 required positional argument: 'x'")
    refused(*vae(), X, X, match=("guide (Normal)", "(5, 4)"))


def test_grey_levels():
    model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4), grey=True), latent_dim=2)
    _, guide = vae()
    check_pair(model, guide, X / 2)
    refused(model, guide, X * 255, match=("[0, 1]", "[255.0]"))


@pytest.mark.parametrize("shape", [(8, 8, 1), (3, 8, 8), (1, 8, 4), (64,)])
def test_images_of_another_shape(shape):
    encoder = nets.conv_encoder(4, shape=(1, 8, 8))
    decoder = nets.conv_decoder(2, shape=(1, 8, 8))
    model = models.VAE(conditionals.Bernoulli(decoder, event_dim=3), latent_dim=2)
    guide = guides.Normal(encoder)
    check_pair(model, guide, torch.ones(5, 1, 8, 8))
    message = refused(model, guide, torch.ones(5, *shape))
    assert str((5, *shape)) in message


def cvae(condition=None, share=False):
    condition = condition or nets.OneHot(3)
    likelihood = conditionals.Bernoulli(nets.mlp(2 + 3, 8, 4))
    model = models.CVAE(likelihood, latent_dim=2, condition=condition)
    own = condition if share else nets.OneHot(3)
    return model, guides.Normal(nets.mlp(4 + 3, 8, 4), condition=own)


Y = torch.tensor([0, 1, 2, 0, 1])


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(
    ("y", "match"),
    [
        (Y + 1, ("argument 'y'", "0 .. 2", "1 .. 3", "num_classes=4")),
        (Y - 1, ("argument 'y'", "-1 .. 1")),
        (Y.float(), ("argument 'y'", "float32", "y.long()")),
        (Y.bool(), ("argument 'y'", "bool")),
        (Y[:, None], ("argument 'y'", "(5, 1)", "squeeze")),
        (nn.functional.one_hot(Y, 3), ("argument 'y'", "(5, 3)", "argmax")),
        (Y[:3], ("differ in length", "x: (5, 4)", "y: (3,)")),
        (None, ("y: NoneType",)),
    ],
)
def test_bad_labels(y, match, share):
    refused(*cvae(share=share), X, y, match=match)


def test_labels_by_keyword():
    check_pair(*cvae(), X, y=Y)
    check_pair(*cvae(), x=X, y=Y)
    refused(*cvae(), X, y=Y.float(), match=("y: torch.float32 (5,)", "integer labels"))


def test_checks_hold_beyond_the_batch():
    checks = check_pair(*cvae(share=True), X, Y)
    assert sorted(position for position, _ in checks) == [0, 1]
    of_x = next(check for position, check in checks if position == 0)
    of_y = next(check for position, check in checks if position == 1)
    of_x(torch.ones(1000, 4))
    of_y(torch.zeros(1000, dtype=torch.long))
    with pytest.raises(ValueError, match="4000 of 4000 values lie outside"):
        of_x(torch.full((1000, 4), 0.5))
    with pytest.raises(ValueError, match="labels must lie"):
        of_y(torch.full((1000,), 3))


def test_a_module_of_the_user_checks_its_input():
    class Embedding(nn.Embedding):
        def check(self, y):
            if y.max() >= self.num_embeddings:
                raise ValueError(f"only {self.num_embeddings} words")

        def forward(self, y):
            return super().forward(y.clamp(max=self.num_embeddings - 1))

    model, guide = cvae(nn.Sequential(Embedding(2, 3)), share=True)
    refused(model, guide, X, Y, match="argument 'y': only 2 words")
    check_pair(model, guide, X, Y.clamp(max=1))
    guide(X, Y)  # the hooks are gone


def test_a_module_is_only_asked_about_arguments():
    # labels drawn inside the model have particles and enumeration on the left: no (N,) check
    class DrawnLabel(ppvae.Program):
        def __init__(self, observe):
            super().__init__()
            self.condition, self.observe = nets.OneHot(3), observe

        def forward(self, x):
            with pyro.plate("data", len(x)):
                k = pyro.sample("k", dist.Categorical(torch.ones(3)))
                if self.observe:
                    logits = self.condition(k[None])[0].sum(-1, keepdim=True).expand(*k.shape, 4)
                    pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    check_pair(DrawnLabel(True), DrawnLabel(False), X)


# -- nothing moves -----------------------------------------------------------------------------


@pytest.mark.parametrize("x", [X, X + 1], ids=["good", "bad"])
def test_nothing_moves(x):
    model, guide = vae(batch_norm=True, dropout=0.5)
    loss = elbo.ELBO()(model, guide)
    loss(X).backward()
    guide.conditional.eval()  # a mode of its own
    state = {k: v.clone() for k, v in loss.state_dict().items() if torch.is_tensor(v)}
    grads = [p.grad.clone() for p in loss.parameters()]
    modes = [module.training for module in loss.modules()]
    random = torch.get_rng_state()
    if x is X:
        check_pair(model, guide, x)
    else:
        refused(model, guide, x)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(state[k], v) for k, v in loss.state_dict().items() if k in state)
    assert all(torch.equal(p.grad, g) for p, g in zip(loss.parameters(), grads, strict=True))
    assert [module.training for module in loss.modules()] == modes
    assert all(not module._forward_pre_hooks for module in loss.modules())
    assert len(pyro.get_param_store()) == 0


def test_validation_setting_is_left():
    for setting in (True, False):
        with pyro.validation_enabled(setting):
            check_pair(*vae(), X)
            assert torch.distributions.Distribution._validate_args is setting


def test_a_model_that_detaches_its_latent_is_noted():
    class Detached(models.VAE):
        def forward(self, x=None, size=None):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", self.prior())
                pyro.sample("x", self.likelihood(z.detach()), obs=x)

    x = torch.eye(4)
    for kind, noted in ((Detached, True), (models.VAE, False)):
        model = kind(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
        report = ppvae.check_pair(model, guides.Normal(nets.mlp(4, 8, 2 * 2)), x)
        assert any("learns from its KL alone" in note for note in report.notes) == noted


# -- programs and data of other libraries ---------------------------------------------------------


def test_a_flow_of_zuko_that_does_not_say_its_support():
    zuko = pytest.importorskip("zuko")
    from pyro.contrib.zuko import ZukoToPyro

    class Flow(ppvae.Program):
        def __init__(self):
            super().__init__()
            flow = zuko.flows.NSF(2, context=4, transforms=1, hidden_features=(8,))
            self.flow = flow

        def forward(self, x):
            with ppvae.program.data_plate(x):
                pyro.sample("z", ZukoToPyro(self.flow(x)))

    validated = torch.distributions.Distribution._validate_args
    report = check_pair(vae()[0], Flow(), X)
    assert any("'z': ZukoToPyro does not say its support" in note for note in report.notes)
    assert "no row's log-probability changes with the other rows" in report.holds
    assert report.gradients["dreg"] == ""
    assert torch.distributions.Distribution._validate_args == validated
    with torch.no_grad():
        broken = Flow()
        for parameter in broken.parameters():
            parameter.fill_(float("nan"))
    refused(vae()[0], broken, X, match="latent 'z'")


@pytest.mark.parametrize("has_rsample", [True, False])
def test_a_factor_in_the_guide_is_no_latent_and_no_point_mass(has_rsample):
    class Factor(Learned):
        def draw(self, x, name):
            z = pyro.sample(name, dist.Normal(self.net(x), 1.0).to_event(1))
            pyro.factor("pay", -(z**2).sum(-1), has_rsample=has_rsample)

    class Toward(Model):
        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=z.sum(-1, True) + 0 * x).to_event(1), obs=x)

    report = check_pair(Toward(), Factor(), X)
    assert report.holds[0].startswith("latents ['z'] of the guide")
    assert report.gradients["pathwise"] == "" or not has_rsample
    assert not any("point mass" in note for note in report.notes)
    weights = ppvae.log_weights(Toward(), Factor(), X, num_particles=30)
    assert not ppvae.check.behaviour.point_masses(weights)
    paid = weights.log_q["pay"]
    z = weights.guide_trace.nodes["z"]["value"]
    torch.testing.assert_close(paid, -(z**2).sum(-1))


def test_a_delta_with_a_density_is_no_point_mass():
    class Own(Learned):
        def draw(self, x, name):
            loc = self.net(x)
            z = loc + torch.randn_like(loc)
            log_q = dist.Normal(loc, 1.0).to_event(1).log_prob(z)
            pyro.sample(name, dist.Delta(z, log_density=log_q, event_dim=1))

    class Point(Learned):
        def draw(self, x, name):
            pyro.sample(name, dist.Delta(self.net(x), event_dim=1))

    points = [
        ppvae.check.behaviour.point_masses(ppvae.log_weights(Model(), guide(), X))
        for guide in (Own, Point)
    ]
    assert points == [[], ["z"]]


# -- missing values -------------------------------------------------------------------------------

NAN = float("nan")


class Missing(ppvae.Program):
    """Masks what is missing: values that are ``code``."""

    def __init__(self, code=NAN, how="site"):
        super().__init__()
        self.net, self.code, self.how = nn.Linear(2, 4), code, how

    def seen(self, x):
        return ~x.isnan() if self.code != self.code else x != self.code

    def forward(self, x):
        seen = self.seen(x)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            fn = dist.Normal(self.net(z), 1.0)
            if self.how == "distribution":
                pyro.sample("x", fn.mask(seen).to_event(1), obs=x)
            elif self.how == "nan":
                pyro.sample("x", dist.NanMaskedNormal(fn.loc, fn.scale).to_event(1), obs=x)
            elif self.how == "rows":
                with pyro.poutine.mask(mask=seen.all(-1)):
                    pyro.sample("x", fn.to_event(1), obs=x)
            else:
                pyro.sample("x", fn.to_event(1), obs=x)


class Fills(ppvae.Program):
    def __init__(self, model):
        super().__init__()
        self.seen, self.net = model.seen, nn.Linear(4, 2)

    def forward(self, x):
        filled = torch.where(self.seen(x), x, torch.zeros(()))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.net(filled), 1.0).to_event(1))


def holes(code, rows=12):
    x = torch.randn(rows, 4)
    x[1, 2] = x[-2, 0] = code
    return x


@pytest.mark.parametrize(
    ("how", "code"),
    [("nan", NAN), ("distribution", NAN), ("distribution", float("inf")), ("rows", NAN)],
)
def test_missing_values_that_the_pair_masks_are_taken(how, code):
    model = Missing(code, how)
    guide, x = Fills(model), holes(code)
    check_pair(model, guide, x)
    assert ppvae.SVI(model, guide, torch.optim.Adam).step(x) < 1e4
    checks = check_batch(model, guide, x[:1])
    check_values(model, guide, (x,), checks)


def test_missing_values_that_the_pair_does_not_mask_are_refused():
    model = Missing(NAN, "not at all")
    x = holes(NAN)
    message = refused(model, Fills(model), x, match=("'x' has 2 NaN", "row 1", "impute", "mask"))
    assert len(message.splitlines()) == 1
    refused(*vae(), torch.where(x.isnan(), x, X[0, 0]), match="'x' has 2 NaN")
    good = Missing(NAN, "nan")
    checks = check_batch(good, Fills(good), x[:1])
    with pytest.raises(PairError, match=r"'x' has 2 NaN or infinite values in 2 rows.*row 1"):
        check_values(model, Fills(model), (x,), checks)


@pytest.mark.parametrize("how", ["elements", "rows"])
def test_codes_that_a_mask_hides_need_not_lie_in_the_support(how):
    """-1 for missing in binary data, first in a batch, then in a row beyond it."""

    class Binary(ppvae.Program):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(2, 4)

        def forward(self, x):
            seen = x >= 0
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                fn = dist.Bernoulli(logits=self.net(z))
                if how == "elements":
                    pyro.sample("x", fn.mask(seen).to_event(1), obs=x)
                else:
                    with pyro.poutine.mask(mask=seen.all(-1)):
                        pyro.sample("x", fn.to_event(1), obs=x)

    model, guide = Binary(), vae()[1]
    x = X.clone()
    x[2, 1] = -1.0
    check_pair(model, guide, x)
    checks = check_batch(model, guide, x[:2])
    assert len(checks) == 1
    check_values(model, guide, (x,), checks)
    x[3, 0] = 7.0
    for use in (
        lambda: check_pair(model, guide, x),
        lambda: check_values(model, guide, (x,), checks),
    ):
        with pytest.raises(PairError, match=r"values lie outside the likelihood's support, \{0, 1"):
            use()


@pytest.mark.parametrize(
    ("head", "width", "column", "match"),
    [
        ("Poisson", 4, [-1.0, 2.0], r"0, 1, 2, .*e.g. \[-1.0\] in columns \[2\] .*Discret"),
        ("Poisson", 4, [0.5, 2.5], r"e.g. \[0.5, 2.5\] in columns \[2\] \(positive .*LogNormal"),
        ("Beta", 8, [0.0, 0.5], r"without its ends, e.g. \[0.0\].*ContinuousBernoulli"),
        ("Gamma", 8, [0.0, 0.5], r"support, positive numbers, e.g. \[0.0\]"),
        ("ContinuousBernoulli", 4, [1.5, 0.5], r"\[0, 1\], e.g. \[1.5\]"),
    ],
)
def test_values_outside_are_named_by_column_with_heads_that_take_them(head, width, column, match):
    make = getattr(conditionals, head)
    model, x = models.VAE(make(nets.mlp(2, width)), 2), torch.ones(6, 4)
    x = 0.5 * x if head in ("Beta", "ContinuousBernoulli") else x
    x[:, 2] = torch.tensor(column).repeat(3)
    with pytest.raises(PairError, match=f"values lie outside .*{match}"):
        check_pair(model, guides.Normal(nets.mlp(4, 4)), x)


def test_values_outside_are_named_by_the_columns_of_a_table():
    kinds = {
        "age": conditionals.Normal,
        "visits": conditionals.NegativeBinomial,
        "job": lambda net: conditionals.Categorical(net, 3),
    }
    likelihood = conditionals.Columns(nets.mlp(2, conditionals.Columns.width(kinds)), kinds)
    model, guide = models.VAE(likelihood, 2), guides.Normal(nets.mlp(3, 4))
    x = torch.tensor([[0.3, 2.0, 0.0]]).repeat(20, 1)
    check_pair(model, guide, x)
    x[3, 1], x[4, 2] = 1.5, 3.0
    seen = r"column 'visits': 0, 1, 2, .*1.5\] .*; column 'job': 0 .. 2, e.g. \[3.0\]"
    with pytest.raises(PairError, match=f"2 of 60 values lie outside .*{seen}"):
        check_pair(model, guide, x)
    checks = check_batch(model, guide, x[5:])
    with pytest.raises(PairError, match=f"'x': 2 of 60 values lie outside .*{seen}"):
        check_values(model, guide, (x,), checks)


@pytest.mark.parametrize(
    ("second", "match"),
    [
        (torch.zeros(5), r"differ in length \(x: \(6, 4\), offset: \(5,\)\)"),
        (torch.zeros(6, dtype=torch.long), "the log of the exposures, as floats"),
        (torch.zeros(6, 3), r"offset has shape \(6, 3\)"),
    ],
)
def test_offsets_that_are_none_are_refused(second, match):
    model = models.VAE(conditionals.Poisson(nets.mlp(2, 4)), 2)

    class Blind(guides.Normal):
        def forward(self, x, offset=None):
            return super().forward(x)

    guide = Blind(nets.mlp(4, 4))
    check_pair(model, guide, torch.ones(6, 4), torch.zeros(6))
    with pytest.raises(PairError, match=match):
        check_pair(model, guide, torch.ones(6, 4), second)
    other = models.VAE(conditionals.Bernoulli(nets.mlp(2, 4)), 2)
    with pytest.raises(PairError, match=r"Bernoulli was to take it: .*y are for models.CVAE"):
        check_pair(other, guide, torch.ones(6, 4), torch.zeros(6))


def test_all_rows_are_looked_at_with_the_checks_of_a_batch():
    model, guide = cvae(share=True)
    checks = check_batch(model, guide, X[:2], Y[:2])
    check_values(model, guide, (X, Y), checks)
    with pytest.raises(PairError, match="argument 'y': labels must lie"):
        check_values(model, guide, (X, Y + 1), checks)
    grey = X.index_fill(0, torch.tensor([4]), 0.5)
    with pytest.raises(PairError, match="argument 'x': 4 of 20 values lie outside"):
        check_values(model, guide, (grey, Y), checks)
    with pytest.raises(PairError, match="differ in length"):
        check_values(model, guide, (X, Y[:3]), checks)


# -- what is no row, no channel, no plain tensor ------------------------------------------------


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_sparse_and_single_numbers_are_named():
    model, guide = vae()
    for sparse in (X.to_sparse(), X.to_sparse_csr()):
        refused(model, guide, sparse, match=("'x' is sparse", "x.to_dense()"))
    refused(*cvae(), X, torch.tensor(2.0), match=("'y' is a single number", "Python number"))


def test_a_table_is_passed_by_keyword():
    def model(x, table):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(table.mean(), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, table):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    x = torch.arange(4.0)
    check_pair(model, guide, x, table=torch.arange(4.0))
    check_batch(model, guide, x, table=torch.arange(4.0))
    refused(model, guide, x, torch.arange(4.0), match=("argument 'table' has 4 rows", "by keyword"))


@pytest.mark.parametrize("rows", [2, 3, 4, 5])
def test_batch_norm_over_another_axis_is_found_while_it_is_fresh(rows):
    """With particles it would normalise rows by the statistics of channels; as many, it runs."""

    class Decoder(Model):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(2, rows), nn.BatchNorm1d(rows), nn.Linear(rows, 4))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=self.net(z)).to_event(1), obs=x)

    model = Decoder()
    before = model.net[1].running_mean, model.net[1].running_mean.clone()
    message = refused(model, Toy(), X[:rows].repeat(1, 1))
    assert "3" in message and "flat_batch" in message
    assert model.net[1].running_mean is before[0] and torch.equal(*before)
    check_batch(model, Toy(), X[:rows])  # one particle is right
    with pytest.raises(PairError, match="flat_batch"):
        check_batch(model, Toy(), X[:rows], num_particles=8)
    model.net = nets.flat_batch(model.net)
    check_pair(model, Toy(), X[:rows])


def test_automatic_guides_belong_to_positions():
    model, x = vae()[0], torch.bernoulli(torch.full((30, 4), 0.5))
    guide = AutoNormal(model)
    check_pair(model, guide, x)
    for use in (
        lambda: check_pair(model, guide, x[:7]),
        lambda: ppvae.log_weights(model, guide, x[:7]),
        lambda: elbo.ELBO().evaluate(model, guide, x[:7]),
        lambda: elbo.ELBO()(model, guide)(x[:7]),
        lambda: ppvae.SVI(model, guide).step(x[:7]),
    ):
        with pytest.raises(ValueError, match=r"AutoNormal.*30 positions.*7 rows.*guides.Auto"):
            use()
    assert ppvae.log_weights(model, guide, x, num_particles=2).log_w.shape == (2, 30)
    flat = AutoMultivariateNormal(model)
    assert ppvae.log_weights(model, flat, x, joint=True).log_w.shape == (1, 1)
    with pytest.raises(ValueError, match=r"AutoMultivariateNormal.*30 positions"):
        ppvae.log_weights(model, flat, x[:7], joint=True)
    wrapped = pyro.poutine.scale(guide, scale=1.0)
    with pytest.raises(ValueError, match=r"AutoNormal.*30 positions"):
        ppvae.log_weights(model, wrapped, x[:7])


# -- one function decides ------------------------------------------------------------------------


class Unfolded(Model):
    """Runs with one particle only."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), nn.Unflatten(1, (2, 2)), nn.Flatten())

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.net(z)).to_event(1), obs=x)


def outside():
    net = nn.Linear(4, 2)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x), 1.0).to_event(1))

    return guide


NO_STATISTICS = {"track_running_stats": False}
ROWS = torch.bernoulli(torch.full((40, 4), 0.5), generator=torch.Generator().manual_seed(2))
TRAIN = {
    "check_pair": lambda pair, x: check_pair(*pair, x),
    "SVI": lambda pair, x: ppvae.SVI(*pair, torch.optim.Adam).step(x),
    "fit": lambda pair, x: ppvae.fit(ppvae.SVI(*pair), x, epochs=1, batch_size=20, progress=False),
}
EVALUATE = {
    "log_evidence": lambda pair, x: ppvae.diagnostics.log_evidence(*pair, x, num_particles=30),
    "diagnose": lambda pair, x: ppvae.diagnose(*pair, x, num_particles=30),
}
ACCEPTED = {
    "VAE": (vae, ROWS),
    "own programs": (lambda: (Model(), Learned()), ROWS),
    "batch norm": (lambda: vae(batch_norm=True), ROWS),
    "dropout": (lambda: vae(dropout=0.5), ROWS),
    "frozen": (lambda: (Model(), Learned(extra=nn.Linear(4, 2).requires_grad_(False))), ROWS),
    "noise outside sites": (lambda: (Model(), Learned(batch=lambda x: x + torch.randn(4))), ROWS),
    "scaled": (lambda: [pyro.poutine.scale(p, scale=0.5) for p in vae()], ROWS),
}
REFUSED = {
    "missing latent": (lambda: (Model(("z", "w")), Learned()), ROWS),
    "other latent": (lambda: (Model(), vae(latent=3)[1]), ROWS),
    "no plate": (lambda: (Model(plate="rows"), Learned()), ROWS),
    "undeclared dim": (lambda: (Model(event=0), Toy(event=0)), ROWS),
    "rows are mixed": (lambda: (Model(), Learned(batch=lambda x: x - x.mean(0))), ROWS),
    "rows are mixed by batch norm": (
        lambda: (
            Model(),
            Learned(nn.Sequential(nn.BatchNorm1d(4, **NO_STATISTICS), nn.Linear(4, 2))),
        ),
        ROWS,
    ),
    "other width": (lambda: (vae(dim=3)[0], vae()[1]), ROWS),
    "grey levels": (vae, ROWS / 2),
    "missing values": (vae, torch.where(ROWS > 0, ROWS, NAN)),
    "no rows": (vae, ROWS[:0]),
    "weights that are no numbers": (
        lambda: (Model(), Learned(batch=lambda x: x * float("nan"))),
        ROWS,
    ),
    "support": (
        lambda: (Model(make=lambda loc, scale: dist.HalfNormal(scale)), Learned()),
        ROWS,
    ),
}


@pytest.mark.parametrize("use", TRAIN | EVALUATE)
@pytest.mark.parametrize("name", ACCEPTED)
def test_what_one_entry_point_accepts_all_accept(name, use):
    make, x = ACCEPTED[name]
    (TRAIN | EVALUATE)[use](make(), x)


@pytest.mark.parametrize("use", TRAIN | EVALUATE)
@pytest.mark.parametrize("name", REFUSED)
def test_what_one_entry_point_refuses_all_refuse(name, use):
    make, x = REFUSED[name]
    with pytest.raises(ValueError):  # noqa: PT011 : its text is the subject of other tests
        (TRAIN | EVALUATE)[use](make(), x)


@pytest.mark.parametrize("use", TRAIN | EVALUATE)
def test_what_cannot_be_trained_can_be_evaluated(use):
    """A network from outside has weights, but no owner."""
    pair = vae()[0], outside()
    if use in EVALUATE:
        EVALUATE[use](pair, ROWS)
    else:
        with pytest.raises(ValueError, match="'net', outside of guide"):
            TRAIN[use](pair, ROWS)


def test_particles_are_asked_for_where_there_are_any():
    pair = Unfolded(), Learned()
    check_batch(*pair, ROWS)
    ppvae.SVI(*pair).step(ROWS)
    refused(*pair, ROWS, match="with one particle but not with 3")
    with pytest.raises(PairError, match="with one particle but not with 3"):
        check_batch(*pair, ROWS, num_particles=5)


class OwnNetwork(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.net, self.calls = nn.Linear(width, 4), 0

    def forward(self, *inputs):
        self.calls += 1
        return self.net(torch.cat(inputs, -1))


@pytest.mark.parametrize(
    "net",
    [
        lambda width: nets.mlp(width, 8, 4),
        lambda width: nn.Sequential(nn.Linear(width, 4), nn.Sigmoid()),
        lambda width: nets.conv_decoder(width, shape=(1, 8, 8)),
        OwnNetwork,
    ],
)
def test_a_bare_network_as_likelihood_is_named_when_the_model_is_made(net):
    mixture, one_hot = conditionals.Mixture(3, 2), nets.OneHot(3)
    for make in (
        lambda: models.VAE(net(2), latent_dim=2),
        lambda: models.VaDE(net(2), mixture),
        lambda: models.Hierarchical(net(2), latent_dim=2),
        lambda: models.CVAE(net(2 + 3), latent_dim=2, condition=one_hot),
    ):
        with pytest.raises(TypeError, match=r"likelihood gives a torch.Tensor.*Normal\(net\)"):
            make()


def test_what_is_no_network_is_left_alone():
    """It is a copy that is run, and what fails is left to the first batch."""

    class Counting(conditionals.Bernoulli):
        calls = 0

        def forward(self, *inputs):
            self.calls += 1
            return super().forward(*inputs)

    torch.manual_seed(0)
    state = torch.get_rng_state()
    likelihood = Counting(nn.Sequential(nn.Dropout(0.5), OwnNetwork(2)))
    torch.set_rng_state(state)
    models.VAE(likelihood, latent_dim=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert likelihood.calls == likelihood.net[1].calls == 0
    ends_well = nn.Sequential(nn.Linear(2, 2), conditionals.Bernoulli(nn.Linear(2, 4)))
    models.VAE(ends_well, latent_dim=2)
    model = models.VAE(conditionals.Bernoulli(nn.Linear(3, 4)), latent_dim=2)  # another width
    refused(model, vae()[1], X, match="model (VAE)")
    unknown = models.CVAE(OwnNetwork(2 + 5), latent_dim=2)  # how wide y is nobody has said
    guide = guides.Normal(nets.mlp(4 + 5, 8, 4))
    refused(unknown, guide, X, torch.randn(5, 5), match=("site 'x' of the model has a Tensor",))


# ------------------------------------------------------------------- what is weighed at once


class MixtureOf(ppvae.Program):
    """A class that is summed out, and data whose mean a function makes of it and their number."""

    def __init__(self, mean) -> None:
        super().__init__()
        self.mean, self.loc = mean, nn.Parameter(torch.tensor([-1.0, 0.0, 3.0]))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            fn = dist.Categorical(logits=torch.zeros(3))
            c = pyro.sample("c", fn, infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(self.mean(self.loc[c], len(x)), 1.0), obs=x)


class Nothing(ppvae.Program):
    def forward(self, x):
        pass


def test_values_of_an_enumerated_latent_are_weighed_as_one_by_one():
    x = torch.randn(5)
    report = check_pair(MixtureOf(lambda loc, rows: loc), Nothing(), x)
    assert "enumerated values at once are weighed as one by one" in report.holds
    for mixing in (
        lambda loc, rows: loc - loc.mean(0),
        lambda loc, rows: loc - loc[0],  # at the last value wrong
        lambda loc, rows: loc - loc[-1],  # at the first
    ):
        with pytest.raises(PairError, match=r"^site 'x' of the model: the values of enumerated"):
            check_pair(MixtureOf(mixing), Nothing(), x)


def test_a_term_that_depends_on_the_number_of_rows_is_refused():
    x = torch.randn(5)
    with pytest.raises(PairError, match=r"'x' of the model: .* how many there are: .* 2 .* 5"):
        check_pair(MixtureOf(lambda loc, rows: loc / rows), Nothing(), x)


def test_an_infinite_density_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Gamma(0.5, torch.exp(z)), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    x = torch.tensor([1.0, 0.0, 2.0])
    with pytest.raises(PairError, match="site 'x' of the model: its log-probability is NaN or inf"):
        check_batch(model, guide, x)


def test_a_dim_of_size_one_needs_no_plate():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1, len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[None])

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(1, len(x)), 1.0))

    assert check_batch(model, guide, torch.randn(3)) == []
