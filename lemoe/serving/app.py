"""The HTTP side: OpenAI's paths, two that change what is served, and errors in OpenAI's shape."""

import hmac
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from lemoe.base.matmul import use_onednn
from lemoe.serving.requests import AnyRequest, ChatRequest, CompletionRequest, LoadRequest, UnloadRequest
from lemoe.serving.responses import RefusedError
from lemoe.serving.server import Server

HEALTH = "/health"


def build_app(server: Server, *, api_key: str | None = None, allow_updates: bool = False) -> FastAPI:
    """The application that answers for `server`.

    Args:
        api_key: what clients must send as `Authorization: Bearer`; None asks for nothing.
        allow_updates: serve the paths that load and unload adaptors, from files of this machine.
    """

    @asynccontextmanager
    async def run(app: FastAPI) -> AsyncIterator[None]:
        with use_onednn(server.served.base.model):
            yield
            server.close()

    app = FastAPI(title="lemoe", lifespan=run)
    app.include_router(_answering_paths(server))
    if allow_updates:
        app.include_router(_updating_paths(server))
    for kind, refuse in _REFUSALS.items():
        app.add_exception_handler(kind, refuse)
    if api_key:
        _ask_for_key(app, api_key)
    return app


def _answering_paths(server: Server) -> APIRouter:
    paths = APIRouter()

    @paths.get(HEALTH)
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @paths.get("/v1/models")
    async def models() -> dict[str, Any]:
        return server.models()

    @paths.post("/v1/completions", response_model=None)
    async def complete(request: CompletionRequest) -> Response:
        return await _respond(server, request)

    @paths.post("/v1/chat/completions", response_model=None)
    async def chat(request: ChatRequest) -> Response:
        return await _respond(server, request)

    return paths


async def _respond(server: Server, request: AnyRequest) -> Response:
    if request.stream:
        return StreamingResponse(server.stream(request), media_type="text/event-stream")
    return JSONResponse(await server.answer(request))


def _updating_paths(server: Server) -> APIRouter:
    paths = APIRouter()

    @paths.post("/v1/load_adaptor")
    async def load(request: LoadRequest) -> dict[str, Any]:
        return await server.load(request)

    @paths.post("/v1/unload_adaptor")
    async def unload(request: UnloadRequest) -> dict[str, Any]:
        return await server.unload(request)

    return paths


def _ask_for_key(app: FastAPI, api_key: str) -> None:
    @app.middleware("http")
    async def check_key(request: Request, call_next: Any) -> Response:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if request.url.path != HEALTH and not hmac.compare_digest(given.encode(), api_key.encode()):
            return _refuse(RefusedError("the API key is missing or wrong", status=401, code="invalid_api_key"))
        response: Response = await call_next(request)
        return response


def _refuse(error: RefusedError) -> Response:
    return JSONResponse(error.body, status_code=error.status)


async def _refuse_request(request: Request, error: Any) -> Response:
    return _refuse(error)


async def _refuse_fields(request: Request, error: Any) -> Response:
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"][1:]))
    problem = "this field is not served" if first["type"] == "extra_forbidden" else first["msg"]
    return _refuse(RefusedError(f"{field}: {problem}" if field else problem, param=field or None))


async def _refuse_path(request: Request, error: Any) -> Response:
    return _refuse(RefusedError(f"{request.method} {request.url.path}: {error.detail}", status=error.status_code))


async def _refuse_failure(request: Request, error: Any) -> Response:
    return _refuse(RefusedError.from_failure(error))


_REFUSALS: dict[type[Exception], Any] = {
    RefusedError: _refuse_request,
    RequestValidationError: _refuse_fields,
    HTTPException: _refuse_path,
    Exception: _refuse_failure,
}
