"""The product's modules and what each of them imports, read from the source."""

import ast
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
FOLDERS = ("runtime", "tokenizer_manager", "scheduler", "tp_worker", "lora", "kernels")
PACKAGE = "manylora"


@cache
def modules() -> dict[str, Path]:
    """`runtime.ipc` -> its file, for every module of the six folders."""
    files = [path for folder in FOLDERS for path in sorted((REPOSITORY / folder).rglob("*.py"))]
    return {".".join(path.relative_to(REPOSITORY).with_suffix("").parts): path for path in files}


@cache
def syntax(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def imports(path: Path) -> set[str]:
    """Every module a file imports anywhere in it, ours as `manylora.runtime.ipc`; `from a import b` counts as a.b
    where that is a module of ours, else as a."""
    found: set[str] = set()
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                found.add(whole if whole.removeprefix(PACKAGE + ".") in modules() else base)
    return found


def our_imports(module: str) -> set[str]:
    """The modules of ours that `module` imports, named as in `modules`."""
    names = imports(modules()[module])
    return {name.removeprefix(PACKAGE + ".") for name in names if name.startswith(PACKAGE + ".")}
