"""A DSPy program whose state can change without a language model. Importing it imports DSPy."""

from __future__ import annotations

from typing import Any

import dspy


class Program(dspy.Module):  # type: ignore[misc]  # dspy has no types
    def __init__(self, signature: str = "question -> answer") -> None:
        super().__init__()
        self.predict = dspy.Predict(signature)

    def teach(self, question: str, answer: str) -> int:
        self.predict.demos.append({"question": question, "answer": answer})
        return len(self.predict.demos)

    def recall(self) -> list[dict[str, Any]]:
        return [dict(demo) for demo in self.predict.demos]
