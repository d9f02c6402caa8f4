"""One law holds the package together: a file imports from lower packages, never in circles.

A new folder needs a place in `ORDER`.  If none fits, think again about what it is.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parent.parent / "hooked_vlm"
ORDER = (  # from the ground up; packages of one line do not know each other
    "errors",
    "arguments disk",
    "extensions",
    "anatomy regions",
    "hooks analysis",
    "inputs stimuli",
    "zoo",
    "model",
    "interventions",
    "engine features",
    "sweeps",
    "checks experiments",
    "viewer",
    "report",
    "cli",
    "__main__",
)
ROOT = {"__init__.py", "__main__.py", "errors.py", "py.typed"}
LAZY = {
    "cli.running",
    "cli.showing",
    "cli.viewing",
    "__init__",
}  # may import inside functions, to answer --help at once
ALONE = {
    "matplotlib": "report.look report.charts report.maps",
    "typer": "cli.app cli.parameters cli.running cli.showing cli.viewing",
    "rich": "cli.running report.progress",
    "jinja2": "report.markup viewer.page",
    "triton": "engine.kernels.triton",
}
MAX_LINES = 400
MAX_FUNCTION_LINES = 80


def sources() -> dict[str, ast.Module]:
    """Every module of the package by its name below it: `cli`, `stimuli.pairs`, `stimuli`."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = ast.parse(path.read_text(), str(path))
    return found


SOURCES = sources()


def imports(name: str) -> Iterator[tuple[str, ast.stmt]]:
    """The dotted names that a module imports, with the statement."""
    for node in ast.walk(SOURCES[name]):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import on line {node.lineno}"
            module = str(node.module)
            yield from ((_target(module, alias.name), node) for alias in node.names)


def _target(module: str, imported: str) -> str:
    """`from hooked_vlm.stimuli import pairs` imports a module, `… import draw` from one."""
    inner = f"{module}.{imported}".removeprefix("hooked_vlm.")
    return f"hooked_vlm.{inner}" if inner in SOURCES else module


def own_imports(name: str) -> set[str]:
    inside = {target for target, _ in imports(name) if target.split(".")[0] == "hooked_vlm"}
    return {target.removeprefix("hooked_vlm").removeprefix(".") for target in inside}


def package(name: str) -> str:
    """The folder of the package that a module lies in, or the module in the package's root."""
    return name.split(".")[0]


def level(name: str) -> int:
    for number, packages in enumerate(ORDER):
        if package(name) in packages.split():
            return number
    pytest.fail(f"hooked_vlm/{package(name)} has no place in ORDER of tests/test_layers.py")


def test_nothing_else_lies_in_the_root() -> None:
    files = {path.name for path in PACKAGE.iterdir() if path.is_file()}
    assert files <= ROOT


@pytest.mark.parametrize("name", SOURCES)
def test_imports_go_down(name: str) -> None:
    if name == "__init__":
        return  # re-exports from everywhere
    for target in own_imports(name):
        assert target, f"{name} imports from the package root; import from the file itself"
        assert package(target) == package(name) or level(target) < level(name), (
            f"{name} imports {target}, which is not below it"
        )


def test_no_cycles() -> None:
    graph = {name: own_imports(name) & set(SOURCES) for name in SOURCES if name != "__init__"}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"cycle: {' -> '.join((*path[path.index(name) :], name))}"
        if name not in done:
            for target in graph.get(name, ()):
                visit(target, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("name", sorted(set(SOURCES) - LAZY))
def test_own_modules_are_imported_at_the_top(name: str) -> None:
    top = set(SOURCES[name].body)
    inner = [
        f"line {node.lineno}"
        for target, node in imports(name)
        if target.startswith("hooked_vlm") and node not in top
    ]
    assert inner == [], f"{name} imports from the package inside a function: {inner}"


@pytest.mark.parametrize(("library", "owner"), ALONE.items())
def test_library_stays_in_one_file(library: str, owner: str) -> None:
    users = {
        name for name in SOURCES for target, _ in imports(name) if target.split(".")[0] == library
    }
    assert users <= set(owner.split())


@pytest.mark.parametrize("name", SOURCES)
def test_files_and_functions_are_short(name: str) -> None:
    path = PACKAGE / f"{name.replace('.', '/')}.py"
    path = path if path.exists() else PACKAGE / name.replace(".", "/") / "__init__.py"
    assert len(path.read_text().splitlines()) <= MAX_LINES
    for node in ast.walk(SOURCES[name]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = int(node.end_lineno or 0) - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{name}.{node.name} has {lines} lines"


@pytest.mark.parametrize("name", SOURCES)
def test_every_file_says_what_it_is(name: str) -> None:
    tree = SOURCES[name]
    assert not tree.body or ast.get_docstring(tree), f"{name} has no module docstring"
