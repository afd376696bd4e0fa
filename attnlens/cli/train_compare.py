"""The command ``train-compare``: train, print the report, say how to go on."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

import attnlens
from attnlens.cli import options
from attnlens.cli.console import command_line, is_quiet, note, write_stdout
from attnlens.errors import UsageError
from attnlens.outputs import Outputs

EXIT_CODES = {"": 0, "time budget": 0, "interrupt": 130, "terminate": 143}


def _from_file(context: typer.Context, path: Path | None) -> Path | None:
    """Take what a JSON file holds for the options that the command line leaves out."""
    if path is not None:
        known = {parameter.name: parameter for parameter in context.command.params if parameter.name not in _NOT_READ}
        context.default_map = options.from_json(path, known)
    return path


_NOT_READ = ("config", "debug", "help")


def train_compare(
    dataset: Annotated[
        str,
        typer.Option(
            help="Train on digits, cifar10, cifar100, hfds/NAME, or a folder or tar of images in [train/|test/]CLASS "
            "folders; on text:FILE, text:FOLDER, text:PATTERN or text:wikitext-103."
        ),
    ] = "digits",
    config: Annotated[  # read by its callback
        Path | None,
        typer.Option(
            is_eager=True,
            callback=_from_file,
            help="Take options from this JSON file, such as the config.json of a run; those on the command line count "
            "more.",
        ),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Read the data set's files from this folder. Default: the cache, or where --dataset says."),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            help="Keep these classes of the images, separated by commas, or even or odd: every second of the sorted "
            "names. Default: all classes."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Start from this pre-trained model, as for inspect; or, from drawn weights or those of --checkpoint, "
            "convmixer-tiny, timm's convmixer_* and convnext*, or gpt-tiny. Default: the ViT shipped with attnlens; "
            "for text gpt-tiny."
        ),
    ] = None,
    checkpoint: options.Checkpoint = None,
    params: options.ParamsFile = None,
    arms: Annotated[
        str | None,
        typer.Option(
            help="Train these arms, separated by commas. Default: default,mimetic,fitted,pretrained,norm-matched,"
            "norm-matched-mimetic, or the model's. ladder stands for every rung from default to pretrained; its rungs, "
            "mimetic-positive, value-skipinit, no-skips-no-norms, e-spa-no-norms, e-spa-no-skips-no-norms and every "
            "initialiser that needs no option are arms too."
        ),
    ] = None,
    contrasts: Annotated[
        str | None,
        typer.Option(
            help="Test these contrasts, ARM:OTHER,..., declared beforehand. Default: each arm against default, fits "
            "against their controls."
        ),
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, max=9999, help="Train so many runs an arm; under 6 is called screening.")
    ] = 6,
    data_seed: Annotated[
        int, typer.Option(min=0, max=options.SEED, help="Count the seeds of order and augmentation from this number.")
    ] = 0,
    init_seed: Annotated[
        int, typer.Option(min=0, max=options.SEED, help="Count the seeds of the initial weights from this number.")
    ] = 0,
    epochs: Annotated[
        int | None,
        typer.Option(min=1, max=1_000_000, help="Train so many epochs; the last one counts. Default: the data set's."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, max=16_777_216, help="Take so many items a step. Default: the data set's.")
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(min=1e-9, max=1e9, help="Set the optimizer's peak learning rate. Default: the data set's."),
    ] = None,
    weight_decay: Annotated[
        float, typer.Option(min=0, max=1000, help="Set the optimizer's weight decay, of matrices alone.")
    ] = 0.05,
    augment: Annotated[
        Literal["none", "shift", "flip-shift", "flip-randaugment"] | None,
        typer.Option(help="Augment images in this way. Default: the data set's."),
    ] = None,
    patch_size: Annotated[
        int | None,
        typer.Option(min=1, max=4_096, help="Cut images into patches of this side. Default: the data set's."),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, max=4_096, help="Resize images to this side. Default: their own.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(min=2, max=65_536, help="Read windows of so many bytes of a text. Default: the data set's."),
    ] = None,
    train_images: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1_000_000_000,
            help="Train on so many images, equal over classes, or windows of a text an epoch. Default: all images, the "
            "preset's windows.",
        ),
    ] = None,
    test_images: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1_000_000_000,
            help="Test on so many images, equal over classes, or windows of a text. Default: all.",
        ),
    ] = None,
    target: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            max=8,
            help="Count the epochs to this accuracy, or bits per byte, fixed beforehand. Default: the data set's.",
        ),
    ] = None,
    eval_every: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1_000_000,
            help="Measure after so many epochs each. Default: some twenty times in all, less often where that would "
            "take more than a tenth of the time.",
        ),
    ] = None,
    tune_lr: Annotated[
        str | None,
        typer.Option(help="Choose each arm's rate from these on a tuning split, e.g. 5e-4,1e-3,2e-3. Default: --lr."),
    ] = None,
    tune_seeds: Annotated[
        int, typer.Option(min=1, max=9999, help="Tune with so many seeds, which are used for nothing else.")
    ] = 2,
    tune_epochs: Annotated[
        int | None,
        typer.Option(min=1, max=1_000_000, help="Tune in runs of so many epochs. Default: as many as the others."),
    ] = None,
    warmup: Annotated[
        float, typer.Option(min=0, max=0.999, help="Warm up linearly over this share of the steps.")
    ] = 0.1,
    optimizer: Annotated[
        str, typer.Option(help="Train with this optimizer, by timm's name, e.g. lamb, muon, sgd, lion.")
    ] = "adamw",
    label_smoothing: Annotated[
        float, typer.Option(min=0, max=0.999, help="Give this share of every label to all classes alike.")
    ] = 0.0,
    mixup: Annotated[float, typer.Option(min=0, max=1000, help="Mix images by Mixup with this alpha; 0: not.")] = 0.0,
    cutmix: Annotated[
        float,
        typer.Option(min=0, max=1000, help="Mix images by CutMix with this alpha; with --mixup too, half the batches."),
    ] = 0.0,
    drop_path: Annotated[
        float,
        typer.Option(min=0, max=0.999, help="Drop residual branches at this rate in the last layer, 0 in the first."),
    ] = 0.0,
    ema: Annotated[
        float,
        typer.Option(min=0, max=0.999999, help="Measure the weights' moving average with this decay; 0: the weights."),
    ] = 0.0,
    embed_dim: Annotated[
        int | None,
        typer.Option(min=4, max=65_536, help="Train a plain ViT, or gpt-tiny, of this width from drawn weights."),
    ] = None,
    depth: Annotated[
        int | None, typer.Option(min=1, max=options.MOST_BLOCKS, help="The same, with so many layers.")
    ] = None,
    num_heads: Annotated[int | None, typer.Option(min=1, max=4_096, help="The same, with so many heads.")] = None,
    freeze_filters: Annotated[
        bool, typer.Option("--freeze-filters", help="Give depthwise filters no update, in any arm.")
    ] = False,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Train on this device.")] = "auto",
    stack: Annotated[
        int | None,
        typer.Option(min=1, max=4_096, help="Train so many models as one. Default: 1 on a CPU, the fastest on CUDA."),
    ] = None,
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile", help="Compile the training step. Default: only on CUDA.", show_default=False
        ),
    ] = None,
    precision: Annotated[
        Literal["auto", "bfloat16", "float16", "float32"],
        typer.Option(
            help="Compute matrix products in this precision. auto: float32 on a CPU, bfloat16 on a GPU that has it, "
            "float16 on others."
        ),
    ] = "auto",
    workers: Annotated[
        int | None, typer.Option(min=1, max=4_096, help="Train so many runs at once on a CPU. Default: one a core.")
    ] = None,
    time_budget: Annotated[float | None, typer.Option(min=0, help="Stop cleanly after so many seconds.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on in --output, with the same options.")] = False,
    save_weights: Annotated[bool, typer.Option("--save-weights", help="Keep every run's final weights.")] = False,
    log: Annotated[
        str | None,
        typer.Option(
            help="Log every epoch while it trains: csv, tensorboard, wandb, or several separated by commas. Default: "
            "the files in --output alone."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write results to this folder. Default: comparisons/<dataset>."),
    ] = None,
    format_: options.FigureFormat = "png",
    dpi: options.Dpi = None,
    style: options.FigureStyle = "default",
    figure_width: options.FigureWidth = None,
    table: options.TableFile = None,
    force: options.Force = False,
    json_: options.Json = False,
) -> None:
    """Train one network from several initialisations under the same conditions, and say what the runs allow to say."""
    command = command_line()
    leads = os.environ.get("RANK", "0") == "0"
    if leads:
        note("loading")  # the first second: torch and others are imported behind it
    options.draw_in(style, figure_width, format_, dpi)
    loggers = None if log is None else _words("--log", log)
    if config is not None:
        from attnlens.training.comparison import default_folder, named_outputs

        named_outputs(Outputs.of(config, force=force), output or default_folder(dataset), loggers or (), table)
    comparison = attnlens.train_compare(
        dataset=dataset,
        data_dir=data_dir,
        classes=_classes(classes),
        model=model,
        checkpoint=checkpoint,
        params=params,
        arms=None if arms is None else _words("--arms", arms),
        contrasts=None if contrasts is None else [_pair(text) for text in _words("--contrasts", contrasts)],
        seeds=seeds,
        data_seed=data_seed,
        init_seed=init_seed,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        weight_decay=weight_decay,
        augment=augment,
        patch_size=patch_size,
        image_size=image_size,
        context=context,
        train_images=train_images,
        test_images=test_images,
        target=target,
        eval_every=eval_every,
        tune_lr=() if tune_lr is None else [_rate(text) for text in _words("--tune-lr", tune_lr)],
        tune_seeds=tune_seeds,
        tune_epochs=tune_epochs,
        warmup=warmup,
        optimizer=optimizer,
        label_smoothing=label_smoothing,
        mixup=mixup,
        cutmix=cutmix,
        drop_path=drop_path,
        ema=ema,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        freeze_filters=freeze_filters,
        device=device,
        stack=stack,
        compiled=compiled,
        precision=precision,
        resume=resume,
        time_budget=time_budget,
        workers=workers,
        save_weights=save_weights,
        log=loggers,
        command=command,
        output=output,
        table=table,
        force=force,
        quiet=is_quiet(),
    )
    if leads:
        write_stdout(json.dumps(comparison.summary.to_json(), indent=1) if json_ else comparison.report)
        note(f"wrote {comparison.folder}")
        if comparison.stopped:
            again = command if resume else f"{command} --resume"
            note(f"stopped ({comparison.stopped}) before all runs were done. To go on: {again}")
    sys.exit(EXIT_CODES[comparison.stopped])


def _words(option: str, text: str) -> list[str]:
    words = options.split_words(text)
    if not words:
        raise UsageError(f"{option} is empty: separate what you name with commas")
    return words


def _classes(text: str | None) -> str | list[str] | None:
    words = [] if text is None else _words("--classes", text)
    return words[0] if len(words) == 1 else words or None


def _pair(text: str) -> tuple[str, str]:
    arm, _, other = text.partition(":")
    if not arm or not other or ":" in other:
        raise UsageError(f"--contrasts {text} is no pair: write ARM:OTHER, as in mimetic:default")
    return arm, other


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise UsageError(f"--tune-lr {text} is no number: write rates like 5e-4,1e-3,2e-3") from error
    if not 0 < value < float("inf"):
        raise UsageError(f"--tune-lr {text} is no learning rate: pass numbers above 0")
    return value
