"""Decoding in a child process: what kills the child costs one file."""

import fcntl
import os
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from pipeline.audio import AudioError, stream
from pipeline.decoder import Decoder
from pipeline.errors import CscError
from pipeline.schema import SAMPLE_RATE_HZ
from tests.conftest import voice


@pytest.fixture
def decoder() -> Iterator[Decoder]:
    decoder = Decoder(block_timeout_s=1)
    yield decoder
    decoder.close()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    soundfile.write(tmp_path / "a.flac", voice(1, 1, 20.0), SAMPLE_RATE_HZ)
    return tmp_path / "a.flac"


def test_the_child_gives_what_the_parent_would(decoder: Decoder, file: Path) -> None:
    with file.open("rb") as opened:
        expected = list(stream(opened, 1.5, 6.0))
    found = list(decoder.stream(file, 1.5, 6.0))
    assert len(found) == len(expected)
    assert all(np.array_equal(*pair) for pair in zip(found, expected, strict=True))


def test_what_the_child_refuses_has_its_reason(decoder: Decoder, tmp_path: Path) -> None:
    (tmp_path / "no.wav").write_text("no audio")
    for name, reason in (("no.wav", "unreadable"), ("gone.wav", "unreadable")):
        with pytest.raises(AudioError) as caught:
            list(decoder.stream(tmp_path / name))
        assert caught.value.reason == reason


@pytest.mark.parametrize("how", [signal.SIGSEGV, signal.SIGKILL])
def test_a_crash_costs_one_file(decoder: Decoder, file: Path, how: signal.Signals) -> None:
    blocks = decoder.stream(file)
    next(blocks)
    assert decoder._child is not None
    os.kill(decoder._child.pid, how)
    with pytest.raises(AudioError) as caught:
        list(blocks)
    assert caught.value.reason == "crashes_decoder"
    assert sum(map(len, decoder.stream(file))) == 20 * SAMPLE_RATE_HZ


def test_a_crash_in_the_middle_of_a_message_costs_one_file(decoder: Decoder, file: Path) -> None:
    blocks = decoder.stream(file)
    next(blocks)
    assert decoder._child is not None
    waiting = bytearray(4)
    while int.from_bytes(waiting, sys.byteorder) <= 4:  # a block is more than the pipe can hold
        fcntl.ioctl(decoder._answers.fileno(), termios.FIONREAD, waiting)
    decoder._child.kill()
    with pytest.raises(AudioError) as caught:
        list(blocks)
    assert caught.value.reason == "crashes_decoder"
    assert sum(map(len, decoder.stream(file))) == 20 * SAMPLE_RATE_HZ


def test_a_hang_costs_one_file(decoder: Decoder, file: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "endless.wav")  # nobody ever writes to it
    with pytest.raises(AudioError) as caught:
        list(decoder.stream(tmp_path / "endless.wav"))
    assert caught.value.reason == "hangs_decoder"
    assert sum(map(len, decoder.stream(file))) == 20 * SAMPLE_RATE_HZ


def test_a_slow_reader_is_no_hang(decoder: Decoder, file: Path) -> None:
    blocks = decoder.stream(file)
    count = len(next(blocks))
    time.sleep(1.5)
    assert count + sum(map(len, blocks)) == 20 * SAMPLE_RATE_HZ


def test_an_interruption_leaves_no_half_answer(
    decoder: Decoder, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = decoder.stream(file)
    next(blocks)
    with monkeypatch.context() as patch:
        patch.setattr(decoder._answers, "recv_bytes", lambda: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            next(blocks)
    assert sum(map(len, decoder.stream(file, 0.0, 1.0))) == SAMPLE_RATE_HZ


def test_a_child_that_died_while_idle_costs_nothing(decoder: Decoder, file: Path) -> None:
    assert sum(map(len, decoder.stream(file, 0.0, 1.0))) == SAMPLE_RATE_HZ
    assert decoder._child is not None
    decoder._child.kill()
    decoder._child.wait()
    assert sum(map(len, decoder.stream(file, 0.0, 1.0))) == SAMPLE_RATE_HZ


def test_a_child_that_cannot_start_is_no_bad_file(
    decoder: Decoder, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(CscError, match="decoder does not start"):
        next(decoder.stream(file))


def test_modules_of_the_working_folder_are_not_imported(
    decoder: Decoder, file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "soundfile.py").write_text("raise SystemExit(1)")
    monkeypatch.chdir(tmp_path)
    assert sum(map(len, decoder.stream(file, 0.0, 1.0))) == SAMPLE_RATE_HZ


def test_an_answer_left_half_read_is_not_taken_for_the_next(decoder: Decoder, file: Path) -> None:
    blocks = decoder.stream(file)
    next(blocks)
    blocks.close()
    assert sum(map(len, decoder.stream(file, 0.0, 1.0))) == SAMPLE_RATE_HZ


PARENT = """
import sys, time
from pathlib import Path
from pipeline.decoder import Decoder
decoder = Decoder()
blocks = decoder.stream(Path(sys.argv[1]))
next(blocks)
print(decoder._child.pid, flush=True)
time.sleep(60)
"""


def test_the_child_ends_with_its_parent(file: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(file)], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or "Z" in state_of(child):
            return
        time.sleep(0.1)
    pytest.fail("the decoder outlived its parent")


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return "Z"
