"""How values are distributed: counts on a logarithmic scale, in little memory, exact to 3.2 %. Pure."""

from __future__ import annotations

import math
from array import array
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ("RELATIVE_ERROR", "Histogram")

# As HdrHistogram has it, in integers only: each power of two is cut into 16 equal parts. Neither of the libraries would
# do: `ddsketch` takes twice as long for each value and wants `six`; `hdrhistogram` takes four times as long, wants
# `pbr` and `setuptools`, has no types, and holds 4,608 counters from the start, where most commands need thirty.
_BITS: Final = 4
_EXACT: Final = 1 << (_BITS + 1)
"""Below this every value has a bucket of its own."""
_MOST: Final = 2**63 - 1

RELATIVE_ERROR: Final = 1 / _EXACT
"""A percentile is off by no more than this share of itself."""


class Histogram:
    """Of integers from 0 on: durations in ns, sizes. What is less counts as 0, what is more than 2^63 - 1 as that.

    There are 960 buckets of 8 bytes, of which it holds those from the first that was hit to the last. `count`, `total`,
    `low` and `high` are exact. Not thread-safe.
    """

    __slots__ = ("_base", "_counts", "count", "high", "low", "total")

    def __init__(self, values: Iterable[int] = ()) -> None:
        self._base = 0  # the bucket that the first of the counts is of
        self._counts = array("Q")
        self.count = 0
        self.total = 0
        self.low = _MOST
        """The least value; meaningless while there is none, as is `high`."""
        self.high = 0
        for value in values:
            self.add(value)

    def add(self, value: float) -> int:
        """Count one value, of which only the whole part counts; returns the bucket that it fell into.

        Raises:
            TypeError: it is no number; nothing has changed then, nor for the next two.
            ValueError: it is NaN.
            OverflowError: it is infinite.
        """
        if type(value) is not int:
            value = int(value)
        if value > self.high:
            self.high = value = min(value, _MOST)
        if value < self.low:
            self.low = value = max(value, 0)
        shift = value.bit_length() - 5
        bucket = value if shift <= 0 else (shift << 4) + (value >> shift)
        counts = self._counts
        place = bucket - self._base
        if 0 <= place < len(counts):
            counts[place] += 1
        else:
            self._hold(bucket, bucket + 1)
            self._counts[bucket - self._base] = 1
        self.count += 1
        self.total += value
        return bucket

    def _hold(self, first: int, end: int) -> None:
        """Have room for the counts of these buckets."""
        if not self._counts:
            self._base = first
        elif first >= self._base and end <= self._base + len(self._counts):
            return
        before = max(self._base - first, 0)
        after = max(end - self._base - len(self._counts), 0)
        self._counts = array("Q", bytes(8 * before)) + self._counts + array("Q", bytes(8 * after))
        self._base -= before

    @classmethod
    def of_buckets(cls, counts: Iterable[tuple[int, int]]) -> Histogram:
        """Made of buckets, as `add` returns them, and how many fell into each: but for `count`, nothing is exact."""
        made = cls()
        for bucket, count in counts:
            made._count(bucket, count)
            made.total += count * _middle(bucket)
        if made.count:
            made.low, made.high = (_middle(made._base + place) for place in (0, len(made._counts) - 1))
        return made

    def _count(self, bucket: int, count: int) -> None:
        self._hold(bucket, bucket + 1)
        self._counts[bucket - self._base] += count
        self.count += count

    def merge(self, other: Histogram) -> None:
        """Count all that `other` has counted."""
        for bucket, count in other._hit():
            self._count(bucket, count)
        self.total += other.total
        self.low = min(self.low, other.low)
        self.high = max(self.high, other.high)

    def copy(self) -> Histogram:
        made = Histogram()
        made._base, made._counts = self._base, self._counts[:]
        made.count, made.total, made.low, made.high = self.count, self.total, self.low, self.high
        return made

    def _hit(self) -> Iterator[tuple[int, int]]:
        return ((bucket, count) for bucket, count in enumerate(self._counts, self._base) if count)

    @property
    def mean(self) -> float | None:
        """None if there are no values."""
        return self.total / self.count if self.count else None

    def percentile(self, share: float) -> int | None:
        """The least value that `share` (0 to 1) of all values do not exceed; None if there are no values.

        It is off by `RELATIVE_ERROR` at most; 0 and 1 are exact.
        """
        return self.percentiles(share)[0]

    def percentiles(self, *shares: float) -> list[int | None]:
        """As `percentile`, several at once.

        Raises:
            ValueError: a share is not between 0 and 1.
        """
        if wrong := [share for share in shares if not 0 <= share <= 1]:
            raise ValueError(f"a percentile is asked for by a share between 0 and 1, 0.95, not by {wrong[0]!r}")
        if not self.count:
            return [None] * len(shares)
        found: dict[float, int] = {}
        buckets = self._hit()
        bucket, seen = next(buckets)
        for share in sorted(set(shares)):
            # Counted from 1; a little less than the product, for 0.07 * 100 is more than 7.
            rank = min(max(math.ceil(share * self.count - 1e-9), 1), self.count)
            while seen < rank:
                bucket, count = next(buckets)
                seen += count
            middle = min(max(_middle(bucket), self.low), self.high)
            found[share] = self.low if rank == 1 else self.high if rank == self.count else middle
        return [found[share] for share in shares]

    def buckets(self) -> Iterator[tuple[int, int, int]]:
        """Those that have been hit, in order: the least value, the first value beyond, how many there are."""
        for bucket, count in self._hit():
            yield *_bounds(bucket), count

    def __len__(self) -> int:
        return self.count

    def __repr__(self) -> str:
        if not self.count:
            return "<Histogram: nothing yet>"
        p50, p95 = self.percentiles(0.5, 0.95)
        return f"<Histogram: {self.count:,} values, {self.low:,} to {self.high:,}, p50 {p50:,}, p95 {p95:,}>"


def _bounds(bucket: int) -> tuple[int, int]:
    """The bucket's least value, and the first that is beyond it."""
    if bucket < _EXACT:
        return bucket, bucket + 1
    shift = (bucket >> _BITS) - 1
    low = (bucket - (shift << _BITS)) << shift
    return low, low + (1 << shift)


def _middle(bucket: int) -> int:
    low, high = _bounds(bucket)
    return (low + high - 1) // 2
