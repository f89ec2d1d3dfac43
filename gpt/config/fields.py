"""Defines the types and ranges of the values in the configuration."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, get_args

import pydantic.dataclasses
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, Strict, ValidationError, WrapValidator
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

# extra: a misspelt key is an error. frozen: nobody changes it later.
section = pydantic.dataclasses.dataclass(config=ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False))

# Strict: "3" is not a number and true is not 1. But 1e6 is how people write a million tokens, and that is a float.
Int = Annotated[int, BeforeValidator(lambda v: int(v) if isinstance(v, float) and v.is_integer() else v), Strict()]
Float = Annotated[float, Strict()]
Flag = Annotated[bool, Strict()]
Count = Annotated[Int, Field(ge=1, le=2**63 - 1)]  # where torch's integers end; lt would be shown rounded
Even = Annotated[Count, Field(multiple_of=2)]
Seed = Annotated[Int, Field(ge=0, le=2**63 - 1)]
Positive = Annotated[Float, Field(gt=0)]
Whole = Annotated[Int, Field(ge=0)]
NonNegative = Annotated[Float, Field(ge=0)]
Fraction = Annotated[Float, Field(ge=0, le=1)]
PositiveFraction = Annotated[Float, Field(gt=0, le=1)]
BelowOne = Annotated[Float, Field(ge=0, lt=1)]
Pattern = Annotated[str, Field(pattern=r"^[SL]+$")]
Text = Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$")]


def _or_auto(what: str) -> WrapValidator:
    """Gives one message for a value that is neither "auto" nor `what`; pydantic has one for each, under other keys."""

    def validate(value: Any, handler: Any) -> Any:
        try:
            return handler(value)
        except ValidationError as error:
            raise PydanticCustomError("or_auto", f"input should be auto or {what}") from error

    return WrapValidator(validate)


def _check_rising(values: list[int]) -> list[int]:
    if any(a >= b for a, b in itertools.pairwise(values)):
        raise PydanticCustomError("rising", "each number should be larger than the one before")
    return values


def _check_distinct(values: list[str]) -> list[str]:
    if len(set(values)) < len(values):
        raise PydanticCustomError("distinct", "each name should come once")
    return values


Rising = AfterValidator(_check_rising)
Distinct = AfterValidator(_check_distinct)
CountOrAuto = Annotated[Count | Literal["auto"], _or_auto("a whole number from 1 on")]
FlagOrAuto = Annotated[Flag | Literal["auto"], _or_auto("true or false")]
Threads = Annotated[Int, Field(ge=1, le=1024)]
PrecisionName = Literal["auto", "float32", "bfloat16", "int8", "int4"]  # of weights that text is generated with
DeviceName = Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")]


@dataclass(frozen=True)
class Variants:
    """A discriminated union of sections: the value of `key` names the dataclass that the other keys must match.

    pydantic's own discriminated unions are fixed when a class is made, put the name of the dataclass into the path of
    an error, and check nothing else where the name is wrong."""

    key: str
    kinds: Callable[[], Mapping[str, type]]

    def choose(self, values: Any) -> type:
        """The dataclass that `values` names, else the one with most of its keys.

        Where somebody has changed the name alone, and all other keys are those of another kind, it is that one."""
        kinds, keys = self.kinds(), set(values)
        names = {kind: {field.name for field in fields(kind)} for kind in kinds.values()}
        named = kinds.get(str(values.get(self.key)))
        if named is None:
            return max(names, key=lambda kind: len(names[kind] & keys))
        complete = max((k for k in names if names[k] <= keys), key=lambda k: len(names[k]), default=named)
        return complete if len(keys - names[named]) > 2 else named  # one or two keys too many may have been typed

    def validate(self, values: Any) -> Any:
        kinds = self.kinds()
        if isinstance(values, tuple(kinds.values())):
            return values
        if not isinstance(values, Mapping):
            raise PydanticCustomError("dataclass_type", "input should be a section")
        errors = []
        if values.get(self.key) not in list(kinds):
            kind_of_error = "one_of" if self.key in values else "missing"
            wrong = PydanticCustomError(kind_of_error, f"it is one of {', '.join(kinds)}")
            errors = [InitErrorDetails(type=wrong, loc=(self.key,), input=values.get(self.key))]
        kind = self.choose(values)
        if not errors and kinds[values[self.key]] is not kind:
            word = next(word for word in kinds if kinds[word] is kind)
            wrong = PydanticCustomError("one_of", f"its other keys are those of {word}; choose a file of the group")
            errors = [InitErrorDetails(type=wrong, loc=(self.key,), input=values[self.key])]
        try:
            chosen = pydantic.TypeAdapter(kind).validate_python(dict(values))
        except ValidationError as error:
            if not errors:
                raise
            # Without a name nobody has chosen a kind, and which of its keys are missing says nothing.
            known = [item for item in error.errors() if self.key in values or item["type"] != "missing"]
            errors += [_raised_again(item) for item in known if item["loc"] != (self.key,)]
        if errors:
            raise ValidationError.from_exception_data("section", errors)
        return chosen

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self.validate)


def _raised_again(item: Any) -> InitErrorDetails:
    return InitErrorDetails(type=PydanticCustomError(item["type"], item["msg"]), loc=item["loc"], input=item["input"])


def first_error(error: ValidationError) -> str:
    """The first thing that is wrong, `rank: Input should be greater than or equal to 1`."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def variants(union: Any, key: str) -> Any:
    """The union of dataclasses `union`, told apart by `key`, whose Literal in each says which names it has."""
    kinds = {name: kind for kind in get_args(union) for name in get_args(kind.__annotations__[key])}
    return Annotated[union, Variants(key, lambda: kinds)]


def with_texts(values: dict[str, Any], texts: dict[str, str]) -> dict[str, Any]:
    """Replaces values in place by texts, which are given by full key, such as wandb.tags.0; returns `values`."""
    for key, text in texts.items():
        *sections, last = key.split(".")
        place: Any = values
        for name in sections:
            place = place[int(name) if isinstance(place, list) else name]
        place[int(last) if isinstance(place, list) else last] = text
    return values
