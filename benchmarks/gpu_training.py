"""Attention that trains on one device, forward and backward, for ``gpu.py``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from gpu_runs import (
    FLEX,
    FUSED,
    RULE,
    SDPA,
    Batch,
    Given,
    by_flex,
    causal,
    code_on,
    generalize,
    of_any_length,
    plan_of,
    whole_part,
)
from gpu_timing import Run, Shape, able, difference, figure, medians
from torch.nn.attention import SDPBackend

from sp_compile.kernels.choice import KERNELS, Need

FLASH, TILES = "flash SDPA", "tiles"
OURS = (FUSED, FLEX, TILES)  # the order in which they are taken


def training(tokens: int, rounds: int, shape: Shape) -> dict[str, Any]:
    """Fused kernels, which train where they can, FlexAttention and ``tiles``, beside torch's on one causal sequence."""
    generalize(shape)
    batch = Batch((tokens,), shape)
    given, grad = batch.given(whole_part(tokens)), torch.randn_like(batch.q)
    backends = {**SDPA, "efficient SDPA": SDPBackend.EFFICIENT_ATTENTION} if _on_card(shape) else {
        FLASH: SDPA[FLASH]}  # fmt: skip
    both = {name: _causal(given, grad, name, backend) for name, backend in backends.items()}
    others = {(name, way): run for name, each in both.items() for way, run in each.items()}
    expected = [others[FLASH, "forward"](), *_grouped(others[FLASH, "backward"](), given)]
    others, refused = able(others)
    found: dict[str, Any] = {"refused": {", ".join(key): why for key, why in refused.items()}}
    # donated buffers, which a graph has that is run backward once, are none where it is run again and again
    with torch._functorch.config.patch(donated_buffer=False):
        ours = {name: _ours(name, given, grad, shape) for name in OURS if _serves(name, shape)}
        wrong = {name: _error(each, expected) for name, each in ours.items()}
        del expected
        runs = others | {(name, way): run for name, each in ours.items() for way, run in each.items()}
        times = medians(runs, rounds, warm=runs.keys())
    for name in [each for each in ours if each != TILES] or [TILES]:  # which computes what the others cannot
        for way in ("forward", "backward"):
            best, spent = min(times[each] for each in others if each[1] == way), times[name, way]
            found[f"{name}, {way}, best over ours"] = figure(best / spent, "best", wrong[name], seconds=spent)
    return found | {"by_kernel": {", ".join(key): spent for key, spent in times.items()}}


def _on_card(shape: Shape) -> bool:
    return shape.device.type == "cuda"


def _serves(name: str, shape: Shape) -> bool:
    """Whether a kernel trains here; FlexAttention has no gradients on a CPU."""
    need = Need(shape.device.type, torch.bfloat16, shape.width, shape.width, False, shape.heads, shape.kv_heads,
                differentiable=True)  # fmt: skip
    return name == TILES or (_on_card(shape) and (name == FLEX or KERNELS["fused"](need) is None))


def _ours(name: str, given: Given, grad: torch.Tensor, shape: Shape) -> dict[str, Run]:
    """Forward and backward by one of the kernels that train."""
    if name == FLEX:
        return _flex(given, grad, shape)
    plan = plan_of(given, name)
    forward, backward = torch.ops.sp_compile.attention, torch.ops.sp_compile.attention_backward
    qkv, rule = (given.q, given.k, given.v), (given.read, [], RULE, given.scale, False, name, plan, given.real)
    out, lse = forward(*qkv, *rule)
    return {
        "forward": lambda: forward(*qkv, *rule)[0],
        "backward": lambda: backward(grad, None, *qkv, *rule, out, lse, [])[:3],
    }


def _flex(given: Given, grad: torch.Tensor, shape: Shape) -> dict[str, Run]:
    """FlexAttention's code for any length."""
    leaves = [each.detach().requires_grad_() for each in (given.q, given.k, given.v)]
    run = by_flex(Given(*leaves, given.read, given.real), code_on(shape, of_any_length), backward=True)
    return _with_gradients(run, leaves, grad)


def _causal(given: Given, grad: torch.Tensor, name: str, backend: SDPBackend) -> dict[str, Run]:
    """``is_causal`` SDPA, whose gradients are those of repeated keys and values."""
    group = given.q.shape[1] // given.k.shape[1]
    repeated = [given.q, *(each.repeat_interleave(group, dim=1) for each in (given.k, given.v))]
    leaves = [each.detach().requires_grad_() for each in repeated]
    return _with_gradients(causal(*leaves, {name: backend})[name], leaves, grad)


def _with_gradients(run: Run, leaves: list[torch.Tensor], grad: torch.Tensor) -> dict[str, Run]:
    """A forward that keeps what its gradients take, and the backward alone, of one forward."""
    held: list[torch.Tensor] = []

    def forward() -> torch.Tensor:
        with torch.enable_grad():
            return run()

    def backward() -> Any:
        if not held:
            held.append(forward())
        return torch.autograd.grad(held[0], leaves, grad, retain_graph=True)

    return {"forward": forward, "backward": backward}


def _grouped(gradients: Any, given: Given) -> list[torch.Tensor]:
    """Gradients of keys and values from those of repeated ones."""
    heads = given.k.shape[1]
    dq, *others = gradients
    return [dq, *(each.unflatten(1, (heads, -1)).float().sum(2) for each in others)]


def _error(runs: Mapping[str, Run], expected: list[torch.Tensor]) -> float:
    """The largest difference of outputs and gradients; both ran once then."""
    found = [runs["forward"](), *runs["backward"]()]
    return max(difference(one.detach(), other.detach()) for one, other in zip(found, expected, strict=True))
