"""gpt doctor"""

from pathlib import Path
from typing import Annotated

import typer


def doctor(
    runs: Annotated[Path, typer.Option(help="The folder that runs are kept in.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Say what this machine has, and what each thing means for a run. Exit code 1 where something needed is broken.

    Example: gpt doctor --json
    """
    import dataclasses
    import json

    from cli.checks import findings

    found = list(findings(runs))
    if as_json:
        print(json.dumps([dataclasses.asdict(each) for each in found], indent=2))
    else:
        for each in found:
            mark = {"good": "", "note": "note: ", "broken": "BROKEN: "}[each.state]
            print(f"{each.name:13} {each.found}\n{'':13} {mark}{each.meaning}")
    if any(each.state == "broken" for each in found):
        raise typer.Exit(1)
