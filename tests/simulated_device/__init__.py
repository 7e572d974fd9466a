"""A torch device "simulated", so that what runs on a GPU can be run where there is none.

Its tensors are not the CPU's: an operator that meets both fails, as it would on a GPU. Importing this module registers
the device for the whole process; give it one of its own.
"""

import sys
import types
from pathlib import Path

import torch
from native_build import shared_library

FOLDER = Path(torch.__file__).parent


def register():
    """Compile device.cpp once, and make `device="simulated"` known to torch."""
    options = ["-O1", "-std=c++20", *(f"-I{FOLDER / 'include' / part}" for part in ("", "torch/csrc/api/include"))]
    linked = [f"-L{FOLDER / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    torch.ops.load_library(shared_library(Path(__file__).with_name("device.cpp"), options, linked))
    module = types.ModuleType("torch.simulated")
    answers = {"is_available": True, "device_count": 1, "current_device": 0, "get_amp_supported_dtype": []}
    answers |= {"_is_in_bad_fork": False, "manual_seed_all": None}
    for name, value in answers.items():
        setattr(module, name, lambda *arguments, value=value: value)
    torch.utils.rename_privateuse1_backend("simulated")
    torch._register_device_module("simulated", module)
    torch.utils.generate_methods_for_privateuse1_backend()
    sys.modules["torch.simulated"] = module
    torch.__future__.set_swap_module_params_on_conversion(True)  # Module.to keeps ties, as it does on the way to a GPU


register()
