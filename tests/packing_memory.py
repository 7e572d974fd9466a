"""Memory that packing, checking and unpacking a large weight take beyond it and their result; a program of its own."""

import json
import sys

import torch
from export_memory import reset_peak, status

from optimum_nm import PackedWeight

ROWS, COLUMNS = 4096, 4096  # 64 MiB of float32


def extra(use, kept):
    """Peak of what `use` takes, without the `kept` bytes of its result."""
    reset_peak()
    before = status("VmHWM")
    result = use()
    return result, status("VmHWM") - before - kept


def main():
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    options = {"pattern": "8:16", "outliers": "16:256", "dtype": "int4"}
    PackedWeight.pack(weight[:512], **options).validate()  # tables, and what the libraries set up
    packed, packing = extra(lambda: PackedWeight.pack(weight, **options), 0)
    _, checking = extra(packed.validate, 0)
    _, unpacking = extra(packed.unpack, weight.nbytes)
    found = {"weight": weight.nbytes, "packing": packing, "checking": checking, "unpacking": unpacking}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
