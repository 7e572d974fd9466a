"""NMOptimizer: from a Hugging Face model to a packed checkpoint folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .calibration.mixing import Calibration, read_windows, runs_model
from .config import NMConfig
from .errors import NMError
from .nn.modeling import NMModel, load_model, load_tokenizer
from .nn.stored_weights import find_stored_weights
from .nn.weights import LoadedWeights, Weights
from .sparsify.allocate import allocate_layers
from .sparsify.architectures import decoder_blocks
from .sparsify.checkpoint import check_target, write_checkpoint
from .sparsify.distill import distill_last
from .sparsify.layer import LayerSolver, solve_layer
from .sparsify.pipeline import resolve_names, sparsify_model
from .sparsify.ranks import check_shares, count, first_rank, gather, rank
from .sparsify.summary import Allocation, SparsificationSummary
from .sparsify.together import together
from .sparsify.work_folder import WorkFolder, remove_left_over, work_folder

# Arguments of from_pretrained that say where the files are; the tokenizer is looked for in the same place.
_LOCATION_ARGUMENTS = ("cache_dir", "force_download", "gguf_file", "local_files_only", "revision", "subfolder", "token")


class NMOptimizer:
    """Sparsifies and packs a causal language model, or an encoder such as BERT.

    Args:
        model: dense, of any architecture that is a list of blocks. `optimize` turns it into the packed model.
        tokenizer: of the same model.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._weights: Weights = LoadedWeights(model)
        self._load: Callable[[], PreTrainedModel] | None = None

    @classmethod
    def from_pretrained(
        cls, model_name_or_path: str | Path, *, dtype: str | torch.dtype | None = None, **kwargs: Any
    ) -> NMOptimizer:
        """Open a model in a folder or on the Hugging Face Hub, and load its tokenizer.

        Weights in safetensors files are read while `optimize` needs them, a decoder block at a time. They are loaded
        whole when `model` is asked for before, and if they are in other files, need more than reading on loading
        (quantized models, code of the model's own), or if `kwargs` change how the model is built.

        Args:
            dtype: to load and run the model in, "float32", "bfloat16", …; None for the checkpoint's own. Weights are
                sparsified in float32 in any case; what is not packed (embeddings, norms) is saved in this type.
            kwargs: passed to the `from_pretrained` of AutoModelForCausalLM, or of AutoModel if the checkpoint is of a
                model without an output layer, as BertModel is; those that say where the files are also to the
                tokenizer.

        Raises:
            NMError: there is no such model, it is of another kind, or a tensor is missing or damaged.
        """
        where = {name: kwargs[name] for name in _LOCATION_ARGUMENTS if name in kwargs}
        shared = where | {name: kwargs[name] for name in ("trust_remote_code",) if name in kwargs}
        asked = "auto" if dtype is None else dtype

        def load() -> PreTrainedModel:
            return load_model(model_name_or_path, dtype=asked, **kwargs)

        changes = {name for name, value in kwargs.items() if value} - {*_LOCATION_ARGUMENTS}
        streamed = not changes and not where.pop("gguf_file", None)
        stored = find_stored_weights(model_name_or_path, asked, **where) if streamed else None
        optimizer = cls(load() if stored is None else stored.model, load_tokenizer(model_name_or_path, **shared))
        if stored is not None:
            optimizer._weights, optimizer._load = stored, load
        return optimizer

    @property
    def model(self) -> PreTrainedModel:
        """The model in memory, which is loaded whole if it is not there: dense before `optimize`, packed after."""
        if self._load is not None:
            self._weights, self._load = LoadedWeights(self._load()), None
        return self._weights.model

    @together()
    def optimize(
        self,
        save_dir: str | Path,
        config: NMConfig | None = None,
        calibration: Calibration = "wikitext2",
        *,
        overwrite: bool = False,
        restart: bool = False,
        memory_budget: int | str | None = None,
        progress: bool = True,
        device: str | torch.device | None = None,
    ) -> SparsificationSummary:
        """Sparsify and pack the model, and write the checkpoint folder.

        The model is changed in place: afterwards `self.model` is the packed model, and a second call needs a dense
        model again. An output layer that shares the embedding's weight gets its own copy if `config` packs it.

        Every finished decoder block is on the disk, in the folder `.NAME.nm-partial` beside `save_dir`. If the process
        ends early, however it does, the same call goes on after the last finished block, to the same bytes.

        Processes that torchrun or `accelerate launch` started work together: each runs its share of the calibration
        windows and solves its share of a block's layers, and the first writes the folder.

        Args:
            save_dir: the folder to create, on a disk that all processes see.
            config: NMConfig() by default. With `target_bits` the whole model is loaded to choose by, with `distill` the
                whole model stays in memory.
            calibration: text file, .jsonl file, "wikitext2", "c4", list of strings, or `datasets` object; "self" for
                text that the model generates, for which all its weights are loaded; or a mixture, {source: share}.
            overwrite: replace `save_dir` if it is a model folder.
            restart: do not go on with an earlier run, but begin anew.
            memory_budget: bytes ("4GB") that hidden states may take in memory; if they take more they live in the work
                folder. None for any number.
            progress: show a progress bar over the decoder blocks, and how much memory is going to be used.
            device: to compute on; where the model is by default.

        Raises:
            NMError: an input is not usable, in which case nothing is left at `save_dir`; or there is an earlier run for
                `save_dir` with another configuration, model, calibration or number of processes.
            Interrupted: the disk is full, or another process has ended.
            KeyboardInterrupt: Ctrl-C, with a sentence that says how to go on.
        """
        config = self._checked(NMConfig() if config is None else config)
        if config.distill is not None:
            _ = self.model  # whole, as for gradients through all blocks
        budget = _bytes(memory_budget)
        progress = progress and rank() == 0
        target = first_rank(partial(_free_target, save_dir, overwrite))
        with work_folder(target, restart) as work:
            if device is not None:
                self._weights.to(device)
            windows = first_rank(partial(self._windows, config, calibration, progress))
            check_shares(windows, config)
            work.begin(self._identity(config, windows))
            solved = windows[: config.calibration_samples]
            config, allocation = first_rank(partial(self._chosen, config, solved, progress, work))
            dense = self._dense_model(config)
            summary = sparsify_model(self._weights, solved, config, progress, work=work, memory_budget=budget)
            summary.allocation = allocation
            if dense is not None:
                trained = windows[: config.distill_samples]
                distill_last(self._weights.model, dense, trained, config, summary, progress, work)
            first_rank(partial(self._write, target, config, summary, work))
        if self._load is not None:
            self._load = partial(NMModel.from_pretrained, target)
        return summary

    @together()
    def sparsify(
        self,
        config: NMConfig,
        calibration: Calibration = "wikitext2",
        *,
        progress: bool = True,
        device: str | torch.device | None = None,
        solve: LayerSolver = solve_layer,
    ) -> tuple[NMConfig, SparsificationSummary]:
        """As `optimize`, in memory only.

        Args:
            solve: prunes one layer, in place of the solver that `config` names.

        Returns:
            The configuration as it was applied: with names of this model, and an override for each layer for which
            `target_bits` made the choice; and the summary.
        """
        config = self._checked(config)
        model, allocation = self.model, None
        progress = progress and rank() == 0
        if device is not None:
            self._weights.to(device)
        windows = first_rank(partial(self._windows, config, calibration, progress))
        check_shares(windows, config)
        solved = windows[: config.calibration_samples]
        if config.target_bits is not None:
            config, allocation = first_rank(partial(allocate_layers, model, solved, config, progress))
        dense = self._dense_model(config)
        summary = sparsify_model(self._weights, solved, config, progress, solve)
        summary.allocation = allocation
        if dense is not None:
            distill_last(model, dense, windows[: config.distill_samples], config, summary, progress)
        return config, summary

    def _dense_model(self, config: NMConfig) -> PreTrainedModel | None:
        """A copy of the model as it is, which distillation needs when it is dense no more."""
        return None if config.distill is None else deepcopy(self._weights.model)

    def _checked(self, config: NMConfig) -> NMConfig:
        """With the names of this model.

        Raises:
            NMError: the model is not one that this configuration can be applied to.
        """
        model = self._weights.model
        if getattr(model.config, "quantization_config", None) is not None:
            raise NMError(f"{type(model).__name__} is already quantized; a dense model is needed.")
        decoder_blocks(model)
        if config.target_bits is not None and not model.can_generate():
            raise NMError(f"target_bits goes by predictions of the next token, and {type(model).__name__} makes none.")
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and config.calibration_length > longest:
            asked = config.calibration_length
            raise NMError(f"calibration_length is {asked}; the model reads at most {longest} tokens.")
        return resolve_names(config, model)

    def _windows(self, config: NMConfig, calibration: Calibration, progress: bool) -> torch.Tensor:
        model = self._weights.model
        names = list(model.state_dict()) if runs_model(calibration) else []
        self._weights.open(names)
        windows = read_windows(
            calibration,
            model,
            self.tokenizer,
            max(config.calibration_samples, config.distill_samples),
            config.calibration_length,
            config.seed,
            config.calibration_packing,
            progress,
        )
        self._weights.close(names)
        weight = model.get_input_embeddings().weight
        assert isinstance(weight, torch.Tensor)
        if windows.max() >= len(weight):
            raise NMError(
                f"the tokenizer gives token {windows.max()}, but the model's embedding has {len(weight)} rows."
            )
        return windows

    def _identity(self, config: NMConfig, windows: torch.Tensor) -> dict[str, str]:
        """Digests of all that the result depends on, under the names users have for it."""
        settings = json.dumps(config.to_dict()).encode()
        if any(other != settings for other in gather(settings)):
            raise NMError("the processes have different configurations; start all of them with the same options.")
        return {
            "configuration": hashlib.sha256(settings).hexdigest(),
            "model": self._weights.digest(),
            "calibration text": hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
            "number of processes": str(count()),
        }

    def _chosen(
        self, config: NMConfig, windows: torch.Tensor, progress: bool, work: WorkFolder
    ) -> tuple[NMConfig, Allocation | None]:
        """The configuration as it is applied: for `target_bits`, what is chosen by the whole model."""
        if config.target_bits is None:
            return config, None
        manifest = work.manifest
        assert manifest is not None
        if manifest.chosen is not None:
            saved = manifest.chosen
            return NMConfig.from_dict(saved["config"]), Allocation.from_dict(saved["allocation"])
        names = list(self._weights.model.state_dict())
        self._weights.open(names)
        config, allocation = allocate_layers(self._weights.model, windows, config, progress)
        self._weights.close(names)
        work.choose({"config": config.to_dict(), "allocation": asdict(allocation)})
        return config, allocation

    def _write(self, target: Path, config: NMConfig, summary: SparsificationSummary, work: WorkFolder) -> None:
        model = self._weights.model
        write_checkpoint(work.new_checkpoint(), model, self.tokenizer, config, summary, work.tensors())
        work.publish(target)


def _free_target(save_dir: str | Path, overwrite: bool) -> Path:
    """As `check_target`, after what is left of a run that has been published is removed."""
    remove_left_over(Path(save_dir).expanduser().absolute())
    return check_target(save_dir, overwrite)


def _bytes(size: int | str | None) -> int | None:
    """The bytes of "4GB".

    Raises:
        NMError: it is not a size.
    """
    if size is None or isinstance(size, int):
        return size
    try:
        return convert_file_size_to_int(size)
    except ValueError:
        raise NMError(f"memory_budget is {size!r}; it must be a number of bytes, as 4GB.") from None
