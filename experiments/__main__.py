"""All commands by their names: python -m experiments lexical_constraint --help."""

import shutil
import sys
import textwrap
from importlib import import_module

TOOLS = {
    "compare": (".compare.__main__", "Any of these, over objectives and seeds."),
    "evaluate": (".tools.evaluate", "A saved model against any target."),
    "generate": (".tools.generate", "Samples nearer a target, by rejection."),
    "tabulate": (".tools.tabulate", "Runs as a table."),
    "bench": (".tools.bench", "Time of each phase on this machine."),
    "kl_gradients": (".tools.kl_gradients", "Which estimators of KL have its gradient."),
    "gradient_noise": (".tools.gradient_noise", "How noisy the gradient is, and what helps."),
    "pretrain": (".pretrain.__main__", "Train the built-in model again."),
}
"""Name -> its module, and what it does; tasks are in `experiments.tasks`."""


def main() -> int:
    """Runs the command that is named first; the exit status is the command's."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    module, _ = TOOLS.get(name, (None, ""))
    if module is not None:
        command = import_module(module, __package__).main
    else:
        from .common.build import main_of
        from .tasks import TASKS

        tasks = {task.name: task for task in TASKS}
        if name not in tasks:
            return _list_commands(name, {t.name: t.config.__doc__ or "" for t in TASKS})
        command = main_of(tasks[name])
    sys.argv = [f"{sys.argv[0]} {name}", *sys.argv[2:]]
    return command()


def _list_commands(name: str, tasks: dict[str, str]) -> int:
    """For --help, and for a name that is none."""
    from .common.command import PROGRAM

    helped = name in ("-h", "--help")
    first = {task: " ".join(text.split("\n\n")[0].split()) for task, text in tasks.items()}
    about = first | {tool: text for tool, (_, text) in TOOLS.items()}
    width = shutil.get_terminal_size().columns
    listed = "\n".join(
        textwrap.fill(text, width, initial_indent=f"  {command:20}", subsequent_indent=" " * 22)
        for command, text in about.items()
    )
    unknown = "" if helped else f"There is no command {name!r}.\n\n"
    said = f"{unknown}usage: {PROGRAM} COMMAND [--help]\n\n{listed}"
    print(said, file=sys.stdout if helped else sys.stderr)
    return 0 if helped else 2


if __name__ == "__main__":
    from fjax.runs.endings import leave

    leave(main())
