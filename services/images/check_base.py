"""Refuse a base image whose packages are not those of the lock: `check_base.py LOCK NAME...`, run by the image's Python."""

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def main(lock: str, *names: str) -> None:
    """Compare the installed version of each name with the lock's; a build's local label (+cu130) does not count."""
    pins = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", Path(lock).read_text("utf-8"), re.MULTILINE))
    for name in names:
        if (found := _installed(name)) != pins[name]:
            sys.exit(f"the base image has {name} {found}, {lock} has {pins[name]}: take the image of that release")


def _installed(name: str) -> str | None:
    try:
        return version(name).split("+")[0]
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main(*sys.argv[1:])
