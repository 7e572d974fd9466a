"""The NEON kernels: cross-compiled, and run under qemu on processors with and without dot products."""

import os
import re
from shutil import which

import pytest
from native_build import REPOSITORY, build, run

COMPILER = which("aarch64-linux-gnu-g++")
EMULATOR = which("qemu-aarch64") or which("qemu-aarch64-static")
MISSING = "`apt-get install g++-aarch64-linux-gnu qemu-user` brings the cross-compiler and the emulator of these tests."

pytestmark = pytest.mark.skipif(COMPILER is None or EMULATOR is None, reason=MISSING)


@pytest.fixture(scope="module")
def binaries():
    toolchain = REPOSITORY / "onnx_ops" / "cmake" / "aarch64-linux-gnu.cmake"
    options = [f"-DCMAKE_TOOLCHAIN_FILE={toolchain}", "-DOPTIMUM_NM_TESTS=ON", "-DOPTIMUM_NM_SANITIZE=ON"]
    return build("onnx_ops", "native-tests-aarch64", ["nm_kernels_test", "optimum_nm"], *options)


@pytest.mark.parametrize(
    "processor, asked, best, used",
    [("max", "neon", "dotprod", "neon"), ("cortex-a53", "dotprod", "neon", "neon")],
)
def test_every_kernel_against_float64(binaries, processor, asked, best, used):
    # The search for leaks is a debugger's, which qemu does not let in.
    environment = os.environ | {"OPTIMUM_NM_ISA": asked, "ASAN_OPTIONS": "detect_leaks=0"}
    command = [EMULATOR, "-L", "/usr/aarch64-linux-gnu", "-cpu", processor, binaries / "tests" / "nm_kernels_test"]
    printed = run(*command, 100, 1, env=environment)
    products, *isas = re.match(r"(\d+) products on (\w+) and below, 0 failures; (\w+) is in use", printed).groups()
    assert isas == [best, used]
    assert int(products) > 5000


def test_library_is_built_for_aarch64(binaries):
    header = (binaries / "liboptimum_nm.so").read_bytes()[:20]
    assert header[:4] == b"\x7fELF" and header[18:20] == (183).to_bytes(2, "little")  # EM_AARCH64
