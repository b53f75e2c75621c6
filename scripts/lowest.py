#!/usr/bin/env python3
"""Print the lowest version of each dependency that pyproject.toml allows, as constraints for pip.

    scripts/lowest.py > lowest.txt
    PIP_CONSTRAINT="$PWD/lowest.txt" scripts/setup test

Extras are included; if two of them bound the same package, the higher bound counts.
"""

import re
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def main() -> None:
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    lowest: dict[str, tuple[int, ...]] = {}
    for requirement in sum(project["optional-dependencies"].values(), project["dependencies"]):
        if bound := re.match(r"([\w.-]+)>=([\d.]+)", requirement):
            version = tuple(map(int, bound[2].split(".")))
            lowest[bound[1]] = max(lowest.get(bound[1], ()), version)
    for name, version in lowest.items():
        print(f"{name}=={'.'.join(map(str, version))}")


if __name__ == "__main__":
    main()
