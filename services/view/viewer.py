"""The viewer's pages. Each is whole without a script; the script adds keys, labels without a reload, and what is live.

Everything that a model, a data set or a recipe wrote is filled into templates that escape it. Addresses:

    /                               the runs, side by side
    /runs/N/                        overview
    /runs/N/tasks?FILTER            the tasks that a filter lets through
    /runs/N/task?of=P&task=T&...  one task, and its neighbours under the same filter
    /runs/N/labels                  what you said, and the judge's agreement with you; POST says something
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from importlib import resources
from typing import Any
from urllib.parse import parse_qsl, urlencode

import orjson
from jinja2 import Environment
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from vcot.pipeline.errors import InputError, VcotError
from vcot.pipeline.files import explain
from vcot.services.report.environment import make_environment
from vcot.services.run.live import say_span
from vcot.services.view.entry import Doorkeeper
from vcot.services.view.examples import compare_texts
from vcot.services.view.index import Item
from vcot.services.view.labels import Label, say_agreement
from vcot.services.view.queries import PAGE_SIZE, Filter, Listed, read_filter
from vcot.services.view.shown import ViewedRun
from vcot.services.view.summary import LIVE_PLACE

_MAX_BODY = 10_000
OUTCOMES = {
    "correct": "right", "incorrect": "wrong", "no_answer": "no answer that can be read", "failed": "failed",
    "lost": "right before, now wrong", "gained": "wrong before, now right",
}  # fmt: skip
_SORTS = {
    "order": "as the run asks",
    "best": "best score",
    "worst": "worst score",
    "spread": "best minus worst",
    "lost": "errors",
}


_FILTERS: Mapping[str, Any] = {
    "titles": lambda parts: [(part.slug, f"{part.title} ({part.num_tasks:,})") for part in parts],
    "with_counts": lambda found: [
        (name, f"{name.replace('|', ': ').replace('_', ' ')} ({n:,})") for name, n in found.items()
    ],
    "twice": lambda names: [(name, name) for name in names],
    "filled": lambda task, wanted: [*task.items(), *parse_qsl(wanted.query)],
}
"""A select's options as (value, text), and the fields of a form that keeps a filter."""


def create_app(runs: Sequence[ViewedRun], token: str) -> Starlette:
    """The app over `runs`, for whoever has the token. Their indexes are kept up to date by whoever makes it."""
    pages = Pages(runs)
    routes = [
        Route("/", pages.show_runs),
        Route("/runs/{number:int}/", pages.show_overview),
        Route("/runs/{number:int}/live", pages.show_live),
        Route("/runs/{number:int}/figures/{name}", pages.show_figure),
        Route("/runs/{number:int}/tasks", pages.show_tasks),
        Route("/runs/{number:int}/task", pages.show_task),
        Route("/runs/{number:int}/image", pages.show_image),
        Route("/runs/{number:int}/labels", pages.show_labels),
        Route("/runs/{number:int}/labels", pages.add_label, methods=["POST"]),
        Route("/static/style.css", show_palette),
        Mount("/static", StaticFiles(packages=[("vcot.services.view", "static")])),
    ]
    faults: Mapping[Any, Any] = {HTTPException: pages.show_fault, VcotError: pages.show_fault}
    return Starlette(routes=routes, middleware=[Middleware(Doorkeeper, token=token)], exception_handlers=faults)


def make_pages() -> Environment:
    """What renders the viewer's templates."""
    environment = make_environment("vcot.services.view")
    environment.filters |= {"span": say_span, "query": urlencode, **_FILTERS}
    return environment


def show_palette(_: Request) -> Response:
    """The report's style, which is the viewer's, too."""
    return Response(read_style(), media_type="text/css")


@lru_cache
def read_style() -> str:
    """Its text."""
    return resources.files("vcot.services.report").joinpath("templates", "style.css").read_text("utf-8")


class Pages:
    """What each address answers."""

    def __init__(self, runs: Sequence[ViewedRun]) -> None:
        self._runs = runs
        self._environment = make_pages()

    def _render(self, template: str, status: int = 200, **fields: Any) -> HTMLResponse:
        return HTMLResponse(self._environment.get_template(template).render(fields), status)

    def _find(self, request: Request) -> ViewedRun:
        number = int(request.path_params["number"])
        if number >= len(self._runs):
            raise HTTPException(404, "there is no such run here")
        return self._runs[number]

    def _page(self, template: str, run: ViewedRun, at: str, **fields: Any) -> HTMLResponse:
        return self._render(template, run=run, at=at, root="../../", here="", **fields)

    def show_runs(self, _: Request) -> Response:
        """The runs, side by side; of one, its overview."""
        if len(self._runs) == 1:
            return RedirectResponse("/runs/0/")
        rows = [(run, run.summary, run.find_pulse()) for run in self._runs]
        settings = dict.fromkeys((a.setting for _, found, _ in rows if found for a in found.accuracies))
        return self._render("runs.html", rows=rows, settings=list(settings), root="./")

    def show_overview(self, request: Request) -> Response:
        """The report's page as far as it goes, with what is live."""
        run = self._find(request)
        live, page = self._render_live(run), run.index.note("overview")
        if page is None:
            return self._page("waiting.html", run, "Overview", live=live)
        return HTMLResponse(page.replace(LIVE_PLACE, live, 1))

    def show_live(self, request: Request) -> Response:
        """That part alone."""
        return HTMLResponse(self._render_live(self._find(request)))

    def _render_live(self, run: ViewedRun) -> str:
        said = (
            say_agreement(run.measure_agreement(), run.summary.judge)
            if run.labels_path.is_file() and run.summary
            else ()
        )
        return self._environment.get_template("live.html").render(pulse=run.find_pulse(), agreement=said)

    def show_figure(self, request: Request) -> Response:
        """A figure of the overview."""
        svg = self._find(request).index.note(f"figure/{request.path_params['name']}")
        if svg is None:
            raise HTTPException(404, "there is no such figure")
        return Response(svg, media_type="image/svg+xml")

    def show_tasks(self, request: Request) -> Response:
        """The tasks that a filter lets through."""
        run, fault = self._find(request), ""
        try:
            wanted = read_filter(request.query_params)
        except InputError as error:
            wanted, fault = Filter(), str(error)
        found = Listed([], 0) if fault else run.finder.find(wanted)
        fields = {"wanted": wanted, "items": found.items, "total": found.total, "fault": fault, "size": PAGE_SIZE}
        fields["address"] = partial(_address, wanted)
        return self._page("tasks.html", run, "Tasks", **fields, **_list_choices(run), progress=run.index.progress())

    def show_task(self, request: Request) -> Response:
        """One task."""
        run, wanted = self._find(request), read_filter(_without_task(request.query_params))
        example = run.find_example(*_name_task(request))
        if example is None:
            raise HTTPException(404, "the index has no such task (yet); see the list of tasks")
        both = example.choose_two(request.query_params.getlist("with"))
        before, after = run.finder.beside(wanted, example.item)
        return self._page(
            "task.html",
            run,
            "Tasks",
            example=example,
            images=[(image, _name_image(example.item, number)) for number, image in enumerate(example.task.images)],
            address=partial(_address, wanted),
            both=both,
            stretches=compare_texts(both[0].text, both[1].text) if both else [],
            before=before,
            after=after,
            wanted=wanted,
            labels=run.labels,
            outcomes=OUTCOMES,
        )

    def show_image(self, request: Request) -> Response:
        """A task's image."""
        run = self._find(request)
        example, number = run.find_example(*_name_task(request)), request.query_params.get("number", "0")
        found = run.read_image(example, int(number)) if example and number.isdecimal() else None
        if found is None:
            raise HTTPException(404, "there is no such image")
        data, kind = found
        return Response(data, media_type=kind, headers={"Cache-Control": "private, max-age=3600"})

    def show_labels(self, request: Request) -> Response:
        """What was said, and the judge's agreement."""
        run = self._find(request)
        judge = run.summary.judge if run.summary else "The judge"
        said = say_agreement(run.measure_agreement(), judge)
        return self._page("labels.html", run, "Labels", labels=run.labels, said=said)

    async def add_label(self, request: Request) -> Response:
        """Keep one. It is on disk before this answers."""
        run = self._find(request)
        if not request.headers.get("content-type", "").startswith("application/json"):
            raise HTTPException(415, "a label is sent as application/json")
        body = await _read_body(request)
        try:
            label = Label.model_validate(orjson.loads(body) | {"at": time.time()})
        except (ValidationError, orjson.JSONDecodeError, TypeError) as error:
            why = explain(error) if isinstance(error, ValidationError) else "it is no JSON object"
            raise HTTPException(400, f"this is no label ({why})") from None
        await run_in_threadpool(run.keep, label)
        return JSONResponse({"kept": True})

    def show_fault(self, _: Request, error: Exception) -> Response:
        """A sentence for what went wrong."""
        status, why = (error.status_code, error.detail) if isinstance(error, HTTPException) else (400, str(error))
        return self._render("fault.html", status, why=why, root="/")


async def _read_body(request: Request) -> bytes:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_BODY:
            raise HTTPException(413, "a label is not that long")
    return body


def _address(wanted: Filter, item: Item) -> str:
    """Of a task's page, among those of a filter."""
    return "&".join(filter(None, (f"task?{urlencode({'of': item.part, 'task': item.task})}", wanted.query)))


def _name_image(item: Item, number: int) -> str:
    return f"image?{urlencode({'of': item.part, 'task': item.task, 'number': number})}"


def _name_task(request: Request) -> tuple[str, str]:
    return request.query_params.get("of", ""), request.query_params.get("task", "")


def _without_task(query: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in query.items() if name not in ("of", "task", "with")}


def _list_choices(run: ViewedRun) -> dict[str, Any]:
    """What a filter's fields offer."""
    facets = run.facets
    split = [mark.split("|") for mark in facets.marks]
    outcomes = [parts for parts in split if parts[0] in OUTCOMES and len(parts) == 3]
    return {
        "parts": facets.parts,
        "subjects": {
            mark.partition("|")[2]: number for mark, number in facets.marks.items() if mark.startswith("subject|")
        },
        "outcomes": {name: told for name, told in OUTCOMES.items() if any(parts[0] == name for parts in outcomes)},
        "checkpoints": sorted({parts[1] for parts in outcomes} - {"*"}),
        "settings": sorted({parts[2] for parts in outcomes} - {"*"}),
        "marks": {mark: number for mark, number in facets.marks.items() if _is_reason(mark)},
        "sorts": _SORTS,
    }


def _is_reason(mark: str) -> bool:
    """Whether it says why something is missing, or whether there is a pair."""
    return mark.count("|") == 1 and not mark.startswith("subject|")
