"""The distribution: what it needs, what it carries, which file may import which."""

from __future__ import annotations

import ast
import configparser
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import lightning_peft

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_peft"

# Runs where only the package and its declared dependencies can be found.
BARE_IMPORT = """
import json, pkgutil, sys
import lightning.pytorch

before = set(sys.modules)
import lightning_peft

heavy = {"transformers", "tensorboard", "matplotlib"}
eager = sorted(name for name in set(sys.modules) - before if name.partition(".")[0] in heavy)
failed = {}
for module in pkgutil.walk_packages(lightning_peft.__path__, "lightning_peft."):
    try:
        __import__(module.name)
    except ImportError as error:
        failed[module.name] = str(error)
extras = sorted({"peft", "jsonargparse", "datasets", "pytest"} & set(sys.modules))
print(json.dumps({"eager": eager, "failed": failed, "extras": extras, "found": lightning_peft.__path__[0]}))
"""


def dependencies(name: str, extras: frozenset[str] = frozenset(), seen: set[tuple[str, str]] | None = None) -> set[str]:
    """The distributions that `name[extras]` brings, itself included."""
    seen = set() if seen is None else seen
    for line in metadata.requires(name) or ():
        requirement = Requirement(line)
        wanted = any(
            requirement.marker is None or requirement.marker.evaluate({"extra": extra}) for extra in {"", *extras}
        )
        key = (requirement.name, ",".join(sorted(requirement.extras)))
        if wanted and key not in seen:
            seen.add(key)
            dependencies(requirement.name, frozenset(requirement.extras), seen)
    return {name, *(dependency for dependency, _ in seen)}


@pytest.fixture(scope="module")
def bare_import(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of BARE_IMPORT from a folder of links to the package and what it declares, and to nothing else."""
    site = tmp_path_factory.mktemp("site")
    for name in dependencies("lightning-peft"):
        for file in metadata.files(name) or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (site / top).exists():
                (site / top).symlink_to(Path(str(metadata.distribution(name).locate_file(top))))
    if not (site / "lightning_peft").exists():  # an editable install lists no folder
        (site / "lightning_peft").symlink_to(PACKAGE)
    code = f"import sys; sys.path.insert(0, {str(site)!r})\n{BARE_IMPORT}"
    # -I and -S: neither this environment's packages nor the current folder
    run = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    report: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    assert report["found"].startswith(str(site))
    return report


def test_every_module_imports_without_extras(bare_import: dict[str, Any]) -> None:
    assert bare_import["failed"] == {}
    assert bare_import["extras"] == []


def test_import_is_light(bare_import: dict[str, Any]) -> None:
    """Lightning brings parts of some of them itself; the package adds nothing of what it needs only later."""
    assert bare_import["eager"] == []


def test_version_is_the_distributions() -> None:
    assert lightning_peft.__version__ == metadata.version("lightning-peft")


def test_wheel_carries_types_licence_and_no_tests(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a copy: setuptools leaves a build folder behind
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(PACKAGE, source / "lightning_peft", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests", source / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    assert "lightning_peft/py.typed" in names
    assert {name for name in names if ".dist-info/" not in name} == {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and path.suffix in {".py", ".typed"}
    }
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "lightning-peft = lightning_peft.__main__:main" in entry_points


def requirements(text: str) -> dict[str, str]:
    """Name -> version of every line that gives one."""
    found = re.findall(r"^([A-Za-z][\w-]*)(?:\[\w+\])?(?:>=|==)([\w.]+)", text, re.MULTILINE)
    return {name.lower(): version for name, version in found}


def config(path: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(path, encoding="utf-8")
    return parser


def test_lowest_versions_are_the_ones_that_run() -> None:
    """What setup.cfg promises is what `tox -e oldest` installs."""
    setup = config(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    declared = requirements("\n".join((setup["options"]["install_requires"], extras["cli"], extras["hf"])))
    installed = requirements(config(ROOT / "tox.ini")["testenv:oldest"]["deps"])
    assert len(declared) > 7

    def release(version: str) -> tuple[int, ...]:
        numbers = [int(part) for part in version.split(".")]
        return tuple(numbers + [0] * (3 - len(numbers)))

    assert {name: release(version) for name, version in declared.items()} == {
        name: release(version) for name, version in installed.items()
    }


def test_constraints_name_plain_versions() -> None:
    """A local suffix such as +cpu names a build that only some machines can find."""
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        assert re.fullmatch(r'#.*|[\w.-]+==[\w.]+(; python_version >= "3\.\d+")?', line), line


# Imports point one way: from a later row to an earlier one, or within a row.
ROWS = (
    ("functional",),
    ("rank",),
    ("adapters", "regularizers"),
    ("surgery", "export"),
    ("callbacks",),
    ("modules",),
)
LEVEL = {name: level for level, row in enumerate(ROWS) for name in row}
FILES = sorted(PACKAGE.rglob("*.py"))


def run_time_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING:`, which are never run."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            continue
        yield node
        yield from run_time_nodes(node)


@cache
def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, at any depth; `from a import b` gives a.b, which may be a module."""
    found: set[str] = set()
    for node in run_time_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def own_file(name: str) -> Path | None:
    """The file behind a dotted name of the package, of which the last part may be a name in the file."""
    for parts in (name.split("."), name.split(".")[:-1]):
        path = ROOT.joinpath(*parts)
        for candidate in (path.with_suffix(".py"), path / "__init__.py"):
            if parts[:1] == ["lightning_peft"] and len(parts) > 1 and candidate.is_file():
                return candidate
    return None


def reached(path: Path) -> set[Path]:
    """The files of the package that importing `path` runs, the package's own __init__ aside."""
    seen: set[Path] = set()
    pending = [path]
    while pending:
        file = pending.pop()
        if file not in seen:
            seen.add(file)
            pending += [target for target in map(own_file, imports(file)) if target is not None]
    return seen


def folder(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def each_file(*folders: str) -> pytest.MarkDecorator:
    files = [path for path in FILES if folder(path) in folders]
    return pytest.mark.parametrize("path", files, ids=lambda path: path.relative_to(PACKAGE).as_posix())


@each_file(*LEVEL)
def test_imports_point_one_way(path: Path) -> None:
    above = {
        target.relative_to(PACKAGE).as_posix()
        for target in reached(path)
        if LEVEL.get(folder(target), -1) > LEVEL[folder(path)]
    }
    assert above == set()


@each_file("functional", "rank", "adapters", "regularizers")
def test_lower_layers_know_neither_lightning_nor_processes(path: Path) -> None:
    users = {
        file.relative_to(PACKAGE).as_posix()
        for file in reached(path)
        if any(name.partition(".")[0] in ("lightning", "pytorch_lightning") for name in imports(file))
        or any(f"{name}.".startswith("torch.distributed.") for name in imports(file))
    }
    assert users == set()


def test_strategies_are_known_in_one_place() -> None:
    """`strategies.py` knows which strategy does what, `distributed.py` sends; `testing` starts processes for tests."""
    known = {
        path.relative_to(PACKAGE).as_posix()
        for path in FILES
        for name in imports(path)
        if f"{name}.".startswith(("torch.distributed.", "lightning.pytorch.strategies."))
    }
    assert known == {"distributed.py", "strategies.py", "testing/processes.py"}
    lines = [len((PACKAGE / name).read_text(encoding="utf-8").splitlines()) for name in sorted(known)[:2]]
    assert sum(lines) < 550  # what docs/exactness.md says


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_lightning_has_one_name(path: Path) -> None:
    """The two distributions hold two copies of every class; mixing them breaks isinstance."""
    names = {name for name in imports(path) if name.partition(".")[0] in ("lightning", "pytorch_lightning")}
    assert all(name.startswith("lightning.pytorch") for name in names)


def test_import_rules_name_what_exists() -> None:
    assert set(LEVEL) <= {folder(path) for path in FILES}
