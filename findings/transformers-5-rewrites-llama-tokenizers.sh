#!/usr/bin/env bash
# One would guess that AutoTokenizer gives the ids that the folder's tokenizer.json gives, as it does in transformers 4:
# that file says everything, and tokenizer_config.json beside it has only names and templates.
#
# In truth transformers 5 takes vocabulary, merges, added tokens and post-processor from it, and nothing else, where
# tokenizer_class is LlamaTokenizer or LlamaTokenizerFast and the model is a Llama, as in folders of Llama 2's kind. The
# normalizer, which puts "▁" before every text and for every space, gives way to the class's own Metaspace. That puts
# none before a text that begins with a space: " the" and "the" have the same ids, and the space is lost. And unless
# tokenizer_config.json has "legacy": true, it puts none after a special token: what a chat template writes after "</s>"
# has other ids than transformers 4 taught the model. No warning is given. The same two files beside a config.json of
# Mistral are read as they are, and so they are by PreTrainedTokenizerFast.
#
# Exits with 1 where this is no longer so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
install() {
    python3 -m venv "$work/$1"
    "$work/$1/bin/pip" install --quiet --disable-pip-version-check "transformers==$1" "tokenizers==$2"
}
install 4.57.1 0.22.2
install 5.23.0 0.23.3
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error

cat >"$work/train.py" <<'PY'
import json
import os

from tokenizers import Tokenizer, decoders, models, normalizers, trainers

special, bytes_ = ["<unk>", "<s>", "</s>"], [f"<0x{byte:02X}>" for byte in range(256)]
tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special + bytes_, show_progress=False)
tokenizer.train_from_iterator(["▁the", "▁fox", "▁saw", "▁bear"] * 20, trainer)
# The rest is what the converters of SentencePiece wrote for Llama 2.
content = json.loads(tokenizer.to_str())
content["added_tokens"] = content["added_tokens"][: len(special)]
tokenizer = Tokenizer.from_str(json.dumps(content))
tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
steps = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
tokenizer.decoder = decoders.Sequence(list(steps))
for name, kind, legacy in ("legacy", "llama", True), ("new", "llama", False), ("mistral", "mistral", False):
    os.mkdir(name)
    json.dump({"model_type": kind}, open(f"{name}/config.json", "w"))
    tokenizer.save(f"{name}/tokenizer.json")
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    json.dump(config | {"add_bos_token": False, "legacy": legacy}, open(f"{name}/tokenizer_config.json", "w"))
PY
cat >"$work/show.py" <<'PY'
import sys

import tokenizers
import transformers

TEXTS = "the fox", " the fox", "</s>the fox"
same = []
for name in "legacy", "new", "mistral":
    file = tokenizers.Tokenizer.from_file(f"{name}/tokenizer.json")
    auto = transformers.AutoTokenizer.from_pretrained(name)
    fast = transformers.PreTrainedTokenizerFast.from_pretrained(name)
    print(f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}, {name}:")
    for text in TEXTS:
        found, wanted = auto(text, add_special_tokens=False).input_ids, file.encode(text, add_special_tokens=False)
        print(f"  {text!r}: tokenizer.json gives {wanted.tokens}, AutoTokenizer {auto.convert_ids_to_tokens(found)}")
        same.append(found == wanted.ids)
        if fast(text, add_special_tokens=False).input_ids != wanted.ids:
            sys.exit("PreTrainedTokenizerFast gives others, too")
sys.exit(same != ([True] * 9 if sys.argv[1] == "same" else [True, False, True, True, False, False, True, True, True]))
PY
cd "$work"
5.23.0/bin/python train.py
4.57.1/bin/python show.py same
5.23.0/bin/python show.py other
