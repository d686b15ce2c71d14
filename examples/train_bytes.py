"""Train a small byte-level Llama on the source of the Python standard library, its tokens spread over ranks.

``python examples/train_bytes.py`` trains on two local ranks, stops halfway, goes on from the checkpoint as a new start
would, and prints the losses beside those of the same run without ranks. ``--plot losses.png`` draws both (matplotlib).
"""

from __future__ import annotations

import argparse
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

import sp_compile


def model_of() -> transformers.LlamaForCausalLM:
    """Four layers over the 256 bytes."""
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        use_cache=False,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).train()


def text_of(size: int) -> torch.Tensor:
    """The first so many bytes of the standard library, file after file."""
    found = bytearray()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        found += path.read_bytes()
        if len(found) >= size:
            break
    return torch.frombuffer(found[:size], dtype=torch.uint8).long()


def batch_at(text: torch.Tensor, step: int, length: int) -> torch.Tensor:
    """A window of the text, by the number of the step alone, so that every rank and every start has the same."""
    start = torch.randint(len(text) - length, (), generator=torch.Generator().manual_seed(step))
    return text[int(start) : int(start) + length][None]


def train(first: int, last: int, length: int, checkpoint: str, parallel: bool) -> list[float]:
    """Steps ``first`` to ``last``, from the checkpoint where there is one and to it at the end; their losses."""
    model: Any = model_of()
    saved = Path(checkpoint, "model.safetensors"), Path(checkpoint, "optimizer.pt")
    if first:
        model.load_state_dict(load_file(saved[0]))
    run = sp_compile.parallelize(model) if parallel else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    if first:
        optimizer.load_state_dict(torch.load(saved[1], weights_only=True))
    text, losses = text_of(1 << 20), []
    for step in range(first, last):
        ids = batch_at(text, step, length)
        optimizer.zero_grad()
        loss = run(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    if not parallel or run.group.rank == 0:  # all ranks have the same
        save_file({name: each.contiguous() for name, each in model.state_dict().items()}, saved[0])
        torch.save(optimizer.state_dict(), saved[1])
    return losses


def main() -> None:
    """Train with and without ranks, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sp", type=int, default=2, help="local ranks (default 2)")
    parser.add_argument("--steps", type=int, default=60, help="of training (default 60)")
    parser.add_argument("--length", type=int, default=1024, help="bytes of a step (default 1024)")
    parser.add_argument("--plot", type=Path, help="file to draw the losses to")
    options = parser.parse_args()
    half = options.steps // 2
    with tempfile.TemporaryDirectory() as folder:
        ours = []
        for first, last in ((0, half), (half, options.steps)):
            steps = (first, last, options.length, folder, True)
            ours += sp_compile.launch(train, options.sp, *steps, timeout=3600)[0]
    with tempfile.TemporaryDirectory() as folder:
        alone = train(0, options.steps, options.length, folder, False)
    print(f"step  sp={options.sp:<7} unsharded")
    for step in [*range(0, options.steps, max(1, options.steps // 12)), options.steps - 1]:
        print(f"{step:4d}  {ours[step]:.5f}    {alone[step]:.5f}")
    print(f"largest difference: {max(abs(a - b) for a, b in zip(ours, alone, strict=True)):.1e}")
    if options.plot is not None:
        import matplotlib.pyplot as plt

        plt.plot(alone, label="unsharded", linewidth=3, alpha=0.4)
        plt.plot(ours, label=f"sp={options.sp}, resumed at step {half}")
        plt.xlabel("step")
        plt.ylabel("loss (nats per byte)")
        plt.legend()
        plt.savefig(options.plot, dpi=150)


if __name__ == "__main__":
    main()
