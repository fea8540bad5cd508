"""`qtool push`: an artifact to the Hub."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("repo_id")
@click.option("--private", is_flag=True, help="If the repository is new, make it private.")
@click.option(
    "--report",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Put what `qtool eval --out FOLDER` measured into the model card first.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def push(folder: Path, repo_id: str, private: bool, report: Path | None, as_json: bool) -> None:
    """Upload an artifact to the Hub, after every file of it was checked as `qtool verify` does.

    REPO_ID is owner/name, or a name of your own. README.md, the model card, may have been edited.
    The token is that of `hf auth login` or HF_TOKEN.

    \b
    Examples:
      qtool push ./Qwen3-0.6B-int4 me/Qwen3-0.6B-int4
      qtool push ./Qwen3-0.6B-int4 me/Qwen3-0.6B-int4 --private
      qtool push ./Qwen3-0.6B-int4 me/Qwen3-0.6B-int4 --report ./Qwen3-0.6B-int4-eval
    """
    from qtool.card_report import add_report
    from qtool.hub import accept_edited_card, open_repository
    from qtool.verification import verify_artifact

    repository = open_repository(repo_id, private=private)
    if report is not None:
        add_report(folder, report)
    if accept_edited_card(folder):
        click.echo("README.md was changed: qtool.json has its new checksum", err=True)
    found = verify_artifact(folder)
    url = repository.push(folder)
    if as_json:
        files = [*found.manifest.files, "qtool.json"]
        click.echo(json.dumps({"repository": repository.name, "url": url, "files": files}))
    else:
        click.echo(url)
