"""Make the figures of docs/figures again, each by the command that its page names.

    make figures                                # all of them: many hours
    make figures FIGURES='mixture_em constrained'
    python docs/figures.py --list

A command that makes several figures is run once. Its pictures are written under out/figures and
copied when it has ended; look at them before you commit them.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "figures"

PHOTOS = """python -c '
import numpy as np
from sklearn.datasets import load_sample_images
rng, crops = np.random.default_rng(0), []
for photo in load_sample_images().images:
    half = photo[:426].reshape(213, 2, 320, 2, 3).mean((1, 3)) / 127.5 - 1
    for top, left in zip(rng.integers(0, 213 - 16, 1200), rng.integers(0, 320 - 16, 1200)):
        crops.append(half[top : top + 16, left : left + 16].transpose(2, 0, 1))
np.savez("OUT/photos.npz", x=np.stack(crops).astype("float32"))'
"""

# What is run, with OUT for its folder, and figure = file in OUT.
COMMANDS: dict[str, dict[str, str]] = {
    "python examples/autoencoder.py --out OUT --overwrite": {
        "autoencoder_codes": "codes.png",
        "autoencoder_images": "images.png",
        "autoencoder_rate_distortion": "rate_distortion.png",
    },
    "python examples/compare_elbos.py --out OUT --overwrite": {"compare_elbos": "estimators.png"},
    "python examples/constrained.py --out OUT --overwrite": {"constrained": "curves.png"},
    "python examples/counts.py --out OUT --overwrite": {
        "counts_dispersion": "dispersion.png",
        "counts_khat": "khat.png",
        "counts_nats": "nats.png",
    },
    "python examples/custom_guide.py --out OUT --overwrite": {"custom_guide": "guides.png"},
    # as make demo has it
    "python examples/cvae.py --data typeset --latent-dim 5 --hidden 512 --epochs 30 --out OUT "
    "--overwrite": {"class_grid": "class_grid.png", "trust": "trust.png"},
    "python examples/cvae.py --task quadrant --out OUT --overwrite": {
        "cvae_quadrants": "completion.png"
    },
    "python benchmarks/reproduce.py factor --out OUT && "
    "python examples/factor.py --cells OUT/factor --out OUT --overwrite": {
        "factor_calibration": "calibration.png",
        "factor_information": "information.png",
        "factor_scores": "scores.png",
        "factor_total_correlation": "total_correlation.png",
        "factor_traversals": "traversals.png",
    },
    "python examples/deconvolution.py --out OUT --overwrite": {
        "deconvolution_abundances": "abundances.png",
        "deconvolution_globals": "globals.png",
    },
    "python benchmarks/estimator_cost.py --out OUT/estimator_cost.png": {
        "estimator_cost": "estimator_cost.png"
    },
    "python examples/factor_analysis.py --out OUT --overwrite": {
        "factor_analysis_loadings": "loadings.png"
    },
    "python examples/few_labels.py --out OUT --overwrite": {
        "few_labels_errors": "errors.png",
        "few_labels_styles": "styles.png",
    },
    "python examples/hierarchical.py --out OUT --overwrite": {"hierarchical_levels": "levels.png"},
    "python examples/implicit.py --out OUT --overwrite": {
        "implicit_banana": "banana.png",
        "implicit_calibration": "calibration.png",
        "implicit_values": "values.png",
    },
    "python examples/missing.py --out OUT --overwrite": {
        "missing_digits": "imputed.png",
        "missing_khat": "khat.png",
    },
    "python examples/mixture.py --out OUT --overwrite": {
        "mixture_em": "em.png",
        "mixture_proposals": "proposals.png",
    },
    "python examples/nvae.py --out OUT --overwrite": {
        "nvae_groups": "groups.png",
        "nvae_samples": "samples.png",
    },
    "python examples/nvdm.py --out OUT --overwrite": {"nvdm_documents": "documents.png"},
    "python examples/optimal_prior.py --out OUT --overwrite": {
        "optimal_prior_bound": "bound.png",
        "optimal_prior_calibration": "calibration.png",
        "optimal_prior_densities": "densities.png",
        "optimal_prior_draws": "draws.png",
    },
    "python examples/posterior_diagnostics.py --out OUT --overwrite": {
        "diagnostics_calibration": "calibration.png",
        "diagnostics_forest": "forest.png",
        "diagnostics_report": "report.png",
    },
    "python benchmarks/inference_gaps.py digits --temperatures 100 --out OUT": {
        "reference_posteriors": "digits-z8.png"
    },
    "python examples/semi_implicit.py --out OUT --overwrite": {"semi_implicit_ring": "ring.png"},
    "python benchmarks/snr.py --out OUT": {"snr": "snr.png"},
    "python examples/table.py --out OUT --overwrite": {
        "table_cells": "cells.png",
        "table_pit": "pit.png",
    },
    "python examples/vade.py --out OUT --overwrite": {
        "vade_clusters": "clusters.png",
        "vade_latents": "latents.png",
    },
    "python examples/vae.py --epochs 40 --out OUT --overwrite": {"reconstructions": "images.png"},
    "python examples/vq.py --data mnist --batch-size 64 --epochs 2 --prior-epochs 3 --seed 1 "
    "--out OUT --overwrite": {"vq_codes": "codes.png", "vq_samples": "samples.png"},
    PHOTOS + "python examples/vq.py --levels 2 --data OUT/photos.npz --prior conv "
    "--prior-width 32 --epochs 30 --prior-epochs 15 --out OUT --overwrite": {
        "vq_two_levels_codes": "codes.png",
        "vq_two_levels_samples": "samples.png",
    },
}


def make(command: str, pictures: dict[str, str], wanted: set[str]) -> None:
    """Run one command in the repository's root and copy the pictures that are wanted."""
    out = ROOT / "out" / "figures" / min(pictures)
    out.mkdir(parents=True, exist_ok=True)
    line = command.replace("python ", f"{shlex.quote(sys.executable)} ").replace("OUT", str(out))
    print(command, flush=True)
    started = time.monotonic()
    with open(out / "log.txt", "w", encoding="utf-8") as log:
        subprocess.run(
            ["bash", "-euc", line], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=True
        )
    for figure in sorted(wanted & set(pictures)):
        shutil.copyfile(out / pictures[figure], FOLDER / f"{figure}.png")
        print(f"    docs/figures/{figure}.png, {time.monotonic() - started:.0f} s", flush=True)


def main() -> None:
    """Make the figures that are named, or all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    every = {figure for pictures in COMMANDS.values() for figure in pictures}
    parser.add_argument("figures", nargs="*", metavar="FIGURE", help="such as mixture_em")
    parser.add_argument("--list", action="store_true", help="which command makes which figures")
    options = parser.parse_args()
    if unknown := set(options.figures) - every:
        parser.error(f"no such figures: {', '.join(sorted(unknown))}")
    wanted = set(options.figures) or every
    for command, pictures in COMMANDS.items():
        if not wanted & set(pictures):
            continue
        if options.list:
            print(f"{', '.join(pictures)}\n    {command}")
        else:
            make(command, pictures, wanted)


if __name__ == "__main__":
    main()
