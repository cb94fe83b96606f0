"""What holds for the whole source: no unsafe decoding, no hidden weight, no module that needs another's luck."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from manylora.runtime.flags import FLAGS
from tests.source_tree import FOLDERS, REPOSITORY, imports, modules, syntax
from tests.test_layering import layer

MAX_LINES = 320
WHOLE_ON_PURPOSE = {"runtime.messages": 440}  # the protocol is read in one piece
UNSAFE_MODULES = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "marshal",
    "shelve",
    "multiprocessing",
    "joblib",
}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "os.system", "yaml.load"}
UNSAFE_KEYWORDS = {"trust_remote_code", "shell"}

FLAG_NAMES = """
--model-path --model --tokenizer-path --served-model-name --chat-template --load-format --dtype --device --context-length
--random-seed --tp-size --tp --host --port --api-key-file --admin-key-file --insecure
--adapter-root --allow-hub --enable-lora --lora-paths --max-loras-per-batch --max-loaded-loras
--lora-backend --max-lora-rank --lora-target-modules --lora-sharding --page-size --mem-fraction-static
--max-total-tokens --disable-radix-cache --host-fraction --max-running-requests --max-queued-requests
--chunked-prefill-size --disable-overlap-schedule --cuda-graph-max-bs --log-level --log-format
"""
ROUTES = """
POST /generate, PUT /generate, POST /abort_request, GET /health_generate, POST /v1/completions,
POST /v1/chat/completions, GET /v1/models, GET /v1/models/{model}, POST /load_lora_adapter,
POST /unload_lora_adapter, GET /v1/adapters, GET /v1/adapters/{name}, PUT /v1/adapters/{name},
PATCH /v1/adapters/{name}, DELETE /v1/adapters/{name}, GET /health, GET /get_model_info, GET /get_server_info,
GET /flush_cache, POST /flush_cache, GET /metrics, GET /openapi.json, GET /, GET /dashboard/{file}
"""

# Forks once per module from a process that has loaded the heavy packages already, so that each import is a first one
# and still takes no seconds. Prints the modules that cannot be imported, or that load what `banned` names.
IMPORT_EACH = """
import importlib, os, sys, traceback, warnings
preload, banned, modules = (words.split() for words in sys.argv[1:4])
for name in preload:
    importlib.import_module(name)
warnings.simplefilter("error")
for module in modules:
    child = os.fork()
    if child == 0:
        try:
            importlib.import_module(module)
            loaded = sorted(set(banned) & set(sys.modules))
            assert not loaded, f"{module} loads {loaded}"
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print(module)
"""


def test_files_can_be_read_in_one_sitting() -> None:
    lengths = {module: len(path.read_text().splitlines()) for module, path in modules().items()}
    assert not {m: length for m, length in lengths.items() if length > WHOLE_ON_PURPOSE.get(m, MAX_LINES)}


def test_every_module_says_what_it_is() -> None:
    assert not [module for module, path in modules().items() if not ast.get_docstring(syntax(path))]


def test_nothing_unsafe_is_used() -> None:
    """Nothing that turns bytes of a stranger into code."""
    found: list[str] = []
    for module, path in modules().items():
        found += [
            f"{module} imports {name}" for name in imports(path) if name.split(".")[0] in UNSAFE_MODULES
        ]
        for node in ast.walk(syntax(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in UNSAFE_CALLS:
                found.append(f"{module}:{node.lineno} calls {ast.unparse(node.func)}")
            if isinstance(node, ast.keyword) and node.arg in UNSAFE_KEYWORDS:
                found.append(f"{module}:{node.lineno} passes {node.arg}")
    assert not found


def test_the_six_folders_are_no_packages_of_their_own() -> None:
    """With an `__init__.py`, `kernels/` at the root would pass for another project's package."""
    assert not [path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("__init__.py")]
    links = {
        path.name: path.readlink() for path in (REPOSITORY / ".pkg/manylora").iterdir() if path.is_symlink()
    }
    assert links == {folder: Path("../..") / folder for folder in FOLDERS}


@pytest.mark.parametrize("torch_free", [True, False])
def test_each_module_imports_alone(torch_free: bool) -> None:
    """In a process that has imported none of ours before, with warnings as errors; the pure ones without torch."""
    pure = {"contracts", "pure lora", "scheduler", "tokenizer_manager", "entry points"}
    names = [f"manylora.{module}" for module in modules() if (layer(module) in pure) == torch_free]
    preload = "msgspec zmq" if torch_free else "msgspec zmq torch triton safetensors.torch"
    banned = "torch triton transformers numpy" if torch_free else ""
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_EACH, preload, banned, " ".join(names)],
        cwd=REPOSITORY,
        env={"PYTHONPATH": str(REPOSITORY / ".pkg"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "", result.stderr


def test_the_flags_are_these() -> None:
    """A flag is a promise: adding one is a decision, dropping one breaks somebody's script."""
    assert [name for flag in FLAGS for name in (flag.option, *flag.aliases)] == FLAG_NAMES.split()


def test_the_routes_are_these() -> None:
    from manylora.runtime.http.server import ROUTES as served

    assert [f"{route.method} {route.published_path}" for route in served] == ROUTES.replace(
        "\n", " "
    ).strip().split(", ")
