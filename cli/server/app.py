"""The FastAPI application: routes, limits, keys. Each request becomes a Job of the one Worker."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.security import HTTPBearer
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from cli.server import document, guard, openai
from cli.server.answers import ChatAnswer, Choice, CompletionAnswer, to_json
from cli.server.guard import BODY_BYTES, Guard, carries
from cli.server.openai import APIError, ChatRequest, CompletionRequest, context_exceeded, model_failed
from cli.server.responses import LOGPROBS, ResponseAnswer, ResponseRequest
from cli.server.worker import ClientGoneError, Job, ModelError, Worker
from engine import batcher, chat_template
from engine.errors import InputError
from engine.generate import document_prompt
from engine.sampling import Sampling
from engine.tokenizer import Tokenizer

PAGE = Path(__file__).parent / "page"
# The seconds that a slow reader has beyond the model's time; then the connection is cut.
READER_SECONDS = 60.0


@dataclass(frozen=True)
class Served:
    """A model and its name. `chat` says whether it has learnt conversations; `created` is in seconds since 1970."""

    name: str
    chat: bool
    tokenizer: Tokenizer
    context: int
    created: int


class JSON(JSONResponse):
    def render(self, content: Any) -> bytes:
        # The JSON is ASCII: a text of the client may hold half a surrogate pair, which UTF-8 cannot spell.
        return to_json(content).encode()


class Events(StreamingResponse):
    """The server-sent events of a job, which ends with them, or with the connection."""

    media_type = "text/event-stream"

    def __init__(self, content: AsyncIterator[str], job: Job) -> None:
        super().__init__(content, headers={"x-accel-buffering": "no"})
        self.job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self.job.worker.seconds + READER_SECONDS):
                await super().__call__(scope, receive, send)
        finally:
            self.job.close()


class Server:
    def __init__(self, served: Served, worker: Worker) -> None:
        self.served, self.worker = served, worker
        self.longest = int(served.tokenizer.byte_lengths.max())

    async def models(self) -> Response:
        return JSON({"object": "list", "data": [self._model()]})

    async def model(self, name: str) -> Response:
        self._check_model(name)
        return JSON(self._model())

    async def health(self) -> Response:
        return JSON({"status": "the model has failed"}, 503) if self.worker.failed else JSON({"status": "ok"})

    async def metrics(self) -> Response:
        return Response(generate_latest(self.worker.registry), media_type=CONTENT_TYPE_LATEST)

    async def chat(self, http: Request) -> Response:
        asked = await self._read(http, ChatRequest)
        if asked.max_tokens and asked.max_completion_tokens:
            raise APIError(400, "Give 'max_tokens' or 'max_completion_tokens', not both.", param="max_tokens")
        if asked.top_logprobs is not None and not asked.logprobs:
            raise APIError(400, "'top_logprobs' is only allowed where 'logprobs' is true.", param="top_logprobs")
        if asked.add_generation_prompt == asked.continue_final_message:
            message = "Of 'continue_final_message' and 'add_generation_prompt' one must be true, and not both."
            raise APIError(400, message, param="add_generation_prompt")
        top = (asked.top_logprobs or 0) if asked.logprobs else None
        said = [(each.role, each.content) for each in asked.messages]
        prompt = self._conversation("messages", said, unfinished=asked.continue_final_message)
        choices = [Choice(self.served.tokenizer, asked.stop, after=prompt) for _ in range(asked.n)]
        limit = asked.max_tokens or asked.max_completion_tokens
        return await self._answer(http, ChatAnswer, asked, [prompt], choices, limit, top)

    async def responses(self, http: Request) -> Response:
        asked = await self._read(http, ResponseRequest)
        top = (asked.top_logprobs or 0) if LOGPROBS in asked.include else None
        if asked.top_logprobs and top is None:
            raise APIError(
                400, f"'top_logprobs' is only allowed where 'include' has '{LOGPROBS}'.", param="top_logprobs"
            )
        said = [("system", asked.instructions)] if asked.instructions else []
        prompt = self._conversation("input", [*said, *((each.role, each.content) for each in asked.input)])
        choices = [Choice(self.served.tokenizer, asked.stop, after=prompt)]
        return await self._answer(http, ResponseAnswer, asked, [prompt], choices, asked.max_output_tokens, top)

    def _conversation(self, param: str, said: Sequence[tuple[str, str]], *, unfinished: bool = False) -> list[int]:
        """Return the prompt of what each role has said, the last one perhaps not to the end."""
        served = self.served
        if not served.chat:
            message = f"{served.name} is a base model, which has not learnt to chat; use /v1/completions"
            raise APIError(400, message, param="model", code="unsupported_model")
        self._check_length(param, sum(len(content) for _, content in said))
        messages = [chat_template.Message("system" if role == "developer" else role, content) for role, content in said]
        begin = partial(chat_template.answer_prompt, unfinished=unfinished)
        return self._encode(param, partial(begin, served.tokenizer, messages))

    async def completions(self, http: Request) -> Response:
        asked, tokenizer = await self._read(http, CompletionRequest), self.served.tokenizer
        prompts, choices = [], []
        if not (asked.max_tokens or asked.echo):
            raise openai.invalid_value("max_tokens", "0 is only allowed where 'echo' is true")
        for prompt in asked.prompt:
            prompts.append(self._ids(prompt))
            echo = "" if not asked.echo else prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
            # The token that begins every document is no part of a text.
            unread = int(isinstance(prompt, str)) if asked.echo and asked.logprobs is not None else None
            after = prompts[-1]
            choices += [Choice(tokenizer, asked.stop, echo, unread, closing=True, after=after) for _ in range(asked.n)]
        return await self._answer(http, CompletionAnswer, asked, prompts, choices, asked.max_tokens, asked.logprobs)

    def _ids(self, prompt: str | list[int]) -> list[int]:
        tokenizer = self.served.tokenizer
        if isinstance(prompt, str):
            self._check_length("prompt", len(prompt))
            return self._encode("prompt", partial(document_prompt, tokenizer, prompt))
        if min(prompt) < 0 or max(prompt) >= tokenizer.vocab_size:
            message = f"The prompt holds an id that is no token's: they go from 0 to {tokenizer.vocab_size - 1}."
            raise APIError(400, message, param="prompt", code="invalid_value")
        return prompt

    async def _read(self, http: Request, kind: type[openai.Kind]) -> openai.Kind:
        # A page of another site can send this type only after it has asked (CORS).
        if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise APIError(400, "The Content-Type of the request must be application/json.")
        body = bytearray()
        try:
            async with asyncio.timeout(guard.BODY_SECONDS):
                async for part in http.stream():
                    body += part
                    if len(body) > BODY_BYTES:
                        raise APIError(413, f"The body of the request is larger than {BODY_BYTES} bytes.")
        except TimeoutError:
            raise APIError(408, "The body of the request took too long to come.") from None
        except ClientDisconnect:
            raise APIError(499, "The client is gone.") from None  # nobody reads it but the log
        asked = openai.parse(kind, bytes(body))
        self._check_model(asked.model)
        return asked

    async def _answer(
        self,
        http: Request,
        kind: type[CompletionAnswer],
        asked: openai.Options,
        prompts: Sequence[Sequence[int]],
        choices: Sequence[Choice],
        max_tokens: int | None,
        top_logprobs: int | None,
    ) -> Response:
        served, context = self.served, self.served.context
        for prompt in prompts:
            if len(prompt) >= context:
                raise context_exceeded(context, str(len(prompt)), kind.said)
        sampling = Sampling(
            temperature=asked.temperature,
            top_k=asked.top_k,
            top_p=max(asked.top_p, 1e-9),  # 0 means the likeliest token alone
            min_p=asked.min_p,
            repetition_penalty=asked.repetition_penalty,
            presence_penalty=asked.presence_penalty,
            frequency_penalty=asked.frequency_penalty,
            logit_bias=self._biases(asked.logit_bias),
            seed=None if asked.seed is None else asked.seed % 2**62,
        )
        ends = chat_template.text_ends(served.tokenizer, chat=served.chat)
        most = context if max_tokens is None else max_tokens
        requests = [
            batcher.Request(
                prompts[index * len(prompts) // len(choices)], sampling.of_row(index), most, ends, top_logprobs
            )
            for index in range(len(choices))
        ]
        answer = kind(asked, served.tokenizer, choices, sum(map(len, prompts)), logprobs=top_logprobs is not None)
        job = self._submit(requests, read_prompts=any(choice.unread is not None for choice in choices))
        if asked.stream:
            return Events(answer.events(job), job)
        watch = asyncio.create_task(_close_when_gone(job, http.receive))
        try:
            return JSON(await answer.whole(job))
        except ModelError as error:
            raise model_failed(500, error) from None
        except ClientGoneError:
            return Response(status_code=499)  # nobody reads it but the log
        finally:
            watch.cancel()
            job.close()

    def _biases(self, biases: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
        found = tuple((int(token), bias) for token, bias in biases.items())
        if any(token >= self.served.tokenizer.vocab_size for token, _ in found):
            reason = f"an id is no token's: they go from 0 to {self.served.tokenizer.vocab_size - 1}"
            raise openai.invalid_value("logit_bias", reason)
        return found

    def _submit(self, requests: Sequence[batcher.Request], *, read_prompts: bool) -> Job:
        if len(requests) > self.worker.limit:
            raise APIError(400, f"{len(requests)} texts were asked for; this server makes {self.worker.limit} at once.")
        try:
            return self.worker.submit(requests, read_prompts=read_prompts)
        except batcher.QueueFullError as full:
            message, wait = f"The server is busy: {full}. Try again later.", {"Retry-After": "1"}
            raise APIError(429, message, kind="rate_limit_error", code="rate_limit_exceeded", headers=wait) from None
        except ModelError as error:
            raise model_failed(503, error) from None

    def _check_model(self, name: str) -> None:
        if name != self.served.name:
            message = f"The model '{name[:64]}' does not exist; this server has '{self.served.name}'."
            raise APIError(404, message, param="model", code="model_not_found")

    def _check_length(self, param: str, characters: int) -> None:
        """Refuse a text that is too long however it is cut into tokens, before it is."""
        if characters > self.longest * self.served.context:
            raise context_exceeded(self.served.context, f"more than {self.served.context}", param)

    def _encode(self, param: str, encode: Callable[[], list[int]]) -> list[int]:
        try:
            return encode()
        except InputError as error:
            raise openai.invalid_value(param, error) from None

    def _model(self) -> dict[str, Any]:
        return {"id": self.served.name, "object": "model", "created": self.served.created, "owned_by": "gpt"}


async def _close_when_gone(job: Job, receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    job.close()


def create_app(
    served: Served, worker: Worker, *, key: str | None, cors: Sequence[str], hosts: Collection[str] | None
) -> ASGIApp:
    """Return the application. Calls must carry `key`; pages of `cors` may call; Guard explains `hosts`."""
    server = Server(served, worker)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await worker.stop()

    # FastAPI reads the same header for the document alone.
    async def authorise(http: Request, _: Annotated[Any, Depends(HTTPBearer(auto_error=False))]) -> None:
        if key and not carries(http.headers.get("authorization", ""), key):
            how = {"WWW-Authenticate": "Bearer"}
            raise APIError(401, "Incorrect or no API key provided.", code="invalid_api_key", headers=how)

    def count(route: str, status: int, seconds: float) -> None:
        worker.requests[route, status] += 1
        if status == 200 and route in document.OPERATIONS and document.OPERATIONS[route].asks:
            worker.request_times.add(seconds)

    async def about() -> Response:
        return JSON({"model": served.name, "chat": served.chat, "context": served.context, "key_required": bool(key)})

    # FastAPI's own pages would load scripts from other sites.
    app = FastAPI(docs_url=None, redoc_url=None, lifespan=lifespan)
    locked, unlocked = APIRouter(dependencies=[Depends(authorise)] if key else []), APIRouter()
    routes: list[tuple[APIRouter, str, str, Callable[..., Awaitable[Response]]]] = [
        (locked, "POST", "/v1/chat/completions", server.chat),
        (locked, "POST", "/v1/completions", server.completions),
        (locked, "POST", "/v1/responses", server.responses),
        (locked, "GET", "/v1/models", server.models),
        (locked, "GET", "/v1/models/{name:path}", server.model),
        (locked, "GET", "/metrics", server.metrics),
        (unlocked, "GET", "/health", server.health),
        (unlocked, "GET", "/page.json", about),
    ]
    for router, method, path, endpoint in routes:
        router.add_api_route(
            path,
            endpoint,
            methods=[method],
            response_model=None,
            response_class=JSON if document.OPERATIONS[path].gives else Response,
            summary=document.OPERATIONS[path].about,
            responses=document.OPERATIONS[path].responses(locked=bool(key) and router is locked),
        )
    app.include_router(locked)
    app.include_router(unlocked)
    app.openapi = cache(partial(document.describe, app, served.name))  # type: ignore[method-assign]
    app.add_route("/docs", lambda _: HTMLResponse(document.page(app.openapi())))
    offered = [f"{method} {path.replace('{name:path}', 'NAME')}" for _, method, path, _ in routes]
    offered += ["GET /docs", "GET /openapi.json"]
    page = StaticFiles(directory=PAGE, html=True)

    async def elsewhere(scope: Scope, receive: Receive, send: Send) -> None:
        """The page's files. They are no route: one that takes every path would answer for the API's, too."""
        if scope["method"] not in ("GET", "HEAD"):
            raise HTTPException(404)
        await page(scope, receive, send)

    app.router.default = elsewhere

    @app.exception_handler(APIError)
    async def refused(http: Request, error: APIError) -> Response:
        return JSON(error.content, error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def not_found(http: Request, error: HTTPException) -> Response:
        path = http.url.path[:256]
        message, code = f"{error.detail}: {http.method} {path}", None
        if error.status_code == 405:
            message = f"{path} takes {(error.headers or {}).get('Allow')}, not {http.method}."
            code = "method_not_supported"
        elif error.status_code == 404:
            message = f"There is no {http.method} {path} here. This server has {', '.join(offered)}."
            if path.startswith(("/v1/responses/", "/v1/conversations")):
                message += " It stores nothing: send the whole conversation each time."
        return await refused(http, APIError(error.status_code, message, code=code, headers=error.headers))

    @app.exception_handler(Exception)
    async def failed(http: Request, error: Exception) -> Response:
        return await refused(http, APIError(500, "The server has failed.", kind="server_error"))

    if cors:
        app.add_middleware(CORSMiddleware, allow_origins=list(cors), allow_methods=["GET", "POST"], allow_headers=["*"])
    return Guard(app, hosts, count)
