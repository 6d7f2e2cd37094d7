"""The files for clusters: they parse, and start the same command with one torchrun on each node."""

import re
import subprocess
from pathlib import Path

import pytest

CLUSTER = Path(__file__).parents[2] / "cli" / "cluster"
TORCHRUN = r"torchrun .*--rdzv-backend=c10d --rdzv-endpoint=\S+ --rdzv-id=\S+ -m cli train large --shard --out \S+"


def one_line(text: str) -> str:
    return re.sub(r"\s*\\\n\s*", " ", text)


def test_the_slurm_script_is_bash_and_asks_for_what_it_starts() -> None:
    script = CLUSTER / "slurm.sh"
    subprocess.run(["bash", "-n", script], check=True)
    lines = script.read_text().splitlines()
    options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if line.startswith("#SBATCH"))
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first_command:]), "Slurm reads them no further"
    assert options["ntasks-per-node"] == "1" and options["nodes"] == "8"
    command = one_line(script.read_text())
    assert re.search(rf"srun \S+ {TORCHRUN}", command) and '--nnodes="$SLURM_NNODES"' in command
    assert f"--nproc-per-node={options['gpus-per-node']} " in command


def test_the_kubernetes_manifest_gives_every_pod_a_gpu_for_each_process() -> None:
    yaml = pytest.importorskip("yaml")
    service, job = yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (service["kind"], job["kind"], spec["completionMode"]) == ("Service", "Job", "Indexed")
    assert spec["completions"] == spec["parallelism"]
    # Pods find the first one by its name in the headless service.
    name = service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None" and pod["subdomain"] == name
    assert service["spec"]["selector"] == job["spec"]["template"]["metadata"]["labels"]
    (script,) = container["args"]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    command = one_line(script)
    assert re.search(TORCHRUN, command) and f"--rdzv-endpoint={job['metadata']['name']}-0.{name}:29500" in command
    assert f"--nnodes={spec['completions']} " in command
    assert f"--nproc-per-node={container['resources']['limits']['nvidia.com/gpu']} " in command
    claimed = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == claimed
