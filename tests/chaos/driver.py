"""The process that the chaos test kills: a host with its sessions at work, and what a careful user does when it is reopened.

    python -m chaos.driver DIRECTORY SEED SESSIONS STEPS

It works until it is told to end (SIGTERM) and each session has done STEPS steps, then looks for what has leaked. SIGUSR1
makes it print where its threads are, SIGUSR2 where its sessions are.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import os
import random
import signal
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from unittest import mock

import anyio
import anyio.to_thread

from bridge_host import AsyncHost, Breaker, BridgeError, KernelStartFailed, NotFound, current_call
from bridge_host.store.sqlite import SqliteLog
from chaos import plan
from chaos.leaks import look_for_leaks, more_of, what_is_held

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bridge_host import AsyncSession, Event, Interrupted

KERNELS: Final = 4
HEARTBEAT_S: Final = 1.5
CHUNKS: Final = 24  # of a stream: more than it may be ahead of who reads it
SLOW_S: Final = 0.2
PAUSE_S: Final = 0.2  # before what was refused for now is asked for again
HERE: Final = Path(__file__).parent
KERNELSIDE: Final = (HERE / "kernelside", HERE.parent / "kernelside")

ORDER: Final = """
def order(ctx, biz):
    from workload import order
    return order(ctx, biz)
"""
EXPECTED: Final = frozenset({"Quarantined", "KernelDied", "CircuitOpen", "KernelStartFailed"})
"""What may become of a command when kernels die all the time. `type(error).__name__`."""


def _ships_source(session: AsyncSession) -> bool:
    """Whether the session has a function of its own, that kernels must be sent."""
    return int(session.id[1:]) % 2 == 1


class Driver:
    """Everything that one life of the host does."""

    def __init__(self, directory: Path, seed: int, sessions: int, steps: int) -> None:
        self._directory = directory
        self._seed = seed
        self._names = [f"s{n:03}" for n in range(sessions)]
        self._steps = steps
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._effects = os.open(directory / "effects", flags, 0o600)
        self._ledger = os.open(directory / "ledger", flags, 0o600)
        self._ready = os.open(directory / "ready", flags, 0o600)
        told = plan.ledger(directory)
        self._places = plan.places(told)
        self._failed_at: dict[str, float] = defaultdict(float)
        for line in told:
            if isinstance(line, plan.Failed):
                self._failed_at[plan.session_of(line.biz)] = line.at
        self._happened: dict[str, set[str]] = defaultdict(set)  # in earlier lives: the calls, by biz
        for effect in plan.effects(directory):
            self._happened[effect.biz].add(effect.call)
        self._calls = {call for calls in self._happened.values() for call in calls}
        self._at: dict[str, str] = {}
        self._ending = False
        self.host: AsyncHost

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._end)
        loop.add_signal_handler(signal.SIGUSR2, self._print)
        before = what_is_held()
        async with contextlib.AsyncExitStack() as stack:
            self.host = await self._open(stack)
            found: dict[str, list[Interrupted]] = defaultdict(list)
            for interrupted in self.host.interrupted():
                found[interrupted.session].append(interrupted)
            everything = [one for some in found.values() for one in some]
            in_doubt = sum(len(one.in_doubt) for one in everything)
            self._write(plan.Opened(os.getpid(), len(everything), in_doubt))
            async with anyio.create_task_group() as group:
                for name in self._names:
                    group.start_soon(self._live, name, found.pop(name, []))
            for name in found:
                self._accuse(name, "commands of a session that is not ours are interrupted")
            for what in await look_for_leaks(self.host, [self.host.session(name) for name in self._names[:20]]):
                self._accuse("", what)
        if left := more_of(before, what_is_held()):
            self._accuse("", f"the host is closed, and this is left of it: {left}")
        self._write(plan.Finished(os.getpid()))

    async def _open(self, stack: contextlib.AsyncExitStack) -> AsyncHost:
        env = {"PYTHONPATH": os.pathsep.join((*map(str, KERNELSIDE), os.environ["PYTHONPATH"]))}
        while True:
            host = AsyncHost(
                KERNELS,
                store=self._directory / "bridge.db",
                heartbeat=HEARTBEAT_S,
                breaker=Breaker(cooldown_s=1.0),
                env=env,
            )
            host.telemetry.attach("bridge.kernel.start", self._on_start)
            with contextlib.suppress(KernelStartFailed):  # one was killed meanwhile, and nothing is left of the others
                return await stack.enter_async_context(host)

    def _on_start(self, event: Event) -> None:
        """Tell who stops kernels that this one is ready: one that is stopped before holds up its host for 30 s."""
        os.write(self._ready, f"{event.metadata['pid']}\n".encode())

    def _end(self) -> None:
        self._ending = True

    def _print(self) -> None:
        kinds = Counter(at.partition(" ")[0] for at in self._at.values())
        print(kinds, self._at, repr(self.host.pool.status()), repr(self.host.quarantine), sep="\n")
        for task in asyncio.all_tasks():
            task.print_stack(limit=4, file=sys.stdout)
        sys.stdout.flush()

    def _write(self, line: plan.Line) -> None:
        plan.append(self._ledger, line)

    def _accuse(self, biz: str, what: str) -> None:
        self._write(plan.Violation(biz, what))

    # -- tools -------------------------------------------------------------------

    def _happen(self, biz: str, part: str) -> str:
        """The effect: one line that outlives us. The receipt is the call that it was made for."""
        call = current_call()
        assert call is not None
        plan.append(self._effects, plan.Effect(call.id, biz, part))
        os.fsync(self._effects)
        return call.id

    def _give_tools(self, session: AsyncSession) -> None:
        @session.tool
        def pay(biz: str, part: str) -> str:
            return self._happen(biz, part)

        @session.tool
        async def ship(biz: str, part: str) -> str:
            return await anyio.to_thread.run_sync(self._happen, biz, part)

        @session.tool
        async def nested(biz: str) -> Any:
            call = current_call()
            assert call is not None
            return await session.call("workload.inner", biz, idempotency_key=call.id)

    # -- a session's life ----------------------------------------------------------

    async def _live(self, name: str, interrupted: list[Interrupted]) -> None:
        session = await anyio.to_thread.run_sync(self.host.session, name)
        self._give_tools(session)
        place = self._places.get(name, plan.Place())
        self._at[name] = f"recovering {[i.subject for i in interrupted]}"
        place = await self._recover(session, place, interrupted)
        await self._furnish(session)
        place = await self._find_out(session, place)
        while not self._ending or place.step < self._steps:
            self._at[name] = f"{plan.step(self._seed, name, place.step).kind} {place}"
            place = await self._do(session, place)
        self._at[name] = "done"

    async def _furnish(self, session: AsyncSession) -> None:
        """What the session needs, unless an earlier life has seen to it."""
        if "done" not in session:
            await anyio.to_thread.run_sync(session.update, {"done": 0, "last": "", "note": -1, "inners": 0})
        if _ships_source(session) and not session.describe().functions:
            await anyio.to_thread.run_sync(session.function, "order", ORDER)
        while not session.instances:
            try:
                await session.create("workload.Wallet")
            except BridgeError as exc:
                await self._expect(exc)

    async def _do(self, session: AsyncSession, place: plan.Place) -> plan.Place:
        """One step, and into the ledger with what came of it."""
        todo, biz = plan.step(self._seed, session.id, place.step), plan.biz_of(session.id, place)
        try:
            receipts = await self._step(session, todo, biz, place.step)
        except BridgeError as exc:
            return await self._failed(biz, todo, place, exc)
        self._write(plan.Acked(biz, todo.kind, tuple(receipts)))
        if todo.keyed and todo.again and (again := await self._step(session, todo, biz, place.step)) != receipts:
            self._accuse(biz, f"the same key gave {receipts}, and then {again}")
        return plan.Place(place.step + 1)

    async def _step(self, session: AsyncSession, todo: plan.Step, biz: str, number: int) -> list[str]:
        key = biz if todo.keyed else None
        match todo.kind:
            case "note":
                await session.set("note", number)
                return []
            case "look":
                if (seen := await session.call("workload.look")) != (is_now := session["note"]):
                    self._accuse(biz, f"note is {is_now}, and a command saw {seen}")
                return []
            case "order":
                name = "order" if _ships_source(session) else "workload.order"
                return list(await session.call(name, biz, idempotency_key=key))
            case "deposit":
                (ref,) = session.instances
                return list(await session.instance(ref).call("deposit", biz, idempotency_key=key))
            case "stream":
                stream = session.stream("workload.stream", biz, CHUNKS)
                if (came := [value async for value in stream]) != list(range(CHUNKS)):
                    self._accuse(biz, f"a stream gave {came}")
                return list(stream.result)
        return list(await session.call(f"workload.{todo.kind}", biz, idempotency_key=key))

    async def _failed(self, biz: str, todo: plan.Step, place: plan.Place, exc: BridgeError) -> plan.Place:
        self._write(plan.Failed(biz, todo.kind, f"{type(exc).__name__}: {exc}", time.time()))
        await self._expect(exc)
        # What has a key and lost its kernels could be gone on with; this session begins the step anew instead.
        for left in self.host.interrupted():
            if left.session == biz.partition("/")[0]:
                self.host.drop(left.id)
        return plan.Place(place.step, place.failures + 1)

    async def _expect(self, exc: BridgeError) -> None:
        """A failure that chaos explains; what is in quarantine by bad luck is let out. Raises what is none."""
        if type(exc).__name__ not in EXPECTED:
            raise exc
        for poison in self.host.quarantine:
            with contextlib.suppress(NotFound):
                self.host.quarantine.release(poison.name)
        await asyncio.sleep(PAUSE_S)  # as its remedy says: it may be better soon

    # -- after a death of the host -----------------------------------------------------

    async def _recover(self, session: AsyncSession, place: plan.Place, found: list[Interrupted]) -> plan.Place:
        """Go on with what was interrupted, the inner commands first: the outer ones ask for their results."""
        for interrupted in sorted(found, key=lambda one: one.subject != "workload.inner"):
            todo, biz = plan.step(self._seed, session.id, place.step), plan.biz_of(session.id, place)
            if interrupted.subject == "workload.look" or interrupted.began < self._failed_at[session.id]:
                # The end of what neither wrote nor called, or failed, need not be on disk when it is told.
                self.host.drop(interrupted.id)
                continue
            if interrupted.method == "function.stream" or self._failed_inside(interrupted):  # nobody reads a stream now
                self.host.drop(interrupted.id)
                self._write(plan.Failed(biz, todo.kind, "dropped", time.time()))
                place = plan.Place(place.step, place.failures + 1)
                continue
            inside = interrupted.subject in ("workload.inner", "workload.Wallet()")
            key = biz if todo.keyed else None
            if not inside and (interrupted.key != key or todo.kind not in interrupted.subject):
                self._accuse(biz, f"another command is interrupted: {interrupted}")
            doubts = [doubt.id for doubt in interrupted.in_doubt]
            replies = {call: call for call in doubts if call in self._calls}
            rerun = [call for call in doubts if call not in self._calls]
            try:
                result = await self.host.resume(interrupted.id, replies=replies, rerun=rerun)
            except BridgeError as exc:
                if inside:
                    await self._expect(exc)
                else:
                    place = await self._failed(biz, todo, place, exc)
                continue
            if not inside:
                self._write(plan.Acked(biz, todo.kind, tuple(result), "resumed"))
                place = plan.Place(place.step + 1)
        return place

    def _failed_inside(self, interrupted: Interrupted) -> bool:
        """Whether a command that a tool of this one sent has failed: made again, it would run anew, for all its key."""
        doubts = {doubt.id for doubt in interrupted.in_doubt if doubt.tool == "nested"}
        ended = [c for c in self.host.journal(interrupted.session) if c.begun.key in doubts] if doubts else []
        return any(command.ended is not None and command.ended.error is not None for command in ended)

    async def _find_out(self, session: AsyncSession, place: plan.Place) -> plan.Place:
        """What became of the step that was not acknowledged and is not interrupted: it succeeded, failed, or never began."""
        todo, biz = plan.step(self._seed, session.id, place.step), plan.biz_of(session.id, place)
        happened = self._happened[biz]
        if todo.kind == "note" and session["note"] == place.step:
            self._write(plan.Acked(biz, todo.kind, (), "found"))
            return plan.Place(place.step + 1)
        if todo.writes and session["last"] == biz:
            if todo.keyed:
                return await self._do(session, place)  # the first result is given again
            self._write(plan.Acked(biz, todo.kind, tuple(self._happened[biz]), "found"))
            return plan.Place(place.step + 1)
        if not happened:
            return place  # it never began
        ended = [c for c in self.host.journal(session.id) if c.begun.key in (biz, None) and c.ended is not None]
        if not ended or ended[-1].ended is None or ended[-1].ended.error is None:
            self._accuse(biz, f"{happened} have happened, and the journal knows of no command that failed")
        self._write(plan.Failed(biz, todo.kind, "it failed, and nobody was told", time.time()))
        return plan.Place(place.step, place.failures + 1)


@contextlib.contextmanager
def _slow_disk(seed: int) -> Iterator[None]:
    """The store's writes take up to 0.2 s more, mostly much less: what is told before it is on disk is caught in the act."""
    commit, chance = SqliteLog._commit, random.Random(seed)

    def slowly(log: SqliteLog, group: Any) -> None:
        time.sleep(chance.random() ** 3 * SLOW_S)
        commit(log, group)

    with mock.patch.object(SqliteLog, "_commit", slowly):
        yield


def main() -> None:
    faulthandler.register(signal.SIGUSR1)
    directory, seed, sessions, steps = sys.argv[1:]
    driver = Driver(Path(directory), int(seed), int(sessions), int(steps))
    with _slow_disk(int(seed)):
        asyncio.run(driver.run())


if __name__ == "__main__":
    main()
