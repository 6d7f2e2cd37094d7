"""Try other people's tools on our models and our API: `bash bench/compatibility.sh [NAME...]`, all of them by default.

To add a tool, write a script bench/compatibility/TOOL.py. Lines in its head name what it runs with, one line for each
venv: the first package is the one whose version is told.

    # client litellm: litellm==1.80.0

The script runs as `python -m bench.compatibility.TOOL` in the root of the project with that venv's interpreter, which
has neither torch nor anything of ours. It prints one JSON object for each thing tried: `tried`, `result` (`ok...`,
`failed...` or `skipped...`) and, where it knows better than the pin, `version`. `tried`, `gpt` and `ours` of this
package do that, run a command of ours, and ask our model for what is right:

    with tried("a chat, streamed") as say:
        assert ...
        say("12 events")

Imports of the tool go through importlib.import_module, which needs no setting of mypy; tests/house allow `assert` at
the module's own level, not in functions.

Its environment has BASE and CHAT, folders of runs; SCRATCH, an empty folder; and, where the script reads them, BASE_URL
and CHAT_URL, at which `gpt serve` serves the models `base` and `chat` (the API is under /v1).

Runs and venvs are kept in COMPATIBILITY, or else in the user's cache; RUNS names a folder with other runs `base` and
`chat`. A venv is made anew when its line changes. PIP_* settings are pip's own. Ends with 1 where something failed.
"""

import argparse
import contextlib
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.harness import RESULTS
from bench.serving import serving
from engine.disk import write_atomically
from engine.run import versions

HERE = Path(__file__).parent
RESULT = RESULTS / "compatibility.json"
LIMIT = 1800  # seconds for one script


def clients() -> dict[str, tuple[Path, list[str]]]:
    """Return of each client its script and its packages."""
    return {
        name: (script, packages.split())
        for script in sorted(HERE.glob("*.py"))
        if not script.name.startswith("__")
        for name, packages in re.findall(r"^# client ([\w.-]+): (.+)$", script.read_text(), re.MULTILINE)
    }


def venv(folder: Path, packages: list[str]) -> Path:
    """Return the interpreter of a venv that has these packages, made if it is not there."""
    python, made = folder / "bin" / "python", folder / "packages.txt"
    if not made.exists() or made.read_text().split() != packages:
        print(f"installing {' '.join(packages)}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run(
            [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages], check=True
        )
        made.write_text("\n".join(packages))
    return python


def make_runs(folder: Path) -> None:
    """Train a small base model and finetune it to a chat model, where they are not there yet."""
    base, chat = folder / "base", folder / "chat"
    for out, command in ((base, ("train", "nano", "--steps", "60")), (chat, ("finetune", str(base), "--steps", "30"))):
        if not (out / "report.md").exists():
            print(f"making {out}", flush=True)
            arguments = (*command, "--out", str(out), "--overwrite")
            subprocess.run([sys.executable, "-m", "cli", *arguments], check=True, stdout=subprocess.DEVNULL)


def rows(python: Path, script: Path, environment: dict[str, str]) -> Iterator[dict[str, str]]:
    """Yield what a script prints of each thing tried, and how it ended if not well."""
    command = [str(python), "-m", f"bench.compatibility.{script.stem}"]
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryFile("w+") as said:
        inside = os.environ | environment | {"SCRATCH": scratch, "PYTHON": sys.executable}
        try:
            code = subprocess.run(command, env=inside, stdout=said, timeout=LIMIT).returncode
            end = f"it ended with {code}" if code else ""
        except subprocess.TimeoutExpired:
            end = f"it had no end after {LIMIT} s"
        said.seek(0)
        # A tool's own prints are none of ours.
        yield from (json.loads(line) for line in said if line.startswith('{"'))
        if end:
            yield {"tried": "the script as a whole", "result": f"failed: {end}"}


def main() -> int:
    known = clients()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"or how it begins: {', '.join(known)}")
    wanted = tuple(parser.parse_args().names) or ("",)
    chosen = {name: each for name, each in known.items() if name.startswith(wanted)}
    if not chosen:
        parser.error(f"no tool has a name that begins with {' or '.join(wanted)}; there are {', '.join(known)}")

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt"
    folder = Path(os.environ.get("COMPATIBILITY") or cache / "compatibility").absolute()
    runs = Path(os.environ.get("RUNS") or folder / "runs").absolute()
    make_runs(runs)
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    environment = {name.upper(): str(runs / name) for name in ("base", "chat")}
    about = {"date": datetime.date.today().isoformat(), "commit": versions()["commit"]}
    table = Table("client or tool", "version", "tried", "result")
    with contextlib.ExitStack() as servers:
        for name, (script, packages) in chosen.items():
            if "_URL" in script.read_text() and "BASE_URL" not in environment:
                for model in ("base", "chat"):
                    port, _ = servers.enter_context(serving(runs / model, ["--name", model, "--precision", "fp32"]))
                    environment[f"{model.upper()}_URL"] = f"http://127.0.0.1:{port}"
            python = venv(folder / "venvs" / name, packages)
            print(f"trying {name}", flush=True)
            found = [*rows(python, script, environment)]
            version = next((row["version"] for row in found if "version" in row), packages[0].partition("==")[2])
            tried = {row["tried"]: row["result"] for row in found}
            result[name] = {"version": version, **about, "packages": packages, "tried": tried}
            for what, how in tried.items():
                table.add_row(name, version, what, how)
            write_atomically(RESULT, json.dumps(dict(sorted(result.items())), indent=2) + "\n")
    Console().print(table)
    return int(any(how.startswith("failed") for name in chosen for how in result[name]["tried"].values()))


if __name__ == "__main__":
    sys.exit(main())
