"""NMLinear: the kernel inside torch, its gradients, compilation and export."""

import pytest
import torch

from optimum_nm import NMLinear, PackedWeight
from optimum_nm.config import WEIGHT_DTYPES
from optimum_nm.errors import NMError
from optimum_nm.nn import matmul
from optimum_nm.nn.matmul import operator_arguments


def packed_layer(dtype="float32", in_features=300, out_features=24, bias=True, **options):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator)
    packed = PackedWeight.pack(weight, "8:16", "4:256", dtype, group_size=64, **options)
    return NMLinear.from_packed(packed, torch.randn(out_features, generator=generator) if bias else None)


def dense_forward(layer, inputs):
    return torch.nn.functional.linear(inputs, layer.packed.unpack().to(inputs.dtype), layer.bias)


@pytest.mark.parametrize("positions", ["codes", "bitmap"])
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_multiplies_by_the_unpacked_weight(dtype, positions):
    layer = packed_layer(dtype, positions=positions)
    for shape in [(300,), (1, 300), (2, 5, 300), (0, 300)]:
        inputs = torch.randn(shape)
        # 1e-5 of the magnitudes, about 100, that are summed.
        torch.testing.assert_close(layer(inputs), dense_forward(layer, inputs), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float16, 3e-2), (torch.bfloat16, 3e-1)])
def test_takes_half_precision_activations(dtype, tolerance):
    layer = packed_layer(bias=False)
    inputs = torch.randn(3, 300).to(dtype)
    output = layer(inputs)
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), dense_forward(layer, inputs.float()), rtol=1e-2, atol=tolerance)


def test_accuracy_level_4_may_round_activations():
    layer = packed_layer("int8")
    inputs = torch.randn(4, 300)
    exact = layer(inputs)
    layer.accuracy_level = 4
    assert (layer(inputs) - exact).norm() < 0.02 * exact.norm()


def test_gradient_of_input_and_bias():
    layer, inputs = packed_layer(), torch.randn(2, 3, 300, requires_grad=True)
    upstream = torch.randn(2, 3, 24)
    layer(inputs).backward(upstream)
    gradients = inputs.grad, layer.bias.grad
    inputs.grad = layer.bias.grad = None
    dense_forward(layer, inputs).backward(upstream)
    torch.testing.assert_close(gradients[0], inputs.grad)
    torch.testing.assert_close(gradients[1], layer.bias.grad)


def test_follows_the_rules_of_torch_operators():
    layer = packed_layer("int4")
    tensors = (layer.values, layer.positions, layer.scales, layer.outlier_values, layer.outlier_positions)
    arguments = (*tensors, layer.bias, *operator_arguments(layer.config, 300, 24), 0)
    torch.library.opcheck(torch.ops.optimum_nm.matmul.default, (torch.randn(2, 300, requires_grad=True), *arguments))


def test_compiles_without_graph_breaks_and_exports():
    layer, inputs = packed_layer("bfloat16"), torch.randn(2, 300)
    expected = layer(inputs)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(inputs), expected)
    program = torch.export.export(layer, (inputs,))
    assert any(node.target == torch.ops.optimum_nm.matmul.default for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(inputs), expected)


def test_without_a_kernel_the_weight_is_unpacked_with_a_warning_once():
    """The implementation of other devices, called on this one, so that its numbers can be compared."""
    layer, inputs = packed_layer("int4"), torch.randn(2, 300)
    tensors = (layer.values, layer.positions, layer.scales, layer.outlier_values, layer.outlier_positions)
    arguments = (inputs, *tensors, layer.bias, *operator_arguments(layer.config, 300, 24), 0)
    matmul._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="Packed layers on cpu are unpacked at every call") as warned:
        outputs = [matmul._matmul_elsewhere(*arguments) for _ in range(2)]
    assert len(warned) == 1
    torch.testing.assert_close(outputs[1], layer(inputs), rtol=1e-5, atol=1e-4)


def test_shapes_on_devices_without_memory():
    assert packed_layer().to("meta")(torch.empty(2, 300, device="meta")).shape == (2, 24)


def test_state_dict_survives_the_round_trip():
    layer = packed_layer("int4")
    other = NMLinear(300, 24, True, layer.config)
    other.load_state_dict(layer.state_dict())
    inputs = torch.randn(2, 300)
    assert torch.equal(other(inputs), layer(inputs))


def test_casting_the_module_leaves_the_packed_tensors_alone():
    layer = packed_layer("float16")
    before = layer.packed.unpack()
    assert torch.equal(layer.to(torch.bfloat16).packed.unpack(), before)


def test_refuses_what_is_wrong():
    layer = packed_layer()
    with pytest.raises(NMError, match="input has 299 features; the packed layer takes 300"):
        layer(torch.randn(2, 299))
    with pytest.raises(NMError, match="input of the packed layer is float64"):
        layer(torch.randn(2, 300, dtype=torch.float64))
    layer.positions.fill_(255)
    with pytest.raises(NMError, match=r"packed weight \[24, 300\]"):
        layer(torch.randn(2, 300))
