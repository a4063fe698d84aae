"""Who may import whom, what is public, and that the package is light to import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import m3asr

PACKAGE = Path(m3asr.__file__).parent
# Modules without an entry may import any of ours. `config` and `errors` are open to all but `trt`.
ALLOWED = {
    "audio": {"containers"},
    "containers": set(),
    "features": set(),
    "tokenizer": set(),
    "decode": set(),
    "config": set(),
    "errors": set(),
    "files": set(),
    "ops": set(),
    "model": {"ops"},
    "formats": {"decode", "files"},
    "quantized": set(),
    "folder": {"features", "quantized", "tokenizer"},
    "checkpoint": {"features", "model", "recipe", "tokenizer"},
    "recipe": set(),
    "engines": {"folder", "kernels", "model", "ops", "trt"},
    "kernels": set(),
    "trt": set(),
}


def imports_of(path: Path) -> set[str]:
    """Our modules that a file imports, by their first name below the package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            if node.module == "m3asr":
                names = [f"m3asr.{alias.name}" for alias in node.names]
            else:
                names = [node.module]
        found |= {name.split(".")[1] for name in names if name.startswith("m3asr.")}
    return found


def test_dependencies_go_one_way():
    for path in PACKAGE.rglob("*.py"):
        module = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if module in ALLOWED:
            common = {"__version__"} if module == "trt" else {"__version__", "config", "errors"}
            extra = imports_of(path) - ALLOWED[module] - common - {module}
            assert not extra, f"{path.relative_to(PACKAGE)} must not import {', '.join(sorted(extra))}"


def test_only_transcribe_and_what_stands_on_it_joins_stages():
    above = {"transcribe", "cli", "__init__", "evaluate", "stream", "verify", "routing", "bench"}
    for path in PACKAGE.rglob("*.py"):
        module = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if "transcribe" in imports_of(path):
            assert module in above, path


def test_public_names():
    assert sorted(m3asr.__all__) == m3asr.__all__
    for name in m3asr.__all__:
        assert getattr(m3asr, name).__doc__, f"{name} has no docstring"


def test_import_is_light():
    heavy = "torch", "onnxruntime", "av", "triton", "soundfile", "typer"
    code = f"import sys, m3asr; print([m for m in {heavy!r} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
