"""Computing on a device other than the CPU. It is simulated (see simulated_device), so that it is tested everywhere."""

import json
import sys
from pathlib import Path

import pytest
import torch
from native_build import run
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

SCRIPT = Path(__file__).parent / "simulated_device" / "run.py"


@pytest.fixture(scope="module")
def outcomes(tokenizer, tmp_path_factory):
    """Folder of the checkpoints and what was printed, by device."""
    model, found = tmp_path_factory.mktemp("dense"), {}
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes)).save_pretrained(model)
    tokenizer.save_pretrained(model)
    for device in ("cpu", "simulated"):
        folder = tmp_path_factory.mktemp(device)
        found[device] = folder, json.loads(run(sys.executable, SCRIPT, model, folder, device))
    return found


FLOATS = {torch.int16: torch.float16, torch.int32: torch.float32}  # stored as integers of as many bits


def test_sparsified_to_the_same_weights(outcomes):
    """Floats may differ by how a product was rounded, which depends on the strides of a copy."""
    cpu, simulated = (outcomes[device][0] for device in ("cpu", "simulated"))
    assert [path.name for path in sorted(cpu.iterdir())] == [path.name for path in sorted(simulated.iterdir())]
    for folder in cpu.iterdir():
        expected = load_file(folder / "model.safetensors")
        found = load_file(simulated / folder.name / "model.safetensors")
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            pair = (other.view(FLOATS.get(other.dtype, other.dtype)) for other in (found[name], tensor))
            torch.testing.assert_close(*pair, rtol=2e-3, atol=1e-5, msg=f"{folder.name} {name}")


def test_evaluated_and_generated_alike(outcomes):
    (_, cpu), (_, simulated) = outcomes["cpu"], outcomes["simulated"]
    assert simulated["perplexities"] == pytest.approx(cpu["perplexities"], rel=1e-4)
    assert simulated["tokens"] == cpu["tokens"]
