"""Perplexity: every token of the text but the first is scored exactly once, whatever the window and the stride."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from optimum_nm.errors import NMError
from optimum_nm.evaluate.perplexity import cut_windows, evaluate_torch, format_perplexities, score_tokens, tokenize


@given(st.integers(2, 300), st.integers(1, 80), st.data())
def test_every_token_but_the_first_is_scored_once(tokens, window, data):
    stride = data.draw(st.integers(1, window))
    windows = cut_windows(tokens, window, stride)
    scored = [token for part in windows for token in range(part.scored_from, part.end + 1)]
    assert scored == list(range(1, tokens))
    for part in windows:
        assert part.begin < part.scored_from and part.end - part.begin <= window


def test_smaller_stride_gives_more_context():
    contexts = [part.scored_from - part.begin for part in cut_windows(1000, 64, 16)]
    assert contexts[0] == 1 and set(contexts[1:]) == {64 - 16 + 1}
    assert {part.scored_from - part.begin for part in cut_windows(1000, 64)} == {1}


def bigram_loss(table, tokens):
    log_probabilities = table.log_softmax(-1)
    return -sum(log_probabilities[before, after].item() for before, after in pairwise(tokens)) / (len(tokens) - 1)


@pytest.mark.parametrize(("window", "stride"), [(7, 7), (7, 3), (64, 1), (500, 500), (1, 1)])
def test_model_without_memory_scores_the_same_in_every_window(window, stride):
    """A bigram model needs one token of context, which every scored token has: the answer is known in closed form."""
    table = torch.randn(11, 11, generator=torch.Generator().manual_seed(0))
    tokens = torch.randint(11, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    result = score_tokens("bigram", "torch", lambda read: table[read], tokens, window, stride)
    assert result.tokens == 199
    assert result.mean_loss == pytest.approx(bigram_loss(table, tokens), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(result.mean_loss))


def test_one_window_is_the_loss_of_the_model(tiny_llama_folder, tokenizer, text):
    tokens = tokenize([text], tokenizer, 200)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder).eval()
    ids = torch.tensor([tokens])
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    result = evaluate_torch(str(tiny_llama_folder), [text], window=256, limit=200)
    assert result.mean_loss == pytest.approx(loss, rel=1e-5)
    assert result.tokens == 199


def test_context_carries_over_a_stride(tiny_llama_folder, tokenizer, text):
    """With stride 1 every token behind the first window sees exactly `window` tokens: checked one by one."""
    tokens = tokenize([text], tokenizer, 40)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder).eval()
    total = 0.0
    for target in range(1, 40):
        with torch.no_grad():
            logits = model(torch.tensor([tokens[max(0, target - 16) : target]])).logits[0, -1]
        total -= logits.log_softmax(-1)[tokens[target]].item()
    result = evaluate_torch(str(tiny_llama_folder), [text], window=16, stride=1, limit=40)
    assert result.mean_loss == pytest.approx(total / 39, rel=1e-5)


def test_documents_are_tokenized_in_order(tokenizer):
    together = tokenizer("the river")["input_ids"] + tokenizer("old stone")["input_ids"]
    assert tokenize(["the river", "old stone"], tokenizer) == together
    assert tokenize(["the river", "old stone"], tokenizer, 2) == together[:2]


def test_table_shows_the_ratio_to_the_reference(tiny_llama_folder, text):
    result = evaluate_torch(str(tiny_llama_folder), [text], window=64, limit=100)
    lines = format_perplexities([result, result]).splitlines()
    assert len(lines) == 4 and lines[2].split()[2:4] == [f"{result.perplexity:.3f}", "1.000"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 513}, "window is 513; .* reads at most 512 tokens"),
        ({"window": 8, "stride": 9}, "the stride must be between 1 and the window"),
        ({"window": 8, "stride": 0}, "the stride must be between 1 and the window"),
        ({"window": 8, "limit": 1}, "the text has 1 token"),
    ],
)
def test_window_that_cannot_be(tiny_llama_folder, text, options, message):
    with pytest.raises(NMError, match=message):
        evaluate_torch(str(tiny_llama_folder), [text], **options)


def test_model_that_predicts_nan_is_named():
    def logits(read):
        return torch.full((len(read), 9), math.nan if read[0] == 4 else 0.0)

    with pytest.raises(NMError, match="broken predicts what is not finite in the window at token 4"):
        score_tokens("broken", "torch", logits, list(range(9)), 4, 4)


def test_folder_without_a_model(tmp_path, text):
    with pytest.raises(NMError, match="cannot be loaded as a causal language model"):
        evaluate_torch(str(tmp_path), [text], window=8)
