"""What a release says of itself, the same in every place."""

import re

from places import ROOT

import snella_jax as snella

CITATION = (ROOT / "CITATION.cff").read_text("utf-8")
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
