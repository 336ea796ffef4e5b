"""The CPU kernel, an extension in C. All else of the package stands in pyproject.toml.

Optional: without a compiler the install goes on and torch's operators do the work. The library says which files it was
built from, and Python refuses one that is older than they (`open_library` in engine/native/cpu.py).
"""

import hashlib
from pathlib import Path

from setuptools import Extension, setup

FILES = sorted(Path("engine/native").glob("*.[ch]"))
SOURCES = hashlib.sha256(b"".join(path.read_bytes() for path in FILES)).hexdigest()

setup(
    ext_modules=[
        Extension(
            "glmchat.engine.native._native",
            sources=[path.as_posix() for path in FILES if path.name in ("native.c", "search.c")],
            depends=[path.as_posix() for path in FILES],
            define_macros=[("GLM_SOURCES", f'"{SOURCES}"')],
            extra_compile_args=["-O3", "-g0", "-std=gnu11", "-pthread", "-Wno-psabi"],
            extra_link_args=["-pthread", "-lm"],
            optional=True,
        )
    ]
)
