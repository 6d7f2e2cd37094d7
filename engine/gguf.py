"""Write a model as GGUF, the file that llama.cpp reads: GPT-NeoX by llama.cpp's names, and the settings that it needs.

llama.cpp stacks query, key and value as we do and rotates as we do. It wants a bias everywhere, and computes GELU in
its tanh form, which moves scores by some thousandths.
"""

from pathlib import Path

import torch

from engine.errors import InputError
from engine.huggingface import renamed
from engine.model import GPT

NAMES = {
    "embedding": "token_embd",
    "blocks": "blk",
    "attention_norm": "attn_norm",
    "attention.qkv": "attn_qkv",
    "attention.output": "attn_output",
    "mlp_norm": "ffn_norm",
    "mlp.expand": "ffn_up",
    "mlp.contract": "ffn_down",
    "final_norm": "output_norm",
    "head": "output",
}
# How GGUF holds the matrices of a model in each of our precisions. Q8_0 has a scale for each 32 numbers of a row.
KINDS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "int8": "Q8_0"}


def write(model: GPT, path: Path, precision: str) -> None:
    """Write a model, its matrices in `precision`, without a tokenizer: llama.cpp takes and gives ids of tokens then.

    Raises ImportError without the package `gguf`, and InputError where int8 does not divide the width.
    """
    import gguf

    config = model.config
    if precision == "int8" and config.width % 32:
        raise InputError(f"the width is {config.width}; 8 bits in llama.cpp need a multiple of 32")
    writer = gguf.GGUFWriter(path, "gptneox")
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.blocks)
    writer.add_feed_forward_length(4 * config.width)
    writer.add_head_count(config.heads)
    writer.add_rope_dimension_count(config.rotary_dim)
    writer.add_rope_freq_base(config.rotary_base)
    writer.add_parallel_residual(config.parallel_residual)
    writer.add_layer_norm_eps(config.norm_eps)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)
    tensors = {renamed(name, NAMES): tensor for name, tensor in model.state_dict().items()}
    if not config.biases:
        for name in [name for name in tensors if name.startswith(("blk", "output_norm"))]:
            tensors[name.replace("weight", "bias")] = torch.zeros(len(tensors[name]))
    for name, tensor in tensors.items():
        kind = gguf.GGMLQuantizationType[KINDS[precision] if tensor.ndim == 2 else "F32"]
        writer.add_tensor(name, gguf.quantize(tensor.float().cpu().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
