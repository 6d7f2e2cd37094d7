"""The house stays one that a person can read: its walls, and how far a reader has to walk."""

import ast
import graphlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grimp
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("kernels", "engine", "train", "rlhf", "bench", "cli")
MOST_PARAMETERS = 12
# Python files of the project that a reader opens to follow each of them.
MOST_FILES = {"one training step": 16, "one GRPO round": 41, "one chat request": 19}


def functions() -> Iterator[tuple[Path, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield path.relative_to(ROOT), node


def test_no_function_outside_kernels_takes_too_many_arguments() -> None:
    crowded = [
        f"{path}: {node.name}"
        for path, node in functions()
        if path.parts[0] != "kernels"
        and len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs) > MOST_PARAMETERS
    ]
    assert crowded == []


def test_no_import_goes_in_a_circle() -> None:
    """Imports inside functions count, too."""
    graph = grimp.build_graph(*ROOMS, cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    # Raises CycleError, which names the modules of a circle.
    graphlib.TopologicalSorter(imports).prepare()


def test_what_is_installed_is_known_by_its_hash_and_pre_releases_by_name() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {Requirement(line).name.replace("_", "-").lower(): line for line in lines if not line.startswith("#")}
    hashed = re.findall(
        r"^(\S+)==(\S+) \\\n    --hash=sha256:[0-9a-f]{64}", (ROOT / "constraints-hashes.txt").read_text(), re.M
    )
    assert dict(hashed) == {
        name: line.partition("==")[2] for name, line in pinned.items() if name not in ("torch", "triton")
    }
    early = {name for name, line in pinned.items() if Version(line.partition("==")[2]).is_prerelease}
    assert early <= {word for line in lines if line.startswith("#") for word in line.split()}


def test_a_step_a_round_and_a_request_are_followed_through_few_files(tmp_path: Path) -> None:
    # In a process of its own: the first call of everything is made there, and no other test's trace is in it.
    follow = "{what: [*trace.files] for what, trace in files_entered.follow_all().items()}"
    script = f"import json, files_entered; print(json.dumps({follow}))"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests/house'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    files = json.loads(done.stdout.splitlines()[-1])
    assert files.keys() == MOST_FILES.keys()
    for what, most in MOST_FILES.items():
        assert 5 < len(files[what]) <= most, "\n".join(files[what])
