"""A model in llama.cpp's format, read back with its own package."""

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import ModelConfig
from engine.errors import InputError
from engine.gguf import write
from engine.model import GPT

gguf: Any = pytest.importorskip("gguf")


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings and the tensors, in fp32, of a GGUF file."""
    reader = gguf.GGUFReader(path)
    settings = {name: field.contents() for name, field in reader.fields.items()}
    return settings, {each.name: gguf.dequantize(each.data, each.tensor_type) for each in reader.tensors}


@pytest.mark.parametrize(("precision", "error"), [("fp32", 0), ("fp16", 1e-3), ("bf16", 8e-3), ("int8", 8e-3)])
def test_weights_come_back_with_the_settings_and_zeros_for_biases(precision: str, error: float, tmp_path: Path) -> None:
    model = GPT(ModelConfig(200, 64, 2, 4, 32, norm_eps=1e-6, rotary_base=500.0))
    write(model, tmp_path / "model.gguf", precision)
    settings, tensors = read(tmp_path / "model.gguf")
    expected = {
        "context_length": 32, "embedding_length": 64, "block_count": 2, "feed_forward_length": 256, "vocab_size": 200,
        "attention.head_count": 4, "rope.dimension_count": 16, "use_parallel_residual": False,
    }  # fmt: skip
    assert {name: settings[f"gptneox.{name}"] for name in expected} == expected
    assert settings["gptneox.rope.freq_base"] == 500 and settings["general.architecture"] == "gptneox"
    assert settings["gptneox.attention.layer_norm_epsilon"] == pytest.approx(1e-6)
    ours = dict(model.state_dict())
    for name, theirs in {
        "embedding.weight": "token_embd.weight", "blocks.1.attention_norm.weight": "blk.1.attn_norm.weight",
        "blocks.1.attention.qkv.weight": "blk.1.attn_qkv.weight", "blocks.0.mlp_norm.weight": "blk.0.ffn_norm.weight",
        "blocks.0.attention.output.weight": "blk.0.attn_output.weight", "head.weight": "output.weight",
        "blocks.0.mlp.expand.weight": "blk.0.ffn_up.weight", "blocks.1.mlp.contract.weight": "blk.1.ffn_down.weight",
        "final_norm.weight": "output_norm.weight",
    }.items():  # fmt: skip
        most = error * ours[name].abs().max().item()
        torch.testing.assert_close(torch.tensor(tensors[theirs]), ours[name], rtol=0, atol=most)
    biases = {name: tensor for name, tensor in tensors.items() if name.endswith("bias")}
    # Each block has those of two norms and four matrices.
    assert len(biases) == 2 * 6 + 1 and not any(tensor.any() for tensor in biases.values())
    assert len(tensors) == len(ours) + len(biases)


def test_a_pythia_keeps_its_biases_and_its_share_of_rotation(tmp_path: Path) -> None:
    model = GPT(ModelConfig(200, 64, 1, 4, 32, rotary_share=0.5, parallel_residual=True, biases=True))
    bias = torch.nn.init.normal_(model.get_parameter("blocks.0.attention.qkv.bias"))
    write(model, tmp_path / "model.gguf", "fp32")
    settings, tensors = read(tmp_path / "model.gguf")
    assert settings["gptneox.rope.dimension_count"] == 8 and settings["gptneox.use_parallel_residual"] is True
    assert tensors["blk.0.attn_qkv.bias"].tolist() == bias.tolist()


def test_a_width_that_8_bits_do_not_divide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the width is 48; 8 bits"):
        write(GPT(ModelConfig(200, 48, 1, 2, 32)), tmp_path / "model.gguf", "int8")
    assert not list(tmp_path.iterdir())
