"""What a notebook shows for the value of a cell."""

import functools
import html
import math

import torch

import ppvae
from ppvae import data, elbo
from ppvae.conditionals import Scale
from registry import build


def trained():
    model, guide, args = build("vae_bernoulli")
    adam = functools.partial(torch.optim.Adam, lr=0.01)
    return ppvae.SVI(model, guide, adam, elbo.IWELBO(num_particles=2)), args


def test_an_svi_says_what_it_trains_and_how() -> None:
    svi, args = trained()
    assert str(svi) == (
        "SVI of VAE and Normal, 153 parameters\n"
        "  loss       IWELBO(num_particles=2, gradient='pathwise')\n"
        "  optimiser  Adam(lr=0.01)\n"
        "  steps      0, compile=False"
    )
    svi.step(*args)
    assert "Adam(lr=0.01)\n  steps      1," in str(svi)


def test_a_history_is_a_table_with_its_best_epoch() -> None:
    rows = [{"epoch": e, "step": 9 * e, "valid_bound": -e / 3, "lr": 1e-3} for e in (1, 2)]
    shown = ppvae.History("ELBO <x>", rows, best_epoch=1)._repr_html_()
    assert "<caption>ELBO &lt;x&gt; [nats per datapoint], best in epoch 1</caption>" in shown
    for cell in ("<td>18</td>", "<td>-0.33</td>", "<td>1.00e-03</td>"):
        assert cell in shown
    assert ppvae.History("ELBO")._repr_html_()


def test_a_report_is_its_page_and_says_where_it_comes_from() -> None:
    svi, args = trained()
    report = ppvae.diagnose(svi.model, svi.guide, *args, num_particles=50, seed=3)
    shown = report._repr_html_()
    assert shown.startswith("<iframe srcdoc=")
    page = html.unescape(shown)
    assert f"VAE and Normal; data {tuple(args[0].shape)}; K = 50 particles, seed 3; ppvae" in page
    assert "Verdict" in page
    assert any("No unit is active" in v or "collapse" in v for v in report.verdict) == (
        report.active_units == 0
    )


def test_a_guide_that_ignores_the_data_has_no_active_unit() -> None:
    """Not collapsed, since it is not the prior; its means are one and the same."""
    model, guide, (x,) = build("vae_bernoulli")
    with torch.no_grad():
        for p in guide.parameters():
            p.zero_()
        guide.conditional.net.layers[-1].bias.fill_(0.5)
    report = ppvae.diagnose(model, guide, x, num_particles=50, seed=0)
    assert report.active_units == 0
    assert any(said.startswith("No unit is active") for said in report.verdict)


def test_checks_and_data_are_tables() -> None:
    model, guide, args = build("vae_bernoulli")
    checks = ppvae.check_pair(model, guide, *args)._repr_html_()
    assert checks.startswith("<p>The pair fits together.</p><table><tr><td>&#10003;</td>")
    digits = data.load("digits")._repr_html_()
    assert "<th>rows</th><td style='text-align: left'>train 1,297, valid 200, test 300" in digits
    assert f"sigma={math.e:.4g}" in repr(Scale(math.e))
