"""What `inspect` says of a checkpoint: bytes as they are on disk, bits as docs/format.md computes them."""

import itertools

import pytest
import torch

from optimum_nm.config import NMConfig
from optimum_nm.errors import NMError
from optimum_nm.evaluate.histogram import MAGNITUDES, magnitude_histogram, plot_checkpoint
from optimum_nm.evaluate.inspect import formula_bits, inspect_checkpoint
from optimum_nm.nn.skeleton import open_checkpoint
from optimum_nm.optimizer import NMOptimizer
from optimum_nm.packing.packed_weight import PackedWeight

PACKED_LAYERS = 14  # seven linears in each of the two blocks


@pytest.fixture(scope="module")
def packed_folder(tmp_path_factory, tiny_llama_folder, text):
    folder = tmp_path_factory.mktemp("inspect") / "packed"
    overrides = {"*.down_proj": {"weight_dtype": "int4", "group_size": 32, "positions": "bitmap"}}
    config = NMConfig(outliers="16:256", overrides=overrides, calibration_samples=2, calibration_length=32)
    NMOptimizer.from_pretrained(tiny_llama_folder).optimize(folder, config, [text], progress=False)
    return folder


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        ({}, 9.0),
        ({"positions": "codes"}, 8.875),
        ({"weight_dtype": "int8"}, 5.125),
        ({"weight_dtype": "int4"}, 3.125),
        ({"weight_dtype": "int4", "positions": "codes"}, 3.0),
        ({"outliers": "16:256"}, 10.5),
        ({"pattern": "2:4", "positions": "bitmap", "weight_dtype": "float32"}, 17.0),
    ],
)
def test_formula_gives_the_figures_of_the_format_page(options, bits):
    assert formula_bits(NMConfig(**options).layer("x"), 4096) == bits


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "8:16", "16:32", "16:16"])
def test_formula_is_what_packing_takes(pattern):
    weight = torch.randn(2, 512)
    dtypes, sizes = ("float32", "bfloat16", "int8", "int4"), (64, -1)
    for dtype, positions, size, outliers in itertools.product(dtypes, ("codes", "bitmap"), sizes, (None, "8:256")):
        packed = PackedWeight.pack(weight, pattern, outliers, dtype, size, positions)
        assert formula_bits(packed.config, 512) == packed.bits_per_weight


def test_every_byte_of_the_file_is_accounted_for(packed_folder):
    totals = inspect_checkpoint(packed_folder).totals()
    file = packed_folder / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert totals["header_bytes"] == header
    assert totals["packed_bytes"] + totals["other_bytes"] + header == totals["file_bytes"] == file.stat().st_size
    assert sum(totals["packed_bytes_by_tensor"].values()) == totals["packed_bytes"]
    assert totals["onnx_bytes"] is None


def test_layers_are_described_as_they_are_packed(packed_folder):
    inspection = inspect_checkpoint(packed_folder)
    checkpoint = open_checkpoint(packed_folder)
    assert [layer.name for layer in inspection.layers] == checkpoint.layer_names()
    for layer in inspection.layers:
        packed = checkpoint.packed(layer.name)
        kept = packed.mask() | packed.outlier_mask()
        assert layer.bits_per_weight == packed.bits_per_weight
        assert (layer.out_features, layer.in_features) == tuple(kept.shape)
        assert layer.density == pytest.approx(kept.float().mean().item(), abs=0.01)
        assert layer.weight_dtype == ("int4" if layer.name.endswith("down_proj") else "float16")


def test_table_has_a_line_for_every_tensor(packed_folder):
    inspection = inspect_checkpoint(packed_folder)
    assert len(inspection.layers) == PACKED_LAYERS
    lines = str(inspection).splitlines()
    for name in [*(layer.name for layer in inspection.layers), *(tensor.name for tensor in inspection.tensors)]:
        assert len([line for line in lines if line.startswith(f"{name} ")]) == 1
    assert f"{inspection.totals()['bits_per_weight']:.3f} in the file" in str(inspection)


def test_histogram_counts_every_weight_that_is_not_zero(packed_folder):
    checkpoint = open_checkpoint(packed_folder)
    counts = magnitude_histogram(checkpoint)
    weights = [checkpoint.packed(name).unpack() for name in checkpoint.layer_names()]
    assert counts["base"].sum() + counts["outliers"].sum() == sum(int(weight.count_nonzero()) for weight in weights)
    largest = max(float(weight.abs().max()) for weight in weights)
    occupied = MAGNITUDES[1:][counts["outliers"] > 0]
    assert 2.0 ** occupied.max() >= largest > 2.0 ** (occupied.max() - 0.25)


def test_plot_is_a_png(packed_folder, tmp_path):
    plot_checkpoint(packed_folder, tmp_path / "weights.png")
    assert (tmp_path / "weights.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 1


def test_plot_in_a_folder_that_is_not_there(packed_folder, tmp_path):
    with pytest.raises(NMError, match="there is no folder"):
        plot_checkpoint(packed_folder, tmp_path / "missing" / "weights.png")


def test_dense_model_is_refused(tiny_llama_folder):
    with pytest.raises(NMError, match="no quantization_config; it is not a packed checkpoint"):
        inspect_checkpoint(tiny_llama_folder)
