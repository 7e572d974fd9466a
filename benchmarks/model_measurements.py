"""One measurement of one model of models.py: `python model_measurements.py KIND FOLDER NUMBER` prints a JSON object.

NUMBER is of threads for "genai" and "session", of windows for "perplexity".
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

from model_variants import EVERY_TOKEN, held_out_articles

PROMPT, LONG_PROMPT, NEW = 32, 512, 64
WINDOW = 1024


def prompt(tokens: int, first: int = 100) -> list[int]:
    """Any tokens, but none that ends a text."""
    return list(range(first, first + tokens))


def genai(folder: Path, threads: int) -> dict[str, float]:
    """In onnxruntime-genai: tokens per second of 1, 4 and 16 sequences, seconds to the first token of a long prompt."""
    import numpy as np
    import onnxruntime_genai

    from optimum_nm import library_path

    library = library_path()
    if (folder / library.name).is_file():  # the export's copy may be older
        shutil.copyfile(library, folder / library.name)
    config = onnxruntime_genai.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = onnxruntime_genai.Model(config)

    def generator(tokens: int, sequences: int = 1) -> onnxruntime_genai.Generator:
        parameters = onnxruntime_genai.GeneratorParams(model)
        length = tokens + NEW
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=sequences)
        generator = onnxruntime_genai.Generator(model, parameters)
        generator.append_tokens(np.array([prompt(tokens, first=100 + i) for i in range(sequences)], dtype=np.int32))
        return generator

    def decoded(sequences: int) -> float:
        decoding = generator(PROMPT, sequences)
        decoding.generate_next_token()
        start = time.perf_counter()
        for _ in range(NEW - 1):
            decoding.generate_next_token()
        return sequences * (NEW - 1) / (time.perf_counter() - start)

    warm = generator(PROMPT)
    for _ in range(8):
        warm.generate_next_token()
    start = time.perf_counter()
    generator(LONG_PROMPT).generate_next_token()
    first = time.perf_counter() - start
    return {"decode": decoded(1), "first": first, "decode 4": decoded(4), "decode 16": decoded(16)}


def session(folder: Path, threads: int) -> dict[str, float]:
    """In a bare InferenceSession, whose key-value cache grows: tokens per second."""
    from optimum_nm import session_options
    from optimum_nm.evaluate.onnx_decoder import OnnxDecoder

    decoder = OnnxDecoder(folder / "model.onnx", session_options(threads))
    decoder.generate(prompt(PROMPT), 8)
    decoder.reset()
    token = int(decoder.read(prompt(PROMPT))[-1].argmax())
    start = time.perf_counter()
    for _ in range(NEW):
        token = int(decoder.read([token])[-1].argmax())
    return {"session": NEW / (time.perf_counter() - start)}


def perplexity(folder: Path, windows: int) -> dict[str, float]:
    """In ONNX Runtime, on held-out articles."""
    import torch

    from optimum_nm import session_options
    from optimum_nm.evaluate.onnx_decoder import OnnxDecoder
    from optimum_nm.evaluate.perplexity import score_tokens

    decoder = OnnxDecoder(folder / EVERY_TOKEN, session_options())

    def logits(tokens: list[int]) -> torch.Tensor:
        decoder.reset()
        return torch.from_numpy(decoder.read(tokens))

    tokens = held_out_tokens(folder, windows)
    return {"perplexity": score_tokens(folder.name, "onnxruntime", logits, tokens, WINDOW, None).perplexity}


def held_out_tokens(folder: Path, windows: int) -> list[int]:
    """As many as fill so many windows; nothing predicts the first."""
    from transformers import AutoTokenizer

    from optimum_nm.evaluate.perplexity import tokenize

    return tokenize(held_out_articles(), AutoTokenizer.from_pretrained(folder), windows * WINDOW + 1)


if __name__ == "__main__":
    kind, measured, number = sys.argv[1:]
    kinds = {"genai": genai, "session": session, "perplexity": perplexity}
    print(json.dumps(kinds[kind](Path(measured), int(number))))
