"""Commands that find out what a training should be told, before it is begun."""

from typing import TYPE_CHECKING, Annotated

import typer

from jobs.options import (
    ConfigOption,
    SetOption,
    WorkspaceOption,
    configured,
    interruptible,
)

if TYPE_CHECKING:
    from rich.table import Table

    from jobs.tryouts import Rate, Size

RATES = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]
try_app = typer.Typer(
    no_args_is_help=True, help="Try what a device or a model bears, before a long training."
)


@try_app.command("batch-size")
def batch_size(
    config: ConfigOption = "demo",
    set_: SetOption = None,
    workspace: WorkspaceOption = None,
) -> None:
    """Find the batch from which on a worker gets no faster, or runs out of memory.

    Takes real steps of the configured model on one GPU, or on CPUs where there is none, with noise
    of the configured shape: no dataset is needed. Gradients of other workers need a little more.
    """
    resolved = configured(config, set_, workspace)
    from jobs.cluster import ray_session
    from jobs.console import say, show
    from jobs.tryouts import batch_sizes, best_size

    with interruptible("stopped"), ray_session(resolved):
        sizes = batch_sizes(resolved)
    show(_sizes_table(sizes))
    best = best_size(sizes)
    if best is None:
        say(
            f"not even {sizes[0].episodes} episodes fit: set build.mixing.seconds lower, "
            "model.checkpointing=true, or train.accumulate=2"
        )
        raise typer.Exit(1)
    workers = resolved.train.workers
    say(f"{workers} worker(s) x {best.episodes}: --set train.batch_size={workers * best.episodes}")


@try_app.command("learning-rate")
def learning_rate(
    rate: Annotated[list[float] | None, typer.Option("--rate", help="May be repeated.")] = None,
    steps: Annotated[int, typer.Option("--steps", min=20, help="Of each training.")] = 200,
    width: Annotated[
        float, typer.Option("--width", min=0.01, max=4.0, help="Of the layers, over the model's.")
    ] = 0.25,
    config: ConfigOption = "demo",
    set_: SetOption = None,
    workspace: WorkspaceOption = None,
) -> None:
    """Train a narrow model at several rates, and say how much the rate matters.

    A narrow model shows cheaply which rates diverge and how sensitive a choice of the model or the
    loss is to them; the best rate of a wide model tends to be somewhat lower.
    """
    resolved = configured(config, set_, workspace)
    from jobs.console import progress, say, show
    from jobs.run import Run
    from jobs.tryouts import learning_rates, sensitivity, shrunk
    from pipeline.shards import INDEX

    if any(tried <= 0 for tried in rate or []):
        raise typer.BadParameter("--rate is to be above 0")
    narrow = resolved.model_copy(update={"model": shrunk(resolved.model, width)})
    with interruptible("stopped"), Run(resolved, fresh=False) as run:
        dataset = run.data[0].dataset
        about = dataset.read_json(INDEX)
        _ = run.ray
        with progress("rates tried") as advance:
            rates = learning_rates(
                narrow, dataset, len(about["speakers"]), rate or RATES, steps, advance
            )
    show(_rates_table(rates))
    held = [tried for tried in rates if not tried.diverged]
    if not held:
        say("every rate diverged: try lower ones with --rate")
        raise typer.Exit(1)
    best = min(held, key=lambda tried: tried.loss)
    say(
        f"lowest loss at {best.lr:g}; sensitivity {sensitivity(rates):.3f} (what the loss is above "
        "its best in the mean over the rates)"
    )


def _sizes_table(sizes: list["Size"]) -> "Table":
    from rich.table import Table

    table = Table("episodes of a worker", "audio-s/s", "GPU memory (GB)")
    for size in sizes:
        memory = "" if size.peak_memory_gb is None else f"{size.peak_memory_gb:.1f}"
        speed = f"{size.audio_seconds_per_s:.0f}" if size.fits else "does not fit"
        table.add_row(str(size.episodes), speed, memory)
    return table


def _rates_table(rates: list["Rate"]) -> "Table":
    from rich.table import Table

    table = Table("rate", "loss at first", "loss", "largest attention logit")
    for tried in rates:
        loss = "diverged" if tried.diverged else f"{tried.loss:.3f}"
        logit = f"{tried.attention_logit:.1f}"
        table.add_row(f"{tried.lr:g}", f"{tried.first_loss:.3f}", loss, logit)
    return table
