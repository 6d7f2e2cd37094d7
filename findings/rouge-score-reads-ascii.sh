#!/usr/bin/env bash
# One would guess that a text compared with itself has ROUGE 1, in any language, and that two Russian sentences without
# a word in common have ROUGE 0; or else that rouge-score warns about text that it cannot read.
#
# In truth its default tokenizer turns everything but a-z and 0-9 into spaces, without a word. A Russian or Chinese text
# against itself has ROUGE 0, and two Russian sentences that share nothing but a year have ROUGE 1. Accented letters go,
# too: "ärger" (anger) equals "rger". A `tokenizer=` of one's own is the cure.
#
# Exits with 1 where this is no longer so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
    rouge-score==0.1.2 nltk==3.10.4 absl-py==2.5.1 six==1.17.0

cat >"$work/show.py" <<'PY'
import sys
from importlib.metadata import version

from rouge_score.rouge_scorer import RougeScorer

print("rouge-score", version("rouge-score"))
scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
changed = False
for reference, text, expected in (
    ("A fox ran home.", "A fox ran home.", 1.0),
    ("Лиса бежала домой.", "Лиса бежала домой.", 0.0),
    ("狐狸跑回家。", "狐狸跑回家。", 0.0),
    ("Завод построили к 2020 году.", "Суд оправдал всех, 2020.", 1.0),
    ("ärger", "rger", 1.0),
):
    found = {kind: score.fmeasure for kind, score in scorer.score(reference, text).items()}
    print(f"{reference!r} against {text!r}: {found}")
    changed |= set(found.values()) != {expected}
sys.exit(changed)
PY
"$work/venv/bin/python" "$work/show.py" 2>"$work/log" || { cat "$work/log"; echo "the behaviour has changed"; exit 1; }
echo "warnings: $(wc -l <"$work/log")"
test ! -s "$work/log" || { cat "$work/log"; echo "the behaviour has changed"; exit 1; }
