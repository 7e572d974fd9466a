"""What onnxruntime-genai needs beside model.onnx: genai_config.json, and the operator library in the same folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx

from ..errors import NMError
from ..runtime.library import library_path
from .external_data import MODEL_FILE

RUNTIMES = ("onnxruntime", "genai")
CONFIG_FILE = "genai_config.json"
TOKENIZER_FILE = "tokenizer.json"
_LONGEST = 4096  # tokens that room is made for when a program asks for no other number


def add_genai_files(folder: Path, graph: onnx.GraphProto) -> list[Path]:
    """Make a checkpoint folder with a fused model.onnx one that onnxruntime-genai loads.

    The library is copied, because onnxruntime-genai opens none outside the folder.

    Args:
        folder: has config.json and the tokenizer's files.
        graph: of model.onnx.

    Returns:
        The files written.

    Raises:
        NMError: the folder has no tokenizer.json, or the library is missing.
    """
    _simplify_decoder(folder / TOKENIZER_FILE)
    library = library_path()
    if library.parent.resolve() != folder.resolve():
        shutil.copyfile(library, folder / library.name)
    config = genai_config(folder, graph, library.name)
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    return [folder / CONFIG_FILE, folder / library.name]


def genai_config(folder: Path, graph: onnx.GraphProto, library: str) -> dict[str, Any]:
    """The content of genai_config.json: the model's dimensions, the graph's names, greedy search by default."""
    model = json.loads((folder / "config.json").read_text())
    generation = _read(folder / "generation_config.json")
    tokens = {name: generation.get(name, model.get(name)) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if tokens["pad_token_id"] is None:
        ends = tokens["eos_token_id"]
        tokens["pad_token_id"] = ends[0] if isinstance(ends, list) else ends
    heads, context = model["num_attention_heads"], model["max_position_embeddings"]
    names = [value.name for value in graph.input if not value.name.startswith("past_key_values.")]
    past = {f"past_{part}_names": f"past_key_values.%d.{part}" for part in ("key", "value")}
    present = {f"present_{part}_names": f"present.%d.{part}" for part in ("key", "value")}
    decoder = {
        "session_options": {"custom_ops_library": library, "provider_options": []},
        "filename": MODEL_FILE,
        "head_size": model.get("head_dim") or model["hidden_size"] // heads,
        "hidden_size": model["hidden_size"],
        "num_attention_heads": heads,
        "num_hidden_layers": model["num_hidden_layers"],
        "num_key_value_heads": model.get("num_key_value_heads") or heads,
        "inputs": {name: name for name in names} | past,
        "outputs": {"logits": "logits"} | present,
    }
    search = {
        "do_sample": False,
        "max_length": min(context, _LONGEST),
        "num_beams": 1,
        "past_present_share_buffer": any(node.op_type == "GroupQueryAttention" for node in graph.node),
    }
    return {
        "model": {
            "type": "decoder",
            "vocab_size": model["vocab_size"],
            "context_length": context,
            **{name: value for name, value in tokens.items() if value is not None},
            "decoder": decoder,
        },
        "search": search,
    }


def _simplify_decoder(path: Path) -> None:
    """Leave a byte-level tokenizer nothing but the byte-level step in its decoder.

    Tokenizers converted from GGUF files have steps of SentencePiece before it, which change nothing, but for which
    onnxruntime-genai takes the whole for a SentencePiece tokenizer and loses every space.
    """
    if not path.is_file():
        raise NMError(f"{path.parent} has no {path.name}, which onnxruntime-genai needs; save the tokenizer there.")
    tokenizer = json.loads(path.read_text())
    steps = (tokenizer.get("decoder") or {}).get("decoders", [])
    if len(steps) > 1 and steps[-1]["type"] == (tokenizer.get("pre_tokenizer") or {}).get("type") == "ByteLevel":
        tokenizer["decoder"] = steps[-1]
        path.write_text(json.dumps(tokenizer, indent=2, ensure_ascii=False) + "\n")


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
