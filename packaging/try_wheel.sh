#!/usr/bin/env bash
# Install the wheel of dist/ in an empty environment and use it: packaging/try_wheel.sh PYTHON pinned|newest
set -euo pipefail
python=$1 versions=$2
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT

"$python" -m venv "$folder/venv"
case "$versions" in
    pinned) options=(-c "$root/constraints.txt") ;;
    newest) options=(--upgrade) ;;
    *) echo "$versions: give pinned or newest" >&2; exit 2 ;;
esac
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check "${options[@]}" "$root"/dist/*.whl
cd "$folder" # nothing of the checkout can be imported
"$folder/venv/bin/python" - <<'PY'
import sys

import numpy
import pyro
import torch

import ppvae
from ppvae import conditionals, data, elbo, guides, models, nets

digits = data.load("digits")
model = models.VAE(conditionals.Bernoulli(nets.mlp(8, 32, 64)), latent_dim=8)
guide = guides.Normal(nets.mlp(64, 32, 2 * 8))
svi = ppvae.SVI(model, guide, torch.optim.Adam, elbo.IWELBO(num_particles=4))
ppvae.fit(svi, digits, epochs=2, progress=False, checkpoint="run")
report = ppvae.diagnose(model, guide, digits.test.x[:50], num_particles=100)
report.to_html("report.html")
draws = report.to_arviz()
assert -60 < report.mean < -20, report.mean
python = ".".join(map(str, sys.version_info[:3]))
print(f"Python {python}, torch {torch.__version__}, Pyro {pyro.__version__}, NumPy {numpy.__version__}: "
      f"ppvae {ppvae.__version__} trains, log p(x) {report.mean:.1f} nats")
PY
