"""Presets: they set what is not given, in Python, in a saved configuration and on the command line."""

import argparse
import inspect
import json

import pytest

from optimum_nm.commands.config_options import add_config_options, read_config
from optimum_nm.config import NMConfig
from optimum_nm.errors import NMError
from optimum_nm.finetune_config import DistillConfig, FinetuneConfig
from optimum_nm.presets import PRESETS

TRAINING = {settings.FIELD: settings for settings in (FinetuneConfig, DistillConfig)}


def parsed(*options):
    parser = argparse.ArgumentParser()
    add_config_options(parser)
    return read_config(parser.parse_args(options))


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_sets_its_fields_and_no_other(preset):
    config, plain = NMConfig(preset=preset), NMConfig()
    for name, value in vars(config).items():
        wanted = {**vars(plain), **PRESETS[preset], "preset": preset}[name]
        if name in TRAINING and wanted is not None:
            assert TRAINING[name].from_dict(value) == TRAINING[name].from_dict(wanted)
        else:
            assert value == wanted


def test_what_is_given_wins_even_if_it_is_the_default():
    config = NMConfig("4:8", None, preset="paper", finetune=None, solver="mask", calibration_samples=128)
    assert (config.pattern, config.outliers, config.finetune, config.calibration_samples) == ("4:8", None, None, 128)
    assert config.variance_correction == "row"


def test_saved_configuration_does_not_depend_on_what_the_preset_became(monkeypatch):
    config = NMConfig(preset="best", outliers="4:256")
    monkeypatch.setitem(PRESETS, "best", {"solver": "mask", "score": "wanda"})
    assert NMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_signature_is_that_of_the_fields():
    assert list(inspect.signature(NMConfig).parameters) == list(vars(NMConfig()))


def test_presets_are_changed_by_no_configuration():
    NMConfig(preset="best").distill["epochs"] = 99
    NMConfig(preset="paper").finetune["epochs"] = 99
    assert NMConfig(preset="best").distill["epochs"] == PRESETS["best"]["distill"]["epochs"]
    assert NMConfig(preset="paper").finetune["epochs"] == PRESETS["paper"]["finetune"]["epochs"]


def test_command_line_takes_a_preset_and_what_changes_it(tmp_path):
    assert parsed("--preset", "best") == NMConfig(preset="best")
    assert parsed("--preset", "paper", "--outliers", "none") == NMConfig(preset="paper", outliers=None)
    tuned = parsed("--preset", "fast", "--finetune", '{"epochs": 2}')
    assert tuned.solver == "admm" and tuned.finetune["epochs"] == 2
    NMConfig(pattern="4:8", solver="sparsegpt").save_pretrained(tmp_path)
    config = parsed("--config", str(tmp_path / "nm_config.json"), "--preset", "fast")
    assert (config.pattern, config.solver, config.preset) == ("4:8", "admm", "fast")


def test_presets_that_do_not_exist():
    for preset in ("slow", ["fast"]):
        with pytest.raises(NMError, match=r"preset is .*; it must be one of None, fast, paper, best"):
            NMConfig(preset=preset)
