"""What request bodies are made of: pydantic models, the annotations that give their refusals words, and their reader.

A null counts as absent, an unknown field is kept as it is, and a refusal names the innermost value that is wrong, by a
path such as `messages[0].role`. What is passed on as it came (messages, tools) is a typed dict, what is read a model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Annotated, Any, TypeVar, cast, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    TypeAdapter,
    ValidatorFunctionWrapHandler,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, ValidationError, core_schema, from_json
from typing_extensions import get_type_hints, is_typeddict

from qwen3_dist.errors import RequestError

Json = dict[str, Any]
_OTHERS = "<>"  # the branch of a union for objects with a tag that is not listed
# What a value must be, by pydantic's type of error; other types of ours carry their words along.
_WORDS = {
    "string_type": "a string",
    "bool_type": "true or false",
    "int_type": "an integer",
    "dict_type": "an object",
    "model_type": "an object",
    "list_type": "a list",
}


class Body(BaseModel):
    """A body, or an object in one, whose fields are read. `undeclared` has those that no model names."""

    model_config = ConfigDict(extra="allow", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return without_nulls(value) if type(value) is dict else value

    @property
    def undeclared(self) -> Json:
        return self.model_extra or {}


BodyT = TypeVar("BodyT", bound=BaseModel)


def read_body(model: type[BodyT], body: bytes) -> BodyT:
    """A request's JSON body. Raises RequestError."""
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(f"the request body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise RequestError("the request body must be a JSON object")
    return validate(model, value)


def validate(model: type[BodyT], value: Json) -> BodyT:
    """A body that is parsed already. Raises RequestError."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise _refusal(error, model, value) from None


def without_nulls(fields: Mapping[str, Any]) -> Json:
    return {name: value for name, value in fields.items() if value is not None}


def ignored(why: str) -> Any:
    """Describes a field that nothing reads, which is right for this reason."""
    return Field(description=f"Ignored: {why}")


def about(text: str) -> Any:
    """Describes a field."""
    return Field(description=text)


def short(value: Any) -> str:
    """`value` as JSON that fits in a sentence."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _refusal(error: ValidationError, model: type[BaseModel], body: Json) -> RequestError:
    """The first of the errors as a sentence; one that a model's own validator raised says its own."""
    first = error.errors(include_url=False)[0]
    kind, value, context = first["type"], first["input"], first.get("ctx", {})
    steps = [step for step in first["loc"] if not (isinstance(step, str) and step.startswith("<"))]
    if isinstance(context.get("error"), RequestError):
        return context["error"]
    if kind == "missing":
        return _missing(model, body, steps)
    if "tag" in context:
        steps, value = [*steps, context["tag"]], value.get(context["tag"])
    path = _path(steps)
    if kind == "unsupported":
        return RequestError(f"{path}={short(value)} is not supported: the model reads text alone", param=path)
    return RequestError(f"{path} must be {_words(kind, context)}, not {short(value)}", param=path)


def _missing(model: type[BaseModel], body: Json, steps: list[int | str]) -> RequestError:
    """A required field is absent. What it must be is what a refusal says of a value that is of no JSON type."""
    *outer, name = steps
    place: Any = body
    for step in outer:
        place = place[step]
    before = {**place}
    place[name] = object()
    try:
        model.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    finally:
        place.clear()
        place.update(before)
    path = _path(steps)
    return RequestError(f"{path} is required: {_words(first['type'], first.get('ctx', {}))}", param=path)


def _words(kind: str, context: Mapping[str, Any]) -> str:
    if kind == "literal_error":
        return f"one of {context['expected'].replace(' or ', ', ').replace(chr(39), '')}"
    return context["words"] if "words" in context else _WORDS[kind]


def _path(steps: list[int | str]) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).removeprefix(".")


def _told(schema: CoreSchema, words: str) -> CoreSchema:
    return core_schema.custom_error_schema(
        schema, "must_be", custom_error_message="{words}", custom_error_context={"words": words}
    )


def _error(words: str, **context: Any) -> PydanticCustomError:
    return PydanticCustomError("must_be", "{words}", {"words": words, **context})


@dataclass(frozen=True)
class Must:
    """Annotates a type: a value that is refused must be `words`. A list has `least` to `most` items; what is wrong
    with one of them, or with a field of an object, is told of that alone."""

    words: str
    least: int | None = None
    most: int | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        inner = handler(source)
        if _json_type(source) is list:
            bounds: Any = without_nulls({"min_length": self.least, "max_length": self.most})
            outer = _told(core_schema.list_schema(**bounds, strict=True), self.words)
            return core_schema.chain_schema([outer, cast(CoreSchema, {**inner, **bounds, "fail_fast": True})])
        if is_typeddict(source):
            return core_schema.no_info_wrap_validator_function(self._object, inner)
        return _told(inner, self.words)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> Json:
        return handler(schema["steps"][-1] if schema["type"] == "chain" else schema)  # type: ignore[arg-type]

    def _object(self, value: Any, handler: ValidatorFunctionWrapHandler) -> Json:
        if type(value) is not dict:
            raise _error(self.words)
        return _in_order(without_nulls(value), handler)


@dataclass(frozen=True)
class Range:
    """Annotates int or float: a number from `low` (or above it) to `high`. An int stays one where a float may be."""

    low: int | None = None
    high: int | None = None
    above: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        bounds: Any = {"gt" if self.above else "ge": self.low, "le": self.high, "strict": True}
        integer = core_schema.int_schema(**bounds)
        if source is int:
            return _told(integer, self._words("an integer"))
        number = core_schema.union_schema([integer, core_schema.float_schema(**bounds)], mode="left_to_right")
        return _told(number, self._words("a number"))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> Json:
        made = dict(handler(schema))
        return {**made.pop("anyOf")[0], "type": "number", **made} if "anyOf" in made else made

    def _words(self, noun: str) -> str:
        if self.above:
            return f"{noun} above {self.low} and at most {self.high}"
        if self.high is None:
            return f"{noun} of at least {self.low}"
        return f"{noun} from {self.low} to {self.high}"


@dataclass(frozen=True)
class ByType:
    """Annotates a union: the value's JSON type says which of the options it is, which then says what is wrong with
    it. A value of no option's type, or that none of several options of its type takes, must be `words`."""

    words: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        options: dict[str, list[CoreSchema]] = {}
        for option in get_args(source):
            options.setdefault(_branch(_json_type(option)), []).append(handler.generate_schema(option))
        choices = {branch: schemas[0] for branch, schemas in options.items()}
        for branch, schemas in options.items():
            if len(schemas) > 1:
                choices[branch] = _told(core_schema.union_schema(schemas, mode="left_to_right"), self.words)  # type: ignore[arg-type]
        return core_schema.tagged_union_schema(
            cast(Any, choices),
            lambda value: _branch(type(value)),
            custom_error_type="must_be",
            custom_error_message="{words}",
            custom_error_context={"words": self.words},
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> Json:
        made = dict(handler(schema))
        return {"anyOf": made.pop("oneOf"), **made}


@dataclass(frozen=True)
class ByTag:
    """Annotates a union of typed dicts: the field `tag` of an object says which it is, or that it is one of `refused`.

    Without a tag it is the one that is tagged `untagged`, if that is given; or the typed dict `bare`, where it has
    fields of that and none of `instead_of`. An object with any other tag is kept as it is if the union has Json. What
    is no object must be `words`.
    """

    tag: str
    words: str
    refused: tuple[str, ...] = ()
    untagged: str | None = None
    bare: Any = None
    instead_of: tuple[str, ...] = ()

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        options = [source] if is_typeddict(source) else get_args(source)
        choices: dict[str, CoreSchema] = {}
        for option in options:
            for name in self._tags(option) if option != Json else ():
                choices[_branch(name)] = handler.generate_schema(option)
        known = {branch[1:-1]: branch for branch in choices}
        if Json in options:
            choices[_OTHERS] = core_schema.any_schema()
        union = core_schema.tagged_union_schema(
            cast(Any, choices), lambda value: known.get(value[self.tag], _OTHERS)
        )
        return core_schema.no_info_wrap_validator_function(self._opened(known, Json in options), union)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> Json:
        made = dict(handler(schema))
        forms = [form for form in made.pop("oneOf") if form]  # that of others is {}
        if self.bare:
            bare = TypeAdapter(self.bare).json_schema()
            absent = dict.fromkeys((self.tag, *self.instead_of), {"type": "null"})
            required = [name for name in bare["required"] if name != self.tag]
            forms.append({**bare, "properties": {**bare["properties"], **absent}, "required": required})
        known = [branch[1:-1] for branch in cast(Any, schema)["schema"]["choices"]]
        if _OTHERS[1:-1] in known:
            listed = [name for name in known if name] + [*self.refused]
            tag = {"type": "string", "not": {"enum": listed}}
            forms.append({"type": "object", "properties": {self.tag: tag}, "required": [self.tag]})
        return {"type": "object", "oneOf": forms, **made}

    def _opened(
        self, known: Mapping[str, str], others: bool
    ) -> Callable[[Any, ValidatorFunctionWrapHandler], Json]:
        """What gives an object to the union: with a tag, without nulls."""
        listed = f"one of {', '.join(known)}"
        bare = self._tags(self.bare)[0] if self.bare else None
        of_bare = get_type_hints(self.bare).keys() - {self.tag} if self.bare else ()

        def opened(value: Any, handler: ValidatorFunctionWrapHandler) -> Json:
            if type(value) is not dict:
                raise _error(self.words)
            given = without_nulls(value)
            name = given.get(self.tag)
            if (
                name is None
                and not given.keys().isdisjoint(of_bare)
                and given.keys().isdisjoint(self.instead_of)
            ):
                name = given[self.tag] = bare
            elif name is None and self.untagged is not None:
                name = given[self.tag] = self.untagged
            if isinstance(name, str):
                if name in known or (others and name not in self.refused):
                    return _in_order(given, handler)
                if name in self.refused:
                    raise PydanticCustomError("unsupported", "", {"tag": self.tag})
            raise _error(listed, tag=self.tag)

        return opened

    def _tags(self, option: Any) -> tuple[str, ...]:
        return get_args(get_type_hints(option)[self.tag])


def _in_order(given: Json, handler: ValidatorFunctionWrapHandler) -> Json:
    """What is read of `given`, in its order, which a chat template may show."""
    read = handler(given)
    return {name: read[name] for name in given}


def _branch(kind: type | str) -> str:
    """A union's name for one of its options, by which a path's steps are told from fields."""
    return f"<{kind if isinstance(kind, str) else kind.__name__}>"


def _json_type(annotation: Any) -> type:
    """The type of the values that json has for `annotation`."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _json_type(get_args(annotation)[0])
    if origin is not None and not isinstance(origin, type):  # Literal, Union of objects
        options = get_args(annotation)
        return type(options[0]) if isinstance(options[0], str) else dict
    kind = origin or annotation
    return kind if kind in (str, bool, int, float, list, NoneType) else dict


Filled = Annotated[str, Field(min_length=1), Must("a non-empty string")]
ModelName = Annotated[str, about("The served model's name, or an adapter's; absent, it is the model.")]
Priority = Annotated[int, Range(-(2**31), 2**31 - 1), about("A lower one goes first.")]
User = Annotated[str, ignored("nobody here looks for abuse by single users.")]
