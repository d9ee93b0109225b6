"""Captured steps, by the emulation of ``cuda_emulation.py``; at the end, what needs a GPU."""

import contextlib
import copy
import functools
import math
import threading
import types
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import ppvae
from compiling import (
    ADAM,
    SGD,
    D,
    Free,
    N,
    X,
    Z,
    assert_equal_runs,
    decode,
    encode,
    normal,
    plain,
    run,
    tensors,
    vae,
)
from cuda_emulation import emulated
from ppvae import diagnostics, elbo, nets, pairs
from ppvae.compile import cuda_graph, graph
from ppvae.compile.compiled import _difference, _precision
from ppvae.diagnostics import evidence
from ppvae.train import captured
from ppvae.train.optimizer import _can_fuse
from registry import ALL_ESTIMATORS, build


@pytest.fixture
def gpu(traced):
    with emulated() as emulation:
        yield emulation


def steps(svi, number, x=X):
    return [svi.step(x) for _ in range(number)]


def ready(gpu, make=plain, optim=ADAM, **kwargs):
    """An SVI whose step on ``X`` is captured."""
    svi = ppvae.SVI(*make(), optim, compile=True, **kwargs)
    steps(svi, 3)
    assert gpu.replays == 1
    return svi


# -- a replay is the step ----------------------------------------------------------------------


def ragged():
    rows = normal(20, D)
    return [(rows[i : i + 6],) for i in range(0, 20, 6)] * 5


def normed():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(D, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 2 * Z))
    return Free(decode, net=nn.Linear(Z, D)), Free(encode, net=net)


@pytest.mark.parametrize(
    ("make", "loss", "clip_norm"),
    [
        (plain, elbo.ELBO(), None),
        (plain, elbo.ELBO(beta=elbo.LinearWarmup(15)), 1.0),
        (vae, elbo.IWELBO(4, gradient="dreg"), 0.5),
        (normed, elbo.ELBO(2), None),
        (plain, ALL_ESTIMATORS["ReweightedWakeSleep-reweighted"], 1.0),
        (plain, elbo.ELBO(beta=elbo.Capacity(elbo.LinearWarmup(8, 0.0, 6.0), gamma=3.0)), None),
    ],
    ids=["plain", "warm-up", "dreg", "batch-norm", "rws", "capacity"],
)
def test_replays_equal_eager_steps(gpu, make, loss, clip_norm):
    """Twenty steps on batches of two sizes: draws, losses, parameters, buffers, gradients."""
    ends = []
    for compile in (False, True):
        svi = ppvae.SVI(*make(), ADAM, copy.deepcopy(loss), clip_norm=clip_norm, compile=compile)
        ends.append(run(svi, ragged()))
        shown = getattr(svi.objective.state, "shown", {})
        ends[-1][1].update({f"shown {k}": v.clone() for k, v in shown.items()})
    assert_equal_runs(*ends)
    assert (len(gpu.graphs), gpu.failed, gpu.replays) == (2, 0, 16)
    assert svi.num_steps == svi.objective.step == 20 and svi.num_skipped == 0


@pytest.mark.parametrize("estimator", ["ELBO-pathwise", "IWELBO-dreg"])
@pytest.mark.parametrize("pair", ["vae_bernoulli", "vae_conv", "cvae_learned_prior"])
def test_pairs_of_the_package(gpu, pair, estimator):
    args, ends = build(pair)[2], []
    for compile in (False, True):
        loss = copy.deepcopy(ALL_ESTIMATORS[estimator])
        svi = ppvae.SVI(*build(pair)[:2], ADAM, loss, clip_norm=1.0, compile=compile)
        ends.append(run(svi, [args] * 5))
    # a bias before batch norm has no gradient but rounding, which Adam blows up
    assert ends[1][0] == pytest.approx(ends[0][0], rel=1e-4)
    assert torch.equal(ends[0][3], ends[1][3])
    assert gpu.replays == 3


def test_nothing_happens_while_a_step_is_captured(gpu):
    """The second step is captured after it was taken, and leaves what an eager one does."""
    ends = []
    for compile in (False, True):
        svi = ppvae.SVI(*normed(), ADAM, elbo.ELBO(beta=elbo.LinearWarmup(9)), compile=compile)
        ends.append(run(svi, [(X,)] * 2))
    assert len(gpu.graphs) == 1 and gpu.replays == 0
    assert_equal_runs(*ends)
    eager, compiled = (end[2] for end in ends)
    for name, gradient in eager.items():
        torch.testing.assert_close(compiled[name], gradient, rtol=1e-4, atol=1e-5)


def test_gradients_and_weights_are_those_of_the_step_that_was_replayed(gpu):
    """Each captured step has memory of its own for them."""
    svi = ready(gpu)
    steps(svi, 3, X[:4])
    kept = {name: p.grad.clone() for name, p in svi.objective.named_parameters()}
    steps(svi, 1)
    for name, parameter in svi.objective.named_parameters():
        assert not torch.equal(parameter.grad, kept[name])


def test_a_loss_that_was_returned_stays(gpu):
    svi = ready(gpu)
    first = svi.update(X)
    value = first.clone()
    steps(svi, 2)
    assert first == value


def test_a_column_slice_and_an_expanded_batch(gpu):
    """Their strides are part of the key of the graph, so the copies have them."""
    wide, row = normal(N, 2 * D), normal(1, D).expand(N, D)
    for x in (wide[:, :D], wide[:, D:], row, normal(D, N).T):
        ends = []
        for compile in (False, True):
            svi = ppvae.SVI(*plain(), ADAM, compile=compile)
            ends.append(run(svi, [(x + 0 if compile is None else x,)] * 4))
        assert_equal_runs(*ends)
        assert len(svi._compiled._graphs) == 1
    assert len(gpu.graphs) == 4 and gpu.replays == 8
    copied = cuda_graph._copy(row)
    assert copied.stride() == row.stride() and torch.equal(copied, row)
    assert copied.data_ptr() != row.data_ptr()


# -- what a captured step reads ----------------------------------------------------------------


def test_a_learning_rate_is_read_at_each_step(gpu):
    svi = ready(gpu)
    svi.optimizer.param_groups[0]["lr"] = 0.0
    before = tensors(svi.objective)
    steps(svi, 3)
    assert all(torch.equal(v, before[k]) for k, v in tensors(svi.objective).items())
    assert gpu.replays == 4 and svi.optimizer.param_groups[0]["lr"] == 0.0
    svi.optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    steps(svi, 1)
    assert any(not torch.equal(v, before[k]) for k, v in tensors(svi.objective).items())
    assert svi.optimizer.param_groups[0]["capturable"] is False


def two_groups(parameters):
    first, *rest = parameters
    return torch.optim.Adam([{"params": [first], "lr": 0.1}, {"params": rest}], 0.0, fused=True)


def test_each_group_has_its_own_learning_rate(gpu):
    svi = ready(gpu, optim=two_groups)
    first, *rest = svi.objective.parameters()
    before = [p.detach().clone() for p in (first, *rest)]
    steps(svi, 2)
    assert not torch.equal(first, before[0])
    assert all(torch.equal(p, value) for p, value in zip(rest, before[1:], strict=True))
    svi.optimizer.param_groups[0]["lr"], svi.optimizer.param_groups[1]["lr"] = 0.0, 0.1
    before = [p.detach().clone() for p in (first, *rest)]
    steps(svi, 1)
    assert torch.equal(first, before[0])
    assert all(not torch.equal(p, value) for p, value in zip(rest, before[1:], strict=True))
    assert gpu.replays == 4


@pytest.mark.parametrize("made_after", [0, 1, 4])
def test_a_schedule_reaches_a_replayed_step(gpu, made_after):
    ends = []
    for compile in (False, True):
        svi = ppvae.SVI(*plain(), ADAM, compile=compile)
        svi.prepare(X)
        torch.manual_seed(3)
        steps(svi, made_after)
        scheduler = torch.optim.lr_scheduler.StepLR(svi.optimizer, 1, gamma=0.5)
        for _ in range(6):
            svi.step(X)
            scheduler.step()
        ends.append(tensors(svi.objective))
        assert isinstance(svi.optimizer.param_groups[0]["lr"], float)
    assert len(gpu.graphs) == 1
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_schedule_goes_on_after_a_state_was_loaded(gpu, as_tensor):
    """A state is loaded to the CPU, and of an older run its learning rate is a tensor there."""
    state = ready(gpu).state_dict()
    if as_tensor:
        state["optimizer"]["param_groups"][0]["lr"] = torch.tensor(1e-2)
    svi = ppvae.SVI(*plain(), ADAM, compile=True)
    svi.prepare(X)
    scheduler = torch.optim.lr_scheduler.LambdaLR(svi.optimizer, lambda step: float(step < 4))
    svi.load_state_dict(copy.deepcopy(state))
    for _ in range(4):
        svi.step(X)
        scheduler.step()
    before, replays = tensors(svi.objective), gpu.replays
    steps(svi, 2)
    assert gpu.replays == replays + 2
    assert all(torch.equal(v, before[k]) for k, v in tensors(svi.objective).items())


@pytest.mark.parametrize("what", ["parameters", "buffers", "moments", "clip_norm", "betas"])
def test_what_is_replaced_is_captured_anew(gpu, what):
    ends = []

    def between(step, svi):
        if step != 5:
            return
        if what == "parameters":
            for parameter in svi.objective.parameters():
                parameter.data = parameter.data + 0.1
        elif what == "buffers":
            for buffer in svi.objective.buffers():
                buffer.data = buffer.data + 1
        elif what == "moments":
            svi.optimizer.load_state_dict(copy.deepcopy(svi.optimizer.state_dict()))
        elif what == "clip_norm":
            svi.clip_norm = 0.01
        else:
            svi.optimizer.param_groups[0]["betas"] = (0.5, 0.6)

    for compile in (False, True):
        svi = ppvae.SVI(*normed(), ADAM, clip_norm=1.0, compile=compile)
        ends.append(run(svi, [(X,)] * 8, between=between))
    assert_equal_runs(*ends)
    assert (len(gpu.graphs), gpu.replays) == (2, 5)


def test_captures_are_limited(gpu, monkeypatch):
    monkeypatch.setattr(captured.Captures, "max_steps", 3)
    svi = ready(gpu)

    def other_betas(numbers):
        for i in numbers:
            svi.optimizer.param_groups[0]["betas"] = (0.8 - i / 100, 0.99)
            steps(svi, 2)

    other_betas(range(2))
    with pytest.warns(RuntimeWarning, match="not captured as a CUDA graph: 3 steps were") as told:
        other_betas(range(2, 6))
    assert len(told) == 1 and len(gpu.graphs) == 3
    svi.optimizer.param_groups[0]["betas"] = (0.9, 0.999)
    replays = gpu.replays
    steps(svi, 1)
    assert gpu.replays == replays + 1


@pytest.mark.parametrize("how", ["hook", "class", "not fused", "sgd"])
def test_a_step_that_does_more_than_launch_kernels_is_not_captured(gpu, how):
    class Own(torch.optim.Adam):
        steps = 0

        def step(self, closure=None):
            self.steps += 1
            return super().step(closure)

    optim = {
        "class": functools.partial(Own, fused=True),
        "not fused": functools.partial(ADAM, fused=False),
        "sgd": SGD,
    }
    svi = ppvae.SVI(*plain(), optim.get(how, ADAM), compile=True)
    svi.prepare(X)
    seen = []
    if how == "hook":
        svi.optimizer.register_step_post_hook(lambda *of: seen.append(1))
    steps(svi, 5)
    assert not gpu.graphs
    assert how != "hook" or len(seen) == 5
    assert how != "class" or svi.optimizer.steps == 5


def test_precision_of_autocast_is_one_graph_that_is_replayed(gpu):
    svi = ppvae.SVI(*plain(), ADAM, compile=True)
    svi.autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16)
    steps(svi, 6)
    assert len(svi._compiled._graphs) == 1 and gpu.replays == 4


def test_a_copy_and_a_loaded_state_capture_anew(gpu):
    svi = ready(gpu)
    state, other = copy.deepcopy(svi.state_dict()), copy.deepcopy(svi)
    torch.manual_seed(1)
    expected = steps(svi, 4)
    torch.manual_seed(1)
    assert steps(other, 4) == pytest.approx(expected, rel=1e-5)
    svi.load_state_dict(state)
    torch.manual_seed(1)
    assert steps(svi, 4) == pytest.approx(expected, rel=1e-5)


def test_compile_switched_off_reads_the_groups_again(gpu):
    svi = ready(gpu)
    svi.compile, svi.optimizer.param_groups[0]["lr"] = False, 0.0
    before = tensors(svi.objective)
    steps(svi, 2)
    assert all(torch.equal(v, before[k]) for k, v in tensors(svi.objective).items())


# -- several processes -------------------------------------------------------------------------


def test_gradients_are_summed_between_two_graphs(gpu):
    ends, sums = [], []

    def double(gradients):
        sums.append(len(gradients))
        torch._foreach_mul_(gradients, 2.0)

    for compile in (False, True):
        svi = ppvae.SVI(*normed(), ADAM, elbo.ELBO(2), clip_norm=0.5, compile=compile)
        svi.synchronize = double
        ends.append(run(svi, ragged()))
    assert_equal_runs(*ends)
    assert sums == [len(list(svi.objective.parameters())) + 1] * 40
    assert (len(gpu.graphs), gpu.replays) == (4, 32)


# -- a step that is not finite -----------------------------------------------------------------


@pytest.mark.parametrize("compile", [False, True])
def test_an_update_is_withheld_and_told_later(gpu, compile):
    svi = ppvae.SVI(*normed(), ADAM, compile=compile)
    steps(svi, 4)
    svi.check_finite()
    before, moments = tensors(svi.objective), copy.deepcopy(svi.optimizer.state_dict()["state"])
    bad = X.clone()
    bad[3, 1] = math.inf
    svi.update(bad)
    assert all(torch.equal(v, before[k]) for k, v in tensors(svi.objective).items())
    for index, state in svi.optimizer.state_dict()["state"].items():
        assert all(torch.equal(v, moments[index][k]) for k, v in state.items())
    assert svi.num_skipped == 1
    svi.update(X)
    with pytest.raises(ppvae.NonFiniteError, match="1 of the steps 5 to 6"):
        svi.check_finite()
    assert any(not torch.equal(v, before[k]) for k, v in tensors(svi.objective).items())
    assert gpu.replays == (4 if compile else 0)


@pytest.mark.parametrize("compile", [False, True])
def test_a_withheld_step_on_a_gpu_does_not_withhold_those_on_the_cpu(traced, compile):
    svi = ppvae.SVI(*plain(), ADAM, compile=compile, skip_nonfinite=True)
    with emulated():
        steps(svi, 3)
        svi.update(X * math.inf)
    assert svi.num_skipped == 1 and not hasattr(svi.optimizer, "found_inf")
    before = tensors(svi.objective)
    steps(svi, 1)
    assert all(not torch.equal(v, before[k]) for k, v in tensors(svi.objective).items())


def test_a_critic_beside_a_captured_pair(gpu):
    """Its steps are not captured; one after a withheld step of the pair is withheld, too."""
    ends = []
    for compile in (False, True):
        torch.manual_seed(0)
        loss = elbo.FactorELBO(ratio=nets.mlp(Z, 8, 1))
        svi = ppvae.SVI(*plain(), ADAM, loss, compile=compile, skip_nonfinite=True)
        ends.append(run(svi, [(X,)] * 6))
        before = tensors(svi.objective)
        svi.update(X * math.inf)
        after = tensors(svi.objective)
        assert before.keys() == after.keys() and any("ratio" in name for name in before)
        assert all(torch.equal(v, before[k]) for k, v in after.items())
        assert svi.num_skipped == 1
    assert_equal_runs(*ends)
    assert len(gpu.graphs) == 1 and gpu.replays == 5


# -- what cannot be captured -------------------------------------------------------------------


def correlated():
    def body(self, x):
        with pyro.plate("data", len(x)):
            loc, raw = self.net(x).chunk(2, -1)
            cov = torch.diag_embed(raw.exp()) + 0.1
            pyro.sample("z", dist.MultivariateNormal(loc, cov))

    torch.manual_seed(0)
    return Free(decode, net=nn.Linear(Z, D)), Free(body, net=nn.Linear(D, 2 * Z))


@pytest.mark.parametrize("compile", [True, "auto"])
def test_an_operator_that_waits_is_not_tried(gpu, compile):
    eager = run(ppvae.SVI(*correlated(), ADAM), [(X,)] * 6)
    svi = ppvae.SVI(*correlated(), ADAM, compile=compile)
    with pytest.warns(RuntimeWarning, match="not captured.*_linalg_check_errors waits") as told:
        found = run(svi, [(X,)] * 6)
    assert_equal_runs(eager, found)
    assert len(told) == 1 and not gpu.graphs and gpu.failed == 0
    assert next(iter(svi._compiled._graphs.values())) is not None


def test_a_capture_that_fails_is_not_tried_again(gpu, monkeypatch):
    monkeypatch.setattr(graph, "_WAITING", set())
    eager = run(ppvae.SVI(*correlated(), ADAM), [(X,)] * 6)
    svi = ppvae.SVI(*correlated(), ADAM, compile=True)
    with pytest.warns(RuntimeWarning, match="operation not permitted when stream") as told:
        found = run(svi, [(X,)] * 6)
    assert_equal_runs(eager, found)
    assert len(told) == 1 and gpu.failed == 1 and not hasattr(svi.optimizer, "found_inf")
    assert svi.optimizer.param_groups[0]["lr"] == 1e-2


def test_a_capture_is_on_the_parameters_device_in_a_stream_of_its_own(monkeypatch):
    """And where it fails, the stream and the state of the generator are as before."""
    log, state = [], ["first state"]

    class Generator:
        def graphsafe_get_state(self):
            return state[0]

        def clone_state(self):
            return f"copy of {state[0]}"

        def graphsafe_set_state(self, new):
            state[0] = new

    @contextlib.contextmanager
    def capture(made, stream, capture_error_mode):
        log.append((made, stream, capture_error_mode, state[0]))
        stand_in.now = stream
        yield

    @contextlib.contextmanager
    def device(which):
        log.append(which)
        yield

    stand_in = types.SimpleNamespace(
        now="default",
        CUDAGraph=lambda: types.SimpleNamespace(replay=lambda: log.append("replayed")),
        Stream=lambda device: f"own of {device}",
        graph=capture,
        device=device,
        synchronize=lambda: None,
        current_device=lambda: 1,
        current_stream=lambda: stand_in.now,
        set_stream=lambda stream: setattr(stand_in, "now", stream),
        default_generators=[None, Generator()],
    )
    monkeypatch.setattr(torch, "cuda", stand_in)
    monkeypatch.setattr(cuda_graph, "_stream", cuda_graph._stream.__wrapped__)
    made = cuda_graph.CudaGraph(torch.square, (torch.full((2,), 3.0),), "cuda:1")
    assert made(torch.ones(2)) is made.outputs and made.outputs.tolist() == [9.0, 9.0]
    assert log[0] == "cuda:1" and log[-1] == "replayed"
    modes = [entry[1:] for entry in log[1:-1]]
    assert modes == [
        ("own of 1", "thread_local", "copy of first state"),
        ("own of 1", "thread_local", "first state"),
    ]

    def fails(x):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        cuda_graph.CudaGraph(fails, (torch.ones(2),), "cuda:1")
    assert (stand_in.now, state[0]) == ("default", "first state")


def test_fused_adagrad_is_for_cpus():
    def parameter(device):
        return types.SimpleNamespace(is_floating_point=lambda: True, device=torch.device(device))

    for kind in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad):
        assert _can_fuse(kind, [parameter("cpu")])
        assert _can_fuse(kind, [parameter("cuda")]) == (kind is not torch.optim.Adagrad)
    assert not _can_fuse(torch.optim.Adagrad, [parameter("cpu"), parameter("cuda:1")])


# -- what a graph is built with ----------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """Options that the compiler is called with, whose own remark is an error unless ignored."""
    import torch._inductor.compile_fx
    from torch._inductor import config

    found = []

    def interpret(made, inputs):
        found.append((config.shape_padding, getattr(config, "deterministic", True)))
        remark = "TensorFloat32 tensor cores for float32 matrix multiplication available"
        warnings.warn(remark, UserWarning, stacklevel=1)
        return made

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", interpret)
    return found


def test_a_remark_on_tf32_is_no_reason_not_to_compile(asked):
    svi = ppvae.SVI(*plain(), ADAM, compile=True)
    svi.step(X)
    assert svi._compiled.latest is not None and len(asked) == 1


@pytest.mark.parametrize("on_cpu", [True, False])
def test_nothing_is_timed_on_a_gpu_to_choose_a_kernel(asked, monkeypatch, on_cpu):
    from torch._inductor import config

    usual = (config.shape_padding, getattr(config, "deterministic", True))
    monkeypatch.setattr(graph, "_on_cpu", lambda traced: on_cpu)
    ppvae.SVI(*plain(), ADAM, compile=True).step(X)
    assert asked == [usual if on_cpu else (False, True)] and usual != (False, True)


@pytest.fixture
def precision():
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def test_another_precision_of_products_is_another_graph(traced, precision):
    svi = ppvae.SVI(*plain(), ADAM, compile=True)
    for name in ("highest", "high", "highest", "high"):
        precision(name)
        svi.step(X)
    assert len(svi._compiled._graphs) == 2


def test_products_may_differ_more_where_they_are_rounded_more(precision):
    expected, found = [torch.ones(2)], [torch.full((2,), 1.005)]
    assert _difference(expected, found) == pytest.approx(0.005, rel=1e-3)
    precision("high")
    assert _difference(expected, found) is None
    assert _difference(expected, [torch.full((2,), 1.02)]) is not None
    doubles = [expected[0].double()], [found[0].double()]
    assert _difference(*doubles) is not None


def test_precisions_on_cuda_are_the_products_and_the_convolutions(precision, monkeypatch):
    """Also where torch's older and newer way to set them have been mixed, which raises."""
    precision("high")
    assert _precision("cuda")[0] == "high" and _precision("cpu") == ("high",)
    before = _precision("cuda")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not before[2])
    assert _precision("cuda")[:2] == before[:2] and _precision("cuda") != before

    def mixed():
        raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", mixed)
    assert len(_precision("cuda")) == 3


# -- random streams ----------------------------------------------------------------------------


class Streams:
    """A generator of CUDA's, for the functions of torch.cuda that get and set its state."""

    def __init__(self, monkeypatch):
        self.generator = torch.Generator().manual_seed(5)
        monkeypatch.setattr(pairs, "cuda_devices", lambda *tensors: [1] if tensors else [])
        monkeypatch.setattr(torch.cuda, "get_rng_state", self.get)
        monkeypatch.setattr(torch.cuda, "set_rng_state", self.set)

    def get(self, device):
        assert device == 1
        return self.generator.get_state()

    def set(self, state, device):
        assert device == 1
        self.generator.set_state(state)

    def draw(self):
        return torch.rand((), generator=self.generator)


def test_draws_of_the_device_are_found_again(monkeypatch):
    streams = Streams(monkeypatch)
    rewind = pairs.rewinder(X)
    first = streams.draw(), torch.rand(())
    rewind()
    assert first == (streams.draw(), torch.rand(()))


def test_a_piece_of_the_evidence_that_is_not_finite_is_drawn_again_on_its_device(
    traced, monkeypatch
):
    """The error names the datapoint whose draw was not finite, not those of other draws."""
    streams, seen = Streams(monkeypatch), []

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    def graph_of(compiled, args, kwargs):
        seen.append(streams.draw())
        return torch.full((kwargs["num_particles"], len(args[0])), math.inf)

    def whole(*args):
        if args[2][0][0] != 0.0:
            seen.append(streams.draw())
        return usual(*args)

    usual = evidence.whole_weights
    monkeypatch.setattr(evidence.Compiled, "__call__", graph_of)
    monkeypatch.setattr(evidence, "whole_weights", whole)
    x = torch.linspace(0.0, 1.0, 4)
    diagnostics.log_evidence(model, guide, x, num_particles=5, max_rows=10, compile="auto")
    assert len(seen) == 2 and seen[0] == seen[1]


# -- on a GPU ----------------------------------------------------------------------------------


def cuda_svi(make=plain, optim=ADAM, number=3, **kwargs):
    """An SVI on the GPU, after so many steps."""
    svi = ppvae.SVI(*[program.cuda() for program in make()], optim, compile=True, **kwargs)
    steps(svi, number, X.cuda())
    return svi


def captures(svi):
    return [step for step in svi._captures.steps.values() if step is not None]


@pytest.mark.cuda
def test_a_learning_rate_of_zero_on_cuda():
    svi = cuda_svi(optim=two_groups)
    assert len(captures(svi)) == 1
    for group in svi.optimizer.param_groups:
        group["lr"] = 0.0
    before = tensors(svi.objective)
    steps(svi, 5, X.cuda())
    assert all(torch.equal(v, before[k]) for k, v in tensors(svi.objective).items())
    svi.optimizer.param_groups[1]["lr"] = 0.1
    steps(svi, 1, X.cuda())
    first = next(iter(dict(svi.objective.named_parameters())))
    moved = [k for k, v in tensors(svi.objective).items() if not torch.equal(v, before[k])]
    assert moved and first not in moved and len(captures(svi)) == 1


@pytest.mark.cuda
def test_a_compiled_run_with_a_schedule_is_resumed_on_cuda(tmp_path):
    def train(epochs, folder, resume=False):
        torch.manual_seed(0)
        svi = ppvae.SVI(*vae(), ADAM, compile=True)
        options = {"batch_size": N, "device": "cuda", "checkpoint": folder, "resume": resume}
        step = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
        ppvae.fit(svi, X.repeat(4, 1), epochs=epochs, lr_scheduler=step, **options)
        return tensors(svi.objective)

    whole = train(6, tmp_path / "whole")
    train(3, tmp_path / "parts")
    resumed = train(6, tmp_path / "parts", resume=True)
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.cuda
def test_bf16_is_replayed_on_cuda():
    svi = ppvae.SVI(*[program.cuda() for program in plain()], ADAM, compile=True)
    svi.autocast = functools.partial(torch.autocast, "cuda", torch.bfloat16)
    assert all(map(math.isfinite, steps(svi, 6, X.cuda())))
    assert len(svi._compiled._graphs) == len(captures(svi)) == 1


@pytest.mark.cuda
def test_a_reader_pins_memory_while_a_step_is_captured_on_cuda():
    stop = threading.Event()

    def read():
        while not stop.is_set():
            torch.ones(1000).pin_memory().to("cuda", non_blocking=True)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        svi = cuda_svi()
        for rows in range(2, N):
            steps(svi, 3, X[:rows].cuda())
    finally:
        stop.set()
        reader.join()
    assert len(captures(svi)) == N - 1


@pytest.mark.cuda
def test_a_sliced_batch_on_cuda():
    x = normal(N, 2 * D).cuda()[:, :D]
    svi = ppvae.SVI(*[program.cuda() for program in plain()], ADAM, compile=True)
    steps(svi, 5, x)
    assert len(svi._compiled._graphs) == len(captures(svi)) == 1


@pytest.mark.cuda
@pytest.mark.parametrize("known", [True, False])
def test_what_cannot_be_captured_is_compiled_on_cuda(monkeypatch, known):
    """And draws go on: in this process, and by the steps that have been captured before."""
    other = cuda_svi()
    if not known:
        monkeypatch.setattr(graph, "_WAITING", set())
    svi = ppvae.SVI(*[program.cuda() for program in correlated()], ADAM, compile="auto")
    with pytest.warns(RuntimeWarning, match="not captured as a CUDA graph"):
        found = steps(svi, 6, X.cuda())
    assert all(map(math.isfinite, found)) and not captures(svi)
    assert svi._compiled.latest is not None
    torch.randn(3, device="cuda")
    assert all(map(math.isfinite, steps(other, 3, X.cuda())))
    assert len(captures(cuda_svi(vae))) == 1


@pytest.mark.cuda
def test_a_withheld_step_on_cuda_does_not_withhold_those_on_the_cpu():
    svi = cuda_svi(skip_nonfinite=True)
    svi.update(X.cuda() * math.inf)
    assert svi.num_skipped == 1
    ppvae.fit(svi, X, epochs=1, device="cpu", progress=False)
    before = tensors(svi.objective)
    steps(svi, 1)
    assert all(not torch.equal(v, before[k]) for k, v in tensors(svi.objective).items())
    assert svi.num_skipped == 1


@pytest.mark.cuda
def test_a_hundred_replays_on_cuda_wait_for_nothing():
    svi, x = cuda_svi(clip_norm=1.0), X.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = [svi.update(x) for _ in range(100)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(set(torch.stack(losses).tolist())) > 80


@pytest.mark.cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_pair_on_the_second_gpu():
    svi = ppvae.SVI(*[program.to("cuda:1") for program in plain()], ADAM, compile=True)
    before = tensors(svi.objective)
    assert len(set(steps(svi, 6, X.to("cuda:1")))) == 6 and len(captures(svi)) == 1
    assert all(not torch.equal(v, before[k]) for k, v in tensors(svi.objective).items())


@pytest.mark.cuda
def test_a_state_of_the_stream_on_cuda():
    rewind = pairs.rewinder(X.cuda())
    first = torch.rand(3, device="cuda")
    rewind()
    assert torch.equal(torch.rand(3, device="cuda"), first)


@pytest.mark.cuda
@pytest.mark.parametrize("kind", [torch.optim.Adagrad, torch.optim.AdamW, torch.optim.SGD])
def test_optimisers_on_cuda_and_moved_there(kind):
    ppvae.fit(ppvae.SVI(*vae(), kind), X, epochs=2, device="cuda", progress=False)
    svi = ppvae.SVI(*vae(), kind)
    steps(svi, 2)
    ppvae.fit(svi, X, epochs=1, device="cuda", progress=False)
