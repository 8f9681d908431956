"""`ecg-jax COMMAND`: thin dispatch and friendly errors."""

import importlib
import logging
import os
import sys

import ecg_jax
from ecg_jax import cpu
from ecg_jax.errors import Stopped, UserError
from ecg_jax.training.launchers import refuse_several

COMMANDS = {
    "quickstart": "prepare, pretrain and probe on the PTB-XL sample that ships with the package",
    "prepare": "raw recordings -> store",
    "synthesize": "a store of synthetic ECG with known labels, of any size",
    "verify": "stores -> every record against its checksum",
    "show-masks": "config -> a picture of what its objective hides and predicts",
    "pretrain": "store + config -> run with checkpoints",
    "cluster": "store + features -> offline targets, one label for each token",
    "tasks": "the labelled tasks there are, and what of each a store holds",
    "audit": "stores -> recordings and patients that occur twice, across folds and stores",
    "probe": "checkpoint + labelled store -> metrics with confidence intervals",
    "label-efficiency": "checkpoints + labelled store -> error over the number of labels",
    "robustness": "probe -> its scores with fewer leads, noise, other rates, shorter recordings",
    "report": "probes -> one page with tables, pictures and example ECGs",
    "sweep": "many runs, each pretrained and probed -> one table with intervals",
    "scaling": "finished runs -> losses and errors over recordings and compute, with fitted power laws",
    "cka": "checkpoints + store -> how alike the features of layers and models are",
    "embed": "checkpoint + recordings -> one embedding for each",
    "efficiency": "what backbones and objectives cost on this device, beside its roofline",
    "capacity": "windows per second -> what disks and network must deliver, and hours of each rung",
    "import-checkpoint": "checkpoint of the reference implementation -> run, to be probed and embedded with",
}

#: Commands that may run as several processes at once: parts of one run, or shards of one store under their own locks.
IN_SEVERAL = ("pretrain", "prepare")

_USAGE = f"""\
usage: ecg-jax COMMAND [options]

ecg_jax {ecg_jax.__version__}: pretrain, scale and probe ECG foundation models in JAX

{chr(10).join(f"  {name:<18}{text}" for name, text in COMMANDS.items())}

`ecg-jax COMMAND --help` explains a command. Start with `ecg-jax quickstart`.
"""


def main(argv: list[str]) -> int:
    """Runs one command.

    Args:
        argv: arguments after the program's name.

    Returns:
        The exit code: 0 on success, 2 for a mistake of the user's (one sentence on stderr), 130 when interrupted.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE, end="")
        return 0 if argv else 2
    if argv[0] == "--version":
        print(ecg_jax.__version__)
        return 0
    for word in argv:
        try:
            word.encode()
        except UnicodeEncodeError:
            print(
                f"ecg-jax: error: the argument {word!r} is not UTF-8; rename what it names", file=sys.stderr
            )
            return 2
    command, *rest = argv
    if command not in COMMANDS:
        print(f"ecg-jax: error: unknown command {command!r}; known: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        if command not in IN_SEVERAL:
            refuse_several(command)
        return importlib.import_module(f"ecg_jax.{command.replace('-', '_')}").main(rest)
    except UserError as error:
        print(f"ecg-jax {command}: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        # A full disk, a folder that may not be read: what no command has words of its own for.
        if error.filename is None or error.strerror is None:
            raise
        print(f"ecg-jax {command}: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"ecg-jax {command}: {stopped}")
        return stopped.exit_code
    except KeyboardInterrupt:
        print(f"ecg-jax {command}: interrupted", file=sys.stderr)
        return 130


def entry_point() -> None:
    """What the `ecg-jax` script calls."""
    quieten()
    cpu.tune()
    cpu.keep_compiled_programs()
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has seen enough, as in `ecg-jax ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    if code == 130:
        # Library threads that are cut off in the middle of work crash an orderly exit of the interpreter.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def quieten() -> None:
    """Keeps what libraries say about a failed checkpoint write off the terminal: hundreds of lines from threads and
    event loops that are already gone. The failure itself is raised to the caller and told in one sentence.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    from_python = sys.unraisablehook

    def hook(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            from_python(unraisable)

    sys.unraisablehook = hook


if __name__ == "__main__":
    entry_point()
