"""The Cranfield collection: 1,400 abstracts, 225 questions, and which abstracts answer them."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["FILES", "Cranfield", "ndcg", "read"]

FILES = ("cran.all.1400", "cran.qry", "cranqrel")
TOP = 10


@dataclass(frozen=True, slots=True)
class Cranfield:
    texts: dict[str, str]
    """By number. Two of the abstracts are empty, and left out."""
    questions: tuple[str, ...]
    relevant: tuple[frozenset[str], ...]
    """The numbers of the abstracts that answer each question."""


def read(folder: Path) -> Cranfield:
    """Read the three files in the folder, or in its folder `raw`. Raises `FileNotFoundError`."""
    abstracts, asked, judged = ((_file(folder, name)).read_text("utf-8", errors="replace") for name in FILES)
    texts = {number: text for number, text in _parts(abstracts) if text}
    # Judgements go by the place of a question in the file, and not by the number that it has there.
    relevant: list[set[str]] = [set() for _ in _parts(asked)]
    for line in judged.splitlines():
        question, document, grade = line.split()
        # Sources contradict each other on which grade is best, but -1 is none in all of them.
        if int(grade) > 0:
            relevant[int(question) - 1].add(document)
    return Cranfield(texts, tuple(text for _, text in _parts(asked)), tuple(map(frozenset, relevant)))


def ndcg(found: Sequence[str], relevant: Collection[str]) -> float:
    """nDCG@10 with two grades: an abstract answers the question or does not."""
    gain = sum(1 / math.log2(place + 1) for place, number in enumerate(found[:TOP], 1) if number in relevant)
    return gain / sum(1 / math.log2(place + 1) for place in range(1, min(TOP, len(relevant)) + 1))


def _file(folder: Path, name: str) -> Path:
    return next((path for path in (folder / name, folder / "raw" / name) if path.exists()), folder / name)


def _parts(text: str) -> list[tuple[str, str]]:
    """Number and text (`.W`) of each part; what stands before the text, title, author and source, is left out."""
    parts = re.split(r"^\.I (\d+)$", text, flags=re.MULTILINE)[1:]
    bodies = (re.split(r"^\.W$", body, maxsplit=1, flags=re.MULTILINE)[-1] for body in parts[1::2])
    return [(number, " ".join(body.split())) for number, body in zip(parts[::2], bodies, strict=True)]
