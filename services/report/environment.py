"""What renders the report's page, and those of the viewer, which are made of the same parts."""

from __future__ import annotations

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from vcot.eval.table import format_half, format_p
from vcot.pipeline.printable import printable


def make_environment(*packages: str) -> Environment:
    """What renders the report's templates, after those of other packages; all that is filled in is escaped."""
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package) for package in (*packages, "vcot.services.report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": _percent,
        "half": format_half,
        "points": _points,
        "p": format_p,
        "clean": printable,
    }
    return environment


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _points(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", "\u2212")
