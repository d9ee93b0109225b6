"""The columns of the speed benchmarks compute the same estimator from the same parameters."""

import json
import math
from pathlib import Path

import pyro
import pytest
import torch

import ppvae

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_a_script(monkeypatch):
    """The scripts' own folder on the path; the number of threads and variables put back."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("NPROC", "XLA_PYTHON_CLIENT_PREALLOCATE", "JAX_DEFAULT_MATMUL_PRECISION"):
        monkeypatch.setenv(name, "1")
        monkeypatch.delenv(name)  # so that what a script sets is taken off again
    threads, tf32 = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)
    torch.backends.cudnn.allow_tf32 = tf32


@pytest.fixture(params=["K = 1", "K = 4", "two layers", "two layers, K = 4", "conv"])
def workload(request, monkeypatch):
    """Small versions of the workloads, at parameters where every term of the bound matters."""
    import workloads

    plain = workloads.Workload.networks

    def larger(self, device=None):
        networks = plain(self, device)
        with torch.no_grad():
            for parameter in networks.parameters():
                parameter.mul_(1.5)
        return networks

    monkeypatch.setattr(workloads.Workload, "networks", larger)
    small = workloads.MLP(data=6, hidden=(5,), latent=3)
    deep = workloads.Hierarchical(latents=(3, 2), hidden=(4, 5), data=6)
    family, K = {
        "K = 1": (small, 1),
        "K = 4": (small, 4),
        "two layers": (deep, 1),
        "two layers, K = 4": (deep, 4),
        "conv": (workloads.Conv(), 1),
    }[request.param]
    return workloads.Workload(request.param, family, 7, K)


def handwritten(workload, x, seed):
    """Loss and gradients of the hand-written column, draws from the seed."""
    from columns import handwritten_loss

    networks = workload.networks()
    torch.manual_seed(seed)
    loss = handwritten_loss(networks, x, workload.num_particles)
    loss.backward()
    return loss.item(), [p.grad for p in networks.parameters()]


def assert_same(found, expected):
    """Two losses, two lists of gradients."""
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.norm()))


def test_ppvae_and_the_handwritten_loss_agree_draw_for_draw(workload):
    x = workload.batches(1)[0]
    model, guide = workload.pair(workload.networks())
    torch.manual_seed(3)
    loss = workload.bound(model, guide)(x)
    loss.backward()
    gradients = [p.grad for p in [*guide.parameters(), *model.parameters()]]
    assert_same((loss.item(), gradients), handwritten(workload, x, 3))


def test_stock_pyro_and_the_handwritten_loss_agree_draw_for_draw(workload):
    from columns import stock_svi

    x = workload.batches(1)[0]
    svi = stock_svi(workload, CPU)
    networks = svi.model.__self__.networks
    svi.loss_and_grads(svi.model, svi.guide, x)  # the first time it guesses the plates
    networks.zero_grad()
    torch.manual_seed(3)
    loss = svi.loss_and_grads(svi.model, svi.guide, x)
    assert_same((loss, [p.grad for p in networks.parameters()]), handwritten(workload, x, 3))


@pytest.mark.slow
def test_numpyro_has_the_same_networks(workload):
    jax = pytest.importorskip("jax", reason="a peer of the extra bench")
    from columns import numpyro_batch
    from jax_networks import from_torch

    networks = workload.networks()
    x, z = workload.batches(1)[0], torch.randn(7, workload.family.latents[0])
    for network, inputs in ((networks.encoders[0], x), (networks.decoders[0], z)):
        parameters, apply = from_torch(network)
        found = torch.tensor(jax.device_get(apply(parameters, numpyro_batch(inputs))))
        expected = network(inputs).detach()
        expected = expected.movedim(1, -1) if expected.dim() == 4 else expected
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_numpyro_has_the_same_mean_loss(workload):
    jax = pytest.importorskip("jax", reason="a peer of the extra bench")
    from columns import handwritten_loss, numpyro_batch, numpyro_svi

    x, networks = workload.batches(1)[0], workload.networks()
    svi = numpyro_svi(workload)
    batch, draws = numpyro_batch(x), 4000 if x.dim() == 2 else 1000
    state = svi.init(jax.random.PRNGKey(0), batch)
    draw = jax.jit(jax.vmap(lambda key: svi.evaluate(state._replace(rng_key=key), batch)))
    theirs = torch.tensor(jax.device_get(draw(jax.random.split(jax.random.PRNGKey(1), draws))))
    with torch.no_grad():
        ours = torch.stack(
            [handwritten_loss(networks, x, workload.num_particles) for _ in range(draws)]
        )
    error = math.sqrt((theirs.var() + ours.var()) / draws)
    assert abs(theirs.mean() - ours.mean()) < 4.5 * error
    assert error < 0.1 * workload.batch  # a tenth of a nat per datapoint


@pytest.mark.slow
def test_pythae_has_the_same_mean_loss_or_the_same_gradient(workload, monkeypatch):
    pytest.importorskip("pythae", reason="a peer of the extra bench")
    from columns import NotOffered, handwritten_loss, pythae_model
    from pythae.data.datasets import DatasetOutput

    x = workload.batches(1)[0]
    if len(workload.family.latents) > 1:
        with pytest.raises(NotOffered):
            pythae_model(workload, CPU)
        return
    model, networks = pythae_model(workload, CPU), workload.networks()
    K, latent_dim = workload.num_particles, workload.family.latents[0]
    if K == 1:  # its KL is the closed form: equal on average over the same noise
        differences = []
        with torch.no_grad():
            for seed in range(400 if x.dim() == 2 else 50):
                torch.manual_seed(seed)
                theirs = model(DatasetOutput(data=x)).loss * len(x)
                torch.manual_seed(seed)
                differences.append(theirs - handwritten_loss(networks, x, 1))
        gap = torch.stack(differences)
        assert abs(gap.mean()) < 4.5 * gap.std() / math.sqrt(len(gap))
        return
    noise = torch.randn(K, len(x), latent_dim)
    monkeypatch.setattr(torch, "randn", lambda *shape, **kwargs: noise)
    _, expected = handwritten(workload, x, 0)
    model._sample_gauss = lambda loc, scale: (loc + scale * noise.transpose(0, 1), None)
    (model(DatasetOutput(data=x)).loss * len(x)).backward()
    found = [p.grad for p in [*model.encoder.parameters(), *model.decoder.parameters()]]
    last = len(list(model.encoder.parameters())) - 2
    for head in found[last : last + 2]:
        head[latent_dim:] *= 2  # its parameters are twice ours: a log-variance
    for theirs, ours in zip(found, expected, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4 * float(ours.norm()))


def test_the_limit_has_the_products_of_the_handwritten_step_and_no_others(workload):
    from columns import handwritten_loss
    from matmul import training_products
    from torch.utils.flop_counter import FlopCounterMode

    x, K = workload.batches(1)[0], workload.num_particles
    networks = workload.networks()
    with FlopCounterMode(display=False) as step:
        handwritten_loss(networks, x, K).backward()
    calls = training_products(networks, x, K)
    with FlopCounterMode(display=False) as limit:
        for call in calls:
            call()
    assert limit.get_total_flops() == step.get_total_flops() > 0


def test_both_libraries_compute_the_products_of_a_linear_layer():
    from matmul import linear

    weight = torch.randn(4, 3)
    for library in ("aten", "onednn"):
        if library == "onednn" and not torch.backends.mkldnn.is_available():
            continue
        torch.manual_seed(0)
        calls = linear(weight, 5, True, library)
        torch.manual_seed(0)
        w, inputs, slope = torch.randn(4, 3), torch.randn(5, 3), torch.randn(5, 4)
        for call, product in zip(calls, (inputs @ w.T, slope.T @ inputs, slope @ w), strict=True):
            torch.testing.assert_close(call(), product)


def test_rounds_alternate():
    from timing import alternate

    order = []
    blocks = {name: (lambda name=name: order.append(name) or len(order)) for name in "abc"}
    taken = alternate(blocks, 3)
    assert "".join(order) == "abc" + "acb" + "cab"
    assert taken["b"].tolist() == [2, 6, 9]


def test_results_resume_from_equal_code_and_settings_only(tmp_path):
    from timing import Results, environment

    path, where, settings = tmp_path / "out" / "results.jsonl", environment(CPU), {"rounds": 10}
    assert Results(path, where, settings).get("a", lambda: {"ms": 1}) == {"ms": 1}
    with path.open("a") as file:
        file.write('{"key": "b", "resu')  # killed while writing
    later = where | {"date": "another day", "load": [9.0, 9.0, 9.0], "busy": 0.0}
    assert Results(path, later, settings).get("a", lambda: {"ms": 2}) == {"ms": 1}
    assert Results(path, where, {"rounds": 20}).get("a", lambda: {"ms": 3}) == {"ms": 3}
    assert (
        Results(path, where | {"ppvae": "other"}, settings).get("a", lambda: {"ms": 4})["ms"] == 4
    )


def run_speed(monkeypatch, tmp_path, columns, device="cpu"):
    """speed.py on one small workload; its table's rows."""
    import speed
    import workloads

    small = workloads.Workload("small", workloads.MLP(data=100, hidden=(5,), latent=3), 50, 4)
    monkeypatch.setattr(speed, "WORKLOADS", [small])
    out = tmp_path / "speed.jsonl"
    options = ["--quick", "--threads", "1", "--device", device, "--out", str(out)]
    with pyro.validation_enabled(False):  # as in a fresh process; the columns share this one
        assert speed.main([*options, "--columns", ",".join(columns)]) == 0
    result = json.loads(out.read_text())["result"]
    assert speed.verdict(small, result)
    return result["columns"]


def test_speed_runs_and_says_what_was_not_run(monkeypatch, tmp_path, capsys):
    rows = run_speed(monkeypatch, tmp_path, ["ppvae-eager", "hand", "hand-graph", "pyro"])
    assert rows["hand-graph"] == {"missing": "not run: needs --device cuda"}
    for name in ("ppvae-eager", "hand", "pyro"):
        low, high = rows[name]["ms"][1:]
        assert 0 < low <= rows[name]["ms"][0] <= high
    assert "| hand-graph | not run: needs --device cuda |" in capsys.readouterr().out


def test_nothing_is_written_on_a_busy_machine(monkeypatch, tmp_path):
    import timing

    monkeypatch.setattr(timing, "busy_cores", lambda: 0.6)
    options = ["--rounds", "10", "--threads", str(torch.get_num_threads())]
    monkeypatch.setattr(torch, "set_flush_denormal", lambda on: True)  # for this process
    with pytest.raises(SystemExit, match="cores are busy with something else: nothing is"):
        timing.start(timing.parser("").parse_args([*options, "--out", str(tmp_path / "x.jsonl")]))
    timing.start(timing.parser("").parse_args(options))  # a look is allowed, and says so


def test_the_readme_quotes_what_was_measured():
    import claim

    measured = claim.runs()
    lines = [line for run in measured.values() for line in run]
    assert measured and not any(line["settings"]["quick"] for line in lines)
    assert {len(run) for run in measured.values()} == {6}  # every workload in every run
    root = Path(__file__).parents[1]
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert f"one graph: {claim.claim(lines)} of the time" in " ".join(readme.split())
    page = (root / "docs" / "measured" / "speed.md").read_text(encoding="utf-8")
    assert page == claim.page(measured), "run python benchmarks/claim.py"


def test_a_claim_is_the_range_over_all_runs():
    import claim

    def line(hand, numpyro, ours):
        rows = {
            name: {"ms": [ms], "ppvae-compiled": [ours / ms, 0.0, 9.0]}
            for name, ms in (("hand", hand), ("numpyro", numpyro), ("ppvae-compiled", ours))
        }
        return {"key": "step/x/", "result": {"columns": rows | {"pythae": {"missing": "no"}}}}

    first, second = line(4.0, 2.0, 1.5), line(2.0, 3.0, 1.0)
    assert claim.fastest_peer(first) == ("numpyro", [0.75, 0.0, 9.0])
    assert claim.claim([first, second]) == "0.50 to 0.75"


def test_speed_refuses_columns_that_compute_something_else(monkeypatch, tmp_path):
    import columns

    right = columns.COLUMNS["hand"]

    def wrong(workload, device):
        column = right(workload, device)
        column.loss_scale = 2.0
        return column

    monkeypatch.setitem(columns.COLUMNS, "hand", wrong)
    with pytest.raises(SystemExit, match="do not compute the same loss"):
        run_speed(monkeypatch, tmp_path, ["ppvae-eager", "hand", "pyro"])


@pytest.mark.slow
def test_speed_runs_every_column(monkeypatch, tmp_path):
    pytest.importorskip("jax", reason="a peer of the extra bench")
    pytest.importorskip("pythae", reason="a peer of the extra bench")
    from columns import COLUMNS

    rows = run_speed(monkeypatch, tmp_path, list(COLUMNS))
    missing = {name for name, row in rows.items() if "missing" in row}
    assert missing == {"hand-overhead", "hand-graph"}


@pytest.mark.cuda
@pytest.mark.slow
def test_speed_runs_on_cuda(monkeypatch, tmp_path):
    names = ["ppvae-eager", "ppvae-compiled", "hand", "hand-compile", "hand-overhead", "hand-graph"]
    rows = run_speed(monkeypatch, tmp_path, names, device="cuda")
    assert not [row for row in rows.values() if "missing" in row]


def test_the_limit_of_evidence_has_the_products_of_the_handwritten_evaluator():
    import evidence
    import workloads
    from torch.utils.flop_counter import FlopCounterMode

    family = workloads.MLP(data=6, hidden=(5,), latent=3)
    workload = workloads.Workload("small", family, 7, 3000)  # three images a piece
    x = workload.batches(1)[0]
    with FlopCounterMode(display=False) as evaluation:
        found = evidence.handwritten(workload, CPU)(x)
    calls = evidence.forward_products(workload, len(x), CPU, "aten")
    with FlopCounterMode(display=False) as limit:
        for call in calls:
            call()
    assert limit.get_total_flops() == evaluation.get_total_flops() > 0
    expected = evidence.ours(workload, CPU)(x)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.3)  # se below 0.05


@pytest.mark.slow
def test_gradients_beside_the_exact_one(monkeypatch, capsys):
    import sys

    import snr

    monkeypatch.setattr(sys, "argv", ["snr.py", "--exact", "--quick"])
    with pytest.raises(SystemExit) as stop:
        snr.main()
    assert stop.value.code == 0  # unbiased
    shown = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines()]
    variance = {(int(r[0]), r[1]): float(r[3].split()[0]) for r in rows if r and r[0].isdigit()}
    assert len(variance) == 3 + 2 * 4
    for L in (10, 50):
        below = [variance[L, f"score, {how}"] for how in ("no baseline", "leave-one-out")]
        order = [*below, variance[L, "pathwise"], variance[L, "stl"]]
        assert order == sorted(order, reverse=True)


def test_a_biased_gradient_is_seen(monkeypatch, capsys):
    import snr

    right = snr.exact_gradient
    monkeypatch.setattr(snr, "exact_gradient", lambda *pair: 1.5 * right(*pair))
    assert not snr.print_against_exact(40, seed=0)


def test_fit_is_timed_against_bare_steps_without_them():
    import speed_fit

    for binarised in (False, True):
        result = speed_fit.measure(False, binarised, 3 * speed_fit.BATCH, 3, CPU)
        assert result["steps"] == 3
        assert all(0.5 < ratio < 20 for ratio in result["slices"] + result["shuffled"])


def test_memory_of_a_step_is_what_it_allocates():
    from memory import rise

    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux")
    assert 50 < rise(lambda: torch.ones(20_000_000).sum()) < 120  # 80 MB


def test_factor_vae_by_hand_is_ours_draw_for_draw():
    """The pair's loss and the critic's, at the same noise and offsets."""
    import speed_factor
    import workloads

    import ppvae
    from ppvae import elbo

    small = workloads.Workload("small", workloads.MLP(data=6, hidden=(5,), latent=3), 7)
    x, networks = small.batches(1)[0], small.networks()
    net = speed_factor.critic(small, (4,))
    ours = elbo.FactorELBO(gamma=speed_factor.GAMMA, ratio=net)(*small.pair(networks))
    losses = []
    for loss in (lambda: ours(x), lambda: speed_factor.handwritten_factor_loss(networks, net, x)):
        torch.manual_seed(3)
        losses.append(loss().item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    z = torch.randn(7, 3)
    torch.manual_seed(4)
    by_hand = speed_factor.critic_loss(net, z)
    torch.manual_seed(4)
    own = ppvae.Ratio(net, None).loss(z, elbo.factor.shifted(z))
    assert own.item() == pytest.approx(by_hand.item(), rel=1e-6)


def test_speed_factor_runs(monkeypatch, tmp_path, capsys):
    import speed_factor
    import workloads

    small = workloads.Workload("small", workloads.MLP(data=100, hidden=(5,), latent=3), 64)
    monkeypatch.setattr(speed_factor, "WORKLOAD", small)
    monkeypatch.setattr(speed_factor, "CRITICS", ((4,),))
    eager = {name: speed_factor.COLUMNS[name] for name in ("ppvae-eager", "hand")}
    eager |= {"ppvae-compiled": eager["ppvae-eager"]}  # no compiler
    eager |= {"plain-compiled": eager["hand"]}
    monkeypatch.setattr(speed_factor, "COLUMNS", eager)
    speed_factor.main(["--quick", "--threads", "1", "--out", str(tmp_path / "speed.jsonl")])
    table = capsys.readouterr().out
    assert "## critic 3-4-1" in table and "target <= 2.2" in table


def test_speed_nvae_runs(monkeypatch, tmp_path, capsys):
    import speed_nvae

    monkeypatch.setattr(speed_nvae, "RECIPE", speed_nvae.RECIPE | {"channels": 2, "groups": [1]})
    speed_nvae.main(["--quick", "--threads", "1", "--out", str(tmp_path / "speed.jsonl")])
    assert "compiled / eager" in capsys.readouterr().out


def test_deconvolution_is_stock_pyros_draw_for_draw(monkeypatch, tmp_path, capsys):
    import speed_deconvolution as script

    eager = {name: make for name, make in script.COLUMNS.items() if name != "ppvae-compiled"}
    both = {"ppvae-compiled": eager["ppvae-eager"], **eager}  # no compiler
    monkeypatch.setattr(script, "COLUMNS", both)
    sizes = ["--spots", "30", "--genes", "20", "--types", "3", "--width", "8", "--batch", "10"]
    script.main(["--quick", "--threads", "1", *sizes, "--out", str(tmp_path / "speed.jsonl")])
    assert "target >= 3" in capsys.readouterr().out

    def twice(workload):
        step = script.ours(workload, compile=False)
        return lambda x: 1.001 * step(x)

    monkeypatch.setattr(script, "COLUMNS", {**both, "ppvae-eager": twice})
    with pytest.raises(SystemExit, match="not compute the same"):
        script.main(["--quick", "--threads", "1", *sizes])


# ------------------------------------------------------------------------------ gpu.py


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_gpu_without_cuda_has_a_status_of_its_own(tmp_path, capsys):
    import gpu

    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert "no CUDA" in capsys.readouterr().out and not (tmp_path / "out").exists()


@pytest.fixture
def stand_ins(monkeypatch):
    """Stages of gpu.py that are a line of Python each."""
    import gpu

    lines = dict.fromkeys(gpu.SHARES, "print('fine')")

    def command(stage, out, rehearse):
        ends = {"speed": "speed.md"}.get(stage, f"{stage}.log")
        return ["-c", lines[stage]], out / ends

    monkeypatch.setattr(gpu, "command", command)
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    where = {"torch": "x"}
    monkeypatch.setattr(gpu, "environment", lambda device: where)
    monkeypatch.setattr(gpu.torch.cuda, "get_device_capability", lambda: (9, 0))
    return lines


@pytest.mark.parametrize(
    ("stage", "line", "expected"),
    [
        ("smoke", "print('fine')", 0),
        ("smoke", "raise SystemExit('no step was captured')", 1),
        ("tests", "raise SystemExit(1)", 1),
        ("tests", "raise SystemExit(5)", 1),
        ("speed", "print('compiled / hand-written CUDA graph: 1.3, target <= 1.1: NOT met')", 3),
        ("burda", "import time; time.sleep(60)", 4),
    ],
)
def test_the_status_of_gpu(stand_ins, tmp_path, stage, line, expected):
    import gpu

    stand_ins[stage] = line
    assert gpu.main(["--out", str(tmp_path), "--seconds", "12"]) == expected
    found = json.loads((tmp_path / "env.json").read_text())
    assert found["status"] == expected and list(found["stages"]) == list(gpu.SHARES)
    assert found["where"]["capability"] == [9, 0]
    assert (found["stages"][stage]["status"] is None) == (expected == 4)
    if stage == "smoke" and expected == 1:
        assert "no step was captured" in (tmp_path / "smoke.log").read_text()


def test_a_failure_comes_before_a_deadline_and_a_deadline_before_a_target(tmp_path):
    import gpu

    (tmp_path / "speed.md").write_text("NOT met")
    stages = {name: {"status": 0} for name in gpu.SHARES}
    assert gpu.verdict(stages, tmp_path, False) == gpu.MISSED
    assert gpu.verdict(stages, tmp_path, True) == gpu.WELL
    stages["profile"] = {"status": None}
    assert gpu.verdict(stages, tmp_path, False) == gpu.LATE
    stages["smoke"] = {"status": 1}
    assert gpu.verdict(stages, tmp_path, False) == gpu.FAILED


def test_the_stages_of_gpu_on_a_cpu(traced, tmp_path, capsys):
    """All but speed.py, whose own tests are above, and pytest."""
    import gpu

    for stage in ("smoke", "burda", "profile"):
        assert gpu.main(["--out", str(tmp_path), "--rehearse", "--stage", stage]) == 0
    printed = capsys.readouterr().out
    assert "largest relative difference of a loss" in printed and "errors apart" in printed
    found = json.loads((tmp_path / "burda.json").read_text())
    assert len(found["us_per_step"]) == 2 and found["steps_of_the_paper"] == 9_774_400
    hours = found["us_per_step"][0] * 9_774_400 / 3.6e9
    assert found["hours_for_them"] == pytest.approx(hours)
    assert "aten::" in (tmp_path / "profile.txt").read_text()


@pytest.mark.parametrize("wrong", ["losses", "draws"])
def test_the_smoke_of_gpu_notices(traced, tmp_path, monkeypatch, wrong):
    import gpu

    usual = ppvae.SVI.update

    def update(self, *args):
        if self.compile and wrong == "draws":
            torch.manual_seed(0)
        loss = usual(self, *args)
        return loss * 1.01 if self.compile and wrong == "losses" else loss

    monkeypatch.setattr(ppvae.SVI, "update", update)
    with pytest.raises(SystemExit, match="other losses" if wrong == "losses" else "draw anew"):
        gpu.main(["--out", str(tmp_path), "--rehearse", "--stage", "smoke"])


@pytest.mark.slow
def test_gpu_rehearses_all_of_itself(tmp_path):
    import gpu

    assert gpu.main(["--out", str(tmp_path), "--rehearse", "--seconds", "900"]) == 0
    names = {"env.json", "tests.xml", "tests.log", "speed.jsonl", "speed.md", "burda.json"}
    assert names | {"profile.txt"} <= {path.name for path in tmp_path.iterdir()}
