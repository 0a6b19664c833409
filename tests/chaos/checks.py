"""What must be true when the chaos is over, checked by a process that had no part in it."""

from __future__ import annotations

import sqlite3
from collections import Counter, defaultdict
from contextlib import closing
from typing import TYPE_CHECKING, Final

from bridge_host import Host
from chaos import plan

if TYPE_CHECKING:
    from pathlib import Path

    from bridge_host import Session
    from chaos.plan import Acked, Effect, Failed

__all__ = ("problems",)

KEPT: Final = 100  # versions of a variable
SHOWN: Final = 10  # problems that are told with their history


class _Run:
    """All that is known from the two files, by session and by biz."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.seed = seed
        self.lines = plan.ledger(directory)
        self.effects = plan.effects(directory)
        self.acked: dict[str, Acked] = {}
        self.failed: dict[str, Failed] = {}
        self.by_session: dict[str, list[Acked]] = defaultdict(list)
        self.by_biz: dict[str, list[Effect]] = defaultdict(list)
        for line in self.lines:
            if isinstance(line, plan.Acked):
                self.acked[line.biz] = line
                self.by_session[plan.session_of(line.biz)].append(line)
            elif isinstance(line, plan.Failed):
                self.failed[line.biz] = line
        for effect in self.effects:
            self.by_biz[effect.biz].append(effect)

    def history(self, biz: str) -> str:
        """What is known of a piece of business: its step under all its names, or its whole session's end."""
        prefix = biz.partition("#")[0]
        told = [line for line in self.lines if getattr(line, "biz", "").startswith(prefix)]
        happened = [effect for effect in self.effects if effect.biz.startswith(prefix)]
        return "\n".join(f"    {line}" for line in [*told, *happened][-20:])


def problems(directory: Path, seed: int) -> list[str]:
    """What is wrong, each with its history; empty if all is as it was promised."""
    run = _Run(directory, seed)
    found = [*_of_the_files(run)]
    with closing(sqlite3.connect(directory / "bridge.db")) as db:
        if (verdict := db.execute("PRAGMA integrity_check").fetchall()) != [("ok",)]:
            found.append(("", f"the store's file is damaged: {verdict}"))
    with Host(kernels=0, store=directory / "bridge.db") as host:
        found += [(c.session, f"it is interrupted still: {c}") for c in host.interrupted()]
        known = set(run.by_session)
        if missing := known - set(host.sessions()):
            found.append(("", f"sessions are missing: {sorted(missing)}"))
        for name in sorted(known & set(host.sessions())):
            found += [(name, what) for what in _of_a_session(run, host.session(name), run.by_session[name])]
    shown = [f"{biz or 'run'}: {what}\n{run.history(biz) if biz else ''}" for biz, what in found[:SHOWN]]
    return [*shown, *(f"{biz or 'run'}: {what}" for biz, what in found[SHOWN : 5 * SHOWN])]


def _of_the_files(run: _Run) -> list[tuple[str, str]]:
    found = [(line.biz, line.what) for line in run.lines if isinstance(line, plan.Violation)]
    if not isinstance(run.lines[-1], plan.Finished):
        found.append(("", "the driver did not finish"))
    for call, count in Counter(effect.call for effect in run.effects).items():
        if count > 1:
            biz = next(effect.biz for effect in run.effects if effect.call == call)
            found.append((biz, f"the tool ran {count} times for call {call}"))
    for biz, there in run.by_biz.items():
        parts = Counter(effect.part for effect in there)
        if twice := {part: count for part, count in parts.items() if count > 1}:
            found.append((biz, f"effects happened more than once: {twice}"))
        if biz not in run.acked and biz not in run.failed:
            found.append((biz, "its effects happened, and nobody was told what became of it"))
    for biz, acked in run.acked.items():
        there = run.by_biz[biz]
        if {effect.part for effect in there} != plan.PARTS[acked.kind]:
            found.append((biz, f"it was acknowledged, and its effects are {there}"))
        elif set(acked.receipts) != {effect.call for effect in there}:
            found.append((biz, f"its receipts are {acked.receipts}, and its effects are {there}"))
        if biz in run.failed:
            found.append((biz, "it was acknowledged, and it failed"))
    return found


def _of_a_session(run: _Run, session: Session, acked: list[Acked]) -> list[str]:
    """What the session holds against what it was told that it holds."""
    found = []

    def expect(what: str, is_now: object, wanted: object) -> None:
        if is_now != wanted:
            found.append(f"{what} is {is_now!r}, and must be {wanted!r}")

    steps = [plan.step(run.seed, session.id, number) for number in range(len(acked))]
    expect("the order of its steps", [line.kind for line in acked], [todo.kind for todo in steps])
    written = [line.biz for line, todo in zip(acked, steps, strict=True) if todo.writes]
    notes = [number for number, todo in enumerate(steps) if todo.kind == "note"]
    deposits = sum(todo.kind == "deposit" for todo in steps)
    inner = sum(todo.kind == "nested" for todo in steps)
    expect("done", session["done"], len(written))
    expect("last", session["last"], written[-1] if written else "")
    expect("note", session["note"], notes[-1] if notes else -1)
    failed_inside = [
        biz for biz, line in run.failed.items() if line.kind == "nested" and plan.session_of(biz) == session.id
    ]
    if not inner <= session["inners"] <= inner + len(failed_inside):
        expect("inners", session["inners"], inner)
    wallets = [session.instances[ref] for ref in session.instances]
    expect("the wallets", [(w.state["balance"], w.version) for w in wallets], [(deposits, deposits + 1)])
    expect("its version", session.version, 1 + len(written) + len(notes) + session["inners"] + len(wallets))

    commits: set[int] = set()
    for name in (*session, *(["fleeting"] if "fleeting" not in session else [])):
        try:
            versions = session.variables[name].history()
        except KeyError:
            continue  # it never was
        numbers = [version.version for version in versions]
        first = numbers[0] if len(numbers) == KEPT else 1
        expect(f"the versions of {name}", numbers, list(range(first, first + len(numbers))))
        at = [version.at for version in versions]
        expect(f"the commits of {name}", at, sorted(set(at)))
        if at[-1] > session.version:
            expect(f"the newest commit of {name}", at[-1], f"at most {session.version}")
        commits.update(at if numbers[0] == 1 else ())
        values = [version.value for version in versions if not version.deleted]
        if name == "done":
            expect("the values of done", values, [number - 1 for number in numbers])
        elif name == "last":
            expect("the values of last", values, ["", *written][-len(values) :])
        elif name == "note":
            expect("the values of note", values, [-1, *notes][-len(values) :])
    if len(commits) > session.version:
        expect("the number of its commits", len(commits), f"at most {session.version}")
    return found
