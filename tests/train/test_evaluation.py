"""Held-out text, the cases in it, and runs measured on them."""

import json
from dataclasses import replace
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import pytest

from engine.chat_template import Message
from engine.config import DataConfig, Recipe
from engine.errors import InputError
from engine.model import GPT
from engine.run import Run
from engine.runtime import Runtime
from engine.sampling import Sampling
from engine.tokenizer import Tokenizer
from tests.train.conftest import Train
from train.data.shards import TokenShards
from train.data.stories import AskedFacts, story_requests
from train.evaluation import (
    Case,
    Contestant,
    HeldOut,
    encode,
    evaluate,
    make_case,
    open_held_out,
    story_score,
    write,
)

CHAT = [Message("system", "Be kind."), Message("user", "Hello"), Message("assistant", "Hi"), Message("user", "Bye")]
SAMPLING = Sampling(temperature=0.8, seed=0)


@pytest.fixture(autouse=True)
def metric_packages() -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")


@pytest.fixture
def contestant(gpt: GPT, tokenizer: Tokenizer) -> Contestant:
    return Contestant("a", 1, gpt, tokenizer, chat=True)


def measure(*contestants: Contestant, documents: Any, facts: Any = None, **options: Any) -> dict[str, Any]:
    held_out = HeldOut("d", iter(documents), repeat(facts))
    options = {"tokens": 10**6, "count": 5, "sampling": SAMPLING, "max_tokens": 6, **options}
    return evaluate(contestants, held_out, **options)


def test_a_text_is_halved_before_the_first_word_past_its_middle(tokenizer: Tokenizer) -> None:
    case = make_case("One two.\n\nThree four", None, tokenizer, 100)
    assert case == Case("One two.\n\nThree", " four")
    # What cannot be halved is no case.
    assert make_case("Donaudampfschiff", None, tokenizer, 100) is None


def test_a_text_without_spaces_is_halved_between_two_characters(tokenizer: Tokenizer) -> None:
    assert make_case("狐狸在树林里跑回家。", None, tokenizer, 100) == Case("狐狸在树林", "里跑回家。")
    # Three bytes each: the context ends inside the sixth.
    cut = make_case("狐狸在树林里跑回家。", None, tokenizer, 4 + 3 * 5 + 2)
    assert cut == Case("狐狸", "在树林")


def test_what_the_metrics_do_not_read_is_noted(contestant: Contestant) -> None:
    result = measure(contestant, documents=["狐狸在树林里跑"])
    assert result["tokenizers"] == {"bleu": "13a", "rouge": "default"}
    assert sum("--rouge-tokenizer" in note for note in result["notes"]) == 1
    assert sum("--bleu-tokenizer" in note for note in result["notes"]) == 1
    other = measure(contestant, documents=["狐狸在树林里跑"], bleu_tokenizer="zh", rouge_tokenizer="words")
    assert other["tokenizers"] == {"bleu": "zh", "rouge": "words"} and other["cases"] == result["cases"]
    assert "tok:zh" in other["notes"][1] and "any script" in other["notes"][1] and len(other["notes"]) == 2


@pytest.mark.parametrize("measured", ["bleu", "rouge"])
def test_no_such_tokenizer_is_said_before_texts_are_written(contestant: Contestant, measured: str) -> None:
    def scorer(cases: object, texts: object) -> list[float]:
        raise AssertionError("too late")

    with pytest.raises(InputError, match="has no tokenizer 'chinese'"):
        measure(contestant, documents=["a b c d"], scorers={"late": scorer}, **{f"{measured}_tokenizer": "chinese"})


def test_a_long_text_is_cut_to_the_context(contestant: Contestant, documents: tuple[str, ...]) -> None:
    long = " ".join(documents)
    case = make_case(long, None, contestant.tokenizer, 48)
    assert case and isinstance(case.prompt, str) and long.startswith(case.prompt + case.reference)
    assert len(case.prompt + case.reference) > 60 and contestant.has_room(case)


def test_of_a_conversation_the_first_answer_is_asked(contestant: Contestant, tokenizer: Tokenizer) -> None:
    case = make_case(CHAT, None, tokenizer, 100)
    assert case == Case(CHAT[:2], "Hi")
    assert make_case(CHAT[:2], None, tokenizer, 100) is None
    assert contestant.prompt(CHAT[:2])[-1] == tokenizer.special["<|assistant|>"]
    base = Contestant("b", 1, contestant.model, tokenizer, chat=False)
    assert tokenizer.decode(base.prompt(CHAT[:2])) == "Be kind.\n\nHello\n\n"


def test_conversations_that_all_exceed_the_context_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="no conversation of the data fits into the context of 8 tokens"):
        encode([CHAT], tokenizer, 8)


def test_prepared_text_is_encoded_as_it_was(prepared: Path) -> None:
    held_out = open_held_out(DataConfig(source=str(prepared)), "validation", None)
    tokenizer, shards = Tokenizer.load(prepared / "tokenizer.model"), TokenShards(prepared, "validation")
    documents, encoded = encode(held_out.documents, tokenizer, 32, shards.tokens // 2)
    assert held_out.name == "stories, validation" and next(held_out.facts) == AskedFacts()
    assert encoded.lengths.tolist() == shards.lengths[: len(documents)].tolist()
    assert sum(encoded.lengths[:-1]) < shards.tokens // 2 <= sum(encoded.lengths)
    for number in range(len(documents)):
        assert encoded.read(number, 1, 5)[1].tolist() == shards.read(number, 1, 5)[1].tolist()


@pytest.mark.parametrize("source", ["stories-instruct", "stories-instruct:brief"])
def test_each_request_for_a_story_comes_with_its_facts(source: str) -> None:
    held_out = open_held_out(DataConfig(source=source), "test", None)
    for document, facts in islice(zip(held_out.documents, held_out.facts, strict=True), 3):
        assert isinstance(document, list) and facts is not None and str(facts.kind) in document[0].content
        case = Case([document[0]], document[1].content, facts)
        assert story_score([case, case], [case.reference, "No."])[0] > 0.7 > story_score([case], ["No."])[0]


def test_a_run_is_measured_on_its_own_data_as_its_training_did(train: Train, small: Recipe, cpu: Runtime) -> None:
    outcome, recorder = train(small)
    run = Run(outcome.checkpoint.path.parents[1])
    contestant = Contestant.load(run, cpu, "latest", recorder.say)
    held_out = open_held_out(run.read_recipe().data, "validation", run.data)
    result = evaluate([contestant], held_out, tokens=300, count=3, sampling=SAMPLING)
    measures = result["runs"][0]["measures"]
    trained = [line for line in recorder.logged if "validation_loss" in line][-1]
    assert measures["loss"].value == pytest.approx(trained["validation_loss"], rel=1e-5)
    assert measures["bits_per_byte"].value == pytest.approx(trained["validation_bits_per_byte"], rel=1e-5)
    for name in ("bleu", "rouge1", "rouge2", "rougeL", "story_score", "words"):
        assert measures[name].low <= measures[name].value <= measures[name].high
    path = write(run, result)
    assert json.loads(path.read_text()) == json.loads(json.dumps(result, default=vars))
    before, _, section = run.report.read_text().partition("## Evaluation")
    assert "bits/byte" in before and "| bleu |" in section and path.name in section
    write(run, {**result, "data": "stories, test"})
    assert run.report.read_text().count("## Evaluation") == 1 and "### stories, test" in run.report.read_text()


def test_the_same_seed_gives_the_same_result(contestant: Contestant, documents: tuple[str, ...]) -> None:
    first, again = (measure(contestant, documents=documents) for _ in range(2))
    assert first == again
    assert "story_score" not in first["runs"][0]["measures"]
    assert len(first["cases"]) == 5 and first["cases"][0]["prompt"] + first["cases"][0]["reference"] in documents[0]


def test_a_run_neither_wins_nor_loses_against_itself(contestant: Contestant, documents: tuple[str, ...]) -> None:
    result = measure(contestant, contestant, documents=documents, facts=AskedFacts())
    assert result["comparison"].keys() == {"rougeL", "story_score"}
    for each in result["comparison"].values():
        assert (each["ties"], each["win_rate"].value, each["p"]) == (5, 0.5, 1.0)


def test_any_scorer_may_decide(contestant: Contestant) -> None:
    other = Contestant("b", 1, contestant.model, contestant.tokenizer, chat=False)
    scorers = {"lottery": lambda cases, texts: [float(len(case.prompt)) for case in cases]}
    result = measure(contestant, other, documents=[CHAT[:3]] * 2, scorers=scorers)
    assert result["comparison"]["lottery"]["ties"] == 2
    assert "b has learnt no conversations" in result["notes"][-1]
    assert result["reference"]["lottery"].value == 2.0


def test_stories_are_scored_for_chat_and_base_models(gpt: GPT, tokenizer: Tokenizer) -> None:
    model = GPT(replace(gpt.config, context=150))
    requests = islice(story_requests("test"), 2)
    cases = [Case([Message("user", request.text)], request.story, request.facts) for request in requests]
    for chat in (False, True):
        completions = Contestant("a", 1, model, tokenizer, chat).complete(cases, Sampling(0.7, seed=0), None)
        scores = story_score(cases, [completion.text for completion in completions])
        assert len(scores) == 2 and all(0 <= score <= 1 for score in scores)


def test_the_loss_alone_needs_no_text_to_complete(contestant: Contestant) -> None:
    result = measure(contestant, documents=["Donaudampfschiff"], count=0)
    assert result["runs"][0]["measures"].keys() == {"loss", "perplexity", "bits_per_byte"}
    with pytest.raises(InputError, match="--count 0"):
        measure(contestant, documents=["Donaudampfschiff"])
