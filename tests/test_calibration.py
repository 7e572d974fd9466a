"""Calibration text from every kind of source, and windows cut from it."""

import copy
import gzip
import json

import datasets
import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from optimum_nm.calibration import sources
from optimum_nm.calibration.generation import _first_tokens, generate_windows
from optimum_nm.calibration.mixing import read_windows, share_out
from optimum_nm.calibration.sources import read_documents
from optimum_nm.calibration.windows import calibration_windows, document_windows
from optimum_nm.errors import NMError

TEXTS = ["The first article.", "The second, longer article.", "The third."]


def test_text_file_is_one_document(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("\n\n".join(TEXTS), encoding="utf-8")
    assert read_documents(path) == ["\n\n".join(TEXTS)]
    assert read_documents(str(path)) == read_documents(path)


def test_jsonl_takes_objects_and_strings(tmp_path):
    path = tmp_path / "data.jsonl"
    lines = [json.dumps({"text": TEXTS[0], "id": 1}), "", json.dumps(TEXTS[1]), json.dumps({"text": TEXTS[2]})]
    path.write_text("\n".join(lines))
    assert read_documents(path) == TEXTS


def test_list_and_dataset_give_their_texts():
    assert read_documents([*TEXTS, "  "]) == TEXTS
    assert read_documents(datasets.Dataset.from_dict({"text": TEXTS, "title": ["a", "b", "c"]})) == TEXTS
    assert read_documents(datasets.Dataset.from_dict({"content": TEXTS, "id": [1, 2, 3]})) == TEXTS
    assert read_documents(datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()) == TEXTS


def test_wikitext2_reads_the_layout_of_the_hub(tmp_path, monkeypatch):
    folder = tmp_path / "wikitext"
    (folder / "wikitext-2-raw-v1").mkdir(parents=True)
    for split, texts in (("train", ["", *TEXTS]), ("test", ["Not this."])):
        datasets.Dataset.from_dict({"text": texts}).to_parquet(
            folder / "wikitext-2-raw-v1" / f"{split}-00000-of-00001.parquet"
        )
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n"
        "  - split: train\n    path: wikitext-2-raw-v1/train-*\n"
        "  - split: test\n    path: wikitext-2-raw-v1/test-*\n---\n"
    )
    monkeypatch.setitem(sources.NAMED_DATASETS["wikitext2"], "path", str(folder))
    assert read_documents("wikitext2") == TEXTS


def test_c4_reads_a_bounded_part_of_its_first_shard(tmp_path, monkeypatch):
    (tmp_path / "en").mkdir()
    with gzip.open(tmp_path / "en" / "c4-train.00000-of-01024.json.gz", "wt") as shard:
        for text in TEXTS:
            shard.write(json.dumps({"text": text, "timestamp": "2019", "url": "u"}) + "\n")
    monkeypatch.setitem(sources.NAMED_DATASETS["c4"], "path", str(tmp_path))
    assert read_documents("c4") == TEXTS
    monkeypatch.setattr(sources, "STREAM_LIMIT", 2)
    assert read_documents("c4") == TEXTS[:2]


def test_windows_are_whole_stretches_of_the_text(tokenizer):
    document = " ".join(f"{i} birds" for i in range(300))
    tokens = tokenizer(document)["input_ids"]
    windows = calibration_windows([document], tokenizer, samples=5, length=32, seed=0)
    assert windows.shape == (5, 32) and windows.dtype == torch.int64
    starts = [i for row in windows.tolist() for i in range(0, len(tokens), 32) if tokens[i : i + 32] == row]
    assert len(set(starts)) == 5


def test_unpacked_windows_are_beginnings_of_documents(tokenizer):
    documents = [f"{i} birds " * (i + 1) for i in range(20)]
    windows = read_windows(documents, None, tokenizer, 6, 32, seed=0, packing=False)
    beginnings = [tokens[:32] for text in documents if len(tokens := tokenizer(text)["input_ids"]) >= 32]
    rows = windows.tolist()
    assert windows.shape == (6, 32) and windows.dtype == torch.int64
    assert all(row in beginnings for row in rows) and len({tuple(row) for row in rows}) == 6
    assert torch.equal(windows, document_windows(documents, tokenizer, 6, 32, seed=0))
    assert not torch.equal(windows, document_windows(documents, tokenizer, 6, 32, seed=1))


def test_unpacked_windows_need_long_documents(tokenizer, caplog):
    with pytest.raises(NMError, match=r"longest document of the calibration text has \d+ tokens.* one of 32"):
        document_windows(["short", "a little longer"], tokenizer, 2, 32, seed=0)
    assert len(document_windows(["short", "long " * 40], tokenizer, 2, 32, seed=0)) == 1
    assert "makes 1 windows of 32 tokens, not the 2" in caplog.text


def test_windows_depend_on_the_seed_alone(tokenizer, text):
    documents = text.split(". ")
    first, again = (calibration_windows(documents, tokenizer, 4, 32, seed=3) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, calibration_windows(documents, tokenizer, 4, 32, seed=4))


def test_less_text_than_asked_for_gives_all_windows_and_a_warning(tokenizer, caplog):
    document = "letters to the old city " * 40
    available = len(tokenizer(document)["input_ids"]) // 64
    windows = calibration_windows([document], tokenizer, samples=1000, length=64, seed=0)
    assert len(windows) == available
    assert f"{available} windows of 64 tokens, not the 1000" in caplog.text


def test_text_shorter_than_a_window_is_refused(tokenizer):
    with pytest.raises(NMError, match=r"one window \(calibration_length\) needs 512"):
        calibration_windows(["short"], tokenizer, samples=2, length=512, seed=0)


@pytest.mark.parametrize("empty", [[], [""], ["", " \n"]])
def test_empty_list_is_refused(empty):
    with pytest.raises(NMError, match="calibration text is empty"):
        read_documents(empty)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.txt", b"", "calibration text is empty: .*data.txt holds no text"),
        ("data.txt", b"\xff\xfe\xff", "is not UTF-8 text"),
        ("data.jsonl", b'{"text": "a"}\n{"text": ', "line 2 is not valid JSON"),
        ("data.jsonl", b'{"body": "a"}\n', "line 1 has no text"),
    ],
)
def test_unusable_file_is_refused_by_name(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(NMError, match=message):
        read_documents(path)


def test_unknown_source_is_refused_by_name():
    with pytest.raises(NMError, match="'no-such-set' is neither a file nor one of wikitext2, c4"):
        read_documents("no-such-set")


def test_dataset_that_cannot_be_loaded_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sources.NAMED_DATASETS["wikitext2"], "path", str(tmp_path / "missing"))
    with pytest.raises(NMError, match="'wikitext2' could not be loaded"):
        read_documents("wikitext2")


def test_dataset_without_a_text_column_is_refused():
    with pytest.raises(NMError, match="has the columns question, answer"):
        read_documents(datasets.Dataset.from_dict({"question": ["a"], "answer": ["b"]}))


def test_item_that_is_no_string_is_refused():
    with pytest.raises(NMError, match="item 1 is of type int"):
        read_documents(["text", 3])


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def follows(model, monkeypatch):
    """Makes the model certain that a token is followed by the next one."""
    size = model.config.vocab_size

    def forward(input_ids, **kwargs):
        assert input_ids.shape[1] == 1  # what came before is in the cache
        logits = torch.full((*input_ids.shape, size), -1e4).scatter(2, (input_ids[..., None] + 1) % size, 1e4)
        return CausalLMOutputWithPast(logits=logits, past_key_values=DynamicCache())

    monkeypatch.setattr(model, "forward", forward)


def test_model_writes_whole_windows_past_the_end_of_text(model, tokenizer, follows):
    windows = generate_windows(model, tokenizer, 20, 40, seed=0, progress=False)
    assert windows.shape == (20, 40) and windows.dtype == torch.int64
    assert ((windows[:, 1:] - windows[:, :-1]) % len(tokenizer) == 1).all()
    assert tokenizer.bos_token_id is None and len(windows[:, 0].unique()) > 10
    assert (windows == tokenizer.eos_token_id).any(dim=1).sum() > (windows[:, -1] == tokenizer.eos_token_id).sum()
    assert (windows[:, 0] != tokenizer.eos_token_id).all()


def with_start(tokenizer):
    """The tokenizer with a token that every text begins with."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = tokenizer.eos_token
    return tokenizer


def test_model_begins_with_the_token_for_it(model, tokenizer, follows):
    windows = generate_windows(model, with_start(tokenizer), 2, 3, seed=0, progress=False)
    start = tokenizer.eos_token_id
    assert windows.tolist() == [[start, start + 1, start + 2]] * 2


def test_cached_generation_is_that_without_a_cache(model, tokenizer):
    """The same draws from the model's output for the whole of what is there."""
    windows = generate_windows(model, tokenizer, 3, 12, seed=5, progress=False)
    assert torch.equal(windows, generate_windows(model, tokenizer, 3, 12, seed=5, progress=False))
    assert not torch.equal(windows, generate_windows(model, tokenizer, 3, 12, seed=6, progress=False))
    generator = torch.Generator().manual_seed(5)
    tokens = _first_tokens(tokenizer, 3, generator)
    with torch.no_grad():
        for _ in range(11):
            probabilities = model(tokens).logits[:, -1].softmax(dim=-1)
            tokens = torch.cat([tokens, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
    assert torch.equal(windows, tokens)


def test_model_that_cannot_write_is_refused(model, tokenizer, monkeypatch):
    monkeypatch.setattr(model, "forward", lambda **kwargs: CausalLMOutputWithPast(logits=torch.zeros(1, 1, 9)))
    with pytest.raises(NMError, match="'llama' has no key-value cache"):
        generate_windows(model, tokenizer, 1, 4, seed=0, progress=False)
    output = CausalLMOutputWithPast(logits=torch.full((1, 1, 9), torch.nan), past_key_values=DynamicCache())
    monkeypatch.setattr(model, "forward", lambda **kwargs: output)
    with pytest.raises(NMError, match="output is not finite"):
        generate_windows(model, tokenizer, 1, 4, seed=0, progress=False)


def test_shares_are_of_the_windows(model, tokenizer, text, tmp_path, follows):
    path = tmp_path / "birds.txt"
    path.write_text("birds count " * 400)
    mixture = {"self": 1, str(path): 2, (text,): 1}
    windows = read_windows(mixture, model, tokenizer, 9, 24, seed=0, progress=False)
    assert windows.shape == (9, 24)
    generated = ((windows[:, 1:] - windows[:, :-1]) % len(tokenizer) == 1).all(dim=1)
    birds = torch.tensor(["birds count birds count" in tokenizer.decode(window) for window in windows])
    assert generated.sum() == 2 and birds.sum() == 5 and not (generated & birds).any()
    assert torch.equal(windows, read_windows(mixture, model, tokenizer, 9, 24, seed=0, progress=False))
    assert not generated[:2].all()  # the order is mixed


def test_one_source_is_read_as_it_is(model, tokenizer, text):
    windows = read_windows([text], model, tokenizer, 4, 32, seed=1)
    assert torch.equal(windows, calibration_windows([text], tokenizer, 4, 32, seed=1))


@pytest.mark.parametrize(
    ("shares", "samples", "counts"),
    [
        ({"a": 0.5, "b": 0.5}, 5, {"a": 3, "b": 2}),
        ({"a": 3, "b": 1}, 8, {"a": 6, "b": 2}),
        ({"a": 0.34, "b": 0.33, "c": 0.33}, 4, {"a": 2, "b": 1, "c": 1}),
    ],
)
def test_shares_are_rounded_by_largest_remainders(shares, samples, counts):
    assert share_out(shares, samples) == counts


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({}, "a mapping without sources"),
        ({"a": 0}, "source 'a' has share 0; it must be a number above 0"),
        ({"a": "half"}, "source 'a' has share 'half'"),
        ({"a": True}, "source 'a' has share True"),
        ({"a": 100, "b": 1}, "source 'b' has a share of 0.0099, less than one window of calibration_samples=4"),
    ],
)
def test_unusable_share_is_refused_by_name(shares, message):
    with pytest.raises(NMError, match=message):
        share_out(shares, 4)
