"""Whatever the bytes of a checkpoint or of its graph: an NMError or an answer, never another exception or a crash."""

import json
import shutil
import struct

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from optimum_nm import NMConfig, NMModelForCausalLM, NMOptimizer, session_options
from optimum_nm.errors import NMError
from optimum_nm.evaluate.onnx_decoder import OnnxDecoder
from optimum_nm.evaluate.verify import verify_checkpoint
from optimum_nm.nn.skeleton import open_checkpoint
from optimum_nm.onnx.export import export_checkpoint
from optimum_nm.packing.checkpoint import PackedCheckpoint
from optimum_nm.packing.safetensors_files import INDEX_FILE, SINGLE_FILE, locate_tensors, read_header

LAYER = "model.layers.0.mlp.up_proj"
FUZZ = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
sizes = st.integers(0, 40) | st.sampled_from([2**31, 2**32, 2**62, 2**63, 2**64, -1, True, 1.0, "4", None])
entries = (
    st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from(["U8", "I16", "F32", "F8", "", None, 3, ["U8"]]),
            "shape": st.lists(sizes, max_size=3) | json_values,
            "data_offsets": st.lists(sizes, max_size=3) | json_values,
        },
    )
    | json_values
)


def safetensors_bytes(header, data):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.fixture(scope="module")
def sound(tmp_path_factory, tiny_llama_folder, tokenizer, text):
    """One small block, int4 with outliers, exported."""
    architecture = AutoConfig.from_pretrained(tiny_llama_folder)
    architecture.num_hidden_layers, architecture.hidden_size, architecture.intermediate_size = 1, 64, 80
    architecture.head_dim = 16
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("corrupt") / "packed"
    config = NMConfig(
        weight_dtype="int4", group_size=32, outliers="4:256", calibration_samples=2, calibration_length=32
    )
    model = AutoModelForCausalLM.from_config(architecture)
    NMOptimizer(model, tokenizer).optimize(folder, config, [text], progress=False)
    export_checkpoint(folder, graph="fused")
    return folder


@pytest.fixture
def folder(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "packed")


@settings(FUZZ, max_examples=150)
@given(header=st.dictionaries(st.text(max_size=4), entries, max_size=3) | json_values, data=st.binary(max_size=64))
def test_header_of_any_json(tmp_path, header, data):
    file = tmp_path / SINGLE_FILE
    file.write_bytes(safetensors_bytes(header, data))
    try:
        tensors = read_header(file)
    except NMError as error:
        assert SINGLE_FILE in str(error)
        return
    for location in tensors.values():
        assert 0 <= location.offset <= location.offset + location.nbytes <= file.stat().st_size
        assert (
            location.nbytes % np.prod([*location.shape, 1], dtype=object) == 0
            if location.nbytes
            else 0 in location.shape
        )


@settings(FUZZ, max_examples=100)
@given(data=st.binary(max_size=80), length=st.none() | st.integers(0, 2**64 - 1) | st.integers(0, 90))
def test_header_of_any_bytes(tmp_path, data, length):
    file = tmp_path / SINGLE_FILE
    file.write_bytes(data if length is None else struct.pack("<Q", length) + data)
    try:
        assert read_header(file) == {}
    except NMError as error:
        assert SINGLE_FILE in str(error)


def test_size_that_overflows_64_bits(tmp_path):
    entry = {"dtype": "U8", "shape": [2**32, 2**32], "data_offsets": [0, 0]}
    (tmp_path / SINGLE_FILE).write_bytes(safetensors_bytes({"t": entry}, b""))
    with pytest.raises(NMError, match="gives tensor 't' 0 bytes; U8"):
        read_header(tmp_path / SINGLE_FILE)


@pytest.mark.parametrize("name", [SINGLE_FILE, INDEX_FILE, "config.json", "nm_checksums.json"])
@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff\xfe", b"null", b'"text"', b""])
def test_json_that_no_parser_likes(folder, name, content):
    (folder / name).write_bytes(struct.pack("<Q", len(content)) + content if name == SINGLE_FILE else content)
    if name != "nm_checksums.json":
        with pytest.raises(NMError):
            PackedCheckpoint(folder)
        with pytest.raises(NMError):
            NMModelForCausalLM.from_pretrained(folder)
    assert verify_checkpoint(folder).problems


@pytest.mark.parametrize("name", [SINGLE_FILE, INDEX_FILE, "config.json"])
def test_folder_where_a_file_should_be(folder, name):
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()
    with pytest.raises(NMError, match=name):
        PackedCheckpoint(folder)
    assert verify_checkpoint(folder).problems


@settings(FUZZ, max_examples=100)
@given(index=st.fixed_dictionaries({"weight_map": st.dictionaries(st.text(max_size=4), json_values)}) | json_values)
def test_index_of_any_json(tmp_path, index):
    (tmp_path / SINGLE_FILE).write_bytes(safetensors_bytes({}, b""))
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    try:
        assert locate_tensors(tmp_path) == {}
    except NMError as error:
        assert str(tmp_path) in str(error)


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/hostname", "a/b", "..", "", "a\0b", "absent"])
def test_shard_outside_the_folder(folder, shard):
    shutil.copy(folder / SINGLE_FILE, folder.parent / "outside.safetensors")
    names = PackedCheckpoint(folder).locations
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))
    with pytest.raises(NMError):
        PackedCheckpoint(folder)


@settings(FUZZ, max_examples=50)
@given(data=st.data())
def test_model_loads_or_is_refused(sound, tmp_path_factory, data):
    folder = shutil.copytree(sound, tmp_path_factory.mktemp("fuzz") / "packed")
    file = folder / SINGLE_FILE
    original = file.read_bytes()
    header = 8 + int.from_bytes(original[:8], "little")
    place = data.draw(st.integers(0, header) | st.integers(0, len(original) - 1), "place")
    junk = data.draw(st.binary(min_size=1, max_size=20), "junk")
    kept = original[place + len(junk) :] if data.draw(st.booleans(), "overwrite") else b""
    file.write_bytes(original[:place] + junk + kept)
    try:
        model = NMModelForCausalLM.from_pretrained(folder)
    except NMError as error:
        assert "\n" not in str(error)
    else:
        assert model(torch.tensor([[1, 2, 3]])).logits.shape[1] == 3
    shutil.rmtree(folder)


def external_edit(key, value):
    def edit(folder):
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        tensor = next(t for t in model.graph.initializer if t.name == f"{LAYER}.values" or t.name.endswith(".values"))
        next(entry for entry in tensor.external_data if entry.key == key).value = value
        (folder / "model.onnx").write_bytes(model.SerializeToString())

    return edit


def truncate(folder):
    file = folder / SINGLE_FILE
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def set_positions(folder):
    location = open_checkpoint(folder).locate(f"{LAYER}.positions")
    content = bytearray(location.file.read_bytes())
    content[location.offset : location.offset + location.nbytes] = b"\xff" * location.nbytes
    location.file.write_bytes(content)


DAMAGE = {
    "far offset": external_edit("offset", str(10**9)),
    "offset of 2^63": external_edit("offset", str(2**63)),
    "negative offset": external_edit("offset", "-8"),
    "offset that is no number": external_edit("offset", "here"),
    "long": external_edit("length", str(10**9)),
    "short": external_edit("length", "3"),
    "absent file": external_edit("location", "absent.safetensors"),
    "another folder": external_edit("location", "../outside.safetensors"),
    "absolute path": external_edit("location", "/etc/hostname"),
    "truncated weights": truncate,
    "missing weights": lambda folder: (folder / SINGLE_FILE).unlink(),
    "positions": set_positions,
    "no model": lambda folder: (folder / "model.onnx").write_bytes(b"\xff" * 100),
    "empty model": lambda folder: (folder / "model.onnx").write_bytes(b""),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_graph_is_refused_by_the_session(folder, damage):
    shutil.copy(folder / SINGLE_FILE, folder.parent / "outside.safetensors")
    DAMAGE[damage](folder)
    with pytest.raises(NMError, match=r"ONNX Runtime cannot load .*model\.onnx") as raised:
        OnnxDecoder(folder / "model.onnx", session_options(1))
    if damage == "positions":
        assert "MatMulNM node" in str(raised.value) and "marks" in str(raised.value)
    assert verify_checkpoint(folder).problems


def test_sound_folder_is_neither_refused_nor_changed(folder):
    assert not verify_checkpoint(folder).problems
    tokens = [1, 2, 3]
    logits = OnnxDecoder(folder / "model.onnx", session_options(1)).read(tokens)
    with torch.no_grad():
        expected = NMModelForCausalLM.from_pretrained(folder)(torch.tensor([tokens])).logits[0].numpy()
    np.testing.assert_allclose(logits, expected, atol=0.05)  # int8 activations in the one, float32 in the other
