"""What a kernel allows and how much of it: traitlets, so that a command line or a config file can set them."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from traitlets import Bool, Int, List, Unicode
from traitlets.config import Configurable

from .contract.errors import PolicyDenied
from .contract.frames import MAX_MESSAGE_BYTES

__all__ = ("Policy",)


class Policy(Configurable):
    """Limits and permissions of one kernel.

    A host runs code in its own kernels, so the defaults allow that; narrow them for a host that you do
    not trust as far: `--Policy.allow_names='["math.*"]' --Policy.allow_source=False --Policy.allow_pickle=False`.
    """

    allow_names: List[str] = List(
        Unicode(), default_value=["*"], help="Patterns of the dotted names that commands may reach."
    ).tag(config=True)
    allow_source = Bool(True, help="May a session send the source of functions?").tag(config=True)
    allow_pickle = Bool(True, help="May the state of an instance be a pickle?").tag(config=True)
    allow_execute = Bool(True, help="May cells be run with execute_request?").tag(config=True)
    max_message_bytes = Int(MAX_MESSAGE_BYTES, min=1 << 16, help="The largest message taken, buffers included.").tag(
        config=True
    )
    max_commands = Int(256, min=1, help="Commands running or waiting at once; one more is Overloaded.").tag(config=True)
    max_connections = Int(64, min=1, help="Hosts attached at once.").tag(config=True)
    max_sources = Int(256, min=1, help="Functions' sources kept compiled; the least recently used goes.").tag(
        config=True
    )
    max_cache_bytes = Int(
        64 << 20, min=0, help="What is kept of instances rebuilt before, so that they are rebuilt faster; 0: nothing."
    ).tag(config=True)
    cache_names: List[str] = List(
        Unicode(),
        default_value=["dspy.*"],
        help="Patterns of the classes whose instances may be kept: those that are made from their arguments and "
        "state alone, whatever the time, the files and the environment are.",
    ).tag(config=True)
    max_output_bytes = Int(
        8 << 20, min=1024, help="What one command may print; the rest is dropped, and said to be."
    ).tag(config=True)

    def check_name(self, name: str) -> None:
        """Raise `PolicyDenied` unless the dotted `name` may be reached."""
        if not any(pattern == "*" or fnmatchcase(name, pattern) for pattern in self.allow_names):
            raise PolicyDenied(
                f"{name!r} may not be reached in this kernel: it allows {', '.join(self.allow_names) or 'nothing'}",
                remedy=f"Start the kernel with --Policy.allow_names that include {name!r}.",
            )

    def describe(self) -> dict[str, Any]:
        """The permissions, as `bridge.attach` reports them."""
        return {
            "allow_names": list(self.allow_names),
            "allow_source": self.allow_source,
            "allow_pickle": self.allow_pickle,
            "allow_execute": self.allow_execute,
        }
