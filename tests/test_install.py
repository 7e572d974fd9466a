"""The wheel serves every Python 3 of a platform, carries the library and the command, and optimum-cli lists it."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source = tmp_path_factory.mktemp("source") / "optimum-nm"
    ignored = shutil.ignore_patterns(".git", ".venv*", "build", "demo", "tests", "__pycache__")
    shutil.copytree(REPOSITORY, source, ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", source / "wheels", source]
    subprocess.run(command, check=True)
    (path,) = (source / "wheels").glob("*.whl")
    return path


def test_one_wheel_per_platform(wheel):
    assert wheel.name.startswith("optimum_nm-") and "-py3-none-" in wheel.name and "none-any" not in wheel.name


def test_wheel_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "optimum_nm/lib/liboptimum_nm.so" in names
    assert "optimum/commands/register/register_nm.py" in names
    # `optimum` and `optimum.commands.register` are namespace packages of several distributions
    assert not [name for name in names if name.startswith("optimum/") and name.endswith("__init__.py")]
    assert "optimum_nm/packing/packed_weight.py" in names
    assert not [name for name in names if name.startswith(("onnx_ops/", "tests/", "examples/"))]


def test_wheel_works_by_itself(wheel, tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path, wheel], check=True
    )
    script = "import optimum_nm, pathlib; print(optimum_nm.__file__, optimum_nm.library_path())"
    # without site, so that this environment's editable install is not found first
    search_path = os.pathsep.join([str(tmp_path), sysconfig.get_path("purelib")])
    environment = {"PYTHONPATH": search_path, "OPTIMUM_NM_LIBRARY": ""}
    run = subprocess.run(
        [sys.executable, "-S", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    package, library = run.stdout.split()
    assert package.startswith(str(tmp_path)) and library.startswith(str(tmp_path))
    assert Path(library).is_file()


def test_optimum_cli_lists_the_command():
    cli = Path(sys.executable).with_name("optimum-cli")
    listed = subprocess.run([cli, "--help"], capture_output=True, text=True, check=True).stdout
    assert any(line.split()[:1] == ["nm"] for line in listed.splitlines())
    listed = subprocess.run([cli, "nm", "--help"], capture_output=True, text=True, check=True).stdout
    for command in ("sparsify", "export", "convert-onnx", "evaluate", "inspect", "verify", "benchmark"):
        assert command in listed


@pytest.mark.parametrize("name", ["PreTrainedModel", "LlamaForCausalLM", "AutoModelForCausalLM"])
def test_transformers_can_be_imported_after_the_package(name):
    script = f"import optimum_nm; from transformers import {name}"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("name", ["nn.convert", "nn.embedding", "nn.quantizer", "sparsify.layer", "onnx.export"])
def test_any_module_can_be_imported_first(name):
    subprocess.run([sys.executable, "-c", f"import optimum_nm.{name}"], check=True)
