"""Vectors in memory: exact nearest neighbours by one matrix-vector product, or by a shorter one first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from sekha.vectors.base import Vector
from sekha.vectors.checks import NORM_TOLERANCE

__all__ = ["Ids", "Matrices", "Matrix", "View", "best", "rounding"]

Ids: TypeAlias = npt.NDArray[np.int64]

BLOCK_ROWS: Final = 32_768
"""Rows of one allocation, of which the system backs only what is used."""
FEW_ROWS: Final = 4096
SAMPLE_ROWS: Final = 4096
WORTHWHILE_SHARE: Final = 8
"""The first pass pays while it leaves less than one row in this many."""


def rounding(dimension: int) -> float:
    """The most by which a float32 product of two unit vectors can differ from the true one."""
    return dimension * 2.0**-24 + 2 * NORM_TOLERANCE


def best(scores: Vector, limit: int, margin: float) -> Ids:
    """Positions of the `limit` highest scores, and of every other that comes within `margin` of them."""
    if limit >= len(scores):
        return np.flatnonzero(scores >= -2)
    threshold = np.partition(scores, len(scores) - limit)[len(scores) - limit] - margin
    return np.flatnonzero(scores >= max(threshold, -2))  # what may not be found has -inf


@dataclass(frozen=True, slots=True)
class FirstPass:
    """Each vector in a few columns, such that one short product bounds its score from above.

    With an orthonormal basis `P`, x·q = Pᵀx·Pᵀq + (what P leaves of x)·(what P leaves of q), and the
    second term is at most the product of the two remainders' lengths. A row holds Pᵀx and, in its
    last column, the length of its remainder; the query likewise; their product is the bound.
    `slack` covers all rounding, so no row is dropped that could belong to the nearest.
    """

    basis: Vector
    slack: float
    blocks: list[Vector] = field(default_factory=list)

    @classmethod
    def learn(cls, sample: Vector) -> FirstPass | None:
        """Find the directions that hold most of a sample; None when a sixth of them holds too little."""
        dimension = sample.shape[1]
        columns = max(dimension // 6 - 1, 1)
        directions = np.random.default_rng(0).standard_normal((dimension, columns)).astype(np.float32)
        for _ in range(3):
            directions, _ = np.linalg.qr(sample.T @ (sample @ directions))
        exact, _ = np.linalg.qr(directions.astype(np.float64))
        made = cls(exact.astype(np.float32), slack=3 * rounding(dimension) * (columns + 1) ** 0.5)
        remainders = made.shorten(sample)[:, -1]
        # Vectors without direction in common keep 5/6 here, and then the bound excludes nothing.
        return made if float(np.mean(remainders**2)) < 0.5 else None

    def shorten(self, rows: Vector) -> Vector:
        """Shape (n, columns): the rows in our basis, and the length of what it leaves of each."""
        short = np.empty((len(rows), self.basis.shape[1] + 1), dtype=np.float32)
        np.matmul(rows, self.basis, out=short[:, :-1])
        kept = np.einsum("ij,ij->i", short[:, :-1], short[:, :-1])
        short[:, -1] = np.sqrt(np.maximum(1 - kept, 0) + self.slack)
        return short

    def extend(self, rows: Sequence[Vector], start: int, count: int) -> None:
        """Add the rows from position `start` up to `count`, block by block as `rows` has them."""
        for number, first, last in _spans(start, count):
            if number == len(self.blocks):
                self.blocks.append(np.empty((BLOCK_ROWS, self.basis.shape[1] + 1), dtype=np.float32))
            self.blocks[number][first:last] = self.shorten(rows[number][first:last])


@dataclass(frozen=True, slots=True)
class View:
    """A matrix as it was at one moment. It stays so: rows are only ever added beyond `count`."""

    ids: Ids
    """Ascending, one for each row."""
    blocks: tuple[Vector, ...]
    dead: Ids
    """Positions of deleted rows."""
    first_pass: FirstPass | None = None
    short_blocks: tuple[Vector, ...] = ()

    @property
    def count(self) -> int:
        return len(self.ids)

    def nearest(self, query: Vector, limit: int, among: Ids | None = None) -> tuple[Ids, bool | None]:
        """Ids among which the `limit` nearest surely are, and whether the first pass found them.

        There are more than `limit` when rounding cannot tell them apart. `among` are ids, ascending.
        The second is None when there was no reason to try the first pass.
        """
        if self.count == 0 or (among is not None and len(among) == 0):
            return self.ids[:0], None
        allowed = None if among is None else np.searchsorted(self.ids, among)
        margin = 2 * rounding(len(query))
        few = allowed is not None and len(allowed) < FEW_ROWS
        tried = not few and self.first_pass is not None and _seeds(limit) <= self.count // WORTHWHILE_SHARE
        if tried and (found := self._nearest_by_bound(query, limit, allowed, margin)) is not None:
            return self.ids[found], True
        served = False if tried else None
        if allowed is not None and len(allowed) * 4 < self.count:
            return self.ids[allowed[best(self._scores_at(allowed, query), limit, margin)]], served
        scores = self._masked(self._products(self.blocks, query), allowed)
        return self.ids[best(scores, limit, margin)], served

    def rows(self, positions: Ids) -> Vector:
        """The vectors at ascending positions."""
        taken = np.empty((len(positions), self.blocks[0].shape[1]), dtype=np.float32)
        for number, at in self._by_block(positions):
            taken[at] = self.blocks[number][positions[at] - number * BLOCK_ROWS]
        return taken

    def _nearest_by_bound(self, query: Vector, limit: int, allowed: Ids | None, margin: float) -> Ids | None:
        if self.first_pass is None:
            return None
        short_query = self.first_pass.shorten(query[np.newaxis])[0]
        bounds = self._masked(self._products(self.short_blocks, short_query), allowed)
        seeds = np.sort(np.argpartition(bounds, len(bounds) - _seeds(limit))[-_seeds(limit) :])
        seeds = seeds[bounds[seeds] > -np.inf]
        if len(seeds) < limit:
            return None
        reached = np.partition(self._scores_at(seeds, query), len(seeds) - limit)[len(seeds) - limit]
        possible = np.flatnonzero(bounds >= reached - margin - self.first_pass.slack)
        if len(possible) > self.count // WORTHWHILE_SHARE:
            return None
        return possible[best(self._scores_at(possible, query), limit, margin)]

    def _products(self, blocks: tuple[Vector, ...], query: Vector) -> Vector:
        products = np.empty(self.count, dtype=np.float32)
        for number, first, last in _spans(0, self.count):
            start = number * BLOCK_ROWS
            np.dot(blocks[number][first:last], query, out=products[start + first : start + last])
        return products

    def _masked(self, scores: Vector, allowed: Ids | None) -> Vector:
        if allowed is not None:
            masked = np.full_like(scores, -np.inf)
            masked[allowed] = scores[allowed]
            return masked
        scores[self.dead] = -np.inf
        return scores

    def _scores_at(self, positions: Ids, query: Vector) -> Vector:
        rows = self.rows(positions)
        # BLAS would wake its threads for a few rows, and on a busy machine wait for a free core.
        return np.einsum("ij,j->i", rows, query) if len(rows) < FEW_ROWS else rows @ query

    def _by_block(self, positions: Ids) -> Iterator[tuple[int, slice]]:
        edges = np.searchsorted(positions, np.arange(len(self.blocks) + 1) * BLOCK_ROWS).tolist()
        for number, (start, stop) in enumerate(pairwise(edges)):
            if start < stop:
                yield number, slice(start, stop)


class Matrix:
    """One collection's vectors, kept up with the file. Hold `lock` to change it or to take a view."""

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension
        self.lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        """Forget everything; views taken before keep what they have."""
        self.next_id = 1
        """Every row below this id is here."""
        self.deletions = 0
        """Every deletion up to this number is noted."""
        self.count = 0
        self._ids: Ids = np.empty(0, dtype=np.int64)
        self._blocks: list[Vector] = []
        self._dead: Ids = np.empty(0, dtype=np.int64)
        self._first_pass: FirstPass | None = None
        self._first_pass_from = 0
        self._searches = 0
        self._fruitless = 0

    @property
    def nbytes(self) -> int:
        row = self.dimension * 4 + (self.dimension // 6 * 4 if self._first_pass else 0)
        return self.count * (row + 8)

    @property
    def wasteful(self) -> bool:
        return len(self._dead) > max(self.count // 4, 1024)

    def append(self, ids: Ids, rows: Vector) -> None:
        """Add rows whose ids follow all that are here."""
        count = self.count + len(ids)
        if count > len(self._ids):
            grown = np.empty(max(count, len(self._ids) * 2), dtype=np.int64)
            grown[: self.count] = self._ids[: self.count]
            self._ids = grown
        self._ids[self.count : count] = ids
        taken = 0
        for number, first, last in _spans(self.count, count):
            if number == len(self._blocks):
                self._blocks.append(np.empty((BLOCK_ROWS, self.dimension), dtype=np.float32))
            self._blocks[number][first:last] = rows[taken : taken + last - first]
            taken += last - first
        if self._first_pass is not None:
            self._first_pass.extend(self._blocks, self.count, count)
        self.count = count
        self.next_id = int(ids[-1]) + 1

    def remove(self, ids: Ids) -> None:
        """Mark rows as deleted; ids that never were here are passed over."""
        here = self._ids[: self.count]
        positions = np.searchsorted(here, ids)
        known = positions < self.count
        known[known] = here[positions[known]] == ids[known]
        self._dead = np.union1d(self._dead, positions[known])

    def view(self) -> View:
        short = self._first_pass
        return View(
            self._ids[: self.count],
            tuple(self._blocks),
            self._dead,
            short if self._tries_first_pass() else None,
            tuple(short.blocks) if short else (),
        )

    def note(self, first_pass_served: bool | None) -> None:
        """Count a search, and whether the first pass served it; None when it was not tried."""
        self._searches += 1
        if first_pass_served is not None:
            self._fruitless = 0 if first_pass_served else self._fruitless + 1

    def wants_first_pass(self, after_searches: int) -> bool:
        """Whether it is time to learn one: enough searches, and twice the rows since the last try."""
        return self._searches >= after_searches and self.count >= 2 * self._first_pass_from

    def learn_first_pass(self) -> None:
        """Make the first pass beside the searches that go on meanwhile."""
        with self.lock:
            if self.count == 0 or self.count < 2 * self._first_pass_from:
                return
            self._first_pass_from = self.count
            view, blocks = self.view(), self._blocks
        chosen = np.random.default_rng(0).permutation(view.count)[:SAMPLE_ROWS]
        first_pass = FirstPass.learn(view.rows(np.sort(chosen)))
        if first_pass is not None:
            first_pass.extend(view.blocks, 0, view.count)
        with self.lock:
            if self._blocks is not blocks:
                return  # it was cleared in the meantime
            if first_pass is not None:
                first_pass.extend(self._blocks, view.count, self.count)
            self._first_pass = first_pass
            self._fruitless = 0

    def _tries_first_pass(self) -> bool:
        # After eight queries in a row that it could not serve, only one in 64 tries it again.
        return self._first_pass is not None and (self._fruitless < 8 or self._searches % 64 == 0)


class Matrices:
    """The matrices that this process keeps: up to `limit_bytes`, the longest unused given up first."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, Matrix] = OrderedDict()

    def use(self, collection: int, make: Callable[[], Matrix]) -> Matrix:
        with self._lock:
            matrix = self._kept.get(collection)
            if matrix is None:
                matrix = self._kept[collection] = make()
            self._kept.move_to_end(collection)
            return matrix

    def drop(self, collection: int) -> None:
        with self._lock:
            self._kept.pop(collection, None)

    def trim(self) -> None:
        with self._lock:
            total = sum(matrix.nbytes for matrix in self._kept.values())
            while total > self.limit_bytes and len(self._kept) > 1:
                _, oldest = self._kept.popitem(last=False)
                total -= oldest.nbytes


def _seeds(limit: int) -> int:
    """How many rows of the highest bounds are looked at first, to learn how near the nearest are."""
    return 4 * limit + 128


def _spans(start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Positions `start` to `stop` as (block, first row in it, row behind the last)."""
    while start < stop:
        number, first = divmod(start, BLOCK_ROWS)
        last = min(BLOCK_ROWS, first + stop - start)
        yield number, first, last
        start += last - first
