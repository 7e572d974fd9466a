"""python run.py MODEL FOLDER DEVICE: sparsify and evaluate on a device; prints the perplexities by configuration."""

import json
import sys
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))

from conftest import prose  # noqa: E402

from optimum_nm import NMConfig, NMModelForCausalLM, NMOptimizer  # noqa: E402
from optimum_nm.evaluate.perplexity import evaluate_torch  # noqa: E402

SAMPLES = {"calibration_samples": 4, "calibration_length": 64}
FINETUNE = {"epochs": 1, "batch_size": 2, "learning_rate": 1e-3}
CONFIGURATIONS = {
    "mask": {"outliers": "8:32", "equalization_mode": "fold", "swaps": 2},
    "admm": {"solver": "admm", "weight_dtype": "int8", "finetune": FINETUNE},
    "alps": {"solver": "alps", "weight_dtype": "int4", "group_size": 32, "variance_correction": "output"},
    "sparsegpt": {"solver": "sparsegpt", "outliers": "4:32"},
    "distilled": {"weight_dtype": "float32", "distill": {"epochs": 1, "batch_size": 2}},
    "budget": {"target_bits": 8.0},
    "shared embedding": {
        "exclude": [],
        "overrides": {"lm_head": {"pattern": "16:16", "weight_dtype": "int8", "group_size": 32}},
        "share_embedding": True,
    },
}


def main(model: str, folder: Path, device: str) -> None:
    torch.manual_seed(0)
    text = prose(2000)
    perplexities = {}
    for name, options in CONFIGURATIONS.items():
        config = NMConfig(**SAMPLES, **options)
        NMOptimizer.from_pretrained(model).optimize(folder / name, config, [text], progress=False, device=device)
        result = evaluate_torch(str(folder / name), [text], window=64, limit=400, device=device)
        perplexities[name] = result.perplexity
    packed = NMModelForCausalLM.from_pretrained(folder / "mask").to(device)
    tokens = packed.generate(torch.tensor([[5, 6, 7]], device=device), max_new_tokens=8, do_sample=False)
    print(json.dumps({"perplexities": perplexities, "tokens": tokens.tolist()}))


if __name__ == "__main__":
    if sys.argv[3] == "simulated":
        import simulated_device  # noqa: F401
    with sdpa_kernel(SDPBackend.MATH):  # of the attentions that the CPU has, the simulated device has this one
        main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
