"""The packages import one way: proxy → episodes ← worker."""

import ast
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
