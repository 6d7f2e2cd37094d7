"""llama.cpp, by its package for Python, which pip builds from source for minutes: what it makes of our .gguf."""

# client llama-cpp: llama-cpp-python==0.3.36 tokenizers==0.23.3

import importlib
import os
from pathlib import Path
from typing import Any

from bench.compatibility import gpt, ours, tried

llama_cpp: Any = importlib.import_module("llama_cpp")
tokenizers: Any = importlib.import_module("tokenizers")
numpy: Any = importlib.import_module("numpy")

BASE, CHAT, SCRATCH = os.environ["BASE"], os.environ["CHAT"], Path(os.environ["SCRATCH"])
ROOT = Path(__file__).parents[2]
TEXTS = [
    "Once upon a time, there was a brave rabbit.",
    "  two spaces before, and   three within; one after ",
    "\n\n\tif x:\r\n\t\treturn 12345.6789e-10\n",
    "na\u00efve caf\u00e9 \U0001f642\u200d\u2764\ufe0f \U0001f468\u200d\U0001f469 \U0001f1eb\U0001f1f7",
    "\u4e2d\u6587\u5206\u8bcd\u3002 \u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u0627\u0644 \u0939\u093f \ud55c",
    "<|user|> hi<|end|><|endoftext|> <unk> <s></s> <0x41>",
    "a" * 1000 + " " * 100 + "\n" * 50,
    *(path.read_text() for path in sorted(ROOT.glob("*/*.md"))),
]
ROWS = numpy.random.default_rng(0).integers(0, 1500, (4, 120)).tolist()
ASKED = ["Tell me a story about a fox.", "Who are you?", "Tell me a story about a cat called Tom."]


def opened(run: str, precision: str = "fp32") -> Any:
    """Return llama.cpp with an exported run, keys and values in fp32: in fp16 they add an error of their own."""
    out = SCRATCH / "model.gguf"
    out.unlink(missing_ok=True)
    gpt("export", run, "--gguf", "--precision", precision, "--out", str(out))
    keep = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    return llama_cpp.Llama(str(out), n_ctx=0, n_threads=1, logits_all=True, verbose=False, **keep)


def cuts_alike(model: Any, right: Any) -> str:
    found = [model.tokenize(text.encode(), special=False) for text in TEXTS]
    if different := [text[:40] for text, *ids in zip(TEXTS, found, right["ids"], strict=True) if ids[0] != ids[1]]:
        raise ValueError(f"other ids for {different}")
    return f"{len(TEXTS)} texts, {sum(map(len, found)):,} ids"


def computes_alike(model: Any, right: Any, limit: float) -> str:
    apart, same = [], []
    for row, expected in zip(ROWS, numpy.array(right["logits"]), strict=True):
        model.reset()
        model.eval(row)
        found = model.scores[: len(row)]
        apart.append(numpy.abs(found - expected).max())
        same.append((found.argmax(1) == expected.argmax(1)).mean())
    if max(apart) > limit:
        raise ValueError(f"logits differ by {max(apart):.4f}")
    return f"logits within {max(apart):.4f}, the likeliest token the same at {numpy.mean(same):.1%} of the positions"


right = ours(BASE, texts=TEXTS, tokens=ROWS, count=16, **{"continue": TEXTS[:2]})
model = opened(BASE)
with tried("a base model cuts text into the same ids") as say:
    say(cuts_alike(model, right))
with tried("a base model goes on as ours does, fp32"):
    for text, expected in zip(TEXTS[:2], right["continued"], strict=True):
        said = model.create_completion(text, temperature=0.0, max_tokens=16)["choices"][0]["text"]
        assert said == model.detokenize(expected).decode(), said
with tried("a base model computes the same, fp32") as say:
    say(computes_alike(model, right, 0.01))
for precision, limit in (("fp16", 0.05), ("bf16", 0.5), ("int8", 0.5)):
    with tried(f"a base model computes the same, {precision}") as say:
        say(computes_alike(opened(BASE, precision), right, limit))

with tried("a chat model answers, and ends where ours ends") as say:
    model, ended = opened(CHAT), 0
    conversations = [[{"role": "system", "content": "Be  brief."}, {"role": "user", "content": each}] for each in ASKED]
    prompts = ours(CHAT, conversations=conversations)["prompts"]
    answers = ours(CHAT, count=120, **{"continue": prompts})["continued"]
    for messages, prompt, expected in zip(conversations, prompts, answers, strict=True):
        said = model.create_chat_completion(messages, temperature=0.0, max_tokens=120)
        assert said["usage"]["prompt_tokens"] == len(prompt), said
        (choice,) = said["choices"]
        assert choice["message"]["content"] == model.detokenize(expected).decode(), choice
        ended += choice["finish_reason"] == "stop"
    say(f"{ended} of {len(ASKED)} answers end within 120 tokens")

gpt("export", BASE, "--out", f"{SCRATCH}/hf")
gpt("import", f"{SCRATCH}/hf", "--out", f"{SCRATCH}/back")
with tried("a model that was exported and imported again cuts text into the same ids") as say:
    say(cuts_alike(opened(f"{SCRATCH}/back"), right))

# A vocabulary such as Pythia's, under weights that have learnt another one.
backend = tokenizers.Tokenizer(tokenizers.models.BPE())
backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
backend.decoder = tokenizers.decoders.ByteLevel()
options = {"special_tokens": ["<|endoftext|>"], "initial_alphabet": tokenizers.pre_tokenizers.ByteLevel.alphabet()}
backend.train_from_iterator(TEXTS, tokenizers.trainers.BpeTrainer(vocab_size=2000, **options))
backend.add_tokens([" " * width for width in range(24, 1, -1)])
backend.save(f"{SCRATCH}/hf/tokenizer.json")
gpt("import", f"{SCRATCH}/hf", "--out", f"{SCRATCH}/bytes")
with tried("a model with a byte-level tokenizer cuts text into the same ids, and computes the same") as say:
    right, model = ours(f"{SCRATCH}/bytes", texts=TEXTS, tokens=ROWS), opened(f"{SCRATCH}/bytes")
    say(cuts_alike(model, right))
    say(computes_alike(model, right, 0.01))
