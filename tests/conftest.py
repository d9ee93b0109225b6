"""What every test shares: a clean slate, one seed, the markers, and shards of a long run."""

import gc
import os
import re
import signal
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import pyro
import pytest
import torch
from hypothesis import settings

os.environ["MPLBACKEND"] = "Agg"  # no windows
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores Ctrl-C
torch.set_num_threads(1)
for device in (torch.cuda, torch.xpu, torch.mtia):
    if not device.is_available():
        # torch would write down the stack at each seed, to tell where one for no device came from
        device.manual_seed_all = lambda seed: None
gc.disable()  # until all is imported, which is most of what there is to look through
# A kernel's first call is slow, and a random draw must not decide whether `make test` passes.
settings.register_profile("ppvae", deadline=None, derandomize=True)
settings.load_profile("ppvae")
Item = TypeVar("Item")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", metavar="I/N", help="only the I-th of N parts of the tests, as 1/8")


def shard(items: Sequence[Item], which: str) -> list[Item]:
    """Every N-th of the tests, so that those of one kind, which cost alike, are spread evenly."""
    found = re.fullmatch(r"([0-9]+)/([0-9]+)", which)
    part, parts = map(int, found.groups()) if found else (0, 0)
    if not 1 <= part <= parts:
        raise pytest.UsageError(f"--shard takes I/N with 1 <= I <= N, as 1/8; got {which!r}")
    return list(items[part - 1 :: parts])


@pytest.hookimpl(trylast=True)  # after -m and -k have chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if which := config.getoption("--shard"):
        kept = shard(items, which)
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept
    # First, while this process has no threads: a fork beside those of JAX or a compiler may hang.
    items.sort(key=lambda item: item.get_closest_marker("forks") is None)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def pytest_collection_finish() -> None:
    gc.freeze()  # modules and tests stay to the end: never look through them again
    gc.enable()


@pytest.fixture(autouse=True)
def clean_slate() -> None:
    """Start each test with an empty param store and the same random state."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


@pytest.fixture
def float64() -> Iterator[None]:
    """Make float64 the default for one test: an exact oracle deserves exact arithmetic."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Run the traced graph itself: what Python hands to the compiler, without the compiler."""
    import torch._inductor.compile_fx

    from ppvae.compile import passes

    built: list[Any] = []

    def interpret(made: Any, inputs: Any) -> Any:
        built.append(made)
        return made

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", interpret)
    monkeypatch.setattr(passes, "MIN_PRODUCT", 0)  # the networks here are small
    return built
