"""Tiny random models with a real tokenizer, and text to calibrate on."""

import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [
    "the",
    "river",
    "of",
    "stone",
    "runs",
    "under",
    "a",
    "bright",
    "old",
    "city",
    "where",
    "people",
    "count",
    "birds",
    "and",
    "write",
    "letters",
    "to",
    "winter",
]


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=4, help="how often test_resume.py kills a run (30 for a soak)")


def prose(words: int, seed: int = 0) -> str:
    """Sentences drawn at random from a few words."""
    generator = random.Random(seed)
    chosen = [generator.choice(WORDS) for _ in range(words)]
    return ". ".join(" ".join(chosen[i : i + 9]).capitalize() for i in range(0, words, 9)) + "."


@pytest.fixture(scope="session")
def text():
    return prose(6000)


@pytest.fixture(scope="session")
def tokenizer(text):
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        eos_token="<|end|>",
        pad_token="<|end|>",
        model_input_names=["input_ids", "attention_mask"],
    )


@pytest.fixture(scope="session")
def tiny_llama_folder(tmp_path_factory, tokenizer):
    """A dense checkpoint: two blocks, grouped-query heads, tied embeddings, a width that is no multiple of 256."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
