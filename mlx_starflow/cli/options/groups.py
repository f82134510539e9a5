"""What the groups of commands have in common: summaries that are not cut, and a hint where a name is misspelt."""

from __future__ import annotations

from difflib import get_close_matches

import click


class Group(click.Group):
    """A group whose help has the whole first sentence of each command's."""

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        found = [(name, self.get_command(context, name)) for name in self.list_commands(context)]
        rows = [(name, each.get_short_help_str(limit=1000)) for name, each in found if each and not each.hidden]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0] if args else ""
        if name and not name.startswith("-") and self.get_command(context, name) is None:
            near = get_close_matches(name, self.list_commands(context), n=3, cutoff=0.6)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            context.fail(f"there is no command {name!r}.{hint}")
        return super().resolve_command(context, args)
