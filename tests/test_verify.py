"""`verify` finds every damage, names it, and never crashes, whatever the files hold."""

import json
import shutil

import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from optimum_nm.config import NMConfig
from optimum_nm.evaluate.verify import verify_checkpoint
from optimum_nm.nn.skeleton import open_checkpoint
from optimum_nm.onnx.operator import INPUT_NAMES, matmul_nm_node, packed_inputs
from optimum_nm.optimizer import NMOptimizer
from optimum_nm.packing.safetensors_files import locate_tensors
from optimum_nm.packing.tensor_files import tensor_checksum

LAYER = "model.layers.0.self_attn.o_proj"
INTEGERS = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def sound(tmp_path_factory, tiny_llama_folder, tokenizer, text):
    """One block: float16 codes with outliers, an int4 layer with bitmaps, a dense int8 one, and a model.onnx."""
    overrides = {
        "*.down_proj": {"weight_dtype": "int4", "group_size": 32, "positions": "bitmap", "outliers": None},
        "*.k_proj": {"weight_dtype": "int8", "pattern": "16:16", "outliers": None},
    }
    options = {"calibration_samples": 2, "calibration_length": 32, "positions": "codes"}
    config = NMConfig(outliers="16:256", overrides=overrides, **options)
    architecture = AutoConfig.from_pretrained(tiny_llama_folder)
    architecture.num_hidden_layers, architecture.hidden_size, architecture.intermediate_size = 1, 40, 56
    architecture.head_dim = 10  # the folder's own would make o_proj wider than the model
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("verify") / "packed"
    model = AutoModelForCausalLM.from_config(architecture)
    NMOptimizer(model, tokenizer).optimize(folder, config, [text], progress=False)
    write_onnx(folder)
    return folder


@pytest.fixture
def folder(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "packed")


def write_onnx(folder):
    """A graph with one MatMulNM node on the tensors of LAYER where they lie in model.safetensors."""
    checkpoint = open_checkpoint(folder)
    config, features = checkpoint.layer_config(LAYER), checkpoint.features[LAYER]
    initializers = []
    for role, (shape, element_type) in packed_inputs(*features, config).items():
        tensor = TensorProto(name=f"{LAYER}.{role}", data_type=element_type, dims=shape)
        if f"{LAYER}.{role}" in checkpoint.locations:
            location = checkpoint.locate(f"{LAYER}.{role}")
            tensor.data_location = TensorProto.EXTERNAL
            reference = {"location": location.file.name, "offset": location.offset, "length": location.nbytes}
            for key, value in reference.items():
                tensor.external_data.add(key=key, value=str(value))
        initializers.append(tensor)
    inputs = ["A", *(tensor.name for tensor in initializers), ""]
    node = matmul_nm_node(inputs, "Y", *features, config, name=LAYER)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, None]) for name in ("A", "Y")]
    onnx.save(
        helper.make_model(helper.make_graph([node], "one", values[:1], values[1:], initializers)), folder / "model.onnx"
    )


def problems(folder):
    found = verify_checkpoint(folder).problems
    assert all("\n" not in problem for problem in found)
    return found


def change(folder, change_tensors, refresh=True):
    """Rewrite model.safetensors with changed tensors; `refresh` makes checksums and model.onnx fit it again."""
    tensors = load_file(folder / "model.safetensors")
    change_tensors(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if refresh:
        checksums = {name: tensor_checksum(location) for name, location in locate_tensors(folder).items()}
        (folder / "nm_checksums.json").write_text(json.dumps(checksums))
        (folder / "model.onnx").unlink()


def test_sound_checkpoint(sound):
    found = verify_checkpoint(sound)
    assert found.problems == []
    assert found.layers == 7 and found.onnx
    assert found.tensors == found.checksums == len(load_file(sound / "model.safetensors"))
    assert "is sound" in str(found)


def test_checkpoint_without_checksums_and_graph(folder):
    (folder / "nm_checksums.json").unlink()
    (folder / "model.onnx").unlink()
    found = verify_checkpoint(folder)
    assert found.problems == [] and found.checksums == 0 and not found.onnx


def set_element(name, index, value):
    def change_tensors(tensors):
        tensors[name][index] = value

    return change_tensors


def bits(value, dtype=torch.float16):
    return torch.tensor(value, dtype=dtype).view(torch.int16)


DAMAGE = {
    "code": (set_element(f"{LAYER}.positions", (3, slice(None)), 255), f"{LAYER}.positions has"),
    "bitmap": (set_element(f"{INTEGERS}.positions", (2, 0), 255), f"{INTEGERS}.positions marks"),
    "scale": (set_element(f"{INTEGERS}.scales", (0, 0), bits(float("inf"))), f"{INTEGERS}.scales has elements"),
    "value": (set_element(f"{LAYER}.values", (0, 0), bits(float("nan"))), f"{LAYER}.values has elements"),
    "outlier value": (
        set_element(f"{LAYER}.outlier_values", (1, 0), bits(float("nan"))),
        f"{LAYER}.outlier_values has",
    ),
    "order": (set_element(f"{LAYER}.outlier_positions", (0, 0), 39), "outlier_positions does not ascend"),
    "past the row": (set_element(f"{LAYER}.outlier_positions", (0, -1), 40), "outlier_positions points past"),
    "shape": (lambda tensors: tensors.update({f"{LAYER}.values": torch.zeros(40, 23, dtype=torch.int16)}), "[40, 23]"),
    "dtype": (lambda tensors: tensors.update({f"{LAYER}.values": torch.zeros(40, 24, dtype=torch.int32)}), "I32"),
    "packed missing": (lambda tensors: tensors.pop(f"{LAYER}.positions"), f"'{LAYER}.positions' is missing"),
    "layer missing": (lambda tensors: tensors.pop(f"{LAYER}.values"), f"'{LAYER}.values' is missing"),
    "norm missing": (lambda tensors: tensors.pop("model.norm.weight"), "'model.norm.weight' is missing"),
    "norm shape": (
        lambda tensors: tensors.update({"model.norm.weight": torch.ones(41)}),
        "'model.norm.weight' has shape",
    ),
    "stranger": (lambda tensors: tensors.update({"model.stranger": torch.ones(1)}), "'model.stranger' belongs to no"),
    "useless layer": (lambda tensors: tensors.update({"lm_head.values": torch.ones(1)}), "lm_head.values is in"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_tensor_is_named(folder, damage):
    change_tensors, message = DAMAGE[damage]
    change(folder, change_tensors)
    found = problems(folder)
    assert found and any(message in problem for problem in found), found


def test_base_value_under_an_outlier(folder):
    packed = open_checkpoint(folder).packed(LAYER)
    base = packed._expand(packed._base_values())
    columns = base[0].nonzero().flatten()[: packed.tensors["outlier_positions"].shape[1]]
    change(folder, set_element(f"{LAYER}.outlier_positions", 0, columns.to(torch.uint8)))
    assert problems(folder) == [f"{LAYER}.values is not zero at the column of an outlier; it must be."]


def test_value_past_the_end_of_a_row(folder):
    """40 columns are two groups and a half; the last bit field of a bitmap then marks columns that do not exist."""

    def change_tensors(tensors):
        tensors[f"{INTEGERS}.positions"][0, -2:] = torch.tensor([0x00, 0xFF], dtype=torch.uint8)

    change(folder, change_tensors)
    (problem,) = problems(folder)
    assert problem.startswith(f"{INTEGERS}.values is not zero at a marked column past")


def test_every_problem_is_listed(folder):
    def change_tensors(tensors):
        set_element(f"{LAYER}.outlier_positions", (0, 0), 39)(tensors)
        set_element(f"{INTEGERS}.scales", (0, 0), bits(float("nan")))(tensors)
        set_element(f"{INTEGERS}.positions", (2, 0), 255)(tensors)
        tensors["model.norm.weight"] = torch.ones(41)

    change(folder, change_tensors)
    assert len(problems(folder)) == 4
    assert len(str(verify_checkpoint(folder)).splitlines()) == 4


def test_changed_bit_shows_in_the_checksum_alone(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[open_checkpoint(folder).locate("model.embed_tokens.weight").offset] ^= 1
    path.write_bytes(data)
    (problem,) = problems(folder)
    assert problem.startswith("tensor 'model.embed_tokens.weight' has checksum ")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "is not readable JSON"), (b"[1]", "holds no JSON object"), (b"{}", "has no checksum in nm_checksums.json")],
)
def test_damaged_checksums(folder, content, message):
    (folder / "nm_checksums.json").write_bytes(content)
    assert message in problems(folder)[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": "4:8"}, f"{LAYER}.values in "),
        ({"pattern": "9:8"}, "pattern '9:8' keeps 9 of 8"),
        ({"exclude": ["lm_head", "*.o_proj"]}, f"configuration excludes '{LAYER}'"),
        ({"exclude": []}, "'lm_head.values' is missing"),
        ({"overrides": 3}, "configuration has a field of the wrong type"),
        ({"format_version": 2}, "format_version is 2"),
        ({"quant_method": "other"}, "quant_method is 'other'"),
    ],
)
def test_configuration_that_does_not_fit(folder, changes, message):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))
    assert any(message in problem for problem in problems(folder))


@pytest.mark.parametrize("changes", [{"model_type": "nothing"}, {"num_attention_heads": "four"}])
def test_model_that_transformers_does_not_know(folder, changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert any("describes no model that transformers knows" in problem for problem in problems(folder))


def test_bytes_behind_the_last_tensor(folder):
    with (folder / "model.safetensors").open("ab") as stream:
        stream.write(b"xyz")
    (problem,) = problems(folder)
    assert "goes on for 3 bytes behind its last tensor" in problem


def edit_reference(role, key, value):
    def edit(graph):
        (tensor,) = (tensor for tensor in graph.initializer if tensor.name == f"{LAYER}.{role}")
        (entry,) = (entry for entry in tensor.external_data if entry.key == key)
        entry.value = value(entry.value) if callable(value) else value

    return edit


def edit_initializer(role, edit):
    return lambda graph: edit(next(tensor for tensor in graph.initializer if tensor.name == f"{LAYER}.{role}"))


def edit_attribute(name, value):
    def edit(graph):
        (attribute,) = (attribute for attribute in graph.node[0].attribute if attribute.name == name)
        attribute.CopyFrom(helper.make_attribute(name, value))

    return edit


def swap_inputs(graph):
    first, second = INPUT_NAMES.index("positions"), INPUT_NAMES.index("outlier_positions")
    inputs = graph.node[0].input
    inputs[first], inputs[second] = inputs[second], inputs[first]


GRAPH_DAMAGE = {
    "offset": (edit_reference("values", "offset", lambda offset: str(int(offset) + 1)), "where no tensor begins"),
    "far offset": (edit_reference("values", "offset", "99999999"), "which has"),
    "negative offset": (edit_reference("values", "offset", "-5"), "which has"),
    "no number": (edit_reference("values", "offset", "far"), "location, offset and length are needed"),
    "length": (
        edit_reference("values", "length", lambda length: str(int(length) - 2)),
        "in model.safetensors is FLOAT16",
    ),
    "other file": (edit_reference("values", "location", "other.safetensors"), "which is no file of the folder"),
    "outside": (edit_reference("values", "location", "../packed/model.safetensors"), "which is no file of the folder"),
    "null byte": (edit_reference("values", "location", "a\0b"), "which is no file of the folder"),
    "type": (edit_initializer("values", lambda tensor: setattr(tensor, "data_type", 1)), "is FLOAT [40, 24]"),
    "shape": (edit_initializer("values", lambda tensor: tensor.dims.reverse()), "is FLOAT16 [24, 40]"),
    "attribute": (edit_attribute("n", 7), "has n 7; the checkpoint says 8"),
    "attribute type": (edit_attribute("positions", 3), "has positions 3; the checkpoint says 'codes'"),
    "inputs": (swap_inputs, f"reads '{LAYER}.outlier_positions' as positions"),
    "no values": (lambda graph: graph.node[0].input.pop(), None),
    "foreign values": (lambda graph: graph.node[0].input.__setitem__(1, "A"), "reads values that are not those of"),
}


@pytest.mark.parametrize("damage", GRAPH_DAMAGE)
def test_graph_that_does_not_fit_the_checkpoint(folder, damage):
    edit, message = GRAPH_DAMAGE[damage]
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    edit(model.graph)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    found = problems(folder)
    assert found == [] if message is None else any(message in problem for problem in found), found


def test_location_that_is_no_text(folder):
    graph = folder / "model.onnx"
    graph.write_bytes(graph.read_bytes().replace(b"model.safetensors", b"\x80odel.safetensors"))
    assert any("which is no file of the folder" in problem for problem in problems(folder))


def test_weights_that_moved_under_the_graph(folder):
    change(folder, lambda tensors: tensors.update({"model.a_new_one": torch.ones(3)}), refresh=False)
    assert any("model.onnx: initializer" in problem for problem in problems(folder))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file_is_a_problem(folder, name):
    (folder / name).unlink()
    (problem,) = problems(folder)
    assert name in problem


FILES = ["config.json", "model.safetensors", "nm_checksums.json", "model.onnx"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(FILES), data=st.data())
def test_any_bytes_whatever_give_an_answer(sound, tmp_path_factory, name, data):
    original = (sound / name).read_bytes()
    place = data.draw(st.integers(0, len(original) - 1), "place")
    junk = data.draw(st.binary(min_size=1, max_size=40), "junk")
    kind = data.draw(st.sampled_from(["truncate", "overwrite", "insert", "replace"]), "kind")
    damaged = {
        "truncate": original[:place],
        "overwrite": original[:place] + junk + original[place + len(junk) :],
        "insert": original[:place] + junk + original[place:],
        "replace": junk,
    }[kind]
    folder = shutil.copytree(sound, tmp_path_factory.mktemp("fuzz") / "packed")
    (folder / name).write_bytes(damaged)
    found = problems(folder)
    if name == "model.safetensors" and damaged != original:
        assert found
    shutil.rmtree(folder)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    field=st.sampled_from(sorted(NMConfig().to_dict())),
    value=st.none()
    | st.integers()
    | st.floats()
    | st.text()
    | st.lists(st.integers())
    | st.dictionaries(st.text(), st.text()),
)
def test_any_value_in_the_configuration_gives_an_answer(sound, tmp_path_factory, field, value):
    folder = shutil.copytree(sound, tmp_path_factory.mktemp("fuzz") / "packed")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"][field] = value
    (folder / "config.json").write_text(json.dumps(config))
    problems(folder)
    shutil.rmtree(folder)
