"""Triton kernels of others as the compiler wants them, for `gpt bench-compile --model`: nothing here launches.

The tile sizes of a peer are its own choice for the architecture. The tutorial of Triton tries several.
"""

import importlib
import itertools
from collections.abc import Iterator
from typing import Any

from bench.compile_report import TYPE_OF, Launch
from kernels.tiles import Tile

# Widths of SmolLM2-135M and 360M, Qwen3-0.6B and Llama 3.2 1B, and of their MLPs.
LLAMA_SIZES = {"rms_norm": (576, 960, 1024, 2048), "silu_mul": (1536, 2560, 3072, 8192)}


def plain(architecture: int, head_dim: int) -> Iterator[Launch]:
    """Yield causal, dense attention in bf16: the plainest, with the tiles of Triton's tutorial."""
    from bench import plain_triton as plain

    # The tutorial has eight warps on Hopper for the largest of its tiles alone, and one size for the backward pass.
    forward = [
        Tile(queries, keys, warps, 3, True)
        for queries, keys, warps in itertools.product((64, 128), (32, 64, 128), (4, 8))
        if architecture != 90 or warps == 4 or queries * keys == 128 * 128
    ]
    for name, function, tiles in (
        ("forward", plain.forward_kernel, forward),
        ("keys", plain.dk_dv_kernel, [Tile(32, 128, 4, 5)]),
        ("queries", plain.dq_kernel, [Tile(128, 32, 4, 5)]),
    ):
        for tile in tiles:
            constants = {"HEAD_DIM": head_dim, "BLOCK_T": tile.queries, "BLOCK_S": tile.keys}
            yield _launch("plain", name, function, constants, head_dim, tile)


def flash_linear_attention(architecture: int, head_dim: int) -> Iterator[Launch]:
    """Yield the same attention of another package. Raises ImportError where it is not installed."""
    fla: Any = importlib.import_module("fla.ops.attn.parallel")
    # What it chooses where a multiprocessor has as much shared memory as a Hopper, an Ampere, or less.
    large, middle = architecture in (90, 100), architecture == 80
    warps, other = (8, 64) if large else (4, 32) if middle else (2, 32)
    own = 128 if large or (middle and head_dim <= 64) else 64
    values = head_dim if large else min(head_dim, 128 if middle else 64)
    switches: dict[str, Any] = {
        "W": None, "B": 4, "H": 16, "HQ": 16, "G": 1, "K": head_dim, "V": head_dim, "BK": head_dim, "BS": other,
        "g_cumsum": None, "dg_cumsum": None, "sink_bias": None, "cu_seqlens": None, "chunk_indices": None,
        "USE_G": False, "USE_SINK_BIAS": False, "USE_WINDOW": False, "IS_VARLEN": False,
    }  # fmt: skip
    for name, function, tile, columns in (
        ("forward", fla.parallel_attn_fwd_kernel, Tile(128, other, warps, 3), values),
        ("keys", fla.parallel_attn_bwd_kernel_dkv, Tile(other, own, warps, 3), head_dim),
        ("queries", fla.parallel_attn_bwd_kernel_dq, Tile(own, other, warps, 3), head_dim),
    ):
        kernel = function.fn
        held = tile.keys if name == "keys" else tile.queries
        constants = {each: value for each, value in switches.items() if each in kernel.arg_names}
        yield _launch("fla", name, kernel, {**constants, "BT": held, "BV": columns}, head_dim, tile)


def _launch(peer: str, name: str, function: Any, constants: dict[str, Any], head_dim: int, tile: Tile) -> Launch:
    types = TYPE_OF | dict.fromkeys(("q", "k", "v", "o", "do", "dq", "dk", "dv"), "*bf16")
    types |= {"lse": "*fp32", "delta": "*fp32"}
    about = {"peer": peer, "head_dim": head_dim, "tile": vars(tile)}
    return Launch(name, function, "bf16", constants, about, tile.warps, tile.stages, types)


def liger(architecture: int, family: str) -> Iterator[Launch]:
    """Yield a family of compile_report's beside attention. Raises ImportError where Liger is not installed."""
    if family in ("rms_norm", "silu_mul"):
        yield from _liger_of_llama(family)
        return
    if family == "layernorm":
        norms: Any = importlib.import_module("liger_kernel.ops.layer_norm")
        types = dict.fromkeys(("X_ptr", "Y_ptr", "DX_ptr", "DY_ptr"), "*bf16") | {"eps": "fp32"}
        types |= dict.fromkeys(("W_ptr", "B_ptr", "Mean_ptr", "RSTD_ptr", "DW_ptr", "DB_ptr"), "*fp32")
        for width in (1024, 4096):
            constants = {"BLOCK_SIZE": width}
            warps = 4 if width < 2048 else 8
            yield Launch(
                "forward", norms._layer_norm_forward_kernel, "bf16", constants, {"width": width}, warps, 3, types
            )
            constants |= {"rows_per_program": 125, "COMPUTE_DW": True, "COMPUTE_DB": True}
            yield Launch(
                "backward", norms._layer_norm_backward_kernel, "bf16", constants, {"width": width}, warps, 3, types
            )
        return
    losses: Any = importlib.import_module("liger_kernel.ops.cross_entropy")
    kernel = losses.liger_cross_entropy_kernel
    switches: dict[str, Any] = dict.fromkeys(
        (name for name in kernel.arg_names if name.startswith(("HAS", "RETURN"))), False
    )
    switches |= {
        "HAS_GRADIENTS": True,
        "lse_square_scale": 0.0,
        "label_smoothing": 0.0,
        "reduction": "mean",
        "softcap": None,
    }
    switches |= dict.fromkeys(("weight_ptr", "z_loss_ptr", "token_accuracy_ptr", "predicted_tokens_ptr"), None)
    for vocab in (28000, 128256):
        warps = 8 if architecture >= 100 else 32
        types = {"Y_ptr": "*i64"} | dict.fromkeys(("n_non_ignore", "sum_non_ignore_weight", "weight_sum"), "fp32")
        yield Launch("loss", kernel, "bf16", {**switches, "BLOCK_SIZE": 32768}, {"vocab": vocab}, warps, 3, types)


def _liger_of_llama(family: str) -> Iterator[Launch]:
    """Yield RMSNorm as it is for Llama, or SwiGLU for gate and up in one tensor."""
    settings = importlib.import_module("liger_kernel.ops.utils").calculate_settings
    types: dict[str, str] = dict.fromkeys(("X_ptr", "Y_ptr", "dX_ptr", "dY_ptr"), "*bf16") | {"offset": "fp32"}
    types |= TYPE_OF | dict.fromkeys(("W_ptr", "RSTD_ptr", "dW_ptr"), "*fp32")
    for width in LLAMA_SIZES[family]:
        block, warps = settings(width)
        constants: dict[str, Any] = {"BLOCK_SIZE": block}
        if family == "silu_mul":
            module: Any = importlib.import_module("liger_kernel.ops.swiglu")
            functions = [getattr(module, f"_swiglu_fused_gate_up_{way}_kernel") for way in ("forward", "backward")]
            constants |= {"ffn_size": width}
        else:
            import triton.language as tl

            module = importlib.import_module("liger_kernel.ops.rms_norm")
            functions = [module._rms_norm_forward_kernel, module._rms_norm_backward_kernel]
            constants |= {"casting_mode": 0, "elementwise_affine": True, "COMPUTE_DW": True, "X_dtype": tl.bfloat16}
        for name, function in zip(("forward", "backward"), functions, strict=True):
            chosen = {each: value for each, value in constants.items() if each in function.arg_names}
            yield Launch(name, function, "bf16", chosen, {"width": width}, warps, 3, types)
