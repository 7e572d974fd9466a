"""llama.cpp beside the models of models.py, run by whatever Python has llama-cpp-python; prints a JSON object.

python llama_speed.py quantize SOURCE.gguf TARGET.gguf Q4_0
python llama_speed.py speed MODEL.gguf THREADS
python llama_speed.py perplexity MODEL.gguf TOKENS.json THREADS
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import llama_cpp
import numpy as np
import numpy.typing as npt

PROMPT, LONG_PROMPT, NEW = 32, 512, 64  # as in model_measurements.py
WINDOW = 1024


def quantize(source: str, target: str, kind: str) -> dict[str, float]:
    """From whatever the source holds; under another name until it is whole."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    parameters.allow_requantize = True
    parameters.nthread = 1
    unfinished = Path(f"{target}.part")
    status = llama_cpp.llama_model_quantize(source.encode(), str(unfinished).encode(), parameters)
    if status:
        sys.exit(f"llama.cpp cannot quantize {source} to {kind} (status {status}).")
    return {"bytes": unfinished.rename(target).stat().st_size}


def speed(model: str, threads: str) -> dict[str, float]:
    """Tokens per second after a short prompt, seconds to the first token after a long one."""
    context = LONG_PROMPT + NEW
    llama = llama_cpp.Llama(model, n_ctx=context, n_threads=int(threads), n_threads_batch=int(threads), verbose=False)

    def read(tokens: list[int]) -> int:
        """The most likely next token."""
        llama.eval(tokens)
        return int(_rows_of_logits(llama, 1)[0].argmax())

    def generate(count: int) -> float:
        """Seconds for so many tokens, without the first."""
        llama.reset()
        token = read(list(range(100, 100 + PROMPT)))
        start = time.perf_counter()
        for _ in range(count):
            token = read([token])
        return time.perf_counter() - start

    generate(8)
    llama.reset()
    start = time.perf_counter()
    read(list(range(100, 100 + LONG_PROMPT)))
    first = time.perf_counter() - start
    return {"decode": (NEW - 1) / generate(NEW - 1), "first": first}


def perplexity(model: str, tokens_file: str, threads: str) -> dict[str, float]:
    """Of a list of tokens, in windows as `optimum_nm.evaluate.perplexity` cuts them."""
    tokens = json.loads(Path(tokens_file).read_text())
    llama = llama_cpp.Llama(
        model,
        n_ctx=WINDOW,
        n_batch=WINDOW,
        n_ubatch=WINDOW,
        n_threads=int(threads),
        n_threads_batch=int(threads),
        logits_all=True,
        verbose=False,
    )
    total = 0.0
    for begin in range(0, len(tokens) - 1, WINDOW):
        read = tokens[begin : min(begin + WINDOW, len(tokens) - 1)]
        llama.reset()
        llama.eval(read)
        logits = _rows_of_logits(llama, len(read)).astype(np.float64)
        targets = tokens[begin + 1 : begin + 1 + len(read)]
        highest = logits.max(axis=1)
        log_sums = np.log(np.exp(logits - highest[:, None]).sum(axis=1)) + highest
        total += float((log_sums - logits[np.arange(len(read)), targets]).sum())
    return {"perplexity": float(np.exp(total / (len(tokens) - 1)))}


def _rows_of_logits(llama: llama_cpp.Llama, rows: int) -> npt.NDArray[np.float32]:
    """The last `rows` that were asked for, `[rows, vocabulary]`, valid until the next tokens are read."""
    return np.ctypeslib.as_array(llama._ctx.get_logits(), shape=(rows, llama.n_vocab()))


if __name__ == "__main__":
    kinds = {"quantize": quantize, "speed": speed, "perplexity": perplexity}
    print(json.dumps(kinds[sys.argv[1]](*sys.argv[2:])))
