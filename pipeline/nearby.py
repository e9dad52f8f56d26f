"""What a node keeps of a remote store, so that no epoch but the first waits for the network."""

import os
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import pyarrow as pa

SCAN_SHARE = 0.01  # of the limit, that each process writes between looks at the whole
KEPT_SHARE = 0.9  # of the limit, after some had to go
PART, PART_IS_OLD_S = ".part-", 3600


class Nearby:
    """Pieces of remote files in a local folder that the processes of a node share.

    Beyond the limit the longest unused go; each process may overstep it by `SCAN_SHARE`. Pieces are
    named by what they are a piece of, and whoever reads one checks it. A folder that cannot be
    written to costs a warning, and then every piece is read from afar.
    """

    def __init__(self, root: Path, limit_bytes: int) -> None:
        self.root, self.limit_bytes = root, limit_bytes
        self._unseen, self._lock = limit_bytes, threading.Lock()  # the first write looks

    def get(self, file: str, piece: int, read: Callable[[], bytes]) -> memoryview:
        """Return a piece of a file by its address; `read` fetches it if it is not here."""
        path = self._path(file, piece)
        try:
            with pa.memory_map(str(path)) as source:
                found = memoryview(source.read_buffer())
            os.utime(path)
        except OSError:
            fetched = read()
            self._keep(path, fetched)
            return memoryview(fetched)
        return found

    def drop(self, file: str, piece: int) -> None:
        """Forget a piece that turned out to be damaged."""
        self._path(file, piece).unlink(missing_ok=True)

    def _path(self, file: str, piece: int) -> Path:
        return self.root / f"{sha256(file.encode()).hexdigest()[:32]}-{piece}"

    def _keep(self, path: Path, data: bytes) -> None:
        if not self.limit_bytes:
            return
        part = path.with_name(f"{PART}{os.getpid()}-{threading.get_ident()}")
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            part.write_bytes(data)
            part.replace(path)
            self._make_room(len(data))
        except OSError as error:
            with suppress(OSError):
                part.unlink()
            self.limit_bytes = 0
            warnings.warn(
                f"{self.root} keeps no shards: {error}; set ray.cache_folder", stacklevel=2
            )

    def _make_room(self, num_bytes: int) -> None:
        with self._lock:
            self._unseen += num_bytes
            if self._unseen < SCAN_SHARE * self.limit_bytes:
                return
            self._unseen = 0
        files = sorted(self._files())
        total = sum(size for _, size, _ in files)
        if total <= self.limit_bytes:
            return
        for _, size, path in files:
            path.unlink(missing_ok=True)
            total -= size
            if total <= KEPT_SHARE * self.limit_bytes:
                return

    def _files(self) -> list[tuple[float, int, Path]]:
        """Return when each was last used, its size and path; what a kill left of writing goes."""
        found = []
        for entry in os.scandir(self.root):
            try:
                about = entry.stat()
            except FileNotFoundError:  # another process was sooner
                continue
            if not entry.name.startswith(PART):
                found.append((about.st_mtime, about.st_size, Path(entry.path)))
            elif time.time() - about.st_mtime > PART_IS_OLD_S:
                Path(entry.path).unlink(missing_ok=True)
        return found


def own_folder(given: str) -> Path:
    """Return the folder that is given, or one in the system's temporary folder for this user."""
    return Path(given) if given else Path(tempfile.gettempdir()) / f"csc-cache-{os.getuid()}"
