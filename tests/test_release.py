"""What a release says of itself, the same in every place."""

import re
import tomllib

from places import ROOT

import snella_jax as snella

CITATION = (ROOT / "CITATION.cff").read_text("utf-8")
URLS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["urls"]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_citation_and_changelog_have_the_version_and_one_date():
    version = re.search(r"^version: (.+)$", CITATION, re.M)
    date = re.search(r"^date-released: (.+)$", CITATION, re.M)
    assert version and date and version[1] == snella.__version__
    heading = re.search(r"^## (.+)$", CHANGELOG, re.M)
    assert heading and heading[1] == f"[{version[1]}] - {date[1]}"


def test_the_citation_names_the_paper_of_the_readme():
    paper = re.search(r"arXiv:(\d+\.\d+)", CITATION)
    assert paper and paper[1] in (ROOT / "README.md").read_text("utf-8")
    assert URLS["Paper"] == f"https://arxiv.org/abs/{paper[1]}"


def test_addresses_are_those_of_the_repository():
    repository = URLS["Repository"]
    assert URLS["Issues"] == f"{repository}/issues"
    changelog = URLS["Changelog"].removeprefix(f"{repository}/blob/main/")
    assert (ROOT / changelog).read_text("utf-8") == CHANGELOG
    code = re.search(r'^repository-code: "(.+)"$', CITATION, re.M)
    assert code and code[1] == repository
