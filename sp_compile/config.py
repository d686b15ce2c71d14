"""Configurations: typed schemas, YAML files and ``key=value`` overrides over them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sp_compile.config_files import Part, annotated, read_parts
from sp_compile.errors import ConfigError, nearest
from sp_compile.layout import SCHEMES

CHOICES = {
    "scheme": (*SCHEMES, "auto"),
    "outputs": ("full", "sharded", "loss"),
    "gradients": ("training", "always"),
    "codegen": ("inductor", "eager"),
    "cuda_graphs": ("auto", "never"),
    "dtype": ("float32", "float64", "bfloat16", "float16"),
    "split": ("passages", "lines", "files"),
    "device": ("auto", "cpu", "cuda"),
    "cache_dtype": (None, "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"),
}
Config = TypeVar("Config", "CompileConfig", "JobConfig")
AT_LEAST_1 = ("sp", "ranks_per_node", "repeats", "lengths", "max_requests", "max_tokens", "max_new_tokens",
              "prefill_tokens")  # fmt: skip

RATES = ("link_rate", "compute_rate")


def _least(value: Any) -> Any:
    """A number, or the least of some; 0 where there are none."""
    return min(value, default=0) if isinstance(value, list) else value


class _Checked:
    """Values with a fixed set of choices or a lower bound are checked whenever a configuration is made."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name in CHOICES and value not in CHOICES[name]:
                raise ConfigError(f"{name}={value!r} is not known; pass one of {', '.join(map(str, CHOICES[name]))}")
            if name in RATES and value is not None and not value > 0:
                raise ConfigError(f"{name}={value!r} is no rate; pass a number above 0")
            if name in AT_LEAST_1 and value is not None and _least(value) < 1:
                raise ConfigError(f"{name}={value!r} is too small; pass at least 1")


@dataclass
class CompileConfig(_Checked):
    """How a model is parallelized; the options of :func:`sp_compile.parallelize`.

    Attributes:
        scheme: who holds which tokens: ``contiguous``; ``zigzag``, which balances causal attention; ``whole``, which
            leaves short requests on one rank; ``chunked``, which balances any mix of requests; ``auto`` for what is
            predicted to be fastest for the batch (``zigzag`` for new tokens beside a cache).
        outputs: ``full``: whole, in normal order, on every rank; ``sharded``: left on the ranks;
            ``loss``: only single values, such as the loss, and None for all others; logits then never exist whole.
        codegen: ``inductor`` generates code, ``eager`` runs the rewritten graph as it is.
        cuda_graphs: ``auto`` replays steps of decoding on a GPU that come again in the same shapes, where that can be
            done (reports say where not); ``never`` runs them all.
        gradients: when torch records what is computed: ``training``: in training mode; ``always``: in evaluation too,
            unless under ``torch.no_grad``.
        strict: refuse all that reports list as fallbacks when a program is made, such as ops on gathered inputs,
            attention that was not raised, masks that were not lifted and kernels that do not run here.
        attention: strategy for attention, see the pass ``shard_attention``: ``allgather_kv``, ``fetch``, ``window``,
            ``local``, ``ring``, ``ulysses``, ``hybrid``, or ``auto`` for what is predicted to be fastest for the batch.
        ranks_per_node: how many adjacent ranks are a node, for ``hybrid``; null where that does not matter, or where
            ``parallelize`` gets a mesh.
        link_rate, compute_rate: bytes per second that reach a rank, and operations per second that it computes, by
            which ``auto`` chooses and what crosses is weighed against what is computed anew; null for what is usual
            for the device: 2e9 and 5e10 for a CPU, 4e11 and 4e14 for a GPU.
        measure_rates: measure these once, when the model is parallelized, in place of what is null.
        kernel: what computes attention on a rank: ``tiles``, ``flex``, ``fused``, ``dense``, ``dense_fp64``, or
            ``auto`` for what suits the device.
        keep_gathered: in training, keep keys and values that came from other ranks for the backward, also in
            checkpointed layers; ``False`` brings them again there, so that memory shrinks with ``sp`` (by generated
            code only).
        verify_passes: check the graph's invariants after every pass.
        check_inputs: compare the ranks' inputs before every forward.
        pipeline: pass names or ``{name: options}`` maps; the default pipeline when null.
    """

    scheme: str = "zigzag"
    outputs: str = "full"
    codegen: str = "inductor"
    cuda_graphs: str = "auto"
    gradients: str = "training"
    strict: bool = False
    attention: str = "allgather_kv"
    ranks_per_node: int | None = None
    link_rate: float | None = None
    compute_rate: float | None = None
    measure_rates: bool = False
    kernel: str = "auto"
    keep_gathered: bool = True
    verify_passes: bool = True
    check_inputs: bool = True
    pipeline: list[Any] | None = None


@dataclass
class ModelConfig(_Checked):
    """The model to run: a saved one, or random weights.

    Attributes:
        path: a ``save_pretrained`` directory or a hub id; null for random weights.
        revision: the hub revision of ``path``.
        trust_remote_code: run Python code that comes with ``path``.
        architecture: without ``path``, a class that ``AutoModelForCausalLM`` can build.
        config: without ``path``, keyword arguments of that class's transformers configuration.
        dtype: of the weights.
        attn_implementation: ``sdpa`` or ``eager``; null for the one that transformers prefers for the model.
        seed: of the random weights.
    """

    path: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    architecture: str = "LlamaForCausalLM"
    config: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    attn_implementation: str | None = None
    seed: int = 0


@dataclass
class RequestsConfig(_Checked):
    """The requests of the batch, read from text files or drawn.

    Attributes:
        files: paths or glob patterns; the text that ships with sp_compile when null.
        lengths: instead of texts, random tokens, so many of each request.
        split: one request per ``passages`` (parts between blank lines), ``lines`` or ``files``.
        max_requests: use only the first so many.
        max_tokens: cut each request after so many tokens.
    """

    files: list[str] | None = None
    lengths: list[int] | None = None
    split: str = "passages"
    max_requests: int | None = None
    max_tokens: int | None = None


@dataclass
class GenerateConfig(_Checked):
    """What the job generates, if anything.

    Attributes:
        max_new_tokens: for each request; null for a job that only prefills.
        do_sample: sample, request i with random numbers seeded by ``seed + i``; else the most probable token.
        temperature, top_k, top_p: as in transformers; null for its defaults.
        seed: of the random numbers.
        prefill_tokens: prompts are prefilled so many tokens at a time.
        page_size: tokens of a request that a rank stores together.
        cache_dtype: of the cache; null for the model's.
    """

    max_new_tokens: int | None = None
    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    prefill_tokens: int = 8192
    page_size: int = 256
    cache_dtype: str | None = None


@dataclass
class RunConfig(_Checked):
    """How the job runs.

    Attributes:
        sp: ranks that share the batch; as many are started, unless torchrun has started them.
        device: ``cuda`` needs a GPU for each rank; ``auto`` takes it where that is so.
        warmup: forwards after the first, which compiles, before any is timed.
        repeats: timed forwards; the median counts.
        compare: run the unsharded model too.
        timeout: seconds that the ranks may take in all.
        json: file for the results.
        trace: file for a timeline of one more forward, for Perfetto or chrome://tracing; each rank adds its number to
            the name. Prefill only.
    """

    sp: int = 2
    device: str = "auto"
    warmup: int = 1
    repeats: int = 3
    compare: bool = True
    timeout: float = 1800.0
    json: str | None = None
    trace: str | None = None


@dataclass
class JobConfig:
    """A job file: what ``sp-compile run`` takes."""

    model: ModelConfig = field(default_factory=ModelConfig)
    requests: RequestsConfig = field(default_factory=RequestsConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    compile: CompileConfig = field(default_factory=CompileConfig)
    run: RunConfig = field(default_factory=RunConfig)


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "requests": RequestsConfig,
    "generate": GenerateConfig,
    "compile": CompileConfig,
    "run": RunConfig,
}


COMMAND_LINE, SWEEP = "command line", "sweep"


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> JobConfig:
    """Read a job file.

    Args:
        source: a YAML file, or the name of one that ships with sp_compile, such as ``configs/prefill.yaml``; it may
            include others, see :mod:`sp_compile.config_files`.
        overrides: ``section.key=value``; the section may be left out where only one has the key.

    Raises:
        ConfigError: no such file, no valid YAML, or a key or value that the schema does not have.
    """
    return merged_job([part.content for part in job_parts(source, overrides)])


def merged_job(contents: Sequence[Mapping[str, Any]]) -> JobConfig:
    """A job out of sections of keys and values, later ones over earlier ones.

    Raises:
        ConfigError: a key or value that the schema does not have.
    """
    for each in contents:
        _check_keys(each, JobConfig, "")
    return _merge(JobConfig, contents)


def show_config(source: str | Path, overrides: Sequence[str] = ()) -> str:
    """The whole job as YAML, behind each value the file that says so, ``command line`` or ``default``.

    Raises:
        ConfigError: as :func:`load_config`.
    """
    parts = job_parts(source, overrides)
    job = merged_job([part.content for part in parts])
    return annotated(dataclasses.asdict(job), parts)


def job_parts(source: str | Path, overrides: Sequence[str] = ()) -> list[Part]:
    """What the files and overrides of a job say, in the order in which they count.

    Raises:
        ConfigError: no such file, no valid YAML, a sweep, or an override that is none.
    """
    parts = read_parts(source)
    if any(SWEEP in part.content for part in parts):
        raise ConfigError(f"{source} describes a sweep; run it with sp-compile sweep")
    return [*parts, *(Part(COMMAND_LINE, parsed(each)) for each in overrides)]


def compile_config(
    value: str | Path | Mapping[str, Any] | CompileConfig | None = None, **overrides: Any
) -> CompileConfig:
    """The compile section out of whatever ``parallelize(config=...)`` takes.

    Args:
        value: a YAML file or a mapping, either a whole job or only its compile section, or a ready configuration.
        **overrides: fields of :class:`CompileConfig`; those that are None are left as they are.

    Raises:
        ConfigError: as :func:`load_config`.
    """
    chosen = {name: each for name, each in overrides.items() if each is not None}
    _check_keys(chosen, CompileConfig, "")
    if value is None or isinstance(value, CompileConfig):
        return _merge(CompileConfig, [value or CompileConfig(), chosen])
    contents = [dict(value)] if isinstance(value, Mapping) else [part.content for part in read_parts(value)]
    return _merge(CompileConfig, [*map(_compile_section, contents), chosen])


def _compile_section(content: dict[str, Any]) -> dict[str, Any]:
    """The compile section of a whole job, or what holds nothing else."""
    if content and content.keys() <= SECTIONS.keys():
        _check_keys(content, JobConfig, "")
        content = content.get("compile") or {}
    _check_keys(content, CompileConfig, "")
    return content


def parsed(override: str) -> dict[str, Any]:
    """What one ``key=value`` says, in its section.

    Raises:
        ConfigError: it is none, or there is no such key, or more than one.
    """
    key, equals, _ = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r} is not key=value; write for example sp=2 or model.dtype=bfloat16")
    value = override.removeprefix(key)
    override = f"{full_name(key, value)}{value}"
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([override]))  # type: ignore[return-value]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{override!r} cannot be read: {' '.join(str(error).split())}") from error


def with_sections(key: str, value: Any) -> dict[str, Any]:
    """A value in the sections of its dotted name.

    Raises:
        ConfigError: there is no such key, or more than one.
    """
    for name in reversed(full_name(key).split(".")):
        value = {name: value}
    return dict(value)


def full_name(key: str, value: str = "") -> str:
    """A dotted name with its section, which may be left out.

    Args:
        value: what follows the name, for messages.

    Raises:
        ConfigError: there is no such key, or more than one.
    """
    first = key.split(".")[0]
    if first not in SECTIONS:
        owners = [name for name, kind in SECTIONS.items() if first in _fields(kind)]
        if not owners:
            known = [*SECTIONS, *(each for kind in SECTIONS.values() for each in _fields(kind))]
            raise ConfigError(f"unknown key {key!r}{nearest(first, known)}")
        if len(owners) > 1:
            raise ConfigError(f"{key!r} is a key of {' and '.join(owners)}; write {owners[0]}.{key}{value} or so")
        key = f"{owners[0]}.{key}"
    return key


def _fields(kind: type) -> dict[str, Any]:
    return {each.name: each for each in dataclasses.fields(kind)}


def _check_keys(content: Mapping[str, Any], kind: type, where: str) -> None:
    known = _fields(kind)
    for key, value in content.items():
        if key not in known:
            raise ConfigError(f"unknown key {where + str(key)!r}{nearest(str(key), known)}")
        if kind is JobConfig and value is not None:
            if not isinstance(value, Mapping):
                raise ConfigError(f"section {key!r} is {value!r}; expected keys and values")
            _check_keys(value, SECTIONS[key], f"{key}.")


def _merge(kind: type[Config], parts: Sequence[Any]) -> Config:
    """Merge parts over the schema's defaults and make the typed object."""
    try:
        merged = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), *(_present(part) for part in parts)))
    except OmegaConfBaseException as error:
        name = error.full_key or "the configuration"
        raise ConfigError(f"{name}: {str(error).splitlines()[0]}{_allowed(kind, error.full_key)}") from error
    assert isinstance(merged, kind), "OmegaConf makes what the schema says"
    return merged


def _present(part: Any) -> Any:
    """Sections left empty keep their defaults; one file name alone is a list of one."""
    if not isinstance(part, dict):
        return part
    part = {key: value for key, value in part.items() if value is not None or key not in SECTIONS}
    files = (part.get("requests") or {}).get("files")
    return part | {"requests": {**part["requests"], "files": [files]}} if isinstance(files, str) else part


def _allowed(kind: type, key: str | None) -> str:
    *sections, name = (key or "").split("[")[0].split(".")
    for section in sections[:1]:
        kind = SECTIONS.get(section, kind)
    spec = _fields(kind).get(name)
    if spec is None:
        return ""
    words = {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false", "None": "null"}
    options = [words.get(each.strip(), each.strip()) for each in str(spec.type).split("|")]
    return f"; expected {' or '.join(options)}"
