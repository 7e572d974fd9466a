"""`benchmark --profile`: which operators a model's time goes to."""

import json
import tempfile

import onnx
import pytest
from packed_models import packed_checkpoint

from optimum_nm.errors import NMError
from optimum_nm.evaluate import measure_operators as measuring
from optimum_nm.evaluate.measure_operators import BETWEEN, measure_operators, times_of_runs
from optimum_nm.evaluate.operator_profile import PHASES, profile
from optimum_nm.onnx.export import export_checkpoint

QUICK = {"threads": 1, "prompt_tokens": 8, "new_tokens": 3, "rounds": 2}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "sparse"
    packed_checkpoint(folder, weight_dtype="int8")
    export_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def fallback(tmp_path_factory, exported):
    """The same weights in the traced graph, in the place of a dense model."""
    folder = tmp_path_factory.mktemp("fallback") / "traced"
    export_checkpoint(exported, folder, graph="traced")
    return folder


@pytest.fixture(scope="module")
def profiled(exported, fallback):
    return profile([exported], {"traced": fallback}, **QUICK)


def test_every_operator_is_counted_once_a_run(profiled, exported):
    assert [model.name for model in profiled.models] == ["dense traced", "sparse"]
    kinds = [node.op_type for node in onnx.load(exported / "model.onnx", load_external_data=False).graph.node]
    for phase in PHASES:
        times = {time.operator: time for time in profiled.models[-1].phases[phase]}
        assert times["MatMulNM"].calls == kinds.count("MatMulNM")
        assert times["GroupQueryAttention"].calls == kinds.count("GroupQueryAttention") == 2


def test_ours_is_told_from_the_rest(profiled):
    for model in profiled.models:
        for phase in PHASES:
            assert {time.operator for time in model.phases[phase] if time.ours} == {"MatMulNM"}


def test_shares_are_of_the_whole_run_and_the_longest_comes_first(profiled):
    for model in profiled.models:
        for phase in PHASES:
            times = model.phases[phase]
            assert sum(time.share for time in times) == pytest.approx(1)
            assert BETWEEN in {time.operator for time in times}
            assert [time.milliseconds for time in times] == sorted((t.milliseconds for t in times), reverse=True)
            assert model.milliseconds(phase) > 0


def test_table_and_data_say_the_same(profiled):
    data = json.loads(json.dumps(profiled.to_dict()))
    assert data["settings"]["rounds"] == 2 and data["machine"]["onnxruntime"] in str(profiled)
    tables = str(profiled).split("\n\n")
    assert len(tables) == 3
    for table, model in zip(tables[:2], data["models"], strict=True):
        lines = table.splitlines()
        assert lines[0].startswith(model["name"]) and lines[-1].startswith("all ")
        assert f"{model['decode']['milliseconds']:.3f}" in lines[-1]
        row = next(line for line in lines if line.startswith("MatMulNM *")).split()
        for phase, cells in (("decode", row[2:6]), ("prefill", row[6:10])):
            ours = next(time for time in model[phase]["operators"] if time["ours"])
            share = f"{ours['share']:.1%}"[:-1]
            assert cells == [f"{ours['milliseconds']:.3f}", share, "%", str(ours["calls"])]


def test_no_file_stays_behind(exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    before = sorted(exported.iterdir())
    profile([exported], {}, **QUICK)
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in exported.iterdir():
        (broken / file.name).symlink_to(file)
    (broken / "model.onnx").unlink()
    (broken / "model.onnx").write_bytes(b"no ONNX")
    with pytest.raises(NMError, match="cannot be measured"):
        profile([broken], {}, **QUICK)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.parent != broken) == ["broken", "temporary"]
    assert sorted(exported.iterdir()) == before


def test_more_events_than_the_profiler_holds(exported, tmp_path, monkeypatch):
    """It drops what is too much, and the last runs would be missing."""
    monkeypatch.setattr(measuring, "times_of_runs", lambda events: times_of_runs(events)[:-1])
    with pytest.raises(NMError, match="3 new tokens are more than"):
        measure_operators(exported / "model.onnx", 1, 200, 8, 3, tmp_path)


def node(operator, ts, dur):
    return {"cat": "Node", "name": f"a_{operator}_kernel_time", "ts": ts, "dur": dur, "args": {"op_name": operator}}


def run(ts, dur):
    return {"cat": "Session", "name": "model_run", "ts": ts, "dur": dur}


def test_what_no_operator_takes_is_between_them():
    events = [node("Add", 12, 3), node("Mul", 15, 4), node("Add", 19, 0), run(10, 20), node("Add", 32, 5), run(30, 10)]
    first, second = times_of_runs(events)
    assert first.microseconds == {"Add": 3, "Mul": 4, BETWEEN: 13} and first.calls == {"Add": 2, "Mul": 1}
    assert second.microseconds == {"Add": 5, BETWEEN: 5} and second.calls == {"Add": 1}


def test_a_subgraphs_time_is_not_counted_twice():
    """Node by node: an If that holds a Loop that holds two operators, and one after it."""
    events = [run(0, 100), node("If", 10, 50), node("Loop", 20, 30), node("Add", 21, 5), node("Mul", 30, 6)]
    times = times_of_runs([*events, node("Add", 60, 10)])[0].microseconds
    assert times == {"If": 20, "Loop": 19, "Add": 15, "Mul": 6, BETWEEN: 40}


def test_events_before_the_first_run_are_of_none():
    """ONNX Runtime computes constants while it loads a model."""
    setup = {"cat": "Session", "name": "session_initialization", "ts": 0, "dur": 9}
    (times,) = times_of_runs([{"name": "process_name", "ph": "M"}, setup, node("Cast", 1, 5), run(10, 4)])
    assert times.microseconds == {BETWEEN: 4}
