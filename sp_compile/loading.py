"""Models and requests of a job: from a configuration to a module and rows of token ids."""

from __future__ import annotations

import dataclasses
import glob
import re
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sp_compile.config import ModelConfig, RequestsConfig
from sp_compile.errors import ConfigError, nearest

BEGIN = 256  # token id before the byte values of a text


def build_model(config: ModelConfig, device: torch.device | str = "cpu") -> nn.Module:
    """The model in eval mode; random weights depend on the seed alone, so all ranks draw the same.

    Args:
        config: what to build.
        device: where the weights go; on ``meta`` none are read or drawn.

    Raises:
        ConfigError: transformers is missing, or does not know or accept what the configuration says.
    """
    transformers = _transformers()
    settings = _settings(transformers, config)
    options: dict[str, Any] = {
        "dtype": getattr(torch, config.dtype),
        "attn_implementation": config.attn_implementation,
        "trust_remote_code": config.trust_remote_code,
    }
    auto = transformers.AutoModelForCausalLM
    torch.manual_seed(config.seed)
    try:
        if config.path is None or str(device) == "meta":
            with torch.device("meta" if str(device) == "meta" else "cpu"):
                model = auto.from_config(settings, **options)
        else:
            model = auto.from_pretrained(config.path, revision=config.revision, use_safetensors=True, **options)
    except (OSError, ValueError, ImportError) as error:
        where = f"model.path={config.path!r}" if config.path else f"model.architecture={config.architecture!r}"
        raise ConfigError(f"{where}: {_line(error)}") from error
    return model.to(device).eval()  # type: ignore[no-any-return]


def read_requests(config: RequestsConfig, model: ModelConfig, limits: Any) -> list[torch.Tensor]:
    """Token ids of each request, int64 ``[length]``: by the saved model's tokenizer, or a begin token and bytes.

    Args:
        config: which files, and how they are cut.
        model: whose tokenizer to use.
        limits: the model's transformers configuration; ids and lengths that it does not take are refused.

    Raises:
        ConfigError: no such file, no text in it, no tokenizer, or requests that the model does not take.
    """
    limits = limits.get_text_config() if hasattr(limits, "get_text_config") else limits
    if config.lengths is not None:
        return _drawn(config, limits)
    texts = _texts(config)
    encode = _tokenizer(model) if model.path is not None else _bytes
    rows = [encode(text)[: config.max_tokens] for text in texts[: config.max_requests]]
    _check_rows(rows, limits)
    return [torch.tensor(row) for row in rows]


def _drawn(config: RequestsConfig, limits: Any) -> list[torch.Tensor]:
    """Random tokens, the same on every rank."""
    if config.files is not None:
        raise ConfigError("requests.files and requests.lengths are both set; leave one of them out")
    assert config.lengths is not None
    lengths = [min(each, config.max_tokens or each) for each in config.lengths[: config.max_requests]]
    for i, length in enumerate(lengths):
        _check_length(i, length, limits)
    generator = torch.Generator().manual_seed(0)
    vocabulary = getattr(limits, "vocab_size", None) or 2
    return [torch.randint(vocabulary, (each,), generator=generator) for each in lengths]


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError("models are built by transformers; install it with `pip install 'sp_compile[hf]'`") from error
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _settings(transformers: Any, config: ModelConfig) -> Any:
    """The model's transformers configuration."""
    if config.path is not None:
        if config.config:
            raise ConfigError("model.config is for random weights; leave it out, or set model.path=null")
        try:
            return transformers.AutoConfig.from_pretrained(
                config.path, revision=config.revision, trust_remote_code=config.trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise ConfigError(f"model.path={config.path!r}: {_line(error)}") from error
    known = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    if config.architecture not in known:
        names = {each for each in known if isinstance(each, str)}
        raise ConfigError(f"unknown model.architecture {config.architecture!r}{nearest(config.architecture, names)}")
    kind = getattr(transformers, config.architecture).config_class
    default = kind()
    fields = {each.name for each in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else vars(default)
    for key in config.config:
        if not hasattr(default, key):
            raise ConfigError(f"unknown key 'model.config.{key}' for {kind.__name__}{nearest(key, fields)}")
    try:
        return kind(**config.config)
    except Exception as error:  # transformers' own validation has several roots
        raise ConfigError(f"model.config: {_line(error)}") from error


def _line(error: BaseException) -> str:
    """A message of several lines as one."""
    return " ".join(str(error).split())


def _texts(config: RequestsConfig) -> list[str]:
    if config.files is None:
        contents = {"the shipped text": resources.files("sp_compile").joinpath("data/passages.txt").read_text("utf-8")}
    else:
        contents = {name: _content(name) for pattern in config.files for name in _matches(pattern)}
    if config.split == "files":
        parts = list(contents.values())
    else:
        boundary = r"\n" if config.split == "lines" else r"\n[^\S\n]*\n"
        parts = [part for text in contents.values() for part in re.split(boundary, text)]
    found = [part.strip() for part in parts if part.strip()]
    if not found:
        raise ConfigError(f"there is no text in {', '.join(contents)}; a batch needs at least one request")
    return found


def _matches(pattern: str) -> list[str]:
    names = sorted(name for name in glob.glob(pattern, recursive=True) if Path(name).is_file())
    if not names:
        raise ConfigError(f"requests.files: no file matches {pattern!r}")
    return names


def _content(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is not UTF-8 text: byte {error.start} cannot be decoded") from error
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror}") from error


def _bytes(text: str) -> list[int]:
    return [BEGIN, *text.encode("utf-8")]


def _tokenizer(model: ModelConfig) -> Any:
    try:
        tokenizer = _transformers().AutoTokenizer.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except Exception as error:  # each tokenizer library has its own errors
        raise ConfigError(f"model.path={model.path!r} holds no tokenizer that can be loaded: {_line(error)}") from error
    return lambda text: tokenizer(text, verbose=False)["input_ids"]


def _check_rows(rows: list[list[int]], limits: Any) -> None:
    vocabulary = getattr(limits, "vocab_size", None)
    for i, row in enumerate(rows):
        if not row:
            raise ConfigError(f"request {i} has no tokens; the tokenizer drops all of its text")
        if vocabulary is not None and max(row) >= vocabulary:
            raise ConfigError(
                f"request {i} holds token id {max(row)}, the model has {vocabulary}; "
                f"set model.config.vocab_size to {max(row) + 1} or more, or use the tokenizer of the model"
            )
        _check_length(i, len(row), limits)


def _check_length(number: int, length: int, limits: Any) -> None:
    positions = getattr(limits, "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ConfigError(
            f"request {number} has {length} tokens, the model takes {positions} (max_position_embeddings); "
            f"set requests.max_tokens={positions} to cut requests"
        )
