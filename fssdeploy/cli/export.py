"""`fssdeploy export`: a system to an artifact of verified graphs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from fssdeploy.cli.common import Json, emit, progress_lines
from fssdeploy.errors import InputError, MachineError

UNTRAINED_SEED = 0


def export(
    system: Annotated[str, typer.Argument(help="The system to export: fsdino or gfsam.")],
    preset: Annotated[str, typer.Option(help="tiny, small, base or large.")] = "tiny",
    weights: Annotated[
        list[Path] | None, typer.Option(help="Checkpoint; several add up (encoder, decoder, ...).")
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="Side of the encoder's canvas, in pixels.")] = None,
    variant: Annotated[str | None, typer.Option(help="full, or compact (no 4D correlation).")] = None,
    options: Annotated[
        list[str] | None, typer.Option("--set", help="An open choice or a network: NAME=VALUE (docs/SYSTEM.md).")
    ] = None,
    components: Annotated[str, typer.Option(help="all, or some stages: encoder,enroll,segment.")] = "all",
    precision: Annotated[
        str, typer.Option(help="fp32, fp16 or bf16 inside the graphs; inputs and outputs stay.")
    ] = "fp32",
    dynamic_batch: Annotated[bool, typer.Option("--dynamic-batch", help="Let the batch size vary.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="The artifact's directory; default: artifacts/SYSTEM-PRESET.")
    ] = None,
    untrained: Annotated[bool, typer.Option(help="Fill what no checkpoint covers from a seed, and say so.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be written.")] = False,
    as_json: Json = False,
) -> None:
    """Export SYSTEM to ONNX and prove that the graphs compute what PyTorch computes."""
    require_export_extra()
    with progress_lines(as_json) as progress:
        progress("loading PyTorch")
        from fssdeploy.export.artifact import ExportRequest, export_artifact, plan
        from fssdeploy.systems import get_system
        from fssdeploy.weights import fill

        module = get_system(system)
        config = configure(system, preset, image_size=image_size, variant=variant, options=options or [])
        request = ExportRequest(module, preset, config, components, precision, dynamic_batch)
        files, seed = sources(system, preset, config, weights or [], untrained)
        if dry_run:
            report = plan(request)
            report.notes += _outlook(seed, bool(files))
        else:
            progress("building the network")
            model = module.build(config)
            provenance = fill(system, model, files, seed)
            target = out or Path("artifacts") / f"{system}-{preset}"
            report = export_artifact(model, provenance, request, target, progress)
    emit(report, as_json)


def sources(
    system: str, preset: str, config: Any, weights: list[Path], untrained: bool
) -> tuple[list[Path], int | None]:
    """Checkpoint files to load, and the seed for what they leave open.

    The tiny preset comes with weights of its own. Where other choices than the preset's change the networks, they do
    not fit; there seeded ones stand in, and every output says so.
    """
    from fssdeploy import shipped
    from fssdeploy.systems import get_system

    if weights or untrained:
        return weights, UNTRAINED_SEED if untrained else None
    if preset not in shipped.PRESETS:
        return [], None
    files = shipped.checkpoints(system, preset)
    module = get_system(system)
    made_for = module.PRESETS[preset]
    networks = getattr(module, "NETWORKS", None)
    if networks is None:
        fits = config == made_for
    else:  # all other choices concern the steps around the networks
        fits = all(getattr(config, name) == getattr(made_for, name) for name in networks)
    return (files, None) if files and fits else ([], UNTRAINED_SEED)


def _outlook(seed: int | None, given: bool) -> list[str]:
    """What a dry run says of the weights, which it does not read."""
    if seed is not None:
        return [f"UNTRAINED weights (seed {seed}) fill what no --weights covers: masks would mean nothing."]
    return [] if given else ["This preset has no weights of its own: the export needs --weights or --untrained."]


def configure(
    system: str,
    preset: str,
    *,
    image_size: int | None = None,
    variant: str | None = None,
    options: list[str] | None = None,
) -> Any:
    """The configuration of a preset with the choices of the command line. InputError for an unknown name or value."""
    from fssdeploy.systems import get_system

    module = get_system(system)
    presets = module.PRESETS
    if preset not in presets:
        raise InputError("preset_unknown", f"there is no preset '{preset}'", "", f"Choose from: {', '.join(presets)}.")
    config = presets[preset]
    networks: dict[str, dict[str, Any]] = getattr(module, "NETWORKS", {})
    changes: dict[str, Any] = {}
    encoder: dict[str, object] = {}
    for name, _, text in [option.partition("=") for option in options or []]:
        if name in networks:
            changes[name] = _network(networks[name], name, text)
        elif name == "registers" and hasattr(config, "encoder"):
            # The released networks with registers resample their position table in another way.
            registers = _typed(config.encoder, name, text)
            encoder = {"registers": registers, "interpolate_antialias": True, "interpolate_offset": 0.0}
        else:
            changes[name] = _typed(config, name, text)
    for name, value in (("image_size", image_size), ("variant", variant)):
        if value is not None:
            changes[name] = _typed(config, name, str(value))
    if encoder:
        changes["encoder"] = dataclasses.replace(changes.get("encoder", config.encoder), **encoder)
    return dataclasses.replace(config, **changes)


def _network(known: dict[str, Any], name: str, text: str) -> object:
    if text not in known:
        raise InputError("option_unknown", f"{name} cannot be '{text}'", "", f"Choose from: {', '.join(known)}.")
    return known[text]


def _typed(config: Any, name: str, text: str) -> object:
    """The text of an option in the type of its field."""
    fields = {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}
    current = fields.get(name)
    if not isinstance(current, bool | int | str):
        settable = [key for key, value in fields.items() if isinstance(value, bool | int | str)]
        settable += ["registers"] * ("encoder" in fields)
        choice = f"Choose from: {', '.join(sorted(settable))}."
        raise InputError("option_unknown", f"there is no option '{name}'", "", choice)
    try:
        if isinstance(current, bool):
            return {"true": True, "false": False}[text.lower()]
        return int(text) if isinstance(current, int) else text
    except (ValueError, KeyError) as error:
        kind = "true or false" if isinstance(current, bool) else "a whole number"
        raise InputError("option_unknown", f"{name} cannot be '{text}'", "", f"It is {kind}.") from error


def require_export_extra() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("torch", "onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise MachineError(
            "package_missing",
            "export needs PyTorch",
            f"not installed: {', '.join(missing)}",
            "Run: pip install 'fssdeploy[export]'",
        )
