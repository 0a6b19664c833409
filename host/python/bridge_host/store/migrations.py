"""The store's file: made, checked before anything is written, and brought from older formats to this one."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bridge_kernel.contract.errors import StoreDamaged, StoreFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ("APPLICATION_ID", "STEPS", "connected", "damaged", "explained", "opened")

APPLICATION_ID: Final = 0x42524447
"""`BRDG`, in the header of every store."""
BUSY_S: Final = 10.0  # how long a lock of somebody's who looks into the file with another program is waited for
# What SQLite reports when the trouble is not in the file: the disk, its permissions, its space, other programs.
_OUTSIDE: Final = frozenset(
    {
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
    }
)


def _sessions(db: sqlite3.Connection) -> None:
    db.execute(
        "CREATE TABLE sessions (id TEXT NOT NULL PRIMARY KEY, created REAL NOT NULL, used REAL NOT NULL, ttl REAL,"
        " version INTEGER NOT NULL, lm TEXT) WITHOUT ROWID"
    )
    # Tables of larger values have row ids: without, a value of a kilobyte would take a page of four. The value comes last,
    # so that nobody reads over it who looks at the size.
    db.execute(
        "CREATE TABLE variables (n INTEGER PRIMARY KEY, session TEXT NOT NULL, name TEXT NOT NULL,"
        " version INTEGER NOT NULL, at INTEGER NOT NULL, restores INTEGER, written REAL NOT NULL, size INTEGER NOT NULL,"
        " value BLOB, UNIQUE (session, name, version))"
    )
    db.execute(
        "CREATE TABLE types (session TEXT NOT NULL, name TEXT NOT NULL, schema BLOB NOT NULL,"
        " PRIMARY KEY (session, name)) WITHOUT ROWID"
    )
    db.execute(
        "CREATE TABLE instances (n INTEGER PRIMARY KEY, session TEXT NOT NULL, ref TEXT NOT NULL, name TEXT NOT NULL, class TEXT NOT NULL,"
        " adapter TEXT NOT NULL, methods TEXT NOT NULL, version INTEGER NOT NULL, sha256 TEXT, args BLOB NOT NULL,"
        " kwargs BLOB NOT NULL, state BLOB NOT NULL, UNIQUE (session, ref))"
    )
    db.execute(
        "CREATE TABLE functions (n INTEGER PRIMARY KEY, session TEXT NOT NULL, name TEXT NOT NULL, hash TEXT NOT NULL,"
        " lm INTEGER NOT NULL, source TEXT NOT NULL, UNIQUE (session, name))"
    )
    db.execute(
        "CREATE TABLE secrets (session TEXT NOT NULL, name TEXT NOT NULL, sealed BLOB NOT NULL,"
        " PRIMARY KEY (session, name)) WITHOUT ROWID"
    )


def _journal(db: sqlite3.Connection) -> None:
    # `n` is the order in which commands began; `ending` that in which those without a key ended.
    db.execute(
        "CREATE TABLE commands (n INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, session TEXT NOT NULL,"
        " method TEXT NOT NULL, subject TEXT NOT NULL, key TEXT, digest BLOB NOT NULL, sealed INTEGER NOT NULL,"
        " began REAL NOT NULL, attempts INTEGER NOT NULL, ending INTEGER, ended REAL, error TEXT,"
        " callbacks INTEGER NOT NULL, request BLOB NOT NULL, result BLOB)"
    )
    db.execute("CREATE INDEX commands_of_session ON commands (session)")
    db.execute("CREATE INDEX commands_ended ON commands (ending) WHERE ending IS NOT NULL")
    db.execute("CREATE INDEX commands_kept ON commands (n) WHERE ending IS NULL")
    db.execute(
        "CREATE TABLE callbacks (command TEXT NOT NULL, n INTEGER NOT NULL, seq INTEGER, method TEXT NOT NULL,"
        " about TEXT NOT NULL, digest BLOB NOT NULL, request BLOB NOT NULL, reply BLOB, UNIQUE (command, n))"
    )


def _identity(db: sqlite3.Connection) -> None:
    # The store's own name: that of its key in a keyring, wherever the file is moved to.
    db.execute("CREATE TABLE meta (name TEXT NOT NULL PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID")
    db.execute("INSERT INTO meta (name, value) VALUES ('id', lower(hex(randomblob(16))))")
    db.execute("ALTER TABLE functions ADD COLUMN secrets TEXT NOT NULL DEFAULT '[]'")


def _caching(db: sqlite3.Connection) -> None:
    # Seconds that a result may be given again; the results themselves are in memory.
    db.execute("ALTER TABLE functions ADD COLUMN cache REAL")
    db.execute("ALTER TABLE instances ADD COLUMN cache REAL")


STEPS: Final[tuple[Callable[[sqlite3.Connection], None], ...]] = (_sessions, _journal, _identity, _caching)
"""Step n takes a file of format n to format n + 1. Format 0 is empty. A step that was released is never changed."""


def connected(path: str, *, mode: str = "rw") -> sqlite3.Connection:
    """A connection to the file that is there; any thread may use it, one at a time. Transactions are the caller's."""
    uri = f"{Path(path).as_uri()}?mode={mode}"
    return sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, timeout=BUSY_S)


def opened(path: str, steps: tuple[Callable[[sqlite3.Connection], None], ...] = STEPS) -> sqlite3.Connection:
    """The connection that writes to the store at `path`, an absolute one, which the caller owns.

    A file that is missing or empty is made, with mode 0600. One of an older format is brought to this one, all at once
    or not at all, after a copy of it was made: `bridge.db.v1`.

    Raises:
        StoreDamaged: what is there is no store, is damaged, or is of a newer format; nothing was written.
        StoreFailed: it cannot be read or written.
    """
    with explained(path):
        if not os.path.exists(path) or not os.path.getsize(path):
            _make(path, steps)
            version = len(steps)
        else:
            version = _checked(path, len(steps))
        db = connected(path)
        try:
            if db.execute("PRAGMA journal_mode = WAL").fetchone() != ("wal",):
                raise StoreFailed(
                    f"the store {path} is on a file system that has no shared memory: SQLite's WAL needs it"
                )
            db.execute("PRAGMA synchronous = FULL")  # a commit is on disk, not on its way there
            db.execute("PRAGMA cache_size = -32768")  # 32 MiB
            db.execute("PRAGMA journal_size_limit = 67108864")
            db.execute("BEGIN IMMEDIATE")  # whether it can be written is found out now, not with the first value
            db.execute("ROLLBACK")
            if version < len(steps):
                _migrate(db, path, version, steps)
        except BaseException:
            db.close()
            raise
        return db


@contextlib.contextmanager
def explained(path: str, where: str = "") -> Iterator[None]:
    """What SQLite and the system report about the file, as Bridge's errors; `where` says what was being read."""
    try:
        yield
    except sqlite3.Error as exc:
        # Without a code it comes from Python's module: a text that is no UTF-8, say.
        code = getattr(exc, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
        if code in _OUTSIDE:
            raise StoreFailed(f"the store {path} cannot be read or written: {exc}") from exc
        raise damaged(path, f"{where}: {exc}" if where else str(exc)) from exc
    except OSError as exc:
        raise StoreFailed(f"the store {path} cannot be read or written: {exc}") from exc


def damaged(path: str, what: str) -> StoreDamaged:
    """The error that says so, and what may be done."""
    return StoreDamaged(
        f"the store {path} is damaged: {what}",
        remedy="Restore it from a copy or an export, or save what can be read: "
        f"sqlite3 {path} .recover | sqlite3 mended.db. The file was left as it is.",
    )


def _make(path: str, steps: tuple[Callable[[sqlite3.Connection], None], ...]) -> None:
    if os.path.exists(f"{path}-wal") and os.path.getsize(f"{path}-wal"):
        raise StoreDamaged(
            f"{path}-wal is there, and the store {path} that it belongs to is not",
            remedy=f"Put {path} back beside it. If there is none any more, remove {path}-wal.",
        )
    # Made under another name: at no instant is there half a store.
    new = f"{path}.new"
    _create(new)
    with contextlib.closing(connected(new)) as db:
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute("PRAGMA auto_vacuum = INCREMENTAL")  # what is deleted gives its space back when the store is closed
        _step(db, 0, steps)
        db.execute("PRAGMA journal_mode = WAL")
    _publish(new, path)


def _create(path: str) -> None:
    for suffix in ("", "-journal", "-wal", "-shm"):  # of a host that died here
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path + suffix)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))


def _publish(new: str, path: str) -> None:
    _sync(new)
    os.replace(new, path)
    _sync(os.path.dirname(path))


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _checked(path: str, newest: int) -> int:
    """The format of the file, once it has proved to be a store of one that is known."""
    with open(path, "rb") as file:
        header = file.read(100)
    if len(header) < 100 or not header.startswith(b"SQLite format 3\0"):
        raise StoreDamaged(
            f"{path} is no store: it is no SQLite file", remedy="Open another file; this one was left as it is."
        )
    if int.from_bytes(header[68:72], "big") != APPLICATION_ID:
        raise StoreDamaged(
            f"{path} is no store: it is another application's SQLite file",
            remedy="Open another file; this one was left as it is.",
        )
    # A file without a log is read as if it could not change, for SQLite would make files beside it.
    hot = os.path.exists(f"{path}-wal") and os.path.getsize(f"{path}-wal") > 0
    with contextlib.closing(connected(path, mode="ro" if hot else "ro&immutable=1")) as db:
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version > newest:
            raise StoreDamaged(
                f"the store {path} is of format {version}, and this Bridge reads formats up to {newest}",
                remedy="Open it with a newer Bridge: pip install --upgrade bridge-kernel. The file was left as it is.",
            )
        if version < 1:
            raise damaged(path, f"it says to be of format {version}, which there never was")
        found = [line for (line,) in db.execute("PRAGMA quick_check(5)")]
        if found != ["ok"]:
            raise damaged(path, "; ".join(found))
    return int(version)


def _migrate(
    db: sqlite3.Connection, path: str, version: int, steps: tuple[Callable[[sqlite3.Connection], None], ...]
) -> None:
    new = f"{path}.v{version}.new"
    _create(new)
    with contextlib.closing(connected(new)) as copy:
        db.backup(copy)
    _publish(new, f"{path}.v{version}")
    _step(db, version, steps)
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _step(db: sqlite3.Connection, version: int, steps: tuple[Callable[[sqlite3.Connection], None], ...]) -> None:
    db.execute("BEGIN IMMEDIATE")
    try:
        for step in steps[version:]:
            step(db)
        db.execute(f"PRAGMA user_version = {len(steps)}")
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
