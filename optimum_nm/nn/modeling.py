"""NMModelForCausalLM: loading a packed checkpoint so that it cannot go wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..config import QUANT_METHOD
from ..errors import NMError


class NMModelForCausalLM:
    """As AutoModelForCausalLM, for packed checkpoints only.

    AutoModelForCausalLM loads them too, but only after `import optimum_nm`: before, transformers warns and returns
    randomly initialised layers.
    """

    @classmethod
    def from_pretrained(cls, model_name_or_path: str | Path, **kwargs: Any) -> PreTrainedModel:
        """Load a packed causal language model from a folder or the Hugging Face Hub.

        Args:
            kwargs: passed to `AutoModelForCausalLM.from_pretrained`.

        Raises:
            NMError: it is not a packed checkpoint, or one of its tensors is missing, truncated or inconsistent.
        """
        places = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
        where = {name: kwargs[name] for name in (*places, "trust_remote_code") if name in kwargs}
        try:
            config = AutoConfig.from_pretrained(model_name_or_path, **where)
        except Exception as error:  # transformers says in many ways that it cannot read a config.json
            raise NMError(f"{model_name_or_path} cannot be loaded as a model: {_first_line(error)}") from None
        method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
        if method != QUANT_METHOD:
            raise NMError(
                f"{model_name_or_path} has quantization method {method!r}, not {QUANT_METHOD!r}: it is not a packed "
                "checkpoint; NMOptimizer makes one."
            )
        return load_causal_lm(model_name_or_path, **kwargs)


def load_causal_lm(model_name_or_path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """AutoModelForCausalLM.from_pretrained, dense or packed, that never leaves a layer at random values.

    Raises:
        NMError: there is no such model, it is not a causal language model, or one of its tensors is missing or damaged.
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(model_name_or_path, output_loading_info=True, **kwargs)
    except NMError:
        raise
    except SafetensorError as error:
        raise NMError(f"{model_name_or_path} has a weight file that is truncated or damaged: {error}.") from None
    except (OSError, ValueError, KeyError) as error:
        reason = _first_line(error)
        raise NMError(f"{model_name_or_path} cannot be loaded as a causal language model: {reason}") from None
    model, info = loaded
    if info["missing_keys"]:
        raise NMError(f"tensor {min(info['missing_keys'])!r} is missing from {model_name_or_path}.")
    return model


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
