"""transformers and packed checkpoints: loading, saving again, unpacking to a dense model, refusing what is damaged."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from packed_models import MODELS, packed_checkpoint, random_tokens, torch_logits
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import optimum_nm  # noqa: F401  it registers the quantization method
from optimum_nm import NMLinear, NMModelForCausalLM
from optimum_nm.errors import NMError
from optimum_nm.nn.convert import linear_layers

TOKENS = random_tokens(9)


def tensors(folder):
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize("model_type", MODELS)
def test_loads_saves_and_unpacks_every_architecture(tmp_path, model_type):
    packed_checkpoint(tmp_path / "first", model_type, "float16", **MODELS[model_type])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "first", dtype=torch.float32).eval()
    packed = [name for name, module in model.named_modules() if isinstance(module, NMLinear)]
    assert len(packed) >= 8
    logits = torch_logits(model, TOKENS)

    model.save_pretrained(tmp_path / "second")
    first, second = tensors(tmp_path / "first"), tensors(tmp_path / "second")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    again = NMModelForCausalLM.from_pretrained(tmp_path / "second", dtype=torch.float32).eval()
    assert (torch_logits(again, TOKENS) == logits).all()

    dense = model.dequantize()
    assert not any(isinstance(module, NMLinear) for module in dense.modules())
    assert set(packed) <= linear_layers(dense).keys()
    assert (model_type == "gpt2") == any(isinstance(module, Conv1D) for module in dense.modules())
    assert abs(torch_logits(dense, TOKENS) - logits).max() < 1e-4
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    assert abs(torch_logits(plain, TOKENS) - logits).max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", ["float32", "float16", "bfloat16", "int8", "int4"])
def test_packed_tensors_keep_their_bits_in_every_type(tmp_path, weight_dtype, dtype):
    packed_checkpoint(tmp_path, "llama", weight_dtype, torch.float16)
    model = NMModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    stored = tensors(tmp_path)
    for name, module in model.named_modules():
        if isinstance(module, NMLinear):
            for role, tensor in module.packed.tensors.items():
                assert torch.equal(tensor, stored[f"{name}.{role}"])
    logits = model(torch.tensor([TOKENS])).logits
    assert logits.dtype == dtype and logits.isfinite().all()


def test_sharded_checkpoint(tmp_path):
    model = packed_checkpoint(tmp_path, "llama", "int4", shard="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, device_map="cpu")
    assert (torch_logits(again, TOKENS) == torch_logits(model, TOKENS)).all()


def test_generates_and_trains_adapters(tmp_path):
    model = packed_checkpoint(tmp_path, "llama", "int8")
    prompt = torch.tensor([TOKENS])
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings).shape == (1, len(TOKENS) + 5)
    model.train()
    model(prompt, labels=prompt).loss.backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound") / "packed"
    packed_checkpoint(folder, "llama", "int8")
    return folder


@pytest.fixture
def folder(sound, tmp_path):
    return Path(shutil.copytree(sound, tmp_path / "packed"))


LAYER = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    "role,change,message",
    [
        ("positions", None, rf"'{LAYER}\.positions' is missing"),
        ("values", None, rf"'{LAYER}\.values' is missing"),
        (
            "scales",
            lambda t: t[:, :-1].contiguous(),
            rf"{LAYER}\.scales in .* is I16 \[96, 1\]; the configuration asks",
        ),
        ("values", lambda t: t.to(torch.int16), rf"{LAYER}\.values in .* is I16 "),
        ("positions", lambda t: torch.full_like(t, 255), rf"{LAYER}\.positions marks 16 columns in row 0, group 0"),
        ("outlier_positions", lambda t: torch.full_like(t, 200), rf"{LAYER}\.outlier_positions "),
    ],
)
def test_refuses_a_damaged_tensor_by_name(folder, role, change, message):
    stored = load_file(folder / "model.safetensors")
    tensor = stored.pop(f"{LAYER}.{role}")
    if change is not None:
        stored[f"{LAYER}.{role}"] = change(tensor)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    for loader in (NMModelForCausalLM, AutoModelForCausalLM):
        with pytest.raises(NMError, match=message):
            loader.from_pretrained(folder)


def test_refuses_a_truncated_file(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(NMError, match="is truncated"):
        NMModelForCausalLM.from_pretrained(folder)


def test_refuses_a_newer_format(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(NMError, match="format_version is 2; this optimum-nm reads up to 1, please upgrade it"):
        NMModelForCausalLM.from_pretrained(folder)


def test_loader_takes_packed_checkpoints_only(tiny_llama_folder, tmp_path):
    with pytest.raises(NMError, match="has quantization method None, not 'nm': it is not a packed checkpoint"):
        NMModelForCausalLM.from_pretrained(tiny_llama_folder)
    with pytest.raises(NMError, match="cannot be loaded as a model"):
        NMModelForCausalLM.from_pretrained(tmp_path)
