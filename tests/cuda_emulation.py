"""CUDA graphs emulated on CPU tensors: operators are recorded, and replayed into the same memory.

As on a device, nothing happens while a function is captured: no parameter moves, nothing is drawn,
and looking at a value raises. What Python does in it happens once, and not at a replay.
"""

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ppvae.compile import cuda_graph

# What waits for the device, as CUDA's own error says it.
WAITING = {"_local_scalar_dense", "nonzero", "multinomial", "_linalg_check_errors", "equal"}
REFUSAL = "CUDA error: operation not permitted when stream is capturing"


class Recorder(TorchDispatchMode):
    """Writes down each operator with its very tensors, and what memory it had not made itself."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.before = {}  # memory from outside that is written on: as it was
        self.own = {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        schema = operator._schema
        if schema.name.partition("::")[2] in WAITING:
            raise RuntimeError(REFUSAL)
        written = {id(t) for t in self._keep(schema, args, kwargs)}
        outputs = operator(*args, **kwargs)
        found = [t for t in tree_leaves(outputs) if isinstance(t, torch.Tensor)]
        returns = [r.alias_info for r in schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in returns)
        if not is_view or written:
            made = [None if id(t) in written or is_view else t for t in found]
            same = tree_map(lambda value: value, (args, kwargs))  # lists are the caller's
            self.calls.append((operator, *same, made))
            self.own |= {_memory(t): t for t in made if t is not None}
        return outputs

    def _keep(self, schema, args, kwargs):
        """The tensors that an operator writes on; of memory from outside, keep what is there."""
        given = dict(zip([a.name for a in schema.arguments], args, strict=False)) | kwargs
        for argument in schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tree_leaves(given.get(argument.name)):
                    if isinstance(tensor, torch.Tensor):
                        if _memory(tensor) not in self.own:
                            self.before.setdefault(_memory(tensor), (tensor, _bytes(tensor)))
                        yield tensor

    @torch.no_grad()
    def replay(self):
        for operator, args, kwargs, made in self.calls:
            found = [t for t in tree_leaves(operator(*args, **kwargs)) if torch.is_tensor(t)]
            for kept, new in zip(made, found, strict=True):
                if kept is not None:
                    kept.copy_(new)


def _memory(tensor):
    return tensor.untyped_storage()._cdata


def _bytes(tensor):
    with torch._C._DisableTorchDispatch():
        return tensor.untyped_storage().clone()


class Emulation:
    """What has been captured; ``refuse`` an operator by name to have a capture fail."""

    def __init__(self):
        self.graphs, self.replays, self.failed, self.now = [], 0, 0, False

    def record(self, function, device):
        random, recorder = torch.get_rng_state(), Recorder()
        self.now = True
        try:
            with recorder:
                outputs = function()
        except BaseException:
            self.failed += 1
            raise
        finally:
            self.now = False
            for tensor, content in recorder.before.values():
                tensor.untyped_storage().copy_(content)
            torch.set_rng_state(random)
        self.graphs.append(recorder)

        def replay():
            self.replays += 1
            recorder.replay()

        return outputs, replay


@contextmanager
def emulated():
    """CPU tensors are taken for a GPU's, inside."""
    emulation = Emulation()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_graph, "is_gpu", lambda tensor: tensor.is_cpu)
        patch.setattr(cuda_graph, "capturing", lambda: emulation.now)
        patch.setattr(cuda_graph, "record", emulation.record)
        yield emulation
