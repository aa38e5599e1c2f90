"""Makes the files beside it: `pip install -e ".[test,reference]"`, `python make.py`.

Tiny LLaMAs of transformers with random weights: folders with an own head, tied and in
shards, and with the frequencies of LLaMA 3.1; the first two in Meta's format, in two
files, the second of them with shared keys and its embedding split as LLaMA 3's; the
second as quantised GGUF, the third as GGUF in float32. And the logits that transformers
computes with the folders and with its own reading of `tied.gguf` (`expected.npz`).
"""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
SHAPE = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
}
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
MODELS = {
    "own": {"num_key_value_heads": 4, "rms_norm_eps": 1e-5},
    "tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "llama3": {"num_key_value_heads": 1, "head_dim": 16, "rope_parameters": ROPE},
}
META = {  # names in Meta's files, and the axis along which they are split
    "model.embed_tokens": ("tok_embeddings", 1),
    "model.norm": ("norm", None),
    "lm_head": ("output", 0),
    "input_layernorm": ("attention_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
    "self_attn.q_proj": ("attention.wq", 0),
    "self_attn.k_proj": ("attention.wk", 0),
    "self_attn.v_proj": ("attention.wv", 0),
    "self_attn.o_proj": ("attention.wo", 1),
    "mlp.gate_proj": ("feed_forward.w1", 0),
    "mlp.up_proj": ("feed_forward.w3", 0),
    "mlp.down_proj": ("feed_forward.w2", 1),
}
LAST = 4  # tokens of the long text whose logits are kept


def randomised(model):
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model.eval()


def interleaved(weight, heads):
    """Rows in Meta's and GGUF's order: the inverse of transformers' `permute`."""
    rows, columns = weight.shape
    pairs = weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2)
    return pairs.reshape(rows, columns)


def permuted(model, name, weight):
    config = model.config
    if "q_proj" in name:
        return interleaved(weight, config.num_attention_heads)
    if "k_proj" in name:
        return interleaved(weight, config.num_key_value_heads)
    return weight


def write_meta(model, folder: Path, embedding_axis: int = 1) -> None:
    folder.mkdir(exist_ok=True)
    parts, config = [{}, {}], model.config
    for name, weight in model.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        theirs, (meta, axis) = next(x for x in META.items() if x[0] in name)
        axis = embedding_axis if meta == "tok_embeddings" else axis
        meta = name.replace("model.layers", "layers").replace(theirs, meta)
        weight = permuted(model, name, weight).clone()
        halves = [weight, weight] if axis is None else weight.chunk(2, axis)
        for part, half in zip(parts, halves, strict=True):
            part[meta] = half.clone()
    for index, part in enumerate(parts):
        part["rope.freqs"] = torch.ones(4)
        torch.save(part, folder / f"consolidated.{index:02d}.pth")
    params = {
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "multiple_of": 8,
        "ffn_dim_multiplier": 0.5625,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": -1,
    }
    if config.num_key_value_heads != config.num_attention_heads:
        params["n_kv_heads"] = config.num_key_value_heads
    (folder / "params.json").write_text(json.dumps(params) + "\n", "utf-8")


def divisors(rope, size):
    """Factors that divide the frequencies, as llama.cpp's converter writes them."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    found = []
    for place in range(0, size, 2):
        wave = 2 * np.pi * rope["rope_theta"] ** (place / size)
        turns = rope["original_max_position_embeddings"] / wave
        share = min(max((turns - low) / (high - low), 0), 1)
        found.append(1 / ((1 - share) / rope["factor"] + share))
    return np.float32(found)


def write_gguf(model, path: Path, quantised: bool) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    if config.rope_parameters["rope_type"] == "llama3":
        factors = divisors(config.rope_parameters, config.head_dim)
        writer.add_tensor("rope_freqs.weight", factors)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        array = permuted(model, name, weight).numpy()
        ours = names.get_name(name, try_suffixes=(".weight",))
        wide = quantised and array.ndim == 2 and array.shape[1] % 32 == 0
        kind = gguf.GGMLQuantizationType.Q8_0 if wide else gguf.GGMLQuantizationType.F32
        writer.add_tensor(ours, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def main(folder: Path, seed: int = 0) -> None:
    torch.manual_seed(seed)
    draw = np.random.default_rng(seed)
    tokens, long = draw.integers(0, 40, (2, 7)), draw.integers(0, 40, (1, 1500))
    expected = {"tokens": tokens, "long": long}
    for name, changes in MODELS.items():
        model = randomised(
            transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, **changes))
        )
        size = "12KB" if name == "tied" else "5GB"
        model.save_pretrained(folder / name, max_shard_size=size)
        expected[name] = logits(model, tokens)
        expected[f"{name}/long"] = logits(model, long)[:, -LAST:]
        if name == "own":
            write_meta(model, folder / "meta")
        if name == "llama3":
            write_gguf(model, folder / "llama3.gguf", quantised=False)
        if name == "tied":
            write_meta(model, folder / "meta3", embedding_axis=0)
            write_gguf(model, folder / "tied.gguf", quantised=True)
            read = transformers.LlamaForCausalLM.from_pretrained(
                folder, gguf_file="tied.gguf"
            )
            expected["tied.gguf"] = logits(read.eval(), tokens)
    np.savez_compressed(folder / "expected.npz", **expected)


if __name__ == "__main__":
    main(HERE)
