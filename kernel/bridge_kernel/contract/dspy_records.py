"""How DSPy's predictions and examples cross: as records, known by name, so that DSPy need not be there."""

from __future__ import annotations

from typing import Any

from .records import register_record

__all__ = ("register",)


def register() -> None:
    """Let the codec carry `dspy.Prediction` and `dspy.Example`, without importing DSPy."""

    def fields(example: Any) -> dict[str, Any]:
        return dict(example.items(include_dspy=True))

    def example_fields(example: Any) -> dict[str, Any]:
        keys = example._input_keys
        return {"store": fields(example), "inputs": None if keys is None else sorted(keys)}

    def prediction(given: dict[str, Any]) -> Any:
        import dspy

        return dspy.Prediction(**given)

    def example(given: dict[str, Any]) -> Any:
        import dspy

        made = dspy.Example(**given["store"])
        return made if given["inputs"] is None else made.with_inputs(*given["inputs"])

    register_record("dspy.primitives.prediction.Prediction", fields, prediction)
    register_record("dspy.primitives.example.Example", example_fields, example)
