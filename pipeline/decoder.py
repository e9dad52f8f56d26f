"""Decoding in a process of its own: a file that crashes or hangs a codec costs only itself.

The child reads one JSON request at a time, `[path, start_s, duration_s, first_channel]`, and
answers with blocks of float32 samples and a last word. It kills itself when a block takes too long,
and ends with its parent, whose end of the pipe closes however the parent dies.
"""

import functools
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import BinaryIO

import numpy as np

from pipeline.audio import AudioError, Samples, stream
from pipeline.errors import CscError

BLOCK_TIMEOUT_S = 60
MEMORY_BYTES = 4 << 30  # address space; a header may claim any length
READY, SAMPLES, END = b"r", b"s", b"e"


class Decoder:
    """Decodes local files in a child process, which is started when needed and kept."""

    def __init__(self, block_timeout_s: int = BLOCK_TIMEOUT_S) -> None:
        self._block_timeout_s = block_timeout_s
        self._child: subprocess.Popen[bytes] | None = None

    def stream(
        self,
        path: Path,
        start_s: float = 0.0,
        duration_s: float = 0.0,
        *,
        first_channel: bool = False,
    ) -> Iterator[Samples]:
        """Decode as `audio.stream` does.

        Raises:
            AudioError: as there, and `crashes_decoder` or `hangs_decoder`.
            CscError: no child can be started.
        """
        if self._child is None or self._child.poll() is not None:
            self._start()
        try:
            request = [str(path), start_s, duration_s, first_channel]
            self._requests.send_bytes(json.dumps(request).encode())
            while (message := self._answers.recv_bytes())[:1] == SAMPLES:
                yield np.frombuffer(message, np.float32, offset=4)
        except (EOFError, OSError):  # also in the middle of a message
            raise self._death() from None
        except BaseException:
            self.close()  # the rest of the answer would be taken for the next one's
            raise
        reason, detail = json.loads(message[1:])
        if reason:
            raise AudioError(reason, detail)

    def close(self) -> int:
        """End the child and return its exit status."""
        child, self._child = self._child, None
        if child is None:
            return 0
        self._requests.close()
        self._answers.close()
        child.kill()
        return child.wait()

    def _start(self) -> None:
        self.close()
        theirs, ours = os.pipe()
        self._requests = Connection(ours, readable=False)
        ours, answers = os.pipe()
        self._answers = Connection(ours, writable=False)
        arguments = map(str, (theirs, answers, self._block_timeout_s))
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", "pipeline.decoder", *arguments],
            pass_fds=(theirs, answers),
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,  # codecs chatter
            start_new_session=True,  # Ctrl-C is for the parent
        )
        os.close(theirs)
        os.close(answers)
        try:
            self._answers.recv_bytes()
        except (EOFError, OSError):
            status = self.close()
            raise CscError(
                f"the decoder does not start ({sys.executable} ended with status {status}): try "
                "`python -m pipeline.decoder 0 1 1`, which says why"
            ) from None

    def _death(self) -> AudioError:
        assert self._child is not None
        status = self._child.wait()
        self.close()
        if status == -signal.SIGALRM:
            return AudioError("hangs_decoder", f"no block in {self._block_timeout_s} s")
        return AudioError("crashes_decoder", f"the decoder ended with status {status}")


@functools.cache
def own_decoder() -> Decoder:
    """Return the one decoder of this process."""
    return Decoder()


def main(requests_fd: int, answers_fd: int, block_timeout_s: int) -> None:
    """Answer requests until the parent is gone."""
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    requests = Connection(requests_fd, writable=False)
    answers = Connection(answers_fd, readable=False)
    answers.send_bytes(READY)
    try:
        while True:
            path, start_s, duration_s, first_channel = json.loads(requests.recv_bytes())
            decode = functools.partial(
                stream, start_s=start_s, duration_s=duration_s, first_channel=first_channel
            )
            last_word = _answer(answers, path, decode, block_timeout_s)
            answers.send_bytes(END + json.dumps(last_word).encode())
    except (EOFError, BrokenPipeError):
        pass


def _answer(
    answers: Connection,
    path: str,
    decode: Callable[[BinaryIO], Iterator[Samples]],
    block_timeout_s: int,
) -> tuple[str, str]:
    signal.alarm(block_timeout_s)  # its default action ends the process, in C code too
    try:
        with Path(path).open("rb") as file:
            for block in decode(file):
                signal.alarm(0)  # waiting for the parent is no hang
                # padded to four bytes, so that the parent can look at the samples in place
                answers.send_bytes(SAMPLES * 4 + block.tobytes())
                signal.alarm(block_timeout_s)
    except AudioError as error:
        return error.reason, error.detail
    except OSError as error:
        return "unreadable", str(error.strerror)
    else:
        return "", ""
    finally:
        signal.alarm(0)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
