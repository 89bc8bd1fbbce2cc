"""`fssdeploy evaluate`: mIoU of a system on a few-shot data set, on PyTorch or of an exported artifact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fssdeploy.cli.common import Boost, BoostSet, Json, boost_options, check_system, emit, progress_lines
from fssdeploy.cli.export import configure, require_export_extra, sources
from fssdeploy.errors import InputError

if TYPE_CHECKING:
    from fssdeploy.data.dataset import Dataset
    from fssdeploy.data.episodes import EpisodeList
    from fssdeploy.evaluation.run import Subject

# What the command calls a runtime -> what fssdeploy.engines does.
RUNTIMES = {"torch": "torch", "onnx": "onnxruntime", "onnxruntime": "onnxruntime", "openvino": "openvino"}
SPACES = ("original", "canvas")

System = Annotated[str, typer.Argument(help="The system to evaluate: fsdino, gfsam, ...")]
DatasetName = Annotated[str, typer.Option(help="shapes-5i, pascal-5i, coco-20i, ...")]
DataDir = Annotated[Path | None, typer.Option(help="Directory of the data set; shapes-5i needs none.")]
Fold = Annotated[str | None, typer.Option(help="A number, or all (the default): every fold and their mean.")]
Shot = Annotated[int | None, typer.Option(help="Support pictures in an episode; default: 1.")]
Episodes = Annotated[int | None, typer.Option(help="Episodes in a fold; default: the published protocol's.")]
Seed = Annotated[int | None, typer.Option(help="Of the episodes and the intervals; default: 0.")]
ListFile = Annotated[
    Path | None, typer.Option("--list", help="The episodes of an earlier run, instead of drawing them.")
]
Space = Annotated[str, typer.Option(help="Measure on the original picture, or on the network's canvas.")]


def evaluate(
    system: System,
    dataset: DatasetName,
    data_dir: DataDir = None,
    fold: Fold = None,
    shot: Shot = None,
    episodes: Episodes = None,
    seed: Seed = None,
    list_file: ListFile = None,
    runtime: Annotated[
        str | None, typer.Option(help="torch, onnx or openvino; default: onnx with --artifact, else torch.")
    ] = None,
    artifact: Annotated[Path | None, typer.Option(help="Directory written by fssdeploy export.")] = None,
    preset: Annotated[str | None, typer.Option(help="tiny (the default), small, base or large; for torch.")] = None,
    weights: Annotated[list[Path] | None, typer.Option(help="Checkpoint; several add up; for torch.")] = None,
    image_size: Annotated[int | None, typer.Option(help="Side of the encoder's canvas, in pixels; for torch.")] = None,
    variant: Annotated[str | None, typer.Option(help="full, or compact (no 4D correlation); for torch.")] = None,
    options: Annotated[list[str] | None, typer.Option("--set", help="An open choice: NAME=VALUE; for torch.")] = None,
    untrained: Annotated[bool, typer.Option(help="Fill what no checkpoint covers from a seed, and say so.")] = False,
    boost: Boost = None,
    boost_set: BoostSet = None,
    space: Space = "original",
    priors: Annotated[bool, typer.Option("--priors", help="Add training-free priors on the same encoder.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Directory to keep it all, and to continue in.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads; default: the cores this process may use.")] = None,
    as_json: Json = False,
) -> None:
    """Evaluate SYSTEM on the episodes of a data set; the same command continues what was broken off in --out."""
    from fssdeploy.data import open_dataset
    from fssdeploy.evaluation.run import Run

    engine = chosen_runtime(runtime, artifact)
    check_space(space)
    boosting = boost_options(boost, boost_set)
    for_torch = {"--preset": preset, "--weights": weights, "--image-size": image_size, "--variant": variant}
    given = [name for name, value in {**for_torch, "--set": options, "--untrained": untrained}.items() if value]
    if artifact and given:
        raise InputError("usage", f"{given[0]} cannot be used with --artifact", "the artifact holds its own network")
    opened = open_dataset(dataset, data_dir)
    lists = chosen_lists(opened, list_file, fold, shot, episodes, seed)
    with progress_lines(as_json) as progress:
        progress("loading")
        if artifact:
            subject = from_artifact(system, artifact, engine, threads)
        else:
            subject = _from_checkpoints(
                system, preset or "tiny", weights or [], untrained, threads, image_size, variant, options or []
            )
        if boosting:
            subject = subject.boosted(boosting)
        run = Run(subject, opened, lists, on_canvas=space == "canvas", priors=priors, out=out, progress=progress)
        report = run.perform()
    emit(report, as_json)


def chosen_runtime(asked: str | None, artifact: Path | None) -> str:
    name = asked or ("onnx" if artifact else "torch")
    if name not in RUNTIMES:
        raise InputError("runtime_unknown", f"there is no runtime '{name}'", "", "Choose torch, onnx or openvino.")
    if (name == "torch") == bool(artifact):
        fix = "Leave out --artifact, or choose onnx or openvino." if artifact else "Pass --artifact DIR."
        raise InputError("usage", f"runtime {name} {'takes no' if artifact else 'needs an'} --artifact", "", fix)
    return RUNTIMES[name]


def check_space(space: str) -> None:
    """InputError unless the metric can be taken there."""
    if space not in SPACES:
        raise InputError("usage", f"there is no space '{space}'", "", f"Choose {' or '.join(SPACES)}.")


def chosen_lists(
    dataset: Dataset,
    list_file: Path | None,
    fold: str | None,
    shot: int | None,
    episodes: int | None,
    seed: int | None,
) -> list[EpisodeList]:
    """The episodes to evaluate: those of a file, or drawn, a list for every fold. InputError as below."""
    if list_file:
        return [_given_list(list_file, dataset, fold, shot, episodes, seed)]
    return _drawn_lists(dataset, fold or "all", 1 if shot is None else shot, episodes, seed or 0)


def _drawn_lists(dataset: Dataset, fold: str, shot: int, episodes: int | None, seed: int) -> list[EpisodeList]:
    from fssdeploy.data.episodes import EpisodeList

    if fold != "all" and not fold.isdecimal():
        raise InputError("fold_unknown", f"there is no fold '{fold}'", "", "Give a number or all.")
    if episodes is not None and episodes < 1:
        raise InputError("usage", f"{episodes} episodes were asked for", "", "Give at least 1.")
    if seed < 0:
        raise InputError("usage", f"seed {seed} was given", "", "Give a whole number from 0.")
    folds = range(dataset.folds) if fold == "all" else [int(fold)]
    for each in folds:
        dataset.check_fold(each)
    return [
        EpisodeList(dataset.name, each, shot, seed, tuple(dataset.test_list(each, shot, episodes, seed)))
        for each in folds
    ]


def _given_list(
    path: Path, dataset: Dataset, fold: str | None, shot: int | None, episodes: int | None, seed: int | None
) -> EpisodeList:
    """The list of a file. InputError if it is of another data set, or options ask for something else than it holds."""
    from fssdeploy.data.episodes import EpisodeList

    found = EpisodeList.load(path)
    said: dict[str, tuple[object, object]] = {
        "data set": (found.dataset, dataset.name),
        "fold": (str(found.fold), fold),
        "shots": (found.shot, shot),
        "episodes": (len(found), episodes),
        "seed": (found.seed, seed),
    }
    for what, (there, asked) in said.items():
        if asked is not None and asked != there:
            raise InputError(
                "list_differs", f"'{path}' does not fit", f"its {what} is {there}, and {asked} was asked for"
            )
    dataset.check_fold(found.fold)
    unknown = {each.class_index for each in found.episodes} - set(dataset.classes(found.fold, "test"))
    if unknown:
        raise InputError("list_differs", f"'{path}' does not fit", f"class {min(unknown)} is not tested in its fold")
    return found


def from_artifact(system: str, path: Path, runtime: str, threads: int | None) -> Subject:
    from fssdeploy.artifact import Artifact, load
    from fssdeploy.evaluation.evaluate import Canvas
    from fssdeploy.evaluation.run import Subject

    opened = Artifact.open(path)
    check_system(opened, system)
    where = opened.manifest["preprocessing"]
    return Subject(
        system,
        opened.name,
        load(path, runtime, threads=threads),
        opened.manifest["digest"],  # covers every file, that of the segmenter too
        Canvas(where["canvas"], where["geometry"]),
        opened.weights_note,
    )


def _from_checkpoints(
    system: str,
    preset: str,
    weights: list[Path],
    untrained: bool,
    threads: int | None,
    image_size: int | None,
    variant: str | None,
    options: list[str],
) -> Subject:
    require_export_extra()
    import torch

    from fssdeploy.artifact import system_class
    from fssdeploy.engines import available_cores, check_threads
    from fssdeploy.engines.torch import TorchEngine
    from fssdeploy.evaluation.evaluate import Canvas
    from fssdeploy.evaluation.run import Subject
    from fssdeploy.systems import get_system
    from fssdeploy.weights import fill
    from fssdeploy.weights.provenance import fingerprint

    check_threads(threads)
    module = get_system(system)
    config = configure(system, preset, image_size=image_size, variant=variant, options=options)
    torch.set_num_threads(threads or available_cores())
    model = module.build(config)
    files, seed = sources(system, preset, config, weights, untrained)
    provenance = fill(system, model, files, seed)
    where, specs = module.preprocessing(config), module.specs(config)
    everything = fingerprint(model, config.to_dict(), ("",))
    engine = TorchEngine(module.reference_stages(model), specs)
    staged = system_class(system)(f"{system}-{preset}", specs, engine, where, everything)
    missing = f"{', '.join(provenance.untrained_groups)}; seed {provenance.seed}"
    note = "" if provenance.status == "trained" else f"UNTRAINED weights ({missing}): the numbers mean nothing."
    return Subject(system, staged.name, staged, everything, Canvas(where["canvas"], where["geometry"]), note)
