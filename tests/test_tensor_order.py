"""Packed rows that a graph multiplies by at once lie side by side in the file."""

import json
import struct

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from optimum_nm.packing.safetensors_files import read_header
from optimum_nm.sparsify.tensor_order import arrange_tensors


def checkpoint(folder):
    """Two layers of every role, and what no group names."""
    generator = torch.Generator().manual_seed(0)
    tensors = {"model.norm.weight": torch.randn(5, generator=generator), "scale": torch.randn(1, generator=generator)}
    for layer in range(11):
        for name in ("k_proj", "o_proj", "q_proj", "v_proj"):
            prefix = f"model.layers.{layer}.self_attn.{name}"
            tensors[f"{prefix}.values"] = torch.randint(0, 9, (4, 6), dtype=torch.int16, generator=generator)
            tensors[f"{prefix}.positions"] = torch.randint(0, 9, (4, 3), dtype=torch.uint8, generator=generator)
    tensors["empty"] = torch.empty(0, 3)
    save_file(tensors, folder / "model.safetensors", {"format": "pt", "made by": "a test"})
    return tensors


def test_tensors_stay_what_they_are(tmp_path):
    tensors = checkpoint(tmp_path)
    arrange_tensors(tmp_path)
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "made by": "a test"}
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("role,dtype", [("values", np.int16), ("positions", np.uint8)])
def test_query_key_and_value_rows_are_one_matrix(tmp_path, role, dtype):
    tensors = checkpoint(tmp_path)
    arrange_tensors(tmp_path)
    header = read_header(tmp_path / "model.safetensors")
    for layer in (0, 10):
        names = [f"model.layers.{layer}.self_attn.{name}_proj.{role}" for name in "qkv"]
        expected = torch.cat([tensors[name] for name in names]).numpy()
        start = header[names[0]].offset
        data = (tmp_path / "model.safetensors").read_bytes()[start : start + expected.nbytes]
        np.testing.assert_array_equal(np.frombuffer(data, dtype).reshape(expected.shape), expected)


def test_every_tensor_is_aligned_to_its_elements(tmp_path):
    checkpoint(tmp_path)
    arrange_tensors(tmp_path)
    sizes = {"F32": 4, "I16": 2, "U8": 1}
    assert all(place.offset % sizes[place.dtype] == 0 for place in read_header(tmp_path / "model.safetensors").values())
    (length,) = struct.unpack("<Q", (tmp_path / "model.safetensors").read_bytes()[:8])
    assert length % 8 == 0


def test_every_shard_is_arranged_and_none_twice(tmp_path):
    tensors = checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    files = {name: f"model-{'k_proj' in name:05}.safetensors" for name in tensors}
    for file in set(files.values()):
        save_file({name: tensor for name, tensor in tensors.items() if files[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    arrange_tensors(tmp_path)
    written = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    for file in set(files.values()):
        for name, tensor in load_file(tmp_path / file).items():
            assert torch.equal(tensor, tensors[name])
    arrange_tensors(tmp_path)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == written
