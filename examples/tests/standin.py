"""A stand-in for CUDA where there is no GPU: tensors that refuse what CUDA refuses.

    python examples/tests/standin.py [rft] --model=examples/tiny/sd15 --reward=jpeg --steps=2

Runs nft.py, or a method of baselines.py, on tensors that say that they lie on another device. They
compute on the CPU, and raise where CUDA raises: two devices in one operation (numbers without
dimensions aside), an index on the device into a CPU tensor, a CPU generator for a draw on the
device, NumPy. It tells nothing of speed, memory, or code that asks for the type "cuda".
SPDX-License-Identifier: MIT
"""

import sys
from pathlib import Path

import torch
import torch.utils.checkpoint
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
# The only device that any build of torch knows, and on which nothing can be computed.
DEVICE = torch.device("meta")
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
# Those that take no CPU tensor even where it is a single number.
STRICT = ("aten::cat", "aten::stack", "aten::mm", "aten::bmm", "aten::addmm", "aten::convolution")


class Far(torch.Tensor):
    """A tensor on DEVICE; `near` is the one on the CPU that it stands for."""

    @staticmethod
    def __new__(cls, near):
        form = {"strides": near.stride(), "storage_offset": near.storage_offset()}
        far = cls._make_wrapper_subclass(cls, near.shape, dtype=near.dtype, device=DEVICE, **form)
        far.near = near
        return far

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert a tensor on the device to numpy")

    __array__ = numpy

    def tolist(self):
        return self.near.tolist()

    def __reduce_ex__(self, protocol):
        # Saved as a CPU tensor, as which `torch.load(map_location="cpu")` gives it back.
        return self.near.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


class Mode(TorchDispatchMode):
    """Sends every operation through `compute`, also those that make new tensors."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})


def to_near(x):
    return x.near if isinstance(x, Far) else x


def to_far(x):
    return Far(x) if torch.is_tensor(x) and not isinstance(x, Far) else x


def refuse_mixed(func, args, far, near):
    """Raise where CUDA would: `far` and `near` are the tensors among the arguments."""
    name = func._schema.name
    if name in INDEXING:
        # A CPU index into a tensor on the device is legal; the other way round is not.
        if not isinstance(args[0], Far):
            raise RuntimeError(f"{name}: an index on the device into a CPU tensor")
    elif name in STRICT or any(x.ndim for x in near):
        shapes = [tuple(x.shape) for x in (*far, *near)]
        raise RuntimeError(f"{name}: all tensors must be on the same device: {shapes}")


def compute(func, args, kwargs):
    """Carry out one operation on the CPU, and say where its result lies."""
    leaves = tree_leaves((args, kwargs))
    far = [x for x in leaves if isinstance(x, Far)]
    near = [x for x in leaves if torch.is_tensor(x) and not isinstance(x, Far)]
    device = kwargs.get("device")
    if func is aten._fused_sdp_choice.default:
        return 0
    if func is aten.copy_.default:
        to_near(args[0]).copy_(to_near(args[1]))
        return args[0]
    on_device = bool(far)
    if device is not None:
        on_device = torch.device(device) == DEVICE
        kwargs = kwargs | {"device": torch.device("cpu")}
    if func is aten._to_copy.default:
        # Always a copy, as between two devices.
        copied = to_near(args[0]).clone()
        result = func(copied, **{k: v for k, v in kwargs.items() if k != "non_blocking"})
        return Far(result) if on_device else result
    if far and near:
        refuse_mixed(func, args, far, near)
    if on_device and any(isinstance(x, torch.Generator) for x in leaves):
        raise RuntimeError(f"{func}: a CPU generator for a draw on the device")
    result = func(*tree_map(to_near, args), **tree_map(to_near, kwargs))
    if not on_device:
        return result
    # What was changed in place is the tensor that was given.
    given = {id(x.near): x for x in far}
    return tree_map(lambda x: given.get(id(x), to_far(x)), result)


def install(nft):
    """Put nft.py on the device: a library's loading stays on the CPU, as without a GPU."""

    def on_cpu(load):
        def call(*args, **kwargs):
            with _disable_current_modes():
                return load(*args, **kwargs)

        return call

    def pick_device(config):
        return DEVICE, nft.PRECISIONS.get(config.precision, torch.float32)

    nft.pick_device = pick_device
    nft.load_pipeline = on_cpu(nft.load_pipeline)
    nft.aesthetic = on_cpu(nft.aesthetic)
    # Checkpointing keeps a device's random state, and this one has none.
    torch.utils.checkpoint.get_device_states = lambda *args: ([], [])
    torch.utils.checkpoint.set_device_states = lambda *args, **kwargs: None
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch.cuda._lazy_init = lambda: None


def main(words):
    examples = Path(__file__).resolve().parents[1]
    sys.path[:0] = [str(examples.parent), str(examples / "studies")]
    import baselines

    import nft

    install(nft)
    with Mode():
        if words[0].startswith("-"):
            return nft.main(words)
        return baselines.main(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
