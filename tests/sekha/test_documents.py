from __future__ import annotations

import os
import time
import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sekha.documents import NAMESPACE, Chunk, Document, checked, content_hash, read_folder, split
from sekha.errors import DocumentRefused


def chunks(text: str, *, size: int = 100, overlap: int = 20) -> list[Chunk]:
    return split(Document(source="a.md", text=text), size=size, overlap=overlap)


def texts(text: str, *, size: int = 100, overlap: int = 20) -> list[str]:
    return [chunk.text for chunk in chunks(text, size=size, overlap=overlap)]


# --- splitting -----------------------------------------------------------------------------


def test_a_short_document_is_one_chunk() -> None:
    assert texts("Hello.\n\nWorld.\n") == ["Hello.\n\nWorld."]


def test_it_breaks_between_paragraphs_first() -> None:
    assert texts("a" * 60 + "\n\n" + "b" * 60, overlap=0) == ["a" * 60, "b" * 60]


def test_a_section_begins_a_chunk_and_knows_the_headings_above_it() -> None:
    found = chunks("# Install\n\nFirst.\n\n## Linux\n\nRun it.\n\n# Use\n\nCall it.\n")

    assert [(chunk.heading, chunk.text) for chunk in found] == [
        ("Install", "# Install\nFirst."),
        ("Install › Linux", "## Linux\nRun it."),
        ("Use", "# Use\nCall it."),
    ]


def test_a_heading_with_nothing_under_it_goes_with_the_next() -> None:
    found = chunks("# Use\n\n## Install\n\nRun it.\n\n## Look\n\n### Here\n\nSee.\n")

    assert [(chunk.heading, chunk.text) for chunk in found] == [
        ("Use › Install", "# Use\n\n## Install\nRun it."),
        ("Use › Look › Here", "## Look\n\n### Here\nSee."),
    ]


def test_a_long_paragraph_breaks_between_sentences_then_words_then_anywhere() -> None:
    assert texts("One two three. Four five six. Seven eight nine.", size=32, overlap=0) == [
        "One two three. Four five six.",
        "Seven eight nine.",
    ]
    assert texts("one two three four five six seven eight", size=22, overlap=0) == [
        "one two three four",
        "five six seven eight",
    ]
    assert texts("x" * 45, size=22, overlap=0) == ["x" * 20, "x" * 20, "x" * 5]


def test_chinese_breaks_behind_its_sentences_though_no_space_follows_them() -> None:
    text = "春天来了。花都开了。" * 20

    found = texts(text, size=42, overlap=0)

    assert all(chunk.endswith("。") for chunk in found)
    assert "".join(found) == text


def test_within_a_section_a_chunk_repeats_the_end_of_the_one_before() -> None:
    first, second = texts("A sentence is here. The last one here.\n\n" + "b" * 40, size=70, overlap=25)

    assert first == "A sentence is here. The last one here."
    assert second.startswith("The last one here.\n\n" + "b")


def test_a_new_section_repeats_nothing() -> None:
    assert texts("word " * 12 + "\n\n# Next\n\nmore")[1] == "# Next\nmore"


def test_a_fenced_block_is_kept_whole_while_it_fits() -> None:
    code = "```python\ndef f():\n\n    # no heading\n    return 1\n```"

    assert texts(f"{'a' * 60}\n\n{code}\n\n{'b' * 60}", overlap=0) == ["a" * 60, code, "b" * 60]


def test_a_longer_fence_holds_shorter_ones() -> None:
    inner = "````md\n```python\n# comment\n```\n# not a heading\n````"

    assert [chunk.heading for chunk in chunks(f"# Title\n\n{inner}\n\nEnd.")] == ["Title"]


def test_a_fence_that_is_never_closed_goes_to_the_end() -> None:
    found = chunks("# Title\n\n```\n" + "# line\n" * 50)

    assert {chunk.heading for chunk in found} == {"Title"}


@pytest.mark.parametrize("newline", ["\r\n", "\r"])
def test_lines_may_end_in_any_way(newline: str) -> None:
    assert [chunk.text for chunk in chunks("# A\n\nb\n\n# C\n\nd".replace("\n", newline))] == ["# A\nb", "# C\nd"]


alphabet = st.sampled_from([*"abc .!?\n\n\t#`~é漢。🙂\u00a0\u200b", "\n\n", "# ", "```", "\r\n", "word ", " " * 30])
any_text = st.lists(alphabet, max_size=400).map("".join)
sizes = st.integers(20, 200).flatmap(lambda size: st.tuples(st.just(size), st.integers(0, size // 2)))


@given(any_text, sizes)
def test_no_text_is_lost_no_chunk_is_too_long_and_none_is_empty(text: str, of: tuple[int, int]) -> None:
    size, overlap = of

    found = texts(text, size=size, overlap=overlap)

    assert all(0 < len(chunk) <= size for chunk in found)
    assert not any(chunk.isspace() for chunk in found)
    # Every character that is no space appears, in order; what is repeated comes on top.
    rest = iter("".join("".join(found).split()))
    assert all(character in rest for character in "".join(text.split()))


@given(any_text, sizes)
def test_without_overlap_nothing_is_repeated(text: str, of: tuple[int, int]) -> None:
    assert "".join("".join(texts(text, size=of[0], overlap=0)).split()) == "".join(text.split())


@given(any_text)
def test_splitting_is_deterministic_and_numbers_chunks_without_gaps(text: str) -> None:
    found = chunks(text)

    assert found == chunks(text)
    assert [chunk.index for chunk in found] == list(range(len(found)))


@pytest.mark.parametrize("unit", ["x", "word ", "漢字。", "a. ", " "])
def test_time_grows_with_the_length_of_a_single_line_and_not_with_its_square(unit: str) -> None:
    def seconds(megabytes: float) -> float:
        text = "start " + unit * int(megabytes * 1e6 / len(unit))
        times = []
        for _ in range(3):
            begun = time.process_time()
            split(Document(source="a", text=text))
            times.append(time.process_time() - begun)
        return min(times)

    # Ten times the text; its square would take a hundred times as long.
    assert seconds(10) < 30 * max(seconds(1), 0.005)


# --- identity ------------------------------------------------------------------------------


def test_a_chunks_uuid_is_its_collection_source_and_position() -> None:
    chunk = Chunk(source="a.md", index=0, text="x")

    assert chunk.uuid_in("docs") == Chunk(source="a.md", index=0, text="y").uuid_in("docs")
    others = [
        Chunk(source="a.md", index=1, text="x").uuid_in("docs"),
        Chunk(source="b.md", index=0, text="x").uuid_in("docs"),
    ]
    assert len({chunk.uuid_in("docs"), chunk.uuid_in("notes"), *others}) == 4
    assert Chunk(source="bc", index=0, text="").uuid_in("a") != Chunk(source="c", index=0, text="").uuid_in("ab")


@given(collection=st.text(), source=st.text(st.characters(exclude_categories=["Cs"])), index=st.integers(0))
def test_a_chunks_uuid_is_a_version_5_uuid_of_its_name(collection: str, source: str, index: int) -> None:
    name = f"{collection}\0{source}\0{index}"

    assert Chunk(source=source, index=index, text="").uuid_in(collection) == str(uuid.uuid5(NAMESPACE, name))


def test_uuids_and_hashes_never_change() -> None:
    # Stored collections hold these: another value would orphan what is stored.
    assert Chunk(source="a.md", index=0, text="").uuid_in("documents") == "e3799cb5-3ae3-5fa3-8ac7-9c139aa67c43"
    assert content_hash("text") == "d732c6be860e019351f99173fa6ae612"


def test_the_text_of_a_chunk_never_shows() -> None:
    (chunk,) = chunks("a secret prompt")

    assert "secret" not in repr(chunk)
    assert "secret" not in repr(Document(source="a", text="a secret prompt"))


# --- reading -------------------------------------------------------------------------------


def refusal(path: Path, **options: float) -> str:
    with pytest.raises(DocumentRefused) as caught:
        read_folder(path, **options)  # type: ignore[arg-type]
    return str(caught.value)


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    for name in ("b.md", "a/z.txt", "a/.hidden.md", ".git/x.md", "node_modules/y.md", "c.py", "d.RST"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("text")

    found = read_folder(tmp_path)

    assert [document.source for document in found] == ["a/z.txt", "b.md", "d.RST"]


def test_one_file_is_read_whatever_its_name(tmp_path: Path) -> None:
    (tmp_path / "notes.log").write_bytes(b"\xef\xbb\xbfHello")

    (document,) = read_folder(tmp_path / "notes.log")

    assert (document.source, document.text) == ("notes.log", "Hello")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "a.md: it is empty: write something, or leave it out"),
        (b" \n\t\n", "a.md: it is empty"),
        (b"PK\x03\x04\0\0", "a.md: it is binary, not text: convert it, or leave it out"),
        (b"text " * 2000 + b"\0", "a.md: it is binary"),
        (
            b"fine\ncaf\xe9\n",
            "a.md: it is not UTF-8: byte 0xe9 on line 2. Convert it: `iconv -f WINDOWS-1252 -t UTF-8 -o new.txt a.md`",
        ),
    ],
)
def test_what_is_no_text_is_refused_with_the_fix(content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "a.md").write_bytes(content)

    assert says in refusal(tmp_path)


def test_a_document_of_50_mb_is_refused_without_being_read(tmp_path: Path) -> None:
    with (tmp_path / "big.md").open("wb") as file:
        file.truncate(50_000_000)

    assert (
        "big.md: it has 50.0 MB, and 10 MB is the most: split it, or allow it with `--max-document-mb 51`"
        in refusal(tmp_path)
    )


def test_a_larger_document_is_read_where_it_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("x" * 2000)

    assert "0.001 MB is the most" in refusal(tmp_path, max_document_mb=0.001)
    assert len(read_folder(tmp_path, max_document_mb=0.002)) == 1


def test_every_document_that_cannot_be_read_is_listed(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("")
    (tmp_path / "b.md").write_bytes(b"\xff")
    (tmp_path / "c.md").write_text("fine")

    assert refusal(tmp_path).splitlines()[0] == "2 documents cannot be ingested, and nothing was stored:"
    left_out: list[tuple[str, str]] = []
    assert [document.source for document in read_folder(tmp_path, left_out=left_out)] == ["c.md"]
    assert [source for source, _ in left_out] == ["a.md", "b.md"]


def test_a_folder_without_text_says_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x")

    assert "no text in it: files that end in .adoc, .markdown, .md" in refusal(tmp_path)


def test_a_file_below_home_has_one_name_by_whichever_folder_it_is_reached(tmp_path: Path) -> None:
    (tmp_path / "home" / "docs").mkdir(parents=True)
    (tmp_path / "home" / "docs" / "a.md").write_text("text")
    home = tmp_path / "home"

    for path in (home, home / "docs", home / "docs" / "a.md", home / "docs" / ".." / "docs"):
        assert [document.source for document in read_folder(path, home=home)] == ["docs/a.md"]
    assert [document.source for document in read_folder(home, home=tmp_path / "other")] == ["docs/a.md"]


def test_a_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "it cannot be read: No such file or directory" in refusal(tmp_path / "none")


def test_links_that_go_round_in_a_circle_are_read_once(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("text")
    (tmp_path / "docs" / "again").symlink_to(tmp_path / "docs")

    assert [document.source for document in read_folder(tmp_path / "docs")] == ["a.md"]


def test_a_broken_link_and_a_pipe_are_refused_and_wait_for_nobody(tmp_path: Path) -> None:
    (tmp_path / "broken.md").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe.md")

    said = refusal(tmp_path)

    assert "broken.md: it cannot be read: No such file" in said
    assert "pipe.md: it is no regular file" in said


def test_a_name_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.md")).write_text("text")

    assert "caf?.md: its name is not UTF-8" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("documents", "says"),
    [
        ([Document(source="", text="x")], "it has no `source`"),
        ([Document(source="a", text="x"), Document(source="a", text="y")], "two documents have this source"),
        ([Document(source="a", text=" ")], "it is empty"),
        ([Document(source="a", text="x\0")], "it is binary"),
        ([Document(source="a", text="\ud800")], "it holds half a character"),
        ([Document(source="a", text="x" * 11_000_000)], "it has 11.0 MB"),
    ],
)
def test_documents_that_are_handed_over_are_held_to_the_same_rules(documents: list[Document], says: str) -> None:
    with pytest.raises(DocumentRefused, match=says):
        checked(documents)


def test_refused_documents_are_left_out_on_demand_but_never_one_of_two_with_the_same_source() -> None:
    fine, empty = Document(source="a", text="x"), Document(source="b", text="")

    assert checked([fine, empty], left_out=[]) == (fine,)
    with pytest.raises(DocumentRefused):
        checked([fine, fine], left_out=[])
    with pytest.raises(DocumentRefused):
        checked([empty], left_out=[])
