#!/usr/bin/env bash
# One would guess that the same text and the same settings give the same SentencePiece model file on every machine, and
# that num_threads, which changes nothing that is learnt, is no part of it.
#
# In truth the trainer writes its whole configuration into the model, num_threads among it. Trained with
# num_threads=os.cpu_count(), one text gives files of different SHA-256 on machines of different size, though all pieces
# and scores are equal: caches and checks by checksum then take one tokenizer for many. A fixed number is the cure.
#
# Exits with 1 where this is no longer so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check sentencepiece==0.2.3

cat >"$work/show.py" <<'PY'
import hashlib
import io
import sys

import sentencepiece

print("sentencepiece", sentencepiece.__version__)
files, contents = set(), set()
for threads in (1, 2, 8, 8):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat and looked at the moon"] * 100),
        model_writer=model, model_type="bpe", vocab_size=40, num_threads=threads, minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [(processor.id_to_piece(index), processor.get_score(index)) for index in range(processor.vocab_size())]
    file, content = (hashlib.sha256(each).hexdigest() for each in (model.getvalue(), repr(pieces).encode()))
    files.add(file)
    contents.add(content)
    print(f"num_threads={threads}: SHA-256 of the file {file[:16]}, of its pieces and scores {content[:16]}")
print(f"{len(files)} different files, {len(contents)} content")
sys.exit((len(files), len(contents)) != (3, 1))
PY
"$work/venv/bin/python" "$work/show.py" || { echo "the behaviour has changed"; exit 1; }
