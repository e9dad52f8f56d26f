"""Commands about datasets: check and show them, bring mixtures in, hand them on."""

from enum import StrEnum
from typing import Annotated

import typer

from jobs.options import (
    ConfigOption,
    SetOption,
    WorkspaceOption,
    configured,
    interruptible,
)

DatasetArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="DATASET",
        help="Id of a dataset in the workspace, the beginning of one, or a path or s3:// address. "
        "Without it, the one that csc build makes of the configuration.",
    ),
]


def check(
    dataset: DatasetArgument = None,
    sample: Annotated[
        int, typer.Option("--sample", min=0, help="Shards to make anew from the store.")
    ] = 3,
    all_: Annotated[bool, typer.Option("--all", help="Make all shards anew.")] = False,
    config: ConfigOption = "demo",
    set_: SetOption = None,
    workspace: WorkspaceOption = None,
) -> None:
    """Prove that a dataset is what its build promised; exit code 1 if it is not.

    Every shard is there, with the bytes that were written; every episode is there once; no speaker
    is in the mixtures of two splits; and shards that are made anew from the store are the same.
    Nothing is written. All findings are printed, each with what to do.
    """
    from jobs.check import check_dataset

    with interruptible("stopped"):
        if not check_dataset(
            dataset, None if all_ else sample, configured(config, set_, workspace)
        ):
            raise typer.Exit(1)


def show(
    dataset: DatasetArgument = None,
    episode: Annotated[
        int | None,
        typer.Argument(metavar="EPISODE", min=0, help="Number of an episode of the split."),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option("--split", help="train, valid or test; an episode is of train if not said."),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option("--out", help="Folder for its files; else csc-show-DATASET-EPISODE, here."),
    ] = None,
    config: ConfigOption = "demo",
    set_: SetOption = None,
    workspace: WorkspaceOption = None,
) -> None:
    """Show a dataset in numbers, or one episode to read, hear and see.

    Without EPISODE: its size and origin, how SIR, SNR and overlap came out against what was asked
    for, and the shares of noise, babble, rooms and the like. With it: who is heard, from which
    recording and how loud, WAV files of mixtures, references and dry lines, and spectrograms.
    """
    from jobs.show import show_dataset, show_episode

    settings = configured(config, set_, workspace)
    with interruptible("stopped"):
        if episode is None:
            if out is not None:
                raise typer.BadParameter("--out is for the files of an episode: give its number")
            show_dataset(dataset, split, settings)
        else:
            show_episode(dataset, episode, split or "train", out, settings)


import_app = typer.Typer(
    no_args_is_help=True, help="Bring in mixtures that other tools describe, as a dataset."
)


class Mode(StrEnum):
    """How voices of different length are brought to one."""

    min = "min"
    max = "max"


class BuiltSplit(StrEnum):
    """The splits that mixtures are made of."""

    train = "train"
    valid = "valid"


class Format(StrEnum):
    """What exports can be read by."""

    librimix = "librimix"
    lhotse = "lhotse"


MetadataOption = Annotated[
    list[str],
    typer.Option(
        "--metadata",
        help="A CSV as LibriMix's repository has it below metadata/, with mixture_ID, "
        "source_1_path, source_1_gain, .. May be repeated.",
    ),
]
NoiseOption = Annotated[
    str | None,
    typer.Option(
        "--noise-root",
        help="WHAM: the folder that has tr/, cv/, tt/. Without it, mixtures have no noise "
        "(mix_clean).",
    ),
]


@import_app.command("librimix")
def import_librimix(
    metadata: MetadataOption,
    root: Annotated[
        str, typer.Option("--root", help="LibriSpeech: the folder that has train-clean-100/, ..")
    ],
    noise_root: NoiseOption = None,
    mode: Annotated[
        Mode, typer.Option(help="Cut to the shortest voice, or pad to the longest.")
    ] = Mode.min,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=0.2,
            max=30,
            help="Cut or pad every mixture to this length, which training needs. Without it, they "
            "stay whole, to be exported.",
        ),
    ] = None,
    split: Annotated[
        BuiltSplit, typer.Option(help="The split that the mixtures are to count as.")
    ] = BuiltSplit.train,
    name: Annotated[
        str, typer.Option("--name", help="Name of the corpus: speakers are NAME/NUMBER.")
    ] = "librispeech",
    workspace: WorkspaceOption = None,
) -> None:
    """Make a dataset of LibriMix metadata: each row becomes a mixture of one condition.

    The mixtures are LibriMix's own, to one step of int16, without its WAV files being made. A
    stopped import goes on with the shard it was at when the same command is run again.

    [bold]csc import librimix --metadata libri2mix_dev-clean.csv --root LibriSpeech --noise-root
    wham_noise[/bold]
    """
    from jobs.imports import bring_in
    from pipeline.exchange.librimix_metadata import LibriMix
    from pipeline.storage import Folder

    mixtures = LibriMix.of(
        metadata,
        Folder.at(root),
        Folder.at(noise_root) if noise_root else None,
        mode=mode.value,
        seconds=seconds,
        split=split.value,
        corpus=name,
    )
    bring_in(mixtures, configured("demo", None, workspace))


def export(
    dataset: Annotated[
        str,
        typer.Argument(help="ID of a dataset of the workspace or its beginning, or its address."),
    ],
    out: Annotated[str, typer.Option("--out", help="An empty folder, or one that this began.")],
    form: Annotated[
        Format,
        typer.Option(
            "--format",
            help="librimix: WAV files and CSV as LibriMix's scripts write them. lhotse: WAV files "
            "with recordings, supervisions and cuts.",
        ),
    ],
    split: Annotated[str, typer.Option(help="train or valid.")] = "train",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only so many mixtures, from the first on.")
    ] = None,
    speakers: Annotated[
        int | None,
        typer.Option(
            min=2, help="librimix: mixtures of so many speakers. Default: the most there are."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Write WAV files anew that are there already.")
    ] = False,
    workspace: WorkspaceOption = None,
) -> None:
    """Write the mixtures of a dataset as WAV files with lists that other tools read.

    Mixtures and references have one scale and add up. What a stopped export wrote is kept when the
    same command is run again. Lists name WAV files by absolute paths.

    [bold]csc export 3f2a --format librimix --out mixtures[/bold]
    """
    from jobs.console import heading, progress, say
    from jobs.datasets import find_dataset
    from pipeline.datasets import read_dataset
    from pipeline.exchange.export import export as write_out
    from pipeline.exchange.formats import Wanted
    from pipeline.storage import Folder

    with interruptible():
        found = read_dataset(find_dataset(dataset, configured("demo", None, workspace)).folder)
        heading("export", f"{found.id} as {form.value}")
        folder = Folder.at(out)
        with progress("mixtures") as advance:
            wanted = Wanted(found, split, speakers)
            made = write_out(wanted, folder, form.value, advance, limit=limit, overwrite=overwrite)
    say(f"  {made.mixtures} mixtures; {made.written} WAV files written, the others were there")
    for reason, count in sorted(made.left_out.items()):
        say(f"  left out: {count} mixtures {reason}, which {form.value} cannot tell")
    for name in made.lists:
        say(f"  {folder.path(name)}")
