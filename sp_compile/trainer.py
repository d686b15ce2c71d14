"""transformers' Trainer for models whose tokens are spread over all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
import transformers
from transformers.utils import can_return_loss, find_labels

from sp_compile import fingerprint
from sp_compile.errors import ConfigError
from sp_compile.processes import check_spread, tell
from sp_compile.runtime import ParallelModule
from sp_compile.training import check_weights


class Trainer(transformers.Trainer):
    """``transformers.Trainer`` for what :func:`~sp_compile.parallelize` returned: losses, metrics and weights as there.

    All ranks make one, with the same arguments; each batch is that of one process, and its tokens are spread over the
    ranks. Rank 0 writes checkpoints, which hold the model that was parallelized: they load without sp_compile, and a
    run resumes from them with any number of ranks. For another library's trainer, derive from both::

        class SFTTrainer(sp_compile.Trainer, trl.SFTTrainer): ...

    Raises:
        UnsupportedModelError: the model is not from ``parallelize``.
        MeshError: it is spread over a part of the ranks only, as in a world of data-parallel groups.
        ConfigError: DeepSpeed, FSDP, a ``parallelism_config``, ``torch_compile`` or a hyperparameter search.
        RankMismatchError: ranks have different weights after a checkpoint was loaded.
        RankFailedError: another rank could not write or read a checkpoint.
    """

    model: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        plain = self._plain
        base = type(plain.get_base_model() if hasattr(plain, "get_base_model") else plain)
        if self.args.label_names is None:
            self.label_names = find_labels(base)
        self.can_return_loss = can_return_loss(base)

    @property
    def _plain(self) -> Any:
        """The model that was parallelized."""
        return self.model.module

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator, and tell it that the ranks are one process."""
        super().create_accelerator_and_postprocess()
        if self.model is not None:
            check_spread(self.model)
        tell(self.accelerator)
        self.args._n_gpu = min(self.args.n_gpu, 1)

    def call_model_init(self, trial: Any = None) -> Any:
        """Call ``model_init``, which has to parallelize the model."""
        model = super().call_model_init(trial)
        check_spread(model)
        return model

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> Any:
        """Refused.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("hyperparameter_search would try other values on each rank; search outside, a run for each")

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        state: Any = self.args.distributed_state
        rank, state.process_index = state.process_index, 0  # which seeds the loader's workers
        try:
            return super()._get_dataloader(*args, **kwargs)
        finally:
            state.process_index = rank

    def _set_signature_columns_if_needed(self) -> None:
        with self._on_plain_model():
            super()._set_signature_columns_if_needed()

    def _save(self, *args: Any, **kwargs: Any) -> None:
        with self._on_plain_model():
            super()._save(*args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        if self.args.should_save:
            super()._save_rng_state(output_dir)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with fingerprint.agreement(self.model.group):  # the other ranks wait for what rank 0 writes
            super()._save_checkpoint(model, trial)
        best = [self.state.best_model_checkpoint]
        if self.model.group.size > 1:
            dist.broadcast_object_list(best, src=0)
        self.state.best_model_checkpoint = best[0]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with self._loading():
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        with self._loading():
            super()._load_best_model()

    @contextmanager
    def _loading(self) -> Iterator[None]:
        """Load into the model that was parallelized, and check that all ranks have got the same."""
        group = self.model.group
        with fingerprint.agreement(group), self._on_plain_model():
            yield
        check_weights(self._plain, group)

    @contextmanager
    def _on_plain_model(self) -> Iterator[None]:
        parallel = self.model
        if isinstance(parallel, ParallelModule):
            self.model = parallel.module
        try:
            yield
        finally:
            self.model = parallel
