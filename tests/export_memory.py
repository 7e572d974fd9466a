"""Memory that an export takes beyond the process that is ready for it; a program of its own."""

import ctypes
import json
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_nm import NMConfig, NMLinear
from optimum_nm.nn.convert import linear_layers, replace_linear
from optimum_nm.onnx.export import export_checkpoint

SMALL = {"num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 256}


def write_checkpoint(folder, width):
    """One block, written without packing it: every group of two bytes marks its first half."""
    packing = NMConfig(positions="bitmap")
    config = LlamaConfig(hidden_size=width, intermediate_size=2 * width, **SMALL)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    for name, linear in linear_layers(model).items():
        layer = packing.layer(name)
        if layer is not None:
            new = NMLinear(linear.in_features, linear.out_features, False, layer, torch.float16, "cpu")
            new.positions.view(-1, 2).copy_(torch.tensor([0xFF, 0x00], dtype=torch.uint8))
            replace_linear(model, name, new)
    model.config.quantization_config = packing.to_dict()
    for name, parameter in list(model.named_parameters()):
        parent, _, child = name.rpartition(".")
        filled = torch.nn.Parameter(torch.ones(parameter.shape, dtype=torch.float16))
        setattr(model.get_submodule(parent), child, filled)
    model.save_pretrained(folder)


def reset_peak():
    """What has been freed is given back, so that the peak begins at what is in use."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def main(folder):
    for name, width in (("small", 64), ("wide", 2560)):
        write_checkpoint(folder / name, width)
    export_checkpoint(folder / "small", graph="traced")  # modules and caches that any export needs
    reset_peak()
    before = status("VmHWM")
    export_checkpoint(folder / "wide", graph="traced")
    packed = (folder / "wide" / "model.safetensors").stat().st_size
    json.dump({"packed": packed, "extra": status("VmHWM") - before}, sys.stdout)


def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
