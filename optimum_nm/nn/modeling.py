"""NMModelForCausalLM: loading a packed checkpoint so that it cannot go wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

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
        except (OSError, ValueError, KeyError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise NMError(f"{model_name_or_path} cannot be loaded as a model: {reason}") from None
        method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
        if method != QUANT_METHOD:
            raise NMError(
                f"{model_name_or_path} has quantization method {method!r}, not {QUANT_METHOD!r}: it is not a packed "
                "checkpoint; NMOptimizer makes one."
            )
        return AutoModelForCausalLM.from_pretrained(model_name_or_path, **kwargs)
