"""Request bodies: their pydantic base model, annotations that word validation errors, and the parser.

A null field counts as absent, and unknown fields are kept. A validation error names the innermost wrong value by a
path such as `messages[0].role`. Objects that are passed on unchanged (messages, tools) are typed dicts, others models.
"""

from __future__ import annotations

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
from serve_app.apis.shared.validation_errors import request_error

Json = dict[str, Any]
_OTHERS = "<>"  # the union branch for objects whose tag is not listed


class Body(BaseModel):
    """Base of a request body, or of an object in one."""

    model_config = ConfigDict(extra="allow", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return without_nulls(value) if type(value) is dict else value

    @property
    def undeclared(self) -> Json:
        """The fields that the model does not declare."""
        return self.model_extra or {}


BodyT = TypeVar("BodyT", bound=BaseModel)


def read_body(model: type[BodyT], body: bytes) -> BodyT:
    """Parses and validates a JSON body. Raises RequestError."""
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(f"the request body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise RequestError("the request body must be a JSON object")
    return validate(model, value)


def read_admin_body(model: type[BodyT], body: bytes) -> BodyT:
    """As `read_body`, but refuses unknown fields: what an admin has misspelled would change something else."""
    read = read_body(model, body)
    for name in read.model_extra or ():
        raise RequestError(f"unknown field {name!r}; known are {', '.join(model.model_fields)}", param=name)
    return read


def validate(model: type[BodyT], value: Json) -> BodyT:
    """Validates a body that is already parsed. Raises RequestError."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise request_error(error, model, value) from None


def without_nulls(fields: Mapping[str, Any]) -> Json:
    return {name: value for name, value in fields.items() if value is not None}


def ignored(why: str) -> Any:
    """Describes a field that is accepted and ignored, and why that is right."""
    return Field(description=f"Ignored: {why}")


def about(text: str) -> Any:
    """Describes a field on the OpenAPI page."""
    return Field(description=text)


def _with_error(schema: CoreSchema, expected: str) -> CoreSchema:
    """Returns `schema` with its errors replaced by "must be `expected`"."""
    return core_schema.custom_error_schema(
        schema, "must_be", custom_error_message="{expected}", custom_error_context={"expected": expected}
    )


def _error(expected: str, **context: Any) -> PydanticCustomError:
    return PydanticCustomError("must_be", "{expected}", {"expected": expected, **context})


@dataclass(frozen=True)
class Must:
    """Annotates a type: the error for an invalid value is "must be `expected`".

    An invalid item of a list, or field of an object, has an error of its own. A list has `min_items` to `max_items`.
    """

    expected: str
    min_items: int | None = None
    max_items: int | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        inner = handler(source)
        if _json_type(source) is list:
            bounds: Any = without_nulls({"min_length": self.min_items, "max_length": self.max_items})
            outer = _with_error(core_schema.list_schema(**bounds, strict=True), self.expected)
            return core_schema.chain_schema([outer, cast(CoreSchema, {**inner, **bounds, "fail_fast": True})])
        if is_typeddict(source):
            return core_schema.no_info_wrap_validator_function(self._object, inner)
        return _with_error(inner, self.expected)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> Json:
        return handler(schema["steps"][-1] if schema["type"] == "chain" else schema)  # type: ignore[arg-type]

    def _object(self, value: Any, handler: ValidatorFunctionWrapHandler) -> Json:
        if type(value) is not dict:
            raise _error(self.expected)
        return _in_order(without_nulls(value), handler)


@dataclass(frozen=True)
class Range:
    """Annotates int or float: a number from `low` to `high`, both included unless `exclusive_low`.

    An integer given for a float stays an integer.
    """

    low: int | None = None
    high: int | None = None
    exclusive_low: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        bounds: Any = {"gt" if self.exclusive_low else "ge": self.low, "le": self.high, "strict": True}
        integer = core_schema.int_schema(**bounds)
        if source is int:
            return _with_error(integer, self._describe("an integer"))
        number = core_schema.union_schema([integer, core_schema.float_schema(**bounds)], mode="left_to_right")
        return _with_error(number, self._describe("a number"))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> Json:
        made = dict(handler(schema))
        return {**made.pop("anyOf")[0], "type": "number", **made} if "anyOf" in made else made

    def _describe(self, noun: str) -> str:
        if self.exclusive_low:
            return f"{noun} above {self.low} and at most {self.high}"
        if self.high is None:
            return f"{noun} of at least {self.low}"
        return f"{noun} from {self.low} to {self.high}"


@dataclass(frozen=True)
class ByType:
    """Annotates a union: only the option with the value's JSON type is validated, so the error is that option's.

    The error is "must be `expected`" for a value of no option's type, or if several options of its type all reject it.
    """

    expected: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        options: dict[str, list[CoreSchema]] = {}
        for option in get_args(source):
            options.setdefault(_branch(_json_type(option)), []).append(handler.generate_schema(option))
        choices = {branch: schemas[0] for branch, schemas in options.items()}
        for branch, schemas in options.items():
            if len(schemas) > 1:
                union = core_schema.union_schema(schemas, mode="left_to_right")  # type: ignore[arg-type]
                choices[branch] = _with_error(union, self.expected)
        return core_schema.tagged_union_schema(
            cast(Any, choices),
            lambda value: _branch(type(value)),
            custom_error_type="must_be",
            custom_error_message="{expected}",
            custom_error_context={"expected": self.expected},
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> Json:
        made = dict(handler(schema))
        return {"anyOf": made.pop("oneOf"), **made}


@dataclass(frozen=True)
class ByTag:
    """Annotates a union of typed dicts that the field `tag` discriminates. Tags in `refused` are not supported.

    An object without a tag is `bare`, if it has fields of that typed dict and none of `unless`; else it has the tag
    `untagged`, if that is given. An object with another tag is kept unchanged if Json is an option of the union. The
    error for a value that is not an object is "must be `expected`".
    """

    tag: str
    expected: str
    refused: tuple[str, ...] = ()
    untagged: str | None = None
    bare: Any = None
    unless: tuple[str, ...] = ()

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
        return core_schema.no_info_wrap_validator_function(self._tagged(known, Json in options), union)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> Json:
        made = dict(handler(schema))
        forms = [form for form in made.pop("oneOf") if form]  # _OTHERS has {}
        if self.bare:
            bare = TypeAdapter(self.bare).json_schema()
            absent = dict.fromkeys((self.tag, *self.unless), {"type": "null"})
            required = [name for name in bare["required"] if name != self.tag]
            forms.append({**bare, "properties": {**bare["properties"], **absent}, "required": required})
        known = [branch[1:-1] for branch in cast(Any, schema)["schema"]["choices"]]
        if _OTHERS[1:-1] in known:
            listed = [name for name in known if name] + [*self.refused]
            tag = {"type": "string", "not": {"enum": listed}}
            forms.append({"type": "object", "properties": {self.tag: tag}, "required": [self.tag]})
        return {"type": "object", "oneOf": forms, **made}

    def _tagged(
        self, known: Mapping[str, str], others: bool
    ) -> Callable[[Any, ValidatorFunctionWrapHandler], Json]:
        """Returns the validator that drops nulls, adds a missing tag, checks the tag and calls the union.

        `known` has the union's tags; `others` tells whether it accepts objects with other tags.
        """
        listed = f"one of {', '.join(known)}"
        bare = self._tags(self.bare)[0] if self.bare else None
        bare_fields = get_type_hints(self.bare).keys() - {self.tag} if self.bare else ()

        def validate_tagged(value: Any, handler: ValidatorFunctionWrapHandler) -> Json:
            if type(value) is not dict:
                raise _error(self.expected)
            given = without_nulls(value)
            name = given.get(self.tag)
            if (
                name is None
                and not given.keys().isdisjoint(bare_fields)
                and given.keys().isdisjoint(self.unless)
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

        return validate_tagged

    def _tags(self, option: Any) -> tuple[str, ...]:
        return get_args(get_type_hints(option)[self.tag])


def _in_order(given: Json, handler: ValidatorFunctionWrapHandler) -> Json:
    """Validates `given` and restores the order of its fields, which a chat template may render."""
    read = handler(given)
    return {name: read[name] for name in given}


def _branch(kind: type | str) -> str:
    """Returns a union's name for an option, in brackets that tell it from a field in a path."""
    return f"<{kind if isinstance(kind, str) else kind.__name__}>"


def _json_type(annotation: Any) -> type:
    """Returns the type to which JSON values of `annotation` are decoded."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _json_type(get_args(annotation)[0])
    if origin is not None and not isinstance(origin, type):  # Literal, or a union of objects
        options = get_args(annotation)
        return type(options[0]) if isinstance(options[0], str) else dict
    kind = origin or annotation
    return kind if kind in (str, bool, int, float, list, NoneType) else dict


Filled = Annotated[str, Field(min_length=1), Must("a non-empty string")]
ModelName = Annotated[str, about("Name of the served model or of an adapter; the model if absent.")]
Priority = Annotated[
    int, Range(-(2**31), 2**31 - 1), about("Requests with a lower number are scheduled first.")
]
CacheSalt = Annotated[Filled, about("Prompts share cached prefixes only with prompts of the same salt.")]
User = Annotated[str, ignored("abuse by single users is not monitored.")]
