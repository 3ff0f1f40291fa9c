"""The walls of the house: who may import whom, who may speak, and how long a function may be."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1] / "largebatch"
# From the top down. Parts of one storey do not know each other, but for the ground floor's.
STOREYS = [
    {"cli", "__main__"},
    {"benchmark", "doctor", "reproduce", "use", "verify"},
    {"run"},
    {"runfolder"},
    {"resume"},
    {"plan"},
    {"config"},
    {"training"},
    {"data", "models", "distributed", "report"},
    {"recipe"},
    {"configfile"},
    {"section", "importing", "wording", "errors", "arguments"},
]
# largebatch/__init__.py is the front door: it hands out names of many parts, when they are asked for.
FRONT_DOOR = "__init__"
SPEAKERS = {
    "cli.py",
    "run.py",
    "runfolder.py",
    "verify.py",
    "benchmark/command.py",
    "reproduce/command.py",
    "report/progress.py",
    "use/commands.py",
}
MODULES = sorted(HOUSE.rglob("*.py"))
LONGEST_FUNCTION = 70  # lines


def name_of(path: Path) -> str:
    return path.relative_to(HOUSE).as_posix()


def part_of(path: Path) -> str:
    """The part of the house that a module belongs to: a folder, or a module of its own."""
    first = path.relative_to(HOUSE).parts[0]
    return first.removesuffix(".py")


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import, inside functions and for type checking too."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: imports are absolute"
            assert node.module is not None
            yield node.lineno, node.module
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def imported_parts(path: Path) -> Iterator[tuple[int, str]]:
    """Line and part of every import from this house."""
    parts = {p for storey in STOREYS for p in storey}
    for line, module in imported_modules(path):
        if module.startswith("largebatch."):
            part = module.split(".")[1]
            assert part in parts, f"{name_of(path)}:{line}: {module} has no storey; give it one in this test"
            yield line, part


def storey(part: str) -> int:
    return next(level for level, parts in enumerate(STOREYS) if part in parts)


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_every_part_has_a_storey() -> None:
    assert {part_of(path) for path in MODULES} <= {p for parts in STOREYS for p in parts} | {FRONT_DOOR}


def test_imports_run_downwards_only() -> None:
    wrong = []
    for path in MODULES:
        here = part_of(path)
        if here == FRONT_DOOR:
            continue
        for line, there in imported_parts(path):
            upwards = storey(there) < storey(here)
            sideways = storey(there) == storey(here) != len(STOREYS) - 1 and there != here
            if upwards or (sideways and here != "__main__"):
                wrong.append(f"{name_of(path)}:{line} imports {there}")
    assert not wrong


def test_no_module_imports_the_front_door() -> None:
    found = [
        f"{name_of(path)}:{line}"
        for path in MODULES
        for line, module in imported_modules(path)
        if module == "largebatch"
    ]
    assert not found


def test_only_distributed_knows_torch_distributed() -> None:
    wrong = []
    for path in MODULES:
        if part_of(path) == "distributed":
            continue
        wrong += [name_of(path) for _, module in imported_modules(path) if module.startswith("torch.distributed")]
        wrong += [
            f"{name_of(path)}:{node.lineno}"
            for node in ast.walk(parsed(path))
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed"
        ]
    assert not wrong


def test_nothing_speaks_but_the_speakers() -> None:
    wrong = []
    for path in MODULES:
        if name_of(path) in SPEAKERS:
            continue
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stdout.write"):
                wrong.append(f"{name_of(path)}:{node.lineno}")
    assert not wrong


def test_only_the_command_line_reads_its_arguments() -> None:
    readers = [
        name_of(path)
        for path in MODULES
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.argv"
    ]
    assert set(readers) <= {"cli.py"}


def test_functions_fit_a_screen() -> None:
    lengths = {
        f"{name_of(path)}:{node.lineno} {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in MODULES
        for node in functions(path)
    }
    assert not {place: length for place, length in lengths.items() if length > LONGEST_FUNCTION}


def test_public_modules_classes_and_functions_say_what_they_are() -> None:
    silent = []
    for path in MODULES:
        tree = parsed(path)
        if tree.body and not ast.get_docstring(tree):
            silent.append(name_of(path))
        for node in tree.body:
            is_definition = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            if is_definition and not node.name.startswith("_") and not ast.get_docstring(node):
                silent.append(f"{name_of(path)}:{node.lineno} {node.name}")
    assert not silent


def test_no_drawer_for_odds_and_ends() -> None:
    drawers = {"utils", "util", "helpers", "misc", "common"}
    assert not [name_of(path) for path in MODULES if drawers & set(path.relative_to(HOUSE).with_suffix("").parts)]
    full = [name_of(path) for path in HOUSE.glob("*/**/__init__.py") if path.read_text().strip()]
    assert not full, "a package's __init__ stays empty"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["config", "schema"],
        ["plan", "configs/imagenet_resnet50.yaml"],
        ["config", "show", "configs/imagenet_resnet50.yaml"],
    ],
    ids=" ".join,
)
def test_commands_that_compute_nothing_do_not_load_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from largebatch.cli import main; status = main(sys.argv[1:]);"
        "print(status, *sorted({'torch', 'torchvision', 'matplotlib', 'tensorboard'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=HOUSE.parent, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "0"
