"""The traced graph: every architecture and task, its weights in place, its runtimes, what export refuses."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from packed_models import MODELS, packed_checkpoint, random_tokens, torch_logits

from optimum_nm import NMModelForCausalLM
from optimum_nm.errors import NMError
from optimum_nm.evaluate.onnx_decoder import OnnxDecoder
from optimum_nm.evaluate.verify_onnx import onnx_problems
from optimum_nm.nn.skeleton import open_checkpoint
from optimum_nm.onnx.export import export_checkpoint
from optimum_nm.onnx.onnx_config import TASKS
from optimum_nm.packing.packed_weight import TENSOR_NAMES
from optimum_nm.runtime.session import session_options


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """(folder, torch model) of a model type; made once, exported to again and again."""
    made = {}

    def checkpoint(model_type):
        if model_type not in made:
            folder = tmp_path_factory.mktemp(model_type)
            made[model_type] = folder, packed_checkpoint(folder, model_type, "float16", **MODELS[model_type])
        return made[model_type]

    return checkpoint


def export(folder, task=TASKS[0], accuracy_level=0, **options):
    return export_checkpoint(folder, task=task, graph="traced", accuracy_level=accuracy_level, **options)


def plain_options():
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return options


def external_names(path):
    """Names of the initializers that refer to a file, each checked to be one of the folder's safetensors files."""
    names = set()
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            location = next(entry.value for entry in tensor.external_data if entry.key == "location")
            assert (path.parent / location).suffix == ".safetensors"
            names.add(tensor.name)
    return names


@pytest.mark.parametrize("model_type", MODELS)
def test_agrees_with_torch_with_a_prompt_and_token_by_token(checkpoints, model_type):
    folder, model = checkpoints(model_type)
    path = export(folder)
    onnx.checker.check_model(path)
    assert not list(onnx_problems(path, open_checkpoint(folder)))
    tokens = random_tokens(20)
    expected = torch_logits(model, tokens)
    for options in (session_options(1), plain_options()):  # the second runs the fallback
        decoder = OnnxDecoder(path, options)
        read = np.concatenate([decoder.read(tokens[:15]), *(decoder.read([token]) for token in tokens[15:])])
        np.testing.assert_allclose(read, expected, atol=1e-4)
    check_weights_are_the_checkpoints_own_bytes(path)


def check_weights_are_the_checkpoints_own_bytes(path):
    checkpoint = open_checkpoint(path.parent)
    roles = {f"{layer}.{role}" for layer in checkpoint.layer_names() for role in TENSOR_NAMES}
    packed = roles & checkpoint.locations.keys()
    assert packed and packed <= external_names(path)
    graph = onnx.load(path, load_external_data=False).graph
    assert sum(len(tensor.raw_data) for tensor in graph.initializer) < 10_000


def read_hidden_or_logits(path, tokens, past):
    """The first output for a prompt; in two parts, the second with the cache of the first, if the graph takes one."""
    session = onnxruntime.InferenceSession(str(path), session_options(1))
    inputs = {value.name: value.shape for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    cache = {
        name: np.zeros([size if isinstance(size, int) else int("batch" in size) for size in shape], np.float32)
        for name, shape in inputs.items()
        if name.startswith("past_key_values")
    }
    assert bool(cache) == past and names[0] in ("logits", "last_hidden_state")
    read = []
    for first, last in [(0, 5), (5, 7), (7, len(tokens))] if past else [(0, len(tokens))]:
        values = {
            "input_ids": tokens[first:last],
            "attention_mask": [1] * last,
            "position_ids": list(range(first, last)),
        }
        feeds = {name: np.array([value]) for name, value in values.items() if name in inputs}
        output, *present = session.run(names, feeds | cache)
        cache = {
            name.replace("present", "past_key_values"): array for name, array in zip(names[1:], present, strict=True)
        }
        read.append(output[0])
    return np.concatenate(read)


@pytest.mark.parametrize("task", TASKS[1:])
@pytest.mark.parametrize("model_type", MODELS)
def test_every_task(checkpoints, model_type, task):
    folder, model = checkpoints(model_type)
    path = export(folder, task)
    tokens = random_tokens(9)
    inputs = {"input_ids": torch.tensor([tokens])}
    with torch.no_grad():
        expected = model(**inputs).logits if task == "text-generation" else model.base_model(**inputs)[0]
    read = read_hidden_or_logits(path, tokens, task.endswith("-with-past"))
    np.testing.assert_allclose(read, expected[0].numpy(), atol=1e-4)
    assert not list(onnx_problems(path, open_checkpoint(folder)))


@pytest.mark.parametrize(
    "weight_dtype,stored_dtype",
    [
        ("float32", torch.float16),
        ("float16", torch.bfloat16),
        ("bfloat16", torch.float16),
        ("int8", torch.bfloat16),
        ("int4", torch.float16),
    ],
)
def test_agrees_with_torch_in_every_type(tmp_path, weight_dtype, stored_dtype):
    model = packed_checkpoint(tmp_path, "qwen2", weight_dtype, stored_dtype)
    tokens = random_tokens(12)
    path = export(tmp_path)
    for options in (session_options(1), plain_options()):
        np.testing.assert_allclose(OnnxDecoder(path, options).read(tokens), torch_logits(model, tokens), atol=1e-3)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_ort_model_generates_the_tokens_of_torch(checkpoints, model_type):
    from optimum.onnxruntime import ORTModelForCausalLM

    folder, model = checkpoints(model_type)
    path = export(folder)
    prompt = torch.tensor([random_tokens(9)])
    settings = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None}
    expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    loaded = ORTModelForCausalLM.from_pretrained(folder, session_options=session_options(1))
    assert loaded.generate(prompt, attention_mask=torch.ones_like(prompt), **settings).tolist() == expected.tolist()
    bare = OnnxDecoder(path, session_options(1)).generate(prompt[0].tolist(), 16)
    assert bare == expected[0, prompt.shape[1] :].tolist()


def test_sharded_checkpoint(tmp_path):
    model = packed_checkpoint(tmp_path, "llama", "int8", shard="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    path = export(tmp_path)
    onnx.checker.check_model(path)
    tokens = random_tokens(12)
    read = OnnxDecoder(path, session_options(1)).read(tokens)
    np.testing.assert_allclose(read, torch_logits(model, tokens), atol=1e-4)


def test_another_folder_gets_the_checkpoint_too(checkpoints, tmp_path):
    folder, model = checkpoints("qwen2")
    target = tmp_path / "new" / "exported"
    path = export(folder, output=target, fallback=False)
    assert path == target / "model.onnx" and not onnx.load(path, load_external_data=False).functions
    tokens = random_tokens(5)
    expected = torch_logits(model, tokens)
    np.testing.assert_allclose(OnnxDecoder(path, session_options(1)).read(tokens), expected, atol=1e-4)
    np.testing.assert_allclose(torch_logits(NMModelForCausalLM.from_pretrained(target), tokens), expected, atol=1e-6)
    with pytest.raises(NMError, match="exists; choose another"):
        export(folder, output=target)
    export(folder, output=target, overwrite=True)
    assert [child.name for child in (tmp_path / "new").iterdir()] == ["exported"]


@pytest.mark.parametrize("opset", [14, 17, 18])
def test_opset(checkpoints, opset):
    folder, model = checkpoints("llama")
    path = export(folder, opset=opset)
    versions = {entry.domain: entry.version for entry in onnx.load(path, load_external_data=False).opset_import}
    assert versions[""] == opset
    tokens = random_tokens(5)
    for options in (session_options(1), plain_options()):
        np.testing.assert_allclose(OnnxDecoder(path, options).read(tokens), torch_logits(model, tokens), atol=1e-4)


def test_accuracy_level_is_4_for_integers_unless_asked(tmp_path):
    packed_checkpoint(tmp_path, "llama", "int8")

    def levels(asked):
        graph = onnx.load(export(tmp_path, accuracy_level=asked), load_external_data=False).graph
        packed = [node for node in graph.node if node.op_type == "MatMulNM" and "lm_head" not in node.name]
        return {a.i for node in packed for a in node.attribute if a.name == "accuracy_level"}

    assert (levels(None), levels(0), levels(4)) == ({4}, {0}, {4})


def test_extra_memory_is_a_quarter_of_the_packed_size_at_most(tmp_path):
    program = Path(__file__).with_name("export_memory.py")
    run = subprocess.run([sys.executable, program, tmp_path], capture_output=True, text=True, env=dict(os.environ))
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["packed"] > 60e6
    assert found["extra"] < 0.25 * found["packed"], found


@pytest.fixture
def folder(checkpoints, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(checkpoints("llama")[0], tmp_path / "packed", ignore=shutil.ignore_patterns("*.onnx")))


def refused(folder, message, **options):
    before = sorted(folder.rglob("*"))
    with pytest.raises(NMError, match=message) as refusal:
        export(folder, **options)
    assert "\n" not in str(refusal.value)
    assert sorted(folder.rglob("*")) == before


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    "options,message",
    [
        ({"task": "translation"}, "task is 'translation'; it must be one of text-generation-with-past, "),
        ({"accuracy_level": 3}, "accuracy_level is 3; it must be 0 or 4, or None"),
        ({"opset": 13}, "opset is 13; it must be between 14 and "),
        ({"opset": 99}, "opset is 99; it must be between 14 and "),
        ({"runtime": "genai"}, "cannot be exported so: the traced graph was asked for"),
        ({"output": "/proc/none/out"}, "output folder /proc/none/out cannot be written"),
    ],
)
def test_refuses_options(folder, options, message):
    refused(folder, message, **options)


def test_refuses_damaged_checkpoints(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    refused(folder, "is truncated")
    file.write_bytes(b"")
    refused(folder, "is truncated or not a safetensors file")
    file.unlink()
    refused(folder, "holds neither model.safetensors nor")


@pytest.mark.parametrize(
    "name,message",
    [
        ("model.layers.1.mlp.up_proj.positions", "'model.layers.1.mlp.up_proj.positions' is missing"),
        ("model.layers.1.mlp.up_proj.values", "'model.layers.1.mlp.up_proj.weight' is missing"),
        ("model.layers.0.input_layernorm.weight", "'model.layers.0.input_layernorm.weight' is missing"),
        ("model.embed_tokens.weight", "weight' is missing"),
    ],
)
def test_refuses_missing_tensors(folder, name, message):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, message)


def test_refuses_another_pattern_than_is_stored(folder):
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    change_config(folder, quantization_config=config | {"pattern": "4:16"})
    refused(folder, "the configuration asks for")
    change_config(folder, quantization_config=config | {"format_version": 2})
    refused(folder, "format_version is 2")


def test_says_which_extra_is_missing(folder, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "exporters" in name else find_spec(name))
    refused(folder, r"optimum-onnx is not installed; `pip install optimum-nm\[onnx\]` brings it")


def test_refuses_model_types_without_an_exporter(tmp_path):
    packed_checkpoint(
        tmp_path, "jamba", attn_layer_period=1, attn_layer_offset=0, num_experts=1, use_mamba_kernels=False
    )
    refused(tmp_path, "model type 'jamba' is not one that Optimum's exporter supports")


def test_says_why_the_exporter_failed(folder, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("an operator is missing\nfollowed by a trace")

    monkeypatch.setattr("optimum.exporters.onnx.export", fail)
    refused(folder, "Optimum's exporter cannot export this LlamaForCausalLM: an operator is missing$")


def test_refuses_what_is_no_checkpoint(tmp_path):
    with pytest.raises(NMError, match=r"holds no config\.json"):
        export(tmp_path)
    with pytest.raises(NMError, match=r"is no folder|holds no config"):
        export(tmp_path / "nowhere", output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_refuses_weights_behind_links(folder, tmp_path):
    (folder / "model.safetensors").rename(tmp_path / "weights")
    (folder / "model.safetensors").symlink_to(tmp_path / "weights")
    refused(folder, "is a link, which ONNX readers do not follow; export to another folder")
    export(folder, output=tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").is_symlink()


def test_failed_export_leaves_the_older_graph(folder, monkeypatch):
    path = export(folder)
    before = path.read_bytes()
    monkeypatch.setattr(onnx.checker, "check_model", lambda *args, **kwargs: (_ for _ in ()).throw(OSError(28, "full")))
    refused(folder, "cannot be written")
    assert path.read_bytes() == before
