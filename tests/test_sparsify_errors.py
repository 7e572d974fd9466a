"""What NMOptimizer refuses: one sentence that names the thing, and nothing left behind."""

import pytest
import torch
import transformers
from test_sparsify import OPTIONS, tiny_model

from optimum_nm.config import NMConfig
from optimum_nm.errors import NMError
from optimum_nm.nn.skeleton import open_checkpoint
from optimum_nm.optimizer import NMOptimizer


@pytest.fixture
def optimizer(tokenizer):
    return NMOptimizer(tiny_model("Llama", len(tokenizer)), tokenizer)


def refused(optimizer, folder, message, config=None, calibration=None, **options):
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(NMError, match=message) as caught:
        optimizer.optimize(folder, config or NMConfig(**OPTIONS), calibration, progress=False, **options)
    assert "\n" not in str(caught.value)
    assert sorted(folder.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("value", "where"),
    [(float("nan"), "model.layers.1.mlp.up_proj.weight"), (float("inf"), "model.embed_tokens.weight")],
)
def test_weight_that_is_not_finite(optimizer, text, tmp_path, value, where):
    with torch.no_grad():
        optimizer.model.get_parameter(where)[3, 5] = value
    refused(optimizer, tmp_path / "out", f"{where} has elements that are not finite", calibration=[text])


def test_activation_that_is_not_finite(optimizer, text, tmp_path):
    norm = optimizer.model.model.layers[1].input_layernorm
    norm.register_forward_hook(lambda module, args, output: output * float("inf"))
    message = "model.layers.1.self_attn.q_proj receives activations that are not finite"
    refused(optimizer, tmp_path / "out", message, calibration=[text])


def test_block_output_that_is_not_finite(optimizer, text, tmp_path):
    optimizer.model.model.layers[0].register_forward_hook(lambda module, args, output: output * float("nan"))
    refused(optimizer, tmp_path / "out", "decoder block 0 produces activations that are not finite", calibration=[text])


def test_value_that_its_type_cannot_hold(optimizer, text, tmp_path):
    with torch.no_grad():
        optimizer.model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    refused(optimizer, tmp_path / "out", "^model.layers.0.mlp.up_proj: ", calibration=[text])


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([""], "calibration text is empty"),
        (["too short"], "calibration text has .* tokens"),
        ("missing.txt", "'missing.txt' is neither a file"),
    ],
)
def test_calibration_text(optimizer, tmp_path, calibration, message):
    refused(optimizer, tmp_path / "out", message, calibration=calibration)


def test_calibration_longer_than_the_model_reads(optimizer, text, tmp_path):
    config = NMConfig(calibration_length=129)
    refused(optimizer, tmp_path / "out", "calibration_length is 129; the model reads at most 128", config, [text])


def test_tokenizer_of_another_model(tokenizer, text, tmp_path):
    optimizer = NMOptimizer(tiny_model("Llama", 60), tokenizer)
    refused(optimizer, tmp_path / "out", "the model's embedding has 60 rows", calibration=[text])


@pytest.mark.parametrize("field", ["overrides", "exclude"])
def test_name_pattern_that_matches_nothing(optimizer, text, tmp_path, field):
    patterns = {"overrides": {"*.wrong_proj": {"pattern": "4:8"}}, "exclude": ["lm_head", "*.wrong_proj"]}
    config = NMConfig(**{field: patterns[field]}, **OPTIONS)
    refused(optimizer, tmp_path / "out", rf"{field} pattern '\*\.wrong_proj' matches no linear layer", config, [text])


def test_everything_excluded(optimizer, text, tmp_path):
    refused(optimizer, tmp_path / "out", "leaves no linear layer", NMConfig(exclude=["*"], **OPTIONS), [text])


def test_existing_output_folder(optimizer, text, tmp_path):
    (tmp_path / "out").mkdir()
    refused(optimizer, tmp_path / "out", "output folder .*out exists", calibration=[text])


def test_overwriting_a_folder_that_is_no_model(optimizer, text, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    refused(optimizer, tmp_path / "out", "is not a model folder", calibration=[text], overwrite=True)


def test_output_folder_that_cannot_be_written(optimizer, text, tmp_path):
    (tmp_path / "file").write_text("")
    refused(optimizer, tmp_path / "file" / "out", "cannot be written", calibration=[text])


def test_failure_leaves_the_overwritten_folder_as_it_was(optimizer, text, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    with torch.no_grad():
        optimizer.model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e6
    refused(optimizer, tmp_path / "out", "up_proj", calibration=[text], overwrite=True)
    assert (tmp_path / "out" / "config.json").read_text() == "{}"


def test_failure_removes_the_parents_it_made(optimizer, tmp_path):
    with pytest.raises(NMError, match="calibration text is empty"):
        optimizer.optimize(tmp_path / "a" / "b" / "out", NMConfig(**OPTIONS), [""], progress=False)
    assert not (tmp_path / "a").exists()


def test_overwrite_replaces_a_model_folder(optimizer, text, tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("config.json", "old-shard.safetensors"):
        (tmp_path / "out" / name).write_text("{}")
    optimizer.optimize(tmp_path / "out", NMConfig(**OPTIONS), [text], overwrite=True, progress=False)
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert not (tmp_path / "out" / "old-shard.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_second_call_on_the_same_model(optimizer, text, tmp_path):
    optimizer.optimize(tmp_path / "out", NMConfig(**OPTIONS), [text], progress=False)
    refused(optimizer, tmp_path / "again", "is already quantized; a dense model is needed", calibration=[text])


def test_model_without_decoder_blocks(tokenizer, text, tmp_path):
    config = transformers.MambaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2)
    model = transformers.MambaForCausalLM(config)
    model.backbone.layers = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4)})
    optimizer = NMOptimizer(model, tokenizer)
    refused(optimizer, tmp_path / "out", "model type 'mamba' has no decoder blocks", calibration=[text])


def test_from_pretrained_names_what_cannot_be_loaded(tmp_path):
    with pytest.raises(NMError, match=r"nowhere cannot be loaded as a causal language model"):
        NMOptimizer.from_pretrained(tmp_path / "nowhere")


def test_from_pretrained_refuses_an_encoder_decoder(tmp_path):
    transformers.T5Config(d_model=16, num_layers=1).save_pretrained(tmp_path)
    with pytest.raises(NMError, match="cannot be loaded as a causal language model"):
        NMOptimizer.from_pretrained(tmp_path)


def test_output_layer_that_transformers_stores_under_another_name(tokenizer, text, tmp_path):
    """transformers 5 calls GPT-NeoX's output layer lm_head in the model and embed_out in the file."""
    model = tiny_model("GPTNeoX", len(tokenizer))
    optimizer, config = NMOptimizer(model, tokenizer), NMConfig(exclude=[], **OPTIONS)
    if hasattr(model, "embed_out"):
        optimizer.optimize(tmp_path / "out", config, [text], progress=False)
        assert "embed_out" in open_checkpoint(tmp_path / "out").layer_names()
    else:
        refused(optimizer, tmp_path / "out", "lm_head is stored under another name", config, [text])
