"""Attention of every rank of a layout, layout kernels, decoding, training and models on one GPU, without communication.

Run ``python benchmarks/gpu.py`` on an otherwise idle GPU; ``--help`` shows what can be chosen. The shapes are those of
Llama-3-8B and Qwen3-30B-A3B: 32 query and 8 or 4 key/value heads of 128 dims, bf16. Times are those of CUDA events,
medians of interleaved rounds. A part that raises is a row that misses its target, and the others are measured
nevertheless. Where a GPU is lent for minutes, the same command with ``--json``, ``--resume`` and ``--minutes`` is run
again until nothing is left.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_attention import Areas, compare
from gpu_decode import decode, steps
from gpu_layout import layout_kernels
from gpu_models import in_fp32, layers, small_shape, whole_model
from gpu_record import Record
from gpu_runs import batches
from gpu_timing import Shape
from gpu_training import training

from sp_compile.measure import machine, versions

PARTS = ("layout", "decode", "steps", "exact", "layers", "model", "training", "attention")
HEADS = {"Llama-3-8B": (32, 8), "Qwen3-30B-A3B": (32, 4)}
SMOKE = {"rounds": 1, "tokens": [256], "sp": [1, 2], "training": [256], "layers": [256], "model": [256], "steps": [256]}


def parts_of(asked: argparse.Namespace, shapes: Sequence[Shape]) -> dict[str, Callable[[], dict[str, Any]]]:
    """What is to be measured, by name, the longest sequences last."""
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    rounds, small = asked.rounds, asked.smoke
    for shape in shapes:
        context = 64 if small else 131072
        of_part: dict[str, dict[str, Callable[[], dict[str, Any]]]] = {
            "layout": {"layout": partial(layout_kernels, shape, 256 if small else 32768, rounds)},
            "decode": {"decode": partial(decode, shape, context, asked.sp, rounds)},
            "steps": {f"steps, {tokens} tokens a request": partial(steps, shape, tokens, rounds, small)
                      for tokens in asked.steps},
            "exact": {"small model": partial(in_fp32, shape, asked.sp)},
            "layers": {f"layers, {tokens} tokens, sp={sp}": partial(layers, shape, tokens, sp, rounds, small)
                       for tokens in asked.layers for sp in asked.sp},
            "model": {f"model, {name}": partial(whole_model, shape, lengths, rounds, small)
                      for tokens in asked.model for name, lengths in batches(tokens).items()},
        }  # fmt: skip
        left_out = (
            (["exact"] if shape is shapes[0] else ["steps", "layers", "model"]) if small else []
        )  # compiling is slow
        for part in asked.parts:
            runs = {} if part in left_out else of_part.get(part, {})
            found |= {f"{shape.name}, {name}": run for name, run in runs.items()}
    if "training" in asked.parts:
        found |= {f"{shapes[0].name}, training, {tokens} tokens": partial(training, tokens, rounds, shapes[0])
                  for tokens in asked.training}  # fmt: skip
    areas = {shape.name: Areas(shape) for shape in shapes}
    if "attention" in asked.parts:
        found |= {f"{shape.name}, {name}, sp={sp}":
                  partial(compare, lengths, sp, asked.scheme, rounds, areas[shape.name])
                  for tokens in asked.tokens for shape in shapes for name, lengths in batches(tokens).items()
                  for sp in asked.sp}  # fmt: skip
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes of every part")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shapes", nargs="+", choices=list(HEADS), default=list(HEADS))
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each; 3 of those that take over 0.5 s")
    parser.add_argument("--sp", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--scheme", default="zigzag", help="the layout's, of the part attention")
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 131072, 524288], help="of attention")
    parser.add_argument("--steps", type=int, nargs="+", default=[8192, 131072], help="tokens of each of 16 requests")
    parser.add_argument("--layers", type=int, nargs="+", default=[131072], help="tokens of two layers")
    parser.add_argument("--model", type=int, nargs="+", default=[8192, 32768], help="tokens of whole models")
    parser.add_argument(
        "--training", type=int, nargs="+", default=[4096, 16384], help="tokens of attention that trains"
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--resume", action="store_true", help="keep the figures of the JSON file, and add the others")
    parser.add_argument("--again", action="store_true", help="with --resume: measure parts that raised once more")
    parser.add_argument("--minutes", type=float, help="begin no part after so many, for --resume to go on")
    asked = parser.parse_args(arguments)
    if (asked.device == "cuda") != torch.cuda.is_available():
        parser.error(f"--device {asked.device} was given; pass the other, or hide or show GPUs by CUDA_VISIBLE_DEVICES")
    if asked.smoke:
        vars(asked).update(SMOKE)
    asked.sp = sorted({1, *asked.sp})  # which the others are compared with
    limits = torch._dynamo.config
    limits.recompile_limit = limits.accumulated_recompile_limit = 1024  # lengths that stand for areas have code each
    shapes = [Shape(name, *HEADS[name], torch.device(asked.device)) for name in asked.shapes]
    if asked.smoke:
        shapes = [small_shape(each) for each in shapes]
    if asked.device == "cpu":
        print("left out on a CPU: fused kernels, cuDNN, gradients of FlexAttention, which is eager, peaks of models")
    settings = {"device": asked.device, "smoke": asked.smoke, "rounds": asked.rounds, "sp": asked.sp,
                "scheme": asked.scheme}  # fmt: skip
    command = " ".join(["python benchmarks/gpu.py", *(sys.argv[1:] if arguments is None else arguments)])
    results = {"machine": machine(), "versions": versions(), "settings": settings, "commands": [command], "parts": {}}
    record = Record(results, asked.json, asked.markdown)
    if asked.resume:
        try:
            record.go_on(asked.again)
        except ValueError as error:
            parser.error(str(error))
    with torch.no_grad():
        record.measure(parts_of(asked, shapes), asked.minutes)
    record.write()
    if record.raised:
        sys.exit(f"{len(record.raised)} parts raised: {'; '.join(record.raised)}")


if __name__ == "__main__":
    main()
