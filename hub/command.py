"""`shortv push`: its options, the push, and the list of changes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from shortv_llava.commands import License


@dataclass(frozen=True)
class PushOptions:
    """The options of `shortv push`."""

    folder: Annotated[Path, typer.Argument(help="Package folder.")]
    repo_id: Annotated[str, typer.Argument(help="Repository, `owner/name`; made if there is none.")]
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False
    revision: Annotated[str | None, typer.Option(help="Branch to commit to; made if there is none.")] = None
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False
    message: Annotated[
        str | None, typer.Option(help="First line of the commit message; by default it tells what is pushed.")
    ] = None
    license: License = None
    weights_from: Annotated[
        str | None,
        typer.Option(
            help="Repository to copy the weights from, on the Hub itself: `owner/name` or `owner/name@revision`."
        ),
    ] = None
    tag: Annotated[
        str | None, typer.Option(help="New tag for this version, as `v1.0`, which the card's snippets load.")
    ] = None
    collection: Annotated[
        str | None, typer.Option(help="Collection to put it into, `owner/title-0123456789abcdef`.")
    ] = None
    space: Annotated[
        bool, typer.Option("--space", help="Publish the page of `shortv chat --web` too, as a Space of the same id.")
    ] = False
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would change.")] = False

    def check(self) -> None:
        """Raises a usage error or [`ShortVError`] for wrong options, before anything is loaded."""
        if self.tag and self.create_pr:
            raise typer.BadParameter("a pull request gets none; leave out --create-pr", param_hint="--tag")
        if self.space and (self.revision or self.create_pr):
            raise typer.BadParameter(
                "shows what main holds; leave out --revision and --create-pr", param_hint="--space"
            )
        from shortv_llava.hub.push import check_options

        check_options(self.folder, self.repo_id, **self._where(), dry_run=self.dry_run)

    def _where(self) -> dict[str, str | None]:
        return {name: getattr(self, name) for name in ("revision", "tag", "collection", "weights_from")}


def run(options: PushOptions) -> None:
    """Publish the package, and its Space if asked for."""
    from shortv_llava.hub.push import push, push_space

    pushed = push(
        options.folder,
        options.repo_id,
        **options._where(),
        private=options.private,
        create_pr=options.create_pr,
        message=options.message,
        license=options.license,
        space=options.space,
        dry_run=options.dry_run,
    )
    _report(options.repo_id, pushed, options.dry_run, options.tag, options.collection)
    if options.space:
        given = {name: getattr(options, name) for name in ("private", "message", "collection", "dry_run")}
        pushed = push_space(options.repo_id, **given)
        _report(f"spaces/{options.repo_id}", pushed, options.dry_run, None, options.collection)


def _report(name: str, pushed, dry_run: bool, tag: str | None, collection: str | None) -> None:
    from tqdm import tqdm

    for change in pushed.changes:
        typer.echo(f"{change.action:6} {tqdm.format_sizeof(change.size, 'B'):>8} {change.path}")
    if not pushed.changes:
        typer.echo(f"{name}: nothing has changed, so nothing was committed")
    else:
        typer.echo(f"{name}: nothing was changed, this was a dry run" if dry_run else f"committed: {pushed.url}")
    for done, what in (("tagged", tag), ("in the collection", collection)):
        if what:
            typer.echo(f"{'would be ' * dry_run}{done}: {what}")
