"""NMOptimizer: from a Hugging Face model to a packed checkpoint folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .calibration.sources import CalibrationSource, read_documents
from .calibration.windows import calibration_windows
from .config import NMConfig
from .errors import NMError
from .nn.modeling import load_causal_lm, load_tokenizer
from .sparsify.allocate import allocate_layers
from .sparsify.architectures import decoder_blocks
from .sparsify.checkpoint import output_folder, write_checkpoint
from .sparsify.layer import LayerSolver, solve_layer
from .sparsify.pipeline import resolve_names, sparsify_model
from .sparsify.summary import SparsificationSummary

# Arguments of from_pretrained that say where the files are; the tokenizer is looked for in the same place.
_LOCATION_ARGUMENTS = ("cache_dir", "force_download", "gguf_file", "local_files_only", "revision", "subfolder", "token")


class NMOptimizer:
    """Sparsifies and packs a causal language model.

    Args:
        model: dense, of any architecture with decoder blocks. `optimize` turns it into the packed model.
        tokenizer: of the same model.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(
        cls, model_name_or_path: str | Path, *, dtype: str | torch.dtype | None = None, **kwargs: Any
    ) -> NMOptimizer:
        """Load a model and its tokenizer from a folder or the Hugging Face Hub.

        Args:
            dtype: to load and run the model in, "float32", "bfloat16", …; None for the checkpoint's own. Weights are
                sparsified in float32 in any case; what is not packed (embeddings, norms) is saved in this type.
            kwargs: passed to `AutoModelForCausalLM.from_pretrained`; those that say where the files are also to the
                tokenizer.

        Raises:
            NMError: there is no such model, it is not a causal language model, or a tensor is missing or damaged.
        """
        shared = {name: kwargs[name] for name in (*_LOCATION_ARGUMENTS, "trust_remote_code") if name in kwargs}
        model = load_causal_lm(model_name_or_path, dtype="auto" if dtype is None else dtype, **kwargs)
        return cls(model, load_tokenizer(model_name_or_path, **shared))

    def optimize(
        self,
        save_dir: str | Path,
        config: NMConfig | None = None,
        calibration: CalibrationSource = "wikitext2",
        *,
        overwrite: bool = False,
        progress: bool = True,
        device: str | torch.device | None = None,
    ) -> SparsificationSummary:
        """Sparsify and pack the model, and write the checkpoint folder.

        The model is changed in place: afterwards `self.model` is the packed model, and a second call needs a dense
        model again. An output layer that shares the embedding's weight gets its own copy if `config` packs it.

        Args:
            save_dir: the folder to create.
            config: NMConfig() by default.
            calibration: text file, .jsonl file, "wikitext2", "c4", list of strings, or `datasets` object.
            overwrite: replace `save_dir` if it is a model folder.
            progress: show a progress bar over the decoder blocks.
            device: to compute on; where the model is by default.

        Raises:
            NMError: an input is not usable; nothing is left at `save_dir`.
        """
        config = self._checked(NMConfig() if config is None else config)
        with output_folder(save_dir, overwrite) as folder:
            config, summary = self.sparsify(config, calibration, progress=progress, device=device)
            write_checkpoint(folder, self.model, self.tokenizer, config, summary)
        return summary

    def sparsify(
        self,
        config: NMConfig,
        calibration: CalibrationSource = "wikitext2",
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
        windows = calibration_windows(
            read_documents(calibration),
            self.tokenizer,
            config.calibration_samples,
            config.calibration_length,
            config.seed,
        )
        self._check_tokens(windows)
        if device is not None:
            self.model.to(device)  # type: ignore[arg-type]
        model, allocation = self.model.eval(), None
        if config.target_bits is not None:
            config, allocation = allocate_layers(model, windows, config, progress)
        summary = sparsify_model(model, windows, config, progress, solve)
        summary.allocation = allocation
        return config, summary

    def _checked(self, config: NMConfig) -> NMConfig:
        """With the names of this model.

        Raises:
            NMError: the model is not one that this configuration can be applied to.
        """
        if getattr(self.model.config, "quantization_config", None) is not None:
            raise NMError(f"{type(self.model).__name__} is already quantized; a dense model is needed.")
        decoder_blocks(self.model)
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and config.calibration_length > longest:
            asked = config.calibration_length
            raise NMError(f"calibration_length is {asked}; the model reads at most {longest} tokens.")
        return resolve_names(config, self.model)

    def _check_tokens(self, windows: torch.Tensor) -> None:
        weight = self.model.get_input_embeddings().weight
        assert isinstance(weight, torch.Tensor)
        if windows.max() >= len(weight):
            raise NMError(
                f"the tokenizer gives token {windows.max()}, but the model's embedding has {len(weight)} rows."
            )
