"""`paddock plan MODEL`: what would run, why, and whether it fits, from config.json alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from paddock.cli.engine_options import engine_options
from paddock.cli.session import Session
from paddock.config import EngineConfig
from paddock.errors import OptionError

if TYPE_CHECKING:
    from paddock.planning.hardware import Hardware

CONFIG_FILE = "config.json"


@click.command()
@click.argument("model")
@click.option("--gpus", metavar="NxNAME", help="GPUs to plan for, as in 2xH200; none need be here.")
@engine_options
@click.option("--block-size", type=int, metavar="N", help="Tokens a KV page [what the attention backend prefers].")
@click.option("--ignore-config-keys", default="", metavar="KEY,...", help="Keys of config.json to let pass unread.")
@click.option("--explain", is_flag=True, help="Show each choice with its reason and what was rejected.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with the whole plan.")
@click.pass_obj
def command(
    session: Session,
    /,
    model: str,
    gpus: str | None,
    ignore_config_keys: str,
    explain: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Say what would run for MODEL, why, and whether it fits: a folder, its config.json, or a hub id.

    No GPU is needed and no weights are read, but the headers of files at hand. The plan is shown even when it cannot run; then
    the exit code is 1.
    """
    from paddock.checkpoint.source import open_source
    from paddock.planning.issues import require_runnable
    from paddock.planning.resolve import resolve

    given = {name: value for name, value in options.items() if value is not None}
    given["ignore_config_keys"] = tuple(filter(None, ignore_config_keys.split(",")))
    config = EngineConfig.from_options(_folder_of(model), **given, prefer=session.prefer, strict=session.strict)
    hardware = _hardware(config, gpus)
    source = open_source(config.model, revision=config.revision, weights=False)
    plan = resolve(config, session.registry(), hardware, source)
    if as_json:
        from paddock.planning.report import as_report

        click.echo(json.dumps(as_report(plan), indent=2))
    else:
        from paddock.cli.plan_tables import show_plan

        show_plan(plan, explain=explain)
    require_runnable(plan)


def _folder_of(model: str) -> str:
    """Return the folder of a config.json that was named itself, else the name as it is."""
    path = Path(model)
    return str(path.parent) if path.name == CONFIG_FILE and path.is_file() else model


def _hardware(config: EngineConfig, gpus: str | None) -> Hardware:
    """Return what to plan for; torch is imported only to ask a GPU of this machine."""
    from paddock.planning.hardware import gpu_device_files_exist, parse_gpus, this_cpu

    if gpus is not None:
        if config.device == "cpu":
            raise OptionError(f"--device is cpu, but --gpus asks for {gpus}", fix="give one of the two")
        return parse_gpus(gpus)
    if config.device == "cpu" or (config.device == "auto" and not gpu_device_files_exist()):
        return this_cpu()
    from paddock.assemble import detect_hardware

    return detect_hardware(config)
