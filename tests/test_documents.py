"""README and docs: code blocks run and print what they show, links lead somewhere, public names have docstrings."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import pytest

import lossledger
from lossledger import callbacks, losses, metrics, regularizers

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Spaces and line breaks may differ, so that long messages can be wrapped; "..." stands for times and paths.
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """The line and the text of each block of a language."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, m.start()) + 1, m[2]) for m in BLOCK.finditer(text) if m[1] == language]


def failures_of(page: Path, namespace: dict[str, object]) -> list[str]:
    """Runs the Python blocks of a page in order; returns the report of each block that fails."""
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner(optionflags=FLAGS)
    reports: list[str] = []
    for line, block in blocks(page, "python"):
        # A DocTest copies its namespace: give it back to the blocks that follow.
        test = parser.get_doctest(block, namespace, f"{named(page)}, line {line}", str(page), line)
        report: list[str] = []
        runner.run(test, out=report.append, clear_globs=False)
        namespace.update(test.globs)
        reports.extend(report)
    return reports


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_code_blocks_print_what_they_show(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    reports = failures_of(page, {"__name__": "__main__"})
    assert not reports, "\n".join(reports)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_code_blocks_are_checked(page: Path) -> None:
    unchecked = [line for line, block in blocks(page, "python") if not block.startswith(">>> ")]
    assert not unchecked, f"{named(page)}: blocks at lines {unchecked} are Python without the prompt '>>> '"


def test_a_wrong_output_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("```python\n>>> a = 1\n```\n\n```python\n>>> a + 1\n3\n```\n", encoding="utf-8")
    assert "Expected:" in "".join(failures_of(page, {}))
    page.write_text("```python\n>>> a = 1\n```\n\n```python\n>>> a + 1\n2\n```\n", encoding="utf-8")
    assert not failures_of(page, {})


def anchors(page: Path) -> set[str]:
    """The anchors of the headings of a page, as they are made on a hosted repository."""
    outside = BLOCK.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", outside, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    outside = BLOCK.sub("", page.read_text(encoding="utf-8"))
    lost = []
    for link in LINK.findall(outside):
        if link.startswith(("https://", "http://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = page if not path else (page.parent / path).resolve()
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(link)
    assert not lost, f"{named(page)}: nothing at {lost}"


def test_every_page_is_on_the_map() -> None:
    linked = set(LINK.findall((ROOT / "docs" / "index.md").read_text(encoding="utf-8")))
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert pages <= {link.partition("#")[0] for link in linked}


QUESTIONS = {
    "batch-size": "Does the loss double when I double the batch size? Is it a sum or a mean?",
    "what-is-averaged-first": "5 classes × pixels × batch: what is averaged first?",
    "where-did-it-go": "My loss is 1 % but class 5 has 23 % IoU: where did it go?",
    "scalar-or-per-sample": "Must my custom loss return a scalar or one value per sample?",
    "progress-bar": "What is that running number in the progress bar?",
    "several-outputs": "Several outputs, weights per output, regularizers: what is the total?",
    "frameworks": "Keras 2, Keras 3, PyTorch and my Trainer print different losses",
    "gradient": "Accumulation, DDP, an uneven last batch change my gradient",
}


def test_every_question_has_its_page() -> None:
    """With the question as it is asked, code that runs, and a place on the map."""
    folder = ROOT / "docs" / "questions"
    assert {page.stem for page in folder.glob("*.md")} == set(QUESTIONS)
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for name, question in QUESTIONS.items():
        page = folder / f"{name}.md"
        assert page.read_text(encoding="utf-8").startswith(f"# {question}\n")
        assert len(blocks(page, "python")) >= 3
        assert f"- [{question}](questions/{name}.md)" in index


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_are_targets_of_the_makefile(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    text = page.read_text(encoding="utf-8")
    shown = set(re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE))
    assert shown <= targets
    if page.name == "README.md":
        assert {"demo", "test"} <= shown


def modules() -> list[str]:
    found = pkgutil.walk_packages(lossledger.__path__, "lossledger.")
    return ["lossledger", *sorted(info.name for info in found)]


@pytest.mark.parametrize("name", modules())
def test_examples_in_the_docstrings(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    reports: list[str] = []
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, name):
        runner.run(test, out=reports.append)
    assert not reports, "\n".join(reports)


def defined_in(module: ModuleType) -> list[str]:
    """The public classes and functions of a module that has no `__all__`."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    ]


PUBLIC = [
    *(("lossledger", name) for name in lossledger.__all__ if name != "__version__"),
    *(("lossledger.losses", name) for name in losses.__all__),
    *(("lossledger.metrics", name) for name in metrics.__all__),
    *((regularizers.__name__, name) for name in defined_in(regularizers)),
    *((callbacks.__name__, name) for name in defined_in(callbacks)),
]


@pytest.mark.parametrize(("module", "name"), PUBLIC, ids=lambda part: part)
def test_public_names_have_docstrings(module: str, name: str) -> None:
    value = getattr(importlib.import_module(module), name)
    missing = [] if (value.__doc__ or "").strip() else [name]
    if inspect.isclass(value):
        for method, member in vars(value).items():
            function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            if not method.startswith("_") and inspect.isfunction(function) and not (function.__doc__ or "").strip():
                missing.append(f"{name}.{method}")
    assert not missing


def test_our_cells_lead_to_tests() -> None:
    """Each claim about us in the tables of the README has a link to what checks it, and the count is right."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text[text.index("## What works today") : text.index("## What comes next")]
    rows = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    claims = [row[1] for row in rows if not row[1].strip().startswith("lossledger")]
    assert len(claims) > 20
    assert not [claim for claim in claims if not re.search(r"\]\((tests|docs)/", claim)]
    named = {kind.__name__ for kind in losses.registry.NAMES.values()}
    assert f"[{len(named)}](" in claims[0]
