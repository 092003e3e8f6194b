"""The documentation as far as it can be checked without building it: `make docs` does that, warnings being errors."""

import re
from pathlib import Path
from typing import Any

import pytest

from bnn_jax.report.documents import documents
from tests.conftest import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.glob("**/*.md"))


def read_yaml(name: str) -> Any:
    """A file with tags of its own, whose values are texts."""
    yaml = pytest.importorskip("yaml")
    return yaml.load((ROOT / name).read_text(), Loader=yaml.BaseLoader)


def pages_in(entry: Any) -> list[str]:
    """The pages of a navigation, depth first."""
    if isinstance(entry, str):
        return [entry]
    values = entry.values() if isinstance(entry, dict) else entry
    return [page for value in values for page in pages_in(value)]


def test_the_navigation_holds_every_page_once():
    assert sorted(pages_in(read_yaml("mkdocs.yml")["nav"])) == [str(path.relative_to(DOCS)) for path in PAGES]


@pytest.mark.parametrize("path", [*documents(ROOT), ROOT / "CONTRIBUTING.md"], ids=lambda path: path.stem)
def test_links_lead_to_files(path: Path):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            found = (path.parent / target).resolve()
            assert found.exists(), f"{path.name}: {target}"
            assert path.parent == ROOT or DOCS in found.parents, (
                f"{path.name}: {target} is no page of the documentation"
            )


def test_the_address_of_the_repository_is_the_same_everywhere():
    [address] = re.findall(r'^REPOSITORY = "(.+?)"', (ROOT / "setup.py").read_text(), re.MULTILINE)
    assert read_yaml("mkdocs.yml")["repo_url"] == read_yaml("CITATION.cff")["repository-code"] == address
    files = [DOCS / "add_a_quantizer.md", *sorted((ROOT / "notebooks").glob("*.ipynb"))]
    for path in files:
        assert address in path.read_text(encoding="utf-8"), f"{path.name}: another address than setup.py's {address}"


def test_the_papers_of_all_methods_can_be_cited():
    notes = " ".join(entry["notes"] for entry in read_yaml("CITATION.cff")["references"])
    assert all(name in notes for name in ("ASBQ", "SKD-BNN", "SNN", "Weight Search", "BASQ", "ReCU"))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_formulas_are_understood(path: Path):
    # A name that the converter does not know stays as it was written; \x03 ends what Markdown's tables took out.
    markdown, formulas = pytest.importorskip("markdown"), pytest.importorskip("l2m4m")
    extensions = ["tables", formulas.LaTeX2MathMLExtension()]
    page = markdown.markdown(path.read_text(encoding="utf-8"), extensions=extensions)
    for formula in re.findall(r"<math.*?</math>", page, re.DOTALL):
        assert "\\" not in formula and "\x03" not in formula
