"""XLA's cache of compiled programs, so that the next run of a kind starts at once.

NGD_JAX_CACHE names its folder, or is `off`; JAX's own settings go before. The usual
place is the user's cache folder, in a folder for each kind of processor: a program that
was compiled for another one may end at an instruction that this one does not have.
"""

import hashlib
import os
import platform
from pathlib import Path

import jax

__all__ = ["use_cache"]


def use_cache() -> None:
    """Lets JAX keep what takes long to compile, unless the user does not want it."""
    folder = os.environ.get("NGD_JAX_CACHE") or _usual_folder()
    if folder != "off" and jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", folder)


def _usual_folder() -> str:
    try:
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # a user without a home
        return "off"
    processor = hashlib.sha256(_processor().encode()).hexdigest()[:8]
    return str(Path(caches) / "ngd_jax" / f"xla-{processor}")


def _processor() -> str:
    """Describes what the processor can do, where the system says it."""
    kind = platform.machine() + platform.processor()
    description = Path("/proc/cpuinfo")
    if not description.exists():
        return kind
    lines = description.read_text().splitlines()
    features = (line for line in lines if line.startswith(("flags", "Features")))
    return kind + next(features, "")
