"""Finding the library, registering it with ONNX Runtime, and running a node with it."""

import importlib.metadata
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from operator_models import chain_model, random_packed, reference, relative_error

from optimum_nm import library_path, session_options
from optimum_nm.errors import NMError
from optimum_nm.runtime import library
from optimum_nm.runtime.library import ENVIRONMENT_VARIABLE, LIBRARY_FILE, load_library


@pytest.fixture
def fresh(monkeypatch):
    """No override from outside, and nothing loaded before or afterwards."""
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    load_library.cache_clear()
    yield monkeypatch
    load_library.cache_clear()


def test_installed_library_is_found(fresh):
    path = library_path()
    assert path.name == LIBRARY_FILE and path.is_file() and path.is_absolute()


def test_environment_variable_names_the_library(fresh, tmp_path):
    copy = Path(shutil.copy(library_path(), tmp_path / "any_name.so"))
    fresh.setenv(ENVIRONMENT_VARIABLE, str(copy))
    assert library_path() == copy
    assert load_library()._name == str(copy)
    fresh.setenv(ENVIRONMENT_VARIABLE, "")
    assert library_path().name == LIBRARY_FILE


def test_relative_path_is_made_absolute(fresh, tmp_path):
    shutil.copy(library_path(), tmp_path / "copy.so")
    fresh.chdir(tmp_path)
    fresh.setenv(ENVIRONMENT_VARIABLE, "copy.so")
    assert library_path() == (tmp_path / "copy.so").resolve()


@pytest.mark.parametrize("name", ["absent.so", "."])
def test_environment_variable_that_names_no_file(fresh, tmp_path, name):
    fresh.setenv(ENVIRONMENT_VARIABLE, str(tmp_path / name))
    for use in (library_path, load_library, session_options):
        with pytest.raises(NMError, match=rf"{ENVIRONMENT_VARIABLE} is '.*', which is no file; it must name"):
            use()


def test_file_that_is_no_library(fresh, tmp_path):
    (tmp_path / "text.so").write_text("not a library")
    fresh.setenv(ENVIRONMENT_VARIABLE, str(tmp_path / "text.so"))
    with pytest.raises(NMError, match=r"text\.so is not a usable .*; rebuild it"):
        load_library()
    with pytest.raises(NMError, match=r"ONNX Runtime .* cannot use .*text\.so"):
        session_options()


def test_other_library(fresh):
    other = next((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so*"))
    fresh.setenv(ENVIRONMENT_VARIABLE, str(other))
    with pytest.raises(NMError, match="is not a usable"):
        load_library()
    with pytest.raises(NMError, match=r"ONNX Runtime .* cannot use .*libonnxruntime"):
        session_options()


@pytest.mark.parametrize("installed", [True, False])
def test_missing_library(fresh, tmp_path, installed):
    class Distribution:
        def locate_file(self, path):
            return tmp_path / "installed" / path

    def distribution(name):
        if not installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return Distribution()

    fresh.setattr(library, "__file__", str(tmp_path / "checkout" / "optimum_nm" / "runtime" / "library.py"))
    fresh.setattr(importlib.metadata, "distribution", distribution)
    place = tmp_path / ("installed" if installed else "checkout") / "optimum_nm" / "lib" / LIBRARY_FILE
    with pytest.raises(NMError) as raised:
        library_path()
    assert str(raised.value) == f"{LIBRARY_FILE} is not at {place}; run `pip install .` in the checkout to build it."


def test_threads():
    assert session_options().intra_op_num_threads == 0  # ONNX Runtime's own choice
    assert session_options(3).intra_op_num_threads == 3


@pytest.mark.parametrize("threads", [0, -1, 1.5, "2", True])
def test_threads_out_of_range(threads):
    with pytest.raises(NMError, match=r"threads is .*; it must be a whole number above 0, or None\."):
        session_options(threads)


@pytest.mark.parametrize("threads", [1, 2])
def test_options_serve_several_sessions(threads):
    packed = random_packed(64, 96)
    model = chain_model([packed]).SerializeToString()
    x = np.random.default_rng(0).standard_normal((2, 5, 96), np.float32)
    options = session_options(threads)
    sessions = [onnxruntime.InferenceSession(model, options) for _ in range(2)]
    del options  # the operators outlive it
    for session in sessions:
        assert relative_error(session.run(None, {"x": x})[0], reference([packed], x)) < 1e-5


def test_sessions_run_from_several_threads_at_once():
    layers = [random_packed(200, 96, seed=1), random_packed(96, 200, seed=2, dtype="int8")]
    model = chain_model(layers).SerializeToString()
    sessions = [onnxruntime.InferenceSession(model, session_options(2)) for _ in range(2)]
    inputs = [np.random.default_rng(i).standard_normal((1, 3, 96), np.float32) for i in range(24)]
    alone = [sessions[0].run(None, {"x": x})[0] for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda i: sessions[i % 2].run(None, {"x": inputs[i]})[0], range(len(inputs))))
    np.testing.assert_array_equal(together, alone)


def test_registered_twice_is_refused():
    options = session_options()
    options.register_custom_ops_library(str(library_path()))
    with pytest.raises(Exception, match="Domain already set"):
        onnxruntime.InferenceSession(chain_model([random_packed()]).SerializeToString(), options)
