"""axe, which finds faults of accessibility, put into a page over the DevTools protocol: no page lets a script in for it."""

from importlib import resources, util

PACKAGE = "axe_playwright_python"
"""Carries axe.min.js; nothing else of it is used."""
IS_THERE = util.find_spec(PACKAGE) is not None
_RUN = """
axe.run(document, {resultTypes: ["violations"]}).then((found) => found.violations
  .filter((fault) => ["serious", "critical"].includes(fault.impact))
  .flatMap((fault) => fault.nodes.map((node) => `${fault.id}: ${node.target.join(" ")}: ${node.failureSummary}`)))
"""


def find_faults(page):
    """What axe calls serious or critical of the page that is open, each with its place."""
    page.ask((resources.files(PACKAGE) / "axe.min.js").read_text("utf-8") + ";0")
    return page.ask(_RUN)
