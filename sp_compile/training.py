"""What a forward that torch records gradients of needs besides: one seed for all ranks, and weights that are alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from sp_compile import fingerprint
from sp_compile.dynamo.shards import local_value, tensor_group
from sp_compile.errors import BatchError, UnsupportedModelError
from sp_compile.mesh import Group


def seed_groups(module: nn.Module, group: Group) -> list[dist.ProcessGroup]:
    """The groups that draw the same: of sp, and those that weights are cut over, as they are before FSDP cuts them."""
    cut = (each for each in module.parameters() if isinstance(each, DTensor))
    over_tp = {tensor_group(each): each.device_mesh.get_group(0) for each in cut}
    return [each for each in (group.process_group, *over_tp.values()) if each is not None and each.size() > 1]


def fresh_seed(groups: Sequence[dist.ProcessGroup], device: torch.device) -> torch.Tensor:
    """A seed for dropout, int64 without dims: of the first rank's default generator, the same in all these groups."""
    seed = torch.randint(2**62, (), dtype=torch.int64).to(device)
    for each in groups:
        dist.broadcast(seed, group=each, group_src=0)
    return seed


def check_trained(module: nn.Module, group: Group, known: Sequence[nn.Parameter] | None) -> list[nn.Parameter]:
    """Compare what is trained with other ranks', unless these parameters are known.

    Args:
        known: what this returned before; None at first.

    Returns:
        The parameters that train, to be known from now on: alive, so that no other gets the id of one of them.

    Raises:
        The errors of :func:`check_sums` and :func:`check_weights`.
    """
    trained = [each for each in module.parameters() if each.requires_grad]
    if known is None or [*map(id, trained)] != [*map(id, known)]:
        check_sums(module)
        check_weights(module, group)
    return trained


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
