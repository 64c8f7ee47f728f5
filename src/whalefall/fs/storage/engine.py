"""File-system room: the chunk engine — copy-on-write chunks, one target's worth, on one disk.

In: updates, commits, aborts, reads. Out: their effect, durable when the call returns, but for a
commit. Every update writes a fresh slot, so a torn write can only hit bytes that nothing refers to
yet. The record of a chunk (what is committed, what is pending, where) changes in one transaction.
A commit is durable before anything that is stored later: a crash may take it back to what was
stored, pending with its tag; the slot of what it replaced is not used again before.
"""

from __future__ import annotations

import array
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from whalefall.fs.core.effects import Refused, Store
from whalefall.fs.core.messages import ChunkMeta, Code, Kind, Remembered, Tag, Update
from whalefall.fs.lock import FolderLock
from whalefall.fs.storage import native_io
from whalefall.fs.storage.journal import Batch, Journal
from whalefall.fs.storage.records import REMEMBERED, Placed, Record, record_of, row_of, tag_row
from whalefall.fs.storage.slots import MAX_CHUNK_BYTES, Place, Slots

__all__ = ["ChunkEngine"]

RESERVE_BYTES = 16 << 20
PREFIX_BYTES = 12


class ChunkEngine:
    """One target on disk. Thread-safe; callers hold the chunk's lock while they change it.

    Args:
        folder: made where missing.
        step: called with the name of each point where a crash is possible (tests crash there).
        reserve_bytes: kept free for metadata: content is refused below it.
        rotten: called with each chunk whose committed content `load` finds damaged.

    Raises: ConfigError, if somebody has it open: two would overwrite each other's chunks.
    """

    def __init__(
        self,
        folder: Path,
        step: Callable[[str], None] = lambda name: None,
        reserve_bytes: int = RESERVE_BYTES,
        rotten: Callable[[bytes], None] = lambda chunk: None,
    ) -> None:
        self._lock = FolderLock(folder)
        self.folder, self.step, self.reserve_bytes = folder, step, reserve_bytes
        self.bad_blocks, self.rotten = 0, rotten
        self._mutex = threading.Lock()
        self._records: dict[bytes, Record] = {}
        self._pendings: set[bytes] = set()
        self._files: dict[bytes, set[bytes]] = {}
        self._tags: dict[tuple[str, int], Remembered] = {}
        try:
            self._open()
        except BaseException:
            self._lock.release()
            raise

    def _open(self) -> None:
        self._journal = Journal(self.folder / "meta.sqlite")
        for key, value in self._journal.chunks():
            self._keep(key, record_of(value))
        for value in self._journal.tags():
            tag = REMEMBERED.decode(value)
            self._tags[tag.tag.client, tag.tag.channel] = tag
        places = [p for r in self._records.values() for p in (r.committed_at, r.pending_at) if p]
        self._slots = Slots(self.folder, places)

    # ---- from memory

    def entry(self, chunk: bytes) -> Record | None:
        """What is recorded of a chunk."""
        return self._records.get(chunk)

    def entries(self) -> Mapping[bytes, Record]:
        """All chunks, as they are now."""
        with self._mutex:
            return dict(self._records)

    def pendings(self) -> list[bytes]:
        """The chunks that have a pending content."""
        with self._mutex:
            return sorted(self._pendings)

    def remembered(self, client: str, channel: int) -> Remembered | None:
        """The last operation that succeeded on a client's channel."""
        return self._tags.get((client, channel))

    def tags(self) -> list[Remembered]:
        """All remembered operations."""
        with self._mutex:
            return list(self._tags.values())

    def last(self, prefix: bytes) -> tuple[bytes | None, int, int]:
        """The last committed chunk under a 12-byte prefix, its length, and their number."""
        with self._mutex:
            there = sorted(self._files.get(prefix, ()), reverse=True)
        for chunk in there:
            record = self._records.get(chunk)
            if record is not None and record.committed is not None:
                return chunk, record.committed.length, len(there)
        return None, 0, 0

    def usage(self) -> tuple[int, int, int, int]:
        """Bytes used, bytes free on the disk, chunks, bad blocks found so far."""
        with self._mutex:
            used, spare = self._slots.used_bytes, self._slots.spare_bytes()
        free = max(0, self._slots.disk_bytes() + spare - self.reserve_bytes)
        return used, free, len(self._records), self.bad_blocks

    # ---- changes

    def store(self, update: Update, data: Any, version: int, chain_version: int) -> ChunkMeta:
        """Write an update's outcome beside what is committed, and record it as pending.

        Raises: Refused (NO_SPACE, CORRUPT, INVALID); OSError if the disk fails.
        """
        outcome = self.store_all([Store(0, update, data, version, chain_version)])[0]
        if isinstance(outcome, Refused):
            raise outcome
        return outcome

    def store_all(self, stores: Sequence[Store]) -> list[ChunkMeta | Refused]:
        """`store` of several chunks, recorded in one transaction.

        Returns: each one's metadata, or why it was refused.
        Raises: Refused, if none could be recorded; OSError.
        """
        placed: list[Placed | Refused] = []
        for store in stores:
            try:
                placed.append(self._place(store))
            except Refused as refusal:
                placed.append(refusal)
            except BaseException:
                self._take_back(placed)
                raise
        try:
            self._record_pending([one for one in placed if isinstance(one, Placed)])
        except BaseException:
            self._take_back(placed)
            raise
        return [one.meta if isinstance(one, Placed) else one for one in placed]

    def _place(self, store: Store) -> Placed:
        """Write an update's outcome to a fresh slot; not flushed."""
        update = store.update
        if update.kind is Kind.REMOVE:
            meta = ChunkMeta(store.version, store.chain_version, 0, 0, update.tag, removed=True)
            return Placed(update.chunk, meta)
        content = self._content(update, store.data)
        size = len(content)
        with self._mutex:
            place = self._slots.take(size)
        try:
            with self._mutex:
                descriptor, direct = self._slots.written(place.size_class)
                if not self._slots.make_room(place, size, self.reserve_bytes):
                    raise Refused(Code.NO_SPACE, f"the disk of {self.folder} is full")
            crcs, whole = native_io.write(descriptor, direct, place.offset, content)
            self.step("data written")
            if update.checksum >= 0 and update.kind in (Kind.WRITE, Kind.REPLACE):
                whole_is_data = size == update.length
                found = whole if whole_is_data else native_io.checksum(store.data)
                if found != update.checksum:
                    raise Refused(Code.CORRUPT, "the data changed on its way here")
        except BaseException:
            self._free(place)
            raise
        meta = ChunkMeta(store.version, store.chain_version, size, whole, update.tag)
        return Placed(update.chunk, meta, place, crcs, descriptor)

    def _take_back(self, placed: Sequence[Placed | Refused]) -> None:
        for one in placed:
            if isinstance(one, Placed):
                self._free(one.place)

    def _content(self, update: Update, data: Any) -> Any:
        """The chunk's whole content after an update."""
        if update.kind is Kind.REPLACE:
            return data
        size = update.size or MAX_CHUNK_BYTES
        end = update.offset + update.length
        if end > size or size > MAX_CHUNK_BYTES:
            raise Refused(Code.INVALID, f"bytes up to {end} in a chunk of {size}")
        record = self._records.get(update.chunk)
        committed = record.committed if record else None
        length = committed.length if committed else 0
        if update.kind is Kind.WRITE:
            if update.offset == 0 and update.length >= length:
                return data
            wanted = max(length, end) if update.length else length
        else:
            cut = update.kind is Kind.TRUNCATE
            wanted = update.length if cut else max(length, update.length)
        content = bytearray(wanted)
        kept = min(length, wanted)
        if kept:
            content[:kept] = memoryview(self.load(update.chunk, pending=False))[:kept]
        if update.kind is Kind.WRITE:
            content[update.offset : end] = data
        return content

    def _record_pending(self, placed: list[Placed]) -> None:
        made: list[tuple[Placed, Record, Place | None]] = []
        for one in placed:
            old = self._records.get(one.chunk) or Record()
            new = Record(
                old.committed, one.meta, old.committed_at, old.committed_crcs, one.place, one.crcs
            )
            made.append((one, new, old.pending_at))
        rows = [(one.chunk, row_of(new)) for one, new, _ in made]
        files = {one.file for one in placed if one.file >= 0}
        if rows:
            self._journal.write(Batch(list(rows), files=tuple(files)))
        self.step("pending recorded")
        for one, new, freed in made:
            self._replace(one.chunk, new, freed)

    def commit(self, chunk: bytes, chain_version: int, tag: Tag | None) -> None:
        """Make the pending content the committed one; remember the operation.

        Its record follows with the next transaction: what it needs after a crash is stored already.
        """
        old = self._records[chunk]
        pending = old.pending
        if pending is None:
            raise Refused(Code.NOT_READY, "nothing is pending")
        meta = msgspec.structs.replace(pending, chain_version=chain_version)
        new = None
        if not pending.removed:
            new = Record(meta, None, old.pending_at, old.pending_crcs)
        remembered = None
        if tag is not None and not self._newer(tag):
            remembered = Remembered(tag, meta.version, chain_version, meta.length, meta.checksum)
        self.step("before commit")
        with self._mutex:
            if remembered is not None:
                self._tags[remembered.tag.client, remembered.tag.channel] = remembered
        self._replace(chunk, new, freed=None)
        # After it: nobody may find the old record once the old slot is free.
        rows = [tag_row(remembered)] if remembered else []
        self._journal.leave(
            Batch([(chunk, row_of(new))], rows), functools.partial(self._free, old.committed_at)
        )
        self.step("committed")

    def _newer(self, tag: Tag) -> bool:
        last = self._tags.get((tag.client, tag.channel))
        return last is not None and last.tag.seq > tag.seq

    def abort(self, chunk: bytes) -> None:
        """Forget the pending content."""
        old = self._records.get(chunk)
        if old is None or old.pending is None:
            return
        new = Record(old.committed, None, old.committed_at, old.committed_crcs)
        kept = new if new.committed is not None else None
        self._journal.write(Batch([(chunk, row_of(kept))]))
        self.step("aborted")
        self._replace(chunk, kept, freed=old.pending_at)

    def merge(self, tags: list[Remembered]) -> None:
        """Remember what another replica remembers; a newer operation stays."""
        with self._mutex:
            fresh = {
                (t.tag.client, t.tag.channel): t for t in tags
                if (mine := self._tags.get((t.tag.client, t.tag.channel))) is None
                or mine.tag.seq < t.tag.seq
            }  # fmt: skip
            self._tags |= fresh
            # In the order of memory: a commit that comes now is recorded after it.
            self._journal.leave(Batch(tags=[tag_row(t) for t in fresh.values()]), lambda: None)
        self._journal.write(Batch())

    def forget(self) -> None:
        """Forget all remembered operations."""
        with self._mutex:
            gone = [(client, channel, None) for client, channel in self._tags]
            self._tags.clear()
            self._journal.leave(Batch(tags=gone), lambda: None)
        self._journal.write(Batch())

    def mend(self, chunk: bytes, data: Any) -> bool:
        """Put good bytes in place of a damaged committed content; False if they do not fit it."""
        old = self._records.get(chunk)
        if old is None or old.committed is None or old.committed_at is None:
            return False
        with self._mutex:
            place = self._slots.take(len(data))
        try:
            with self._mutex:
                descriptor, direct = self._slots.written(place.size_class)
            crcs, whole = native_io.write(descriptor, direct, place.offset, data)
            if (len(data), whole) != (old.committed.length, old.committed.checksum):
                self._free(place)
                return False
            new = Record(old.committed, old.pending, place, crcs, old.pending_at, old.pending_crcs)
            self._journal.write(Batch([(chunk, row_of(new))], files=(descriptor,)))
        except BaseException:
            self._free(place)
            raise
        self._replace(chunk, new, freed=old.committed_at)
        return True

    def _free(self, place: Place | None) -> None:
        if place is not None:
            with self._mutex:
                self._slots.give_back(place)

    def _replace(self, chunk: bytes, new: Record | None, freed: Place | None) -> None:
        with self._mutex:
            self._keep(chunk, new)
            if freed is not None:
                self._slots.give_back(freed)

    def _keep(self, chunk: bytes, new: Record | None) -> None:
        prefix = chunk[:PREFIX_BYTES]
        self._pendings.discard(chunk)
        if new is None:
            self._records.pop(chunk, None)
            siblings = self._files.get(prefix, set())
            siblings.discard(chunk)
            if not siblings:
                self._files.pop(prefix, None)
            return
        self._records[chunk] = new
        self._files.setdefault(prefix, set()).add(chunk)
        if new.pending is not None:
            self._pendings.add(chunk)

    # ---- reads

    def load(self, chunk: bytes, pending: bool) -> bytearray:
        """A whole content, verified.

        Raises: Refused (NOT_FOUND, CORRUPT).
        """
        pin = self.pin()
        try:
            record = self._records.get(chunk)
            meta = None
            if record is not None:
                meta = record.pending if pending else record.committed
            if record is None or meta is None:
                raise Refused(Code.NOT_FOUND, "no such content")
            data = bytearray(meta.length)
            start, _ = native_io.address(data)
            contents = [self.content(record, pending)]
            status = self.read(contents, array.array("q", (0, meta.length)), start)[0]
        finally:
            self.unpin(pin)
        if status:
            if not pending:
                self.rotten(chunk)
            raise Refused(Code.CORRUPT, f"chunk {chunk.hex()} does not match its checksum")
        return data

    def pin(self) -> int:
        """Keep every slot that records refer to now as it is, until `unpin`."""
        with self._mutex:
            return self._slots.begin_read()

    def unpin(self, pin: int) -> None:
        """The read that pinned has ended."""
        with self._mutex:
            self._slots.end_read(pin)

    def content(self, record: Record, pending: bool = False) -> bytes:
        """What `read` needs to know of a recorded content; made under a pin, good as long as it."""
        known = record.pending_content if pending else record.committed_content
        if known is not None:
            return known
        with self._mutex:
            return record.describe(pending, self._slots.file)

    def read(self, contents: list[bytes], plan: array.array[int], out: int) -> list[int]:
        """Read (offset, length)s of contents to an address, in one native call, under a pin.

        The caller keeps the contents' records until it returns.
        Returns: per piece 0, -errno or `native_io.CORRUPT`.
        """
        status = native_io.read_batch(contents, plan, out)
        self.bad_blocks += sum(code != 0 for code in status)
        return status

    def close(self) -> None:
        """Close the files; everything acknowledged is down already."""
        self._journal.close()
        self._slots.close()
        self._lock.release()
