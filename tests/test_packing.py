"""The packed format: exactness, size, agreement with the second reader, refusal of what is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from format_reader import masks_in_order, read_safetensors, read_weight
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from optimum_nm import NMPattern, PackedWeight
from optimum_nm.config import WEIGHT_DTYPES, NMConfig
from optimum_nm.errors import NMError
from optimum_nm.packing.codes import decode_positions, encode_positions, rank_masks, unrank_masks
from optimum_nm.packing.packed_weight import packed_shapes
from optimum_nm.packing.row_blocks import for_row_blocks
from optimum_nm.packing.values import pack_integers, quantize, unpack_integers

PATTERNS = ["8:16", "2:4", "4:8", "16:32", "9:16", "1:4", "31:32", "16:16"]


def random_weight(rows=3, in_features=300, seed=0):
    return torch.randn(rows, in_features, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pattern", ["1:4", "2:4", "4:8", "8:16", "10:16"])
def test_codes_rank_masks_in_ascending_order(pattern):
    pattern = NMPattern.parse(pattern)
    masks = masks_in_order(pattern.n, pattern.m)
    as_bits = np.array([[mask >> j & 1 for j in range(pattern.m)] for mask in masks], dtype=bool)
    assert (rank_masks(as_bits, pattern) == np.arange(len(masks))).all()
    assert (unrank_masks(np.arange(len(masks)), pattern) == as_bits).all()


@given(
    st.integers(0, 2**32 - 1), st.sampled_from(PATTERNS[:-1]), st.sampled_from(["codes", "bitmap"]), st.integers(1, 9)
)
@settings(max_examples=60, deadline=None)
def test_positions_survive_the_round_trip(seed, pattern, positions, groups):
    pattern = NMPattern.parse(pattern)
    random = np.random.default_rng(seed)
    mask = np.argsort(random.random((4, groups, pattern.m)), axis=-1) < pattern.n
    packed = encode_positions(mask, pattern, positions)
    assert (decode_positions(packed, pattern, positions, groups) == mask).all()


@given(
    st.integers(1, 300), st.sampled_from(["int8", "int4"]), st.sampled_from(["8:16", "11:16", "1:4", "31:32", "4:4"])
)
@settings(deadline=None)
def test_integers_survive_the_round_trip(count, dtype, pattern):
    low, high = {"int8": (-128, 127), "int4": (-8, 7)}[dtype]
    q = torch.randint(low, high + 1, (3, count), generator=torch.Generator().manual_seed(count))
    pattern = NMPattern.parse(pattern)
    packed = pack_integers(q, dtype, pattern)
    assert packed.shape[1] == (count if dtype == "int8" else (count + 1) // 2)
    assert torch.equal(unpack_integers(packed, dtype, count, pattern).long(), q)


@pytest.mark.parametrize("outliers", [None, "16:256", "5:96"])
@pytest.mark.parametrize("positions", ["codes", "bitmap"])
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_second_reader_agrees(tmp_path, pattern, dtype, positions, outliers):
    weight = random_weight()
    packed = PackedWeight.pack(weight, pattern, outliers, dtype, group_size=32, positions=positions)
    packed.validate()
    save_file(packed.tensors, tmp_path / "one.safetensors")
    chosen = {
        "pattern": pattern,
        "outliers": outliers,
        "weight_dtype": dtype,
        "group_size": 32,
        "positions": positions,
        "outlier_dtype": "float16",
    }
    read = read_weight(read_safetensors(tmp_path / "one.safetensors"), weight.shape[1], chosen)
    assert np.array_equal(read, packed.unpack().numpy())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_float_values_are_exact_to_the_bit(dtype):
    weight = random_weight().to(getattr(torch, dtype))
    packed = PackedWeight.pack(weight, "8:16", "4:256", dtype, outlier_dtype="float32")
    kept = packed.mask() | packed.outlier_mask()
    assert torch.equal(packed.unpack()[kept], weight.float()[kept])
    assert not packed.unpack()[~kept].any()


def test_an_already_sparse_weight_is_kept_exactly():
    sparse = PackedWeight.pack(random_weight(), "8:16", dtype="float32").unpack()
    assert torch.equal(PackedWeight.pack(sparse, "8:16", dtype="float32", positions="bitmap").unpack(), sparse)


def test_keeps_the_largest_of_each_group_and_block():
    weight = random_weight(2, 512)
    packed = PackedWeight.pack(weight, "8:16", "4:256", "float32", outlier_dtype="float32")
    blocks = weight.abs().view(2, 2, 256)
    assert torch.equal(packed.outlier_mask().view(2, 2, 256), blocks >= blocks.topk(4).values[..., -1:])
    rest = weight.masked_fill(packed.outlier_mask(), 0).abs().view(2, 32, 16)
    assert torch.equal(packed.mask().view(2, 32, 16), rest >= rest.topk(8).values[..., -1:])


@pytest.mark.parametrize("dtype,levels", [("int8", 127), ("int4", 7)])
def test_integers_are_within_half_a_step(dtype, levels):
    weight = random_weight()
    packed = PackedWeight.pack(weight, "16:16", dtype=dtype, group_size=64)
    absmax = torch.stack([chunk.abs().amax(1) for chunk in weight.split(64, dim=1)], dim=1)
    step = absmax.repeat_interleave(64, dim=1)[:, :300] / levels
    error = (packed.unpack() - weight).abs()
    # int4 may clip down to 0.7 of the largest element where that lowers the squared error
    assert (error <= step * (0.501 if dtype == "int8" else 0.3 * levels + 0.5)).all()


def test_int4_clip_search_beats_absmax():
    weight = random_weight(64, 512)
    q, scales = quantize(weight, "int4", 128)
    searched = (q.float() * scales.float().repeat_interleave(128, 1) - weight).square().sum()
    absmax = weight.view(64, 4, 128).abs().amax(-1, keepdim=True) / 7
    plain = ((weight.view(64, 4, 128) / absmax).round() * absmax - weight.view(64, 4, 128)).square().sum()
    assert searched < 0.95 * plain


def test_int4_search_follows_the_column_weight():
    weight, heavy = random_weight(16, 128), torch.ones(128)
    heavy[:8] = 1000.0
    error = {}
    for name, column_weight in (("plain", None), ("weighted", heavy)):
        q, scales = quantize(weight, "int4", 128, column_weight)
        error[name] = ((q.float() * scales.float() - weight).square() * heavy).sum()
    assert error["weighted"] < error["plain"]


@pytest.mark.parametrize(
    "dtype,outliers,bits",
    [("float16", None, 9.0), ("int8", None, 5.125), ("int4", None, 3.125), ("int4", "16:256", 4.625)],
)
def test_size_is_the_arithmetic(dtype, outliers, bits):
    packed = PackedWeight.pack(random_weight(8, 1024), "8:16", outliers, dtype)
    assert packed.bits_per_weight == bits


def test_masks_of_a_solver_are_used_exactly():
    weight = random_weight(4, 64)
    mask = torch.zeros(4, 64, dtype=torch.bool)
    mask[:, ::4] = True
    outliers = torch.zeros_like(mask)
    outliers[:, 1] = True
    packed = PackedWeight.pack(weight, "8:16", "4:64", "float32", mask=mask, outlier_mask=outliers)
    packed.validate()
    expected = (weight * mask) + (weight * outliers).half().float()
    assert torch.equal(packed.unpack(), expected)


def test_a_mask_with_too_many_in_a_group_is_refused():
    mask = torch.ones(2, 32, dtype=torch.bool)
    with pytest.raises(NMError, match="mask keeps 16 of 16 in row 0"):
        PackedWeight.pack(random_weight(2, 32), "8:16", mask=mask)


def test_extreme_groups():
    weight = torch.zeros(3, 128)
    weight[1] = 1e-30
    weight[2, 0], weight[2, 1] = 60000.0, -1e-8
    for dtype in WEIGHT_DTYPES:
        unpacked = PackedWeight.pack(weight, "8:16", dtype=dtype).unpack()
        assert unpacked.isfinite().all()
        assert not unpacked[0].any()
        assert abs(unpacked[2, 0] - 60000) < 400


@pytest.mark.parametrize(
    "weight,message",
    [
        (torch.full((2, 16), float("nan")), "not finite"),
        (torch.ones(2, 16) * 1e6, "float16 cannot hold"),
        (torch.ones(16), "a non-empty float matrix"),
        (torch.ones(2, 0), "a non-empty float matrix"),
        (torch.ones(2, 16, dtype=torch.int32), "a non-empty float matrix"),
    ],
)
def test_unusable_weights_are_refused(weight, message):
    with pytest.raises(NMError, match=message):
        PackedWeight.pack(weight)


def corrupt_positions(packed):
    packed.tensors["positions"] = torch.full_like(packed.tensors["positions"], 255)


def corrupt_shape(packed):
    packed.tensors["values"] = packed.tensors["values"][:, 1:]


def corrupt_outliers(packed):
    packed.tensors["outlier_positions"] = packed.tensors["outlier_positions"].flip(1)


def corrupt_scales(packed):
    packed.tensors["scales"] = torch.full_like(packed.tensors["scales"], 0x7C00)


def remove_scales(packed):
    del packed.tensors["scales"]


@pytest.mark.parametrize(
    "corrupt,message",
    [
        (corrupt_positions, "codes are below 12870"),
        (corrupt_shape, "asks for"),
        (corrupt_outliers, "ascend"),
        (corrupt_scales, "not finite"),
        (remove_scales, "missing"),
    ],
)
def test_validate_names_what_is_wrong(corrupt, message):
    packed = PackedWeight.pack(random_weight(4, 64), "8:16", "4:64", "int8", group_size=64, positions="codes")
    packed.validate("layer")
    corrupt(packed)
    with pytest.raises(NMError, match=f"^layer.*{message}"):
        packed.validate("layer")


@pytest.mark.parametrize("width", [1, 3, 15, 16, 17, 255, 256, 257, 576])
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_any_width(width, dtype):
    weight = random_weight(2, width)
    packed = PackedWeight.pack(weight, "8:16", "16:256", dtype)
    packed.validate()
    shapes = packed_shapes(width, 2, packed.config)
    assert {name: (tuple(t.shape), t.dtype) for name, t in packed.tensors.items()} == shapes
    assert packed.unpack().shape == (2, width)


def test_layer_configuration_follows_overrides():
    config = NMConfig(overrides={"*.down_proj": {"pattern": "16:16", "weight_dtype": "int8"}}, exclude=["head*"])
    assert str(config.layer("a.down_proj").pattern) == "16:16"
    assert config.layer("a.up_proj").weight_dtype == "float16"
    assert config.layer("head.x") is None
    assert NMConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "settings_,message",
    [
        ({"pattern": "17:16"}, "keeps 17 of 16"),
        ({"pattern": "8:12"}, "group width 12"),
        ({"pattern": "half"}, "not of the form"),
        ({"outliers": "300:256"}, "k must be between"),
        ({"outliers": "4:512"}, "between 1 and 256"),
        ({"group_size": 24}, "multiple of 16"),
        ({"weight_dtype": "int3"}, "weight_dtype is 'int3'"),
        ({"overrides": {"*": {"color": "red"}}}, "sets 'color'"),
        ({"score": "best"}, "score is 'best'"),
        ({"equalization": 2.0}, "between 0 and 1"),
    ],
)
def test_configuration_refuses(settings_, message):
    with pytest.raises(NMError, match=message):
        NMConfig(**settings_)


def test_a_newer_format_is_refused():
    with pytest.raises(NMError, match="format_version is 2"):
        NMConfig.from_dict(NMConfig().to_dict() | {"format_version": 2})


def test_memory_does_not_grow_with_the_weight():
    """Some rows are in the making at a time; what packing gives, a seventh of the weight, counts with it."""
    program = Path(__file__).with_name("packing_memory.py")
    run = subprocess.run([sys.executable, program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert found["weight"] == 2**26
    for step in ("packing", "checking", "unpacking"):
        assert found[step] < 0.6 * found["weight"], found


@pytest.mark.parametrize(
    ("pattern", "dtype"), [("8:16", "float16"), ("8:16", "int4"), ("16:32", "int8"), ("2:4", "int8")]
)
def test_positions_are_by_default_what_the_kernels_read_faster(pattern, dtype):
    weight = random_weight(4, 64)
    assert PackedWeight.pack(weight, pattern, dtype=dtype).config.positions == "bitmap"
    assert PackedWeight.pack(weight, pattern, dtype=dtype, positions="codes").config.positions == "codes"


def test_blocks_of_rows_cover_a_matrix_on_threads_too():
    seen = torch.zeros(1000, dtype=torch.int64)

    def add(rows):
        assert not torch.is_grad_enabled()
        seen[rows] += 1

    for_row_blocks(add, 1000, 16, elements=16 * 7)
    assert (seen == 1).all()


def test_what_a_block_of_rows_raises_is_raised():
    def fail(rows):
        if rows.start >= 14:
            raise ValueError(f"row {rows.start}")

    with pytest.raises(ValueError, match="row 14"):
        for_row_blocks(fail, 1000, 16, elements=16 * 7)
