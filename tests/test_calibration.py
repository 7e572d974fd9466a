"""Calibration text from every kind of source, and windows cut from it."""

import gzip
import json

import datasets
import pytest
import torch

from optimum_nm.calibration import sources
from optimum_nm.calibration.sources import read_documents
from optimum_nm.calibration.windows import calibration_windows
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
