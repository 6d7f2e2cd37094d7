"""No line of the product can be made to run what it reads, and no bad input passes where Python runs with -O."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("kernels", "engine", "train", "rlhf", "bench", "cli")
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "code"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
# These unpickle what another process or a file sends, or give a text to a shell.
CALLS = {
    *("all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list"),
    *("send_object_list", "recv_object_list", "FileSystemReader", "FileSystemWriter", "load_module"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
}


def dangers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and the name of what is not wanted in the product."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
            yield from ((node.lineno, name) for name in modules if name.partition(".")[0] in MODULES)
        elif isinstance(node, ast.Call):
            name, options = ast.unparse(node.func), {each.arg: ast.unparse(each.value) for each in node.keywords}
            unsafe = (
                (isinstance(node.func, ast.Name) and name in BUILTINS)
                or (name in CALLS or name.rpartition(".")[2] in CALLS)
                or (name == "torch.load" and options.get("weights_only") != "True")
                or options.get("shell", "False") != "False"
                or options.get("allow_pickle", "False") != "False"
                or options.get("trust_remote_code", "False") != "False"
            )
            if unsafe:
                yield node.lineno, name
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            asserts = (each for each in ast.walk(node) if isinstance(each, ast.Assert))
            yield from ((each.lineno, "assert") for each in asserts if not narrows(each.test))


def narrows(test: ast.expr) -> bool:
    """Whether an assertion only tells a type checker what a value cannot be."""
    if isinstance(test, ast.BoolOp):
        return isinstance(test.op, ast.And) and all(map(narrows, test.values))
    if isinstance(test, ast.Compare):
        return len(test.ops) == 1 and isinstance(test.ops[0], ast.IsNot) and ast.unparse(test.comparators[0]) == "None"
    return isinstance(test, ast.Call) and ast.unparse(test.func) == "isinstance"


def test_nothing_in_the_product_runs_what_it_reads_or_checks_input_by_assert() -> None:
    found = {
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        for line, name in dangers(ast.parse(path.read_text()))
    }
    assert not found, "\n".join(sorted(found))


@pytest.mark.parametrize(
    "line",
    [
        *("eval('1')", "exec(text)", "__import__('os')", "import pickle", "from marshal import loads", "import yaml"),
        *("torch.load(path)", "torch.load(path, weights_only=False)", "subprocess.run('ls', shell=True)"),
        *("os.system('ls')", "np.load(path, allow_pickle=True)", "dist.all_gather_object(a, b)"),
        *("def f(x):\n    assert x > 0", "def f(x):\n    assert x is not None and x.ok"),
    ],
)
def test_such_a_line_would_be_found(line: str) -> None:
    assert list(dangers(ast.parse(line)))


@pytest.mark.parametrize(
    "line",
    [
        *("model.eval()", "re.compile('a')", "torch.load(path, weights_only=True)", "subprocess.run(['ls'])"),
        *("assert CONSTANT == OTHER", "def f(x):\n    assert x is not None and isinstance(x, int)"),
    ],
)
def test_a_harmless_line_is_not(line: str) -> None:
    assert not list(dangers(ast.parse(line)))
