"""What a request of the OpenAI API may say, and how it is refused: every field is obeyed or named in an error."""

import json
from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError, model_validator

# Bounds on what one request may ask for, beside the size of its body and the model's context.
MESSAGES = 1024
CHOICES = 64
STOP_CHARACTERS = 256
BIASES = 1024

ANY = object()
# Names of all fields that OpenAI has and this server has not.
UNSUPPORTED: set[str] = set()
# What asks for something that was stored.
STATEFUL = ("previous_response_id", "conversation", "background")
# OpenAI's fields that are not obeyed here, with the values that ask for nothing; any other value is refused.
Neutral = Mapping[str, tuple[Any, ...]]
# No answer depends on these labels and hints.
LABELS = ("user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options")
NEUTRAL: Neutral = {
    **dict.fromkeys((*LABELS, "parallel_tool_calls"), (ANY,)),
    "service_tier": ("auto", "default"),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "moderation": (),
}
TEXT_NEUTRAL: Neutral = {
    **NEUTRAL,
    "metadata": (ANY,),
    "store": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "reasoning_effort": ("none",),
    **dict.fromkeys(("audio", "prediction", "verbosity", "web_search_options"), ()),
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


def _as_prompts(value: Any) -> list[str] | list[list[int]]:
    prompts = [value] if isinstance(value, str) or (isinstance(value, list) and _all(value, int)) else value
    if not isinstance(prompts, list) or not prompts or len(prompts) > CHOICES:
        raise ValueError(f"it must be a text, token ids, or a list of at most {CHOICES} of either")
    if not _all(prompts, str) and not all(isinstance(each, list) and _all(each, int) for each in prompts):
        raise ValueError("it must be a text, token ids, or a list of either, none empty")
    return prompts


def _all(values: list[Any], kind: type) -> bool:
    return bool(values) and all(type(value) is kind for value in values)


def _describe(schema: dict[str, Any], kind: type["Fields"]) -> None:
    """Say in the JSON schema what the fields alone do not: null leaves a field out, and what else is accepted."""
    fields, needed = schema.setdefault("properties", {}), schema.get("required", ())
    for name, field in fields.items():
        field.pop("title", None)
        if name not in needed and {"type": "null"} not in field.get("anyOf", ()):
            about = {key: field.pop(key) for key in ("default", "description") if key in field}
            fields[name] = {"anyOf": [field, {"type": "null"}], **about}
    for name, values in kind.neutral.items():
        free = {"description": "It changes no answer."}
        fields[name] = free if ANY in values else {"enum": [*values, None], "description": "Anything else is refused."}


class Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra=_describe)
    neutral: ClassVar[Neutral] = {}

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        UNSUPPORTED.update(cls.neutral)

    @model_validator(mode="before")
    @classmethod
    def without_what_asks_for_nothing(cls, values: Any) -> Any:
        """null is how a client says that it leaves a field out."""
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None and not cls._idle(name, value)}

    @classmethod
    def _idle(cls, name: str, value: Any) -> bool:
        values = cls.neutral.get(name, ())
        return ANY in values or any(type(value) is type(each) and value == each for each in values)


class TextPart(Fields):
    """A part of a message. `shape` is what it must look like, for people."""

    neutral: ClassVar[Neutral] = {"prompt_cache_breakpoint": (ANY,)}
    shape: ClassVar = '{"type": "text", "text": "..."}'
    type: Literal["text"]
    text: str


def join_parts(kind: type[TextPart], value: Any) -> Any:
    """Return the text of a message that comes in parts."""
    if not isinstance(value, list):
        return value
    try:
        return "".join(kind.model_validate(part).text for part in value)
    except ValidationError:
        raise ValueError(f"every part must be {kind.shape}") from None


class StreamOptions(Fields):
    include_usage: bool = Field(False, description="The last event counts the tokens.")
    # It would hide the lengths of tokens from who sees encrypted traffic go by; there is none here.
    include_obfuscation: bool = False


Stop = Annotated[str, Field(min_length=1, max_length=STOP_CHARACTERS)]
TokenId = Annotated[str, Field(pattern="^(0|[1-9][0-9]{0,8})$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
Stops = Annotated[list[Stop], Field(max_length=4)]


class Options(Fields):
    """The fields that all endpoints take."""

    model: str
    temperature: float = Field(1.0, ge=0, le=2, description="0 takes the likeliest token.")
    top_p: float = Field(1.0, ge=0, le=1, description="The share of probability to draw from.")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="The same seed draws the same text.")
    stop: Annotated[Stops, BeforeValidator(_as_list, json_schema_input_type=Stop | Stops)] = Field(
        [], description="The text ends before any of these."
    )
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="Taken from the logits of tokens that were written.")
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="The same, as often as they were written.")
    logit_bias: dict[TokenId, Bias] = Field(
        {}, max_length=BIASES, description="What is added to the logits of tokens, by their ids."
    )
    stream: bool = Field(False, description="Answer with server-sent events.")
    stream_options: StreamOptions | None = None
    # These are beyond OpenAI's.
    top_k: int | None = Field(None, ge=1, le=10**15, description="Draw from the likeliest k tokens.")
    min_p: float = Field(0.0, ge=0, lt=1, description="Leave out what is less likely than this share of the best.")
    repetition_penalty: float = Field(1.0, gt=0, le=100, description="Above 1, what was said is less likely.")


class ChatMessage(Fields):
    # An answer of OpenAI's carries these along, so that clients send them back.
    neutral: ClassVar[Neutral] = {
        "name": (ANY,),
        "annotations": (ANY,),
        "refusal": ("",),
        "tool_calls": ([],),
        "audio": (),
        "function_call": (),
    }
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(partial(join_parts, TextPart), json_schema_input_type=str | list[TextPart])]


class ChatRequest(Options):
    neutral: ClassVar[Neutral] = TEXT_NEUTRAL
    messages: list[ChatMessage] = Field(min_length=1, max_length=MESSAGES)
    n: int = Field(1, ge=1, le=CHOICES, description="How many texts to draw for each prompt.")
    max_tokens: int | None = Field(None, ge=1, description="Else as many as the context has room for.")
    max_completion_tokens: int | None = Field(None, ge=1, description="The newer name of max_tokens.")
    logprobs: bool = Field(False, description="Give each token's log-probability.")
    top_logprobs: int | None = Field(None, ge=0, le=20, description="And those of so many likeliest.")
    # These are vLLM's.
    continue_final_message: bool = Field(False, description="The last message is the beginning of the answer.")
    add_generation_prompt: bool | None = Field(None, description="The opposite of continue_final_message.")


Texts = Annotated[list[str], Field(min_length=1, max_length=CHOICES)]
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class CompletionRequest(Options):
    neutral: ClassVar[Neutral] = TEXT_NEUTRAL
    prompt: Annotated[
        list[str] | list[list[int]],
        PlainValidator(
            _as_prompts,
            json_schema_input_type=str | Texts | Ids | Annotated[list[Ids], Field(min_length=1, max_length=CHOICES)],
        ),
    ] = [""]
    n: int = Field(1, ge=1, le=CHOICES, description="How many texts to draw for each prompt.")
    # 16 is OpenAI's default.
    max_tokens: int = Field(16, ge=0, description="0, with echo, asks about the prompt alone.")
    echo: bool = Field(False, description="Begin the text with the prompt.")
    logprobs: int | None = Field(
        None, ge=0, le=5, description="Give log-probabilities, and those of so many likeliest."
    )


Kind = TypeVar("Kind", bound=Options)


def parse(kind: type[Kind], body: bytes) -> Kind:
    """Return the request that a body spells. Raises APIError, 400, naming the field that is at fault."""
    try:
        values = json.loads(body, parse_constant=_no_constant, parse_float=_number)
    except (ValueError, RecursionError):
        message = "The body of the request is not valid JSON, or nested too deeply, or a number in it is too long."
        raise APIError(400, message) from None
    if not isinstance(values, dict):
        raise APIError(400, "The body of the request must be a JSON object.")
    try:
        request = kind.model_validate(values)
    except ValidationError as error:
        raise _refusal(error) from None
    if request.stream_options and not request.stream:
        raise APIError(400, "'stream_options' is only allowed where 'stream' is true.", param="stream_options")
    return request


def _number(text: str) -> float:
    """Return a whole number as int: JSON knows one kind of number, and 1.0 is 1."""
    value = float(text)
    return int(value) if value.is_integer() else value


def _no_constant(name: str) -> None:
    raise ValueError(name)  # NaN and Infinity are Python's, not JSON's


def _refusal(error: ValidationError) -> APIError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = ""
    for part in (each for each in first["loc"] if each != "[key]"):
        param += f"[{part}]" if isinstance(part, int) else f".{part[:64]}" if param else part[:64]
    if first["type"] == "missing":
        return APIError(400, f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    if first["type"] == "extra_forbidden" and first["loc"][-1] in UNSUPPORTED:
        why = "; this server stores nothing: send the whole conversation" if first["loc"][-1] in STATEFUL else ""
        message = f"Unsupported parameter: '{param}' is not supported by this server; leave it out{why}."
        return APIError(400, message, param=param, code="unsupported_parameter")
    if first["type"] == "extra_forbidden":
        return APIError(400, f"Unknown parameter: '{param}'.", param=param, code="unknown_parameter")
    return invalid_value(param, first["msg"].removeprefix("Value error, "))
