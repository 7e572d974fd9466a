"""Packed rows that a graph multiplies by at once lie side by side in the file."""

import numpy as np
import pytest
import torch

from optimum_nm.packing.safetensors_files import read_header
from optimum_nm.packing.tensor_files import write_tensors
from optimum_nm.sparsify.tensor_order import arranged, split_into_files


@pytest.fixture
def tensors():
    """Two layers of every role in eleven blocks, and what no group names."""
    generator = torch.Generator().manual_seed(0)
    tensors = {"model.norm.weight": torch.randn(5, generator=generator), "scale": torch.randn(1, generator=generator)}
    for layer in range(11):
        for name in ("k_proj", "o_proj", "q_proj", "v_proj"):
            prefix = f"model.layers.{layer}.self_attn.{name}"
            tensors[f"{prefix}.values"] = torch.randint(0, 9, (4, 6), dtype=torch.int16, generator=generator)
            tensors[f"{prefix}.positions"] = torch.randint(0, 9, (4, 3), dtype=torch.uint8, generator=generator)
    tensors["empty"] = torch.empty(0, 3)
    return tensors


@pytest.fixture
def locations(tensors, tmp_path):
    """Of the tensors in a file in their own order."""
    with (tmp_path / "any.safetensors").open("wb") as stream:
        write_tensors(stream, tensors)
    return read_header(tmp_path / "any.safetensors")


@pytest.fixture
def file(locations, tmp_path):
    """The tensors in a file in the order that is tested."""
    with (tmp_path / "model.safetensors").open("wb") as stream:
        write_tensors(stream, {name: locations[name] for name in arranged(locations, locations)})
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("role,dtype", [("values", np.int16), ("positions", np.uint8)])
def test_query_key_and_value_rows_are_one_matrix(tensors, file, role, dtype):
    header = read_header(file)
    for layer in (0, 10):
        names = [f"model.layers.{layer}.self_attn.{name}_proj.{role}" for name in "qkv"]
        expected = torch.cat([tensors[name] for name in names]).numpy()
        start = header[names[0]].offset
        data = file.read_bytes()[start : start + expected.nbytes]
        np.testing.assert_array_equal(np.frombuffer(data, dtype).reshape(expected.shape), expected)


def test_every_tensor_is_aligned_to_its_elements(tensors, file):
    sizes = {"F32": 4, "I16": 2, "U8": 1}
    header = read_header(file)
    assert header.keys() == tensors.keys()
    assert all(place.offset % sizes[place.dtype] == 0 for place in header.values())


def test_files_are_filled_in_the_order_of_the_model_and_siblings_stay_together(locations):
    block = 4 * 4 * (12 + 3)
    files = split_into_files(locations, 3 * block)
    assert [name for names in files for name in names] == list(locations)
    assert len(files) == 4
    for names in files:
        assert sum(locations[name].nbytes for name in names) <= 3 * block
    owner = {name: number for number, names in enumerate(files) for name in names}
    for name in locations:
        if ".k_proj." in name:
            assert owner[name] == owner[name.replace("k_proj", "q_proj")] == owner[name.replace("k_proj", "v_proj")]


def test_siblings_that_are_larger_than_a_file_have_one_of_their_own(locations):
    files = split_into_files(locations, 1)
    assert len(files) == 14 and all(files)
