"""NMModel and NMModelForCausalLM: loading a packed checkpoint so that it cannot go wrong."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from ..config import QUANT_METHOD
from ..errors import NMError


class NMModel:
    """As AutoModel and AutoModelForCausalLM, whichever the checkpoint is for, for packed checkpoints only.

    transformers' own loaders read them too, but only after `import optimum_nm`: before, they warn and return randomly
    initialised layers.
    """

    @classmethod
    def from_pretrained(cls, model_name_or_path: str | Path, **kwargs: Any) -> PreTrainedModel:
        """Load a packed model from a folder or the Hugging Face Hub.

        Args:
            kwargs: passed to transformers' `from_pretrained`.

        Raises:
            NMError: it is not a packed checkpoint, or one of its tensors is missing, truncated or inconsistent.
        """
        config = _read_config(model_name_or_path, kwargs)
        method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
        if method != QUANT_METHOD:
            raise NMError(
                f"{model_name_or_path} has quantization method {method!r}, not {QUANT_METHOD!r}: it is not a packed "
                "checkpoint; NMOptimizer makes one."
            )
        return cls._load(model_name_or_path, **kwargs)

    @staticmethod
    def _load(model_name_or_path: str | Path, **kwargs: Any) -> PreTrainedModel:
        return load_model(model_name_or_path, **kwargs)


class NMModelForCausalLM(NMModel):
    """As AutoModelForCausalLM, for packed checkpoints only."""

    @staticmethod
    def _load(model_name_or_path: str | Path, **kwargs: Any) -> PreTrainedModel:
        return load_causal_lm(model_name_or_path, **kwargs)


def auto_class(config: PretrainedConfig) -> Any:
    """AutoModel if the checkpoint is of a model without an output layer, as BertModel is; else AutoModelForCausalLM."""
    bases: set[str] = set()
    for names in MODEL_MAPPING_NAMES.values():
        bases.update([names] if isinstance(names, str) else names)
    architecture = (config.architectures or [""])[0]
    return AutoModel if architecture in bases else AutoModelForCausalLM


def load_model(model_name_or_path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """As `load_causal_lm`, for encoders too: of the class that `auto_class` finds."""
    auto: Any = AutoModelForCausalLM
    if "gguf_file" not in kwargs:
        with suppress(NMError):  # which loading then explains
            auto = auto_class(_read_config(model_name_or_path, kwargs))
    return _load(auto, model_name_or_path, **kwargs)


def load_causal_lm(model_name_or_path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """AutoModelForCausalLM.from_pretrained, dense or packed, that never leaves a layer at random values.

    Raises:
        NMError: there is no such model, it is not a causal language model, or one of its tensors is missing or damaged.
    """
    return _load(AutoModelForCausalLM, model_name_or_path, **kwargs)


def _load(auto: Any, model_name_or_path: str | Path, **kwargs: Any) -> PreTrainedModel:
    try:
        loaded: Any = auto.from_pretrained(model_name_or_path, output_loading_info=True, **kwargs)
    except NMError:
        raise
    except SafetensorError as error:
        raise NMError(f"{model_name_or_path} has a weight file that is truncated or damaged: {error}.") from None
    except (OSError, ValueError, KeyError) as error:
        kind = "model" if auto is AutoModel else "causal language model"
        raise NMError(f"{model_name_or_path} cannot be loaded as a {kind}: {_first_line(error)}") from None
    model, info = loaded
    if info["missing_keys"]:
        raise NMError(f"tensor {min(info['missing_keys'])!r} is missing from {model_name_or_path}.")
    return model


def _read_config(model_name_or_path: str | Path, options: dict[str, Any]) -> PretrainedConfig:
    places = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
    where = {name: options[name] for name in (*places, "trust_remote_code") if name in options}
    try:
        return AutoConfig.from_pretrained(model_name_or_path, **where)
    except Exception as error:  # transformers says in many ways that it cannot read a config.json
        raise NMError(f"{model_name_or_path} cannot be loaded as a model: {_first_line(error)}") from None


def load_tokenizer(model_name_or_path: str | Path, **kwargs: Any) -> PreTrainedTokenizerBase:
    """AutoTokenizer.from_pretrained.

    Raises:
        NMError: there is none that can be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(model_name_or_path, **kwargs)
    except (OSError, ValueError, KeyError) as error:
        raise NMError(f"{model_name_or_path} has no tokenizer that can be loaded: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
