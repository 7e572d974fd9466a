"""Tiny random mixtures of experts, one of which may get no token."""

import torch
import transformers
from transformers import AutoModelForCausalLM

COMMON = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts_per_tok=2,
    head_dim=16,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=0,
    eos_token_id=0,
)
ARCHITECTURES = {
    "Mixtral": dict(COMMON, num_local_experts=5),
    "Qwen2Moe": dict(COMMON, num_experts=6, moe_intermediate_size=32, shared_expert_intermediate_size=48),
    "Qwen3Moe": dict(COMMON, num_experts=6, moe_intermediate_size=32, norm_topk_prob=True),
    "Olmoe": dict(COMMON, num_experts=5),
}
STARVED = 3  # the expert of the second block


def expert_model(architecture, vocab_size, starved=False, **changes):
    """A dense model in which the experts weigh; `starved`: the router sends no token at all to one of them."""
    torch.manual_seed(0)
    config_class = getattr(transformers, f"{architecture}Config")
    config = config_class(vocab_size=vocab_size, **(ARCHITECTURES[architecture] | changes))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.rand_like(parameter)
            elif "gate.weight" in name:
                parameter.normal_()  # or all experts would be as good as equal
                if starved and name.endswith(("1.mlp.gate.weight", "1.block_sparse_moe.gate.weight")):
                    # of a row and its negative one gives more than 0, and there are two such pairs
                    parameter[[1, 4]] = -parameter[[0, 2]]
                    parameter[STARVED] = 0
            elif "experts" in name:
                parameter *= 5
    return model
