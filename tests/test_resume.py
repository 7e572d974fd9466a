"""A run that ends early, wherever it does, is gone on with to the same bytes."""

import errno
import json
import multiprocessing
import os
import random
import signal
import sys

import pytest
import torch
from filelock import FileLock
from test_sparsify import OPTIONS, tiny_model
from test_streaming import HEAD, QUICK, contents, dense_folder, in_memory

import optimum_nm.__main__ as program
from optimum_nm import NMConfig, NMOptimizer
from optimum_nm.errors import NMError
from optimum_nm.sparsify import pipeline, work_folder
from optimum_nm.sparsify.work_folder import WorkFolder

CONFIG = NMConfig(**OPTIONS)
CASES = {
    "plain": {},
    "shared": HEAD | {"share_embedding": True},
    "tuned": {"finetune": QUICK | {"targets": "dense"}, "exclude": ["lm_head", "*.0.self_attn.v_proj"]},
    "bits": {"target_bits": 4.0, "exclude": ["lm_head", "*.0.*", "*.mlp.*"]},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory, tokenizer):
    return dense_folder(tmp_path_factory.mktemp("dense"), "Qwen2", tokenizer)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, source, text):
    """The files of a run that nothing ends early, by case."""
    folder, found = tmp_path_factory.mktemp("uninterrupted"), {}

    def result(case):
        if case not in found:
            optimize(source, folder / case, text, NMConfig(**CASES[case], **OPTIONS))
            found[case] = contents(folder / case)
        return found[case]

    return result


def optimize(source, folder, text, config=CONFIG, **options):
    return NMOptimizer.from_pretrained(source).optimize(folder, config, [text], progress=False, **options)


class Stopped(Exception):
    """Ends a run."""


def stopping(monkeypatch, block, reason):
    """Let `reason` be raised when a block is sparsified."""
    real = pipeline.sparsify_block

    def stop(model, index, *args):
        if index == block:
            raise reason
        return real(model, index, *args)

    monkeypatch.setattr(pipeline, "sparsify_block", stop)


def stop_in_block_1(source, folder, text, monkeypatch, config=CONFIG, **options):
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stopping(patch, 1, Stopped())
        optimize(source, folder, text, config, **options)
    assert not folder.exists()
    return folder.with_name(f".{folder.name}.nm-partial")


def killed_run(source, folder, text, operations):
    """A process that ends by SIGKILL before one of its operations on files of the folder and of its work folder."""
    left = operations

    def count(event, args):
        nonlocal left
        changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir") or (
            event == "open" and isinstance(args[1], str) and args[1][0] in "wax"
        )
        if changes and str(folder.parent) in str(args[0]):
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    torch.set_num_threads(1)
    optimize(source, folder, text)
    os._exit(3 if left > 0 else 4)


def test_killed_at_random_moments(source, uninterrupted, text, tmp_path, pytestconfig):
    """Each time a process is killed before an operation on files; `--kills` says how often."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["optimum_nm.optimizer", "transformers.models.qwen2.modeling_qwen2"])
    chosen, kills, number = random.Random(0), 0, 0
    while kills < pytestconfig.getoption("--kills"):
        folder, number = tmp_path / f"out{number}", number + 1
        while not folder.exists():
            process = context.Process(target=killed_run, args=(source, folder, text, chosen.randint(1, 30)))
            process.start()
            process.join()
            kills += process.exitcode == -signal.SIGKILL
            assert process.exitcode in (-signal.SIGKILL, 3)
        work = folder.with_name(f".{folder.name}.nm-partial")
        assert contents(folder) == uninterrupted("plain")
        if work.exists():  # only its removal was cut short
            with pytest.raises(NMError, match="exists"):
                optimize(source, folder, text)
        assert not work.exists()


@pytest.mark.parametrize(("case", "budget"), [*((case, None) for case in CASES), ("plain", 1), ("tuned", 1)])
def test_goes_on_after_the_last_finished_block(case, budget, source, uninterrupted, text, tmp_path, monkeypatch):
    config = NMConfig(**CASES[case], **OPTIONS)
    stop_in_block_1(source, tmp_path / "out", text, monkeypatch, config, memory_budget=budget)
    with monkeypatch.context() as patch:
        stopping(patch, 0, AssertionError("block 0 is finished"))
        optimize(source, tmp_path / "out", text, config, memory_budget=budget)
    assert contents(tmp_path / "out") == uninterrupted(case)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("case", ["plain", "shared", "tuned"])
def test_model_in_memory_goes_on_too(case, source, uninterrupted, text, tmp_path, monkeypatch):
    config = NMConfig(**CASES[case], **OPTIONS)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stopping(patch, 1, Stopped())
        in_memory(source).optimize(tmp_path / "out", config, [text], progress=False)
    optimizer = in_memory(source)
    optimizer.optimize(tmp_path / "out", config, [text], progress=False)
    assert contents(tmp_path / "out") == uninterrupted(case)
    packed = NMOptimizer(optimizer.model, optimizer.tokenizer).model
    assert not packed.state_dict().keys() ^ optimizer.model.state_dict().keys()
    assert torch.isfinite(packed(torch.arange(20)[None]).logits).all()


@pytest.mark.parametrize("case", ["plain", "shared"])
def test_goes_on_when_only_the_checkpoint_was_missing(case, source, uninterrupted, text, tmp_path, monkeypatch):
    config = NMConfig(**CASES[case], **OPTIONS)
    for make in (NMOptimizer.from_pretrained, in_memory):
        folder = tmp_path / make.__name__
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr("optimum_nm.optimizer.write_checkpoint", lambda *args: (_ for _ in ()).throw(Stopped()))
            make(source).optimize(folder, config, [text], progress=False)
        with monkeypatch.context() as patch:
            stopping(patch, 1, AssertionError("all is finished"))
            make(source).optimize(folder, config, [text], progress=False)
        assert contents(folder) == uninterrupted(case)


def test_full_disk(source, uninterrupted, text, tmp_path, monkeypatch):
    real, calls = work_folder.write_tensors, []

    def full(stream, tensors):
        calls.append(None)
        if len(calls) == 2:
            stream.write(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(stream, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(work_folder, "write_tensors", full)
        with pytest.raises(NMError, match=r"No space left on device\). 1 blocks are finished and kept in .*goes on"):
            optimize(source, tmp_path / "out", text)
    work = tmp_path / ".out.nm-partial"
    assert "part-00001.safetensors" not in {path.name.strip(".").removesuffix(".partial") for path in work.iterdir()}
    optimize(source, tmp_path / "out", text)
    assert contents(tmp_path / "out") == uninterrupted("plain")


def test_control_c_says_how_to_go_on(source, uninterrupted, text, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stopping(patch, 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt, match=r"1 blocks are finished and kept in .*the same command goes on"):
            optimize(source, tmp_path / "out", text)
    optimize(source, tmp_path / "out", text)
    assert contents(tmp_path / "out") == uninterrupted("plain")


def test_control_c_waits_for_the_write_in_hand(source, text, tmp_path, monkeypatch):
    real = work_folder.write_tensors

    def interrupted(stream, tensors):
        signal.raise_signal(signal.SIGINT)
        return real(stream, tensors)

    monkeypatch.setattr(work_folder, "write_tensors", interrupted)
    with pytest.raises(KeyboardInterrupt, match="1 blocks are finished"):
        optimize(source, tmp_path / "out", text)
    assert WorkFolder(tmp_path / ".out.nm-partial").done == 1


def test_early_end_before_any_block_leaves_nothing(source, text, tmp_path, monkeypatch):
    stopping(monkeypatch, 0, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt, match=r"^interrupted\.$"):
        optimize(source, tmp_path / "deep" / "out", text)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("other", ["configuration", "model", "calibration text"])
def test_refuses_to_go_on_with_something_else(other, source, text, tokenizer, tmp_path, monkeypatch):
    work = stop_in_block_1(source, tmp_path / "out", text, monkeypatch)
    config, calibration = CONFIG, text
    if other == "configuration":
        config = NMConfig(**OPTIONS, pattern="4:8")
    elif other == "model":
        source = dense_folder(tmp_path / "other", "Qwen2", tokenizer)
    else:
        calibration = text[100:]
    with pytest.raises(NMError, match=f"1 finished blocks of a run with another {other}; .*--restart") as caught:
        optimize(source, tmp_path / "out", calibration, config)
    assert "\n" not in str(caught.value)
    assert WorkFolder(work).done == 1
    optimize(source, tmp_path / "out", calibration, config, restart=True)
    optimize(source, tmp_path / "again", calibration, config)
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


def test_wrong_input_later_keeps_what_is_finished(source, uninterrupted, text, tmp_path, monkeypatch):
    stop_in_block_1(source, tmp_path / "out", text, monkeypatch)
    with pytest.raises(NMError, match="is empty"):
        optimize(source, tmp_path / "out", " ")
    optimize(source, tmp_path / "out", text)
    assert contents(tmp_path / "out") == uninterrupted("plain")


def test_reason_that_another_try_would_meet_removes_what_is_finished(tokenizer, text, tmp_path):
    model = tiny_model("Llama", len(tokenizer))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e6
    with pytest.raises(NMError, match="up_proj"):
        NMOptimizer(model, tokenizer).optimize(tmp_path / "out", CONFIG, [text], progress=False)
    assert not list(tmp_path.iterdir())


def test_damaged_block_is_refused(source, text, tmp_path, monkeypatch):
    part = stop_in_block_1(source, tmp_path / "out", text, monkeypatch) / "part-00000.safetensors"
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    with pytest.raises(NMError, match=r"part-00000.safetensors is damaged; begin anew"):
        optimize(source, tmp_path / "out", text)
    optimize(source, tmp_path / "out", text, restart=True)


def test_damaged_activations_are_refused(source, text, tmp_path, monkeypatch):
    file = stop_in_block_1(source, tmp_path / "out", text, monkeypatch) / "hidden-1"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(NMError, match="hidden-1: it has changed"):
        optimize(source, tmp_path / "out", text)


@pytest.mark.parametrize("content", ["{", "[]", '{"parts": [{}]}', '{"identity": {}, "format": 2}'])
def test_manifest_that_is_not_ours_is_refused(content, source, text, tmp_path, monkeypatch):
    work = stop_in_block_1(source, tmp_path / "out", text, monkeypatch)
    (work / "manifest.json").write_text(content)
    with pytest.raises(NMError, match="--restart"):
        optimize(source, tmp_path / "out", text)
    assert (work / "part-00000.safetensors").exists()


def test_replaced_folder_stays_until_the_end(source, uninterrupted, text, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stopping(patch, 1, Stopped())
        optimize(source, tmp_path / "out", text, overwrite=True)
    assert contents(tmp_path / "out") == {"config.json": b"{}"}
    optimize(source, tmp_path / "out", text, overwrite=True)
    assert contents(tmp_path / "out") == uninterrupted("plain")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_one_process_at_a_time(source, text, tmp_path, monkeypatch):
    work = stop_in_block_1(source, tmp_path / "out", text, monkeypatch)
    with FileLock(work / "lock"), pytest.raises(NMError, match="another process is writing"):
        optimize(source, tmp_path / "out", text)
    assert WorkFolder(work).done == 1


def test_manifest_holds_what_the_summary_needs(source, text, tmp_path, monkeypatch):
    work = stop_in_block_1(source, tmp_path / "out", text, monkeypatch)
    report = json.loads((work / "manifest.json").read_text())["parts"][0]["report"]
    assert len(report["layers"]) == 7 and report["loss"] is None
    summary = optimize(source, tmp_path / "out", text)
    assert [layer.name for layer in summary.layers[:7]] == [layer["name"] for layer in report["layers"]]


def test_command_ends_in_one_line_and_goes_on(source, text, tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text(text)
    options = ["--calibration-samples", "4", "--calibration-length", "48", "--json"]
    arguments = ["--model", source, "--output", tmp_path / "out", "--calibration", tmp_path / "text.txt", *options]
    monkeypatch.setattr(sys, "argv", ["optimum-cli", "sparsify", *map(str, arguments)])
    with monkeypatch.context() as patch:
        stopping(patch, 1, KeyboardInterrupt())
        with pytest.raises(SystemExit) as ended:
            program.main()
    assert ended.value.code.endswith("the same command goes on from there.") and "\n" not in ended.value.code
    capsys.readouterr()
    program.main()
    assert json.loads(capsys.readouterr().out)["peak_bytes"] > 2**27
