"""Train with several processes: each computes its rows of a batch, and they share gradients (ddp) or weights (fsdp).

ddp: every process has the whole model, and gradients are averaged. fsdp: every process has a part of each weight and of
its optimiser state; a layer's weights are gathered while it computes. A state on disk holds whole tensors, whatever
number of processes wrote it: `whole` and `part_of` lead there and back.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from loading import checkpoint
from scripts.common.ranks import Ranks

MODES = ("ddp", "fsdp")


def replicate(module: nn.Module) -> nn.Module:
    """Wrap a module, whose forward is the loss, so that every backward averages the gradients of all processes."""
    return DistributedDataParallel(module, gradient_as_bucket_view=True)


def shard(module: nn.Module, layers: Sequence[nn.Module], methods: Sequence[str], device: str, bf16: bool) -> None:
    """Leave each process a part of every weight. Call `module`, or one of its `methods`, on all processes at once.

    bf16: gather and compute in bf16. Not by autocast: it would keep a copy of every layer until the backward pass.
    """
    mesh = init_device_mesh(device, (distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(torch.bfloat16 if bf16 else None, torch.float32, cast_forward_inputs=False)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # By default the root keeps its weights gathered after a forward pass without a backward, and then misses a step.
    fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for method in methods:
        register_fsdp_forward_method(module, method)


def load_sharded(model: nn.Module, source: checkpoint.Source, device: str) -> None:
    """Give a sharded model on the meta device its weights, one whole tensor in memory at a time."""
    state = model.state_dict()
    parts = {}
    for name in checkpoint.our_names(source.args):
        parts[name] = nn.Parameter(part_of(source.read(name, torch.float32, device), state[name]).clone())
    parts.setdefault("lm_head.weight", parts["embedding.weight"])
    model.load_state_dict(parts, assign=True)


def whole(value, keep: bool = True):
    """Put each tensor of a state together from its parts, on all processes at once; None where it is not kept."""
    if isinstance(value, dict):
        return {key: whole(part, keep) for key, part in value.items()}
    if isinstance(value, list):
        return [whole(part, keep) for part in value]
    if not isinstance(value, DTensor):
        return value
    value = value.full_tensor()
    return value.cpu() if keep else None


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Cut a whole tensor as `like` is cut -> the part of this process."""
    if not isinstance(like, DTensor):
        return tensor
    mesh = like.device_mesh
    return distribute_tensor(tensor.to(mesh.device_type), mesh, like.placements, src_data_rank=None)


def averaged(ranks: Ranks, values: Sequence[float]) -> list[float]:
    """Return the mean of each number over the processes, on all of them."""
    if ranks.size == 1:
        return list(values)
    return ranks.group.gather(torch.tensor(values, dtype=torch.float64)).mean(0).tolist()


def shared_out(ranks: Ranks, items: Sequence, work: Callable, what: str) -> list:
    """Return work(item) of every item, in order, on every process. All work equally often: sharded weights need it."""
    padded = [*items, *items[-1:] * (-len(items) % ranks.size)]
    results = tqdm(ranks.each(padded, work), total=len(padded), desc=what, leave=False, delay=1.0)
    return list(results)[: len(items)]
