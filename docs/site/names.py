"""Names in single backticks in a docstring become links to the reference.

A name that says it is fjax's, and that the reference has not, breaks the build: no docstring sends
its reader to what has gone.
"""

import re

import griffe

NAME = re.compile(r"(?<![`\w])`([A-Za-z_][\w.]*)`(?!`)")


class Links(griffe.Extension):
    """Rewrites the docstrings of a package once all of it is read."""

    def on_package(self, *, pkg: griffe.Module, **kwargs) -> None:
        """Each docstring where it stands, for names are those of its module."""
        todo: list[griffe.Object] = [pkg]
        while todo:
            thing = todo.pop()
            todo += [member for member in thing.members.values() if not member.is_alias]
            if thing.docstring:
                thing.docstring.value = NAME.sub(
                    lambda match, scope=thing: _linked(match, scope), thing.docstring.value
                )


def _linked(match: re.Match, scope: griffe.Object) -> str:
    name, package = match[1], scope.package.name
    if name.startswith(f"{package}."):
        return f"[`{name}`][{name}]"
    try:
        target = scope.resolve(name)
    except griffe.NameResolutionError:  # an argument, or a function of another library
        return match[0]
    if not target.startswith(f"{package}."):
        return match[0]
    # Plain code if the reference has it not: a private helper, say.
    return f'<autoref identifier="{target}" optional><code>{name}</code></autoref>'
