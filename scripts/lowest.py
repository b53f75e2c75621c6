#!/usr/bin/env python3
"""Print the lowest version of each dependency that pyproject.toml allows, as constraints for pip.

scripts/lowest.py > lowest.txt
PIP_CONSTRAINT="$PWD/lowest.txt" scripts/setup test
"""

import re
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def main() -> None:
    for requirement in tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]:
        if lowest := re.match(r"([\w.-]+)>=([\w.]+)", requirement):
            print(f"{lowest[1]}=={lowest[2]}")


if __name__ == "__main__":
    main()
