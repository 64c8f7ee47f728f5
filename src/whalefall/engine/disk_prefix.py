"""Engine room: the prefix cache's lower tier: blocks of prompts on disk or on a file system.

In: prompts to look up, sequences whose prompt was computed. Out: blocks by chained hash, read in
the background and shared by all engines of the same checkpoint. Only blocks computed in the prompt
form are kept, so a hit changes no bit. Nothing here ever fails a request: what cannot be read is
computed, what cannot be written is left out and counted.
Source: 3FS's KV cache for inference; the published system's on-disk KV cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import queue
import threading
import time
from collections.abc import Sequence as Items
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from whalefall import jit
from whalefall.engine.core import BlockManager, Sequence
from whalefall.engine.core.block_manager import block_hash
from whalefall.engine.core.sequence import BLOCK_SIZE
from whalefall.errors import ConfigError, CorruptError
from whalefall.fs.kvcache import KVCache as Store

__all__ = ["DiskPrefix", "chain", "fingerprint"]

log = logging.getLogger("whalefall.engine")
FORMAT = 1  # of a block's content
SAMPLES, SAMPLE_BYTES = 256, 4096
REFRESH_S = 1.0  # between looks for what other engines wrote
PAUSE_S = 10.0  # after a write that failed
QUEUE = 16  # prompts that may wait for the disk
Found = dict[bytes, bytes]


def chain(seq: Sequence) -> list[bytes]:
    """Hashes of the full blocks of a prompt that a hit may cover: one token is left to compute."""
    hashes: list[bytes] = []
    for start in range(0, seq.num_prompt - BLOCK_SIZE, BLOCK_SIZE):
        previous = hashes[-1] if hashes else b""
        hashes.append(block_hash(previous, seq.tokens[start : start + BLOCK_SIZE], seq.salt))
    return hashes


def fingerprint(folder: str | Path, *facts: object) -> str:
    """A name for a checkpoint's KV: its config, samples of every weights file, the format, `facts`.

    Args:
        facts: what else the bits of KV depend on (compute, dtype, …).
    """
    digest = hashlib.blake2b(digest_size=12)
    digest.update(repr((FORMAT, jit.best_level(), *facts)).encode())
    folder = Path(folder)
    for path in (folder / "config.json", *sorted(folder.glob("*.safetensors"))):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for place in np.linspace(0, max(0, size - SAMPLE_BYTES), SAMPLES, dtype=np.int64):
                file.seek(int(place))
                digest.update(file.read(SAMPLE_BYTES))
                if size <= SAMPLE_BYTES:
                    break
    return digest.hexdigest()


class DiskPrefix:
    """One engine's view of the shared cache.

    Args:
        url: a folder, or a URL that `fsspec` or `whalefall://` understands.
        namespace: from `fingerprint`.
        pages: the KV cache, [layers, blocks, 64, latent + rope].
        capacity_bytes: the least recently used blocks leave beyond it; 0: no limit.
    Attributes:
        hit_tokens: that came from here.
        failures: reads and writes that went wrong, blocks that were damaged.
    Raises: ConfigError if the place cannot be used at the start.
    """

    def __init__(
        self, url: str, namespace: str, pages: np.ndarray, capacity_bytes: int = 0
    ) -> None:
        self._pages = pages
        block_bytes = pages[:, 0].nbytes
        try:
            self._store = Store(url, block_bytes, namespace, capacity_bytes)
        except Exception as error:
            raise ConfigError(f"kv_cache: {url!r} cannot be used: {error}") from None
        self.hit_tokens = self.failures = self._damaged = 0
        self._refreshed_s = time.monotonic()
        self._mutex = threading.Lock()
        self._readers = ThreadPoolExecutor(2, "kv-read")
        self._fetching: dict[str, tuple[Sequence, list[bytes], Future[Found]]] = {}
        self._paused_s = 0.0
        self._kept: queue.Queue[dict[bytes | str, np.ndarray]] = queue.Queue(QUEUE)
        self._writer = threading.Thread(target=self._write, name="kv-write", daemon=True)
        self._writer.start()
        self._count_damaged()

    # ---- reading

    def fetch(self, seq: Sequence, blocks: BlockManager) -> bool:
        """Begin to read what memory lacks of a prompt; False, and nothing begun, if it is all
        there or too short. The sequence comes back from `arrived`."""
        hashes = chain(seq)
        missing = [own for own in hashes if not blocks.knows(own)]
        if not missing:
            return False
        future = self._readers.submit(self._read, missing)
        self._fetching[seq.seq_id] = (seq, hashes, future)
        return True

    def _read(self, hashes: Items[bytes]) -> Found:
        try:
            count = self._leading(hashes)
            if count < len(hashes) and time.monotonic() - self._refreshed_s > REFRESH_S:
                with self._mutex:
                    self._refreshed_s = time.monotonic()
                    self._store.refresh()
                self._count_damaged()
                count = self._leading(hashes)
            if not count:
                return {}
            found = self._store.get_many(hashes[:count])
            self._count_damaged()
            return {h: data for h, data in zip(hashes, found, strict=False) if data is not None}
        except Exception as error:  # whatever a file system may throw: compute instead
            self._failed("reading", error)
            return {}

    def _count_damaged(self) -> None:
        with self._mutex:  # there are several readers
            fresh = self._store.damaged - self._damaged
            self._damaged += fresh
        for _ in range(fresh):
            self._failed("reading", CorruptError("a block is damaged, it is computed again"))

    def _leading(self, hashes: Items[bytes]) -> int:
        there = self._store.exists(list(hashes))
        return there.index(False) if False in there else len(there)

    @property
    def is_fetching(self) -> bool:
        """Whether some sequences are not back yet."""
        return bool(self._fetching)

    def forget(self, seq: Sequence) -> bool:
        """Let go of a sequence; False if it was not being fetched."""
        return self._fetching.pop(seq.seq_id, None) is not None

    def arrived(self, blocks: BlockManager, wait_s: float = 0.0) -> list[Sequence]:
        """Sequences whose blocks were read; the blocks lie in pages now, and `blocks` knows them.

        Args:
            wait_s: how long to wait for the first.
        """
        if wait_s and self._fetching:
            self._wait(wait_s)
        back = []
        for seq_id, (seq, hashes, future) in list(self._fetching.items()):
            if future.done():
                del self._fetching[seq_id]
                self._adopt(hashes, future.result(), blocks)
                back.append(seq)
        return back

    def _wait(self, wait_s: float) -> None:
        first = next(iter(self._fetching.values()))[2]
        try:
            first.result(wait_s)
        except TimeoutError:
            return

    def _adopt(self, hashes: list[bytes], found: Found, blocks: BlockManager) -> None:
        there = 0
        while there < len(hashes) and (hashes[there] in found or blocks.knows(hashes[there])):
            there += 1
        for own, block in blocks.adopt(hashes[:there]):
            raw = np.frombuffer(found[own], np.uint8)
            page = self._pages[:, block]
            page[...] = raw.view(page.dtype).reshape(page.shape)
            self.hit_tokens += BLOCK_SIZE

    # ---- writing

    def keep(self, seq: Sequence) -> None:
        """Write the full blocks of a prompt that was just computed, in the background."""
        if time.monotonic() < self._paused_s or self._kept.full():
            return
        full = seq.num_prompt // BLOCK_SIZE
        hashes = seq.hashes[:full]
        there = self._store.exists(hashes)
        fresh: dict[bytes | str, np.ndarray] = {
            own: np.ascontiguousarray(self._pages[:, block])
            for own, block, known in zip(hashes, seq.blocks, there, strict=False)
            if not known
        }
        if fresh:
            try:
                self._kept.put_nowait(fresh)
            except queue.Full:
                self._failed("writing", queue.Full("the disk is too slow"))

    def _write(self) -> None:
        while True:
            blocks = self._kept.get()
            try:
                views = {own: page.view(np.uint8).reshape(-1) for own, page in blocks.items()}
                self._store.put_many(views)
            except Exception as error:  # a full disk, a folder that is gone, a cluster that is down
                self._paused_s = time.monotonic() + PAUSE_S
                self._failed("writing", error)
                with contextlib.suppress(Exception):
                    self._store.fs.makedirs(self._store.folder, exist_ok=True)
            self._kept.task_done()

    def flush(self) -> None:
        """Return when all that was kept so far is written, or was given up."""
        self._kept.join()

    def _failed(self, doing: str, error: Exception) -> None:
        self.failures += 1
        if self.failures in (1, 10, 100, 1000):
            log.warning("kv cache: %s failed (%d times so far): %s", doing, self.failures, error)
