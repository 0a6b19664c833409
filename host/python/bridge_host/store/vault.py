"""`Vault`: seals and unseals secrets, and keeps the key to them: in memory, in the system's keyring, or in a file.

Fernet (AES and HMAC) of the package `cryptography`, imported when the first secret comes. Clear text appears in no
exception, repr or log. The sealed bytes are the store's to keep.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from bridge_kernel.contract.errors import SecretUnreadable

if TYPE_CHECKING:
    from cryptography.fernet import Fernet
    from keyring.backend import KeyringBackend

__all__ = ("KEYRING_SERVICE", "Vault")

KEYRING_SERVICE: Final = "bridge"
"""The service that keys are kept under in a keyring; the user is the store."""
_MAX_KEY_BYTES: Final = 256  # of a key's file: a key has 44 and the end of the line


class _Place(Protocol):
    """Where a key is kept. `str()` of it says so in messages."""

    def read(self) -> bytes | None:
        """The key; None if there is none. Raises `SecretUnreadable`: there may be one, which cannot be had."""
        ...

    def write(self, key: bytes) -> None:
        """Keep a key where none is, for good when it returns. Raises `SecretUnreadable`, or `OSError`."""
        ...


class Vault:
    """Any thread may use it. The key is made when the first secret is sealed, and not before."""

    def __init__(self, places: tuple[_Place, ...]) -> None:
        """The key is in the first of the places that has one; a new one goes into the last."""
        self._places = places
        self._fernet: Fernet | None = None
        self._digest_key = b""
        self._lock = threading.Lock()

    @classmethod
    def in_memory(cls) -> Vault:
        """A vault whose key nobody keeps: what it sealed is lost with it."""
        return cls((_Memory(),))

    @classmethod
    def beside(cls, path: str | os.PathLike[str], keyring: bool | None = None, *, store_id: str = "") -> Vault:
        """The vault of the store at `path`. In a keyring its key has the name `store_id`, by default the full path.

        `keyring` says where the key is: True, in the system's keyring; False, in the file `<path>.key`, which only
        its owner can read; None, where it is already, else in the keyring if there is one.

        Raises:
            SecretUnreadable: a keyring is asked for and there is none.
        """
        file = _File(Path(f"{os.fspath(path)}.key"))
        if keyring is False:
            return cls((file,))
        backend = _backend()
        if backend is None:
            if keyring:
                raise SecretUnreadable(
                    "this system has no keyring to keep the key of secrets in",
                    remedy="pip install 'bridge-kernel[keyring]', and a backend of it; or keep the key in a file: "
                    "keyring=False.",
                )
            return cls((file,))
        kept = _Keyring(backend, store_id or str(Path(path).resolve()))
        return cls((kept,)) if keyring else cls((file, kept))

    def seal(self, clear: bytes) -> bytes:
        """Encrypted and authenticated. Makes the key if there is none.

        Raises:
            SecretUnreadable: there is a key which cannot be had, or none could be kept.
        """
        return self._key(make=True).encrypt(clear)

    def seal_if(self, secret: bool, content: bytes) -> bytes:
        """What is kept of a command: sealed if it carries secrets, else as it is."""
        return self.seal(content) if secret else content

    def unseal_if(self, sealed: bool, content: bytes) -> bytes:
        """What `seal_if` was given. Raises as `unseal` does."""
        return self.unseal(content) if sealed else content

    def fingerprint(self, content: bytes) -> bytes:
        """16 bytes that are the same for the same content, and tell nobody without the key what that is.

        Raises as `seal` does.
        """
        self._key(make=True)
        return hashlib.blake2b(content, digest_size=16, key=self._digest_key).digest()

    def unseal(self, sealed: bytes, what: str = "a secret") -> bytes:
        """What was sealed; `what` is what an error calls it.

        Raises:
            SecretUnreadable: the key is not there or is another, or the bytes were altered.
        """
        from cryptography.fernet import InvalidToken

        try:
            fernet = self._key(make=False)
        except SecretUnreadable as exc:
            raise SecretUnreadable(f"{what} cannot be unsealed: {exc.message}", remedy=exc.remedy) from None
        try:
            return fernet.decrypt(sealed)
        except InvalidToken:
            raise SecretUnreadable(
                f"{what} cannot be unsealed: it was altered, or sealed with another key than that in {self}"
            ) from None

    def _key(self, *, make: bool) -> Fernet:
        with self._lock:
            if self._fernet is None:
                self._fernet = self._found(make=make)
            return self._fernet

    def _found(self, *, make: bool) -> Fernet:
        from cryptography.fernet import Fernet

        for place in self._places:
            key = place.read()
            if key is not None:
                try:
                    return self._made(Fernet, key)
                except ValueError:
                    raise SecretUnreadable(f"what is in {place} is no key") from None
        if not make:
            raise SecretUnreadable(f"there is no key in {self}")
        key = Fernet.generate_key()
        try:
            self._places[-1].write(key)
        except OSError as exc:
            raise SecretUnreadable(
                f"the key of secrets cannot be kept in {self._places[-1]}: {exc.strerror}",
                remedy="See to the permissions and the space there; nothing was sealed.",
            ) from exc
        return self._made(Fernet, key)

    def _made(self, kind: type[Fernet], key: bytes) -> Fernet:
        # Derived, for one key serves one purpose; from the key itself, for it must be the same in another life.
        self._digest_key = hashlib.blake2b(key, digest_size=32, person=b"bridge.digest").digest()
        return kind(key)

    def __str__(self) -> str:
        return " or ".join(map(str, self._places))

    def __repr__(self) -> str:
        return f"<Vault, its key in {self}>"

    def __reduce__(self) -> str:
        raise TypeError("a vault cannot be pickled: its key stays where it is")


class _Memory:
    def read(self) -> bytes | None:
        return None

    def write(self, key: bytes) -> None:
        pass

    def __str__(self) -> str:
        return "this process's memory"


class _File:
    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> bytes | None:
        try:
            # Not blocking: a pipe of that name would be waited for.
            descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise SecretUnreadable(
                f"the key in {self} cannot be read: {exc.strerror}",
                remedy=f"Make it readable for its owner alone: chmod 600 {self._path}",
            ) from exc
        with os.fdopen(descriptor, "rb") as file:
            known = os.fstat(descriptor)
            if not stat.S_ISREG(known.st_mode):
                raise SecretUnreadable(f"{self} is no ordinary file")
            if known.st_mode & 0o077:
                raise SecretUnreadable(
                    f"the key in {self} is open to other users of this machine (mode {stat.S_IMODE(known.st_mode):04o})",
                    remedy=f"Close it: chmod 600 {self._path} And set the secrets anew if somebody may have read it.",
                )
            # An empty one is what a crash left between making the file and writing it. Nothing was sealed with it.
            return file.read(_MAX_KEY_BYTES).strip() or None

    def write(self, key: bytes) -> None:
        with contextlib.suppress(FileNotFoundError):
            if not self._path.stat().st_size:
                self._path.unlink()
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                os.fchmod(descriptor, 0o600)  # whatever the umask took away
                file.write(key + b"\n")
                file.flush()
                os.fsync(descriptor)
            folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except BaseException:
            self._path.unlink(missing_ok=True)
            raise

    def __str__(self) -> str:
        return f"the file {self._path}"


class _Keyring:
    def __init__(self, backend: KeyringBackend, store_id: str) -> None:
        self._backend = backend
        self._store_id = store_id

    def read(self) -> bytes | None:
        try:
            key = self._backend.get_password(KEYRING_SERVICE, self._store_id)
        except Exception as exc:  # what a backend raises is its own: D-Bus, the keychain, a file
            raise self._refusal("read from", exc) from exc
        return None if key is None else key.encode()

    def write(self, key: bytes) -> None:
        try:
            self._backend.set_password(KEYRING_SERVICE, self._store_id, key.decode())
            kept = self._backend.get_password(KEYRING_SERVICE, self._store_id)
        except Exception as exc:  # noqa: BLE001 - as above; not as the cause, which may name what was to be kept
            raise self._refusal("kept in", exc) from None
        if kept != key.decode():
            raise SecretUnreadable(f"{self} does not keep what it is given", remedy="Use a file: keyring=False.")

    def _refusal(self, verb: str, exc: Exception) -> SecretUnreadable:
        return SecretUnreadable(
            f"the key cannot be {verb} {self} ({type(exc).__name__})",
            remedy="Unlock the keyring. Or, if no secret was sealed yet, keep the key in a file: keyring=False.",
        )

    def __str__(self) -> str:
        return f"the keyring {self._backend.name} (service {KEYRING_SERVICE}, user {self._store_id})"


def _backend() -> KeyringBackend | None:
    """The system's keyring, if there is one that keeps anything."""
    try:
        import keyring
        import keyring.backends.fail
        import keyring.backends.null
    except ImportError:
        return None
    try:
        backend = keyring.get_keyring()
    except (ImportError, AttributeError, RuntimeError):  # one is configured that is not there, or cannot be used here
        return None
    nothing = keyring.backends.fail.Keyring, keyring.backends.null.Keyring
    return None if isinstance(backend, nothing) or backend.priority <= 0 else backend
