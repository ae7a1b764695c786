"""What keeps the package readable, as numbers: `python -m tests.house` prints them, `tests/test_house.py` bounds them.

- Statements of the files that are the model and their utilities, without docstrings.
- Named parameters of every function. `forward` is left out: its parameters are the inputs of a model.
- Import circles between modules, imports inside of functions counted, those for type checkers not.
"""

import ast
from pathlib import Path

import networkx

SOURCE = Path(__file__).parents[1] / "src"
PACKAGE = SOURCE / "transformers_nextflow"
MOST_STATEMENTS, MOST_STATEMENTS_OF_GENERATION, MOST_PARAMETERS = 2_500, 200, 12
APART = ("data", "training", "doctor")  # packages of their own, imported only where they are used


def statements(path: Path) -> int:
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.stmt)]
    return sum(not _is_docstring(node) for node in nodes)


def _is_docstring(node: ast.stmt) -> bool:
    constant = node.value if isinstance(node, ast.Expr) else None
    return isinstance(constant, ast.Constant) and isinstance(constant.value, str)


def statements_of_the_model() -> dict[str, int]:
    """Statements of each file outside of `APART`."""
    files = {path: path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")}
    return {str(name): statements(path) for path, name in files.items() if name.parts[0] not in APART}


def named_parameters() -> dict[str, int]:
    """Named parameters of every function of the package but `forward`, `self` and `cls` not counted."""
    counts = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name != "forward":
                names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                where = f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}"
                counts[where] = len(set(names) - {"self", "cls"})
    return counts


def imports() -> dict[str, set[str]]:
    """What each module of both packages imports, see [`_imports`]."""
    found = {}
    for path in SOURCE.rglob("*.py"):
        module = ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        found[module] = _imports(ast.parse(path.read_text()), package)
    return found


def import_circles() -> list[list[str]]:
    """Groups of modules of both packages that import each other."""
    modules = imports()
    graph = networkx.DiGraph()
    graph.add_edges_from((module, name) for module, names in modules.items() for name in names if name in modules)
    circles = [sorted(group) for group in networkx.strongly_connected_components(graph) if len(group) > 1]
    return sorted(circles) + [[module] for module in networkx.nodes_with_selfloops(graph)]


def _imports(node: ast.AST, package: str) -> set[str]:
    """Absolute names that `from` and `import` below a node may mean, modules and their members alike."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return set()
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
        base = ".".join([*parents, *([node.module] if node.module else [])])
        return {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return {name for child in ast.iter_child_nodes(node) for name in _imports(child, package)}


def main() -> None:
    files = statements_of_the_model()
    for name, count in sorted(files.items(), key=lambda item: -item[1]):
        print(f"{count:6,}  {name}")
    print(f"{sum(files.values()):6,}  statements\n")
    longest = sorted(named_parameters().items(), key=lambda item: -item[1])[:8]
    for name, count in longest:
        print(f"{count:6}  parameters of {name}")
    circles = import_circles()
    print(f"\n{len(circles):6}  import circles", *map(", ".join, circles), sep="\n        ")


if __name__ == "__main__":
    main()
