"""Run a command of `gpt` on a GPU that is not there, and say what was launched and what was wrong: see __init__.py."""

import sys
from collections import Counter

import torch

from tests import gpu_path


def main(arguments: list[str]) -> int:
    """Return the command's exit status, and 1 where a launch was wrong."""
    architecture = 90
    if arguments[:1] == ["--arch"]:
        architecture, arguments = int(arguments[1]), arguments[2:]
    gpu = gpu_path.install(architecture)
    # Inductor would compile for the CPU that is really there.
    torch.compile = lambda model=None, **options: model or (lambda each: each)  # type: ignore[assignment]
    sys.argv = ["gpt", *arguments]
    from cli.main import main as run

    code: object = 0
    try:
        run()
    except SystemExit as end:
        code = end.code
    for kernel, launches in sorted(Counter(launch.kernel for launch in gpu.launches).items()):
        print(f"{kernel}: {launches} launches, {len(set(gpu.compiled[kernel]))} compiled", file=sys.stderr)
    for problem, times in gpu.problems.items():
        print(f"WRONG, {times} times: {problem}", file=sys.stderr)
    return 1 if gpu.problems else code if isinstance(code, int) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
