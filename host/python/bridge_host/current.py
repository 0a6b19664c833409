"""`Bridge` and `SessionStore`: the principles' own words, for the host that is open."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from bridge_kernel.contract.errors import HostClosed

if TYPE_CHECKING:
    from .sync import Host, Instance, Session, Stream

__all__ = ("Bridge", "SessionStore")

_hosts: list[Host] = []
_lock = threading.Lock()
DEFAULT_SESSION = "default"


def opened(host: Host) -> None:
    with _lock:
        _hosts.append(host)


def closed(host: Host) -> None:
    with _lock:
        if host in _hosts:
            _hosts.remove(host)


def _host() -> Host:
    with _lock:
        if not _hosts:
            raise HostClosed("no host is open", remedy="Open one: host = Host(), or with Host() as host: …")
        return _hosts[-1]


class Bridge:
    """Commands of the host that was opened last. `session` is the id of one; without it, they share one session."""

    @staticmethod
    def session(id: str = DEFAULT_SESSION) -> Session:
        return _host().session(id)

    @staticmethod
    def create_instance(class_name: str, /, *args: Any, session: str = DEFAULT_SESSION, **kwargs: Any) -> Instance:
        """Make an object in a kernel and keep it in the host; the instance is its ref."""
        return _host().session(session).create(class_name, *args, **kwargs)

    @staticmethod
    def call_method(
        ref: Instance | str, method: str, /, *args: Any, session: str = DEFAULT_SESSION, **kwargs: Any
    ) -> Any:
        """Call a method of an instance, given as itself or as its ref."""
        instance = _host().session(session).instance(ref) if isinstance(ref, str) else ref
        return instance.call(method, *args, **kwargs)

    @staticmethod
    def call(name: str, /, *args: Any, session: str = DEFAULT_SESSION, **kwargs: Any) -> Any:
        return _host().session(session).call(name, *args, **kwargs)

    @staticmethod
    def stream(name: str, /, *args: Any, session: str = DEFAULT_SESSION, **kwargs: Any) -> Stream:
        return _host().session(session).stream(name, *args, **kwargs)


class SessionStore:
    """The sessions of the host that was opened last, by id."""

    @staticmethod
    def set_variable(session_id: str, name: str, value: Any) -> None:
        _host().session(session_id)[name] = value

    @staticmethod
    def get_variable(session_id: str, name: str) -> Any:
        """Raises `NotFound`."""
        return _host().session(session_id)[name]

    @staticmethod
    def delete_variable(session_id: str, name: str) -> None:
        del _host().session(session_id)[name]

    @staticmethod
    def list_sessions() -> list[str]:
        return _host().sessions()

    @staticmethod
    def delete_session(session_id: str) -> None:
        _host().delete_session(session_id)
