"""The module that ``parallelize`` returns, and what it does around each forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from sp_compile import fingerprint
from sp_compile.batch import request_lengths
from sp_compile.capture import TOKEN_INPUTS, capture
from sp_compile.codegen import LocalProgram
from sp_compile.config import CompileConfig
from sp_compile.errors import BatchError, CaptureError, FallbackError, SPCompileError, UnsupportedModelError
from sp_compile.layout import TokenLayout, token_layout
from sp_compile.mesh import Group
from sp_compile.pipeline import Pass, PassStep, build_pipeline, run_pipeline
from sp_compile.program import Program
from sp_compile.report import Report, make_report


@dataclass
class Step:
    """What the running forward knows: its layout and the index inputs of this rank."""

    layout: TokenLayout
    index_inputs: dict[str, torch.Tensor]


class _Explained(Exception):
    """Ends a forward that only was to be captured."""

    def __init__(self, report: Report) -> None:
        super().__init__()
        self.report = report


@dataclass
class Compiled:
    """One captured graph of the model with its program and report data."""

    program: Program
    local: LocalProgram
    steps: list[PassStep]
    index_names: list[str]


class ParallelModule(nn.Module):
    """A model whose tokens are spread over ranks; call it like the model.

    Attributes of the model (``config``, ``device``, ...) are reachable here; the model itself, still working on one
    rank, is :attr:`module`.
    """

    def __init__(self, module: nn.Module, group: Group, config: CompileConfig) -> None:
        super().__init__()
        self.module = module
        self.group = group
        self.compile_config = config
        self.pipeline: tuple[Pass, ...] = build_pipeline(config.pipeline, config.attention)
        self.compiled: list[Compiled] = []
        self.last_layout: TokenLayout | None = None
        self._signature = inspect.signature(module.forward)
        self._static: set[Any] = set()
        self._step: Step | None = None
        self._prepared: tuple[Any, Step] | None = None
        self._last: Compiled | None = None
        self._explaining = False
        self._run = torch.compile(module, backend=self._backend, fullgraph=True)
        self.train(module.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "generate":
                raise AttributeError(
                    "generate() is not parallelized yet; call model.module.generate() to run it unsharded"
                ) from None
            return getattr(super().__getattr__("module"), name)

    @property
    def compiles(self) -> int:
        """How many times code was generated so far."""
        return sum(each.local.compiles for each in self.compiled)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward.

        Raises:
            BatchError: inputs that cannot be laid out.
            CaptureError: the model does not capture into one graph.
            FallbackError: an op had to be computed on gathered inputs and the configuration is strict.
            RankMismatchError: ranks disagree on configuration, inputs or graph.
        """
        if self.training and torch.is_grad_enabled():
            raise UnsupportedModelError(
                "training through sp_compile is not supported yet; call model.eval(), or wrap the call in torch.no_grad()"
            )
        named = self._named_tensors(args, kwargs)
        layout, tokens = self._lay_out(named)
        if self.compile_config.check_inputs:
            fingerprint.check_inputs(self.group, named, layout.lengths)
        if self._prepared is None or self._prepared[0] != (id(layout), tokens.device):
            step = Step(layout, _index_inputs(layout, self.group.rank, tokens.device))
            self._prepared = ((id(layout), tokens.device), step)
        self._step = self._prepared[1]
        self.last_layout = layout
        try:
            return self._call(args, kwargs, tokens)
        finally:
            self._step = None

    def explain(self, batch: Mapping[str, Any]) -> Report:
        """Capture the forward of this batch and run the pipeline on it, but nothing else.

        Raises:
            The errors of :meth:`forward`, but for those about ranks.
        """
        device = next((each.device for each in self.module.parameters()), torch.device("cpu"))
        named = {name: each.to(device) if isinstance(each, torch.Tensor) else each for name, each in batch.items()}
        layout, tokens = self._lay_out(self._named_tensors((), batch))
        self.last_layout, self._explaining = layout, True
        try:
            self._call((), named, tokens)
        except _Explained as explained:
            return explained.report
        finally:
            self._explaining = False
        raise AssertionError("the captured graph ran")

    def _lay_out(self, named: Mapping[str, torch.Tensor]) -> tuple[TokenLayout, torch.Tensor]:
        """Check the inputs; their layout and the tensor that holds the tokens."""
        name, tokens = _token_input(named)
        _check_inputs(named, name, tokens)
        lengths = _lengths(named, tokens)
        return token_layout(lengths, self.group.size, self.compile_config.scheme, min_shard_length=2), tokens

    def _named_tensors(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        try:
            bound = self._signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            raise BatchError(f"{type(self.module).__name__}.forward: {error}") from None
        flat: dict[str, Any] = {}
        for name, value in bound.items():
            flat.update(value if isinstance(value, dict) else {name: value})
        return {name: value for name, value in flat.items() if isinstance(value, torch.Tensor)}

    def _call(self, args: Sequence[Any], kwargs: Mapping[str, Any], tokens: torch.Tensor) -> Any:
        length = tokens.shape[1] if tokens.dim() > 1 else tokens.shape[0]
        key = (tuple(sorted(kwargs)), len(args))
        dynamic = length > 1 and key not in self._static
        try:
            return self._traced(args, kwargs, length if dynamic else 0)
        except torch._dynamo.exc.UserError as error:
            raise CaptureError(_graph_break(self.module, error)) from error
        except Exception as error:
            if dynamic and _is_specialised(error):
                self._static.add(key)
                return self._traced(args, kwargs, 0)
            raise

    def _traced(self, args: Sequence[Any], kwargs: Mapping[str, Any], length: int) -> Any:
        args = [_dynamic(value, length) for value in args]
        kwargs = {name: _dynamic(value, length, name) for name, value in kwargs.items()}
        limits = {"recompile_limit": 64, "automatic_dynamic_shapes": False, "assume_static_by_default": True}
        try:
            with torch.no_grad(), torch._dynamo.config.patch(**limits):
                return self._run(*args, **kwargs)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            if isinstance(error.inner_exception, SPCompileError):
                raise error.inner_exception from None
            raise
        except torch._dynamo.exc.Unsupported as error:
            raise CaptureError(_graph_break(self.module, error)) from error

    def _backend(self, gm: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        program, steps = self.build(gm, trace=self._explaining)
        if self.compile_config.strict and program.fallbacks:
            each = program.fallbacks[0]
            raise FallbackError(
                f"strict=True, but {each.op} ({each.source or 'no source line'}) is computed on gathered inputs: "
                f"{each.reason}; {len(program.fallbacks)} such ops in all"
            )
        if self._explaining:
            return self._explanation(program, steps)
        if self.group.size > 1:
            fingerprint.check_graph(self.group, program)
        local = LocalProgram(program, lambda: self.build(gm)[0], self.compile_config.codegen)
        names = [node.meta["index_input"] for node in program.graph.find_nodes(op="placeholder")
                 if "index_input" in node.meta]  # fmt: skip
        compiled = Compiled(program, local, steps, names)
        self.compiled.append(compiled)

        def run(*inputs: Any) -> Any:
            step = self._step
            assert step is not None, "graphs run only inside forward"
            self._last = compiled
            sizes = {name: tensor.numel() for name, tensor in step.index_inputs.items() if name.endswith("bounds")}
            sizes |= {"tokens": step.layout.tokens, "shard_length": step.layout.shard_length}
            return compiled.local([*inputs, *(step.index_inputs[name] for name in names)], sizes)

        return run

    def _explanation(self, program: Program, steps: list[PassStep]) -> Callable[..., Any]:
        def run(*_: Any) -> Any:
            assert self.last_layout is not None, "explain has laid the batch out"
            raise _Explained(make_report(program, steps, self.last_layout))

        return run

    def build(self, gm: fx.GraphModule, trace: bool = False) -> tuple[Program, list[PassStep]]:
        """Capture Dynamo's graph into a program and run the pipeline on it."""
        program = capture(gm, self.group.size, self.group.name, self.compile_config.outputs)
        steps = run_pipeline(program, self.pipeline, self.compile_config.verify_passes, trace)
        return program, steps

    def report(self) -> Report:
        """What the last forward ran: passes, collectives with bytes, rows per rank, fallbacks.

        Raises:
            BatchError: there was no forward yet.
        """
        if self._last is None or self.last_layout is None:
            raise BatchError("there is no report before the first forward; call the model once")
        return make_report(self._last.program, self._last.steps, self.last_layout)


def _token_input(named: Mapping[str, torch.Tensor]) -> tuple[str, torch.Tensor]:
    for name in (*TOKEN_INPUTS, *named):
        if name in named and named[name].dim() >= 1:
            return name, named[name]
    raise BatchError("no tensor among the inputs; pass input_ids or inputs_embeds")


def _check_inputs(named: Mapping[str, torch.Tensor], name: str, tokens: torch.Tensor) -> None:
    if tokens.numel() == 0:
        raise BatchError(f"{name} has shape {list(tokens.shape)}; a batch needs at least 1 token")
    devices = {each.device for each in named.values()}
    if len(devices) > 1:
        where = ", ".join(f"{key} on {each.device}" for key, each in named.items())
        raise UnsupportedModelError(f"inputs on several devices ({where}); move them to one")
    positions = named.get("position_ids")
    if positions is not None and tokens.dim() > 1 and positions.shape[-1] != tokens.shape[1]:
        raise BatchError(
            f"position_ids have {positions.shape[-1]} positions, {name} has {tokens.shape[1]} tokens; pass one each"
        )


def _lengths(named: Mapping[str, torch.Tensor], tokens: torch.Tensor) -> tuple[int, ...]:
    """Requests of the batch: read from position ids where they pack several into one row, else one per row."""
    length = tokens.shape[1] if tokens.dim() > 1 else tokens.shape[0]
    positions = named.get("position_ids")
    packed = positions is not None and positions.dim() == 2 and positions.shape[0] == 1 and "attention_mask" not in named
    return request_lengths(positions) if packed and positions is not None else (length,)


def _index_inputs(layout: TokenLayout, rank: int, device: torch.device) -> dict[str, torch.Tensor]:
    return {
        "local_index": layout.local_index[rank].to(device),
        "gathered_index": layout.local_index.reshape(-1).to(device),
        "gathered_valid": layout.valid.reshape(-1).to(device),
        "restore_index": layout.restore_index.to(device),
        "rank": torch.tensor(rank, device=device),
        "q_bounds": layout.tile_bounds(rank),
        "k_bounds": layout.gathered_tile_bounds(),
    }


def _dynamic(value: Any, length: int, name: str = "") -> Any:
    """An alias of the tensor whose token dims are marked dynamic; the caller's tensor is not touched."""
    if not isinstance(value, torch.Tensor) or length == 0:
        return value
    alias = value.detach().view(value.shape) if not value.requires_grad else value.detach()
    first = 0 if value.dim() == 1 else value.dim() - 1 if name == "position_ids" else 1
    for dim in range(first, value.dim()):
        if value.shape[dim] == length:
            torch._dynamo.mark_dynamic(alias, dim)
            if value.dim() == 3 and name != "attention_mask":
                break
    return alias


def _is_specialised(error: BaseException) -> bool:
    return type(error).__name__ == "ConstraintViolationError" or "Constraints violated" in str(error)


def _graph_break(module: nn.Module, error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    frames = [line for line in lines if line.startswith("File ") or "Caused by" in line]
    where = f" at {frames[-1]}" if frames else ""
    return f"{type(module).__name__} does not capture into one graph{where}: {' '.join(lines[:3])}"
