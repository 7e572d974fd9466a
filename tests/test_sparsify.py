"""NMOptimizer from a dense model to a checkpoint folder, over architectures and options."""

import json
import zlib
from types import SimpleNamespace

import pytest
import torch
import transformers

from optimum_nm.calibration.windows import calibration_windows
from optimum_nm.config import NMConfig
from optimum_nm.nn.convert import dense_weight, linear_layers
from optimum_nm.nn.linear import NMLinear
from optimum_nm.nn.skeleton import open_checkpoint
from optimum_nm.optimizer import NMOptimizer

SMALL = dict(
    hidden_size=48,
    intermediate_size=88,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=0,
    eos_token_id=0,
)
ARCHITECTURES = {
    "Llama": dict(SMALL, attention_bias=True, mlp_bias=True),
    "Mistral": dict(SMALL, sliding_window=16),
    "Qwen2": dict(SMALL, tie_word_embeddings=True),
    "Qwen3": SMALL,
    "Gemma": SMALL,
    "Gemma2": dict(SMALL, sliding_window=16, query_pre_attn_scalar=12),
    "Gemma3": dict(SMALL, sliding_window=16, query_pre_attn_scalar=12, sliding_window_pattern=2),
    "Phi": dict(SMALL, partial_rotary_factor=0.5),
    "OPT": dict(SMALL, ffn_dim=88, word_embed_proj_dim=32, do_layer_norm_before=False),
    "GPT2": dict(n_embd=48, n_inner=88, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0),
    "GPTNeoX": dict(SMALL, num_key_value_heads=4, use_parallel_residual=False),
}
OPTIONS = dict(calibration_samples=4, calibration_length=48)


def tiny_model(architecture, vocab_size):
    """A random model with norms and biases that are not the ones it starts with."""
    names = [f"{architecture}TextConfig", f"{architecture}Config"]
    config_class = next(getattr(transformers, name) for name in names if hasattr(transformers, name))
    torch.manual_seed(0)
    config = config_class(vocab_size=vocab_size, **ARCHITECTURES[architecture])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.rand_like(parameter)
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_becomes_a_packed_checkpoint(architecture, tokenizer, text, tmp_path):
    model = tiny_model(architecture, len(tokenizer))
    dense = {name: dense_weight(module).detach().clone() for name, module in linear_layers(model).items()}
    config = NMConfig(outliers="2:32", variance_correction=None, **OPTIONS)
    summary = NMOptimizer(model, tokenizer).optimize(tmp_path / "out", config, [text], progress=False)

    checkpoint = open_checkpoint(tmp_path / "out")
    output = next((name for name in dense if name in ("lm_head", "embed_out")), None)
    assert set(checkpoint.layer_names()) == dense.keys() - {output}
    assert {layer.name for layer in summary.layers} == dense.keys() - {output}
    assert not set(linear_layers(model)) - {output}
    for name in checkpoint.layer_names():
        packed = checkpoint.packed(name)
        packed.validate(name)
        unpacked = packed.unpack()
        kept = unpacked != 0
        assert torch.equal(unpacked[kept], dense[name].half().float()[kept])
        groups = torch.nn.functional.pad(packed.mask() & ~packed.outlier_mask() & kept, (0, -kept.shape[1] % 16))
        assert groups.view(len(kept), -1, 16).sum(dim=-1).max() <= 8
    hidden = model(torch.arange(20)[None]).logits
    assert torch.isfinite(hidden).all()


def test_each_layer_is_pruned_on_what_the_sparse_layers_before_it_produce(tokenizer, text, tmp_path):
    """With the first block emptied, the second sees other inputs and keeps other weights."""
    masks = []
    for values in ({}, {"model.layers.0.*": {"pattern": "1:32", "group_size": 32}}):
        model = tiny_model("Llama", len(tokenizer))
        config = NMConfig(overrides=values, **OPTIONS)
        NMOptimizer(model, tokenizer).optimize(tmp_path / str(len(masks)), config, [text], progress=False)
        masks.append(model.get_submodule("model.layers.1.mlp.down_proj").packed.mask())
    assert not torch.equal(*masks)


def test_statistics_are_those_of_the_dense_block_on_sparse_inputs(tokenizer, text, tmp_path):
    """The same masks as from a plain forward pass with the sparse first block and the dense second one."""
    model = tiny_model("Llama", len(tokenizer))
    reference = tiny_model("Llama", len(tokenizer))
    config = NMConfig(score="wanda", variance_correction=None, weight_dtype="float32", **OPTIONS)
    optimizer = NMOptimizer(model, tokenizer)
    optimizer.optimize(tmp_path / "out", config, [text], progress=False)
    for name, module in linear_layers(reference.model.layers[0]).items():
        with torch.no_grad():
            module.weight.copy_(model.model.layers[0].get_submodule(name).packed.unpack())
    inputs = []
    layer = reference.model.layers[1].mlp.down_proj
    layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        reference(calibration_windows([text], tokenizer, 4, 48, seed=0))
    scores = layer.weight.abs() * inputs[0].reshape(-1, inputs[0].shape[-1]).norm(dim=0)
    padded = torch.nn.functional.pad(scores, (0, -scores.shape[1] % 16)).view(len(scores), -1, 16)
    expected = torch.zeros_like(padded, dtype=torch.bool).scatter_(-1, padded.topk(8).indices, True)
    expected = expected.view(len(scores), -1)[:, : scores.shape[1]]
    found = model.model.layers[1].mlp.down_proj.packed.unpack() != 0
    assert (found == expected).float().mean() > 0.999


def test_folder_holds_the_configuration_checksums_summary_and_tokenizer(tokenizer, text, tmp_path):
    config = NMConfig(pattern="4:8", weight_dtype="int8", group_size=64, **OPTIONS)
    model = tiny_model("Llama", len(tokenizer))
    summary = NMOptimizer(model, tokenizer).optimize(tmp_path / "out", config, [text], progress=False)
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["quantization_config"] == config.to_dict()
    checkpoint = open_checkpoint(tmp_path / "out")
    checksums = json.loads((tmp_path / "out" / "nm_checksums.json").read_text())
    assert checksums.keys() == checkpoint.locations.keys()
    for name, location in checkpoint.locations.items():
        data = location.file.read_bytes()[location.offset : location.offset + location.nbytes]
        assert int(checksums[name], 16) == zlib.crc32(data)
    assert json.loads((tmp_path / "out" / "nm_summary.json").read_text()) == json.loads(json.dumps(summary.to_dict()))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("the river")["input_ids"]
    assert (tmp_path / "out" / "generation_config.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("options", [{}, {"equalization_mode": "fold", "outliers": "4:64", "weight_dtype": "int4"}])
def test_same_input_gives_the_same_bytes(options, tokenizer, text, tmp_path):
    config = NMConfig(**options, **OPTIONS)
    for run in ("first", "second"):
        model = tiny_model("Qwen2", len(tokenizer))
        NMOptimizer(model, tokenizer).optimize(tmp_path / run, config, [text], progress=False)
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "second").iterdir())
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        {"pattern": "2:4", "score": "magnitude", "equalization": None},
        {"pattern": "16:32", "score": "wanda", "variance_correction": "tensor"},
        {"pattern": "5:8", "variance_correction": "output", "positions": "bitmap"},
        {"pattern": "6:16", "variance_correction": "least-squares", "weight_dtype": "bfloat16"},
        {"pattern": "8:16", "outliers": "16:256", "outlier_dtype": "float32", "weight_dtype": "float32"},
        {"pattern": "16:16", "weight_dtype": "int4", "group_size": "row"},
    ],
)
def test_options_reach_every_layer(options, tokenizer, text, tmp_path):
    model = tiny_model("Llama", len(tokenizer))
    summary = NMOptimizer(model, tokenizer).optimize(
        tmp_path / "out", NMConfig(**options, **OPTIONS), [text], progress=False
    )
    checkpoint = open_checkpoint(tmp_path / "out")
    for layer in summary.layers:
        packed = checkpoint.packed(layer.name)
        packed.validate(layer.name)
        assert layer.shape == (packed.out_features, packed.in_features)
        assert layer.bits_per_weight == packed.bits_per_weight
        nonzero = (packed.unpack() != 0).float().mean().item()
        assert abs(nonzero - layer.density) < (0.2 if options.get("weight_dtype") == "int4" else 0.01)  # rounded to 0
        assert 0 < layer.relative_error < 0.7


def test_summary_error_is_that_of_the_packed_weight(tokenizer, text, tmp_path):
    """Measured on sampled tokens or with the Gram matrix, it is what the formula gives on all inputs."""
    errors = {}
    for correction in ("least-squares", "row"):
        model = tiny_model("Llama", len(tokenizer))
        weight = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
        inputs = []
        hook = model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(
            lambda module, args, inputs=inputs: inputs.append(args[0].reshape(-1, args[0].shape[-1]))
        )
        config = NMConfig(variance_correction=correction, **OPTIONS)
        summary = NMOptimizer(model, tokenizer).optimize(tmp_path / correction, config, [text], progress=False)
        hook.remove()
        rows = inputs[-1]
        change = weight - model.model.layers[0].self_attn.q_proj.packed.unpack()
        expected = ((rows @ change.t()).square().sum() / (rows @ weight.t()).square().sum()).item()
        errors[correction] = summary.layers[0].relative_error / expected
    assert abs(errors["least-squares"] - 1) < 1e-3
    assert abs(errors["row"] - 1) < 0.1


def test_less_pruning_gives_less_error(tokenizer, text, tmp_path):
    errors = []
    for pattern, outliers in (("4:16", None), ("8:16", None), ("8:16", "16:256"), ("12:16", None)):
        model = tiny_model("Llama", len(tokenizer))
        config = NMConfig(pattern=pattern, outliers=outliers, variance_correction=None, **OPTIONS)
        folder = tmp_path / str(len(errors))
        summary = NMOptimizer(model, tokenizer).optimize(folder, config, [text], progress=False)
        errors.append(summary.by_type()["all"]["relative_error"])
    assert errors == sorted(errors, reverse=True)


def test_overrides_and_exclude_go_by_name(tokenizer, text, tmp_path):
    overrides = {"*.mlp.*": {"pattern": "4:16"}, "*.down_proj": {"weight_dtype": "int8", "outliers": "8:64"}}
    config = NMConfig(exclude=["lm_head", "*.1.self_attn.v_proj"], overrides=overrides, **OPTIONS)
    model = tiny_model("Llama", len(tokenizer))
    summary = NMOptimizer(model, tokenizer).optimize(tmp_path / "out", config, [text], progress=False)
    assert isinstance(model.model.layers[1].self_attn.v_proj, torch.nn.Linear)
    checkpoint = open_checkpoint(tmp_path / "out")
    down = checkpoint.packed("model.layers.0.mlp.down_proj").config
    assert (str(down.pattern), down.weight_dtype, str(down.outliers)) == ("4:16", "int8", "8:64")
    assert "model.layers.1.self_attn.v_proj" not in {layer.name for layer in summary.layers}
    assert abs(summary.by_type()["mlp.up_proj"]["density"] - 0.25) < 0.01


@pytest.mark.parametrize("architecture", ["Qwen2", "GPT2"])
def test_output_layer_is_packed_apart_from_a_tied_embedding(architecture, tokenizer, text, tmp_path):
    model = tiny_model(architecture, len(tokenizer))
    name = "lm_head"
    embedding = model.get_input_embeddings().weight.detach().clone()
    weight = model.get_submodule(name).weight.detach().clone()
    config = NMConfig(exclude=[], overrides={name: {"pattern": "16:16", "weight_dtype": "int8"}}, **OPTIONS)
    NMOptimizer(model, tokenizer).optimize(tmp_path / "out", config, [text], progress=False)
    checkpoint = open_checkpoint(tmp_path / "out")
    unpacked = checkpoint.packed(name).unpack()
    assert (unpacked - weight).abs().max() <= weight.abs().max() / 100
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    stored = next(key for key in checkpoint.locations if key.endswith(("embed_tokens.weight", "wte.weight")))
    assert torch.equal(checkpoint.tensor(stored), embedding)
    assert isinstance(model.get_submodule(name), NMLinear)


def test_output_layer_is_scored_on_the_output_of_the_sparse_model(tokenizer, text, tmp_path):
    model = tiny_model("Llama", len(tokenizer))
    inputs = []
    model.lm_head.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    config = NMConfig(exclude=[], **OPTIONS)
    NMOptimizer(model, tokenizer).optimize(tmp_path / "out", config, [text], progress=False)
    seen = inputs[-1]
    with torch.no_grad():
        expected = model.model(calibration_windows([text], tokenizer, 4, 48, seed=0)).last_hidden_state
    assert torch.allclose(seen, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "processor", "said"),
    [(torch.bfloat16, "AVX2", True), (torch.bfloat16, "AVX512", False), (torch.float32, "AVX2", False)],
)
def test_says_that_the_processor_is_slow_with_halves(tokenizer, text, dtype, processor, said, monkeypatch, caplog):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: processor)
    optimizer = NMOptimizer(tiny_model("Llama", len(tokenizer)).to(dtype), tokenizer)
    optimizer.sparsify(NMConfig(**OPTIONS), [text], progress=False)
    assert ("load it with dtype='float32'" in caplog.text) == said


def test_bfloat16_model_keeps_its_type(tokenizer, text, tmp_path):
    model = tiny_model("Llama", len(tokenizer)).to(torch.bfloat16)
    NMOptimizer(model, tokenizer).optimize(tmp_path / "out", NMConfig(**OPTIONS), [text], progress=False)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.locate("model.embed_tokens.weight").dtype == "BF16"
    assert checkpoint.locate("model.layers.0.self_attn.q_proj.bias").dtype == "BF16"


def test_weights_that_no_token_reaches_are_pruned_by_magnitude(tokenizer, text, tmp_path):
    model = tiny_model("Llama", len(tokenizer))
    model.model.layers[0].mlp.unused = torch.nn.Linear(48, 32)
    weight = model.model.layers[0].mlp.unused.weight.detach().clone()
    config = NMConfig(score="wanda", equalization=None, variance_correction=None, **OPTIONS)
    NMOptimizer(model, tokenizer).optimize(tmp_path / "out", config, [text], progress=False)
    kept = model.model.layers[0].mlp.unused.packed.unpack() != 0
    groups = weight.abs().view(32, 3, 16)
    expected = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, groups.topk(8).indices, True)
    assert torch.equal(kept.view(32, 3, 16), expected)


def test_from_pretrained_loads_the_model_and_its_tokenizer(tiny_llama_folder, text, tmp_path):
    optimizer = NMOptimizer.from_pretrained(tiny_llama_folder, dtype="bfloat16")
    assert optimizer.model.dtype == torch.bfloat16
    optimizer = NMOptimizer.from_pretrained(str(tiny_llama_folder))
    assert optimizer.model.dtype == torch.float32
    optimizer.optimize(tmp_path / "deep" / "out", NMConfig(**OPTIONS), [text], progress=False)
    assert open_checkpoint(tmp_path / "deep" / "out").layer_names()


def test_progress_bar_counts_blocks_and_shows_the_error(tokenizer, text, tmp_path, capsys):
    model = tiny_model("Llama", len(tokenizer))
    NMOptimizer(model, tokenizer).optimize(tmp_path / "out", NMConfig(**OPTIONS), [text])
    shown = capsys.readouterr().err
    assert "2/2" in shown and "layer_error=" in shown


def test_summary_table_names_every_layer_type(tokenizer, text, tmp_path):
    model = tiny_model("GPT2", len(tokenizer))
    summary = NMOptimizer(model, tokenizer).optimize(tmp_path / "out", NMConfig(**OPTIONS), [text], progress=False)
    table = str(summary).splitlines()
    kinds = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "all"]
    assert [line.split()[0] for line in table[2:]] == kinds
    assert SimpleNamespace(**summary.by_type()["all"]).layers == 8
