"""The application of ``align studio``: its views, its pages and its errors.

A view is a ``View`` of the registry, a Python module, and a JavaScript module ``static/views/NAME.js`` beside it. The
Python module has ``create_router(context: StudioContext) -> APIRouter``, whose addresses are below ``/api``. The
JavaScript module exports ``show(main, parameters)`` and may return a function that cleans up. Nothing here or in a view
imports torch before a request needs a model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from align.errors import StageFailed, UserError
from align.registry import View, loaded, registered
from align.report.page.templates import FOLDER as TEMPLATES
from align.store.artifacts import VERSION
from align.studio import report_pages
from align.studio.context import NotFound, Refused, StudioContext
from align.studio.security import HEADERS, Guard

STATIC = Path(__file__).with_name("static")
SHARED = ("page.css", "dark.css", "curves.js", "curve_view.js")
"""Files of the report page that the studio also loads, below ``/static/shared``."""
MAX_ERRORS = 3


def create_app(context: StudioContext, token: str, cookie: str = "align-studio") -> FastAPI:
    """Return the application.

    Args:
        token: Secret that every request must bring.
        cookie: Name of the cookie that keeps the token; it differs between studios on one machine.
    """
    # No page of FastAPI: its documentation loads scripts from another host.
    app = FastAPI(title="align studio", openapi_url=None, docs_url=None, redoc_url=None)
    static = _Static(directory=STATIC)
    views = loaded(View, lambda view: view.code)
    for module in views.values():
        app.include_router(module.create_router(context), prefix="/api")
        static.all_directories.append(Path(module.__file__).with_name("static"))
    app.include_router(_create_router(context, list(views)))
    app.include_router(report_pages.create_router(context))
    app.mount("/static", static)
    for error in (UserError, StageFailed):
        app.add_exception_handler(error, _explain_user_error)
    app.add_exception_handler(RequestValidationError, _explain_invalid)
    app.add_exception_handler(HTTPException, _explain_http_error)
    app.add_exception_handler(Exception, _explain_bug)
    app.add_middleware(Guard, token=token, cookie=cookie, secret=context.secret)
    return app


def _create_router(context: StudioContext, views: list[str]) -> APIRouter:
    """Return the page itself, the files that it shares with reports, and the facts of the studio."""
    router = APIRouter()

    @router.get("/")
    def index() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    @router.get("/static/shared/{name}")
    def shared(name: str) -> FileResponse:
        if name not in SHARED:
            raise NotFound(f"{name[:80]}: there is no such file.")
        return FileResponse(TEMPLATES / name, headers={"cache-control": "no-cache"})

    @router.get("/api/studio")
    def studio() -> dict[str, Any]:
        return {
            "store": str(context.store.root.resolve()),
            "is_writable": context.is_writable,
            "version": VERSION,
            "views": [{"name": name, "title": registered(View)[name].title} for name in views],
        }

    return router


class _Static(StaticFiles):
    """The files of the studio and of its views, which a browser asks for again after an update of align."""

    def file_response(self, full_path: Any, stat_result: Any, scope: Any, status_code: int = 200) -> Any:
        response = super().file_response(full_path, stat_result, scope, status_code)
        response.headers["cache-control"] = "no-cache"
        return response


def error_status(error: Exception) -> int:
    """Return the HTTP status of an error that a user sees."""
    if isinstance(error, NotFound):
        return 404
    if isinstance(error, Refused):
        return 403
    return 409 if isinstance(error, StageFailed) else 400


def _explain_user_error(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"error": str(error)}, error_status(error))


def _explain_invalid(request: Request, error: Exception) -> JSONResponse:
    """Name the first fields of a request that do not have their type."""
    assert isinstance(error, RequestValidationError)
    problems = [f"{'.'.join(map(str, each['loc'][1:]))}: {each['msg']}" for each in error.errors()[:MAX_ERRORS]]
    return JSONResponse({"error": "; ".join(problems)}, 422)


def _explain_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": str(error.detail)}, error.status_code)


def _explain_bug(request: Request, error: Exception) -> JSONResponse:
    """Answer a bug of align in one line; uvicorn prints its traceback in the terminal."""
    text = f"{type(error).__name__} in align. The traceback is in the terminal of `align studio`."
    return JSONResponse({"error": text}, 500, HEADERS)
