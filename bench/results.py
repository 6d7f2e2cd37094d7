"""One way to write a result down: what ran, on what, from which commit."""

import json
import re
from pathlib import Path
from typing import Any

from engine.checkpoint import write_atomically
from engine.run import versions
from engine.runtime import Runtime

RESULTS = Path("bench") / "results"


def write_result(name: str, runtime: Runtime, content: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write NAME-DEVICE.json with versions, commit and the date."""
    import datetime

    folder.mkdir(parents=True, exist_ok=True)
    device = device_name(runtime)
    path = folder / f"{name}-{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.json"
    header = {"device": device, "date": datetime.date.today().isoformat(), "versions": versions()}
    write_atomically(path, (json.dumps({**header, **content}, indent=2) + "\n").encode())
    return path


def device_name(runtime: Runtime) -> str:
    import torch

    if runtime.device.type == "cuda":
        return torch.cuda.get_device_name(runtime.device)
    model = "CPU"
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return f"{model}, {torch.get_num_threads()} threads"
