"""transformers: what a user does with an exported model, and what it writes itself, in the versions that are in use."""

# client transformers-4.48: transformers==4.48.3 torch==2.13.0 numpy==2.4.6 Jinja2==3.1.6
# client transformers-4.57: transformers==4.57.3 torch==2.13.0 numpy==2.4.6 Jinja2==3.1.6
# client transformers-5.23: transformers==5.23.0 torch==2.13.0 numpy==2.4.6 Jinja2==3.1.6

import importlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from bench.compatibility import gpt, ours, tried

tokenizers: Any = importlib.import_module("tokenizers")
transformers: Any = importlib.import_module("transformers")

BASE, CHAT, SCRATCH = os.environ["BASE"], os.environ["CHAT"], os.environ["SCRATCH"]
TEXTS = [
    "Once upon a time there was a fox.",
    "  two  spaces\n\n\tand tabs; 1234, na\u00efve \u4e2d\u6587 \U0001f642\u200d\u2764\ufe0f \u0301",
    "the mark \u2581 of a space, and a NUL \0.",
    "A",
]
TOKENS = torch.arange(2 * 96).reshape(2, 96) * 7 % 380
CONVERSATION = [
    {"role": "system", "content": "Be  brief."},
    {"role": "user", "content": "Tell me a story.\n"},
    {"role": "assistant", "content": "\U0001f642 Once. "},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "The end."},
]
# Pythia's shape and others of each family, and how each is saved.
PARTS = {"max_shard_size": "100KB"}
LLAMA_3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
WINDOWED = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}
VARIANTS: dict[tuple[str, str], tuple[dict[str, Any], dict[str, Any]]] = {
    ("gpt_neox", "as Pythia is, in fp32"): (
        {"use_parallel_residual": True, "rotary_pct": 0.25, "attention_bias": True},
        {},
    ),
    ("gpt_neox", "sequential, tied, in bf16, in several files"): (
        {"use_parallel_residual": False, "rotary_pct": 1.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16"},
        PARTS,
    ),
    ("gpt_neox", "without attention biases, base 50,000"): (
        {"rotary_pct": 0.5, "rotary_emb_base": 50_000, "attention_bias": False},
        {},
    ),
    ("llama", "as Llama 3.2 is, in bf16, in several files"): (
        {"rope_scaling": LLAMA_3, "rope_theta": 5e5, "tie_word_embeddings": True, "torch_dtype": "bfloat16"},
        PARTS,
    ),
    ("llama", "with linear scaling, wide heads"): (
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "head_dim": 32},
        {},
    ),
    ("mistral", "with a window"): ({"sliding_window": 24}, {}),
    ("qwen2", "with a window from layer 1 on"): (WINDOWED | {"tie_word_embeddings": True}, {}),
    ("qwen3", "with wide heads"): ({"head_dim": 32}, {}),
    ("smollm3", "every other layer without rotary positions"): ({"no_rope_layer_interval": 2}, {}),
}


def load(folder: str) -> tuple[Any, Any]:
    # Read as fp32, not cast to it: a cast to bf16 and back rounds the rotary frequencies, too.
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def difference(model: Any, run: str) -> float:
    """Return how far the logits are from those of our run; ours may have more tokens, which it has added."""
    logits = model(TOKENS).logits
    return float(
        (torch.tensor(ours(run, tokens=TOKENS.tolist())["logits"])[..., : logits.shape[-1]] - logits).abs().max()
    )


def new_ids(model: Any, inputs: Any) -> list[list[int]]:
    produced = model.generate(**inputs, do_sample=False, max_new_tokens=24)
    return [ids[inputs["input_ids"].shape[1] :] for ids in produced.tolist()]


def render(messages: list[dict[str, Any]], **options: Any) -> Any:
    return tokenizer.apply_chat_template(messages, return_dict=True, **options)


def refusal(message: dict[str, Any]) -> str:
    try:
        return f"taken as {render([message])}"
    except Exception as error:
        return str(error)


def write(family: str, folder: str, changes: dict[str, Any], saving: dict[str, Any]) -> Any:
    """Return a model of large random weights, saved with a byte-level tokenizer as that of Pythia."""
    config = transformers.AutoConfig.for_model(
        family, vocab_size=384, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
        max_position_embeddings=128, bos_token_id=0, eos_token_id=0, pad_token_id=None,
        **({} if family == "gpt_neox" else {"num_key_value_heads": 2}), **changes,
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if "norm.weight" in name else 0.0, std=0.3 if family == "gpt_neox" else 0.15)
    if "torch_dtype" in changes:
        model = model.to(torch.bfloat16)
    model.save_pretrained(folder, **saving)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.normalizer = tokenizers.normalizers.NFC()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|padding|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=370, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([f"{text} {text}" for text in TEXTS], trainer)
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), special[0])
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    return load(folder)[0]


gpt("export", BASE, "--out", f"{SCRATCH}/base")
gpt("export", CHAT, "--out", f"{SCRATCH}/chat")
model, tokenizer = load(f"{SCRATCH}/base")
expected = ours(BASE, texts=TEXTS, count=24, **{"continue": TEXTS})

with tried("ids of varied text equal ours, and are decoded to it"):
    assert tokenizer(TEXTS)["input_ids"] == expected["ids"]
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
with tried("logits equal ours within 1e-4") as say:
    far = difference(model, BASE)
    assert far < 1e-4, far
    say(f"largest difference {far:.1e}")
with tried("model.generate(**tokenizer(text)) goes on as ours does"):
    (ids,) = new_ids(model, tokenizer(TEXTS[0], return_tensors="pt"))
    assert ids[: len(expected["continued"][0])] == expected["continued"][0]
with tried("a padded batch of several lengths goes on as ours does"):
    produced = new_ids(model, tokenizer(TEXTS, return_tensors="pt", padding=True))
    assert [ids[: len(each)] for ids, each in zip(produced, expected["continued"], strict=True)] == expected[
        "continued"
    ]

model, tokenizer = load(f"{SCRATCH}/chat")
expected = ours(CHAT, conversations=[CONVERSATION, CONVERSATION[:2]])
with tried("the chat template gives our ids, and marks what the assistant said"):
    found = render(CONVERSATION, return_assistant_tokens_mask=True)
    assert found["input_ids"] == expected["rendered"][0]
    assert [bool(mark) for mark in found["assistant_masks"]] == expected["learn"][0]
with tried("the chat template takes the role developer and contents in parts, and refuses others"):
    parts = [{"type": "text", "text": "Tell me "}, {"type": "text", "text": "a story.\n"}]
    same: list[dict[str, Any]] = [{"role": "developer", "content": "Be  brief."}, {"role": "user", "content": parts}]
    assert render(same, add_generation_prompt=True)["input_ids"] == expected["prompts"][1]
    assert "role must be" in refusal({"role": "tool", "content": ""})
    assert "type text" in refusal({"role": "user", "content": [*parts, {"type": "image", "url": "a.png"}]})
with tried("an answer goes on and ends as ours does") as say:
    prompt = render(CONVERSATION[:2], add_generation_prompt=True, return_tensors="pt")
    (ids,) = new_ids(model, prompt)
    (answer,) = ours(CHAT, count=24, **{"continue": [expected["prompts"][1]]})["continued"]
    assert ids[: len(answer)] == answer and (
        len(answer) == 24 or ids[len(answer)] in model.generation_config.eos_token_id
    )
with tried('pipeline("text-generation") answers messages'):
    talk = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    said = talk(CONVERSATION[:2], do_sample=False, max_new_tokens=24)[0]["generated_text"][-1]
    assert said == {"role": "assistant", "content": tokenizer.decode(answer, skip_special_tokens=True)}, said
with tried("our chat model, saved again by it, is imported as it was"):
    model.save_pretrained(f"{SCRATCH}/again")
    tokenizer.save_pretrained(f"{SCRATCH}/again")
    gpt("import", f"{SCRATCH}/again", "--out", f"{SCRATCH}/back")
    back = ours(f"{SCRATCH}/back", conversations=[CONVERSATION, CONVERSATION[:2]])
    assert back["chat"] and back == expected
    assert difference(model, f"{SCRATCH}/back") < 1e-4

for number, ((family, what), (changes, saving)) in enumerate(VARIANTS.items()):
    # Older versions do not know each family, and computed Qwen's window with FlashAttention alone.
    windows = family != "qwen2" or hasattr(transformers.Qwen2Config(), "layer_types")
    if family not in transformers.CONFIG_MAPPING or not windows:
        continue
    with tried(f"a {family} that it saves is imported and exported with equal logits: {what}") as say:
        model = write(family, f"{SCRATCH}/{number}", changes, saving)
        gpt("import", f"{SCRATCH}/{number}", "--out", f"{SCRATCH}/{number}-run")
        gpt("export", f"{SCRATCH}/{number}-run", "--out", f"{SCRATCH}/{number}-out")
        again, tokenizer = load(f"{SCRATCH}/{number}-out")
        with torch.no_grad():
            returned = float((again(TOKENS).logits[..., :384] - model(TOKENS).logits).abs().max())
        far = difference(model, f"{SCRATCH}/{number}-run")
        assert far < 1e-4 > returned, (far, returned)
        rotary = {"rope_parameters", "rotary_pct", "rope_theta"} & json.loads(
            Path(SCRATCH, f"{number}", "config.json").read_text()
        ).keys()
        files = len([*Path(SCRATCH, f"{number}").glob("*.safetensors")])
        say(f"safetensors files: {files}, {' and '.join(rotary)}, largest difference {max(far, returned):.1e}")
