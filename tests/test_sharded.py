"""A packed checkpoint in several safetensors files, and ONNX files whose external data is in several."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from convert_models import node, run, sparse, write_model
from packed_models import packed_checkpoint, random_tokens, torch_logits

from optimum_nm import NMConfig, NMModelForCausalLM, NMOptimizer
from optimum_nm.errors import NMError
from optimum_nm.evaluate.inspect import inspect_checkpoint
from optimum_nm.evaluate.onnx_decoder import OnnxDecoder
from optimum_nm.evaluate.perplexity import evaluate_onnx, evaluate_torch
from optimum_nm.evaluate.verify import verify_checkpoint
from optimum_nm.onnx.convert import convert_onnx
from optimum_nm.onnx.export import export_checkpoint
from optimum_nm.onnx.operator import is_matmul_nm
from optimum_nm.packing.safetensors_files import INDEX_FILE, SINGLE_FILE
from optimum_nm.runtime.session import session_options
from optimum_nm.sparsify import checkpoint as checkpoint_files

GRAPHS = ("fused", "traced")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, tokenizer):
    """Several files, none of which holds a whole block, and the model in torch."""
    folder = tmp_path_factory.mktemp("sharded")
    model = packed_checkpoint(folder, "llama", "int8", shard="40KB", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder)
    assert len(shards(folder)) > 3 and not (folder / SINGLE_FILE).exists()
    return folder, model


@pytest.fixture
def folder(sharded, tmp_path):
    """A copy to export into or to damage."""
    return Path(shutil.copytree(sharded[0], tmp_path / "packed"))


def shards(folder):
    return {file.name for file in folder.glob("*.safetensors")}


def external_files(path):
    """The files that the initializers of an ONNX file lie in."""
    graph = onnx.load(path, load_external_data=False).graph
    places = [entry for tensor in graph.initializer for entry in tensor.external_data if entry.key == "location"]
    return {place.value for place in places}


@pytest.mark.parametrize("graph", GRAPHS)
def test_external_data_is_all_of_the_files(sharded, folder, graph):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    path = export_checkpoint(folder, graph=graph, accuracy_level=0)
    assert external_files(path) == shards(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir() if file != path} == before
    tokens = random_tokens(40)
    decoder = OnnxDecoder(path, session_options(1))
    read = np.concatenate([decoder.read(tokens[:30]), decoder.read(tokens[30:])])
    np.testing.assert_allclose(read, torch_logits(sharded[1], tokens), atol=1e-4)
    verification = verify_checkpoint(folder)
    assert verification.onnx and not verification.problems
    inspection = inspect_checkpoint(folder)
    assert inspection.file_bytes == sum((folder / name).stat().st_size for name in shards(folder))
    assert inspection.onnx_bytes == path.stat().st_size


@pytest.mark.parametrize("graph", GRAPHS)
def test_another_folder_gets_all_files(sharded, folder, graph):
    target = folder.with_name("exported")
    path = export_checkpoint(folder, output=target, graph=graph, accuracy_level=0)
    assert shards(target) == shards(folder) == external_files(path) and not (folder / "model.onnx").exists()
    tokens = random_tokens(12)
    expected = torch_logits(sharded[1], tokens)
    np.testing.assert_allclose(OnnxDecoder(path, session_options(1)).read(tokens), expected, atol=1e-4)
    np.testing.assert_array_equal(torch_logits(NMModelForCausalLM.from_pretrained(target), tokens), expected)


@pytest.mark.parametrize("graph", GRAPHS)
def test_optimum_generates_with_it(sharded, folder, graph):
    from optimum.onnxruntime import ORTModelForCausalLM

    export_checkpoint(folder, graph=graph, accuracy_level=0)
    prompt = torch.tensor([random_tokens(9)])
    settings = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
    expected = sharded[1].generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    loaded = ORTModelForCausalLM.from_pretrained(folder, session_options=session_options(1))
    assert loaded.generate(prompt, attention_mask=torch.ones_like(prompt), **settings).tolist() == expected.tolist()


def test_genai_generates_with_it(sharded, folder):
    onnxruntime_genai = pytest.importorskip("onnxruntime_genai", reason="the extra genai is not installed")
    export_checkpoint(folder, runtime="genai", accuracy_level=0)
    prompt = random_tokens(9)
    model = onnxruntime_genai.Model(str(folder))
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=25)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(np.array([prompt], dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    generated = generator.get_sequence(0).tolist()
    settings = {"max_new_tokens": 16, "do_sample": False}
    expected = sharded[1].generate(torch.tensor([prompt]), attention_mask=torch.ones(1, 9), **settings)[0].tolist()
    assert generated == expected[: len(generated)] and len(generated) > len(prompt)


@pytest.mark.parametrize("graph", GRAPHS)
def test_perplexity_in_both_runtimes(folder, text, graph):
    export_checkpoint(folder, graph=graph, accuracy_level=0)
    read = {"documents": [text], "window": 32, "limit": 100}
    assert evaluate_onnx(folder, **read).mean_loss == pytest.approx(evaluate_torch(str(folder), **read).mean_loss)


def test_projections_of_one_input_stay_in_one_file(tiny_llama_folder, text, tmp_path, monkeypatch):
    """So that the graph can multiply by them at once, as where there is one file."""
    monkeypatch.setattr(checkpoint_files, "LARGEST_FILE", 20_000)
    calibration = {"calibration_samples": 2, "calibration_length": 32}
    NMOptimizer.from_pretrained(tiny_llama_folder).optimize(tmp_path, NMConfig(**calibration), [text], overwrite=True)
    assert len(shards(tmp_path)) > 2
    monkeypatch.undo()
    graph = onnx.load(export_checkpoint(tmp_path, graph="traced"), load_external_data=False).graph
    place = {t.name: {e.key: e.value for e in t.external_data} for t in graph.initializer if t.external_data}
    for role in ("values", "positions"):
        for block in range(2):
            parts = [place[f"model.layers.{block}.mlp.{name}_proj.{role}"] for name in ("gate", "up")]
            assert parts[0]["location"] == parts[1]["location"]
            assert int(parts[0]["offset"]) + int(parts[0]["length"]) == int(parts[1]["offset"])


def test_missing_and_damaged_files_are_named(folder):
    path = export_checkpoint(folder, graph="fused")
    index = json.loads((folder / INDEX_FILE).read_text())["weight_map"]
    name = "model.layers.1.mlp.up_proj.positions"
    damaged = folder / index[name]
    with damaged.open("r+b") as stream:
        place = next(t for t in onnx.load(path, load_external_data=False).graph.initializer if t.name == name)
        stream.seek(int(next(entry.value for entry in place.external_data if entry.key == "offset")))
        stream.write(b"\xff\xff")
    (problem,) = verify_checkpoint(folder).problems
    assert problem.startswith(f"{name} marks 16 columns in row 0, group 0")
    with pytest.raises(NMError, match=r"row 0, group 0 marks 16 columns"):
        OnnxDecoder(path, session_options(1))
    damaged.unlink()
    assert verify_checkpoint(folder).problems == [f"{damaged} cannot be read (No such file or directory)."]
    for use in (export_checkpoint, inspect_checkpoint, NMModelForCausalLM.from_pretrained):
        with pytest.raises(NMError, match=damaged.name):
            use(folder)


def test_onnx_data_in_several_files_is_converted(tmp_path):
    """As where it is in one file; what is written is one file."""
    weights = [sparse(seed=seed) for seed in range(3)]
    nodes = [node("MatMul", f"x w{index}", f"h{index}") for index in range(3)]
    nodes += [node("Add", "h0 h1", "a"), node("Add", "a h2", "y")]
    arrays = {f"w{index}": weight.T for index, weight in enumerate(weights)}
    source = write_model(tmp_path / "in.onnx", nodes, arrays)
    one, several = tmp_path / "one", tmp_path / "several"
    for folder in (one, several):
        folder.mkdir()
        model = onnx.load(source)
        options = {"all_tensors_to_one_file": folder == one, "size_threshold": 0}
        onnx.save(model, folder / "in.onnx", save_as_external_data=True, **options)
        convert_onnx(folder / "in.onnx", folder / "out.onnx", weight_dtype="float32")
    assert len(external_files(one / "in.onnx")) == 1 and len(external_files(several / "in.onnx")) == 3
    for name in ("out.onnx", "out.onnx.data"):
        assert (one / name).read_bytes() == (several / name).read_bytes()
    graph = onnx.load(several / "out.onnx", load_external_data=False).graph
    assert sum(map(is_matmul_nm, graph.node)) == 3
    np.testing.assert_allclose(run(several / "out.onnx"), run(source), atol=1e-4)
