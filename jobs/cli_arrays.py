"""The command for recordings of several microphones: beamform."""

from pathlib import Path
from typing import Annotated

import typer

from jobs.cli_using import DeviceOption, ModelOption, model_of, verifier_of
from jobs.options import ConfigOption, SetOption, WorkspaceOption, interruptible
from pipeline.errors import CscError

HEARD = 0.5


def beamform(
    array: Annotated[
        str,
        typer.Argument(help="A recording with a channel for each microphone, all in step."),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Folder; with --speaker, also the name of a .wav."),
    ],
    speaker: Annotated[
        list[str] | None,
        typer.Option(
            "--speaker",
            help="Clean recording of one person: only their voice is written. May be repeated, "
            "for more of the same person.",
        ),
    ] = None,
    reference: Annotated[
        str,
        typer.Option(
            "--reference",
            help="Microphone that voices come out of as they reach it, from 1; auto is the one "
            "with the best estimated SNR.",
        ),
    ] = "auto",
    post_mask_floor_db: Annotated[
        float | None,
        typer.Option(
            "--post-mask-floor-db",
            max=0.0,
            help="Weigh the beams by the masks too, by this gain at least: -6 for a little, "
            "-20 for a lot. Others get quieter, the voice less natural.",
        ),
    ] = None,
    refine: Annotated[
        bool,
        typer.Option(help="Have the directions that sounds come from mend the model's masks."),
    ] = True,
    model: ModelOption = None,
    device: DeviceOption = "auto",
    config: ConfigOption = "demo",
    set_: SetOption = None,
    workspace: WorkspaceOption = None,
) -> None:
    """Point an array of microphones at each voice of a recording, or at one person's.

    The model hears one microphone and says when and at what frequency each voice speaks; where
    sounds come from mends what it confuses, and with that an MVDR beamformer listens through all
    microphones. Where they are need not be known, and no model is trained for an array: any one
    does, also a folder with a model alone. People may move: beams are made anew every 8 s.

    With --speaker the model is to be one that was evaluated. The exit code is then 3 where the
    person is likelier not to be heard at all; what is nearest to them is written all the same.

    [bold]csc beamform meeting.wav -o voices[/bold]

    [bold]csc beamform meeting.wav --speaker ann.wav -o ann-in-meeting.wav[/bold]
    """
    from jobs.arrays import Asked, write_all, write_one
    from jobs.console import say
    from jobs.extracting import voice_of_files

    asked = Asked(_microphone(reference), post_mask_floor_db, refine)
    is_file = out.suffix.lower() == ".wav"
    if is_file and not speaker:
        raise CscError(f"{out}: several voices need a folder; or name one person with --speaker")
    with interruptible("stopped; nothing was written"):
        if not speaker:
            heard_by = model_of(model, device, config, set_, workspace)
            for path, activity in write_all(heard_by, array, out, asked):
                say(f"{path}: somebody speaks with probability {activity:.0%}")
            return
        verifier = verifier_of(model, device, config, set_, workspace)
        whose = voice_of_files(verifier.model, speaker)
        to = out if is_file else out / f"{Path(array).stem}-speaker.wav"
        found = write_one(verifier, array, whose, to, asked)
    say(f"{to}: slot {found.slot + 1}, with probability {found.probability:.0%} theirs")
    if found.probability < HEARD:
        say("it is likelier somebody else's: that person does not seem to speak in it")
        raise typer.Exit(3)


def _microphone(reference: str) -> int | None:
    if reference == "auto":
        return None
    if not reference.isdecimal() or int(reference) < 1:
        raise typer.BadParameter(f"--reference {reference}: give auto, or a microphone from 1 on")
    return int(reference) - 1
