"""XLA's cache of compiled programs, so that later runs of the same kind start at once.

NGD_JAX_CACHE sets the folder, or is `off`; JAX's own settings take precedence. The
default is a subfolder of the user's cache folder for each kind of processor: a program
compiled for another processor may crash on an instruction that this one lacks.
"""

import hashlib
import os
import platform
from pathlib import Path

import jax

__all__ = ["use_cache"]


def use_cache() -> None:
    """Lets JAX cache programs that take long to compile, unless the user opted out."""
    folder = os.environ.get("NGD_JAX_CACHE") or _usual_folder()
    if folder != "off" and jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", folder)


def _usual_folder() -> str:
    try:
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # a user without a home folder
        return "off"
    processor = hashlib.sha256(_processor().encode()).hexdigest()[:8]
    return str(Path(caches) / "ngd_jax" / f"xla-{processor}")


def _processor() -> str:
    """Describes what the processor can do, if the system reports it."""
    kind = platform.machine() + platform.processor()
    description = Path("/proc/cpuinfo")
    if not description.exists():
        return kind
    lines = description.read_text().splitlines()
    features = (line for line in lines if line.startswith(("flags", "Features")))
    return kind + next(features, "")
