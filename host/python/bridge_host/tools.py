"""Tools: functions of the host that kernels call back, with a schema from their type hints and docstring."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Final

import docstring_parser
from pydantic import BaseModel, ConfigDict, Field, PydanticUserError, ValidationError, create_model
from pydantic.errors import PydanticSchemaGenerationError
from pydantic.json_schema import GenerateJsonSchema

from bridge_kernel.contract.errors import InvalidArguments
from bridge_kernel.contract.values import ToolRef

if TYPE_CHECKING:
    from collections.abc import Callable

    from bridge_kernel.contract.methods import ToolInfo
    from bridge_kernel.contract.values import Tag

__all__ = ("Tool",)

_VARIADIC: Final = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class _Schema(GenerateJsonSchema):
    """JSON Schema in which a type that JSON Schema cannot describe (an array, a frame) is left open."""

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> dict[str, Any]:
        return {}


class Tool:
    """A function of the host that kernels may call. Pass it as an argument and it arrives as a Python function."""

    def __init__(
        self, function: Callable[..., Any], *, name: str = "", description: str = "", idempotent: bool = False
    ) -> None:
        """`name` and `description` default to the function's own. `idempotent`: to run it twice does no harm.

        Raises:
            TypeError: the function takes *args, which a schema cannot describe, or its hints make no schema.
        """
        self.function = function
        self.idempotent = idempotent
        self.name = name or getattr(function, "__name__", type(function).__name__)
        parsed = docstring_parser.parse(inspect.getdoc(function) or "")
        summary = "\n\n".join(filter(None, (parsed.short_description, parsed.long_description)))
        self.description = description or summary
        self.asynchronous = inspect.iscoroutinefunction(function)
        self._parameters = _parameters(self.name, function)
        about = {param.arg_name: param.description or "" for param in parsed.params}
        self._model = _model(self.name, self._parameters, about)
        self.schema: dict[str, Any] = self._model.model_json_schema(schema_generator=_Schema)
        self.schema.pop("title", None)

    @property
    def __bridge_tag__(self) -> Tag:
        return ToolRef(self.name, self.description, self.schema)

    @property
    def info(self) -> ToolInfo:
        from bridge_kernel.contract.methods import ToolInfo

        return ToolInfo(self.name, self.description, self.schema)

    def validate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments by name, converted to the types that the function declares.

        Raises:
            InvalidArguments: they do not fit the schema; the message says which and how.
        """
        names = [name for name, p in self._parameters.items() if p.kind not in _VARIADIC]
        if len(args) > len(names):
            raise InvalidArguments(f"tool {self.name!r} takes {len(names)} arguments, {len(args)} were given")
        given = dict(zip(names, args, strict=False))
        if twice := given.keys() & kwargs.keys():
            raise InvalidArguments(f"tool {self.name!r} was given {', '.join(sorted(twice))} twice")
        given |= kwargs
        try:
            model = self._model.model_validate(given)
        except ValidationError as exc:
            problems = "; ".join(
                f"{'.'.join(map(str, problem['loc'])) or 'arguments'}: {problem['msg']}"
                for problem in exc.errors(include_url=False, include_input=False)
            )
            raise InvalidArguments(
                f"tool {self.name!r}: {problems}",
                remedy=f"It takes {inspect.Signature(list(self._parameters.values()))}.",
            ) from None
        # By attribute, not by model_dump: nested models stay models, as the function declares them.
        fields = {name: getattr(model, field) for name, field in _field_names(self._parameters).items()}
        kept = {name: value for name, value in fields.items() if name in given or name not in self._parameters}
        return {**kept, **(model.model_extra or {})}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function here in the host, unvalidated, as if it were no tool."""
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        signature = inspect.Signature(list(self._parameters.values()))
        first = self.description.split("\n", 1)[0]
        return f"<Tool {self.name}{signature}{': ' + first if first else ''}>"


def _parameters(name: str, function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    try:
        signature = inspect.signature(function, eval_str=True)
    except NameError:
        signature = inspect.signature(function)  # hints that exist for type checkers only
    for parameter in signature.parameters.values():
        if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
            raise TypeError(
                f"tool {name!r}: parameter {parameter} cannot be given by name; tools' arguments are. Name each of them."
            )
    return dict(signature.parameters)


def _field_names(parameters: dict[str, inspect.Parameter]) -> dict[str, str]:
    """Parameter names to pydantic field names: a model's fields may not begin with an underscore or be its methods."""
    return {
        name: f"p_{name}" if name.startswith("_") or hasattr(BaseModel, name) else name
        for name, p in parameters.items()
        if p.kind not in _VARIADIC
    }


def _model(tool: str, parameters: dict[str, inspect.Parameter], about: dict[str, str]) -> type[BaseModel]:
    fields: dict[str, Any] = {}
    for name, field in _field_names(parameters).items():
        parameter = parameters[name]
        annotation = Any if parameter.annotation is inspect.Parameter.empty else parameter.annotation
        if isinstance(annotation, str):
            annotation = Any
        default = ... if parameter.default is inspect.Parameter.empty else parameter.default
        alias = name if field != name else None
        fields[field] = (annotation, Field(default, description=about.get(name) or None, alias=alias))
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    config = ConfigDict(
        arbitrary_types_allowed=True, extra="allow" if open_ended else "forbid", protected_namespaces=()
    )
    try:
        return create_model(tool, __config__=config, **fields)
    except (PydanticSchemaGenerationError, PydanticUserError) as exc:
        raise TypeError(f"tool {tool!r}: its type hints make no schema: {exc}") from exc
