"""The native tests and fuzz targets, built with the sanitizers, on every instruction set of this machine."""

import os
import random
import re
import sys

import pytest
from native_build import ISAS, build, run

TARGETS = ("nm_kernels_test", "nm_emulated_test", "nm_threads_test", "nm_fuzz_attributes", "nm_fuzz_contents")


@pytest.fixture(scope="module")
def binaries():
    return build("onnx_ops", "native-tests", TARGETS, "-DOPTIMUM_NM_TESTS=ON", "-DOPTIMUM_NM_SANITIZE=ON")


def isa_in_use(wanted=None):
    environment = {name: value for name, value in os.environ.items() if name != "OPTIMUM_NM_ISA"}
    environment |= {} if wanted is None else {"OPTIMUM_NM_ISA": wanted}
    code = "from optimum_nm.runtime.library import load_library; print(load_library().nm_isa().decode())"
    return run(sys.executable, "-c", code, env=environment).strip()


@pytest.mark.parametrize("seed", [1, random.SystemRandom().randrange(2**31)], ids=["fixed", "new"])
def test_every_kernel_against_float64(binaries, seed):
    printed = run(binaries / "tests" / "nm_kernels_test", 700, seed)
    products, isa = re.match(r"(\d+) products on (\w+) and below, 0 failures", printed).groups()
    assert isa == isa_in_use()
    assert int(products) > 2000


def test_emulated_avx512_and_amx(binaries):
    printed = run(binaries / "tests" / "nm_emulated_test", 150, 1)
    assert re.match(r"\d+ products on amx and below, 0 failures", printed)


def test_calls_from_several_threads(binaries):
    assert ", 0 failures" in run(binaries / "tests" / "nm_threads_test")


@pytest.mark.parametrize("target", ["attributes", "contents"])
def test_fuzz_targets(binaries, target, tmp_path):
    run(binaries / "fuzz" / f"nm_fuzz_{target}", "-runs=3000", "-seed=1", cwd=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("isa", ISAS)
def test_environment_variable_lowers_the_instruction_set(isa):
    lower = min(ISAS.index(isa), ISAS.index(isa_in_use()))
    assert isa_in_use(isa) == ISAS[lower]


def test_unknown_instruction_set_is_ignored():
    assert isa_in_use("sse9") == isa_in_use()
