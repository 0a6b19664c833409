"""`Secrets`: a session's API keys and the like, sealed wherever they are kept and never shown."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import TYPE_CHECKING

from pydantic import SecretStr

from .store import check_name
from .store.model import LM_KEY

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .store.vault import Vault
    from .variables import Access

__all__ = ("Secrets",)


class Secrets(MutableMapping[str, SecretStr | str]):
    """`session.secrets["OPENAI_API_KEY"] = "…"`. A command gets those that it names: `session.call(…, secrets=["…"])`.

    Reading one gives a `SecretStr`, which shows itself only when it is asked: `.get_secret_value()`.
    """

    def __init__(self, access: Access, vault: Vault) -> None:
        self._access = access
        self._vault = vault

    def __getitem__(self, name: str) -> SecretStr:
        """Raises `NotFound`; `SecretUnreadable` if the key that sealed it is gone."""
        return SecretStr(self._vault.unseal(self._access.state.secret(name)).decode())

    def __setitem__(self, name: str, value: SecretStr | str) -> None:
        check_name("secret", name)
        if name == LM_KEY:
            raise ValueError(f"{name!r} is set by session.lm(…, api_key=…)")
        text = value.get_secret_value() if isinstance(value, SecretStr) else value
        if not text:
            raise ValueError("a secret is a string that is not empty")
        self._access.wait(self._access.state.put_secret(name, self._vault.seal(text.encode())))

    def __delitem__(self, name: str) -> None:
        self._access.wait(self._access.state.forget_secret(name))

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(name for name in self._access.state.secrets if name != LM_KEY))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in self._access.state.secrets

    def __repr__(self) -> str:
        return f"<Secrets {', '.join(self) or 'none'}>"
