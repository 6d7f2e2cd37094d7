"""gpt doctor: it answers without a GPU and without a network, and fails only where something needed is broken."""

import json
from pathlib import Path

import pytest
import torch

from cli import checks
from tests.cli.conftest import Gpt

NAMES = {"GPU", "NCCL", "kernels", "decoding", "CPU", "memory", "disk", "hub", "packages", "C compiler", "C++ compiler"}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_every_line_says_what_it_means_and_programs_can_read_it(gpt: Gpt) -> None:
    done = gpt("doctor", "--json")
    found = {each["name"]: each for each in json.loads(done.out)}
    assert found.keys() >= NAMES
    assert all(each["found"] and each["meaning"] for each in found.values())
    assert "HF_HUB_OFFLINE" in found["hub"]["found"] and found["hub"]["state"] == "note"
    assert "tiny" in found["memory"]["meaning"] and torch.__version__.split("+")[0] in found["packages"]["found"]


def test_a_person_reads_it_too(gpt: Gpt) -> None:
    done = gpt("doctor")
    assert all(name in done.out for name in NAMES)
    assert done.code == ("BROKEN" in done.out)


@pytest.mark.parametrize(
    ("native", "meaning"), [(True, "nano 1.28x, tiny 2.56x"), (False, "fp32 only: bf16 would be emulated")]
)
def test_bf16_units_decide_the_precision(monkeypatch: pytest.MonkeyPatch, native: bool, meaning: str) -> None:
    monkeypatch.setattr("engine.runtime.cpu_multiplies_bf16", lambda: native)
    monkeypatch.setattr("engine.precision.bf16_speedup", lambda model: model.width / 100)
    (finding,) = checks.cpu()
    assert meaning in finding.meaning


def test_a_gpu_on_which_our_kernels_do_not_run_is_no_good_news(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("kernels.backend.why_not_triton", lambda device: "no driver" if device.index == 1 else None)
    (finding,) = checks.kernels()
    assert finding.found == "torch: no driver" and "slower" in finding.meaning and finding.state == "note"


def test_a_full_disk_is_broken_and_the_exit_code_says_so(gpt: Gpt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "LEAST_DISK", 2**80)
    done = gpt("doctor", "--runs", "a/folder/to/come")
    assert done.code == 1 and "BROKEN: no run fits" in done.out


def test_a_silent_hub_and_missing_packages_are_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    from engine import hub

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "hub_failure", lambda seconds: f"no answer in {seconds} s")
    (finding,) = checks.hub()
    assert "no answer in 2.0 s" in finding.found and finding.state == "note"
    monkeypatch.setattr(checks, "installed", lambda name: None if name in ("wandb", "torch") else "1.0")
    states = {finding.name: finding.state for finding in checks.packages()}
    assert states == {"packages": "good", "torch": "broken", "wandb": "note"}


def test_without_room_for_any_preset_that_is_said() -> None:
    assert checks.fitting(2**20) == "no preset fits"
    assert checks.fitting(2**40).startswith("nano, tiny, large with the whole batch")


def test_a_gpu_that_torch_cannot_use_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda path: True)
    (finding,) = checks.gpus()
    assert finding.state == "broken" and "this torch" in finding.found
