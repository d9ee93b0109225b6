"""Annealed bounds beside plain draws at equal decoder rows: VAEs on digits.

A VAE with 8 or 30 latents is trained by the ELBO on scikit-learn's binarised digits. For its guide,
and for one that is not trained, the bound on 200 rows (mean of five runs, nats per datapoint) by
64 draws of IWELBO and by one draw of AnnealedELBO with T = 62, at several step sizes.

    python benchmarks/annealed_bound.py
"""

import argparse

import torch

import ppvae
from ppvae import conditionals, data, elbo, guides, models, nets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="try everything, measure nothing")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    x = (data.load("digits").train.x.flatten(1) > 0.5).float()
    rows, runs = x[: 10 if quick else 200], 1 if quick else 5
    for dim in (8, 30):
        torch.manual_seed(0)
        model = models.VAE(conditionals.Bernoulli(nets.mlp(dim, 64, 64)), latent_dim=dim)
        trained, raw = (guides.Normal(nets.mlp(64, 64, 2 * dim)) for _ in range(2))
        svi = ppvae.SVI(model, trained, lambda p: torch.optim.Adam(p, lr=3e-3), elbo.ELBO())
        ppvae.fit(svi, x, epochs=1 if quick else 30, batch_size=100, progress=False)
        for name, guide in (("trained", trained), ("untrained", raw)):
            listed = {"IWELBO": elbo.IWELBO(64)}
            for step in (0.15, 0.2, 0.3, 0.4):
                listed[f"step {step}"] = elbo.AnnealedELBO(num_temperatures=62, step=step)
            found = []
            for label, estimator in listed.items():
                means = [estimator.evaluate(model, guide, rows).mean() for _ in range(runs)]
                found.append(f"{label} {torch.stack(means).mean():.2f}")
            print(f"{dim} latents, {name} guide: {', '.join(found)}", flush=True)


if __name__ == "__main__":
    main()
