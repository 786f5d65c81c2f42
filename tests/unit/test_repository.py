"""The repository as a whole: links that lead somewhere, versions that agree, imports that stay out."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lmd.v1.version import __version__

ROOT = Path(__file__).resolve().parent.parent.parent
DOCUMENTS = sorted(
    path for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("tests/**/*.md")] if path.is_file()
)

IMPORT_CHECK = """
import pkgutil, sys
import lmd.daemon
for module in pkgutil.walk_packages(lmd.daemon.__path__, "lmd.daemon."):
    __import__(module.name)
print(" ".join(name for name in ("llama_cpp", "jinja2", "numpy", "huggingface_hub") if name in sys.modules))
"""


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    broken = [
        target
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text())
        if "://" not in target and not (document.parent / target).exists()
    ]
    assert broken == []


def test_the_changelog_knows_this_version() -> None:
    headings = re.findall(r"^## \[?([^\]\s]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert "Unreleased" in headings or __version__ in headings


def test_the_daemon_imports_no_engine_template_library_or_hub_client() -> None:
    """The engine and templates belong to the runner; the Hub client costs memory that an idle daemon must not use."""
    done = subprocess.run([sys.executable, "-c", IMPORT_CHECK], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_every_decision_has_its_parts() -> None:
    for page in sorted((ROOT / "docs" / "adr").glob("*.md")):
        text = page.read_text()
        for part in ("- State: ", "- Date: ", "## Context", "## Decision", "## Rationale", "## Consequences"):
            assert part in text, f"{page.name} lacks {part!r}"


def test_every_import_of_the_product_is_a_declared_dependency() -> None:
    """What only a developer's environment provides is missed by nobody but users."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {normal(re.match(r"[\w.-]+", line)[0]) for line in project["dependencies"]}  # type: ignore[index]
    providers = importlib.metadata.packages_distributions()
    missing = set()
    for source in [path for root in ("registry", "daemon", "cli") for path in (ROOT / root).rglob("*.py")]:
        for node in ast.walk(ast.parse(source.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names = [node.module]
            for name in names:
                top = name.partition(".")[0]
                if top in sys.stdlib_module_names or top in ("lmd", "google"):
                    continue  # google.* is a namespace that protobuf and googleapis-common-protos share
                if not declared & {normal(provider) for provider in providers.get(top, ())}:
                    missing.add(f"{source.relative_to(ROOT)}: {name}")
    assert missing == set()


def normal(name: str) -> str:
    """Return the name of a distribution as the package index compares it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()
