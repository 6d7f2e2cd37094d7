"""The files for clusters: they parse, and start on every node a command that `gpt` understands, as many as they ask."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer.main

from cli.main import app

CLUSTER = Path(__file__).parents[2] / "cli" / "cluster"


def options(words: list[str]) -> dict[str, Any]:
    """What `gpt train` makes of the words."""
    assert words[:3] == ["gpt", "train", "large"]
    command: Any = typer.main.get_command(app)
    train = command.commands["train"]
    with train.make_context("train", words[2:]) as context:
        return context.params


def test_the_slurm_script_is_bash_and_asks_for_what_it_starts() -> None:
    script = CLUSTER / "slurm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    lines = script.read_text().splitlines()
    asked = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if line.startswith("#SBATCH"))
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first_command:]), "Slurm reads them no further"
    assert asked["ntasks-per-node"] == "1" and "requeue" in asked
    # The shell's own reading of the last command, with srun in its place saying what it was told to start.
    told = 'scontrol() { echo first; echo second; }; srun() { shift; printf "%s\\n" "$@"; }; '
    variables = {"SLURM_JOB_NODELIST": "both", "SLURM_NNODES": asked["nodes"], "PATH": "/usr/bin:/bin"}
    text = script.read_text()
    said = subprocess.run(["bash", "-c", told + text], env=variables, capture_output=True, text=True, check=True)
    found = options(said.stdout.splitlines())
    assert (str(found["gpus"]), found["nodes"]) == (asked["gpus-per-node"], asked["nodes"])
    assert found["rendezvous"] == "first:29500" and found["shard"] and str(found["out"]) == "runs/large"


def test_the_kubernetes_manifest_gives_every_pod_a_gpu_for_each_process() -> None:
    yaml = pytest.importorskip("yaml")
    service, job = yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (service["kind"], job["kind"], spec["completionMode"]) == ("Service", "Job", "Indexed")
    # Pods find the first one by its name in the headless service.
    name = service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None" and pod["subdomain"] == name
    assert service["spec"]["selector"] == job["spec"]["template"]["metadata"]["labels"]
    found = options([*container["command"], *container["args"]])
    assert found["rendezvous"] == f"{job['metadata']['name']}-0.{name}:{service['spec']['ports'][0]['port']}"
    assert found["nodes"] == str(spec["completions"]) == str(spec["parallelism"])
    assert found["gpus"] == container["resources"]["limits"]["nvidia.com/gpu"]
    claimed = {volume["name"] for volume in pod["volumes"]}
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted.keys() == claimed and str(found["out"]).startswith(mounted["runs"])
