"""Programs of a user's own, whatever Pyro allows: for law 6, in test_compiled.py."""

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as flows
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import nn

from compiling import (
    D,
    Free,
    N,
    Z,
    decode,
    encode,
    normal,
    observe,
    parameter,
    standard,
    with_model,
)
from ppvae import conditionals, elbo, guides, models, nets

PROGRAMS = {}


def program(loss=None):
    def add(make):
        def seeded():
            torch.manual_seed(0)
            return make()

        PROGRAMS[make.__name__] = (seeded, loss)
        return make

    return add


@program()
def masked():
    def body(self, x):
        with pyro.plate("data", len(x)):
            z = standard(x)
            with poutine.mask(mask=torch.arange(N) % 2 == 0):
                observe(x, self.net(z))

    return with_model(body)


@program()
def scaled():
    def body(self, x):
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=0.3):
                z = standard(x)
            observe(x, self.net(z))

    return with_model(body)


@program(elbo.IWELBO(num_particles=3))
def subsampled():
    def body(self, x):
        with pyro.plate("data", len(x), subsample_size=4) as rows:
            observe(x[rows], self.net(standard(x)))

    def guide(self, x):
        with pyro.plate("data", len(x), subsample_size=4) as rows:
            loc, raw = self.net(x[rows]).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

    return Free(body, net=nn.Linear(Z, D)), Free(guide, net=nn.Linear(D, 2 * Z))


@program(elbo.ELBO(num_particles=2))
def minibatch_of_a_known_size():
    def body(self, x):
        with pyro.plate("data", 100, subsample=x):
            observe(x, self.net(standard(x)))

    def guide(self, x):
        with pyro.plate("data", 100, subsample=x):
            loc, raw = self.net(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

    return Free(body, net=nn.Linear(Z, D)), Free(guide, net=nn.Linear(D, 2 * Z))


@program(elbo.IWELBO(num_particles=3))
def pixels():
    def body(self, x):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1, Z), 1.0).to_event(1))
            with pyro.plate("pixels", D, dim=-1):
                pyro.sample("x", dist.Normal(self.net(z).squeeze(-2), 1.0), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-2):
            loc, raw = self.net(x).unsqueeze(-2).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

    return Free(body, net=nn.Linear(Z, D)), Free(guide, net=nn.Linear(D, 2 * Z))


@program()
def pixels_one_by_one():
    def body(self, x):
        with pyro.plate("data", len(x)):
            loc = self.net(standard(x))
            for j in range(D):
                pyro.sample(f"x_{j}", dist.Normal(loc[..., j], 1.0), obs=x[:, j])

    return with_model(body)


def clusters(in_guide):
    def body(self, x):
        with pyro.plate("data", len(x)):
            k = pyro.sample(
                "k", dist.Categorical(logits=self.logits), infer={"enumerate": "parallel"}
            )
            observe(x, self.net(standard(x)) + self.means[k])

    def guide(self, x):
        with pyro.plate("data", len(x)):
            if in_guide:
                q = dist.Categorical(logits=self.clusters(x))
                pyro.sample("k", q, infer={"enumerate": "parallel"})
            loc, raw = self.net(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

    own = {"clusters": nn.Linear(D, 3)} if in_guide else {}
    means = nn.Parameter(normal(3, D))
    model = Free(body, net=nn.Linear(Z, D), logits=parameter(3), means=means)
    return model, Free(guide, net=nn.Linear(D, 2 * Z), **own)


@program(elbo.IWELBO(num_particles=3))
def enumerated_in_the_model():
    return clusters(in_guide=False)


@program(elbo.ELBO(num_particles=2))
def enumerated_in_the_guide():
    return clusters(in_guide=True)


def coins():
    def body(self, x):
        with pyro.plate("data", len(x)):
            observe(x, self.net(pyro.sample("b", dist.Bernoulli(self.p.sigmoid()).to_event(1))))

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("b", dist.Bernoulli(logits=self.net(x)).to_event(1))

    return Free(body, net=nn.Linear(Z, D), p=parameter(Z)), Free(guide, net=nn.Linear(D, Z))


for label, estimator in {
    "score": elbo.ELBO(gradient="score"),
    "score_of_four": elbo.ELBO(num_particles=4, gradient="score"),
    "vimco": elbo.IWELBO(num_particles=4, gradient="vimco"),
    "thermodynamic": elbo.ThermodynamicELBO(num_particles=4),
    "wake_sleep": elbo.ReweightedWakeSleep(num_particles=4, insomnia=0.5),
}.items():
    PROGRAMS[f"coins_{label}"] = (lambda: torch.manual_seed(0) and coins(), estimator)


def categories(prior, posterior):
    def body(self, x):
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", prior(self.logits))
            observe(x, k @ self.means if k.dtype.is_floating_point else self.means[k])

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("k", posterior(self.net(x)))

    model = Free(body, logits=parameter(3), means=nn.Parameter(normal(3, D)))
    return model, Free(guide, net=nn.Linear(D, 3))


@program(elbo.IWELBO(num_particles=4, gradient="vimco"))
def categorical():
    return categories(*2 * [lambda logits: dist.Categorical(logits=logits)])


@program(elbo.ELBO(num_particles=3, gradient="score"))
def one_hot():
    return categories(*2 * [lambda logits: dist.OneHotCategorical(logits=logits)])


@program(elbo.ELBO(num_particles=3))
def straight_through():
    return categories(
        lambda logits: dist.OneHotCategorical(logits=logits),
        lambda logits: dist.OneHotCategoricalStraightThrough(logits=logits),
    )


@program(elbo.ELBO(num_particles=3))
def relaxed():
    half = torch.tensor(0.5)
    return categories(*2 * [lambda logits: dist.RelaxedOneHotCategorical(half, logits=logits)])


def constrained(prior, posterior, sizes):
    def body(self, x):
        with pyro.plate("data", len(x)):
            observe(x, self.net(pyro.sample("z", prior)))

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", posterior(nn.functional.softplus(self.net(x)) + 0.1))

    return Free(body, net=nn.Linear(sizes[0], D)), Free(guide, net=nn.Linear(D, sizes[1]))


@program(elbo.IWELBO(num_particles=3))
def gamma():
    prior = dist.Gamma(torch.full((Z,), 2.0), 1.0).to_event(1)
    return constrained(prior, lambda h: dist.Gamma(h[..., :Z], h[..., Z:]).to_event(1), (Z, 2 * Z))


@program(elbo.IWELBO(num_particles=3))
def beta():
    prior = dist.Beta(torch.full((Z,), 2.0), 1.0).to_event(1)
    return constrained(prior, lambda h: dist.Beta(h[..., :Z], h[..., Z:]).to_event(1), (Z, 2 * Z))


@program(elbo.IWELBO(num_particles=3))
def dirichlet():
    return constrained(dist.Dirichlet(torch.ones(3)), dist.Dirichlet, (3, 3))


@program(elbo.ELBO(num_particles=3))
def mixture_of_normals():
    def guide(self, x):
        with pyro.plate("data", len(x)):
            loc, raw, logits = self.net(x).split([2 * Z, 2 * Z, 2], -1)
            shape = (len(x), 2, Z)
            q = dist.MixtureOfDiagNormals(loc.reshape(shape), raw.reshape(shape).exp(), logits)
            pyro.sample("z", q)

    return Free(decode, net=nn.Linear(Z, D)), Free(guide, net=nn.Linear(D, 4 * Z + 2))


def flow(*transforms):
    def guide(self, x):
        with pyro.plate("data", len(x)):
            loc, raw = self.net(x).chunk(2, -1)
            base = dist.Normal(loc, raw.exp()).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, list(self.flow)))

    guide = Free(guide, net=nn.Linear(D, 2 * Z), flow=nn.ModuleList(transforms))
    return Free(decode, net=nn.Linear(Z, D)), guide


@program(elbo.ELBO(num_particles=3))
def inverse_autoregressive():
    return flow(*(flows.affine_autoregressive(Z, [8]) for _ in range(2)))


@program(elbo.IWELBO(num_particles=3, gradient="dreg"))
def coupling():
    return flow(flows.affine_coupling(Z, [8]))


@program(elbo.ELBO(num_particles=3))
def planar():
    return flow(flows.planar(Z), flows.radial(Z))


@program(elbo.ELBO(num_particles=2))
def spline():
    return flow(flows.spline(Z))


@program()
def zuko_spline():
    import zuko  # here: it switches validation off, for all distributions
    from pyro.contrib.zuko import ZukoToPyro

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", ZukoToPyro(self.flow(x)))

    nsf = zuko.flows.NSF(Z, D, transforms=1, hidden_features=(8,))
    return Free(decode, net=nn.Linear(Z, D)), Free(guide, flow=nsf)


@program(elbo.IWELBO(num_particles=3))
def tied_parameters():
    def body(self, x):
        with pyro.plate("data", len(x)):
            observe(x, torch.tanh(self.first(standard(x))) @ self.tied)

    encoder = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, 2 * Z))
    model = Free(body, first=nn.Linear(Z, 8), tied=encoder[0].weight)
    return model, Free(encode, net=encoder)


@program()
def gradients_that_are_constants_or_one_tensor():
    """They come without memory of their own: a view of a number, or another's, or the data."""

    def body(self, x):
        with pyro.plate("data", len(x)):
            z = standard(x)
            pyro.factor("linear", self.sums.sum() + self.square.sum() + (self.slope * x).sum(-1))
            observe(x, self.net(z) + self.one + self.other)

    shapes = {"sums": (3,), "square": (4, 4), "slope": (N, D), "one": (N, D), "other": (N, D)}
    return with_model(body, **{name: parameter(*shape) for name, shape in shapes.items()})


@program()
def parameter_that_is_not_contiguous():
    net = nn.Linear(Z, D)
    net.weight = nn.Parameter(normal(Z, D).t())
    return Free(decode, net=net), Free(encode, net=nn.Linear(D, 2 * Z))


@program()
def draws_that_are_not_used():
    def body(self, x):
        with pyro.plate("data", len(x)):
            torch.randn(3)
            z = standard(x)
            torch.rand(7)
            observe(x, self.net(z) + 0.1 * torch.randn(D))

    return with_model(body)


@program()
def recurrent():
    def body(self, x):
        with pyro.plate("data", len(x)):
            z = standard(x)
            steps = z.reshape(-1, 1, Z).expand(-1, D, Z)
            observe(x, self.out(self.net(steps)[0]).reshape(*z.shape[:-1], D))

    model = Free(body, net=nn.GRU(Z, 4, batch_first=True), out=nn.Linear(4, 1))
    return model, Free(encode, net=nn.Linear(D, 2 * Z))


@program()
def reparametrised_weights():
    from torch.nn.utils import parametrizations

    model = Free(decode, net=parametrizations.spectral_norm(nn.Linear(Z, D)))
    return model, Free(encode, net=parametrizations.weight_norm(nn.Linear(D, 2 * Z)))


@program()
def attention():
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2, batch_first=True)
    encoder = nn.Sequential(
        nn.Unflatten(-1, (D, 1)), nn.Linear(1, 4), layer, nn.Flatten(-2), nn.Linear(4 * D, 2 * Z)
    )
    return Free(decode, net=nn.Linear(Z, D)), Free(encode, net=encoder)


@program(elbo.IWELBO(num_particles=5))
def batch_norm_and_dropout():
    options = {"batch_norm": True, "dropout": 0.3}
    model = models.VAE(conditionals.Normal(nets.mlp(Z, 8, D, **options), 0.7), latent_dim=Z)
    return model, guides.Normal(nets.mlp(D, 8, 2 * Z, **options))


@program(elbo.IWELBO(num_particles=5))
def convolutions_with_particles():
    shape = (1, 6, 5)
    decoder = nets.conv_decoder(Z, shape, channels=(3,), hidden=(8,), batch_norm=True)
    model = models.VAE(conditionals.Bernoulli(decoder, event_dim=3), latent_dim=Z)
    encoder = nets.conv_encoder(2 * Z, shape, channels=(3,), hidden=(8,), batch_norm=True)
    return model, guides.Normal(encoder)


@program()
def automatic_guide():
    model = Free(decode, net=nn.Linear(Z, D))
    return model, AutoNormal(model)
