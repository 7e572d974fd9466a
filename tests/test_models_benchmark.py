"""benchmarks/models.py on a tiny model: rivals compute the same model, what is measured goes into the tables."""

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoModelForCausalLM

from optimum_nm import session_options
from optimum_nm.evaluate.onnx_decoder import OnnxDecoder

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import model_measurements
import model_variants
import models

TOKENS = [5, 9, 200, 41, 17, 8, 150, 33]
NAMES = ["float32", "int8 block 32", "int4 block 32", "8:16 float16", "8:16 int4"]
SHAPE = "tiny"


@pytest.fixture(scope="module")
def work(tmp_path_factory, tiny_llama_folder, text):
    """Built in this process, as `build_models` does in processes of their own."""
    folder = tmp_path_factory.mktemp("models")
    data = SimpleNamespace(smollm2=lambda: (tiny_llama_folder, None), wikipedia_articles=lambda: ([text], [text]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_variants, "demo_data", lambda: data)
        patch.setitem(model_variants.SHAPES, SHAPE, (64, 96, 2, 4, 2, 700))
        torch.manual_seed(0)
        for name in ("dense", *NAMES):
            model_variants.build_one(folder, SHAPE, name)
        yield folder


def folder_of(work, name):
    return work / SHAPE / model_variants.folder_name(name)


@pytest.mark.parametrize(("name", "error"), [("float32", 1e-3), ("int8 block 32", 0.05), ("int4 block 32", 0.4)])
def test_rivals_compute_the_dense_model(work, name, error):
    model = AutoModelForCausalLM.from_pretrained(work / SHAPE / "dense", dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([TOKENS])).logits[0].numpy()
    every, last = (
        OnnxDecoder(folder_of(work, name) / file, session_options(1)).read(TOKENS)
        for file in (model_variants.EVERY_TOKEN, "model.onnx")
    )
    assert np.linalg.norm(every - expected) <= error * np.linalg.norm(expected)
    np.testing.assert_allclose(last, every[-1:], atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_no_model_computes_what_generation_does_not_need(work, name):
    graph = onnx.load(folder_of(work, name) / "model.onnx", load_external_data=False).graph
    assert graph.output[0].type.tensor_type.shape.dim[1].dim_value == 1
    assert "GroupQueryAttention" in {node.op_type for node in graph.node}


def test_nothing_is_left_unfinished(work):
    assert not [path.name for path in (work / SHAPE).iterdir() if path.name.startswith(".")]


@pytest.fixture
def here(monkeypatch):
    """Measurements in this process."""

    def output_of(python, program, kind, *arguments):
        return getattr(model_measurements, kind)(*arguments)

    monkeypatch.setattr(models, "output_of", output_of)
    monkeypatch.setattr(model_measurements, "NEW", 9)


def test_measurements_go_on_where_they_stopped(work, here, tmp_path):
    tiny = {name: models.OnnxModel(folder_of(work, name)) for name in ("int4 block 32", "8:16 int4")}
    args = argparse.Namespace(rounds=1, threads=1, windows=1)
    models.measure(tiny, SHAPE, args, models.Results(tmp_path / "results.json"))
    first = models.Results(tmp_path / "results.json").figures
    args.rounds = 2
    models.measure(tiny, SHAPE, args, models.Results(tmp_path / "results.json"))
    figures = models.Results(tmp_path / "results.json").figures
    for name in tiny:
        rounds = figures[SHAPE][name]["rounds"]
        assert len(rounds) == 2 and rounds[0] == first[SHAPE][name]["rounds"][0]
        kinds = {"decode", "decode 4", "decode 16", "first", "session"}
        assert all(sample.keys() == kinds and min(sample.values()) > 0 for sample in rounds)
    lines = models.table(figures).splitlines()
    assert len(lines) == 2 + len(tiny) and "8:16 int4" in lines[3]
    (line,) = models.comparison(figures).splitlines()[2:]
    sizes = [figures[SHAPE][name]["bytes"] for name in ("8:16 int4", "int4 block 32")]
    assert f"{sizes[0] / sizes[1]:.2f}" in line


def test_perplexity_is_that_of_the_whole_text(work, monkeypatch, text):
    monkeypatch.setattr(model_measurements, "WINDOW", 64)
    monkeypatch.setattr(model_measurements, "held_out_articles", lambda: [text])
    for name in ("float32", "8:16 int4"):
        found = model_measurements.perplexity(folder_of(work, name), 3)["perplexity"]
        assert 300 < found < 2000  # of 700 tokens, by random weights
