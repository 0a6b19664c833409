"""Secrets are sealed wherever they are kept, and whoever cannot have the key is told where it was looked for."""

from __future__ import annotations

import logging
import os
import pickle
import stat
import sys
import threading
from typing import TYPE_CHECKING

import keyring
import keyring.errors
import pytest
from keyring.backend import KeyringBackend
from keyring.backends import fail, null

from bridge_host.store.vault import KEYRING_SERVICE, Vault
from bridge_kernel.contract.errors import SecretUnreadable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CLEAR = b"sk-clear-text-of-a-key"


class Remembering(KeyringBackend):
    """A keyring that keeps what it is given, for as long as it lives."""

    priority = 5
    locked = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept: dict[tuple[str, str], str] = {}

    def get_password(self, service: str, username: str) -> str | None:
        if self.locked:
            raise keyring.errors.KeyringLocked("locked")
        return self.kept.get((service, username))

    def set_password(self, service: str, username: str, password: str) -> None:
        self.kept[service, username] = password

    def delete_password(self, service: str, username: str) -> None:
        del self.kept[service, username]


@pytest.fixture
def no_keyring() -> Iterator[None]:
    before = keyring.get_keyring()
    keyring.set_keyring(fail.Keyring())  # type: ignore[no-untyped-call]
    yield
    keyring.set_keyring(before)


@pytest.fixture
def ring() -> Iterator[Remembering]:
    before = keyring.get_keyring()
    made = Remembering()
    keyring.set_keyring(made)
    yield made
    keyring.set_keyring(before)


def key_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.key")


def test_what_is_sealed_comes_back_and_does_not_hold_the_clear_text(tmp_path: Path) -> None:
    for vault in (Vault.in_memory(), Vault.beside(tmp_path / "a.db", keyring=False)):
        sealed = vault.seal(CLEAR)
        assert CLEAR not in sealed
        assert vault.seal(CLEAR) != sealed  # one secret twice does not look alike
        assert vault.unseal(sealed) == CLEAR
        assert vault.unseal(vault.seal(b"")) == b""


def test_two_vaults_in_memory_do_not_open_each_others_secrets() -> None:
    with pytest.raises(SecretUnreadable, match="no key in this process's memory"):
        Vault.in_memory().unseal(Vault.in_memory().seal(CLEAR))
    other = Vault.in_memory()
    other.seal(b"x")
    with pytest.raises(SecretUnreadable, match="another key"):
        other.unseal(Vault.in_memory().seal(CLEAR))


def test_the_key_is_in_a_file_that_only_its_owner_can_read(tmp_path: Path, no_keyring: None) -> None:
    path = tmp_path / "bridge.db"
    before = os.umask(0)
    try:
        sealed = Vault.beside(path).seal(CLEAR)
    finally:
        os.umask(before)
    assert stat.S_IMODE(key_file(path).stat().st_mode) == 0o600
    assert Vault.beside(path).unseal(sealed) == CLEAR
    for found in tmp_path.rglob("*"):
        assert CLEAR not in found.read_bytes()
    assert key_file(path).read_bytes().strip() not in sealed


def test_no_key_is_made_before_there_is_a_secret(tmp_path: Path, no_keyring: None) -> None:
    vault = Vault.beside(tmp_path / "bridge.db")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SecretUnreadable, match="no key in the file"):
        vault.unseal(b"whatever")
    assert list(tmp_path.iterdir()) == []


def test_the_key_is_on_disk_before_anything_is_sealed_with_it(
    tmp_path: Path, no_keyring: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        with pytest.raises(SecretUnreadable, match=r"cannot be kept in the file .*No space left"):
            Vault.beside(tmp_path / "bridge.db").seal(CLEAR)
        assert list(tmp_path.iterdir()) == []
    Vault.beside(tmp_path / "bridge.db").seal(CLEAR)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_key_that_others_may_read_is_refused(tmp_path: Path, no_keyring: None, mode: int) -> None:
    path = tmp_path / "bridge.db"
    sealed = Vault.beside(path).seal(CLEAR)
    key_file(path).chmod(mode)
    with pytest.raises(SecretUnreadable, match=f"mode {mode:04o}"):
        Vault.beside(path).seal(CLEAR)
    with pytest.raises(SecretUnreadable, match=f"mode {mode:04o}") as caught:
        Vault.beside(path).unseal(sealed)
    assert f"chmod 600 {key_file(path)}" in caught.value.remedy


def test_a_lost_key_says_where_it_was_looked_for(tmp_path: Path, no_keyring: None) -> None:
    path = tmp_path / "bridge.db"
    sealed = Vault.beside(path).seal(CLEAR)
    key_file(path).unlink()
    with pytest.raises(SecretUnreadable) as caught:
        Vault.beside(path).unseal(sealed, "the secret 'OPENAI_API_KEY'")
    assert str(caught.value) == (
        f"the secret 'OPENAI_API_KEY' cannot be unsealed: there is no key in the file {key_file(path)}"
    )


def test_another_key_an_altered_secret_and_a_key_that_is_none_are_told(tmp_path: Path, no_keyring: None) -> None:
    path, other = tmp_path / "a.db", tmp_path / "b.db"
    sealed = Vault.beside(path).seal(CLEAR)
    Vault.beside(other).seal(CLEAR)
    for wrong, vault in (
        (sealed, Vault.beside(other)),
        (sealed[:-5] + b"AAAA=", Vault.beside(path)),
        (b"", Vault.beside(path)),
        (b"\xff\x00", Vault.beside(path)),
    ):
        with pytest.raises(SecretUnreadable, match="altered, or sealed with another key than that in the file"):
            vault.unseal(wrong)
    key_file(path).write_bytes(b"no key at all")
    with pytest.raises(SecretUnreadable, match=r"what is in the file .* is no key"):
        Vault.beside(path).unseal(sealed)
    with pytest.raises(SecretUnreadable, match="is no key"):
        Vault.beside(path).seal(CLEAR)  # not overwritten
    assert key_file(path).read_bytes() == b"no key at all"


def test_a_file_that_a_crash_left_empty_is_no_key(tmp_path: Path, no_keyring: None) -> None:
    path = tmp_path / "bridge.db"
    key_file(path).touch(0o600)
    assert Vault.beside(path).unseal(Vault.beside(path).seal(CLEAR)) == CLEAR


def test_a_key_that_is_no_ordinary_file_is_refused_and_not_waited_for(tmp_path: Path, no_keyring: None) -> None:
    os.mkfifo(tmp_path / "bridge.db.key", 0o600)
    with pytest.raises(SecretUnreadable, match="no ordinary file"):
        Vault.beside(tmp_path / "bridge.db").seal(CLEAR)


def test_threads_that_seal_first_at_the_same_time_make_one_key(tmp_path: Path, no_keyring: None) -> None:
    vault = Vault.beside(tmp_path / "bridge.db")
    start = threading.Barrier(8)
    sealed: list[bytes] = []

    def seal() -> None:
        start.wait()
        sealed.append(vault.seal(CLEAR))

    threads = [threading.Thread(target=seal) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    again = Vault.beside(tmp_path / "bridge.db")
    assert [again.unseal(each) for each in sealed] == [CLEAR] * 8


# -- the system's keyring ------------------------------------------------------


def test_the_key_is_in_the_keyring_if_there_is_one(tmp_path: Path, ring: Remembering) -> None:
    path = tmp_path / "bridge.db"
    for asked in (None, True):
        sealed = Vault.beside(path, asked, store_id=f"store-{asked}").seal(CLEAR)
        assert (KEYRING_SERVICE, f"store-{asked}") in ring.kept
        assert Vault.beside(tmp_path / "moved.db", asked, store_id=f"store-{asked}").unseal(sealed) == CLEAR
        assert list(tmp_path.iterdir()) == []
    Vault.beside(path).seal(CLEAR)
    assert (KEYRING_SERVICE, str(path)) in ring.kept


def test_a_key_that_is_in_a_file_already_is_used_though_there_is_a_keyring_now(
    tmp_path: Path, ring: Remembering
) -> None:
    path = tmp_path / "bridge.db"
    sealed = Vault.beside(path, keyring=False).seal(CLEAR)
    assert Vault.beside(path).unseal(sealed) == CLEAR
    Vault.beside(path).seal(CLEAR)
    assert ring.kept == {}


def test_a_key_that_the_keyring_lost_is_looked_for_in_both_places(tmp_path: Path, ring: Remembering) -> None:
    path = tmp_path / "bridge.db"
    sealed = Vault.beside(path, store_id="one").seal(CLEAR)
    ring.kept.clear()
    with pytest.raises(SecretUnreadable, match=r"no key in the file .*\.key or the keyring .*service bridge, user one"):
        Vault.beside(path, store_id="one").unseal(sealed)


def test_a_locked_keyring_is_an_error_and_no_other_key_is_made(tmp_path: Path, ring: Remembering) -> None:
    path = tmp_path / "bridge.db"
    ring.locked = True
    with pytest.raises(SecretUnreadable, match=r"cannot be read from the keyring .*\(KeyringLocked\)") as caught:
        Vault.beside(path).seal(CLEAR)
    assert "Unlock" in caught.value.remedy
    assert list(tmp_path.iterdir()) == []


def test_a_keyring_that_keeps_nothing_is_no_place_for_a_key(tmp_path: Path, ring: Remembering) -> None:
    ring.set_password = lambda service, username, password: None  # type: ignore[method-assign]
    with pytest.raises(SecretUnreadable, match="does not keep what it is given"):
        Vault.beside(tmp_path / "bridge.db").seal(CLEAR)


@pytest.mark.parametrize("backend", [fail.Keyring, null.Keyring])
def test_without_a_real_keyring_the_key_is_in_a_file(
    tmp_path: Path, no_keyring: None, backend: type[KeyringBackend]
) -> None:
    keyring.set_keyring(backend())
    path = tmp_path / "bridge.db"
    Vault.beside(path).seal(CLEAR)
    assert key_file(path).exists()
    with pytest.raises(SecretUnreadable, match="has no keyring") as caught:
        Vault.beside(path, keyring=True)
    assert "bridge-kernel[keyring]" in caught.value.remedy


def test_without_the_package_the_key_is_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "keyring", None)
    Vault.beside(tmp_path / "bridge.db").seal(CLEAR)
    assert (tmp_path / "bridge.db.key").exists()
    with pytest.raises(SecretUnreadable, match="has no keyring"):
        Vault.beside(tmp_path / "bridge.db", keyring=True)


# -- nothing shows -------------------------------------------------------------


def test_neither_the_clear_text_nor_the_key_is_in_a_repr_an_error_or_a_log(
    tmp_path: Path, no_keyring: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    path = tmp_path / "bridge.db"
    vault = Vault.beside(path)
    sealed = vault.seal(CLEAR)
    key = key_file(path).read_text().strip()
    said = [repr(vault), str(vault), caplog.text]
    for broken in (sealed[:-5] + b"AAAA=", b"x"):
        with pytest.raises(SecretUnreadable) as caught:
            vault.unseal(broken)
        said += [repr(caught.value), str(caught.value), caught.value.remedy, *caught.value.__notes__]
    assert repr(vault) == f"<Vault, its key in the file {key_file(path)}>"
    assert CLEAR.decode() not in "".join(said)
    assert key not in "".join(said)


def test_a_vault_does_not_let_itself_be_pickled() -> None:
    vault = Vault.in_memory()
    vault.seal(CLEAR)
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(vault)


def test_a_fingerprint_is_the_same_with_the_same_key_and_another_with_another(tmp_path: Path) -> None:
    one = Vault.beside(tmp_path / "bridge.db", keyring=False)
    again = Vault.beside(tmp_path / "bridge.db", keyring=False)
    other = Vault.in_memory()
    assert one.fingerprint(b"4711") == again.fingerprint(b"4711") != one.fingerprint(b"4712")
    assert other.fingerprint(b"4711") == other.fingerprint(b"4711") != one.fingerprint(b"4711")
