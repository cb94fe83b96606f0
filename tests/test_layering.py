"""Who may import whom, as data. A process that must stay light is light because of what it cannot import."""

import graphlib

from tests.source_tree import FOLDERS, imports, modules, our_imports

# The modules of a layer: folders, or single modules where a folder is cut in two.
LAYERS: dict[str, tuple[str, ...]] = {
    "contracts": (
        "runtime.errors",
        "runtime.config",
        "runtime.bounds",
        "runtime.adapter_access",
        "runtime.model_config",
        "runtime.sampling_params",
        "runtime.plan",
        "runtime.messages",
        "runtime.ipc",
        "runtime.log",
        "runtime.child",
    ),
    "pure lora": ("lora.page_layout", "lora.adapter_config"),
    "kernels": ("kernels",),
    "lora": ("lora",),
    "scheduler": ("scheduler",),
    "tokenizer_manager": ("tokenizer_manager",),
    "tp_worker": ("tp_worker",),
    "entry points": ("runtime",),
}
MAY_IMPORT: dict[str, set[str]] = {
    "contracts": {"contracts"},
    "pure lora": {"contracts", "pure lora"},
    "kernels": {"kernels"},
    "lora": {"contracts", "pure lora", "kernels", "lora"},
    "scheduler": {"contracts", "pure lora", "scheduler"},
    "tokenizer_manager": {"contracts", "tokenizer_manager"},
    "tp_worker": {"contracts", "pure lora", "kernels", "lora", "tp_worker"},
    "entry points": {"contracts", "pure lora", "tokenizer_manager", "entry points"},
}
# Outside packages that only some layers may load.
HEAVY = {
    "torch": {"kernels", "lora", "tp_worker"},
    "triton": {"kernels"},
    "safetensors": {"lora", "tp_worker"},
    "transformers": set[str](),
    "peft": set[str](),
    "llguidance": {"scheduler"},
    "aiohttp": {"entry points"},
    "prometheus_client": {"entry points"},
    "zmq": {"contracts", "lora", "scheduler", "tp_worker", "entry points", "tokenizer_manager"},
}


def layer(module: str) -> str:
    """The first layer that names the module or its folder: single modules come before the rest of their folder."""
    for name, members in LAYERS.items():
        if module in members:
            return name
    return next(name for name, members in LAYERS.items() if module.split(".")[0] in members)


def test_imports_go_down() -> None:
    upward = [
        f"{module} ({layer(module)}) imports {name} ({layer(name)})"
        for module in modules()
        for name in our_imports(module)
        if layer(name) not in MAY_IMPORT[layer(module)]
    ]
    assert not upward


def test_heavy_packages_stay_in_their_layers() -> None:
    misplaced = [
        f"{module} ({layer(module)}) imports {name}"
        for module, path in modules().items()
        for name in HEAVY.keys() & {name.split(".")[0] for name in imports(path)}
        if layer(module) not in HEAVY[name]
    ]
    assert not misplaced


def test_imports_are_absolute_and_by_the_packages_name() -> None:
    """A flat `import kernels` would be a second copy of the module under another name, or another project's."""
    flat = [
        f"{module} imports {name}"
        for module, path in modules().items()
        for name in imports(path)
        if name.startswith(".") or name.split(".")[0] in FOLDERS
    ]
    assert not flat


def test_there_is_no_cycle() -> None:
    graph = {module: our_imports(module) for module in modules()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_every_layer_is_inhabited() -> None:
    """A renamed contract would otherwise silently fall into the rest of its folder."""
    assert {layer(module) for module in modules()} == set(LAYERS)
    single = {member for members in LAYERS.values() for member in members if "." in member}
    assert single <= modules().keys()
