"""What convert-onnx leaves, and what it refuses: by name, and with nothing written."""

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from convert_models import (
    IN,
    OUT,
    assert_same_outputs,
    convert,
    dense,
    files,
    linear_model,
    node,
    sparse,
    structure,
    two_layers,
    write_model,
)
from onnx import TensorProto, helper

from optimum_nm.errors import NMError
from optimum_nm.onnx.convert import convert_onnx


def test_a_weight_that_is_not_sparse_is_refused_by_name(tmp_path):
    weight = sparse()
    weight[3, 32:35] = 1  # the last group, eight columns wide, is full then
    weight[3, 16:32] = np.arange(16) < 9
    source = two_layers(tmp_path / "model.onnx", weight)
    before = files(tmp_path)
    message = (
        "weight 'onnx::MatMul_7' of node '/lm_head/MatMul' keeps 9 of 16 in row 3, group 1; 8:16 keeps at most 8: "
        "leave it as it is by --exclude 'lm_head', or all such by --skip-dense."
    )
    with pytest.raises(NMError) as refusal:
        convert(source)
    assert str(refusal.value) == message and files(tmp_path) == before


@pytest.mark.parametrize("wildcard", ["lm_head", "lm_*", "onnx::MatMul_7", "/lm_head/*"])
def test_exclude_takes_the_name_of_the_module_the_tensor_or_the_node(tmp_path, wildcard):
    source = two_layers(tmp_path / "model.onnx", dense())
    target, summary = convert(source, exclude=[wildcard])
    assert structure(target)[0] == ["MatMulNM", "MatMul"]
    assert [(weight.name, weight.kept_because) for weight in summary.kept] == [("lm_head", "it is excluded")]
    assert_same_outputs(source, target)


def test_skip_dense_lists_what_is_left(tmp_path):
    source = two_layers(tmp_path / "model.onnx", dense())
    target, summary = convert(source, skip_dense=True)
    assert structure(target)[0] == ["MatMulNM", "MatMul"]
    assert "Left as it is: lm_head, because it keeps 16 of 16 in row 0, group 0." in str(summary).splitlines()
    assert summary.bytes_after == sum(os.path.getsize(f"{target}{suffix}") for suffix in ("", ".data"))


def truncate(source):
    source.write_bytes(source.read_bytes()[:-100])


def scramble(source):
    source.write_bytes(bytes(np.random.default_rng(0).integers(0, 256, 2000, dtype=np.uint8)))


def spoil_name(source):
    source.write_bytes(source.read_bytes().replace(b"/up/MatMul", b"/up/\xff\xfftMul"))


def lose_data(source):
    source.with_name("weights.bin").unlink()


def truncate_data(source):
    data = source.with_name("weights.bin")
    data.write_bytes(data.read_bytes()[:-1])


def link_data_elsewhere(source):
    data = source.with_name("weights.bin")
    outside = data.rename(data.parent.parent / f"{data.parent.name}.bin")
    data.symlink_to(outside)


def sparsify_initializer(source):
    model = onnx.load(str(source))
    values = helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])
    indices = helper.make_tensor("i", TensorProto.INT64, [1], [0])
    del model.graph.initializer[0]
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [IN, IN]))
    onnx.save(model, str(source))


DAMAGES = {
    truncate: "is not a valid ONNX model",
    scramble: "is not a valid ONNX model",
    spoil_name: r"is not a valid ONNX model \(a name in it is not UTF-8\)",
    lose_data: "is not a valid ONNX model .*weights.bin",
    truncate_data: "is not a valid ONNX model",
    link_data_elsewhere: "is not a valid ONNX model",
    sparsify_initializer: "has sparse initializers",
    Path.unlink: "is no file",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_models(tmp_path, damage):
    source = two_layers(tmp_path / "model.onnx", sparse(), external=True)
    damage(source)
    before = files(tmp_path) if damage is not link_data_elsewhere else None
    with pytest.raises(NMError, match=DAMAGES[damage]):
        convert(source)
    assert before is None or files(tmp_path) == before
    assert not source.with_name("packed.onnx").exists()


REFUSED = {
    "nothing to multiply by": ([node("Relu", "x", "y")], {}, {"sizes": (IN, IN)}, "nothing to pack"),
    "dense": ([node("MatMul", "x w", "y")], {"w": dense().T}, {}, "has no 8:16 sparse weight to pack: weight 'w'"),
    "an input": (
        [node("MatMul", "x w", "y")],
        {"w": sparse().T},
        {"inputs": [helper.make_tensor_value_info("w", TensorProto.FLOAT, [IN, OUT])]},
        "nothing to pack",
    ),
    "used otherwise": (
        [node("MatMul", "x w", "h"), node("ReduceSum", "w", "s"), node("Add", "h s", "y")],
        {"w": sparse().T},
        {},
        "has no weight to pack: weight 'w' .* is left because ReduceSum uses it too",
    ),
    "infinite": ([node("MatMul", "x w", "y")], {"w": np.where(sparse().T > 2, np.inf, sparse().T)}, {}, "not finite"),
    "too large": ([node("MatMul", "x w", "y")], {"w": sparse().T * np.float32(1e6)}, {}, "float16 cannot hold"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_with_nothing_that_can_be_packed(tmp_path, case):
    nodes, constants, options, message = REFUSED[case]
    constants = {name: np.array(tensor, order="C") for name, tensor in constants.items()}
    source = write_model(tmp_path / "model.onnx", nodes, constants, **options)
    before = files(tmp_path)
    with pytest.raises(NMError, match=message):
        convert(source, skip_dense=True)
    assert files(tmp_path) == before


OPTIONS = {
    "pattern": ("8:17", "group width 17"),
    "weight_dtype": ("int5", "weight_dtype is 'int5'"),
    "group_size": (24, "group_size is 24"),
    "positions": ("list", "positions is 'list'"),
    "accuracy_level": (2, "accuracy_level is 2"),
    "exclude": (["lm_haed"], "exclude pattern 'lm_haed' matches no weight; one is called 'mlp.up'"),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_wrong_options(tmp_path, option):
    value, message = OPTIONS[option]
    source = linear_model(tmp_path / "model.onnx", sparse())
    with pytest.raises(NMError, match=message):
        convert(source, **{option: value})
    assert list(files(tmp_path)) == ["model.onnx"]


def test_outputs_that_are_refused(tmp_path):
    source = linear_model(tmp_path / "model.onnx", sparse(), external=True)
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "old.onnx").write_text("old")
    data = source.with_name("weights.bin").rename(tmp_path / "packed.onnx.data")
    model = onnx.load(str(source), load_external_data=False)
    for tensor in model.graph.initializer:
        tensor.external_data[0].value = data.name
    onnx.save(model, str(source))
    cases = {
        "model.onnx": "would replace .*model.onnx, which belongs to the model",
        "packed.onnx": "would replace .*packed.onnx.data, which belongs to the model",
        "folder.onnx": "exists",
        "missing/packed.onnx": "is no folder",
    }
    before = sorted(path.name for path in tmp_path.iterdir())
    for name, message in cases.items():
        with pytest.raises(NMError, match=message):
            convert_onnx(source, tmp_path / name, overwrite=True)
    with pytest.raises(NMError, match="exists"):
        convert_onnx(source, tmp_path / "old.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    convert_onnx(source, tmp_path / "old.onnx", overwrite=True)
    assert_same_outputs(source, tmp_path / "old.onnx")


def test_a_failure_on_the_way_leaves_the_old_output(tmp_path, monkeypatch):
    source = linear_model(tmp_path / "model.onnx", sparse())
    convert(source)
    before = files(tmp_path)

    def disk_full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", disk_full)
    with pytest.raises(NMError, match=r"cannot be written \(No space left on device\)"):
        convert(source, overwrite=True)
    assert files(tmp_path) == before
