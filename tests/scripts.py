"""The scripts in hub/ as functions, what they must end with, and the programs in benchmarks/ as modules."""

import contextlib
import importlib.util
import io
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def script(name):
    """The `main` of hub/NAME.py: it ends the process with the status of the command."""
    spec = importlib.util.spec_from_file_location(f"hub_script_{name}", ROOT / "hub" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@contextlib.contextmanager
def benchmark(name):
    """benchmarks/NAME.py as a module; it and what it has imported from there are forgotten after the block."""
    folder = ROOT / "benchmarks"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield importlib.import_module(name)
    for path in folder.glob("*.py"):
        sys.modules.pop(path.stem, None)


def refused(match, main, *arguments):
    """Runs a script that must end with one message that matches, and no traceback."""
    with contextlib.redirect_stderr(io.StringIO()) as said, pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code, "it ended well"
    message = ended.value.code if isinstance(ended.value.code, str) else said.getvalue()
    assert re.search(match, message, re.DOTALL), message
    assert message.startswith("error: ")
    return message


def done(main, *arguments):
    """Runs a script that must end well."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as ended:
        if ended.code:
            pytest.fail(f"it ended with {ended.code}")


def in_folder(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
