"""Every parser, fed by hypothesis: it returns, or refuses with a sentence (InputError); nothing else ever comes out."""

import contextlib
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from cli.launch import parse_nodes
from cli.options import integers
from cli.server import openai
from cli.training import adjust
from engine import planning
from engine.chat_template import JINJA, Message, render, trim
from engine.config import Recipe, from_dict, override_text, preset, to_dict
from engine.config import settings as all_settings
from engine.errors import InputError
from engine.tokenizer import Tokenizer
from rlhf.preferences import open_preferences
from tests.faults import child
from tests.faults.board import Board
from tests.faults.damage import ODD_VALUES
from train.data.sources import open_conversations, open_source
from train.tracking import read_metrics

EXAMPLES = 300

TEXT = st.text(max_size=60)
SCALARS = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), TEXT, st.sampled_from(ODD_VALUES)),
)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=12
)
NAMES = ("text", "prompt", "response", "messages", "chosen", "rejected", "system", "history", "weight", "label", "role")
COLUMN = st.sampled_from((*NAMES, "content", "conversations", "message_id", "replies", "input", "output")) | TEXT
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(("user", "assistant", "system", "tool")) | JSON, "content": TEXT | JSON}
)
ROW = st.one_of(
    st.dictionaries(COLUMN, TEXT | JSON | st.lists(TURN, max_size=4), min_size=1, max_size=5),
    st.fixed_dictionaries({"messages": st.lists(TURN, max_size=5)}),
    st.fixed_dictionaries({"prompt": TEXT, "chosen": TEXT | JSON, "rejected": TEXT | JSON}),
    JSON,
)
NUMBER = st.one_of(
    st.integers().map(str), st.floats().map(str), TEXT, st.sampled_from(("1e400", "0x10", "1_000", "9" * 5000))
)
LINES = st.lists(ROW, min_size=1, max_size=12).map(
    lambda rows: "".join(f"{json.dumps(row)}\n" for row in rows).encode()
)
CELL = TEXT.map(lambda text: '"' + text.replace('"', '""') + '"') | TEXT
TABLE = st.lists(st.lists(CELL, min_size=1, max_size=4).map(",".join), min_size=1, max_size=8).map("\n".join)


@contextlib.contextmanager
def file(content: bytes, ending: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"file{ending}")
        path.write_bytes(content)
        yield path


def read_all(path: Path) -> None:
    """Read a file as documents, as conversations, as prompts and as preferences."""
    from engine.config import DataConfig

    data = DataConfig(source=str(path))
    openers: list[Callable[[], Any]] = [
        lambda: open_source(str(path)),
        lambda: open_conversations(data),
        lambda: open_conversations(data, answers=False),
        lambda: open_preferences(data),
    ]
    for opener in openers:
        with contextlib.suppress(InputError):
            source = opener()
            for split in ("train", "validation") if source is not None else ():
                with contextlib.suppress(InputError):
                    for _ in source.documents(split):
                        pass


def json_lines(content: bytes) -> None:
    with file(content, ".jsonl") as path:
        read_all(path)


def json_file(content: bytes) -> None:
    with file(content, ".json") as path:
        read_all(path)


def csv(content: str) -> None:
    with file(content.encode(errors="surrogatepass"), ".csv") as path:
        read_all(path)


def raw_bytes(content: bytes) -> None:
    for ending in (".txt", ".jsonl", ".json", ".csv"):
        with file(content, ending) as path:
            read_all(path)


def chat_template(turns: list[tuple[str, str]]) -> None:
    """What is said cannot spell a role or an end, and comes back as it was."""
    tokenizer = Tokenizer.load("tokenizer.model")
    messages = [Message(role, text) for role, text in turns]
    ids, learn = render(tokenizer, messages)
    special = [each for each in ids if each in tokenizer.special.values()]
    assert len(special) == 1 + 2 * len(turns) and len(ids) == len(learn)
    assert tokenizer.decode(ids) == "".join(text for _, text in turns)
    trim(tokenizer, messages, 30)


def setting(name: str, text: str) -> None:
    recipe = override_text(preset("nano"), f"{name}={text}")
    assert from_dict(json.loads(json.dumps(to_dict(recipe)))) == recipe


def recipe_file(content: Any) -> None:
    from_dict(content)


def changed_recipe(name: str, value: Any) -> None:
    tree = to_dict(preset("nano"))
    *groups, last = name.split(".")
    node = tree
    for group in groups:
        node = node[group]
    node[last] = value
    from_dict(tree)


def length(name: str, text: str) -> None:
    try:
        number = float(text) if name != "steps" else int(text)
    except (ValueError, OverflowError):
        return
    budget = adjust(preset("nano"), {f"budget.{name}": number}, None).budget
    assert all(value is None or 0 < value < math.inf for value in vars(budget).values())


def several(text: str) -> None:
    assert min(integers("--batch", text)) >= 1


def nodes(text: str) -> None:
    least, most = parse_nodes(text)
    assert 1 <= least <= most


def plan(batch: int, gpus: int, context: int, width: int, shard: bool, machine: str) -> None:
    """What is planned is a number."""
    recipe = adjust(
        preset("nano"), {"loop.batch": batch * gpus, "model.context": context, "model.width": 8 * width}, None
    )
    kind = planning.MACHINES[machine]
    rate = planning.assumed_rate(kind, "bf16")
    found = planning.plan(recipe, kind, rate, "bf16", gpus=gpus, nodes=1, shard=shard)
    assert 0 < found.step_seconds < math.inf and 0 < planning.peak_memory(found.setup) < 2**80


def measured(content: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "training-nano-x.json").write_text(json.dumps(content))
        planning.measured_rate(preset("nano"), "fp32", "x", Path(folder))


def metrics(content: bytes) -> None:
    with file(content, ".jsonl") as path:
        for line in read_metrics(path):
            assert isinstance(line, dict)


def request(kind: type[openai.Options], content: bytes) -> None:
    with contextlib.suppress(openai.APIError):
        openai.parse(kind, content)


def tokens(text: str) -> None:
    tokenizer = Tokenizer.load("tokenizer.model")
    assert tokenizer.decode(tokenizer.encode(text)) == text


SETTINGS = st.sampled_from([name for name, _, _ in all_settings(Recipe)])
RESULT = st.fixed_dictionaries(
    {"device": st.just("x") | JSON, "precision": st.just("fp32") | JSON, "variants": JSON, "peak_flops": SCALARS}
)
ROLES = st.sampled_from(("user", "assistant", "system"))
PARSERS: dict[str, tuple[Callable[..., None], tuple[st.SearchStrategy[Any], ...]]] = {
    "JSON lines": (json_lines, (LINES,)),
    "JSON": (json_file, (JSON.map(lambda tree: json.dumps(tree).encode()) | LINES,)),
    "CSV": (csv, (TABLE,)),
    "bytes as data": (raw_bytes, (st.binary(max_size=200),)),
    "chat template": (
        chat_template,
        (st.lists(st.tuples(ROLES, TEXT | st.sampled_from((JINJA, "<|end|>"))), min_size=1),),
    ),
    "--set": (setting, (SETTINGS, NUMBER)),
    "config.json": (recipe_file, (JSON,)),
    "a value of config.json": (changed_recipe, (SETTINGS, JSON)),
    "--steps and others": (length, (st.sampled_from(("steps", "tokens", "epochs", "minutes")), NUMBER)),
    "numbers with commas": (several, (st.lists(NUMBER).map(",".join),)),
    "--nodes": (nodes, (st.lists(NUMBER, min_size=1, max_size=3).map(":".join),)),
    "plan": (
        plan,
        (
            *(st.integers(1, 64), st.sampled_from((1, 2, 8, 512)), st.integers(1, 4096), st.integers(1, 2048)),
            *(st.booleans(), st.sampled_from(sorted(planning.MACHINES))),
        ),
    ),
    "measured rates": (measured, (RESULT | JSON,)),
    "metrics.jsonl": (metrics, (LINES | st.binary(max_size=200),)),
    "chat request": (request, (st.just(openai.ChatRequest), LINES | st.binary(max_size=100))),
    "completion request": (request, (st.just(openai.CompletionRequest), LINES | st.binary(max_size=100))),
    "tokenizer": (tokens, (TEXT,)),
}


def examples(name: str, number: int, count: int) -> None:
    """Feed one parser with so many examples. Raises what it raises, with the smallest example that makes it."""
    parser, strategies = PARSERS[name]

    @seed(number)
    @settings(max_examples=count, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.tuples(*strategies))
    def feed(arguments: tuple[Any, ...]) -> None:
        with contextlib.suppress(InputError):
            parser(*arguments)

    feed()


def run(board: Board) -> None:
    names = list(PARSERS)
    count = max(2, round(EXAMPLES * board.share))
    board.share = 1.0
    for case in board.cases(len(names)):
        name = names[case.number]
        case.what = f"{name}, {count} examples"
        board.tried += count - 1

        def work(name: str = name) -> None:
            examples(name, board.seed, count)

        case.judge(child.run(work, board.world, 120))
