"""How many decoder rows a local fit takes: natural gradients beside Adam, 500 digits.

A VAE on scikit-learn's binarised digits is trained for a minute; then 500 rows get parameters of
their own, from the encoder's. For several numbers of steps, each a run of its own since the step
size falls along it: decoder rows per datapoint (each with a gradient) and how far the mean ELBO of
1,000 draws is below the best that was found.

    python benchmarks/local_fits.py
"""

import argparse

import torch

import ppvae
from ppvae import conditionals, data, diagnostics, elbo, guides, models, nets, posteriors
from ppvae.local import Indexed, fit_local

DIM, PARTICLES = 8, 8
STEPS = {True: (5, 10, 20, 30, 50, 100, 200), False: (50, 100, 200, 500, 1000)}


def pair(family: str, x: torch.Tensor, epochs: int):
    torch.manual_seed(0)
    model = models.VAE(conditionals.Bernoulli(nets.mlp(DIM, 64, 64)), latent_dim=DIM)
    if family == "diagonal":
        guide = guides.Normal(nets.mlp(64, 64, 2 * DIM))
    else:
        net = nets.mlp(64, 64, DIM * (DIM + 3) // 2)
        guide = guides.Amortized(posteriors.FullNormal(net, DIM))
    svi = ppvae.SVI(model, guide, lambda p: torch.optim.Adam(p, lr=3e-3), elbo.ELBO())
    ppvae.fit(svi, x, epochs=epochs, batch_size=100, progress=False)
    return model, guide


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="try everything, measure nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    x = (data.load("digits").train.x.flatten(1) > 0.5).float()
    rows = x[: 20 if options.quick else options.rows]
    index = torch.arange(len(rows))
    for family in ("diagonal", "full"):
        model, guide = pair(family, x, 1 if options.quick else options.epochs)
        found = {}
        for natural, counts in STEPS.items():
            for steps in counts[:2] if options.quick else counts:
                local = guide.local(rows)
                fit_local(Indexed(model), local, rows, index, steps=steps, natural=natural)
                value = diagnostics.log_evidence(
                    Indexed(model), local, rows, index, num_particles=1000, seed=1
                ).elbo.mean()
                found[natural, steps] = value.item()
        best = max(found.values())
        print(f"{family} normal, {len(rows)} rows; best mean ELBO {best:.4f} nats", flush=True)
        for (natural, steps), value in found.items():
            name = "natural" if natural else "Adam"
            print(f"  {name:8s}{steps * PARTICLES:8d} rows each{best - value:9.4f} nats below")
        for natural, name in ((True, "natural"), (False, "Adam")):
            near = [s for (n, s), value in found.items() if n == natural and best - value <= 0.01]
            print(f"  {name}: 0.01 nat after {near[0] * PARTICLES if near else 'more'} rows")


if __name__ == "__main__":
    main()
