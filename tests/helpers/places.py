"""Where the project, its results and the tests' files lie."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "tests" / "assets"
GOLDEN = ROOT / "tests" / "golden"
RESULTS = ROOT / "experiments" / "results"
