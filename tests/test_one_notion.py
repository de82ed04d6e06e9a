"""One notion of rank: what serves all methods names none of them.

Callbacks, checkpoints, export, compaction, planning and surgery work through gates, budgets and the interfaces of
adapters, policies, importances and terms. A class that is asked for by its name in there would be a special case, and a
third party's class would not get it. The names are those of the package's own methods, whatever they are by now.

Docstrings and comments may give examples. What else may name a method stands in REASONED, one by one, with the reason.
"""

from __future__ import annotations

import ast
import inspect
import pkgutil
import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

import lightning_peft
from lightning_peft import Adapter, Importance, RankPolicy, Regularizer, presets
from lightning_peft.rank.policy import Policy

PACKAGE = Path(lightning_peft.__file__).parent
EXAMPLE = "an error's advice: an example of what to write"
PEFT = "PEFT's name of its file format, not of a class of ours"
PROMPTS = "which prompts have which tensors in a file of prompts is what it knows"
READS = "it reads files of PEFT's, and which of our classes stands for which of PEFT's formats is what it knows"
JOB = "a job's table of methods, by the names on the command line: nothing else in the job knows them"
# Shared code that names a method: file, name -> why it is no special case.
REASONED = {
    ("adapters/prompts/text_model.py", "SoftPrompt"): EXAMPLE,
    ("callbacks/examples.py", "PACBayes"): EXAMPLE,
    ("callbacks/pruning.py", "Taylor"): EXAMPLE,
    ("callbacks/r_drop.py", "LoRA"): EXAMPLE,
    ("callbacks/regularization.py", "DEM"): EXAMPLE,
    ("callbacks/selection.py", "LearnedRanks"): EXAMPLE,
    ("adapters/entry_selection.py", "entry_gradients"): "it hears gradients as that method does: its import",
    ("adapters/ars.py", "LearnedRanks"): "a paper's own file, which sets it up",
    ("adapters/ars.py", "learned_ranks"): "its import",
    ("adapters/sparse_budget.py", "SpaRTA"): "a method's own factory: how many entries its adapters have",
    ("adapters/sparse_budget.py", "sparta"): "its import",
    ("adapters/gora.py", "LoRA"): EXAMPLE,
    ("adapters/gora.py", "WeightDecomposed"): EXAMPLE,
    ("adapters/gora.py", "lora"): EXAMPLE,
    ("cli.py", "adalora"): PEFT,
    ("cli.py", "dynamic_dora"): "an option's help: an example of what to write",
    ("rank/policy.py", "Taylor"): EXAMPLE,
    ("rank/weighted_svd.py", "Factorized"): EXAMPLE,
    ("surgery/choice.py", "LoRA"): "an error that says what to do: a method to train on top, for example",
    ("surgery/injection.py", "LoRA"): EXAMPLE,
    ("compression/methods.py", "Factorized"): JOB,
    ("compression/methods.py", "factorized"): JOB,
    ("compression/methods.py", "ars"): JOB,
    ("compression/methods.py", "rankdyna"): JOB,
    ("compression/layers.py", "Factorized"): "it counts the components that layers will have, before the job begins",
    ("compression/layers.py", "factorized"): "its import",
    ("compression/job.py", "Distillation"): "the term of fine-tuning that the job offers, whatever the method was",
    ("convert.py", "LoRA"): "what it makes of any low-rank adapter: the plain sum of components",
    ("convert.py", "lora"): "its import",
    ("functional/draws.py", "rlora"): "a word of the text that is hashed; other words would be other constants",
    ("interop/hf_peft.py", "LoRA"): PEFT,
    ("interop/hf_peft.py", "adalora"): PEFT,
    ("interop/layout.py", "adalora"): PEFT,
    ("interop/targets.py", "LoRA"): PEFT,
    ("interop/prompt_export.py", "LoRA"): PEFT,
    ("interop/prompt_files.py", "DPT"): PROMPTS,
    ("interop/prompt_files.py", "DePT"): PROMPTS,
    ("interop/prompt_files.py", "SoftPrompt"): PROMPTS,
    ("interop/prompt_files.py", "dept"): "its import",
    ("interop/prompt_files.py", "dpt"): "its import",
    ("interop/prompt_import.py", "SoftPrompt"): READS,
    ("interop/prompt_positions.py", "DePT"): "it writes this method's offsets into a model: no other has any",
    ("interop/prompt_positions.py", "SoftPrompt"): "what is left then",
    ("interop/prompt_positions.py", "dept"): "its import",
    ("interop/triplets.py", "AdaLoRA"): PEFT,
    ("interop/triplets.py", "LoRA"): PEFT,
    ("interop/from_peft.py", "AdaLoRA"): READS,
    ("interop/from_peft.py", "LoRA"): READS,
    ("interop/from_peft.py", "WeightDecomposed"): READS,
    ("interop/from_peft.py", "adalora"): READS,
    ("interop/from_peft.py", "lora"): READS,
    ("interop/from_peft.py", "weight_decomposed"): READS,
    ("interop/from_peft.py", "eva"): "PEFT's name of a start that leaves the base as it is",
    ("planning/command.py", "lora"): "the preset that is planned if none is named; all are known by their signatures",
    ("metrics/mutual_information.py", "MutualInformation"): "a metric, of what the term rewards, has the same name",
    ("regularizers/views.py", "MutualInformation"): "a part of this term: its errors say what to write",
    ("testing/trial.py", "DynamicDoRA"): "what laws of importances are tried on unless another adapter is given",
    ("testing/trial.py", "dynamic_dora"): "its import",
    ("testing/equations.py", "Taylor"): "a law about what the mask's gradient measures, which is this importance",
}
# Files that are about methods of PEFT as PEFT has them, by its names: they serve no method of ours.
OF_PEFT = {
    "callbacks/allocation.py": "drives PEFT's own AdaLoRA, which has a schedule and a budget of its own",
    "callbacks/peft_losses.py": "adds to the loss what PEFT's own methods want added",
    "interop/adoption.py": "gives the layers gates that PEFT has injected",
    "interop/peft_layers.py": "tells these layers apart",
    "interop/adopted_export.py": "writes them in the formats that PEFT has for them",
}


# Files that are about PAC-Bayes: what the term is made of, and the certificate of what it has trained.
OF_PAC_BAYES = {
    *(f"functional/{name}.py" for name in ("catoni", "dziugaite_roy", "pac_tuning", "risk_bounds")),
    *(f"regularizers/{name}.py" for name in ("blob", "objectives", "pac_tuning", "posterior")),
    *(f"certification/{name}.py" for name in ("accounting", "command", "counting", "restore")),
    "callbacks/moments.py",
}


def modules() -> Iterator[str]:
    for module in pkgutil.walk_packages(lightning_peft.__path__, "lightning_peft."):
        if not module.name.endswith("__main__"):
            yield module.name


def leaves(kind: type) -> Iterator[type]:
    """The package's own classes below an interface that can be built: each is a method, or a part of one."""
    for child in kind.__subclasses__():
        if child.__module__.startswith("lightning_peft.") and not inspect.isabstract(child):
            yield child
        yield from leaves(child)


@cache
def methods() -> dict[str, set[Path]]:
    """Names of methods: classes, the files of adapters, presets; each with the files that define it."""
    for name in modules():
        import_module(name)
    found: dict[str, set[Path]] = {}
    for kind in (Adapter, Importance, Policy, Regularizer):
        for leaf in set(leaves(kind)) - {RankPolicy}:  # of schedule and importance: the notion itself
            file = Path(inspect.getfile(leaf))
            for name in (leaf.__name__, *([file.stem] if file.parent.name == "adapters" else [])):
                found.setdefault(name, set()).add(file)
    for name in set(presets.__all__) - {"Preset"}:
        for spelled in (name, name.replace("_", "-")):
            found.setdefault(spelled, set()).add(PACKAGE / "presets" / f"{name}.py")
    return found


def shared() -> list[Path]:
    """All files but those that define a method or only pass names on."""
    own = {file for files in methods().values() for file in files}
    return [
        path
        for path in sorted(PACKAGE.rglob("*.py"))
        if path not in own
        and path.name != "__init__.py"
        and path.parent.name != "presets"
        and path.relative_to(PACKAGE).as_posix() not in {*OF_PEFT, *OF_PAC_BAYES}
    ]


def named(text: str, names: set[str]) -> set[str]:
    """The names that stand in code: as an identifier, in an import, or as a word of a string that is no docstring."""
    tree = ast.parse(text)
    said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings: text by itself
    found: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=word) | ast.Attribute(attr=word) | ast.keyword(arg=str(word)) | ast.arg(arg=word):
                found.add(word)
            case ast.FunctionDef(name=word) | ast.ClassDef(name=word):
                found.add(word)
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                found |= {part for alias in aliases for part in [*alias.name.split("."), alias.asname or ""]}
                found |= set((getattr(node, "module", "") or "").split("."))
            case ast.Constant(value=str(words)) if id(node) not in said:
                found |= {name for name in names if re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", words)}
    return found & names


def test_the_methods_are_found() -> None:
    known = {
        "LoRA",
        "DynamicDoRA",
        "NormShare",
        "Taylor",
        "DEM",
        "Orthogonality",
        "lora",
        "dynamic_dora",
        "dynamic-dora",
    }
    assert known <= set(methods())
    assert not {"Adapter", "LowRank", "Importance", "RankPolicy", "Regularizer", "importance"} & set(methods())


def test_shared_code_names_no_method() -> None:
    files = [path.relative_to(PACKAGE).as_posix() for path in shared()]
    wanted = (
        "checkpoint/entry.py",
        "checkpoint/checks.py",
        "checkpoint/loading.py",
        "export.py",
        "compaction.py",
        "resizing.py",
        "heat_map.py",
        "surgery/injection.py",
        "cli.py",
    )
    wanted += ("rank/budget.py", "rank/policy.py", "callbacks/monitor.py", "callbacks/checkpoint.py")
    wanted += ("interop/layout.py", "planning/estimate.py", "planning/command.py", "rebuild.py", "validation.py")
    assert set(wanted) <= set(files)
    assert all((PACKAGE / file).is_file() for file in (*OF_PEFT, *OF_PAC_BAYES))
    names = set(methods())
    found = {(file, name) for file in files for name in named((PACKAGE / file).read_text(encoding="utf-8"), names)}
    assert found == set(REASONED)


def test_every_method_is_under_the_laws() -> None:
    """Every adapter and every importance of the package has its line in tests/laws; adopted ones need a PEFT model."""
    methods()  # imports all
    lines = (Path(__file__).parent / "laws" / "test_laws.py").read_text(encoding="utf-8")
    wanted = {leaf for kind in (Adapter, Importance) for leaf in leaves(kind)}
    missing = {
        leaf.__name__
        for leaf in wanted
        if not leaf.__module__.startswith("lightning_peft.interop.") and not re.search(rf"\b{leaf.__name__}\b", lines)
    }
    assert missing == set()


@pytest.mark.parametrize(
    "source",
    [
        "from lightning_peft.adapters.lora import LowRank",
        "import lightning_peft.adapters.lora as plain",
        "from lightning_peft import LoRA as Plain",
        "isinstance(adapter, adapters.LoRA)",
        "if type(adapter).__name__ == 'LoRA': pass",
        "if name in ('lora', 'other'): pass",
        "def f(): raise ValueError(f'not for LoRA: {name}')",
        "build(lora=3)",
        "match adapter:\n    case LoRA(): pass",
    ],
)
def test_the_scan_finds(source: str) -> None:
    assert named(source, {"LoRA", "lora"})


@pytest.mark.parametrize(
    "source",
    [
        "'lora_A.weight'",
        "names = ['lora_A.weight', 'dynamic-lora']",
        "def f():\n    'As LoRA does.'\n    return 1  # LoRA",
        "kind = 'LORA'",
        "from lightning_peft.adapters.low_rank import LowRank",
    ],
)
def test_the_scan_leaves(source: str) -> None:
    assert not named(source, {"LoRA", "lora"})
