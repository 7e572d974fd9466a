"""One measurement of one exported model: `python -m optimum_nm.evaluate.measure SPECIFICATION`, a process of its own.

Imports nothing but ONNX Runtime, so that the memory measured is the model's. Prints one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from ..errors import NMError
from ..memory import memory_bytes
from ..runtime.session import session_options
from .onnx_decoder import OnnxDecoder

WARM_UP_TOKENS = 4


def measure(path: Path, threads: int | None, vocabulary: int, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    """Load, read a prompt, decode greedily.

    Returns:
        load_seconds; prefill and decode in tokens per second, decode after the prompt and without its first token;
        resident_bytes and peak_bytes, both what the process grew by from before it loaded the model: at the end, and at
        most (loading included).
    """
    prompt = prompt_tokens_of(vocabulary, prompt_tokens)
    resident_before, peak_before = memory_bytes()
    start = time.perf_counter()
    decoder = OnnxDecoder(path, session_options(threads))
    loaded = time.perf_counter()
    decoder.generate(prompt, WARM_UP_TOKENS)
    decoder.reset()
    prefill_start = time.perf_counter()
    token = int(decoder.read(prompt)[-1].argmax())
    decode_start = time.perf_counter()
    for _ in range(new_tokens):
        token = int(decoder.read([token])[-1].argmax())
    end = time.perf_counter()
    resident, peak = memory_bytes()
    return {
        "load_seconds": loaded - start,
        "prefill": prompt_tokens / (decode_start - prefill_start),
        "decode": new_tokens / (end - decode_start),
        "resident_bytes": max(resident - resident_before, 0),
        "peak_bytes": peak - peak_before,
    }


def prompt_tokens_of(vocabulary: int, count: int) -> list[int]:
    """Any tokens, but always the same."""
    return [(31 * index + 7) % vocabulary for index in range(count)]


if __name__ == "__main__":
    specification = json.loads(sys.argv[1])
    try:
        print(json.dumps(measure(Path(specification.pop("path")), **specification)))
    except NMError as error:
        sys.exit(" ".join(str(error).split()))
