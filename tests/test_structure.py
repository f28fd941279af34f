"""The shape of the house: public names, one direction of imports, a light import, files one can hold in the head."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lossledger as ll

SOURCE = Path(ll.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

# Rooms, from the bottom to the top: a room imports from rooms above it in this list, or from itself.
ROOMS = [
    "errors",
    "frameworks",
    "tally",
    "values",
    "weighting",
    "batch",
    "reduction",
    "losses",
    "metrics",
    "regularizers",
    "objective",
    "forward",
    "integrations",
    "distributed",
    "window",
    "conventions",
    "ledger",
    "report",
    "explain",
    "training",
    "check_distributed",
    "demo",
    "cli",
    "__main__",
]
NEEDS_NO_TORCH = ("errors", "tally", "ledger", "report")


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "lossledger"


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports when it runs; annotations do not count, nor late imports."""
    tree = ast.parse(path.read_text())
    typing_only = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    ]
    skipped = {id(inner) for node in typing_only for inner in ast.walk(node)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.startswith("lossledger")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lossledger"):
            if node.module == "lossledger":
                found |= {f"lossledger.{a.name}" for a in node.names}
            else:
                found.add(node.module)
    return found


def room_of_file(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return "lossledger" if parts == ("__init__",) else parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_one_way(path):
    room = room_of_file(path)
    if room == "lossledger":
        return
    assert room in ROOMS, f"{room} is a new room: give it its place in the order"
    above = {room_of(module) for module in imports(path)} - {"lossledger"}
    wrong = {other for other in above if ROOMS.index(other) > ROOMS.index(room)}
    assert not wrong, f"{room} imports {wrong}, which lie above it"


def test_ledger_and_report_do_not_know_training():
    for path in FILES:
        if room_of_file(path) in ("ledger", "report"):
            assert {room_of(m) for m in imports(path)} <= {"errors", "tally", "ledger", "report"}
        if room_of_file(path) == "ledger":
            assert "report" not in {room_of(m) for m in imports(path)}


@pytest.mark.parametrize("room", NEEDS_NO_TORCH)
def test_rooms_that_need_no_torch_load_without_it(room):
    code = f"import sys, lossledger, lossledger.{room}; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_are_what_can_be_imported():
    assert ll.__all__ == sorted(ll.__all__, key=lambda n: (n.startswith("_"), n)) or set(ll.__all__) == set(dir(ll))
    for name in ll.__all__:
        assert getattr(ll, name) is not None
    for module in (ll.losses, ll.metrics):
        assert list(module.__all__) == sorted(module.__all__)
        for name in module.__all__:
            assert getattr(module, name) is not None
    with pytest.raises(AttributeError):
        _ = ll.nothing


def test_report_can_be_called_whether_its_package_was_imported_or_not():
    for first in ("", "import lossledger.report; from lossledger.report import as_text; "):
        code = f"import lossledger as ll; {first}assert callable(ll.report)"
        subprocess.run([sys.executable, "-c", code], check=True)


def test_explain_can_be_called_whether_its_package_was_imported_or_not():
    for first in ("", "import lossledger.explain.evidence; from lossledger.explain import Step; "):
        code = f"import lossledger as ll; {first}assert ll.explain('mse', [[0.0]], [[2.0]]).value == 4"
        subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_file_is_longer_than_a_newcomer_can_hold(path):
    assert len(path.read_text().splitlines()) <= 500


def test_only_one_place_divides():
    """Losses, objective and training divide through the tally, or through its reciprocal in the gradient."""
    for path in FILES:
        if room_of_file(path) in ("objective", "window", "training"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
                    text = ast.unparse(node)
                    assert not any(word in text for word in ("numerator", "divisor", "tally")), f"{path}: {text}"
