"""One law holds the package together: a file imports from lower rooms, never upwards or in circles.

A new file needs a line in `ROOMS`.  If no room fits, think again about what the file is.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parent.parent / "hooked_vlm"
ROOMS = (  # from the ground up; a name stands for itself and for everything inside it
    ("ground", "errors calls caches shapes devices processors experiments.result"),
    ("geometry", "coverage spans regions grid pixels pairing drawing image_tokens stimuli"),
    (
        "numbers",
        "statistics agreement directions probes scoring plots charts provenance "
        "stimuli.whatsup stimuli.coco stimuli.coco_boxes stimuli.settings",
    ),
    ("tree", "naming blocks projector anatomy attention layout windows points towers"),
    (
        "sites",
        "sites config footprint memory generation hooks cache routing measured image_grids videos "
        "processing inputs describe",
    ),
    ("model", "partial zoo loading hooked encoder_inputs encoder model residual_sums laws"),
    (
        "interventions",
        "places guarded recordings interventions kernels engine known replay tower_restart restart "
        "growing gradients attribution sweep sweep_law checkup patching",
    ),
    ("experiments", "experiments"),
    ("outside", "figures store report runner"),
    ("door", "progress cli __init__"),
)
LAZY = {"cli", "__init__"}  # may import inside functions, to answer --help at once
ALONE = {
    "matplotlib": "plots charts",
    "typer": "cli",
    "rich": "cli progress",
    "jinja2": "report",
    "triton": "kernels.triton",
}
MAX_LINES = 400
MAX_FUNCTION_LINES = 80


def sources() -> dict[str, ast.Module]:
    """Every module of the package by its name below it: `model`, `stimuli.pairs`, `stimuli`."""
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


def room(name: str) -> int:
    """The level of the longest entry that `name` is or lies in."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        for level, (_, names) in enumerate(ROOMS):
            if ".".join(parts[:length]) in names.split():
                return level
    pytest.fail(f"hooked_vlm/{name.replace('.', '/')}.py stands in no room of tests/test_layers.py")


@pytest.mark.parametrize("name", SOURCES)
def test_imports_go_down(name: str) -> None:
    if name == "__init__":
        return  # re-exports from everywhere
    for target in own_imports(name):
        assert target, f"{name} imports from the package root; import from the file itself"
        assert room(target) <= room(name), (
            f"{name} ({ROOMS[room(name)][0]}) imports {target} ({ROOMS[room(target)][0]}), above it"
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
