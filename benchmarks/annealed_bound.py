"""Annealed bounds beside plain draws at equal decoder calls: VAEs on small and on larger digits.

VAEs with a softplus decoder are trained by the ELBO on scikit-learn's 8 x 8 digits and on 28 x 28
digits in twenty typefaces, both binarised; a guide is a normal with a scale for each row, or one
with the same scale for all. On 200 rows that nobody was trained on, the bound (mean of five runs,
nats per datapoint) by draws of IWELBO and by one draw of AnnealedELBO with T steps of several
sizes. An annealed draw takes T + 2 decoder rows, of T of which the slope in z is taken too: counted
as two more, that is 3 T + 2, and IWELBO gets as many draws.

    python benchmarks/annealed_bound.py
"""

import argparse

import torch

import ppvae
from ppvae import conditionals, data, elbo, guides, models, nets

STEPS = (0.2, 0.4, 0.6, 0.8)


class OneScale(torch.nn.Module):
    """A network of the mean, beside it a number for each log-scale."""

    def __init__(self, net: torch.nn.Module, dim: int) -> None:
        super().__init__()
        self.net, self.raw = net, torch.nn.Parameter(torch.zeros(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loc = self.net(x)
        return torch.cat([loc, self.raw.expand_as(loc)], -1)


def pairs(name: str, dim: int, hidden: int, epochs: int, quick: bool):
    """The guides by name, each with its model, and held-out rows."""
    split = data.load(name)
    x, new = ((part.x.flatten(1) > 0.5).float() for part in (split.train, split.test))
    x, new = (x[:200], new[:10]) if quick else (x, new[:200])
    size = x.shape[1]
    encoders = {
        "a scale for each row": lambda: nets.mlp(size, hidden, 2 * dim),
        "one scale for all": lambda: OneScale(nets.mlp(size, hidden, dim), dim),
    }
    for label, make in encoders.items():
        torch.manual_seed(0)
        decoder = nets.mlp(dim, hidden, size, activation=torch.nn.Softplus)
        model = models.VAE(conditionals.Bernoulli(decoder), latent_dim=dim)
        guide = guides.Normal(make())
        svi = ppvae.SVI(model, guide, lambda p: torch.optim.Adam(p, lr=3e-3), elbo.ELBO())
        ppvae.fit(svi, x, epochs=1 if quick else epochs, batch_size=100, progress=False)
        yield label, model, guide, new


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="try everything, measure nothing")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    runs = 1 if quick else 5
    for name, dim, hidden, epochs in (
        ("digits", 8, 64, 60),
        ("digits", 30, 64, 60),
        ("typeset", 10, 200, 40),
        ("typeset", 30, 200, 40),
    ):
        for label, model, guide, x in pairs(name, dim, hidden, epochs, quick):

            def mean(estimator, model=model, guide=guide, x=x) -> str:
                found = [estimator.evaluate(model, guide, x).mean() for _ in range(runs)]
                return f"{torch.stack(found).mean():.2f}"

            print(f"{name}, {dim} latents, {label}: ELBO {mean(elbo.ELBO(10))}", flush=True)
            for T in (4,) if quick else (6, 14, 30):
                plain = {K: mean(elbo.IWELBO(K)) for K in (T + 2, 3 * T + 2)}
                moved = {
                    step: mean(elbo.AnnealedELBO(num_temperatures=T, step=step)) for step in STEPS
                }
                print(f"  T = {T}: IWELBO(K) {plain}, AnnealedELBO(step) {moved}", flush=True)
            if not quick:
                print(f"  IWELBO(5000) {mean(elbo.IWELBO(5000))}", flush=True)


if __name__ == "__main__":
    main()
