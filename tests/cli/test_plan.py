"""gpt plan: what it prints, and that its arithmetic is that of the sources it names."""

import dataclasses
import json
from pathlib import Path

import pytest

from engine.config import ModelConfig, Recipe, override, preset
from engine.laws import EPOCHS, forecast
from engine.planning import MACHINES, Rate, assumed_rate, measured_rate, muon_flops, plan, ring_seconds
from engine.run import Run
from tests.cli.conftest import Gpt


def large(batch: int = 512) -> Recipe:
    return override(preset("large"), "loop.batch", batch)


def test_sixty_four_gpus_get_memory_speed_communication_time_and_cost(gpt: Gpt) -> None:
    done = gpt("plan", "large", "--gpus", "64", "--nodes", "8", "--shard", "--batch", "512", "--price", "2.5")
    assert done.code == 0, done.err
    for part in ("64 x H100 SXM in 8 nodes: FSDP2, bf16", "weights", "gradients", "optimizer", "activations", "logits"):
        assert part in done.out
    for part in ("communication", "tokens/s", "GPU hours, $", "not hidden", "ASSUMED", "data sheet", "fits"):
        assert part in done.out


def test_a_batch_that_does_not_divide_is_rounded_up_and_said_or_refused_where_it_was_asked_for(gpt: Gpt) -> None:
    assert "64 x 512 = 32,768 tokens a step; its own 30 do not" in gpt("plan", "large", "--gpus", "64").out
    refused = gpt("plan", "large", "--gpus", "64", "--batch", "30")
    assert refused.code == 2 and "30 does not divide among 64" in refused.err


def test_what_does_not_fit_says_the_way_out(gpt: Gpt) -> None:
    huge = ("--set", "model.width=8192", "--set", "model.blocks=80", "--gpus", "8")
    assert "DOES NOT FIT; --shard" in gpt("plan", "large", *huge).out
    assert "1 x H200 SXM: bf16" in gpt("plan", "tiny", "--gpu", "h200").out


def test_finetuning_a_run_is_planned_with_adapters_and_without(gpt: Gpt) -> None:
    shape = ModelConfig(49_152, 960, 32, 15, 2048, norm="rms", mlp="gated", mlp_width=2560, key_heads=5, tied=True)
    recipe = override(dataclasses.replace(preset("nano"), name="imported", model=shape), "loop.batch", 8)
    Run(Path("smollm2")).path.mkdir()
    Run(Path("smollm2")).write_recipe(recipe)
    again = ("--gpu", "4090", "--set", "loop.checkpoint_activations=true")
    whole, adapted = gpt("plan", "smollm2", *again), gpt("plan", "smollm2", *again, "--set", "lora.rank=16")
    assert "imported     361.8M parameters on 1 x RTX 4090: bf16" in whole.out
    assert "361.8M parameters and 7.2M in adapters, which alone learn, on 1 x RTX 4090: bf16" in adapted.out
    assert "memory    6.0 of 23 GiB" in whole.out and "memory    3.3 of 23 GiB" in adapted.out
    assert "optimizer's work" in whole.out and "optimizer's work" not in adapted.out
    assert gpt("plan", ".").code == 2


def test_a_plan_says_what_a_run_should_reach_on_its_way_and_what_the_reference_reached(gpt: Gpt) -> None:
    lines = [line for line in gpt("plan", "tiny").out.splitlines() if line.startswith(("epochs", "forecast", "refer"))]
    assert lines[0] == "epochs    6 x 455M tokens of tinystories, ASSUMED"
    ends = ["27.3M tokens, 1% of the run", "273M tokens, 10% of the run", "2,730M tokens, 100% of the run"]
    assert [line.rpartition(" after ")[2] for line in lines[1:4]] == ends
    epoch = EPOCHS["tinystories"]
    assert f"{forecast(preset('tiny').model, 6 * epoch, 'tinystories', epoch=epoch)} after" in lines[3]
    assert "0.395 bits per byte: loss 1.15 per token" in lines[4] and "ASSUMED" in lines[4]
    long = gpt("plan", "large", "--tokens", "3e10", "--gpus", "8", "--batch", "32").out
    assert "after 30,000M tokens, 100% of the run" in long
    hours = gpt("plan", "--hours", "2", "--gpu", "4090").out
    assert "should end best after 120 minutes" in hours and "budget    2.00 hours" in hours
    assert "forecast  none for" in gpt("plan", "nano", "--set", "data.source=my.txt").out


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [(["--gpus", "9", "--nodes", "2"], "--nodes 2"), (["--gpu", "h800"], "h100"), (["--precision", "int8"], "bf16")],
)
def test_a_mistake_is_named(gpt: Gpt, wrong: list[str], expected: str) -> None:
    refused = gpt("plan", "large", *wrong)
    assert refused.code == 2 and expected in refused.err


def test_a_measured_rate_is_taken_before_an_assumed_one(gpt: Gpt) -> None:
    variants = {"ours": {"mfu": 0.3}, "ours, AdamW": {"mfu": 0.5}, "plain": {"mfu": 0.9}}
    content = {"device": "NVIDIA H100 80GB HBM3", "precision": "bf16", "peak_flops": 7e14, "variants": variants}
    Path("figures").mkdir()
    Path("figures/training-large-nvidia-h100.json").write_text(json.dumps(content))
    rate = measured_rate(preset("large"), "bf16", "h100", Path("figures"))
    assert rate is not None and rate.flops == pytest.approx(0.5 * 7e14)
    assert measured_rate(preset("large"), "fp32", "h100", Path("figures")) is None
    assert measured_rate(preset("tiny"), "bf16", "h100", Path("figures")) is None
    assert "measured on NVIDIA H100" in gpt("plan", "large", "--results", "figures").out


def test_a_ring_sends_what_the_textbook_says() -> None:
    assert ring_seconds(8e9, 4, 2, 1e9) == pytest.approx(12.0)
    assert ring_seconds(8e9, 4, 1, 1e9) == pytest.approx(6.0)
    assert ring_seconds(8e9, 1, 2, 1e9) == 0


def test_muons_products_are_counted_one_by_one() -> None:
    recipe = preset("nano")
    products = 0
    for rows, columns in [(128, 128)] * 4 + [(320, 128)] * 3:
        short, long = min(rows, columns), max(rows, columns)
        products += 5 * (2 * short * long * short + 2 * short**3 + 2 * short * short * long)
    assert muon_flops(override(recipe, "optimizer.kind", "muon")) == 4 * products
    # Of embedding and head normuon multiplies the Gram matrix, what it makes of the update, and small ones in between.
    assert muon_flops(recipe) == 4 * products + 2 * (2 * 2 * 4096 * 128**2 + 5 * 4 * 2 * 128**3)
    assert muon_flops(override(recipe, "optimizer.kind", "adamw")) == 0


def test_a_step_adds_up() -> None:
    h100 = MACHINES["h100"]
    rate = assumed_rate(h100, "bf16")
    alone = plan(large(8), h100, rate, "bf16", gpus=1, nodes=1, shard=False)
    assert alone.communication_seconds == 0
    assert alone.model_seconds == pytest.approx(8 * 512 * preset("large").model.flops_per_token / (0.4 * 989e12))
    near, far = (plan(large(), h100, rate, "bf16", gpus=16, nodes=nodes, shard=False) for nodes in (1, 16))
    assert near.communication_seconds < far.communication_seconds
    assert far.step_seconds == pytest.approx(far.model_seconds + far.optimizer_seconds + far.exposed_seconds)
    # Slow links cannot be hidden; a slower computation hides more.
    slow = plan(large(), h100, Rate(rate.flops / 100, ""), "bf16", gpus=16, nodes=16, shard=False)
    assert far.exposed_seconds > slow.exposed_seconds == 0


def test_a_batch_too_large_for_memory_goes_in_several_passes() -> None:
    small = dataclasses.replace(MACHINES["4090"], memory=10 * 2**30)
    found = plan(large(32), small, assumed_rate(small, "bf16"), "bf16", gpus=1, nodes=1, shard=False)
    assert found.fits and found.passes > 1 and found.setup.accumulate
    asked = plan(
        override(large(32), "loop.micro_batch", 2), small, assumed_rate(small, "bf16"), "bf16",
        gpus=1, nodes=1, shard=False,
    )  # fmt: skip
    assert asked.passes == 16
