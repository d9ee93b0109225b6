"""Several processes train as one: the gradient of the joint batch, on identical ranks."""

import functools
import math
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from lightning_fabric import Fabric
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import ppvae
from ppvae import (
    CheckpointError,
    Checkpoints,
    conditionals,
    data,
    diagnostics,
    elbo,
    guides,
    models,
    nets,
)
from ppvae.processes import Processes

pytestmark = pytest.mark.forks


SLOWLY = pytest.mark.slow
SGD = functools.partial(torch.optim.SGD, lr=1e-3)
ADAM = functools.partial(torch.optim.Adam, lr=1e-2)
X = torch.bernoulli(torch.full((50, 4), 0.5), generator=torch.Generator().manual_seed(1))


def launch(function, *args, processes=2, start="fork"):
    """Run a function in processes forked from this one, which has imported all they need."""
    fabric = Fabric(
        accelerator="cpu", devices=processes, strategy=f"ddp_{start}" if processes > 1 else "auto"
    )
    return pickle.loads(fabric.launch(function, *args) or pickle.dumps(None))


def everyone(fabric, value):
    """The value of each rank; as bytes, since a tensor dies with the process that shares it."""
    return pickle.dumps(Processes(fabric).gather(value))


def vae(loss=None, optim=ADAM, **options):
    torch.manual_seed(0)
    model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4, **options)), latent_dim=2)
    return ppvae.SVI(model, guides.Normal(nets.mlp(4, 8, 4, **options)), optim, loss)


class Quiet(ppvae.Program):
    """A guide that always draws its mean, so that processes and one process draw alike."""

    def __init__(self):
        super().__init__()
        self.net = nets.mlp(4, 8, 2)

    def forward(self, x):
        with ppvae.program.data_plate(x):
            return pyro.sample("z", dist.Delta(self.net(x)).to_event(1))


class Contrast:
    """Row by row, so that processes and one process compare alike."""

    def __call__(self, draws):
        return draws.guide("z"), draws.args[0][:, :2]


def quiet_beside():
    """The pair of ``quiet`` with a ratio in its guide, three steps of it to each of the pair."""
    svi = quiet()
    svi.guide.ratio = ppvae.Ratio(nets.mlp(2, 4, 1), Contrast())
    return ppvae.SVI(svi.model, svi.guide, SGD, elbo.ELBO(), beside=ppvae.Beside(SGD, 3, 1))


def quiet():
    torch.manual_seed(0)
    model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
    return ppvae.SVI(model, Quiet(), SGD, elbo.ELBO(), clip_norm=20.0)


def fit(svi, train=X, **options):
    options = {"epochs": 2, "batch_size": 16, "progress": False, **options}
    return ppvae.fit(svi, train, **options)


def numbers(history):
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in history.rows]


def copies(svi):
    state = svi.objective.state_dict()
    return {k: v.clone() for k, v in state.items() if torch.is_tensor(v)}


def same(states):
    first, *others = states
    return all(torch.equal(v, other[k]) for other in others for k, v in first.items())


# -- one training in two processes -------------------------------------------------------------


def many_steps(fabric, epochs):
    svi = vae(elbo.IWELBO(num_particles=3), batch_norm=True)
    if fabric.global_rank == 1:
        with torch.no_grad():
            next(svi.model.parameters()).add_(1.0)  # rank 0's are taken
    history = fit(svi, valid=X[:21], epochs=epochs, fabric=fabric)
    return everyone(fabric, (copies(svi), numbers(history), svi.num_steps))


@pytest.mark.parametrize("epochs", [10, pytest.param(50, marks=SLOWLY)])
def test_ranks_stay_identical(epochs):
    (state, rows, steps), other = launch(many_steps, epochs)
    assert steps == other[2] == 4 * epochs
    assert same([state, other[0]])
    assert rows == other[1]


def drawn(fabric):
    svi, seen = vae(), []
    svi.guide.register_forward_hook(lambda m, a, z: seen.append(z.detach()[:3]))
    alike = torch.ones(16, 4)  # q(z | x) is the same for all rows, so draws differ by noise only
    fit(svi, alike, valid=alike, fabric=fabric, epochs=1)
    # of the step, and of the validation; between them one run finds what the loss sums over
    return everyone(fabric, (seen[-3], seen[-1], torch.get_rng_state()))


def test_processes_that_were_seeded_alike_draw_apart():
    (trained, validated, state), other = launch(drawn)
    assert not torch.isclose(trained, other[0]).any()
    assert not torch.isclose(validated, other[1]).any()
    torch.manual_seed(0)
    fit(vae(), torch.ones(8, 4), epochs=1)  # rank 0 draws what one process would for its rows
    assert torch.equal(torch.get_rng_state(), state)


def deterministic(fabric, batch_size):
    svi = quiet()
    history = fit(svi, valid=X[:21], batch_size=batch_size, fabric=fabric)
    return everyone(fabric, (copies(svi), numbers(history)))


def deterministic_beside(fabric):
    svi = quiet_beside()
    history = fit(svi, batch_size=10, fabric=fabric)
    return everyone(fabric, (copies(svi), numbers(history)))


def test_processes_train_what_stands_beside_a_pair_as_one():
    one = quiet_beside()
    before = copies(one)
    expected = numbers(fit(one, batch_size=10))
    results = launch(deterministic_beside)
    assert same([state for state, _ in results])
    for name, value in copies(one).items():
        torch.testing.assert_close(results[0][0][name], value, rtol=1e-5, atol=1e-6)
        assert not torch.equal(before[name], value), name
    for row, other in zip(expected, results[0][1], strict=True):
        assert other == pytest.approx(row, rel=1e-5)


def test_no_two_of_many_processes_draw_alike():
    drawn, seeds = [], []
    for rank in range(4):
        processes = Processes()
        processes.rank = rank
        torch.manual_seed(5)
        processes.own_draws()
        drawn.append(torch.rand(()).item())
        seeds.append(processes.own_seed(5))
    torch.manual_seed(5)
    assert len(set(drawn)) == len(set(seeds)) == 4
    assert (drawn[0], seeds[0]) == (torch.rand(()).item(), 5)


@pytest.mark.parametrize(("processes", "batch_size"), [(2, 7), pytest.param(3, 16, marks=SLOWLY)])
def test_processes_compute_the_gradient_of_the_joint_batch(processes, batch_size):
    one = quiet()
    expected = numbers(fit(one, valid=X[:21], batch_size=batch_size))
    results = launch(deterministic, batch_size, processes=processes)
    assert same([state for state, _ in results])
    for name, value in copies(one).items():
        torch.testing.assert_close(results[0][0][name], value, rtol=1e-5, atol=1e-6)
    for row, other in zip(expected, results[-1][1], strict=True):
        assert other == pytest.approx(row, rel=1e-5)


class Spy(ppvae.SVI):
    def __init__(self, svi):
        super().__init__(svi.model, svi.guide, svi.optim, svi.elbo)
        self.rows = []

    def update(self, *args):
        self.rows.append(args[0][:, 0].tolist())
        return super().update(*args)


def see_rows(fabric, rows, batch_size, split):
    torch.manual_seed(0)
    x = torch.arange(float(rows))[:, None].repeat(1, 4)
    model = models.VAE(conditionals.Normal(nets.mlp(2, 8, 4), scale=100.0), latent_dim=2)
    spy = Spy(ppvae.SVI(model, guides.Normal(nets.mlp(4, 8, 4)), ADAM))
    train = data.Split(x, rows=torch.arange(rows)) if split is True else x
    if split == "stored":
        train = data.Stored(x, window=6)
    history = fit(spy, train, batch_size=batch_size, fabric=fabric, valid=x)
    return everyone(fabric, (spy.rows, numbers(history)))


@pytest.mark.parametrize(
    ("rows", "batch_size", "processes", "split"),
    [
        (9, 4, 2, True),
        (29, 4, 2, "stored"),
        pytest.param(29, 4, 3, "stored", marks=SLOWLY),
        pytest.param(5, 2, 3, False, marks=SLOWLY),
        pytest.param(1, 1, 2, False, marks=SLOWLY),
    ],
)
def test_every_row_once_per_epoch(rows, batch_size, processes, split):
    results = launch(see_rows, rows, batch_size, split, processes=processes)
    steps = -(-rows // batch_size)
    assert {len(seen) for seen, _ in results} == {2 * steps}
    for epoch in (0, 1):
        own = []
        for rank, (seen, _) in enumerate(results):
            for step in range(steps):
                size = min(batch_size, rows - step * batch_size)
                dealt = min(processes, max(1, size // 2))
                share = size // dealt + (rank < size % dealt) if rank < dealt else 0
                got = seen[epoch * steps + step]
                own += got[:share]
                assert share == 0 or len(got) == share
        assert sorted(own) == list(range(rows))
    assert results[0][1] == results[-1][1]


def averaged(fabric):
    svi = vae(elbo.ELBO(beta=elbo.Constraint(max_rate=0.1)), batch_norm=True)
    fit(svi, fabric=fabric, epochs=1)
    return everyone(fabric, copies(svi))


def test_buffers_are_averaged_at_the_end_of_an_epoch():
    first, second = launch(averaged)
    assert same([first, second])
    assert {"state.log_multiplier"} <= set(first)
    assert {int(v) for k, v in first.items() if k.endswith("num_batches_tracked")} == {4}
    assert any("running_mean" in name and value.abs().max() > 0 for name, value in first.items())


def known_buffers(fabric):
    module = torch.nn.Module()
    processes = Processes(fabric)
    module.register_buffer("real", torch.tensor([1.0, 3.0 * processes.rank]))
    module.register_buffer("whole", torch.tensor([7 + processes.rank]))
    processes.average_buffers(module)
    return everyone(fabric, dict(module.named_buffers()))


def test_buffers_are_the_mean_and_whole_numbers_the_first():
    expected = {"real": torch.tensor([1.0, 1.5]), "whole": torch.tensor([7])}
    assert same([*launch(known_buffers), expected])


# -- data loaders ------------------------------------------------------------------------------


def with_loader(fabric, sampled):
    rank, size = fabric.global_rank, fabric.world_size
    sampler = DistributedSampler(X, size, rank, seed=3) if sampled else None
    train = DataLoader(TensorDataset(X), batch_size=5, sampler=sampler)
    spy = Spy(vae())
    history = fit(spy, train, fabric=fabric, valid=DataLoader(X, 10))
    return everyone(fabric, (copies(spy), numbers(history), spy.rows))


def test_a_loader_with_a_distributed_sampler():
    (state, rows, seen), (other, other_rows, other_seen) = launch(with_loader, True)
    assert same([state, other])
    assert rows == other_rows
    assert len(seen) == len(other_seen) == 10
    assert seen != other_seen
    assert seen[:5] != seen[5:]  # it is told the epoch


def test_a_loader_without_one_is_refused():
    with pytest.raises(Exception, match="2 processes would each see every row"):
        launch(with_loader, False)


# -- checkpoints -------------------------------------------------------------------------------


class Crash(Exception):
    pass


class CrashAt(ppvae.Callback):
    def __init__(self, step=None):
        self.step = step

    def on_step_end(self, svi, loss):
        if svi.num_steps == self.step:
            raise Crash


def crash_and_resume(fabric, folder):
    def run(name, crash):
        svi = vae(elbo.ELBO(beta=elbo.Constraint(max_rate=0.1)), batch_norm=True, dropout=0.2)
        torch.manual_seed(7)
        files = Checkpoints(folder / name, every_steps=3)
        options = {"valid": X[:21], "epochs": 3, "patience": 3, "resume": True}
        return svi, fit(svi, fabric=fabric, checkpoint=files, callbacks=[crash], **options)

    expected = run("whole", CrashAt())
    for step in (5, 8, 10):
        try:
            run("crashed", CrashAt(step))
        except Crash:
            continue
        raise AssertionError("it was to crash")
    found = run("crashed", CrashAt())
    result = [
        (copies(svi), numbers(history), torch.get_rng_state()) for svi, history in (expected, found)
    ]
    return everyone(fabric, result)


def test_resumed_runs_of_two_processes_are_exact(tmp_path):
    for expected, found in launch(crash_and_resume, tmp_path):
        assert same([expected[0], found[0]])
        assert expected[1] == found[1]
        assert torch.equal(expected[2], found[2])
    svi = vae(elbo.ELBO(beta=elbo.Constraint(max_rate=0.1)), batch_norm=True, dropout=0.2)
    options = {"valid": X[:21], "callbacks": CrashAt(), "resume": True}
    with pytest.raises(CheckpointError, match="processes: 2 then, 1 now"):
        fit(svi, checkpoint=tmp_path / "whole", **options)


def interrupted(fabric, folder):
    class Signal(ppvae.Callback):
        def on_step_end(self, svi, loss):
            if svi.num_steps == 5 and fabric.global_rank == 1:
                signal.raise_signal(signal.SIGINT)

    svi = vae()
    files = Checkpoints(folder, every_steps=3)
    history = fit(svi, fabric=fabric, checkpoint=files, callbacks=Signal(), epochs=3)
    return everyone(fabric, (history.interrupted, svi.num_steps))


def test_an_interrupt_of_one_process_ends_all_at_the_next_checkpoint(tmp_path):
    assert launch(interrupted, tmp_path) == [(True, 6), (True, 6)]
    assert Checkpoints(tmp_path).paths()[-1].name == "step-00000006.pt"


def spoilt(fabric, skip):
    svi = vae()
    svi.skip_nonfinite = skip

    def spoil(module, args, output):
        return output * (float("nan") if svi.num_steps == 5 and fabric.global_rank == 1 else 1.0)

    svi.model.likelihood.net.register_forward_hook(spoil)
    try:
        history = fit(svi, fabric=fabric)
    except FloatingPointError as error:
        return everyone(fabric, (copies(svi), svi.num_steps, str(error)))
    return everyone(fabric, (copies(svi), svi.num_skipped, numbers(history)))


@pytest.mark.parametrize("skip", [True, False])
def test_a_gradient_that_is_not_finite_in_one_process_is_withheld_in_all(skip):
    (state, count, seen), (other, other_count, other_seen) = launch(spoilt, skip)
    assert same([state, other])
    assert count == other_count == (1 if skip else 5)
    assert "step 6" in seen and "step 6" in other_seen if not skip else seen == other_seen


@pytest.mark.slow
def test_compiled_steps_are_summed_too():
    one = quiet()
    fit(one)
    first, second = launch(compiled, start="spawn")  # a compiler's threads do not survive a fork
    assert same([first, second])
    for name, value in copies(one).items():
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-6)


def compiled(fabric):
    pair = quiet()
    options = {"clip_norm": pair.clip_norm, "compile": True}
    svi = ppvae.SVI(pair.model, pair.guide, SGD, elbo.ELBO(), **options)
    fit(svi, fabric=fabric)
    return everyone(fabric, copies(svi))


# -- refusals ----------------------------------------------------------------------------------


def without_fabric(fabric):
    fit(vae())


def test_processes_without_a_fabric_are_refused():
    with pytest.raises(Exception, match=r"torch\.distributed runs 2 processes, and fit was"):
        launch(without_fabric)


def test_a_fabric_that_was_not_launched_is_refused():
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    with pytest.raises(ValueError, match=r"call fabric\.launch\(\) first"):
        fit(vae(), fabric=fabric)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_other_precisions_are_refused(precision):
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    with pytest.raises(ValueError, match='"32-true" and "bf16-mixed", got'):
        fit(vae(), fabric=fabric)


def test_the_fabric_says_where():
    fabric = Fabric(accelerator="cpu", devices=1)
    with pytest.raises(ValueError, match="leave out device='cpu'"):
        fit(vae(), fabric=fabric, device="cpu")


# -- one process -------------------------------------------------------------------------------


def test_a_fabric_of_one_process_changes_nothing():
    one, other = vae(), vae()
    torch.manual_seed(1)
    expected = numbers(fit(one, valid=X))
    torch.manual_seed(1)
    fabric = Fabric(accelerator="cpu", devices=1)
    assert numbers(fit(other, valid=X, fabric=fabric)) == expected
    assert same([copies(one), copies(other)])


@pytest.mark.parametrize("accelerator", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("loss", [elbo.ELBO(), elbo.IWELBO(num_particles=5, gradient="dreg")])
def test_bf16_mixed_is_close_and_its_loss_is_float32(loss, accelerator):
    x = torch.bernoulli(torch.full((64, 300), 0.5))
    losses, dtypes = {}, {}
    for precision in ("32-true", "bf16-mixed"):
        torch.manual_seed(0)
        model = models.VAE(conditionals.Bernoulli(nets.mlp(8, 64, 300)), latent_dim=8)
        svi = ppvae.SVI(model, guides.Normal(nets.mlp(300, 64, 16)), ADAM, loss)
        inside = []
        svi.model.likelihood.net.register_forward_hook(
            lambda m, a, y, to=inside: to.append(y.dtype)
        )
        seen = []

        class Keep(ppvae.Callback):
            def on_step_end(self, svi, loss, to=seen):
                to.append(loss)

        fabric = Fabric(accelerator=accelerator, devices=1, precision=precision)
        fit(svi, x, batch_size=64, epochs=6, fabric=fabric, callbacks=[Keep()])
        losses[precision], dtypes[precision] = torch.stack(seen) / 64, inside[-1]
        assert all(p.dtype == torch.float32 for p in svi.objective.parameters())
    assert dtypes == {"32-true": torch.float32, "bf16-mixed": torch.bfloat16}
    assert losses["bf16-mixed"].dtype == torch.float32
    # about 208 nats: eight bits of mantissa in the sum would be off by up to one
    assert (losses["bf16-mixed"] - losses["32-true"]).abs().max() < 0.3
    assert not torch.equal(losses["bf16-mixed"], losses["32-true"])


# -- torchrun ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_example_under_torchrun(tmp_path):
    script = Path(__file__).parent.parent / "examples" / "distributed.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [script, "--epochs", "2", "--out", tmp_path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    outputs = []
    for _ in range(2):  # the second resumes, and has nothing left to do
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=300, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1]
    assert outputs[0].count("ELBO [nats per datapoint]") == 1  # of rank 0 only
    assert Checkpoints(tmp_path).paths()
    assert len(list((tmp_path / "log").rglob("metrics.csv"))) >= 1


@pytest.mark.parametrize(
    ("rows", "sizes"), [(7, [3, 2, 2]), (5, [3, 2, 0]), (3, [3, 0, 0]), (1, [1, 0, 0])]
)
def test_shares_cover_the_batch_in_twos_at_least(rows, sizes):
    shares = []
    for rank in range(3):
        processes = Processes()
        processes.size, processes.rank = 3, rank
        shares.append(processes.share(torch.arange(rows)))
    assert [len(share) for share in shares] == sizes
    assert torch.equal(torch.cat(shares), torch.arange(rows))


# -- evaluation in several processes -----------------------------------------------------------


def parts(rows, processes):
    return [slice(r * rows // processes, (r + 1) * rows // processes) for r in range(processes)]


COLUMNS = ("log_evidence", "log_evidence_se", "ess", "khat", "elbo", "gap_se")
SEEDS = (5, *(Processes.own_seed(SimpleNamespace(rank=rank), 5) for rank in (1, 2)))


def weighed(fabric, rows, max_rows):
    svi = vae()
    found = diagnostics.log_evidence(
        svi.model, svi.guide, X[:rows], num_particles=30, max_rows=max_rows, seed=5, fabric=fabric
    )
    return everyone(fabric, [getattr(found, name) for name in COLUMNS])


@pytest.mark.parametrize(
    ("rows", "processes", "max_rows"), [(50, 2, 150), (7, 3, 2500), (2, 3, 10)]
)
def test_evidence_of_several_processes_is_that_of_their_parts_in_order(rows, processes, max_rows):
    """To the bit; with two rows one of three processes has none."""
    each = launch(weighed, rows, max_rows, processes=processes)
    svi = vae()
    alone = [
        diagnostics.log_evidence(
            svi.model, svi.guide, X[part], num_particles=30, max_rows=max_rows, seed=seed
        )
        for part, seed in zip(parts(rows, processes), SEEDS, strict=False)
        if part.start < part.stop
    ]
    for number, name in enumerate(COLUMNS):
        expected = torch.cat([getattr(evidence, name) for evidence in alone])
        for found in each:
            assert torch.equal(found[number], expected), name


def unseeded(fabric):
    torch.manual_seed(0)
    svi = vae()
    torch.manual_seed(0)
    x = X[:1].repeat(2, 1)  # two equal rows
    found = diagnostics.log_evidence(svi.model, svi.guide, x, num_particles=30, fabric=fabric)
    return everyone(fabric, found.log_evidence)


def test_processes_without_a_seed_draw_apart():
    first, second = launch(unseeded)
    assert torch.equal(first, second)
    assert first[0] != first[1]


def diagnosed(fabric):
    svi = vae()
    report = ppvae.diagnose(svi.model, svi.guide, X, num_particles=30, seed=5, fabric=fabric)
    known = [report.kl["z"], report.posterior_mean["z"], report.kl_per_dimension["z"]]
    numbers = [report.mutual_information, report.marginal_kl, report.divergence.mean]
    activity = [report.active_units, report.activity["z"], report.absent]
    return everyone(fabric, (known, report.reconstruction, numbers, activity))


def test_a_report_of_several_processes():
    """Closed forms are those of one process; what is drawn is that of the parts."""
    each = launch(diagnosed)
    svi = vae()
    alone = ppvae.diagnose(svi.model, svi.guide, X, num_particles=30, seed=5)
    drawn = [
        ppvae.diagnose(
            *(svi.model, svi.guide, X[part]),
            num_particles=30,
            num_aggregate=0,
            num_simulations=0,
            seed=seed,
        ).reconstruction
        for part, seed in zip(parts(50, 2), SEEDS, strict=False)
    ]
    for known, reconstruction, numbers, (units, activity, absent) in each:
        expected = alone.kl["z"], alone.posterior_mean["z"], alone.kl_per_dimension["z"]
        for one, other in zip(known, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(activity, alone.activity["z"], rtol=1e-6, atol=1e-7)
        assert (units, absent) == (alone.active_units, alone.absent)
        assert numbers == each[0][2]
        assert torch.equal(reconstruction, torch.cat(drawn))
    assert math.isclose(each[0][2][0], alone.mutual_information, rel_tol=1e-6)


def evaluators_that_fail(fabric):
    svi, rank = vae(), fabric.global_rank

    def said(function):
        try:
            function()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "no error"

    def breaks(x):
        if rank == 1 and len(x) == 25:  # its part
            raise ZeroDivisionError("of rank 1")
        return svi.guide(x)

    weigh = functools.partial(diagnostics.log_evidence, svi.model, fabric=fabric)
    options = {"num_particles": 30, "num_simulations": 0, "seed": 0, "fabric": fabric}

    def diagnose(**own):
        return ppvae.diagnose(svi.model, svi.guide, X, **(options | own))

    found = {
        "K": said(lambda: weigh(svi.guide, X, num_particles=30 + rank)),
        "rows": said(lambda: weigh(svi.guide, X[: 50 - rank], num_particles=30)),
        "other rows": said(lambda: weigh(svi.guide, X.roll(rank, 0), num_particles=30)),
        "one K": said(lambda: weigh(svi.guide, X, num_particles=1 if rank else 30)),
        "one simulates": said(lambda: diagnose(num_simulations=200 * rank)),
        "one K is small": said(lambda: diagnose(num_particles=20 if rank else 30)),
        "broken": said(lambda: weigh(breaks, X, num_particles=30)),
        "no seed": said(lambda: ppvae.diagnose(svi.model, svi.guide, X, fabric=fabric)),
        "no Fabric": said(lambda: weigh(svi.guide, X, fabric="ddp")),
        "well": said(lambda: weigh(svi.guide, X, num_particles=30)),
    }
    return everyone(fabric, found)


def test_what_ends_one_evaluation_ends_all():
    first, second = launch(evaluators_that_fail)
    for name in ("one K", "one K is small"):  # without waiting for the time-out
        assert second[name].startswith("ValueError: num_particles"), second[name]
        assert first[name].startswith("LostProcess: rank 1 has ended the run: ValueError: num_pa")
    for found in (first, second):
        assert "checksum of up to 64 rows" in found["other rows"]
        assert "num_simulations: 0 on rank 0; 200 on rank 1" in found["one simulates"]
        assert "num_particles: 30 on rank 0; 31 on rank 1" in found["K"]
        assert "rows: 50 on rank 0; 49 on rank 1" in found["rows"]
        assert found["no seed"].startswith("ValueError: seed")
        assert found["no Fabric"].startswith("TypeError: fabric takes")
        assert found["well"] == "no error"
    assert "rank 1 has ended the run: ZeroDivisionError: of rank 1" in first["broken"]
    assert second["broken"].startswith("ZeroDivisionError")


def test_a_guide_whose_parameters_belong_to_rows_is_refused():
    model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
    auto = pyro.infer.autoguide.AutoNormal(model)
    auto(X)

    def evaluate(fabric):
        try:
            diagnostics.log_evidence(model, auto, X, num_particles=30, fabric=fabric)
        except Exception as error:
            return everyone(fabric, str(error))
        return everyone(fabric, "no error")

    assert all("belong to positions" in message for message in launch(evaluate))


# -- seeds dealt to processes ------------------------------------------------------------------


def seeded_vae():
    model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2).double()
    return ppvae.SVI(model, guides.Normal(nets.mlp(4, 8, 4)).double(), ADAM)


def trained_from(seeds, fabric=None, **options):
    options = {"epochs": 2, "batch_size": 16, "valid": X[:20].double()} | options
    return ppvae.fit_many(
        seeded_vae, X.double(), seeds=seeds, fabric=fabric, progress=False, **options
    )


def many_seeds(fabric, folder):
    runs = trained_from([4, 0, 7], fabric, checkpoint=folder)
    states = [copies(svi) for svi in runs.svis]
    x = X[:5].double()
    bounds = [elbo.ELBO(2).evaluate(*pair, x).shape for pair in runs.pairs]
    steps = [svi.step(x) for svi in runs.svis]  # each pair can be trained on, wherever it was
    return everyone(fabric, (runs.seeds, states, list(map(numbers, runs.histories)), bounds, steps))


def test_seeds_in_two_processes_are_those_of_one(tmp_path):
    each = launch(many_seeds, tmp_path)
    alone = trained_from([4, 0, 7])
    for seeds, states, rows, bounds, steps in each:
        assert seeds == [4, 0, 7] and bounds == [(5,)] * 3 and len(steps) == 3
        for state, svi in zip(states, alone.svis, strict=True):
            for name, value in copies(svi).items():
                torch.testing.assert_close(state[name], value, rtol=1e-10, atol=1e-10)
        for found, history in zip(rows, alone.histories, strict=True):
            for row, expected in zip(found, numbers(history), strict=True):
                assert row == pytest.approx(expected, rel=1e-9)
    # any number of processes goes on with the seeds' own folders
    resumed = trained_from([4, 0, 7], checkpoint=tmp_path, resume=True, epochs=3)
    longer = trained_from([4, 0, 7], epochs=3)
    for svi, other in zip(resumed.svis, longer.svis, strict=True):
        for name, value in copies(other).items():
            torch.testing.assert_close(copies(svi)[name], value, rtol=1e-10, atol=1e-10)


def breaks_on(broken, rank, optimizer):
    if rank == broken:
        raise ZeroDivisionError("no schedule")
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


def seeds_that_fail(fabric):
    rank = fabric.global_rank

    def said(**options):
        try:
            runs = trained_from(**({"seeds": [0, 1], "fabric": fabric} | options))
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return f"{sorted(runs.errors)} {len(runs.svis)}"

    found = {
        "too few": said(seeds=[3]),
        "other seeds": said(seeds=[0, 1 + rank]),
        "one has a seed twice": said(seeds=[0, 1 - rank]),
        "other epochs": said(epochs=2 + rank),
        "device": said(device="cpu"),
        "broken": said(lr_scheduler=functools.partial(breaks_on, 1, rank)),
        "well": said(),
    }
    return everyone(fabric, found)


def test_what_ends_one_process_of_seeds_ends_all():
    first, second = launch(seeds_that_fail)
    for found in (first, second):
        assert found["too few"].startswith("ValueError: seeds: 1 for 2 processes")
        assert "seeds: [0, 1] on rank 0; [0, 2] on rank 1" in found["other seeds"]
        assert "seeds must be different whole numbers" in found["one has a seed twice"]
        assert "epochs: 2 on rank 0; 3 on rank 1" in found["other epochs"]
        assert found["device"].startswith("ValueError: device='cpu'")
        assert found["well"] == "[] 2"
    assert "rank 1 has ended the run: ZeroDivisionError" in first["broken"]
    assert second["broken"].startswith("ZeroDivisionError")
