"""Packed checkpoints of tiny models of any architecture, for the tests of both graphs."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from optimum_nm import NMConfig, NMLinear, NMModelForCausalLM, PackedWeight
from optimum_nm.nn.convert import dense_weight, linear_layers, replace_linear
from optimum_nm.nn.embedding import share_embedding
from optimum_nm.packing.safetensors_files import read_header
from optimum_nm.packing.tensor_files import write_tensors
from optimum_nm.sparsify.tensor_order import arranged

TOKENS = {"vocab_size": 200, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
DIMENSIONS = TOKENS | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
GPT = TOKENS | {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 256}
# Architectures that are loaded and traced, with what their configuration needs beside DIMENSIONS.
MODELS = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "gemma": {"head_dim": 16},
    "phi": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "gpt2": {},
    "gpt_neox": {},
}


def packed_checkpoint(
    folder, model_type="llama", weight_dtype="float32", stored_dtype=torch.float32, packing=None, shard="5GB", **changes
):
    """A packed checkpoint with random weights everywhere, biases and norms too, and its torch model.

    Args:
        packing: how; None for 8:16 with outliers and values of `weight_dtype`.
        shard: largest size of a file.
        changes: to DIMENSIONS, or whatever else the model's configuration takes.
    """
    torch.manual_seed(0)
    dimensions = GPT if model_type in ("gpt2", "gptj") else DIMENSIONS
    config = AutoConfig.for_model(model_type, **(dimensions | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        scale = 0.2 if parameter.ndim == 1 else 0.1
        centre = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
        parameter.data.copy_(torch.randn_like(parameter) * scale + centre)
    packing = packing or NMConfig(weight_dtype=weight_dtype, group_size=32, outliers="4:256")
    for name, linear in linear_layers(model).items():
        layer = packing.layer(name)
        if layer is not None:
            packed = PackedWeight.from_config(dense_weight(linear).data, layer)
            replace_linear(model, name, NMLinear.from_packed(packed, linear.bias))
    if packing.share_embedding:
        share_embedding(model)
    model.config.quantization_config = packing.to_dict()
    model.to(stored_dtype).save_pretrained(folder, max_shard_size=shard)
    return NMModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def rearrange(folder):
    """Put the tensors of model.safetensors into the order that NMOptimizer writes."""
    file = folder / "model.safetensors"
    locations = read_header(file)
    with (folder / "arranged").open("wb") as stream:
        write_tensors(stream, {name: locations[name] for name in arranged(locations, locations)})
    (folder / "arranged").rename(file)


def torch_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


def random_tokens(count):
    return torch.randint(0, TOKENS["vocab_size"], (count,), generator=torch.Generator().manual_seed(1)).tolist()
