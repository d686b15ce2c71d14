"""The module that ``parallelize`` returns, and what it does around each forward."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import lru_cache, partial, wraps
from typing import Any

import torch
from torch import fx, nn

from sp_compile import fingerprint, processes
from sp_compile.builder import Builder
from sp_compile.capture import Captured
from sp_compile.compiled import Compiled
from sp_compile.config import CompileConfig
from sp_compile.costs import Rates
from sp_compile.cuda_graphs import graphs_for
from sp_compile.dynamo.traced import Traced
from sp_compile.errors import BatchError, ConfigError, RequestsMixedError, UnsupportedModelError
from sp_compile.inputs import (
    check_inputs,
    device_of,
    forward_options,
    from_pack,
    install_output_hooks,
    named_tensors,
    positions_count,
    request_lengths_of,
    token_input,
    with_cache,
    without_packed_positions,
)
from sp_compile.layout import PAIRS_PER_FEATURE, TokenLayout, choose_scheme, token_layout
from sp_compile.mesh import Group
from sp_compile.report import Report
from sp_compile.steps import Kept, Step, rank_inputs
from sp_compile.training import check_labels, check_trained, fresh_seed, seed_groups
from sp_compile.work import Work

INPUTS = 8  # layouts whose index inputs stay on the device
HIDDEN_SIZE = 4096  # where the model does not tell


class _Explained(Exception):
    """Ends a forward that only was to be captured."""

    def __init__(self, compiled: Compiled, step: Step) -> None:
        super().__init__()
        self.compiled, self.step = compiled, step


class ParallelModule(nn.Module):
    """A model whose tokens are spread over ranks; call it like the model.

    Attributes of the model (``config``, ``device``, ...) are reachable here; the model itself, still working on one
    rank, is :attr:`module`.

    Attributes:
        module: the model as it was given.
        group: the ranks that share a batch; ``group.rank`` is this one's number.
        rates: of a rank and its links, by which strategies are chosen.
        builder: makes the programs that run.
        layout: who holds which rows of the last batch, to interpret outputs that stay sharded; None before the first.
    """

    def __init__(self, module: nn.Module, group: Group, config: CompileConfig) -> None:
        super().__init__()
        self.module = module
        self.compile_config = config
        self.builder = Builder(module, group, config)
        self.layout: TokenLayout | None = None
        self._signature = inspect.signature(module.forward)
        self._compiled: list[Compiled] = []
        self._last: tuple[Compiled, Step] | None = None
        self._mixing: set[Any] = set()
        self._step: Step | None = None
        self._explained: Mapping[str, Any] | None = None
        self._kept = Kept()
        self._rank_inputs = lru_cache(maxsize=INPUTS)(rank_inputs)
        self._differentiates = False
        self._trained: list[nn.Parameter] | None = None
        self.training = module.training
        self._traced = Traced(module, self._backend)
        self._draw_alike = seed_groups(module, group)
        self.__dict__["forward"] = _with_signature_of(module.forward, self.forward)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    @property
    def group(self) -> Group:
        """The ranks that share a batch; ``group.rank`` is this one's number."""
        return self.builder.group

    @group.setter
    def group(self, group: Group) -> None:
        self.builder.group = group

    @property
    def rates(self) -> Rates:
        """Of a rank and its links, by which strategies are chosen."""
        return self.builder.rates

    @rates.setter
    def rates(self, rates: Rates) -> None:
        self.builder.rates = rates

    @property
    def peft_config(self) -> Any:
        """The model's; adapters belong into it."""
        return self.module.peft_config

    @peft_config.setter
    def peft_config(self, _: Any) -> None:
        raise UnsupportedModelError(
            "PEFT cannot save adapters around a parallel model; make it by parallelize(get_peft_model(model, config))"
        )

    @property
    def compiles(self) -> int:
        """How many times code was generated so far."""
        return sum(each.compiles for each in self._compiled)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward.

        Raises:
            BatchError: inputs that cannot be laid out.
            RequestsMixedError: a batch from ``pack`` whose requests cannot be kept apart.
            CaptureError: the model does not capture into one graph.
            FallbackError: an op fell back, to gathered inputs or a slower kernel, and the configuration is strict.
            RankMismatchError: ranks disagree on configuration, inputs or graph.
            RankFailedError: another rank raised or died.
        """
        named = dict(zip(self._signature.parameters, args, strict=False)) | kwargs
        if named.get("past_key_values") is not None:
            return self.forward_with_cache((), named)
        self._differentiates = self._records()
        kwargs = forward_options(self.module, kwargs, args, self._differentiates)
        with fingerprint.naming_failed_ranks(self.group):
            if self._differentiates:
                self._trained = check_trained(self.module, self.group, self._trained)
            named, self.layout = self._agree(args, kwargs)
            return self._run_kept_apart(args, kwargs, self._prepare(named, self.layout))

    def forward_with_cache(self, args: Sequence[Any], kwargs: Mapping[str, Any], outputs: str = "") -> Any:
        """A forward over the tokens of all calls, of which only the new rows are computed.

        Args:
            outputs: as in the configuration, to have them otherwise this once.
        """
        from sp_compile.cache import sharded

        if self.training:
            raise UnsupportedModelError(
                "a cache is for inference: to generate, call model.eval(); to train, pass no past_key_values"
            )
        self._differentiates = False
        cache, kwargs = sharded(kwargs["past_key_values"]), self.options(kwargs, args)
        try:
            with fingerprint.naming_failed_ranks(self.group):
                with self._agreement() as fields:
                    cache.check(self)
                    named = named_tensors(self.module, self._signature, args, kwargs)
                    unmasked = {name: each for name, each in named.items() if name != "attention_mask"}
                    check_inputs(unmasked, self._device(named))
                    others = {key: each for key, each in kwargs.items() if key not in (*named, "past_key_values")}
                    step, whole = cache.begin(named, self._scheme())
                    if step.promised and others.get("logits_to_keep"):
                        raise BatchError("logits_to_keep counts rows; pass a tensor of numbers of the new tokens")
                    if self._compares_inputs:
                        fields.update(fingerprint.of_inputs(named, step.lengths, others))
                        fields["the cache"] = cache.contents
                self.layout = step.layout
                step = replace(step, outputs=outputs or self.compile_config.outputs)
                result = self._run_kept_apart((), {**others, **whole, "use_cache": False}, step)
                cache.commit(self._kept)
        except BaseException:
            cache.rollback()
            raise
        finally:
            self._kept = Kept()
        return with_cache(result, cache)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' ``generate`` of the model, over the ranks, with a cache that stays spread over them.

        Takes and returns what the model's own ``generate`` does: greedy and sampled decoding, beams, streamers. Ranks
        that sample need the same seed. Pass a :class:`~sp_compile.cache.ShardedCache` as ``past_key_values`` to choose
        its size and dtype, or to go on from it.

        Raises:
            AttributeError: the model has no ``generate``.
            ConfigError: outputs stay sharded.
            RankMismatchError: ranks went on with different tokens.
        """
        if not hasattr(self.module, "generate"):
            raise AttributeError(f"{type(self.module).__name__} has no generate()")
        if self.compile_config.outputs != "full":
            raise ConfigError('generate() needs whole logits; use parallelize(model, outputs="full")')
        if kwargs.get("use_cache", True) and kwargs.get("past_key_values") is None:
            from sp_compile.cache import ShardedCache

            kwargs["past_key_values"] = ShardedCache(self)
        model: Any = copy.copy(self.module)  # as it is, but for what a call runs
        model.__dict__["forward"] = self.forward
        return model.generate(*args, **kwargs)

    def explain(self, batch: Mapping[str, Any]) -> Report:
        """Capture the forward of this batch, of training where the model trains, and run the pipeline on it only.

        Raises:
            The errors of :meth:`forward`, but for those about ranks.
        """
        with self._only_captured(batch) as (compiled, step):
            return compiled.report(step)

    def work(self, batch: Mapping[str, Any]) -> Work:
        """Capture the forward of this batch, and count what it computes for a token.

        Raises:
            The errors of :meth:`forward`, but for those about ranks.
        """
        with self._only_captured(batch) as (compiled, step):
            return compiled.work(step)

    def _records(self) -> bool:
        """Whether a forward is to be differentiated."""
        return torch.is_grad_enabled() and (self.training or self.compile_config.gradients == "always")

    @contextmanager
    def _only_captured(self, batch: Mapping[str, Any]) -> Iterator[tuple[Compiled, Step]]:
        """The graph that a forward of this batch would run, to look at meanwhile."""
        self._differentiates = self._records()
        batch = forward_options(self.module, batch, gradients=self._differentiates)
        named, self.layout = self._lay_out((), batch)
        self._explained = batch
        try:
            self._run_kept_apart((), batch, self._prepare(named, self.layout))
            raise AssertionError("the captured graph ran")
        except _Explained as explained:
            yield explained.compiled, explained.step
        finally:
            self._explained = None

    def options(self, kwargs: Mapping[str, Any], args: Sequence[Any] = ()) -> dict[str, Any]:
        """The arguments of a forward; see :func:`sp_compile.inputs.forward_options`."""
        return forward_options(self.module, kwargs, args)

    @property
    def isolated(self) -> bool:
        """Whether the pass ``isolate_requests`` kept the requests of the last forward apart."""
        return self._last is not None and self._last[1].isolated

    def report(self) -> Report:
        """What the last forward ran: passes, collectives with bytes, rows per rank, fallbacks.

        Raises:
            BatchError: there was no forward yet.
        """
        if self._last is None:
            raise BatchError("there is no report before the first forward; call the model once")
        compiled, step = self._last
        return compiled.report(step)

    def _agree(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], TokenLayout]:
        """Lay the batch out; ranks that cannot, or have another batch, are named on all."""
        with processes.advising(self.group), self._agreement() as fields:
            if self._compares_inputs:
                processes.check_caller(kwargs, self.group)
            named, layout = self._lay_out(args, kwargs)
            if self._compares_inputs:
                others = {name: each for name, each in kwargs.items() if not isinstance(each, torch.Tensor)}
                fields.update(fingerprint.of_inputs(named, layout.lengths, others))
                fields["whether pack made the batch"] = str(from_pack(named.values()))
        return named, layout

    @property
    def _compares_inputs(self) -> bool:
        return self.group.size > 1 and self.compile_config.check_inputs

    def _agreement(self) -> AbstractContextManager[dict[str, str]]:
        """An agreement of the ranks on their inputs, unless the configuration does without."""
        return fingerprint.agreement(self.group) if self.compile_config.check_inputs else nullcontext({})

    def _lay_out(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], TokenLayout]:
        named = named_tensors(self.module, self._signature, args, kwargs)
        check_inputs(named, self._device(named))
        check_labels(named, token_input(named)[1])
        lengths = request_lengths_of(named)
        return named, token_layout(lengths, self.group.size, self._scheme(lengths), min_shard_length=2)

    def _scheme(self, lengths: Sequence[int] = ()) -> str:
        """The layout scheme of requests; of new tokens beside a cache where no lengths are given."""
        if self.compile_config.scheme != "auto":
            return self.compile_config.scheme
        if not lengths:
            return "zigzag"
        hidden = getattr(getattr(self.module, "config", None), "hidden_size", HIDDEN_SIZE)
        return choose_scheme(lengths, self.group.size, PAIRS_PER_FEATURE * hidden)

    def _device(self, named: Mapping[str, torch.Tensor]) -> torch.device:
        return device_of(self.module, token_input(named)[1])

    def _prepare(self, named: Mapping[str, torch.Tensor], layout: TokenLayout) -> Step:
        tokens = token_input(named)[1]
        inputs, schedule = self._rank_inputs(layout, self.group, tokens.device), self.builder.schedule
        if self._differentiates or self.training:
            inputs = {**inputs, "seed": fresh_seed(self._draw_alike, tokens.device)}
        step = Step(layout, inputs, self._promised(named, layout), outputs=self.compile_config.outputs)
        reads = self._explained is not None or schedule.reads_reach
        counted = reads and step.apart and positions_count(named)
        return replace(step, counted=counted, asked=schedule.asked_strategies if self.group.size > 1 else None)

    def _promised(self, named: Mapping[str, torch.Tensor], layout: TokenLayout) -> bool:
        """Whether the requests of the batch must be kept apart."""
        return len(layout.lengths) > 1 and (from_pack(named.values()) or self.builder.schedule.isolates == "all")

    def _run_kept_apart(self, args: Sequence[Any], kwargs: Mapping[str, Any], step: Step) -> Any:
        """Run a forward whose requests are kept apart, isolated where the model would mix them."""
        options = {name: "" if isinstance(each, torch.Tensor) else repr(each) for name, each in kwargs.items()}
        key = (tuple(sorted(options.items())), len(args))
        if key not in self._mixing:
            try:
                return self._run_step(args, kwargs, step)
            except RequestsMixedError as error:
                if self.builder.schedule.isolates == "none" or not error.curable:
                    raise
        elif not step.promised:
            return self._run_step(args, kwargs, step)
        self._mixing.add(key)
        return self._run_step(args, without_packed_positions(self.module, kwargs), replace(step, isolated=True))

    def _run_step(self, args: Sequence[Any], kwargs: Mapping[str, Any], step: Step) -> Any:
        install_output_hooks(self.module, kwargs)
        self._step = step = self.builder.suited(step)
        if self._explained is not None:
            tensors = {name: each for name, each in kwargs.items() if isinstance(each, torch.Tensor)}
            device = self._device(tensors)
            kwargs = {**kwargs, **{name: each.to(device) for name, each in tensors.items()}}
        try:
            return self._traced(args, kwargs, sum(step.lengths), self._differentiates)
        finally:
            self._step = None

    def _backend(self, gm: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        captured, builder = Captured(gm), self.builder
        compiled = Compiled(
            build=lambda kind, sizes: builder.build(captured, kind, hints=sizes)[0],
            agree=lambda kind: builder.checked(captured, kind, trace=self._explained is not None),
            capture=partial(builder.analysed, captured),
            predict=builder.predict,
            codegen=self.compile_config.codegen,
            finish=self._finish,
            graphs=None if self.compile_config.cuda_graphs == "never" else graphs_for(device_of(self.module)),
        )
        self._compiled.append(compiled)

        def run(*given: Any) -> Any:
            step, inputs = self._step, captured.inputs(given)
            assert step is not None, "graphs run only inside forward"
            compiled.remember(inputs, self._explained)
            compiled.check_apart(step)
            if self._explained is not None:
                raise _Explained(compiled, step)
            self._last = compiled, replace(step, held=())
            values, self._kept = self._execute(compiled, inputs, step)
            return values

        return run

    def _finish(self, gm: fx.GraphModule) -> fx.GraphModule:
        """What is to run of a local graph."""
        return gm

    def _execute(self, compiled: Compiled, inputs: Sequence[Any], step: Step) -> tuple[list[Any], Kept]:
        """Run the local graph of this rank."""
        return compiled.run(inputs, step)


def _with_signature_of(model: Callable[..., Any], run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` under the signature and the docstring of the model's forward, which libraries look at."""

    @wraps(model)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return run(*args, **kwargs)

    return forward
