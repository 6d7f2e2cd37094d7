"""The page of `gpt watch` in a real browser, over runs whose files grow while it looks."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cli.watching.app import create_app
from tests.cli.page_server import serving
from tests.cli.test_page import browser, expect, opened, pytestmark  # noqa: F401
from tests.cli.test_watch import add_steps, make_run


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    make_run(tmp_path / "runs" / "first", 20, 20)
    make_run(tmp_path / "runs" / "second", 10, 20, noise=0.5, optimizer__kind="adamw")
    return tmp_path / "runs"


@pytest.fixture
def page(browser: Any, runs: Path) -> Iterator[Any]:  # noqa: F811
    app = create_app(runs, key=None, hosts={"127.0.0.1"})
    with serving(app) as url, opened(browser, url) as page:
        yield page


def chart(page: Any, title: str) -> Any:
    return page.locator("figure", has=page.get_by_text(title, exact=True))


def choose(page: Any, run: str) -> None:
    page.locator("#runs label", has_text=run).click()


def test_runs_lie_over_one_another_and_grow(page: Any, runs: Path) -> None:
    loss = chart(page, "Loss").locator(".readout")
    page.get_by_label("Smoothing").fill("0")
    expect(loss).to_contain_text("B1.2 ● 1.3")
    expect(page.locator("#runs")).to_contain_text(
        re.compile("second.*stopped.*first.*done|first.*done.*second.*stopped")
    )
    expect(page.locator("#table")).to_contain_text("1.8M")
    assert chart(page, "Reward").is_hidden() and chart(page, "Memory").is_visible()
    differ = page.locator("#differ")
    differ.get_by_text("1 setting differs").click()
    expect(differ).to_contain_text(re.compile("optimizer.kind(normuonadamw|adamwnormuon)"))
    add_steps(runs / "first", range(21, 26), 20)
    expect(loss).to_contain_text("1.16 ● 1.26")
    choose(page, "second")
    expect(loss).to_have_text("B1.16 ● 1.26" if "B1.16" in loss.text_content() else "A1.16 ● 1.26")
    page.reload()
    expect(loss).to_have_text(re.compile("^.1.16 ● 1.26$"))


def test_a_chart_is_read_with_the_keyboard_and_zoomed_with_the_others(page: Any) -> None:
    rate = chart(page, "Learning rate")
    page.get_by_text("steps", exact=True).first.click()
    expect(page.locator("#table")).to_contain_text("1.8M")
    rate.get_by_role("img").focus()
    page.keyboard.press("ArrowLeft")
    expect(rate.locator(".at")).to_have_text("step 19")
    expect(chart(page, "Loss").locator(".at")).to_have_text("step 19")
    page.get_by_text("Log scale").click()
    expect(rate.locator(".at")).to_have_text("step 19")
    plot = chart(page, "Memory").locator(".u-over")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    page.mouse.move(box["x"] + 5, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 60, steps=3)
    page.mouse.up()
    page.get_by_role("button", name="Reset zoom").click()
    expect(page.get_by_role("button", name="Reset zoom")).to_be_hidden()


def test_samples_stand_side_by_side_as_text(page: Any) -> None:
    samples = page.locator("#columns")
    expect(samples.locator(".sample").first).to_have_text("Who?A <b>fox</b> at 5.")
    page.get_by_label("Run on the right").select_option(
        label="A second" if "A second" in samples.text_content() else "B second"
    )
    expect(samples.locator(".sample").nth(1)).to_have_text("Who?A <b>fox</b> at 10.")
    page.get_by_label("Checkpoint on the right").select_option("5")
    expect(samples.locator(".sample").nth(1)).to_have_text("Who?A <b>fox</b> at 5.")
    assert page.locator("#columns b").count() == 0


def test_samples_of_two_runs_are_compared_where_a_run_has_those_of_one_checkpoint(page: Any, runs: Path) -> None:
    for name in ("first", "second"):
        file = runs / name / "samples.md"
        file.write_text(file.read_text().split("## Step 10")[0].replace("fox", f"{name} fox"))
    page.reload()
    shown = page.locator("#columns .sample")
    expect(shown).to_have_count(4)
    told = shown.all_text_contents()
    assert {"first fox", "second fox"} == {" ".join(re.findall(r"\w+ fox", text)[:1]) for text in told[:2]}


def test_it_has_a_light_and_a_dark_look_and_charts_follow(page: Any) -> None:
    expect(chart(page, "Loss").locator("canvas")).to_be_visible()
    light_of = "name => getComputedStyle(document.body)[name].match(/[0-9]+/g).slice(0, 3).reduce((a, b) => a + +b, 0)"
    drawn = ""
    for look, sign in (("light", 1), ("dark", -1)):
        page.emulate_media(color_scheme=look)
        assert sign * (page.evaluate(light_of, "backgroundColor") - page.evaluate(light_of, "color")) > 450
        redrawn = "before => document.querySelector('figure canvas').toDataURL() !== before"
        page.wait_for_function(redrawn, arg=drawn)
        drawn = page.evaluate("document.querySelector('figure canvas').toDataURL()")


def test_a_server_that_goes_and_comes_back_is_said(page: Any, runs: Path) -> None:
    expect(page.get_by_role("status")).to_have_text("up to date")
    page.route("**/*.json", lambda route: route.abort())
    choose(page, "second")
    expect(page.get_by_role("status")).to_contain_text("No answer since")
    page.unroute("**/*.json")
    choose(page, "second")
    expect(page.get_by_role("status")).to_have_text("up to date")


def test_a_policy_is_drawn_against_its_kl_and_fifty_runs_fit_on_a_phone(page: Any, runs: Path) -> None:
    best = [{"n": n, "kl": 0.2 * n, "gold": 0.4 + 0.02 * n, "reward": 0.1 * n} for n in (1, 2, 4)]
    (runs / "first" / "best-of-n.json").write_text(json.dumps({"curves": {"best of n": best}}))
    policy = make_run(runs / "policy", 2, base="../first", alignment__method="ppo")
    with open(policy / "metrics.jsonl", "a") as file:
        for step in (1, 2):
            measured = {"validation_kl": step - 0.5, "validation_gold": 0.5, "validation_gold_error": 0.01 * step}
            file.write(json.dumps({"step": step, "tokens": 100 * step, "validation_loss": 0.1, **measured}) + "\n")
    for number in range(47):
        make_run(runs / "many" / str(number), 1)
    page.set_viewport_size({"width": 360, "height": 640})
    page.reload()
    page.get_by_role("button", name="Runs").click()
    expect(page.locator("#count")).to_contain_text("50 runs")
    page.get_by_label("Find a run").fill("poli")
    expect(page.locator("#runs li:visible")).to_have_count(1)
    choose(page, "policy")
    page.keyboard.press("Escape")
    expect(chart(page, "Gold against √KL").locator(".readout")).to_have_text(re.compile("^.0.5$"))
    assert chart(page, "Gold against √KL").locator("canvas").count() == 1
    assert page.evaluate("document.querySelector('main').scrollWidth <= innerWidth")


def test_a_logarithmic_scale_takes_what_has_no_logarithm(page: Any, runs: Path) -> None:
    run = make_run(runs / "aligned", 0, alignment__method="dpo")
    steps = (
        {"step": step, "tokens": step, "progress": 1, "loss": -step, "rate": 0.5 * (step < 3)} for step in (1, 2, 3)
    )
    (run / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in steps))
    page.reload()
    choose(page, "first")
    choose(page, "second")
    page.get_by_label("Smoothing").fill("0")
    page.get_by_label("Log scale").check()
    expect(chart(page, "Loss").locator(".readout")).to_have_text("A-3")
    expect(chart(page, "Learning rate").locator(".readout")).to_have_text("A0.5")


def test_a_key_is_asked_for_until_it_is_right(browser: Any, runs: Path) -> None:  # noqa: F811
    with serving(create_app(runs, key="secret", hosts=None)) as url, opened(browser, url) as page:
        for key in ("wrong", "secret"):
            page.get_by_label("API key").fill(key)
            with page.expect_response("**/runs.json"):
                page.keyboard.press("Enter")
        expect(page.locator("#count")).to_have_text("2 runs, 2 shown")
        assert "secret" not in page.evaluate("JSON.stringify(localStorage)")
