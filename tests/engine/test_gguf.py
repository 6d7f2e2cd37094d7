"""A model in llama.cpp's format, read back with its own package, and with llama.cpp where that is installed."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
import torch

from engine import checkpoint
from engine.chat_template import PLAIN_JINJA, Message, answer_ends, answer_prompt
from engine.config import BudgetConfig, ModelConfig, Recipe
from engine.errors import InputError
from engine.generate import document_prompt, generate
from engine.gguf import CUTTERS, export, write
from engine.model import GPT
from engine.run import Run
from engine.runtime import choose
from engine.sampling import Sampling
from engine.tokenizer import SPECIAL_TOKENS, SentencePieceTokenizer, Tokenizer
from engine.tokenizer_json import tokenizer_json, with_special_tokens
from tests.engine.foreign import imported
from tests.engine.test_tokenizer_json import TEXTS, neox_like


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


# Shapes that llama.cpp has by other names, with its name for them.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"key_heads": 2, "tied": True, "rotary_scaling": "llama3", "rotary_factor": 8.0, "rotary_original": 64},
    "qwen2": {"key_heads": 1, "qkv_biases": True, "rotary_base": 1e6},
    "qwen3": {"key_heads": 2, "head_width": 32, "qk_norm": True, "rotary_scaling": "linear", "rotary_factor": 2.0},
    "smollm3": {"key_heads": 2, "pattern": "fffn", "tied": True},
}
RMS: dict[str, Any] = {"norm": "rms", "mlp": "gated", "mlp_width": 96}


@pytest.mark.parametrize("kind", FAMILIES)
def test_llama_and_its_relatives_have_their_own_names(kind: str, tmp_path: Path) -> None:
    model = GPT(ModelConfig(200, 64, 4, 4, 32, **RMS, **FAMILIES[kind]))
    config, attention = model.config, "blocks.1.attention"
    write(model, tmp_path / "model.gguf", "fp32")
    settings, tensors = read(tmp_path / "model.gguf")
    expected = {
        "attention.head_count_kv": config.kv_heads, "attention.key_length": config.head_dim, "feed_forward_length": 96,
        "rope.dimension_count": config.head_dim,
    }  # fmt: skip
    assert {name: settings[f"{kind}.{name}"] for name in expected} == expected
    assert ("output.weight" in tensors) == (not config.tied)
    q, k, v = model.get_parameter(f"{attention}.qkv.weight").detach().split(config.maps()["attention.qkv"][0])
    if kind in ("llama", "smollm3"):  # a head's rows are 0, half, 1, half + 1, and so on
        order = torch.arange(config.head_dim).view(2, -1).T.flatten()
        q, k = (each.view(-1, config.head_dim, 64)[:, order].flatten(0, 1) for each in (q, k))
    for name, ours in {"attn_q": q, "attn_k": k, "attn_v": v}.items():
        assert np.array_equal(tensors[f"blk.1.{name}.weight"], ours)
    gate = model.get_parameter("blocks.3.mlp.expand.weight").detach()[:96]
    assert np.array_equal(tensors["blk.3.ffn_gate.weight"], gate) and "blk.3.ffn_gate.bias" not in tensors
    if kind == "llama":  # the fastest keeps its angle, the slowest has an eighth of it
        assert tensors["rope_freqs.weight"].min() == 1 and tensors["rope_freqs.weight"].max() == pytest.approx(8)
    with pytest.raises(InputError, match="without windows"):
        write(GPT(dataclasses.replace(config, pattern="wf", window=9, family="auto")), tmp_path / "out", "fp32")


def test_a_width_that_8_bits_do_not_divide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the width is 48; 8 bits"):
        write(GPT(ModelConfig(200, 48, 1, 2, 32)), tmp_path / "model.gguf", "int8")
    assert not list(tmp_path.iterdir())


def run_of(tokenizer: Tokenizer, path: Path, *, chat: bool, **changes: Any) -> Run:
    """A run of random weights, so large that the choices are far apart."""
    config = ModelConfig(
        **{"vocab_size": tokenizer.vocab_size, "width": 64, "blocks": 2, "heads": 4, "context": 48} | changes
    )
    model = GPT(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if "norm.weight" in name else 0.0, std=0.3)
    run = Run(path)
    run.write_recipe(Recipe(name="small", model=config, budget=BudgetConfig(steps=1), chat=chat))
    tokenizer.save(path / tokenizer.file_name)
    checkpoint.save(run.checkpoints, 1, {"model": model.state_dict()}, {})
    return run


def ignore(message: str) -> None: ...


def cut_as(name: str, documents: tuple[str, ...]) -> Tokenizer:
    """A byte-level tokenizer that cuts text by the rules of a known model."""
    content = json.loads(neox_like(documents).to_str())
    steps = [each | ({"trim_offsets": True} if each["type"] == "ByteLevel" else {}) for each in CUTTERS[name]]
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    content["model"]["ignore_merges"] = name == "llama-bpe"
    return with_special_tokens(json.dumps(content).encode(), 384)


@pytest.fixture(params=["trained", "exported", "byte-level", *CUTTERS])
def kind(request: pytest.FixtureRequest, tokenizer: Tokenizer, documents: tuple[str, ...]) -> Tokenizer:
    """A tokenizer of each kind: ours, ours after an export and an import, and Pythia's."""
    if request.param == "trained":
        return tokenizer
    if request.param == "exported":
        return with_special_tokens(tokenizer_json(tokenizer), tokenizer.vocab_size)
    if request.param in CUTTERS:
        return cut_as(request.param, documents)
    return with_special_tokens(neox_like(documents).to_str().encode(), 384)


@pytest.mark.parametrize("chat", [True, False])
def test_a_chat_model_takes_its_template_along_and_a_base_model_none(
    tokenizer: Tokenizer, chat: bool, tmp_path: Path
) -> None:
    assert export(run_of(tokenizer, tmp_path / "run", chat=chat), tmp_path / "out.gguf", "1", "fp16", ignore) is chat
    settings, _ = read(tmp_path / "out.gguf")
    assert settings.get("tokenizer.chat_template") == (PLAIN_JINJA if chat else None)
    assert settings["tokenizer.ggml.eot_token_id"] == tokenizer.special["<|end|>" if chat else "<|endoftext|>"]
    ends = {name: settings[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding", "unknown")}
    assert ends == {"bos": tokenizer.eod, "eos": tokenizer.eod, "padding": tokenizer.eod, "unknown": 0}
    assert settings["tokenizer.ggml.add_bos_token"] and not settings["tokenizer.ggml.add_space_prefix"]
    assert settings["general.name"] == "small" and settings["general.file_type"] == gguf.LlamaFileType.MOSTLY_F16


@pytest.mark.parametrize(("family", "adds"), [("qwen", False), ("llama", True)])
def test_a_text_begins_as_an_imported_tokenizer_begins_it(family: str, adds: bool, tmp_path: Path) -> None:
    tokenizer = imported(tmp_path / "folder", family)
    write(GPT(ModelConfig(tokenizer.vocab_size, 32, 1, 2, 16)), tmp_path / "out.gguf", "fp32", tokenizer, chat=True)
    settings, _ = read(tmp_path / "out.gguf")
    assert settings["tokenizer.ggml.add_bos_token"] is adds
    assert settings["tokenizer.ggml.bos_token_id"] == tokenizer.begin


def test_pieces_have_the_scores_and_kinds_of_sentencepiece(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = GPT(ModelConfig(tokenizer.vocab_size, 32, 1, 2, 16))
    imported = with_special_tokens(tokenizer_json(tokenizer), tokenizer.vocab_size)
    for number, each in enumerate((tokenizer, imported)):
        write(model, tmp_path / f"{number}.gguf", "fp32", each)
        settings, _ = read(tmp_path / f"{number}.gguf")
        assert settings["tokenizer.ggml.model"] == "llama"
        assert settings["tokenizer.ggml.tokens"] == [tokenizer.name(index) for index in range(tokenizer.vocab_size)]
        scores = [tokenizer.processor.get_score(index) for index in range(tokenizer.vocab_size)]
        assert settings["tokenizer.ggml.scores"] == scores and min(scores) < -100
        types = [gguf.TokenType(each).name for each in settings["tokenizer.ggml.token_type"]]
        # The first piece is "unknown", which byte tokens make unreachable.
        assert types == ["UNUSED"] + ["CONTROL"] * 5 + ["BYTE"] * 256 + ["NORMAL"] * (len(types) - 262)


def test_a_byte_level_vocabulary_has_merges_and_tokens_of_its_user(documents: tuple[str, ...], tmp_path: Path) -> None:
    backend = neox_like(documents)
    tokenizer = with_special_tokens(backend.to_str().encode(), backend.get_vocab_size() + 10)
    write(GPT(ModelConfig(tokenizer.vocab_size, 32, 1, 2, 16)), tmp_path / "out.gguf", "fp32", tokenizer)
    settings, _ = read(tmp_path / "out.gguf")
    assert settings["tokenizer.ggml.model"] == "gpt2" and settings["tokenizer.ggml.pre"] == "gpt-2"
    tokens = settings["tokenizer.ggml.tokens"]
    types = dict(zip(tokens, settings["tokenizer.ggml.token_type"], strict=True))
    assert types["    "] == gguf.TokenType.USER_DEFINED and types["\u0120a"] == gguf.TokenType.NORMAL
    assert {types[token] for token in (*SPECIAL_TOKENS, "<|padding|>", tokens[-1])} == {gguf.TokenType.CONTROL}
    assert settings["tokenizer.ggml.merges"][0].replace(" ", "") in tokens
    for name in CUTTERS:
        write(GPT(ModelConfig(384, 32, 1, 2, 16)), tmp_path / name, "fp32", cut_as(name, documents))
        assert read(tmp_path / name)[0]["tokenizer.ggml.pre"] == name


def test_tokenizers_that_llama_cpp_would_cut_otherwise_are_refused(documents: tuple[str, ...], tmp_path: Path) -> None:
    import tokenizers

    def trained(**changes: Any) -> Tokenizer:
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            **{
                "sentence_iterator": iter(documents), "model_writer": model, "vocab_size": 320, "model_type": "bpe",
                "byte_fallback": True, "control_symbols": list(SPECIAL_TOKENS), "normalization_rule_name": "identity",
                "add_dummy_prefix": False, "remove_extra_whitespaces": False, "minloglevel": 2, **changes,
            }
        )  # fmt: skip
        return SentencePieceTokenizer(model.getvalue())

    backend = neox_like(documents)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Digits(individual_digits=False), backend.pre_tokenizer]
    )
    for message, tokenizer in {
        "only a byte-pair tokenizer": trained(model_type="unigram"),
        "changes text before it cuts it": trained(add_dummy_prefix=True),
        "into words by rules": with_special_tokens(backend.to_str().encode(), 400),
    }.items():
        run = run_of(tokenizer, tmp_path / message, chat=False)
        with pytest.raises(InputError, match=message):
            export(run, tmp_path / "out.gguf", "latest", "fp32", ignore)
        assert not (tmp_path / "out.gguf").exists()


@pytest.fixture
def llama() -> Any:
    """llama.cpp by its package for Python, a model's keys and values in fp32."""
    package = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip builds it, for minutes")

    def load(path: Path) -> Any:
        keep = {"type_k": package.GGML_TYPE_F32, "type_v": package.GGML_TYPE_F32}
        return package.Llama(str(path), n_ctx=48, n_threads=1, logits_all=True, verbose=False, **keep)

    return load


# The error is in standard deviations of the scores. llama.cpp rounds activations to the kind of the weights, too, which
# the product of a gate and what it gates makes much of: of random weights.
PYTHIA: dict[str, Any] = {"parallel_residual": True, "rotary_share": 0.5, "biases": True}


@pytest.mark.parametrize(
    ("precision", "error", "changes"),
    [
        *((*kind, shape) for kind in (("fp32", 0.01), ("fp16", 0.02), ("int8", 0.5)) for shape in ({}, PYTHIA)),
        *(("fp32", 0.01, {**RMS, **shape, "blocks": 4, "family": name}) for name, shape in FAMILIES.items()),
    ],
)
def test_llama_cpp_computes_the_same(
    llama: Any, tokenizer: Tokenizer, precision: str, error: float, changes: dict[str, Any], tmp_path: Path
) -> None:
    run = run_of(tokenizer, tmp_path / "run", chat=False, **changes)
    export(run, tmp_path / "out.gguf", "latest", precision, ignore)
    theirs, (ours, _) = llama(tmp_path / "out.gguf"), run.load_model(choose("cpu", "fp32"))
    tokens = torch.randint(tokenizer.vocab_size, (40,))
    theirs.eval(tokens.tolist())
    with torch.no_grad():
        expected = ours.logits(ours(tokens[None]))[0].numpy()
    assert np.abs(theirs.scores[:40] - expected).max() < error * expected.std()


def test_llama_cpp_cuts_text_as_we_do_and_writes_what_we_write(llama: Any, kind: Tokenizer, tmp_path: Path) -> None:
    run = run_of(kind, tmp_path / "run", chat=True)
    export(run, tmp_path / "out.gguf", "latest", "fp32", ignore)
    theirs, (ours, _) = llama(tmp_path / "out.gguf"), run.load_model(choose("cpu", "fp32"))
    for text in (each.replace("\u2581", "_") for each in TEXTS):
        assert theirs.tokenize(text.encode(), special=False) == document_prompt(kind, text), text
        assert theirs.detokenize(kind.encode(text)).decode() == text
    conversation = [Message("system", "Be  brief."), Message("user", "A fox?\n")]
    greedy = {"temperature": 0.0, "max_tokens": 16}
    prompts, ends = [answer_prompt(kind, conversation)], answer_ends(kind)
    (expected,) = generate(ours, kind, prompts, Sampling(temperature=0), max_tokens=16, stop_ids=ends)
    said = theirs.create_chat_completion([vars(each) for each in conversation], **greedy)["choices"][0]
    # What is no UTF-8 is left out there.
    assert said["message"]["content"] == expected.text.replace("\ufffd", "")
