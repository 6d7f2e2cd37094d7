"""A program that prints what llama-batched-bench does, without a model in it."""

import sys
from pathlib import Path

# It answers as llama-batched-bench does: a line for each count of new tokens, of which the last ones may be lost, and
# others come twice.
FAKE = """#!{python}
import json, pathlib, sys
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
calls = pathlib.Path(__file__).with_suffix(".calls")
with calls.open("a") as file:
    file.write(json.dumps(given) + "\\n")
assert pathlib.Path(given["-m"]).read_bytes()[:4] == b"GGUF"
batch, prompt, counts = int(given["-npl"]), int(given["-npp"]), [int(each) for each in given["-ntg"].split(",")]
print("load: adding dummy tokens", file=sys.stderr)
speeds = dict(pp=prompt, pl=batch, t_pp=prompt * batch / 1000)
rows = [speeds | dict(tg=n, t_tg=n * batch / 500, t=number) for number, n in enumerate(counts)]
lost = len(calls.read_text().splitlines()) % 4
for row in (rows[:1] + rows)[: 4 - lost]:
    print(json.dumps(row))
"""


def program(folder: Path, text: str, mode: int = 0o755) -> Path:
    path = folder / "llama-batched-bench"
    path.write_text(text.replace("{python}", sys.executable))
    path.chmod(mode)
    return path
