"""manylora: one base language model, any number of LoRA adapters, one batch.

The six folders at the repository's root are linked into this package (see `docs/architecture.md`), so that
`manylora.scheduler` is the folder `scheduler/`. Importing `manylora` itself loads nothing heavy.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from manylora.runtime.engine import Engine

__version__ = "0.1.0"
__all__ = ["Engine", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from manylora.runtime.engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
