"""Measuring runs on held-out text: their loss, and what they write beside what came next. Alone, or one against one."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from engine.chat_template import answer_prompt, text_ends
from engine.checkpoint import write_atomically
from engine.errors import InputError
from engine.generate import Completion, document_prompt, generate
from engine.model import GPT
from engine.run import Run
from engine.runtime import Runtime
from engine.sampling import Sampling
from engine.tokenizer import Tokenizer
from train.data.loader import TokenSource
from train.data.stories import AskedFacts, score_story
from train.evaluate import evaluate_loss
from train.heldout import Case, Document, HeldOut, encode, make_case
from train.measures import (
    RESAMPLES,
    ROUGE_TOKENIZERS,
    Estimate,
    bleu,
    bleu_metric,
    distinct,
    mean,
    overlooked,
    repetition,
    rouge,
    sign_test,
    words,
)
from train.report import write_evaluations

TOKENS_PER_BATCH = 8192

# What texts are worth as completions of their cases, to a program or to a reward model. Higher is better.
Judge = Callable[[Sequence[Case], Sequence[str]], list[float]]


def story_score(cases: Sequence[Case], texts: Sequence[str]) -> list[float]:
    """How good a story each makes, the facts it was asked for included: the program's own judgement."""
    return [
        score_story(case.facts or AskedFacts(), case.prompt + text if isinstance(case.prompt, str) else text).total
        for case, text in zip(cases, texts, strict=True)
    ]


@dataclass(frozen=True)
class Contestant:
    """A run, loaded."""

    name: str
    step: int
    model: GPT
    tokenizer: Tokenizer
    chat: bool

    @classmethod
    def load(cls, run: Run, runtime: Runtime, which: str, notice: Callable[[str], None]) -> "Contestant":
        step = run.find_checkpoint(which, notice).step
        return cls(str(run.path), step, *run.load_model(runtime, str(step)), run.read_recipe().chat)

    def prompt(self, before: Document) -> list[int]:
        """The ids to go on from. A run that has learnt no conversations reads one as plain text."""
        if isinstance(before, str):
            return document_prompt(self.tokenizer, before)
        if self.chat:
            return answer_prompt(self.tokenizer, before)
        return document_prompt(self.tokenizer, "".join(f"{message.content}\n\n" for message in before))

    def has_room(self, case: Case) -> bool:
        needed = len(self.prompt(case.prompt)) + len(self.tokenizer.encode(case.reference))
        return needed < self.model.config.context

    def loss(self, pieces: TokenSource) -> dict[str, Estimate]:
        everything, lengths = int(pieces.lengths.sum()), self.tokenizer.byte_lengths
        found = evaluate_loss(self.model, pieces, lengths, tokens=everything, tokens_per_batch=TOKENS_PER_BATCH)
        return {name: Estimate(found[name]) for name in ("loss", "perplexity", "bits_per_byte")}

    def complete(self, cases: Sequence[Case], sampling: Sampling, max_tokens: int | None) -> list[Completion]:
        prompts, ends = [self.prompt(case.prompt) for case in cases], text_ends(self.tokenizer, chat=self.chat)
        return generate(self.model, self.tokenizer, prompts, sampling, max_tokens=max_tokens, stop_ids=ends)


def evaluate(
    contestants: Sequence[Contestant],
    held_out: HeldOut,
    *,
    tokens: int,
    count: int,
    sampling: Sampling,
    max_tokens: int | None = None,
    bleu_tokenizer: str = "13a",
    rouge_tokenizer: str = "default",
    judges: Mapping[str, Judge] | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Measure a run, or two against each other: what `write` writes as JSON and train.report shows.

    The loss over the first documents that hold `tokens` tokens of the first run; texts for the first `count` of them
    that fit into every context, measured by BLEU, ROUGE and the judges, of whom the program itself judges its stories.
    The same seed gives the same result. Raises InputError where nothing fits, or there is no such tokenizer.
    """
    first, context = contestants[0], min(each.model.config.context for each in contestants)
    documents, pieces = encode(held_out.documents, first.tokenizer, first.model.config.context, tokens)
    asked = zip(documents, held_out.facts, strict=False)
    made = (make_case(document, facts, first.tokenizer, context) for document, facts in asked)
    cases = list(islice((case for case in made if case and all(each.has_room(case) for each in contestants)), count))
    if count and not cases:
        raise InputError(
            f"no document of {held_out.name} can be completed within {context} tokens; --count 0 does without"
        )
    judges = {**({"story_score": story_score} if cases and cases[0].facts else {}), **(judges or {})}
    references = [case.reference for case in cases]
    # Before the texts are written, which takes long: a tokenizer may be missing, a judge refuse what it is asked about.
    if cases:
        bleu_metric(bleu_tokenizer)
    if rouge_tokenizer not in ROUGE_TOKENIZERS:
        raise InputError(f"ROUGE has no tokenizer {rouge_tokenizer!r}, only {' and '.join(ROUGE_TOKENIZERS)}")
    judged = {name: judge(cases, references) for name, judge in judges.items()} if cases else {}
    chats, signature = isinstance(documents[0], list), ""
    runs, texts, scores = [], [], []
    for each in contestants:
        say(f"{each.name}, step {each.step:,}: {len(documents):,} documents to read, {len(cases):,} to complete")
        own = pieces if each is first else encode(documents, each.tokenizer, each.model.config.context)[1]
        measures = each.loss(own)
        if cases:
            completions = each.complete(cases, sampling, max_tokens)
            written = [completion.text for completion in completions]
            by_judges = {name: judge(cases, written) for name, judge in judges.items()}
            scores.append(rouge(written, references, tokenizer=rouge_tokenizer) | by_judges)
            measures["bleu"], signature = bleu(written, references, tokenizer=bleu_tokenizer)
            measures |= summary(written, scores[-1])
            measures["ended"] = mean([completion.finish == "stop" for completion in completions])
            texts.append(written)
        runs.append({"run": each.name, "step": each.step, "measures": measures})
    result: dict[str, Any] = {"data": held_out.name, "notes": [], "runs": runs}
    if cases:
        what = "the first answer of each conversation" if chats else "the second half of each document"
        result["notes"] += [
            f"{len(cases):,} completions, {what}; temperature {sampling.temperature:g}, top-p {sampling.top_p:g}, "
            f"seed {sampling.seed}.",
            f"BLEU is sacrebleu's {signature}; ROUGE is F1 of "
            f"{'stemmed words' if rouge_tokenizer == 'default' else 'words of any script, not stemmed'}, by "
            f"rouge-score. In brackets: 95% of {RESAMPLES:,} bootstrap resamples of the documents.",
            *overlooked(references, bleu_tokenizer, rouge_tokenizer),
        ]
        result["tokenizers"] = {"bleu": bleu_tokenizer, "rouge": rouge_tokenizer}
        result["reference"] = summary(references, judged)
        result["cases"] = [{**vars(case), "texts": own} for case, *own in zip(cases, *texts, strict=True)]
    if cases and len(contestants) == 2:
        result["comparison"] = {name: compare(scores[0][name], scores[1][name]) for name in ("rougeL", *judges)}
    untaught = [each.name for each in contestants if chats and not each.chat]
    result["notes"] += [f"{name} has learnt no conversations: it goes on as from any text." for name in untaught]
    return result


def summary(texts: Sequence[str], scores: Mapping[str, Sequence[float]]) -> dict[str, Estimate]:
    """The mean scores, and how varied and how long the texts are."""
    return {
        **{name: mean(values) for name, values in scores.items()},
        **{f"distinct{n}": Estimate(distinct(texts, n)) for n in (1, 2, 3)},
        "repeated_4grams": mean([repetition(text) for text in texts]),
        "words": mean([len(words(text)) for text in texts]),
    }


def compare(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """How often we are better, a tie counting half, and how likely chance alone would be as uneven."""
    signs = [(a > b) - (a < b) for a, b in zip(ours, theirs, strict=True)]
    wins, losses = signs.count(1), signs.count(-1)
    rate = mean([(sign + 1) / 2 for sign in signs])
    return {"wins": wins, "ties": signs.count(0), "losses": losses, "win_rate": rate, "p": sign_test(wins, losses)}


def write(run: Run, result: Mapping[str, Any]) -> Path:
    """Write evaluation-DATA-SPLIT[-against-RUN].json into the run's folder, and what it says into the report."""
    name = "-against-".join([result["data"], *(Path(each["run"]).name for each in result["runs"][1:])])
    path = run.path / f"evaluation-{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}.json"
    write_atomically(path, json.dumps(result, indent=1, default=vars).encode())
    write_evaluations(run)
    return path
