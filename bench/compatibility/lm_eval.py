"""lm-eval: its local-completions backend on our API says what its hf backend says of the exported model.

The tasks are local files, in the form of ARC (multiple choice), of LAMBADA (a last word) and of perplexity on a corpus.
"""

# client lm-eval: lm_eval[api,hf]==0.4.13 torch==2.13.0 transformers==5.23.0

import importlib
import json
import os
from pathlib import Path
from typing import Any

from bench.compatibility import gpt, tried

SCRATCH, URL = Path(os.environ["SCRATCH"]), os.environ["BASE_URL"] + "/v1/completions"
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(SCRATCH / "hub")}
lm_eval: Any = importlib.import_module("lm_eval")
tasks: Any = importlib.import_module("lm_eval.tasks")

STORIES = [
    ("Tim had a red ball. He kicked the ball into a", ["tree", "cloud", "spoon", "song"]),
    ("Once upon a time, there was a little girl named", ["Lily", "very", "the", "running"]),
    ("The sun was warm and the birds began to", ["sing", "spoon", "blue", "chair"]),
    ("Mom said, \u201cIt is time for", ["bed", "quickly", "and", "under"]),
    ("The caf\u00e9 was closed, so the bear went", ["home", "happy the", "of", "??"]),
    ("Sue was sad because her doll was", ["lost", "lamp", "jumping over", "Tim"]),
]
ROWS = [
    {
        "question": question,
        "choices": {"text": choices, "label": list("ABCD")},
        "answerKey": "AB"[place % 2],
        "text": f"{question} {choices[0]}. {question}" * 8,
    }
    for place, (question, choices) in enumerate(STORIES)
]
COMMON = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(SCRATCH / "rows.jsonl")}}}
COMMON |= {"test_split": "test", "metadata": {"version": 1}}
TASKS: dict[str, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices.text}}",
        "doc_to_target": "{{choices.label.index(answerKey)}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "word": {"output_type": "loglikelihood", "doc_to_text": "{{question}}", "doc_to_target": " {{choices.text[0]}}"},
    "corpus": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"},
    "write": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices.text[0]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def answers(backend: str, **settings: Any) -> dict[str, Any]:
    """Return the scores of a backend, and of each task what it answered to each request."""
    manager = tasks.TaskManager(include_path=str(SCRATCH), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=backend, model_args=settings, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0
    )
    answered = {
        task: [response for sample in samples for response in sample["resps"]]
        for task, samples in found["samples"].items()
    }
    return {"scores": found["results"], **answered}


(SCRATCH / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
for name, settings in TASKS.items():
    # JSON is YAML.
    (SCRATCH / f"{name}.yaml").write_text(json.dumps({"task": name, **COMMON, **settings}))
gpt("export", os.environ["BASE"], "--out", str(SCRATCH / "model"))
hf = answers("hf", pretrained=str(SCRATCH / "model"), dtype="float32", device="cpu", add_bos_token=True)
API = {"model": "base", "base_url": URL, "tokenizer": str(SCRATCH / "model"), "max_length": 256}
ours = answers("local-completions", **API, add_bos_token=True)


def apart(mine: list[Any], theirs: list[Any]) -> float:
    """Return the largest difference between log-probabilities."""
    pairs = [pair for one, other in zip(mine, theirs, strict=True) for pair in zip(one, other, strict=True)]
    # Beside its log-probability stands whether a continuation is the likeliest.
    told = [[each[0] if isinstance(each, list | tuple) else each for each in pair] for pair in pairs]
    return max(abs(one - other) for one, other in told)


for task in ("choice", "word", "corpus"):
    with tried(f"{task}: log-probabilities are those of the hf backend, to 1e-3") as say:
        assert apart(ours[task], hf[task]) < 1e-3, apart(ours[task], hf[task])
        say(f"{apart(ours[task], hf[task]):.1e} apart")
with tried("write: the texts are the same"):
    assert ours["write"] == hf["write"]
with tried("the scores are the same"):
    for task in TASKS:
        for metric, score in hf["scores"][task].items():
            if isinstance(score, float):
                assert abs(ours["scores"][task][metric] - score) <= 1e-3 * max(abs(score), 1), (task, metric)
with tried("without add_bos_token=True they are not those of the hf backend") as say:
    wrong = answers("local-completions", **API)
    assert apart(wrong["choice"], hf["choice"]) > 1e-2
    say(f"{apart(wrong['choice'], hf['choice']):.1f} apart")
