"""What OpenTelemetry's GenAI semantic conventions call what Bridge's events of models and tools say.

https://github.com/open-telemetry/semantic-conventions-genai; the names are spelled out here, for the Python package
that has them calls them all deprecated since they moved there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bridge_kernel.contract.telemetry import Scalar

__all__ = ("is_tool", "model_attributes", "model_of", "provider_of", "tool_attributes")

# What DSPy's models begin with, as LiteLLM has it, and what the conventions call that provider.
_PROVIDERS: Final = {
    "azure": "azure.ai.openai",
    "azure_ai": "azure.ai.inference",
    "bedrock": "aws.bedrock",
    "cohere_chat": "cohere",
    "gemini": "gcp.gemini",
    "mistral": "mistral_ai",
    "vertex_ai": "gcp.vertex_ai",
    "watsonx": "ibm.watsonx.ai",
    "xai": "x_ai",
}


def provider_of(model: str) -> str:
    """`openai` of `openai/gpt-4.1`."""
    prefix, slash, _ = model.partition("/")
    return _PROVIDERS.get(prefix, prefix) if slash else "unknown"


def model_of(model: str) -> str:
    """`gpt-4.1` of `openai/gpt-4.1`."""
    return model.partition("/")[2] or model


def is_tool(name: tuple[str, ...]) -> bool:
    """Whether events of this name, less its last word, are of a tool's run."""
    return name in {("bridge", "tool"), ("bridge", "dspy", "tool")}


def model_attributes(metadata: Mapping[str, Scalar], measurements: Mapping[str, int | float]) -> dict[str, Any]:
    """Of a language model's call; the prompt and the completion only if the event has them."""
    model = str(metadata["model"])
    said: dict[str, Any] = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": provider_of(model),
        "gen_ai.request.model": model_of(model),
    }
    if (answered := metadata.get("response_model")) is not None:
        said["gen_ai.response.model"] = answered
    if (streamed := metadata.get("streamed")) is not None:
        said["gen_ai.request.stream"] = streamed
    for ours, theirs in (("input_tokens", "input_tokens"), ("output_tokens", "output_tokens")):
        if ours in measurements:
            said[f"gen_ai.usage.{theirs}"] = int(measurements[ours])
    if "first_token" in measurements:
        said["gen_ai.response.time_to_first_chunk"] = measurements["first_token"] / 1e9
    if (prompt := metadata.get("prompt")) is not None:
        said["gen_ai.input.messages"] = _messages(str(prompt), "user")
    if (completion := metadata.get("completion")) is not None:
        said["gen_ai.output.messages"] = _messages(str(completion), "assistant")
    return said


def tool_attributes(metadata: Mapping[str, Scalar]) -> dict[str, Any]:
    """Of a tool's run; what it was given and returned only if the event has that."""
    said: dict[str, Any] = {
        "gen_ai.operation.name": "execute_tool",
        "gen_ai.tool.name": str(metadata["tool"]),
        "gen_ai.tool.type": "function",
    }
    if (arguments := metadata.get("arguments")) is not None:
        said["gen_ai.tool.call.arguments"] = arguments
    if (result := metadata.get("result")) is not None:
        said["gen_ai.tool.call.result"] = result
    return said


def _messages(text: str, role: str) -> str:
    """What was captured, as the conventions want it: messages with parts. What was clipped is one text."""
    try:
        captured = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):  # clipped; or nested deeper than can be read
        captured = text
    if not isinstance(captured, list):
        captured = [captured]
    return msgspec.json.encode([_message(one, role) for one in captured]).decode()


def _message(one: Any, role: str) -> dict[str, Any]:
    if isinstance(one, dict) and "content" in one:
        return {"role": str(one.get("role", role)), "parts": _parts(one["content"])}
    if isinstance(one, dict) and "text" in one:  # as DSPy has an answer that is more than a text
        return {"role": role, "parts": _parts(one["text"])}
    return {"role": role, "parts": _parts(one)}


def _parts(content: Any) -> list[dict[str, Any]]:
    if isinstance(content, list) and all(isinstance(part, dict) and "type" in part for part in content):
        return [{"type": "text", "content": part["text"]} if "text" in part else part for part in content]
    if not isinstance(content, str):
        content = msgspec.json.encode(content).decode()
    return [{"type": "text", "content": content}]
