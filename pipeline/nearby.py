"""What a node keeps of a remote store, so that no epoch but the first waits for the network."""

import errno
import os
import re
import shutil
import stat
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
FREE_SHARE = 0.1  # of the disk, that others are left
PIECE = re.compile(r"[0-9a-f]{32}-[0-9]+")
PART, PART_IS_OLD_S = ".part-", 3600


class Nearby:
    """Pieces of remote files in a folder of this user's that the processes of a node share.

    Beyond the limit, or where the disk is nearly full, the longest unused go; each process may
    overstep it by `SCAN_SHARE`. Pieces are named by what they are a piece of, and whoever reads one
    checks it. Where nothing can be kept, a worker's log says why, and all is read from afar.
    """

    def __init__(self, parent: str, limit_bytes: int) -> None:
        """`parent` is a local folder; an empty name stands for the system's temporary folder."""
        self.root = Path(parent or tempfile.gettempdir()) / f"csc-cache-{os.getuid()}"
        self.limit_bytes, self._off, self._ready = limit_bytes, False, False
        self._unseen, self._lock = limit_bytes, threading.Lock()  # the first write looks

    def get(self, file: str, piece: int, size: int, read: Callable[[], bytes]) -> memoryview:
        """Return a piece of a file by its address; `read` fetches it if it is not here.

        One of another size than it should have was cut short by a crash, and is fetched anew.
        """
        if not self._usable():
            return memoryview(read())
        path = self._path(file, piece)
        try:
            with pa.memory_map(str(path)) as source:
                found = memoryview(source.read_buffer())
            os.utime(path)
        except OSError:
            found = memoryview(b"")
        if len(found) != size:
            found = memoryview(read())
            self._keep(path, found)
        return found

    def drop(self, file: str, piece: int) -> None:
        """Forget a piece that turned out to be damaged."""
        with suppress(OSError):
            self._path(file, piece).unlink()

    def _path(self, file: str, piece: int) -> Path:
        return self.root / f"{sha256(file.encode()).hexdigest()[:32]}-{piece}"

    def _usable(self) -> bool:
        """Make the folder when it is first asked for; one that others can write to is not used."""
        if not (self._ready or self._off):
            try:
                self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
                about = self.root.lstat()
                ours = stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid()
                if not ours or about.st_mode & 0o022:
                    raise PermissionError(errno.EPERM, "others can write there", str(self.root))
                self._ready = True
            except OSError as error:
                self._give_up(error)
        return not self._off

    def _give_up(self, error: OSError) -> None:
        self._off = True
        warnings.warn(
            f"no shards are kept on this node: {error}; set ray.cache_folder", stacklevel=2
        )

    def _keep(self, path: Path, data: memoryview) -> None:
        try:
            handle, part = tempfile.mkstemp(prefix=PART, dir=self.root)
            try:
                with os.fdopen(handle, "wb") as out:
                    out.write(data)
                Path(part).replace(path)
            except OSError:
                Path(part).unlink(missing_ok=True)
                raise
            self._make_room(len(data))
        except OSError as error:
            if error.errno == errno.ENOSPC:  # what goes on needs the disk more
                self._shrink(0)
            self._give_up(error)

    def _make_room(self, num_bytes: int) -> None:
        with self._lock:
            self._unseen += num_bytes
            if self._unseen < SCAN_SHARE * self.limit_bytes:
                return
            self._unseen = 0
        self._shrink(self.limit_bytes)

    def _shrink(self, limit_bytes: int) -> None:
        """Let the longest unused go, if all together are beyond the limit or crowd the disk."""
        files, disk = sorted(self._files()), shutil.disk_usage(self.root)
        total = sum(size for _, size, _ in files)
        limit_bytes = min(limit_bytes, total + disk.free - int(FREE_SHARE * disk.total))
        if total <= limit_bytes:
            return
        for _, size, path in files:
            path.unlink(missing_ok=True)
            total -= size
            if total <= KEPT_SHARE * limit_bytes:
                return

    def _files(self) -> list[tuple[float, int, Path]]:
        """Return when each was last used, its size and path; what a kill left of writing goes."""
        found = []
        for entry in os.scandir(self.root):
            try:
                about = entry.stat()
            except FileNotFoundError:  # another process was sooner
                continue
            if PIECE.fullmatch(entry.name):
                found.append((about.st_mtime, about.st_size, Path(entry.path)))
            elif entry.name.startswith(PART) and time.time() - about.st_mtime > PART_IS_OLD_S:
                Path(entry.path).unlink(missing_ok=True)
        return found
