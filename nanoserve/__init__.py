"""nanoserve: one Nemotron-H model, one GPU, one stream of tokens.

    import nanoserve
    with nanoserve.load("path/to/checkpoint") as engine:
        print(engine.generate("Hello", max_tokens=64).text)

Importing this imports neither torch nor triton; `load` and `generate` do.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanoserve.request import SamplingParams

if TYPE_CHECKING:
    from nanoserve.local import generate, load

__version__ = "0.1.0"
__all__ = ["SamplingParams", "__version__", "generate", "load"]

_HERE = Path(__file__).parent
if not (_HERE / "kernels").is_dir() and (_HERE.parent / "kernels").is_dir():
    # A checkout without symbolic links (a zip; git on some file systems writes text files instead): find models/
    # and kernels/ beside us. Only then: an installed package would otherwise pick up the unrelated distribution
    # called `kernels`.
    __path__.append(str(_HERE.parent))


def __getattr__(name: str) -> Any:
    if name in ("generate", "load"):
        from nanoserve import local

        return getattr(local, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
