"""The files around the code: what a release and a public CI read."""

from __future__ import annotations

import os
import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import layersample
from tests.documents import ROOT, text_of

PROJECT = tomllib.loads(text_of(ROOT / "pyproject.toml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_the_version_has_one_source() -> None:
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert version("layersample") == layersample.__version__
    citation = yaml.safe_load(text_of(ROOT / "CITATION.cff"))
    assert citation["version"] == layersample.__version__
    assert citation["license"] == PROJECT["project"]["license"]
    assert f"## {layersample.__version__} (" in text_of(ROOT / "CHANGELOG.md")


def test_a_project_with_a_home_names_it_everywhere() -> None:
    """Pictures and links of the README must be absolute then: on PyPI there is nothing beside it."""
    has_home = "urls" in PROJECT["project"]
    pages = [text_of(ROOT / "README.md"), text_of(ROOT / "docs" / "getting-started.md")]
    assert all(("URL-OF-THIS-REPOSITORY" not in page) == has_home for page in pages)
    assert ("repository-code" in yaml.safe_load(text_of(ROOT / "CITATION.cff"))) == has_home
    targets = re.findall(r"\]\(([^)\s]+)\)", pages[0])
    assert any(not re.match(r"https?://|#", target) for target in targets) != has_home


def test_the_changelog_sorts_what_changed() -> None:
    kinds = re.findall(r"^### (.+)$", text_of(ROOT / "CHANGELOG.md"), re.MULTILINE)
    assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert kinds[:3] == ["Added", "Changed", "Fixed"]


@pytest.mark.parametrize("path", [p for p in FORMS if p.name != "config.yml"], ids=lambda path: path.stem)
def test_issue_forms_ask_for_something(path: Path) -> None:
    form = yaml.safe_load(text_of(path))
    assert form["name"] and form["description"]
    asked = [part for part in form["body"] if part["type"] in ("textarea", "input", "dropdown")]
    assert any(part.get("validations", {}).get("required") for part in asked)
    assert len({part["id"] for part in form["body"]}) == len(form["body"])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_scripts_that_are_there(path: Path) -> None:
    workflow = yaml.safe_load(text_of(path))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    scripts = [word for step in steps for word in step.get("run", "").split() if word.startswith(".ci/")]
    assert scripts
    assert [name for name in scripts if not os.access(ROOT / name, os.X_OK)] == []
    extras = [extra for step in steps for extra in re.findall(r"\.\[(\w+)\]", step.get("run", ""))]
    assert set(extras) <= set(PROJECT["project"]["optional-dependencies"])


def test_every_extra_is_explained() -> None:
    text = text_of(ROOT / "docs" / "getting-started.md")
    table = text[text.index("| extra | what it adds |") : text.index("## The first run")]
    assert [x for x in PROJECT["project"]["optional-dependencies"] if f"`{x}`" not in table] == []


def test_every_distribution_of_an_extra_is_pinned() -> None:
    names = {
        re.split(r"[<>=\[; ]", requirement)[0].lower()
        for requirements in (
            PROJECT["project"]["dependencies"],
            *PROJECT["project"]["optional-dependencies"].values(),
        )
        for requirement in requirements
    } - {"layersample"}
    pinned = {line.split("==")[0].lower() for line in text_of(ROOT / "constraints.txt").splitlines()}
    assert names <= {name.replace("_", "-") for name in pinned} | pinned


def versions_of(name: str) -> dict[str, Version]:
    lines = [line for line in text_of(ROOT / name).splitlines() if line and not line.startswith("#")]
    return {package: Version(v) for package, v in (line.split("==") for line in lines)}


def test_the_oldest_set_is_where_the_ranges_begin() -> None:
    project = PROJECT["project"]
    ranges = [Requirement(r) for r in (*project["dependencies"], *project["optional-dependencies"]["train"])]
    least = {
        r.name: Version(clause.version) for r in ranges for clause in r.specifier if clause.operator == ">="
    }
    oldest = versions_of("constraints/oldest.txt")
    assert oldest == {name: least[name] for name in oldest} and "transformers" in oldest


def test_the_newest_set_is_newer_than_the_pinned_one() -> None:
    pinned, newest = versions_of("constraints.txt"), versions_of("constraints/newest.txt")
    assert newest and all(version > pinned[name] for name, version in newest.items())


def test_the_versions_are_those_of_the_documentation() -> None:
    oldest = versions_of("constraints/oldest.txt")
    text = text_of(ROOT / "docs" / "versioning.md")
    assert f"transformers from {oldest['transformers'].major}.{oldest['transformers'].minor}" in text
    assert f"torch {oldest['torch'].major}.{oldest['torch'].minor} or later" in text
