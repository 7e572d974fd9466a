"""Tensors written one at a time are the file that safetensors reads."""

import struct
import zlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from optimum_nm.packing.safetensors_files import read_header
from optimum_nm.packing.tensor_files import read_tensor, tensor_checksum, write_tensors

TENSORS = {
    "weight": torch.arange(12.0).view(3, 4),
    "transposed": torch.arange(12.0).view(3, 4).t(),
    "half": torch.randn(5, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "count": torch.tensor(7),
    "empty": torch.empty(0, 3),
    "mask": torch.tensor([True, False, True]),
}


def test_safetensors_reads_what_is_written(tmp_path):
    file = tmp_path / "model.safetensors"
    with file.open("wb") as stream:
        checksums = write_tensors(stream, TENSORS)
    loaded = load_file(file)
    assert list(checksums) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    (length,) = struct.unpack("<Q", file.read_bytes()[:8])
    assert length % 8 == 0


def test_tensors_are_read_and_copied_from_what_safetensors_wrote(tmp_path):
    save_file({name: tensor.contiguous() for name, tensor in TENSORS.items()}, tmp_path / "source.safetensors")
    locations = read_header(tmp_path / "source.safetensors")
    for name, tensor in TENSORS.items():
        read = read_tensor(locations[name])
        assert read.dtype == tensor.dtype and torch.equal(read, tensor)
    with (tmp_path / "copy.safetensors").open("wb") as stream:
        copied = write_tensors(stream, {name: locations[name] for name in TENSORS})
    with (tmp_path / "memory.safetensors").open("wb") as stream:
        assert write_tensors(stream, TENSORS) == copied
    assert (tmp_path / "copy.safetensors").read_bytes() == (tmp_path / "memory.safetensors").read_bytes()


def test_checksum_is_the_crc_of_the_bytes_in_memory_and_in_a_file(tmp_path):
    save_file({"half": TENSORS["half"]}, tmp_path / "model.safetensors")
    expected = f"{zlib.crc32(TENSORS['half'].view(torch.uint8).numpy().tobytes()):08x}"
    assert tensor_checksum(TENSORS["half"]) == expected
    assert tensor_checksum(read_header(tmp_path / "model.safetensors")["half"]) == expected


def test_file_that_is_cut_while_it_is_read(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"weight": TENSORS["weight"]}, file)
    location = read_header(file)["weight"]
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(OSError, match="cut short"):
        read_tensor(location)
    with pytest.raises(OSError, match="cut short"):
        tensor_checksum(location)
