"""Weights of heads that lie in pieces on several ranks: gathered when a loss needs them, gradients sent back as their owner
would have sent them.

FSDP2's are DTensors, DeepSpeed ZeRO-3's parameters that are empty between forward passes. Neither library is imported
before the caller hands over one of its own.
"""

import sys

import torch
from torch import Tensor


def is_dtensor(tensor: object) -> bool:
    """True for a DTensor; found without importing what only they need."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_zero3_piece(tensor: object) -> bool:
    """True for a parameter of ZeRO-3 that is not gathered now."""
    return hasattr(tensor, "ds_status") and tensor.ds_numel != tensor.numel()


def is_lost_piece(tensor: object) -> bool:
    """True for a tensor that stands for more elements than it has, and nothing can tell where they are."""
    return not hasattr(tensor, "ds_status") and getattr(tensor, "ds_numel", tensor.numel()) != tensor.numel()


def is_sharded(tensor: object) -> bool:
    """True where elements of a head's tensor are on other ranks; False for None."""
    return tensor is not None and (is_dtensor(tensor) or is_zero3_piece(tensor))


def whole(
    tensor: Tensor,  # (V, H) or (V,) in all, of which a shard may be here
    name: str = "the weight",
    dtype: torch.dtype | None = None,  # to gather it in
) -> Tensor:
    """A head's tensor with all of its elements; itself where it is a plain one. All ranks together.

    The gradient of a gathered DTensor is averaged over its mesh and scattered, as FSDP2 does with those of its other
    parameters; that of a ZeRO-3 parameter is given to its engine, which reduces it with the rest. Raises ValueError for
    a layout in which the pieces' gradient would not be known.
    """
    if is_dtensor(tensor):
        _require_data_parallel(tensor, name)
        return _GatherDTensor.apply(tensor, dtype or tensor.dtype)
    if is_zero3_piece(tensor):
        return _gathered_by_zero3(tensor)
    return tensor


def _require_data_parallel(tensor: Tensor, name: str) -> None:
    sharded = [placement for placement in tensor.placements if not placement.is_replicate()]
    if any(placement.is_partial() for placement in sharded):
        raise ValueError(f"{name} is a DTensor of partial sums; redistribute it first")
    if len(sharded) > 1:
        raise ValueError(
            f"{name} is a DTensor that is sharded over {len(sharded)} dimensions of its mesh, {tensor.placements}; for a head "
            "that tensor parallelism has cut by vocabulary pass this rank's rows and process_group=, gathered over the "
            "data-parallel dimension"
        )


class _GatherDTensor(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.mesh, ctx.placements, ctx.shape = tensor.device_mesh, tensor.placements, tensor.shape
        ctx.stride, ctx.dtype = tensor.stride(), tensor.dtype
        found = tensor.detach().to(dtype).full_tensor()
        # said by the layout and not by addresses, which torch.compile cannot trace
        is_here_whole = all(
            placement.is_replicate() or size == 1
            for placement, size in zip(tensor.placements, tensor.device_mesh.shape, strict=True)
        )
        return found.clone() if is_here_whole and dtype == tensor.dtype else found

    @staticmethod
    def backward(ctx, gradient: Tensor):
        from torch.distributed.tensor import DTensor, Partial

        # divided before it is added up, as FSDP2 does: gloo has no mean, and a sum in half precision less range
        mine = gradient.to(ctx.dtype) / ctx.mesh.size()
        partial = DTensor.from_local(
            mine, ctx.mesh, [Partial()] * ctx.mesh.ndim, run_check=False, shape=ctx.shape, stride=ctx.stride
        )
        return partial.redistribute(placements=ctx.placements), None


def _gathered_by_zero3(parameter: Tensor) -> Tensor:
    """A copy of the parameter. Its engine takes the gradient as it takes others, while all of the parameter is here: so it
    is gathered again when the gradient arrives, until the backward pass ends."""
    import deepspeed

    # a graph that begins while all of it is here knows the shape of its gradient
    with deepspeed.zero.GatheredParameters([parameter]):
        full = parameter.clone()

    def gather(gradient: Tensor) -> None:
        again = deepspeed.zero.GatheredParameters([parameter])
        again.__enter__()
        torch.autograd.Variable._execution_engine.queue_callback(lambda: again.__exit__(None, None, None))

    if full.requires_grad:
        full.register_hook(gather)
    return full
