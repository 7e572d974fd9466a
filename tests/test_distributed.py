"""Several processes sparsify one model together, to what one process makes of it, and end together."""

import json
import multiprocessing
import os
import signal
import socket
import sys
from functools import partial
from multiprocessing.connection import wait
from types import SimpleNamespace

import pytest
import torch
from expert_models import expert_model
from test_resume import stopping
from test_sparsify import OPTIONS
from test_streaming import contents, dense_folder

import optimum_nm.__main__ as program
from optimum_nm import NMConfig, NMOptimizer
from optimum_nm.errors import NMError
from optimum_nm.nn.skeleton import open_checkpoint
from optimum_nm.sparsify import ranks, together
from optimum_nm.sparsify.ranks import assign, check_shares
from optimum_nm.sparsify.work_folder import WorkFolder

QUICK = {"epochs": 2, "batch_size": 2, "holdout": 0.5}
CASES = {
    "mask": {"outliers": "2:32"},
    "admm": {"solver": "admm"},
    "fold": {"equalization_mode": "fold", "variance_correction": None},
    "finetune": {"finetune": QUICK},
    "integers": {"finetune": QUICK | {"targets": "dense"}, "solver": "sparsegpt", "weight_dtype": "int8"},
    "distill": {"distill": QUICK | {"holdout": 0.0}},
    "bits": {"target_bits": 12.0, "exclude": ["lm_head", "*.0.*", "*.mlp.*"]},
    "head": {"exclude": [], "overrides": {"lm_head": {"pattern": "16:16"}}},
    "experts": {"calibration_length": 5},  # so few tokens that some experts get some on one rank only
    "tuned experts": {"calibration_length": 5, "finetune": QUICK},
}
CALIBRATIONS = {"bits": "self"}  # of cases that are not calibrated on text


def config(case):
    return NMConfig(**{"weight_dtype": "float32"} | OPTIONS | CASES[case])


@pytest.fixture(scope="module")
def source(tmp_path_factory, tokenizer):
    """A folder with a dense model, and beside it one with experts."""
    folder = tmp_path_factory.mktemp("dense")
    expert_model("Mixtral", len(tokenizer), starved=True).save_pretrained(folder / "experts")
    tokenizer.save_pretrained(folder / "experts")
    return dense_folder(folder / "plain", "Llama", tokenizer)


def optimize(source, folder, text, case="mask", **options):
    model = source.with_name("experts") if "experts" in case else source
    calibration = CALIBRATIONS.get(case, [text])
    return NMOptimizer.from_pretrained(model).optimize(folder, config(case), calibration, progress=False, **options)


def run_rank(rank, environment, errors, task):
    """In a process of its own: an NMError goes into a file, and makes the exit status 1."""
    os.environ |= environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    try:
        task(rank)
    except NMError as error:
        (errors / str(rank)).write_text(f"{error.reported} {error}")
        sys.exit(1)


def run_ranks(folder, task, size=2):
    """Let `task(rank)` run in processes as torchrun starts them, and ends them when one has failed.

    Returns:
        The exit status of each, and what NMErrors said, "" for none.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {"WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    errors = folder / "errors"
    errors.mkdir(exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["optimum_nm.optimizer", "transformers.models.llama.modeling_llama"])
    processes = [context.Process(target=run_rank, args=(rank, environment, errors, task)) for rank in range(size)]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        wait([process.sentinel for process in processes if process.is_alive()])
        if any(process.exitcode for process in processes):
            for process in processes:
                process.terminate()
            break
    for process in processes:
        process.join()
    told = [file.read_text() if (file := errors / str(rank)).exists() else "" for rank in range(size)]
    return [process.exitcode for process in processes], told


def all_cases(source, folder, text, rank):
    with together.together():
        for case in CASES:
            summary = optimize(source, folder / case, text, case)
            (folder / f"{case}-{rank}.json").write_text(json.dumps(summary.to_dict()))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, source, text):
    """The folder with what two processes made, by case."""
    folder = tmp_path_factory.mktemp("two-ranks")
    assert run_ranks(folder, partial(all_cases, source, folder, text)) == ([0, 0], ["", ""])
    return folder


def differences(folder, other, tolerance=1e-4, ties=0):
    """How much the layers of two checkpoints differ relatively, where that is more than rounding.

    Args:
        ties: rows of a layer that are left out, those that differ most: of two weights that matter equally, rounding
            decides which one stays, and each row is a problem of its own.
    """
    checkpoints = open_checkpoint(folder), open_checkpoint(other)
    one, two = ({name: each.packed(name).unpack() for name in each.layer_names()} for each in checkpoints)
    assert one.keys() == two.keys()
    rows = {name: (two[name] - weight).norm(dim=1).sort().values[: len(weight) - ties] for name, weight in one.items()}
    found = {name: (rows[name].norm() / weight.norm()).item() for name, weight in one.items()}
    return {name: difference for name, difference in found.items() if not difference <= tolerance}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_make_what_one_does(case, source, two_ranks, text, tmp_path):
    expected = optimize(source, tmp_path / "one", text, case).to_dict()
    tolerance = 1e-2 if case == "integers" else 1e-4  # a value in the middle between two may go to either
    assert differences(tmp_path / "one", two_ranks / case, tolerance, ties=int(case == "admm")) == {}
    summaries = [json.loads((two_ranks / f"{case}-{rank}.json").read_text()) for rank in range(2)]
    assert summaries[0] == summaries[1]
    assert summaries[0].get("allocation") == expected.get("allocation")
    for one, two in zip(expected["layers"], summaries[0]["layers"], strict=True):
        assert one["calibration_tokens"] == two["calibration_tokens"]
        if one["calibration_tokens"] > 100:  # errors are measured on samples, unless there is a Gram matrix
            assert one["relative_error"] == pytest.approx(two["relative_error"], rel=0.1)
    for kind in ("block_losses", "distillation"):
        assert (kind in summaries[0]) == (kind in expected)


def die(source, folder, text, lost, rank):
    """A rank ends by SIGKILL in the middle of the second block."""
    with pytest.MonkeyPatch.context() as patch:
        if rank == lost:
            real = ranks.gather

            def kill(value):
                if WorkFolder(folder.with_name(f".{folder.name}.nm-partial")).done:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(value)

            patch.setattr("optimum_nm.sparsify.statistics.gather", kill)
        optimize(source, folder, text)


def go_on(source, folder, text, rank):
    with pytest.MonkeyPatch.context() as patch:
        stopping(patch, 0, AssertionError("block 0 is finished"))
        optimize(source, folder, text)


@pytest.mark.parametrize(("lost", "size"), [(0, 2), (2, 3)])
def test_rank_that_dies_is_named_and_the_run_goes_on(lost, size, source, two_ranks, text, tmp_path):
    status, told = run_ranks(tmp_path, partial(die, source, tmp_path / "out", text, lost), size)
    assert status == [-signal.SIGKILL if rank == lost else 1 for rank in range(size)]
    printed = [sentence.removeprefix("False ") for sentence in told if sentence.startswith("False ")]
    assert len(printed) == 1 and printed[0].startswith(f"rank {lost} of {size} (process ") and "\n" not in printed[0]
    assert "has ended unexpectedly. 1 blocks are finished and kept in " in printed[0]
    with pytest.raises(NMError, match="1 finished blocks of a run with another number of processes"):
        optimize(source, tmp_path / "out", text)
    assert run_ranks(tmp_path, partial(go_on, source, tmp_path / "out", text), size)[0] == [0] * size
    assert {path.name for path in tmp_path.iterdir()} == {"out", "errors"}
    if size == 2:
        assert contents(tmp_path / "out") == contents(two_ranks / "mask")
    else:
        assert differences(tmp_path / "out", two_ranks / "mask") == {}


def fail(source, folder, text, reason, rank):
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            stopping(patch, 1, reason)
        optimize(source, folder, text, memory_budget=1)


@pytest.mark.parametrize("reason", [NMError("rank 1 cannot."), OSError(28, "No space left on device", "hidden.1-1")])
def test_error_of_one_rank_ends_all_and_is_told_once(reason, source, text, tmp_path):
    """What another try would meet again removes what is finished, as in one process; a full disk does not."""
    status, told = run_ranks(tmp_path, partial(fail, source, tmp_path / "out", text, reason))
    assert status == [1, 1]
    assert [sentence.partition(" ")[0] for sentence in told] == ["False", "True"]
    assert len({sentence.partition(" ")[2] for sentence in told}) == 1
    work = tmp_path / ".out.nm-partial"
    if isinstance(reason, NMError):
        assert told[0] == "False rank 1 cannot." and not work.exists()
    else:
        assert "No space left on device). 1 blocks are finished and kept" in told[0]
        assert {path.name for path in work.iterdir()} > {"hidden.0-1", "hidden.1-1", "part-00000.safetensors"}


def test_user_error_is_told_once(source, text, tmp_path):
    (tmp_path / "out").mkdir()
    status, told = run_ranks(tmp_path, partial(fail, source, tmp_path / "out", text, None))
    assert status == [1, 1] and told[0].startswith("False output folder") and told[1].startswith("True output folder")


@pytest.mark.parametrize(
    ("number", "settings", "problem"),
    [
        (1, {}, "makes 1 windows; 2 processes need at least 2"),
        (3, {"finetune": {}}, r"finetune trains on 3 windows in batches of 2; both must be multiples of .* 2\."),
        (4, {"distill": {}}, r"distill trains on 4 windows in batches of 1; both must be multiples of .* 2\."),
    ],
)
def test_windows_that_cannot_be_shared_evenly(number, settings, problem, monkeypatch):
    windows, settings = torch.zeros(number, 8), NMConfig(**settings)
    check_shares(windows, settings)
    monkeypatch.setattr(ranks, "watch", lambda: SimpleNamespace(rank=0, size=2))
    with pytest.raises(NMError, match=problem):
        check_shares(windows, settings)


def test_layers_go_to_the_rank_that_has_least_to_do():
    assert assign({"a": 3, "b": 10, "c": 3, "d": 4}, 2) == {"a": 1, "b": 0, "c": 1, "d": 1}
    assert list(assign({"a": 1, "b": 2}, 4)) == ["a", "b"]


def test_device_of_a_rank(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [together.own_device(name) for name in ("auto", "cuda", "cpu")] == ["cuda", "cuda", "cpu"]
    monkeypatch.setattr(together, "_watch", SimpleNamespace(rank=1, size=2))
    assert [together.own_device(name) for name in ("auto", "cuda", "cuda:3")] == ["cuda:1", "cuda:1", "cuda:3"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert together.own_device("auto") == "cpu"


def test_other_commands_refuse_several_processes(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(sys, "argv", ["nm", "inspect", "--model", str(tmp_path)])
    with pytest.raises(SystemExit, match="`inspect` runs in one process, and 2 were started"):
        program.main()
