"""What a forward that torch records gradients of needs besides: one seed for all ranks, and weights that are alike."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn

from sp_compile import fingerprint
from sp_compile.dynamo.shards import local_value
from sp_compile.errors import BatchError, UnsupportedModelError
from sp_compile.mesh import Group


def fresh_seed(group: Group, device: torch.device) -> torch.Tensor:
    """A seed for dropout out of rank 0's default generator, int64 without dims, the same on every rank."""
    seed = torch.randint(2**62, (), dtype=torch.int64)
    if group.size > 1 and group.process_group is not None:
        seed = seed.to(device)
        dist.broadcast(seed, group=group.process_group, group_src=0)
    return seed.to(device)


def check_weights(module: nn.Module, group: Group) -> None:
    """Check that all ranks start from the same weights and train the same ones.

    Raises:
        RankMismatchError: names the first parameter that differs, and the ranks.
    """
    if group.size == 1:
        return
    with fingerprint.agreement(group) as fields:
        for name, each in module.named_parameters():
            frozen = "" if each.requires_grad else ", frozen"
            content = fingerprint.content(local_value(each))
            fields[f"the parameter {name}"] = f"{list(each.shape)} {each.dtype}{frozen} {content}"


def check_sums(module: nn.Module) -> None:
    """Check that nobody else sums gradients over ranks of tensor parallelism.

    Raises:
        UnsupportedModelError: transformers does.
    """
    for name, each in module.named_modules():
        if getattr(each.__dict__.get("forward"), "__qualname__", "").startswith("ReplicatedWithGradAllReduce."):
            raise UnsupportedModelError(
                f"transformers sums the gradients of {name} over tensor parallel ranks, which sp_compile does; take "
                "replicated_with_grad_allreduce out of the plan"
            )


def check_labels(named: Mapping[str, torch.Tensor], tokens: torch.Tensor) -> None:
    """Check what can be told of labels without the model.

    Raises:
        BatchError: there is not one for each token.
    """
    labels = named.get("labels")
    if labels is not None and labels.dim() == 2 and tokens.dim() > 1 and labels.shape != tokens.shape[:2]:
        raise BatchError(f"labels have shape {list(labels.shape)}, the tokens {list(tokens.shape[:2])}; pass one each")
