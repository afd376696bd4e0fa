"""The commands that start networks: init, verify-init, train-compare."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from attnlens.cli.app import app
from attnlens.cli.options import (
    AugmentChoice,
    CheckpointOption,
    Debug,
    DeviceChoice,
    InitName,
    InitOptions,
    Model,
    ParamsFile,
)


@app.command(short_help="Write weights that start from an initialiser.")
def init(
    model: Annotated[
        str | None,
        typer.Argument(help="timm name or model folder to build; default: the architecture of the shipped ViT."),
    ] = None,
    init: InitName = None,
    params: ParamsFile = None,
    options: InitOptions = None,
    model_args: Annotated[
        list[str] | None, typer.Option("--model-arg", help="Argument for timm, name=value, e.g. num_classes=10.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of every draw, timm's own included.")] = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")] = Path("model.safetensors"),
    json_: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    debug: Debug = False,  # noqa: ARG001  # read from sys.argv in main, listed here for --help
) -> None:
    """Write the weights of a new network whose attention or filters start from an initialiser, mimetic by default."""
    from attnlens.cli.initialising import run_init

    run_init(
        model,
        init=init,
        params=params,
        options=options or [],
        model_args=model_args or [],
        seed=seed,
        output=output,
        as_json=json_,
        command=["attnlens", *sys.argv[1:]],
    )


@app.command(short_help="Check a network against an initialiser.")
def verify_init(
    model: Model = None,
    checkpoint: CheckpointOption = None,
    init: InitName = None,
    params: ParamsFile = None,
    options: InitOptions = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Compare whole matrices with this seed's draw; default: statistics.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print every check as JSON.")] = False,
    debug: Debug = False,  # noqa: ARG001  # read from sys.argv in main, listed here for --help
) -> None:
    """Compare attention or filters with what an initialiser makes, and name known mistakes: exit code 1 if it fails.

    A file written by `attnlens init` says itself what to compare it with.
    """
    from attnlens.cli.initialising import run_verify

    run_verify(model, checkpoint, init=init, params=params, options=options or [], seed=seed, as_json=json_)


@app.command(short_help="Train from several starts and compare them.")
def train_compare(
    dataset: Annotated[
        str,
        typer.Option(
            help="digits, cifar10, cifar100, hfds/NAME, or a folder or tar of images in [train/|test/]CLASS folders; "
            "text:FILE, text:FOLDER, text:PATTERN or text:wikitext-103."
        ),
    ] = "digits",
    data_dir: Annotated[Path | None, typer.Option(help="Folder of torchvision's files or of DATASET.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Pre-trained model, as for inspect, default: the ViT shipped with attnlens; or, from drawn weights, "
            "convmixer-tiny, timm's convmixer_*, and gpt-tiny, the default for text."
        ),
    ] = None,
    checkpoint: CheckpointOption = None,
    params: ParamsFile = None,
    arms: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated; default: default,mimetic,fitted,pretrained,norm-matched,norm-matched-mimetic, or "
            "the model's. Also pretrained-attention, mimetic-positive, value-skipinit, no-skips-no-norms, "
            "e-spa-no-norms, e-spa-no-skips-no-norms, and every initialiser that needs no option."
        ),
    ] = None,
    contrasts: Annotated[
        str | None,
        typer.Option(help="Declared beforehand, ARM:OTHER,...; default: each against default, fits against controls."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=9999, help="Runs an arm; under 6 is called screening.")] = 6,
    data_seed: Annotated[int, typer.Option(min=0, help="First seed of order and augmentation.")] = 0,
    init_seed: Annotated[int, typer.Option(min=0, help="First seed of the initial weights.")] = 0,
    epochs: Annotated[int | None, typer.Option(min=1, help="Fixed horizon; the last epoch counts.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1)] = None,
    lr: Annotated[float | None, typer.Option(min=1e-9, help="Peak learning rate of AdamW.")] = None,
    weight_decay: Annotated[float, typer.Option(min=0)] = 0.05,
    augment: Annotated[AugmentChoice | None, typer.Option(help="Default: the data set's.")] = None,
    patch_size: Annotated[int | None, typer.Option(min=1)] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Resize images to this.")] = None,
    context: Annotated[int | None, typer.Option(min=2, help="Bytes of a window of text.")] = None,
    train_images: Annotated[
        int | None, typer.Option(min=1, help="Train on so many, equal over classes; of a text: windows an epoch.")
    ] = None,
    test_images: Annotated[
        int | None, typer.Option(min=1, help="Test on so many, equal over classes; of a text: windows.")
    ] = None,
    target: Annotated[
        float | None,
        typer.Option(min=0.001, max=8, help="The accuracy, or bits per byte, X of epochs-to-X, fixed beforehand."),
    ] = None,
    eval_every: Annotated[
        int | None, typer.Option(min=1, help="Epochs between measurements; default: some twenty in all.")
    ] = None,
    tune_lr: Annotated[
        str | None, typer.Option(help="Choose each arm's rate from these, e.g. 5e-4,1e-3,2e-3, on a tuning split.")
    ] = None,
    tune_seeds: Annotated[int, typer.Option(min=1, max=9999, help="Seeds of --tune-lr, used for nothing else.")] = 2,
    freeze_filters: Annotated[
        bool, typer.Option("--freeze-filters", help="Depthwise filters get no update, in any arm.")
    ] = False,
    device: Annotated[DeviceChoice, typer.Option()] = DeviceChoice.auto,
    stack: Annotated[
        int | None, typer.Option(min=1, help="Models trained as one; default: 1 on a CPU, the fastest on CUDA.")
    ] = None,
    compiled: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Default: only on CUDA.", show_default=False)
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Runs trained at once on a CPU; default: cores.")] = None,
    time_budget: Annotated[float | None, typer.Option(min=0, help="Stop cleanly after so many seconds.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on in --output, with the same options.")] = False,
    save_weights: Annotated[bool, typer.Option("--save-weights", help="Keep every run's final weights.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder; default: comparisons/<dataset>.", show_default=False)
    ] = None,
    debug: Debug = False,  # noqa: ARG001  # read from sys.argv in main, listed here for --help
) -> None:
    """Train one network from several initialisations under the same conditions, and say what the runs allow to say."""
    from attnlens.cli.training import run_train_compare

    run_train_compare(
        dataset=dataset,
        data_dir=data_dir,
        model=model,
        checkpoint=checkpoint,
        params=params,
        seeds=seeds,
        data_seed=data_seed,
        init_seed=init_seed,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        weight_decay=weight_decay,
        augment=None if augment is None else augment.value,
        patch_size=patch_size,
        image_size=image_size,
        context=context,
        train_images=train_images,
        test_images=test_images,
        target=target,
        eval_every=eval_every,
        tune_seeds=tune_seeds,
        freeze_filters=freeze_filters,
        device=device.value,
        stack=stack,
        compiled=compiled,
        arms=arms,
        contrasts=contrasts,
        tune_lr=tune_lr,
        output=output,
        resume=resume,
        time_budget=time_budget,
        workers=workers,
        save_weights=save_weights,
        command=["attnlens", *sys.argv[1:]],
    )
