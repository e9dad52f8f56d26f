"""Commands that use a model: embed, separate, enrol, identify."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.options import (
    ConfigOption,
    SetOption,
    WorkspaceOption,
    configured,
    interruptible,
)
from pipeline.errors import CscError

if TYPE_CHECKING:
    from csc_model.model import CSC
    from jobs.verify import Verifier

HARDLY_DB = -20.0

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="models:/NAME/VERSION, or a folder; without it, the champion."
    ),
]
DeviceOption = Annotated[
    str, typer.Option("--device", help="cpu or cuda; auto takes a GPU where there is one.")
]
GalleryOption = Annotated[
    Path, typer.Option("--gallery", help="Parquet file of the people who are enrolled.")
]
PriorOption = Annotated[
    float,
    typer.Option(min=0.001, max=0.999, help="How probable each of them is before listening."),
]


def verifier_of(
    model: str | None,
    device: str,
    config: str,
    overrides: list[str] | None,
    workspace: str | None,
) -> "Verifier":
    from jobs.verify import champion_of, load_verifier

    resolved = configured(config, overrides, workspace)
    verifier = load_verifier(model or champion_of(resolved), resolved)
    _to_device(verifier.model, device)
    return verifier


def model_of(
    model: str | None,
    device: str,
    config: str,
    overrides: list[str] | None,
    workspace: str | None,
) -> "CSC":
    from jobs.verify import champion_of, load_model

    resolved = configured(config, overrides, workspace)
    loaded = load_model(model or champion_of(resolved), resolved)
    _to_device(loaded, device)
    return loaded


def _to_device(model: "CSC", device: str) -> None:
    from jobs.embedding import on_device

    try:
        model.to(on_device(device))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise CscError(f"--device {device}: {reason}; give cpu, cuda or auto") from error


def embed(
    files: Annotated[list[str], typer.Argument(help="Recordings, of any format and length.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Where to write: .parquet, or .npz for numpy.")
    ] = Path("embeddings.parquet"),
    model: ModelOption = None,
    device: DeviceOption = "auto",
    config: ConfigOption = "demo",
    set_: SetOption = None,
    workspace: WorkspaceOption = None,
) -> None:
    """Write the speaker vectors of recordings: one of each slot, and of the recording as it is.

    Each has the activity of its slot, the probability that somebody speaks there: below 0.5 it is
    nobody's voice. Files that cannot be used are named, and the exit code is then 1.
    """
    from jobs.console import complain, say
    from jobs.using import check_output, embed_files, write_embeddings

    check_output(out)
    with interruptible("stopped; nothing was written"):
        loaded = model_of(model, device, config, set_, workspace)
        table = embed_files(loaded, files)
        write_embeddings(table, out)
    failed = [row for row in table.to_pylist() if row["error"]]
    for row in failed:
        complain(f"error: {row['error']}")
    say(f"{len(files) - len(failed)} file(s), {len(table) - len(failed)} vectors: {out}")
    if failed:
        raise typer.Exit(1)


def separate(
    mixture: Annotated[str, typer.Argument(help="A recording in which people talk at once.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for a WAV file of each voice.")],
    model: ModelOption = None,
    device: DeviceOption = "auto",
    config: ConfigOption = "demo",
    set_: SetOption = None,
    workspace: WorkspaceOption = None,
) -> None:
    """Pull the voices of a recording apart."""
    from jobs.console import say
    from jobs.using import separate_file

    with interruptible("stopped"):
        loaded = model_of(model, device, config, set_, workspace)
        for path, activity in separate_file(loaded, mixture, out):
            say(f"{path}: somebody speaks with probability {activity:.0%}")


def extract(
    mixture: Annotated[str, typer.Argument(help="A recording in which people talk at once.")],
    speaker: Annotated[
        list[str],
        typer.Option("--speaker", help="Clean recording of the voice alone; may be repeated."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write that voice: .wav.")],
    look_ahead_s: Annotated[
        float,
        typer.Option(
            "--look-ahead", min=0.0, max=30.0, help="Seconds heard behind what is written."
        ),
    ] = 4.0,
    chunk_s: Annotated[
        float,
        typer.Option(
            "--chunk", min=0.02, max=60.0, help="Seconds written at once: less costs more to hear."
        ),
    ] = 8.0,
    model: ModelOption = None,
    device: DeviceOption = "auto",
    config: ConfigOption = "demo",
    set_: SetOption = None,
    workspace: WorkspaceOption = None,
) -> None:
    """Take one person's voice out of a recording; silent without them, if that was learned.

    The model needs an extractor: csc train makes one for a model that is there, with
    train.task=extract, model.extractor=film and train.init_from=MODEL.

    The exit code is 3 where the person does not seem to speak in it: where what is left is 20 dB
    below the recording in every 4 s of it. It is written all the same.
    """
    from jobs.console import say
    from jobs.extracting import check_extracts, extract_file, voice_of_files
    from jobs.verify import champion_of

    if out.suffix.lower() != ".wav" or out.is_dir():
        raise CscError(f"--out {out}: give the name of a file that ends in .wav")
    with interruptible("stopped; nothing was written"):
        loaded = model_of(model, device, config, set_, workspace)
        named = model or champion_of(configured(config, set_, workspace))
        check_extracts(loaded, named)
        vector = voice_of_files(loaded, speaker)
        found = extract_file(loaded, mixture, vector, out, chunk_s, look_ahead_s)
    say(
        f"{out}: {found.seconds:.1f} s, {found.level_db:+.1f} dB over the recording, "
        f"{found.most_db:+.1f} dB where most of it is left"
    )
    if found.most_db < HARDLY_DB:
        say("hardly anything is left anywhere: that person does not seem to speak in it")
        raise typer.Exit(3)


def enrol(
    name: Annotated[str, typer.Argument(help="Who it is.")],
    files: Annotated[list[str], typer.Argument(help="Clean recordings of them alone.")],
    gallery: GalleryOption = Path("gallery.parquet"),
    model: ModelOption = None,
    device: DeviceOption = "auto",
    config: ConfigOption = "demo",
    set_: SetOption = None,
    workspace: WorkspaceOption = None,
) -> None:
    """Add somebody to a gallery, or replace them: what csc identify chooses from."""
    from jobs.console import say
    from jobs.using import Gallery

    with interruptible("stopped; nobody was enrolled"):
        verifier = verifier_of(model, device, config, set_, workspace)
        replaced = Gallery(gallery).enrol(verifier, name, files)
    say(f"{name} is {'enrolled anew' if replaced else 'enrolled'} in {gallery}")


def identify(
    mixture: Annotated[str, typer.Argument(help="A recording, of one or of several people.")],
    gallery: GalleryOption = Path("gallery.parquet"),
    prior: PriorOption = 0.5,
    model: ModelOption = None,
    device: DeviceOption = "auto",
    config: ConfigOption = "demo",
    set_: SetOption = None,
    workspace: WorkspaceOption = None,
) -> None:
    """Say who of a gallery is heard in a recording; exit code 3 if nobody is."""
    from rich.markup import escape
    from rich.table import Table

    from jobs.console import show
    from jobs.using import Gallery

    with interruptible("stopped"):
        verifier = verifier_of(model, device, config, set_, workspace)
        matches = Gallery(gallery).identify(verifier, mixture, prior)
    table = Table(title=f"who is heard in {escape(mixture)}", title_justify="left")
    for heading in ("name", "heard", "probability", "score", "where"):
        table.add_column(heading)
    for one in matches:
        heard = "yes" if one.probability >= 0.5 else "no"
        table.add_row(
            escape(one.name), heard, f"{one.probability:.1%}", f"{one.score:.3f}", one.view
        )
    show(table)
    if matches[0].probability < 0.5:
        raise typer.Exit(3)


def onnx(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write the .onnx file.")],
    model: ModelOption = None,
    config: ConfigOption = "demo",
    set_: SetOption = None,
    workspace: WorkspaceOption = None,
) -> None:
    """Write a model as ONNX: waveforms of any number and length in; sources, vectors, activity out.

    For models with frontend=stft and a trunk of tcn, conv_tasnet or blstm.
    """
    from importlib.util import find_spec

    from csc_model.portable import export_onnx
    from jobs.console import say

    if find_spec("onnx") is None:
        raise CscError("the package onnx is missing: pip install 'csc[onnx]'")
    with interruptible("stopped; nothing was written"):
        loaded = model_of(model, "cpu", config, set_, workspace)
        try:
            export_onnx(loaded, out)
        except (ValueError, OSError) as error:
            raise CscError(f"{out}: {error}") from error
    say(f"{out}: {out.stat().st_size / 1e6:.1f} MB")
