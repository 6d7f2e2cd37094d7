"""What a request of the OpenAI API may say, and how it is refused: every field is obeyed or named in an error."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError, model_validator

# Bounds on what one request may ask for, beside the size of its body and the model's context.
MESSAGES = 1024
CHOICES = 64
STOP_CHARACTERS = 256

ANY = object()
# OpenAI's fields that are not obeyed here, with the values that ask for nothing; any other value is refused.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    # No answer depends on these labels and hints.
    **dict.fromkeys(("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"), (ANY,)),
    "parallel_tool_calls": (ANY,),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "reasoning_effort": ("none",),
    **dict.fromkeys(("audio", "prediction", "verbosity", "web_search_options", "moderation"), ()),
}


class APIError(Exception):
    """A refusal in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        self.content = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def invalid_value(param: str, reason: object) -> APIError:
    message = f"Invalid value for '{param}': {reason}."
    return APIError(400, message, param=param or None, code="invalid_value")


def model_failed(status: int, error: Exception) -> APIError:
    return APIError(status, str(error), kind="server_error")


def context_exceeded(context: int, tokens: str, param: str) -> APIError:
    message = (
        f"This model's maximum context length is {context} tokens, answer included. However, your {param} resulted in "
        f"{tokens} tokens. Please reduce the length of the {param}."
    )
    return APIError(400, message, param=param, code="context_length_exceeded")


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _join_parts(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    for part in value:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str) or len(part) > 2:
            raise ValueError('every part must be {"type": "text", "text": "..."}')
    return "".join(part["text"] for part in value)


def _as_prompts(value: Any) -> list[str] | list[list[int]]:
    prompts = [value] if isinstance(value, str) or (isinstance(value, list) and _all(value, int)) else value
    if not isinstance(prompts, list) or not prompts or len(prompts) > CHOICES:
        raise ValueError(f"it must be a text, token ids, or a list of at most {CHOICES} of either")
    if not _all(prompts, str) and not all(isinstance(each, list) and _all(each, int) for each in prompts):
        raise ValueError("it must be a text, token ids, or a list of either, none empty")
    return prompts


def _all(values: list[Any], kind: type) -> bool:
    return bool(values) and all(type(value) is kind for value in values)


class Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, values: Any) -> Any:
        """null is how a client says that it leaves a field out."""
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None}


class StreamOptions(Fields):
    include_usage: bool = False


Stop = Annotated[str, Field(min_length=1, max_length=STOP_CHARACTERS)]


class Options(Fields):
    """The fields that both endpoints take."""

    model: str
    n: int = Field(1, ge=1, le=CHOICES)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[Stop], BeforeValidator(_as_list), Field(max_length=4)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    # These are beyond OpenAI's.
    top_k: int | None = Field(None, ge=1, le=10**15)
    min_p: float = Field(0.0, ge=0, lt=1)
    repetition_penalty: float = Field(1.0, gt=0, le=100)


class ChatMessage(Fields):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_join_parts)]


class ChatRequest(Options):
    messages: list[ChatMessage] = Field(min_length=1, max_length=MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    # These are vLLM's: the last message is the beginning of the answer.
    continue_final_message: bool = False
    add_generation_prompt: bool | None = None


class CompletionRequest(Options):
    prompt: Annotated[list[str] | list[list[int]], PlainValidator(_as_prompts)] = [""]
    max_tokens: int = Field(16, ge=0)  # 16 is OpenAI's default; 0 with `echo` asks about the prompt alone
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=5)


Kind = TypeVar("Kind", bound=Options)


def parse(kind: type[Kind], body: bytes) -> Kind:
    """Return the request that a body spells. Raises APIError, 400, naming the field that is at fault."""
    try:
        values = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        message = "The body of the request is not valid JSON, or nested too deeply, or a number in it is too long."
        raise APIError(400, message) from None
    if not isinstance(values, dict):
        raise APIError(400, "The body of the request must be a JSON object.")
    for name in [name for name in NEUTRAL if name in values]:
        value, neutral = values.pop(name), NEUTRAL[name]
        if value is not None and value not in neutral and ANY not in neutral:
            message = f"Unsupported parameter: '{name}' is not supported by this server; leave it out."
            raise APIError(400, message, param=name, code="unsupported_parameter")
    try:
        request = kind.model_validate(values)
    except ValidationError as error:
        raise _refusal(error) from None
    if request.stream_options and not request.stream:
        raise APIError(400, "'stream_options' is only allowed where 'stream' is true.", param="stream_options")
    return request


def _no_constant(name: str) -> None:
    raise ValueError(name)  # NaN and Infinity are Python's, not JSON's


def _refusal(error: ValidationError) -> APIError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = ""
    for part in first["loc"]:
        param += f"[{part}]" if isinstance(part, int) else f".{part[:64]}" if param else part[:64]
    if first["type"] == "missing":
        return APIError(400, f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    if first["type"] == "extra_forbidden":
        return APIError(400, f"Unknown parameter: '{param}'.", param=param, code="unknown_parameter")
    return invalid_value(param, first["msg"].removeprefix("Value error, "))
