"""The packages import one way: proxy → episodes ← worker."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "episodes": {"proxy", "worker", "aiohttp", "torch", "vllm", "nnsight", "transformers"},
    "proxy": {"worker", "torch", "vllm", "nnsight", "transformers"},
    "worker": {"proxy", "aiohttp", "pyarrow"},
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


# What runs code that it reads.
LOADERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle", "yaml"}
CALLS = {"eval", "exec", "load", "loads", "read_pickle", "__import__"}
# Of these `load` and `loads` are harmless.
PLAIN = {"json", "tomllib"}


def calls(path: Path) -> set[str]:
    """The functions that a module calls by name: `f` or `module.f`."""
    called = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return {ast.unparse(function) for function in called}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_nothing_that_is_read_is_run(package):
    """No pickle and nothing like it: not from the network, not from disk."""
    for module in sorted((ROOT / package).glob("*.py")):
        assert not imports(module) & LOADERS, module.name
        for called in calls(module):
            owner, _, name = called.rpartition(".")
            assert name not in CALLS or owner in PLAIN, f"{module.name}: {called}"


@pytest.mark.parametrize("package", FORBIDDEN)
def test_no_module_imports_against_the_arrows(package):
    """Not even inside a function."""
    modules = sorted((ROOT / package).glob("*.py"))
    assert modules
    for module in modules:
        assert not imports(module) & FORBIDDEN[package], module.name


def test_the_api_server_does_not_load_nnsight():
    """nnsight gives every object a `save` method, which breaks anyio in the server's process."""
    for module in ("server", "ledger", "orders", "embed", "spool", "metrics"):
        assert not imports(ROOT / "worker" / f"{module}.py") & {"nnsight", "torch"}, module
    assert "nnsight" in imports(ROOT / "worker" / "tap.py")


def test_a_command_loads_no_http_before_it_is_chosen():
    """`tautap episodes` wants none, and aiohttp takes a third of a second to import."""
    code = "import sys, proxy.__main__; sys.exit(bool({'aiohttp', 'prometheus_client'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
