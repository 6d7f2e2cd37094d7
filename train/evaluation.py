"""The evaluation of models on text that they have not seen: their loss, and what they write beside what came next.

First comes the loss, which training evaluates as well; then held-out documents, and what there is to complete in them;
then the whole of `gpt evaluate`, of one run alone or of two against each other.
"""

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import numpy as np

from engine import records
from engine.chat_template import Message, answer_prompt, text_ends
from engine.config import DataConfig
from engine.disk import write_atomically
from engine.errors import InputError
from engine.folders import one_writer
from engine.generate import Completion, document_prompt, generate
from engine.model import GPT
from engine.progress import listener
from engine.run import RUN_FILES, Run
from engine.runtime import Runtime, inference
from engine.sampling import Sampling
from engine.tokenizer import Tokenizer
from train import text_metrics
from train.data.encoded import Conversations, Documents, Encoded
from train.data.loader import IGNORE_INDEX, Batch, TokenSource, pack
from train.data.shards import TokenShards, is_prepared
from train.data.sources import StoryRequests, open_conversations, open_source
from train.data.stories import AskedFacts, score_story
from train.loop import packed_loss
from train.text_metrics import Estimate, mean

TOKENS_PER_BATCH = 8192
EVALUATIONS = "\n## Evaluation\n\n"  # the heading of the report's last part
# Where the second half of a text may begin: at the white space before a word, or inside a script that has none.
WORD_BEGINS = re.compile(rf"(?<=\S)\s+(?=\S)|(?<=[{text_metrics.UNSPACED}])(?=[{text_metrics.UNSPACED}])")


def evaluate_loss(
    model: GPT, documents: TokenSource, byte_lengths: np.ndarray, *, tokens: int, tokens_per_batch: int
) -> dict[str, float]:
    """Return the loss over the first documents that hold `tokens` tokens, each read from its start, whole.

    A document longer than the context is read in segments that do not see one another. Bits per byte count the UTF-8
    bytes that the targets spell (byte_lengths [vocab]); unlike the loss, they compare across tokenizers. The result
    does not depend on tokens_per_batch, which bounds what is read at a time (a segment at least).
    """
    device = model.embedding.weight.device
    nats, targets, text_bytes = 0.0, 0, 0
    with inference(model):
        for batch in batches_in_order(documents, model.config.context, tokens, tokens_per_batch):
            learnt = batch.targets[batch.targets != IGNORE_INDEX].numpy()
            text_bytes += int(byte_lengths[learnt].sum())
            targets += len(learnt)
            nats += float(packed_loss(model, batch.to(device)))
    loss_per_token = nats / targets
    return {
        "loss": loss_per_token,
        "perplexity": math.exp(min(loss_per_token, 100.0)),
        "bits_per_byte": nats / math.log(2) / max(text_bytes, 1),
        "tokens": targets,
        "bytes": text_bytes,
    }


def batches_in_order(documents: TokenSource, context: int, tokens: int, tokens_per_batch: int) -> Iterator[Batch]:
    """Yield the first documents that hold `tokens` tokens, in order, cut only where they exceed the context."""
    lengths = documents.lengths
    count = int(np.searchsorted(lengths.cumsum(), tokens)) + 1
    held: list[tuple[np.ndarray, np.ndarray]] = []
    size = done = 0
    with listener.get()("evaluating", int(lengths[:count].sum()), "tokens") as told:
        for document, length in enumerate(lengths[:count].tolist()):
            for start in range(0, length, context):
                segment = documents.read(document, start, min(context, length - start))
                if held and size + len(segment[0]) > tokens_per_batch:
                    yield pack(held, context)
                    told(done := done + size)
                    held, size = [], 0
                held.append(segment)
                size += len(segment[0])
        yield pack(held, context)


Document = str | list[Message]


@dataclass(frozen=True)
class HeldOut:
    """Documents of one kind, and beside them the facts asked of each: None where they are not the program's stories."""

    name: str
    documents: Iterator[Document]
    facts: Iterator[AskedFacts | None]


def open_held_out(data: DataConfig, split: str, prepared: Path | None) -> HeldOut:
    """Open the documents of a split, as text: of prepared data (the source, or else in `prepared`), or of the source.

    Raises InputError where `data` names nothing or has no such split.
    """
    documents: Iterator[Document]
    facts: Iterator[AskedFacts | None] = repeat(None)
    folders = (folder for folder in (Path(data.source), prepared) if folder and is_prepared(folder, split))
    if folder := next(folders, None):
        tokenizer = Tokenizer.load(folder)
        shards = TokenShards(folder, split, tokenizer.fingerprint)
        documents = (tokenizer.decode(shards.document(number).tolist()) for number in range(shards.documents))
        name = shards.index["source"]
    else:
        source = open_conversations(data) or open_source(
            data.source, column=data.column, holdout=data.holdout, limit=data.documents, commit=data.revision
        )
        documents, name = source.documents(split), source.name
        if isinstance(source, StoryRequests):
            facts = (first.facts for first, *_ in source.requests(split))
    if name == "stories":
        # Nobody asked for anything but that it be a story.
        facts = repeat(AskedFacts())
    return HeldOut(f"{Path(name).name}, {split}", documents, facts)


def encode(
    documents: Iterable[Document], tokenizer: Tokenizer, context: int, tokens: int | None = None, name: str = "the data"
) -> tuple[list[Document], Encoded]:
    """Return the first documents that hold `tokens` tokens, or all there are, and the same as token ids."""
    taken, texts, conversations = [], Documents(tokenizer, context), Conversations(tokenizer, context)
    for number, document in enumerate(documents):
        taken.append(document)
        encoded: Encoded = texts if isinstance(document, str) else conversations
        encoded.add(document, f"conversation {number}")
        if tokens is not None and texts.tokens + conversations.tokens >= tokens:
            break
    if not texts.tokens + conversations.tokens:
        raise InputError(f"no conversation of {name} fits into the context of {context} tokens; choose other --data")
    return taken, texts if texts.tokens else conversations


@dataclass(frozen=True)
class Case:
    """A text or conversation to go on from, and what came next.

    `facts` are what the whole, a story, has to meet; None where it need not be a story.
    """

    prompt: Document
    reference: str
    facts: AskedFacts | None = None


def make_case(document: Document, facts: AskedFacts | None, tokenizer: Tokenizer, context: int) -> Case | None:
    """Make a case of the second half of a text, or of the first answer of a conversation; None without either.

    A text is cut to the context, and halved before the first word that begins past its middle.
    """
    if not isinstance(document, str):
        first = next((n for n, message in enumerate(document) if message.role == "assistant" and message.learn), 0)
        return Case(document[:first], document[first].content, facts) if first else None
    # Room for the end, and for halves that take a token more than the whole. Of a character cut in two nothing is left.
    text = tokenizer.decode(tokenizer.encode(document)[: context - 4], errors="ignore")
    cut = WORD_BEGINS.search(text, len(text) // 2)
    return Case(text[: cut.start()], text[cut.start() :], facts) if cut else None


# Scores texts as completions of their cases: a program, or a reward model. Higher is better.
Scorer = Callable[[Sequence[Case], Sequence[str]], list[float]]


def story_score(cases: Sequence[Case], texts: Sequence[str]) -> list[float]:
    """Return the program's own score of each story, the facts that it was asked for included."""
    return [
        score_story(case.facts or AskedFacts(), case.prompt + text if isinstance(case.prompt, str) else text).total
        for case, text in zip(cases, texts, strict=True)
    ]


@dataclass(frozen=True)
class Contestant:
    """A run that is loaded."""

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
        """Return the ids to go on from. A run that has learnt no conversations reads one as plain text."""
        if isinstance(before, str):
            return document_prompt(self.tokenizer, before)
        if self.chat:
            return answer_prompt(self.tokenizer, before)
        return document_prompt(self.tokenizer, "".join(f"{message.content}\n\n" for message in before))

    def has_room(self, case: Case) -> bool:
        needed = len(self.prompt(case.prompt)) + len(self.tokenizer.encode(case.reference))
        return needed < self.model.config.context

    def complete(self, cases: Sequence[Case], sampling: Sampling, max_tokens: int | None) -> list[Completion]:
        prompts, ends = [self.prompt(case.prompt) for case in cases], text_ends(self.tokenizer, chat=self.chat)
        return generate(self.model, self.tokenizer, prompts, sampling, max_tokens=max_tokens, stop_ids=ends)


def choose_cases(
    contestants: Sequence[Contestant], documents: Sequence[Document], held_out: HeldOut, count: int
) -> list[Case]:
    """Return the first `count` cases in these documents that fit into the context of every contestant.

    Raises InputError where there is none, although some were asked for.
    """
    context = min(each.model.config.context for each in contestants)
    asked = zip(documents, held_out.facts, strict=False)
    made = (make_case(document, facts, contestants[0].tokenizer, context) for document, facts in asked)
    fitting = (case for case in made if case and all(each.has_room(case) for each in contestants))
    cases = list(islice(fitting, count))
    if count and not cases:
        raise InputError(
            f"no document of {held_out.name} can be completed within {context} tokens; --count 0 does without"
        )
    return cases


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
    scorers: Mapping[str, Scorer] | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Evaluate a run, or two against each other: what `write` writes as JSON and the report shows.

    The loss over the first documents that hold `tokens` tokens of the first run; texts for the first `count` of them
    that fit into every context, by BLEU, ROUGE and the scorers, to which the program's own is added for its stories.
    The same seed gives the same result. Raises InputError where nothing fits, or there is no such tokenizer.
    """
    first = contestants[0]
    documents, encoded = encode(held_out.documents, first.tokenizer, first.model.config.context, tokens, held_out.name)
    cases = choose_cases(contestants, documents, held_out, count)
    references = [case.reference for case in cases]
    scorers = {**({"story_score": story_score} if cases and cases[0].facts else {}), **(scorers or {})}
    # Before the texts are written, which takes long: a tokenizer may be missing, a scorer may refuse the cases.
    if cases:
        text_metrics.bleu_metric(bleu_tokenizer)
        text_metrics.rouge_scorer(rouge_tokenizer)
    reference_scores = {name: scorer(cases, references) for name, scorer in scorers.items() if cases}
    runs, texts, scores, signature = [], [], [], ""
    for each in contestants:
        say(f"{each.name}, step {each.step:,}: {len(documents):,} documents to read, {len(cases):,} to complete")
        own = encoded if each is first else encode(documents, each.tokenizer, each.model.config.context)[1]
        found = evaluate_loss(
            each.model, own, each.tokenizer.byte_lengths, tokens=own.tokens, tokens_per_batch=TOKENS_PER_BATCH
        )
        metrics = {name: Estimate(found[name]) for name in ("loss", "perplexity", "bits_per_byte")}
        if cases:
            completions = each.complete(cases, sampling, max_tokens)
            written = [completion.text for completion in completions]
            scores.append(text_metrics.rouge(written, references, tokenizer=rouge_tokenizer))
            scores[-1] |= {name: scorer(cases, written) for name, scorer in scorers.items()}
            metrics["bleu"], signature = text_metrics.bleu(written, references, tokenizer=bleu_tokenizer)
            metrics |= text_metrics.summary(written, scores[-1])
            metrics["ended"] = mean([completion.finish == "stop" for completion in completions])
            texts.append(written)
        runs.append({"run": each.name, "step": each.step, "measures": metrics})
    chats = isinstance(documents[0], list)
    notes: list[str] = []
    result: dict[str, Any] = {"data": held_out.name, "notes": notes, "runs": runs}
    if cases:
        what = "the first answer of each conversation" if chats else "the second half of each document"
        stemmed = "stemmed words" if rouge_tokenizer == "default" else "words of any script, not stemmed"
        notes += [
            f"{len(cases):,} completions, {what}; temperature {sampling.temperature:g}, top-p {sampling.top_p:g}, "
            f"seed {sampling.seed}.",
            f"BLEU is sacrebleu's {signature}; ROUGE is F1 of {stemmed}, by rouge-score. In brackets: 95% of "
            f"{text_metrics.RESAMPLES:,} bootstrap resamples of the documents.",
            *text_metrics.overlooked(references, bleu_tokenizer, rouge_tokenizer),
        ]
        result["tokenizers"] = {"bleu": bleu_tokenizer, "rouge": rouge_tokenizer}
        result["reference"] = text_metrics.summary(references, reference_scores)
        result["cases"] = [{**vars(case), "texts": own} for case, *own in zip(cases, *texts, strict=True)]
    if cases and len(contestants) == 2:
        result["comparison"] = {
            name: text_metrics.compare(scores[0][name], scores[1][name]) for name in ("rougeL", *scorers)
        }
    untaught = [each.name for each in contestants if chats and not each.chat]
    notes += [f"{name} has learnt no conversations: it goes on as from any text." for name in untaught]
    return result


def write(run: Run, result: Mapping[str, Any]) -> Path:
    """Write evaluation-DATA-SPLIT[-against-RUN].json into the run's folder, and what it says into the report."""
    name = "-against-".join([result["data"], *(Path(each["run"]).name for each in result["runs"][1:])])
    path = run.path / f"evaluation-{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}.json"
    write_atomically(path, json.dumps(result, indent=1, default=vars))
    # A run that is being trained puts this into its report at its end.
    with contextlib.suppress(InputError), one_writer(run.path, RUN_FILES, keep=lambda error: True):
        write_evaluations(run)
    return path


@dataclass(frozen=True)
class Measured:
    run: str
    step: int
    measures: dict[str, Estimate]


@dataclass(frozen=True)
class Comparison:
    wins: int
    ties: int
    losses: int
    win_rate: Estimate
    p: float


@dataclass(frozen=True)
class Evaluated:
    """What the report shows of a file that `write` wrote."""

    data: str
    notes: list[str]
    runs: list[Measured]
    reference: dict[str, Estimate] = field(default_factory=dict)
    comparison: dict[str, Comparison] = field(default_factory=dict)


def write_evaluations(run: Run) -> None:
    """Put what `gpt evaluate` has measured so far at the end of the report."""
    sections = []
    for path in sorted(run.path.glob("evaluation-*.json")):
        try:
            found = records.read(path, Evaluated, "delete it, and evaluate again")
            if not found.runs:
                raise InputError(f"{path} names no run; delete it, and evaluate again")
        except InputError as damage:
            sections += [f"### {path.stem}", "", str(damage), ""]
            continue
        compared = {name: vars(each) for name, each in found.comparison.items()}
        result = {**vars(found), "runs": [*map(vars, found.runs)], "comparison": compared}
        heading, *rows = evaluation_table(result)
        sections += [f"### {result['data']}", "", *(f"- {note}" for note in evaluation_notes(result)), ""]
        sections += ["".join(f"| {cell} " for cell in row) + "|" for row in (heading, ["---"] * len(heading), *rows)]
        sections += ["", f"The texts are in {path.name}.", ""]
    report = run.report.read_text() if run.report.exists() else f"# {run.path.name}\n"
    if sections:
        write_atomically(run.report, report.partition(EVALUATIONS)[0] + EVALUATIONS + "\n".join(sections))


def evaluation_table(result: Mapping[str, Any]) -> list[list[str]]:
    """Return a heading and a row per metric, with a column per run, and one for the references where there were any."""
    columns = {f"{Path(each['run']).name}, step {each['step']:,}": each["measures"] for each in result["runs"]}
    columns |= {"reference": result["reference"]} if result.get("reference") else {}
    names = result["runs"][0]["measures"]
    rows = [[name.replace("_", " "), *(str(own.get(name, "")) for own in columns.values())] for name in names]
    return [["", *columns], *rows]


def evaluation_notes(result: Mapping[str, Any]) -> list[str]:
    """Say how it was evaluated, and who wins."""
    return [*result["notes"]] + [
        f"By {name.replace('_', ' ')} {result['runs'][0]['run']} wins {own['wins']:,}, ties {own['ties']:,} and loses "
        f"{own['losses']:,}: win rate {own['win_rate']}, p = {own['p']:.2g} by a two-sided sign test."
        for name, own in result.get("comparison", {}).items()
    ]
