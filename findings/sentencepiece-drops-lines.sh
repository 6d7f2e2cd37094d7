#!/usr/bin/env bash
# One would guess that SentencePiece learns from every line it is given, or warns where it does not.
#
# In truth its trainer leaves out every line that holds U+2585, the lower five eighths block of sparklines and progress
# bars: the trainer uses that character itself, for characters that the vocabulary does not hold. Each such line is
# told of at log level INFO alone, so with minloglevel=1 (warnings and errors) nothing is said. The line's other words
# are missing from the vocabulary. U+2584 beside it does no harm. Where every line holds U+2585, training fails with
# "!sentences_.empty()".
#
# Exits with 1 where this is no longer so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check sentencepiece==0.2.3

cat >"$work/show.py" <<'PY'
import io
import sys

import sentencepiece


def train(block: str, others: list[str], minloglevel: int = 1) -> list[str]:
    """The pieces learnt from 100 lines of a progress bar and from other lines."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"sparrow {block} wren"] * 100 + others),
        model_writer=model, model_type="bpe", vocab_size=40, minloglevel=minloglevel,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return [processor.id_to_piece(index) for index in range(processor.vocab_size())]


print("sentencepiece", sentencepiece.__version__)
others = ["the cat sat on the mat and looked at the moon"] * 10
learnt = {}
for block in "\u2584\u2585":
    pieces = train(block, others)
    learnt[block] = any("w" in piece for piece in pieces)  # no other line has that letter
    print(f"100 lines 'sparrow {block} wren' (U+{ord(block):04X}) and 10 others: 'w' is in a piece: {learnt[block]}")
try:
    train("\u2585", [])
    failed = ""
except RuntimeError as error:
    failed = str(error)
print("100 lines with U+2585 and no others:", failed or "trained")
print("once more, at log level INFO:", file=sys.stderr)
train("\u2585", others, minloglevel=0)
sys.exit(not (learnt["\u2584"] and not learnt["\u2585"] and "sentences_.empty()" in failed))
PY
changed() { cat "$work/log"; echo "the behaviour has changed"; exit 1; }
"$work/venv/bin/python" "$work/show.py" 2>"$work/log" || changed
echo "the log at minloglevel=1 and 0:"
grep -m 2 -e "once more" -e "Skipped: " "$work/log"
# Nothing before that line, and every dropped line after it.
[[ $(head -n 1 "$work/log") == "once more"* && $(grep -c "Skipped: " "$work/log") == 100 ]] || changed
