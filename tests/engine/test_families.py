"""Models of transformers' families as ours and back: the same numbers, gradients, steps and texts, the same files.

Weights are random, drawn by transformers; of each family eight small shapes, after those of its own tests.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from engine.chat_template import Message, answer_prompt, render
from engine.config import AlignmentConfig, OptimizerConfig
from engine.errors import InputError
from engine.families import FAMILIES, family_of, our_config, our_tensors, their_config, their_tensors
from engine.generate import generate
from engine.huggingface import export, import_
from engine.model import GPT, KVCache
from engine.run import Run
from engine.runtime import choose
from engine.sampling import Sampling
from engine.tokenizer import Tokenizer
from rlhf.methods import DPO
from rlhf.preferences import PairBatch, Pairs, Preference
from tests.engine.relatives import RELATIVES
from tests.engine.test_tokenizer_json import neox_like
from train.data.loader import pack
from train.optimizer import Optimizer

transformers: Any = pytest.importorskip("transformers")

LINEAR = {"rope_type": "linear", "factor": 2.5, "rope_theta": 500.0}
LLAMA_3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16, "rope_theta": 300.0,
}  # fmt: skip
ODD = {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3}
# What each of Llama's relatives has: heads that share keys, all, one and none of them; heads of another width than the
# model's share; an odd number of heads; both scalings of rotary positions; a large epsilon, which all norms must have.
COMMON: dict[str, dict[str, Any]] = {
    "as it is": {},
    "every head has its keys, tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "one head of keys, wide heads": {"num_key_value_heads": 1, "head_dim": 16},
    "odd heads, untied": {**ODD, "tie_word_embeddings": False},
    "linear": {"rope_parameters": LINEAR, "num_hidden_layers": 3},
    "llama3, epsilon": {"rope_parameters": LLAMA_3, "rms_norm_eps": 0.02},
}
WINDOWED = {"use_sliding_window": True, "sliding_window": 6, "num_hidden_layers": 3}
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "llama": COMMON
    | {
        "narrow heads, deep": {"head_dim": 4, "num_hidden_layers": 4},
        "64 wide": {"hidden_size": 64, "intermediate_size": 160, "num_key_value_heads": None},
    },
    "mistral": {name: {"sliding_window": None, **case} for name, case in COMMON.items()}
    | {"window": {"sliding_window": 7}, "wide window": {"sliding_window": 4096, "head_dim": 12}},
    # The last layers have the window, from a number on; or those that layer_types names.
    "qwen2": COMMON
    | {
        "window from layer 1 on": {**WINDOWED, "max_window_layers": 1},
        "window by layer": {**WINDOWED, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    },
    "qwen3": {name: {"head_dim": 8, **case} for name, case in COMMON.items() if name != "odd heads, untied"}
    | {
        "odd heads as wide as silence says": ODD,
        "window everywhere": {**WINDOWED, "head_dim": 8, "max_window_layers": 0},
        "window by layer": {
            **WINDOWED,
            "head_dim": 8,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    },
    # Each fourth layer has no rotary positions, or each that is named.
    "smollm3": {name: {"num_hidden_layers": 4, **case} for name, case in COMMON.items()}
    | {
        "every other layer without rotary": {"no_rope_layer_interval": 2, "num_hidden_layers": 3},
        "window where it rotates": {
            **WINDOWED,
            "no_rope_layers": [1, 0, 1],
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        },
    },
    "gpt_neox": {
        "as it is": {},
        "sequential, all dimensions rotate": {"use_parallel_residual": False, "rotary_pct": 1.0},
        "no attention biases": {"attention_bias": False, "rotary_pct": 0.5},
        "tied": {"tie_word_embeddings": True},
        "odd heads": {"hidden_size": 48, "num_attention_heads": 3},
        "linear": {"rope_parameters": LINEAR | {"partial_rotary_factor": 0.5}, "num_hidden_layers": 3},
        "narrow MLP, epsilon": {"intermediate_size": 37, "layer_norm_eps": 0.02},
        "64 wide, base": {"hidden_size": 64, "rotary_emb_base": 500, "use_parallel_residual": False},
    },
}
EACH = [pytest.param(family, case, id=f"{family}: {name}") for family in CASES for name, case in CASES[family].items()]
# One of a family, of what it alone has.
SPECIAL = {family: cases[[*cases][-1]] for family, cases in CASES.items()} | {"mistral": CASES["mistral"]["window"]}
LENGTHS = (40, 23, 9)
CPU = choose("cpu", "fp32")


@pytest.fixture(autouse=True)
def one_thread(few_threads: None) -> Iterator[None]:
    """Of such small products, two threads would wait for each other most of the time."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(2)


def theirs_of(family: str, case: dict[str, Any], seed: int = 1, **sizes: Any) -> Any:
    """A model of transformers, with biases and norms that hide nothing."""
    shape = {
        "vocab_size": 99, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 256, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    shape |= {} if family == "gpt_neox" else {"num_key_value_heads": 2}
    config = transformers.AutoConfig.for_model(family, **(shape | case | sizes))
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=float("norm.weight" in name), std=0.15)
    return model


def by_name(model: Any) -> dict[str, Tensor]:
    """Its weights as a file holds them: a tied one once."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def ours_of(theirs: Any) -> GPT:
    config = our_config(theirs.config.to_dict())
    model = GPT(config)
    model.load_state_dict(our_tensors(by_name(theirs), config))
    return model.eval()


def texts() -> tuple[Tensor, Tensor]:
    """Three texts [3, 40], padded behind, and which tokens are theirs."""
    tokens = torch.randint(99, (len(LENGTHS), max(LENGTHS)))
    return tokens, torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]


def bounds() -> Tensor:
    return torch.tensor([0, *LENGTHS]).cumsum(0).int()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "case"), EACH)
def test_logits_are_theirs_in_packed_padded_and_cached_passes(family: str, case: dict[str, Any]) -> None:
    theirs = theirs_of(family, case)
    ours, (tokens, real) = ours_of(theirs), texts()
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=real.long()).logits
        close(ours.logits(ours(tokens))[real], expected[real])
        close(ours.logits(ours(tokens[real], cu_seqlens=bounds(), max_seqlen=40)), expected[real])
        cache = KVCache(ours.config, 2, 48, device="cpu", dtype=torch.float32)
        keys = transformers.DynamicCache(config=theirs.config)
        for part in torch.randint(99, (2, 48)).split([17, 1, 9, 20, 1], dim=1):
            found = ours.logits(ours(part, cache=cache))
            cache.lengths += part.shape[1]
            close(found, theirs(part, past_key_values=keys).logits)


@pytest.mark.parametrize(("family", "case"), EACH)
def test_gradients_are_theirs(family: str, case: dict[str, Any]) -> None:
    theirs = theirs_of(family, case)
    ours, (tokens, real) = ours_of(theirs), texts()
    labels = torch.randint(99, tokens.shape).masked_fill(~real, -100)
    loss = cross_entropy(theirs(tokens, attention_mask=real.long()).logits.flatten(0, 1), labels.flatten())
    loss.backward()
    found = ours.loss(tokens[real], labels[real], cu_seqlens=bounds(), max_seqlen=40) / sum(LENGTHS)
    found.backward()
    close(found.detach(), loss.detach())
    gradients = our_tensors({name: each.grad for name, each in theirs.named_parameters()}, ours.config)
    for name, parameter in ours.named_parameters():
        # Ours learns biases of attention that theirs may not have.
        if not (name.endswith("bias") and "attention." in name and case.get("attention_bias") is False):
            assert parameter.grad is not None and parameter.grad.abs().max() > 1e-4
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "case"), SPECIAL.items())
def test_the_greedy_text_is_theirs(family: str, case: dict[str, Any], tokenizer: Tokenizer) -> None:
    theirs = theirs_of(family, case, vocab_size=tokenizer.vocab_size)
    with torch.no_grad():  # large weights say many different tokens
        for parameter in theirs.parameters():
            parameter.mul_(2 if parameter.ndim == 2 else 1)
    prompts = torch.randint(99, (2, 12))
    said = generate(ours_of(theirs), tokenizer, prompts.tolist(), Sampling(temperature=0), max_tokens=200, stop_ids=())
    tokens = torch.cat((prompts, torch.tensor([each.ids for each in said])), dim=1)
    with torch.no_grad():
        # After all that comes before it, each token is the one that they choose: so their text is the same.
        assert torch.equal(theirs(tokens).logits.argmax(-1)[:, 11:-1], tokens[:, 12:])
    assert tokens.shape == (2, 212) and min(len(set(each.ids)) for each in said) > 20


@pytest.mark.parametrize(("family", "case"), SPECIAL.items())
def test_a_step_of_finetuning_is_theirs(family: str, case: dict[str, Any]) -> None:
    theirs = theirs_of(family, case)
    ours, (tokens, real) = ours_of(theirs), texts()
    # Neither a prompt is learnt, nor what follows the last token.
    learnt = real & (torch.arange(40) >= 5) & (torch.arange(40) < 39)
    labels = torch.randint(99, tokens.shape).masked_fill(~learnt, -100)
    rate, eps = 0.01, 1e-4  # a small epsilon would make much of gradients that are all but 0
    rates: dict[str, Any] = dict.fromkeys(("embedding_rate", "head_rate", "norm_rate", "matrix_rate"), rate)
    config = OptimizerConfig(kind="adamw", eps=eps, weight_decay=0.0, **rates)
    optimizer = Optimizer(ours, config, matmul_dtype=torch.float32)
    (ours.loss(tokens[real], labels[real], cu_seqlens=bounds(), max_seqlen=40) / (labels >= 0).sum()).backward()
    optimizer.clip(config.clip)
    optimizer.step()
    plain = torch.optim.AdamW(theirs.parameters(), rate, (config.beta1, config.beta2), eps, weight_decay=0.0)
    theirs(tokens, attention_mask=real.long(), labels=labels.roll(1, dims=1)).loss.backward()
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), config.clip)
    plain.step()
    expected = our_tensors(by_name(theirs), ours.config)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "case"), SPECIAL.items())
def test_the_loss_of_dpo_is_that_of_their_log_probabilities(
    family: str, case: dict[str, Any], tokenizer: Tokenizer
) -> None:
    """TRL's DPOTrainer gives the same loss for the same pairs: bench/compatibility/trl.py."""
    policy, base = (theirs_of(family, case, seed, vocab_size=tokenizer.vocab_size) for seed in (1, 2))
    pairs, log_probs = Pairs(tokenizer, 256), []
    for text, *answers in (
        ("say fox", "a fox", "a bear there"),
        ("and so?", "fox", "The end. So."),
        ("b", "bear", "a"),
    ):
        asked = (Message("user", text),)
        pairs.add(Preference(asked, answers[0], answers[1]))
        begin = len(answer_prompt(tokenizer, asked))
        for answer in answers:
            ids = torch.tensor([render(tokenizer, [*asked, Message("assistant", answer)])[0]])
            for model in (policy, base):
                scores = model(ids).logits.log_softmax(-1)[0, begin - 1 : -1]
                log_probs.append(scores.gather(1, ids[0, begin:, None]).sum())
    of_answers = torch.stack(log_probs).view(3, 2, 2)
    changes = of_answers[..., 0] - of_answers[..., 1]
    expected = -logsigmoid(0.2 * (changes[:, 0] - changes[:, 1])).sum()
    batch = PairBatch.of(pack([*map(pairs.whole, range(3))], int(pairs.lengths.sum())))
    ours = ours_of(policy)
    found = DPO(AlignmentConfig(method="dpo", beta=0.2), ours_of(base), tokenizer).loss(ours, batch)
    close(found.detach(), expected.detach())
    found.backward()
    expected.backward()
    gradients = our_tensors({name: each.grad for name, each in policy.named_parameters()}, ours.config)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "case"), EACH)
def test_a_config_means_the_same_when_it_goes_out_again(family: str, case: dict[str, Any]) -> None:
    config = theirs_of(family, case).config
    ours = our_config(json.loads(config.to_json_string(use_diff=False)))
    back = transformers.AutoConfig.for_model(**their_config(ours))
    assert type(back) is type(config) and our_config(back.to_dict()) == ours
    # Zeros stand for biases of GPT-NeoX's attention; and what layer_types say, others need not.
    free = {"architectures", "max_window_layers", "no_rope_layer_interval", "head_dim"}
    for name in FAMILIES[family].keys() - free - ({"attention_bias"} if family == "gpt_neox" else set()):
        assert getattr(back, name, None) == getattr(config, name, None), name
    assert back.rope_parameters == config.rope_parameters
    wide = config.hidden_size // config.num_attention_heads
    assert getattr(back, "head_dim", None) or wide == getattr(config, "head_dim", None) or wide
    # As version 4 spelled it: rotary positions in several places, no layer_types, the type's older name.
    rope = dict(config.rope_parameters)
    old = config.to_dict() | {"torch_dtype": "bfloat16", "rope_parameters": None, "rope_theta": rope.pop("rope_theta")}
    old |= {"rotary_emb_base": old["rope_theta"], "rotary_pct": rope.pop("partial_rotary_factor", None)}
    old["rope_scaling"] = None if rope["rope_type"] == "default" else rope | {"type": rope.pop("rope_type")}
    if "layer_types" not in case:
        old.pop("layer_types", None)
    assert our_config({name: value for name, value in old.items() if name != "dtype"}) == ours


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_config_does_not_say_is_their_default(family: str) -> None:
    theirs = transformers.AutoConfig.for_model(family).to_dict()
    assert our_config({"model_type": family}) == our_config(theirs)


@pytest.mark.parametrize("name", RELATIVES)
def test_settings_choose_the_family_that_is_written(name: str) -> None:
    families = {"llama": "llama", "smollm2": "llama", "capped": "", "one key head": ""}
    config, family = RELATIVES[name], families.get(name, name)
    if not family:
        with pytest.raises(
            InputError, match=r"model\.score_cap is 2\.0" if config.score_cap else r"model\.norm is 'layer'"
        ):
            their_config(config)
        return
    assert family_of(config) == family
    described = transformers.AutoConfig.for_model(**their_config(config), pad_token_id=None)
    theirs = transformers.AutoModelForCausalLM.from_config(described)
    ours, tokens = GPT(config), torch.randint(config.vocab_size, (2, 40))
    missing = theirs.load_state_dict(their_tensors(ours), strict=False)
    assert not missing.unexpected_keys and missing.missing_keys == (["lm_head.weight"] if config.tied else [])
    with torch.no_grad():
        close(ours.logits(ours(tokens)), theirs.eval()(tokens).logits)


@pytest.mark.parametrize(("family", "case"), SPECIAL.items())
def test_what_is_imported_and_exported_again_is_the_same_files(
    family: str, case: dict[str, Any], documents: tuple[str, ...], tmp_path: Path
) -> None:
    theirs = theirs_of(family, case, vocab_size=384, tie_word_embeddings=family != "mistral").bfloat16()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    neox_like(documents).save(str(tmp_path / "theirs" / "tokenizer.json"))
    assert len([*(tmp_path / "theirs").glob("model-*.safetensors")]) > 2
    recipe = import_(tmp_path / "theirs", tmp_path / "run")
    assert recipe.model == our_config(theirs.config.to_dict())
    export(Run(tmp_path / "run"), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    expected = {name: each.float() for name, each in by_name(theirs).items()}
    if family == "gpt_neox":
        expected = {name.replace("lm_head", "embed_out"): each for name, each in expected.items()}
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    # It comes back as it was, and transformers reads it.
    assert import_(tmp_path / "out", tmp_path / "again").model == recipe.model
    again, tokens = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out"), torch.randint(384, (2, 40))
    ours, _ = Run(tmp_path / "again").load_model(CPU)
    with torch.no_grad():
        close(ours.logits(ours(tokens)), again(tokens).logits)


def test_a_folder_without_one_of_its_parts_or_with_more_than_the_model_is_refused(
    documents: tuple[str, ...], tmp_path: Path
) -> None:
    folder = tmp_path / "theirs"
    theirs = theirs_of("llama", {"tie_word_embeddings": True}, vocab_size=384)
    theirs.save_pretrained(folder, max_shard_size="20KB")
    neox_like(documents).save(str(folder / "tokenizer.json"))
    part = sorted(folder.glob("model-*.safetensors"))[1]
    kept = part.read_bytes()
    part.unlink()
    with pytest.raises(InputError, match=rf"index\.json names {part.name}, which is not there"):
        import_(folder, tmp_path / "run")
    part.write_bytes(kept)
    # Another head than the embedding, a bias, an expert: what transformers would leave out with a warning.
    for name in ("lm_head.weight", "model.layers.0.self_attn.o_proj.bias", "model.layers.2.mlp.experts.0.weight"):
        save_file({name: torch.zeros(384, 32)}, folder / "model-more.safetensors")
        with pytest.raises(InputError, match=rf"the tensor {name} has no place in the model"):
            import_(folder, tmp_path / "run")
    # But not the embedding once more, nor what old versions kept.
    more = {"lm_head.weight": theirs.lm_head.weight, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(more, folder / "model-more.safetensors")
    assert import_(folder, tmp_path / "run").model.tied


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("mixtral", {}, "model_type 'mixtral' is not known; it must be one of 'gpt_neox', 'llama'"),
        (["llama"], {}, r"model_type \['llama'\] is not known"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not known in llama; it must be 'silu'"),
        ("llama", {"attention_bias": True}, "attention_bias True"),
        ("smollm3", {"mlp_bias": True}, "mlp_bias True"),
        ("qwen3", {"attention_bias": True}, "attention_bias True"),
        ("qwen2", {"quantization_config": {"bits": 4}}, r"quantization_config \{'bits': 4\}"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ("qwen2", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn'"),
        ("llama", {"rope_parameters": {"rope_type": ["linear"]}}, r"rope_type \['linear'\]"),
        ("qwen3", {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "full_attention {'rope_theta': 1.0}"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "rotary_factor is None"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not known in llama"),
        ("mistral", {"layer_types": ["full_attention"] * 32}, r"layer_types \['full_attention', .*are alike"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 32}, "layer_types has 'chunked_attention'"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 32}, "'sliding_attention' with sliding_window None"),
        ("qwen2", {"layer_types": ["full_attention"]}, "one entry a layer"),
        ("qwen3", {"max_window_layers": "all"}, "max_window_layers 'all'; it must be a whole number"),
        ("smollm3", {"no_rope_layers": 4}, "no_rope_layers 4; it must be a list with one entry a layer"),
        ("smollm3", {"no_rope_layers": [1]}, r"no_rope_layers \[1\]; .* there are 36"),
        ("smollm3", {"use_sliding_window": True, "sliding_window": 9}, "sliding_window 9, no_rope_layers 0: not known"),
        ("smollm3", {"no_rope_layer_interval": None}, "no_rope_layer_interval None; it must be a whole number"),
        ("mistral", {"sliding_window": "wide"}, "window is 'wide'"),
        ("llama", {"num_attention_heads": 0}, "heads is 0; it must be at least 1"),
        ("llama", {"num_key_value_heads": 5}, "key_heads is 5; it must divide"),
        ("llama", {"hidden_size": 4090, "head_dim": 128}, "hidden_size 4090 is no multiple of num_attention_heads"),
        ("qwen2", {"num_hidden_layers": 10**18}, "blocks is 10+; it must be at least 1 and at most 1000"),
    ],
    ids=str,
)
def test_what_the_model_cannot_be_is_refused_by_name(family: Any, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        our_config({"model_type": family} | changes)


def test_a_family_that_lacks_a_setting_is_refused_by_name() -> None:
    llama = RELATIVES["smollm2"]
    for changes, expected in (
        ({"family": "llama", "qkv_biases": True}, r"model\.qkv_biases is True: .* the nearest is llama"),
        ({"family": "mistral", "window": 4, "pattern": "fw"}, r"model\.pattern is 'fw'"),
        ({"family": "qwen2", "pattern": "ffn", "qkv_biases": True}, r"model\.pattern is 'ffn'"),
        ({"family": "gpt_neox"}, r"model\.norm is 'rms'.*model\.mlp is 'gated'"),
        ({"qkv_biases": True, "qk_norm": True}, r"model\.q\w+ is True: .* the nearest is qwen"),
        ({"rotary_share": 0.5}, r"model\.rotary_share is 0\.5"),
        ({"parallel_residual": True}, r"model\.parallel_residual is True"),
    ):
        with pytest.raises(InputError, match=expected):
            their_config(dataclasses.replace(llama, **changes))
    # Llama's heads divide its width; where they do not, it is Qwen or Mistral.
    assert family_of(dataclasses.replace(llama, heads=6, key_heads=2, head_width=8)) == "mistral"
