"""The web page in a real browser, mostly before a scripted server."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from engine.batcher import Batcher
from engine.config import ModelConfig
from engine.model import GPT
from engine.tokenizer import Tokenizer
from tests.cli.page_server import PageServer, serving

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as engine:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = engine.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def running() -> Iterator[PageServer]:
    with PageServer().running() as server:
        yield server


@pytest.fixture
def server(running: PageServer) -> PageServer:
    running.reset()
    return running


@contextmanager
def opened(browser: Any, url: str) -> Iterator[Any]:
    """The page; what no test may see is looked for at the end: a policy broken, a script error, a third party."""
    context = browser.new_context()
    context.set_default_timeout(5000)
    page = context.new_page()
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if "Content Security" in message.text else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    ours = (url, "data:", f"blob:{url}")
    page.on("request", lambda request: None if request.url.startswith(ours) else wrong.append(request.url))
    page.goto(url)
    yield page
    context.close()
    assert wrong == []


@pytest.fixture
def page(browser: Any, server: PageServer) -> Iterator[Any]:
    with opened(browser, server.url) as page:
        yield page


@pytest.fixture
def story(page: Any, server: PageServer) -> Any:
    """The page of a base model."""
    server.info["chat"] = False
    page.reload()
    return page


def say(page: Any, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def answer(page: Any) -> Any:
    return page.locator("article.model .text").last


def finished(page: Any) -> Any:
    return page.locator("article.model .foot", has_text="tokens/s").last


def test_tokens_arrive_one_after_another(page: Any, server: PageServer) -> None:
    server.hold_after = 2
    say(page, "A story, please.")
    expect(answer(page)).to_have_text("Once there ")
    expect(answer(page)).to_have_attribute("aria-busy", "true")
    server.go.set()
    expect(answer(page)).to_have_text("Once there was a fox.")
    expect(finished(page)).to_contain_text(re.compile(r"5 tokens · [\d.]+ tokens/s · context 9 of 256"))
    expect(page.locator("#announce")).to_have_text("Once there was a fox.")
    (request,) = server.requests
    assert request["messages"] == [{"role": "user", "content": "A story, please."}]
    assert (request["temperature"], request["top_p"], request["max_tokens"]) == (0.8, 0.95, 179)
    assert "seed" not in request


def test_an_answer_that_comes_at_once_is_as_fast_as_the_wait_for_it(page: Any, server: PageServer) -> None:
    server.hold_after = 0
    say(page, "A story, please.")
    page.wait_for_timeout(300)
    server.go.set()
    speed = re.search(r"([\d.]+) tokens/s", finished(page).inner_text())
    assert speed and float(speed[1]) <= 5 / 0.3


@pytest.mark.parametrize("how", ["Stop", "Escape"])
def test_stopping_keeps_what_came_and_ends_the_request(page: Any, server: PageServer, how: str) -> None:
    server.hold_after = 2
    say(page, "A story, please.")
    expect(answer(page)).to_have_text("Once there ")
    page.keyboard.press("Escape") if how == "Escape" else page.get_by_role("button", name="Stop").click()
    expect(page.get_by_text("Stopped.")).to_be_visible()
    expect(answer(page)).to_have_text("Once there ")
    assert server.left.wait(5)


def test_an_answer_is_written_again(page: Any, server: PageServer) -> None:
    say(page, "A story, please.")
    expect(finished(page)).to_be_visible()
    server.pieces = ["Another ", "one."]
    page.get_by_role("button", name="Again").click()
    expect(answer(page)).to_have_text("Another one.")
    expect(page.locator("article")).to_have_count(2)
    assert server.requests[0] == server.requests[1]


def test_an_earlier_message_is_edited_and_sent_again(page: Any, server: PageServer) -> None:
    for text in ("First", "Second"):
        say(page, text)
        expect(finished(page)).to_be_visible()
        expect(page.locator(".live")).to_have_count(0)
    page.get_by_role("button", name="Edit").first.click()
    page.get_by_label("Edit the message").fill("Instead")
    page.keyboard.press("Enter")
    expect(page.locator("article")).to_have_count(2)
    expect(finished(page)).to_be_visible()
    assert server.requests[-1]["messages"] == [{"role": "user", "content": "Instead"}]
    written(page)
    page.get_by_role("button", name="Earlier branch").click()
    expect(page.locator("article.person .text")).to_have_text(["First", "Second"])


def test_conversations_survive_a_reload_and_are_deleted_and_brought_back(page: Any, server: PageServer) -> None:
    say(page, "About a fox")
    expect(finished(page)).to_be_visible()
    page.keyboard.press("Control+Shift+O")
    expect(page.locator("article")).to_have_count(0)
    say(page, "About an owl")
    expect(finished(page)).to_be_visible()
    page.get_by_label("Title").fill("Owls")
    page.get_by_label("Title").press("Enter")
    page.reload()
    expect(page.get_by_label("Title")).to_have_value("Owls")
    expect(page.locator("#list button")).to_have_text(["Owls", "About a fox"])
    page.get_by_role("button", name="About a fox").click()
    expect(page.locator("article.person .text")).to_have_text("About a fox")
    page.get_by_label("Export and delete").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    expect(page.locator("#list button")).to_have_text(["Owls"])
    page.get_by_role("button", name="Bring it back").click()
    expect(page.locator("article.person .text")).to_have_text("About a fox")


def test_a_conversation_is_exported(page: Any, server: PageServer) -> None:
    say(page, "About a fox")
    expect(finished(page)).to_be_visible()
    texts = []
    for name in ("JSON", "Markdown"):
        page.get_by_label("Export and delete").click()
        with page.expect_download() as download:
            page.get_by_role("button", name=f"Export as {name}").click()
        texts.append(Path(download.value.path()).read_text("utf-8"))
    assert download.value.suggested_filename == "About-a-fox.md"
    turns = [{"role": "user", "content": "About a fox"}, {"role": "assistant", "content": "Once there was a fox."}]
    assert json.loads(texts[0])["messages"] == turns
    assert texts[1] == "# About a fox\n\n**You**\n\nAbout a fox\n\n**Model**\n\nOnce there was a fox.\n"


def test_settings_are_kept_within_bounds_and_sent(page: Any, server: PageServer) -> None:
    page.get_by_label("Settings", exact=True).first.click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0")
    for name, value in (("Length", "99999"), ("Seed", "7")):
        page.get_by_label(name).fill(value)
        page.keyboard.press("Tab")
    page.get_by_label("Appearance").select_option("dark")
    page.keyboard.press("Escape")
    page.reload()
    assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "dark"
    page.get_by_label("Settings", exact=True).first.click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.keyboard.press("Escape")
    say(page, "Hello")
    expect(finished(page)).to_be_visible()
    (request,) = server.requests
    assert request["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (request["temperature"], request["max_tokens"], request["seed"]) == (0, 192, 7)


def test_markup_in_an_answer_stays_text(page: Any, server: PageServer) -> None:
    markup = "<script>document.title='run'</script><img src=x onerror=\"document.title='run'\"><b>bold</b>"
    server.pieces = [markup[:20], markup[20:]]
    say(page, markup)
    expect(finished(page)).to_be_visible()
    expect(answer(page)).to_have_text(markup)
    page.reload()
    expect(answer(page)).to_have_text(markup)
    assert page.locator("#messages :is(img, b, script)").count() == 0
    assert page.evaluate("document.title") != "run"


def test_a_deleted_conversation_stays_deleted_though_it_was_being_written(page: Any, server: PageServer) -> None:
    server.hold_after = 2
    say(page, "About a fox")
    expect(answer(page)).to_have_text("Once there ")
    page.get_by_label("Export and delete").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    assert server.left.wait(5)
    page.reload()
    expect(page.get_by_label("Title")).to_have_value("")
    expect(page.locator("#list button")).to_have_count(0)


def test_no_server_is_said_clearly_and_no_text_is_lost(page: Any, server: PageServer) -> None:
    say(page, "First")
    expect(finished(page)).to_be_visible()
    page.route("**/v1/**", lambda route: route.abort())
    say(page, "Are you there?")
    expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached.")
    expect(page.locator("article.person .text").last).to_have_text("Are you there?")
    page.unroute("**/v1/**")
    page.get_by_role("button", name="Try again").click()
    expect(answer(page)).to_have_text("Once there was a fox.")
    expect(page.locator("article")).to_have_count(4)


def test_an_answer_outlives_a_failed_second_try(page: Any, server: PageServer) -> None:
    say(page, "First")
    expect(finished(page)).to_be_visible()
    page.route("**/v1/**", lambda route: route.abort())
    page.get_by_role("button", name="Again").click()
    expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached.")
    expect(answer(page)).to_have_text("Once there was a fox.")


def test_a_stream_cut_in_the_middle_says_so_and_keeps_what_came(page: Any, server: PageServer) -> None:
    server.cut = True
    say(page, "A story, please.")
    expect(page.get_by_text("The connection broke before the end")).to_be_visible()
    expect(answer(page)).to_have_text("Once there was a fox.")


def test_a_key_is_asked_for_and_kept_for_this_tab_alone(page: Any, server: PageServer) -> None:
    server.info["key_required"], server.key = True, "secret"
    page.reload()
    say(page, "Hello")
    for key in ("wrong", "secret"):
        page.get_by_label("API key").fill(key)
        page.keyboard.press("Enter")
        if key == "wrong":
            expect(page.get_by_role("alert")).to_contain_text("does not accept this key")
            page.get_by_role("button", name="Try again").click()
    expect(answer(page)).to_have_text("Once there was a fox.")
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)")


def test_the_oldest_turns_go_when_the_context_is_full(page: Any, server: PageServer) -> None:
    server.room = 60
    for text in ("A" * 30, "B" * 30):
        say(page, text)
        expect(finished(page)).to_be_visible()
        expect(page.locator(".live")).to_have_count(0)
    expect(page.get_by_text("The 2 oldest messages no longer fit and were left out.")).to_be_visible()
    assert server.requests[-1]["messages"] == [{"role": "user", "content": "B" * 30}]
    say(page, "C" * 100)
    expect(page.get_by_role("alert")).to_contain_text("context_length_exceeded")


def test_a_story_is_written_in_turn_undone_and_edited(story: Any, server: PageServer) -> None:
    page, document = story, story.get_by_label("Story")
    server.pieces, server.hold_after = [" there ", "was a fox."], 1
    document.fill("Once upon a time ")
    page.get_by_role("button", name="Continue").click()
    expect(page.locator("#backdrop .model")).to_have_text(" there ", use_inner_text=False)
    server.go.set()
    expect(document).to_have_value("Once upon a time there was a fox.")
    expect(page.get_by_text("tokens/s")).to_be_visible()
    assert server.requests[0]["prompt"] == "Once upon a time"
    page.get_by_role("button", name="Undo").click()
    expect(document).to_have_value("Once upon a time ")
    server.pieces = ["was an owl."]
    page.get_by_role("button", name="Continue").click()
    expect(document).to_have_value("Once upon a time was an owl.")
    server.pieces = ["was a bear."]
    page.get_by_role("button", name="Again").click()
    expect(document).to_have_value("Once upon a time was a bear.")
    document.press("Control+End")
    page.keyboard.type(" It sang.")
    document.press("Control+Enter")
    expect(document).to_have_value("Once upon a time was a bear. It sang.was a bear.")
    document.fill("Once upon a time was a brown bear. It sang.was a bear.")
    expect(page.locator("#backdrop .model")).to_have_text(["was a b", "ear.", "was a bear."])
    page.reload()
    expect(document).to_have_value("Once upon a time was a brown bear. It sang.was a bear.")


def test_only_the_end_of_a_long_story_is_sent(story: Any, server: PageServer) -> None:
    server.room = 300
    story.get_by_label("Story").fill("The fox ran on and on. " * 100)
    story.get_by_role("button", name="Continue").click()
    expect(story.get_by_text("The model read the last")).to_be_visible()
    prompt = server.requests[-1]["prompt"]
    assert 150 < len(prompt) <= 300
    assert ("The fox ran on and on. " * 100).rstrip().endswith(prompt)


def test_a_phone_scrolls_in_one_direction_only(page: Any, server: PageServer) -> None:
    page.set_viewport_size({"width": 360, "height": 640})
    say(page, "Incomprehensibilities" * 9)
    expect(finished(page)).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.locator("header").get_by_label("Conversations").click()
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("article")).to_have_count(0)
    page.get_by_label("Settings", exact=True).first.click()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_storage_that_is_full_is_said(page: Any, server: PageServer) -> None:
    page.evaluate("localStorage.setItem('other', 'x'.repeat(5_242_870 - JSON.stringify(localStorage).length))")
    say(page, "Hello")
    expect(page.get_by_role("alert")).to_contain_text("storage is full")
    expect(answer(page)).to_have_text("Once there was a fox.")


def think(page: Any) -> None:
    page.get_by_role("button", name="Show what the model thinks").click()


def written(page: Any) -> None:
    expect(page.locator("body.writing")).to_have_count(0)


def test_each_token_shows_its_probability_where_that_is_wanted(page: Any, server: PageServer) -> None:
    say(page, "Hello")
    expect(finished(page)).to_be_visible()
    think(page)
    expect(page.get_by_text("It is seen from the next words on.")).to_be_visible()
    page.reload()  # it is remembered
    page.get_by_role("button", name="Again").click()
    written(page)
    expect(page.get_by_role("group", name="Branches")).to_have_count(0)  # the same words are no other branch
    assert "logprobs" not in server.requests[0]
    assert (server.requests[1]["logprobs"], server.requests[1]["top_logprobs"]) == (True, 5)
    expect(answer(page)).to_have_text("Once there was a fox.")
    classes = [page.locator(".token > span").nth(i).get_attribute("class").split()[0] for i in range(5)]
    assert classes == ["step-0", "step-1", "step-2", "step-3", "step-4"]
    titles = [page.locator(".token").nth(i).get_attribute("title") for i in range(5)]
    assert titles == ["95%", "70%", "40%", "20%", "5%"]
    think(page)
    expect(page.locator(".token")).to_have_count(0)
    expect(answer(page)).to_have_text("Once there was a fox.")


def test_a_chat_goes_on_from_a_token_that_was_chosen_and_keeps_the_branch(page: Any, server: PageServer) -> None:
    think(page)
    say(page, "About a fox")
    written(page)
    page.locator(".token").nth(3).click()
    shown = page.locator("#thought .choice")
    expect(shown).to_have_text(["a·20%", "owl·4%", "part of a character: c33%", "the end2%", "⏎1%"])
    expect(shown.nth(2)).to_be_disabled()
    expect(page.locator("#thought .rest")).to_have_text("all others70%")
    server.pieces = ["flew."]
    shown.nth(1).click()
    expect(answer(page)).to_have_text("Once there was owl flew.")
    begun = {"role": "assistant", "content": "Once there was owl"}
    assert server.requests[-1]["messages"] == [{"role": "user", "content": "About a fox"}, begun]
    assert server.requests[-1]["continue_final_message"] and not server.requests[-1]["add_generation_prompt"]
    expect(page.locator(".picked")).to_have_text("owl ")
    written(page)
    server.pieces = ["sang."]
    page.get_by_role("button", name="Again").click()  # what was chosen stays
    expect(answer(page)).to_have_text("Once there was owl sang.")
    expect(page.get_by_role("group", name="Branches")).to_contain_text("3/3")
    page.reload()
    page.get_by_role("button", name="Earlier branch").click()
    page.keyboard.press("Enter")
    expect(answer(page)).to_have_text("Once there was a fox.")
    expect(page.get_by_role("button", name="Earlier branch")).to_be_disabled()
    say(page, "More")
    written(page)
    page.get_by_label("Export and delete").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Export as JSON").click()
    exported = json.loads(Path(download.value.path()).read_text("utf-8"))
    texts = [each["content"] for each in exported["messages"]]
    assert texts == ["About a fox", "Once there was a fox.", "More", "sang."]
    branches = [each[-1]["content"] for each in exported["branches"]]
    assert branches == ["Once there was owl flew.", "Once there was owl sang."]
    page.get_by_role("button", name="Later branch").click()
    expect(page.locator("article")).to_have_count(2)
    page.locator(".token").nth(1).click()
    page.get_by_role("button", name="the end").click()
    expect(answer(page)).to_have_text("Once")
    expect(page.get_by_role("group", name="Branches")).to_contain_text("4/4")


def test_tokens_are_reached_and_chosen_by_keys_alone(page: Any, server: PageServer) -> None:
    think(page)
    say(page, "Hello")
    written(page)
    for _ in range(3):
        page.keyboard.press("Shift+Tab")
    focused = page.locator(":focus")
    expect(focused).to_have_attribute("aria-label", "Once, 95%")
    page.keyboard.press("ArrowRight")
    expect(focused).to_have_attribute("aria-label", "there, 70%")
    page.keyboard.press("Enter")
    expect(focused).to_have_text("there·70%")
    page.keyboard.press("ArrowRight")  # to the next token
    expect(focused).to_have_text("was·40%")
    page.keyboard.press("Escape")
    expect(page.locator("#thought")).to_be_hidden()
    expect(focused).to_have_attribute("aria-label", "was, 40%")
    page.keyboard.press("Enter")
    page.keyboard.press("ArrowDown")
    server.pieces = ["flew."]
    page.keyboard.press("Enter")
    expect(answer(page)).to_have_text("Once there owl flew.")
    expect(focused).to_have_attribute("aria-label", "owl, 4%")
    assert page.locator('[role="button"][tabindex="0"]').count() == 1


def test_a_story_branches_at_a_token_and_keeps_what_is_not_edited(story: Any, server: PageServer) -> None:
    page, document = story, story.get_by_label("Story")
    branches = page.get_by_role("group", name="Branches")
    think(page)
    server.pieces = ["a fox ", "", "é ", "slept ", "long."]
    document.fill("It was ")
    page.get_by_role("button", name="Continue").click()
    expect(document).to_have_value("It was a fox é slept long.")
    assert server.requests[0]["logprobs"] == 5
    written(page)
    expect(page.locator(".token")).to_have_text(["a fox ", "é ", "slept ", "long."])
    expect(page.locator(".token").nth(1)).to_have_attribute("title", "28%")  # of two tokens, for half of it each
    page.locator(".token").nth(2).click()
    server.pieces = ["flew."]
    page.locator(".choice").nth(1).click()
    expect(document).to_have_value("It was a fox é owl flew.")
    assert server.requests[-1]["prompt"] == "It was a fox é owl"
    written(page)
    page.get_by_role("button", name="Earlier branch").click()
    expect(document).to_have_value("It was a fox é slept long.")
    document.fill("It was a bad fox é slept long.")
    expect(page.locator(".token")).to_have_text(["é ", "slept ", "long."])
    page.reload()
    expect(branches).to_contain_text("1/2")
    page.get_by_role("button", name="Undo").click()
    expect(document).to_have_value("It was a bad fox é ")
    page.get_by_role("button", name="Continue").click()
    expect(document).to_have_value("It was a bad fox é flew.")
    expect(branches).to_contain_text("1/2")
    page.get_by_role("button", name="Later branch").click()
    expect(document).to_have_value("It was a bad fox é owl flew.")
    page.locator(".token").last.click()
    page.get_by_role("button", name="Edit here").click()
    page.keyboard.type("hoo ")
    expect(document).to_have_value("It was a bad fox é owl hoo flew.")
    document.fill("It was a bad fox")  # the branches stay where the text was deleted
    expect(branches).to_contain_text("2/2")
    page.get_by_role("button", name="Earlier branch").click()
    expect(document).to_have_value("It was a bad foxflew.")
    expect(branches).to_have_count(0)  # of the other one no word was left


def test_a_failed_choice_changes_nothing(page: Any, server: PageServer) -> None:
    think(page)
    say(page, "Hello")
    written(page)
    page.route("**/v1/**", lambda route: route.abort())
    page.locator(".token").nth(1).click()
    page.locator(".choice").nth(1).click()
    expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached.")
    expect(answer(page)).to_have_text("Once there was a fox.")
    expect(page.get_by_role("group", name="Branches")).to_have_count(0)


def test_thoughts_go_first_when_the_storage_is_full(page: Any, server: PageServer) -> None:
    think(page)
    say(page, "Hello")
    written(page)
    page.evaluate("localStorage.setItem('other', 'x'.repeat(5_242_500 - JSON.stringify(localStorage).length))")
    page.keyboard.press("Control+Shift+O")
    say(page, "Hello again")
    written(page)
    expect(page.get_by_role("alert")).to_be_hidden()
    assert page.evaluate("Object.values(localStorage).filter((one) => one.includes('Hello')).length") == 2


CONTRASTS = """() => {
    const canvas = Object.assign(document.createElement('canvas'), { width: 1, height: 1 }).getContext('2d');
    const light = (...colours) => {
        for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
        const linear = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((value) => (value / 255) ** 2.2);
        return 0.05 + linear.reduce((sum, value, i) => sum + value * [0.2126, 0.7152, 0.0722][i], 0);
    };
    const of = (selector) => getComputedStyle(document.querySelector(selector));
    const words = light(of('#backdrop .model').color);
    const tint = (i) => of(`.legend .step-${i}`).backgroundColor;
    const papers = [1, 2, 3, 4, 5].map((i) => light(of('body').backgroundColor, tint(i)));
    return papers.map((paper) => Math.max(words, paper) / Math.min(words, paper));
}"""


@pytest.mark.parametrize("look", ["light", "dark"])
def test_tokens_are_legible_and_their_alternatives_fit_a_phone(story: Any, server: PageServer, look: str) -> None:
    story.emulate_media(color_scheme=look)
    story.set_viewport_size({"width": 360, "height": 640})
    think(story)
    server.pieces = ["Once upon a time in a ", "land far, far away ", "lived a ", "small, ", "brave fox. "] * 4
    story.get_by_role("button", name="Continue").click()
    written(story)
    contrasts = story.evaluate(CONTRASTS)
    assert min(contrasts) > 4.5 and contrasts == sorted(contrasts, reverse=True)
    for number in (1, 18):
        story.locator(".token").nth(number).click()
        box = story.locator("#thought").bounding_box()
        assert 0 <= box["x"] <= 360 - box["width"] and 0 <= box["y"] <= 640 - box["height"]
        story.locator(".choice").nth(1).click()
        written(story)
    for switch in story.get_by_role("group", name="Branches").all():
        box = switch.bounding_box()
        assert 0 <= box["x"] <= 360 - box["width"]
    assert story.evaluate("document.querySelector('#thread').scrollWidth <= innerWidth")


@pytest.mark.parametrize("chat", [True, False])
def test_the_real_server_and_page_agree(
    browser: Any, small_config: ModelConfig, tokenizer: Tokenizer, chat: bool
) -> None:
    from cli.server.app import Served, create_app
    from cli.server.worker import Worker

    served = Served("small", chat, tokenizer, small_config.context, created=0)
    worker = Worker(Batcher(GPT(small_config), slots=2, queue=2), queue=2, seconds=60)
    app = create_app(served, worker, key="secret", cors=(), hosts={"127.0.0.1"})
    with serving(app) as url, opened(browser, url) as page:
        page.evaluate("localStorage.setItem('gpt.settings', '{\"seed\": 1, \"thoughts\": true}')")
        page.reload()
        if chat:
            say(page, "Fox?")
        else:
            page.get_by_label("Story").fill("Once upon a time " * 20)
            page.get_by_role("button", name="Continue").click()
        page.get_by_label("API key").fill("secret")
        page.keyboard.press("Enter")
        expect(page.get_by_text(re.compile(r"[1-9]\d* tokens · .*context \d+ of 48"))).to_be_visible()
        assert page.locator("article.model .text" if chat else "#backdrop .model").text_content()
        page.locator(".token").nth(2).click()
        page.locator(".choice:enabled:not([aria-current])").first.click()
        expect(page.get_by_role("group", name="Branches")).to_contain_text("2/2")
        written(page)
        expect(page.locator(".picked")).to_have_count(1)
