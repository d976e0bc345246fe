"""Who may import whom: read from the source, so that an import inside a function counts too."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest
from mutations import MUTATIONS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "timm_lowrank"


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(name, path, everywhere=True, types=False):
    """Absolute names of the modules that a module imports; with `everywhere` off, at its top level only, and with
    `types` there under `if TYPE_CHECKING:`, too."""
    tree = ast.parse(path.read_text())
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    nodes = list(ast.walk(tree)) if everywhere else tree.body
    if types:
        nodes = [inner for node in nodes for inner in (node.body if isinstance(node, ast.If) else [node])]
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, node.module] if node.module else base)
            # `from package import module` imports the module, `from module import name` the module that has the name.
            names |= {
                f"{source}.{alias.name}" if f"{source}.{alias.name}" in MODULES else source for alias in node.names
            }
    return names


def test_the_reader_of_imports_sees_what_is_there():
    factored = "timm_lowrank.core.factored"
    assert {"torch", "timm_lowrank.core.projection"} <= imports(factored, MODULES[factored])
    assert "timm_lowrank.core.model" in imports("timm_lowrank", MODULES["timm_lowrank"])
    assert len(MODULES) > 15


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("timm_lowrank.core")])
def test_the_core_imports_torch_alone(name):
    for imported in imports(name, MODULES[name]):
        top = imported.split(".")[0]
        inside = imported in ("timm_lowrank.core", "timm_lowrank.errors") or imported.startswith("timm_lowrank.core.")
        assert inside or top == "torch" or top in sys.stdlib_module_names, f"{name} imports {imported}"


@pytest.mark.parametrize("name", list(MODULES))
def test_the_library_does_not_import_its_scripts_and_tests(name):
    tops = {imported.split(".")[0] for imported in imports(name, MODULES[name])}
    assert tops.isdisjoint({"recipes", "hub", "benchmarks", "tests", "conftest", "train", "evaluate"})


def test_importing_the_package_needs_none_of_its_extras():
    """Followed from module to module through the imports at top level, parent packages included."""
    reached, waiting = set(), ["timm_lowrank", "timm_lowrank.__main__"]
    while waiting:
        name = waiting.pop()
        if name in reached:
            continue
        reached.add(name)
        if name in MODULES:
            waiting += imports(name, MODULES[name], everywhere=False)
            waiting += [name.rpartition(".")[0]] if "." in name else []
    tops = {name.split(".")[0] for name in reached}
    assert {"timm_lowrank", "timm_lowrank.core.branch", "timm_lowrank.layers"} <= reached
    dependencies = {"torch", "timm", "safetensors", "huggingface_hub", "jinja2"}
    assert tops - sys.stdlib_module_names <= {"timm_lowrank", *dependencies}


def test_there_are_no_cycles():
    """A package stands for its __init__ alone: `from .core import spectrum` does not depend on all of core."""
    card = "timm_lowrank.publish.card"
    assert "timm_lowrank.publish.record" in imports(card, MODULES[card], everywhere=False, types=True)
    graph = {
        name: imports(name, path, everywhere=False, types=True) & MODULES.keys() - {name}
        for name, path in MODULES.items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # its CycleError names them


ORDER = (
    "errors", "text", "records", "core", "files", "environment", "layers", "wrapping", "networks", "comparators",
    "evaluation", "checkpoint", "data", "drawing", "integrations", "training", "publish", "report", "suites",
    "reproduce", "cli", "__main__",
)  # fmt: skip


@pytest.mark.parametrize("name", [name for name in MODULES if name.count(".")])
def test_no_part_imports_one_above_it(name):
    """Imports at any depth."""
    parts = {module.split(".")[1] for module in imports(name, MODULES[name]) if module.startswith("timm_lowrank.")}
    rank = ORDER.index(name.split(".")[1])
    assert all(ORDER.index(other) <= rank for other in parts), f"{name} imports {sorted(parts)}"


def test_who_only_trains_does_not_wait_for_evaluation_and_publishing():
    code = """if True:
        import sys, torch, timm
        before = set(sys.modules)
        import timm_lowrank
        later = ("timm_lowrank.evaluation", "timm_lowrank.publish", "jinja2", "sklearn")
        print([name for name in sys.modules.keys() - before if name.startswith(later)])
        print([name for name in timm_lowrank.__all__ if getattr(timm_lowrank, name, None) is None])
        print(set(timm_lowrank.__all__) <= set(dir(timm_lowrank)), hasattr(timm_lowrank, "nothing"))
    """
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.split("\n") == ["[]", "[]", "True False", ""]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[mutation.name for mutation in MUTATIONS])
def test_a_deliberate_fault_finds_its_place(mutation):
    """Code that has moved would leave a fault of `mutations.py` that no longer shows what the tests catch."""
    assert (ROOT / mutation.file).read_text().count(mutation.old) == 1
