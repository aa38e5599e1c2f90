"""Folders of code are packages: a wheel leaves out every other."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("package", ["snella_jax", "experiments"])
def test_every_folder_of_code_is_a_package(package):
    files = {path.relative_to(ROOT) for path in (ROOT / package).rglob("*.py")}
    folders = {folder for file in files for folder in file.parents} - {Path()}
    missing = {folder for folder in folders if folder / "__init__.py" not in files}
    assert len(folders) > 8 and not missing
