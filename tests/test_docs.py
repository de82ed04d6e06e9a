"""README and the pages: their code runs, their links lead somewhere, their commands are the ones that CI runs.

The blocks are run here and not by a plugin because ten lines do it: sybil needs Python 3.11 and a conftest beside the
pages, and pytest-markdown-docs an older markdown-it-py than the pinned one.
"""

from __future__ import annotations

import itertools
import pkgutil
import re
import shlex
from pathlib import Path

import pytest

from lightning_peft import cli

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("examples/**/*.md")),
]
FENCE = re.compile(r"^```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?P<target>[^)\s]+)\)")

pytestmark = pytest.mark.docs
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def anchors(text: str) -> set[str]:
    """The headings of a page as a code host spells them in links."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_code_blocks_run(page: Path) -> None:
    """The blocks of a page share one namespace, as a reader who types them in turn would have it."""
    text = page.read_text(encoding="utf-8")
    namespace: dict[str, object] = {"__name__": page.stem}
    for block in FENCE.finditer(text):
        if block["language"] == "python":
            lines_before = text.count("\n", 0, block.start("body"))  # so that a traceback names the page's own line
            exec(compile("\n" * lines_before + block["body"], str(page), "exec"), namespace)


def test_plans_are_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """Each `lightning-peft plan` is followed by what it prints, on the model that the page's own code makes."""
    page = ROOT / "docs" / "multi-node.md"
    test_code_blocks_run(page)
    blocks = [(block["language"], block["body"]) for block in FENCE.finditer(page.read_text(encoding="utf-8"))]
    planned = 0
    for (language, body), (following, printed) in itertools.pairwise(blocks):
        if language == "shell" and body.startswith("lightning-peft plan "):
            capsys.readouterr()
            assert cli.main(shlex.split(body)[1:]) == 0
            assert (following, printed) == ("text", capsys.readouterr().out)
            planned += 1
    assert planned == 2


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    missing = []
    for link in LINK.finditer(FENCE.sub("", page.read_text(encoding="utf-8"))):
        path, _, anchor = link["target"].partition("#")
        if path.startswith(("http:", "https:")):
            continue  # other people's pages come and go; a test must not
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            missing.append(link["target"])
    assert not missing


def test_ci_runs_what_readme_says() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = [line for line in readme.splitlines() if "-m pip install tox" in line]
    demo, checks = commands
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    lines = [line for line in script.splitlines() if line and not line.startswith(("#", "set ", "cd "))]
    assert demo == f"{checks} -e demo"
    assert lines == [checks]


def test_names_in_readme_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[^|]+) \|", readme, re.MULTILINE)
    names = re.findall(r"`(\w[\w.]*)", " ".join(rows))
    assert len(names) > 10
    for name in names:
        pkgutil.resolve_name(f"lightning_peft.{name}")  # imports what it has to, and says what does not exist
