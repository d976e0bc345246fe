"""The command line: `timm-lowrank COMMAND`, which is also `python -m timm_lowrank COMMAND`.

Each command is two functions: one that declares its arguments and one that runs it. What only one command needs is
imported when that command runs, so that `layers` works without the packages that training needs. The scripts in
recipes/ and hub/, which `accelerate launch` and torchrun take, call `main` with their command in front.
"""

from __future__ import annotations

import _thread
import argparse
import atexit
import contextlib
import inspect
import json
import os
import re
import shlex
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from .errors import CheckpointError, EvaluationError, LowRankError, RecipeError, TrainingError
from .files import disk_errors, write_whole
from .text import columns

PROGRAM = "timm-lowrank"
Run = Callable[[argparse.Namespace], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and reports a mistake in one message instead of a traceback.

    Args:
        arguments: the command and its arguments; None takes those of the process.

    Returns:
        The exit status: 0, 1 after an error, 2 for arguments that do not exist or cannot be, 130 after Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        # What a terminal or a log cannot show is no reason to end; Python escapes it on stderr already.
        if hasattr(stream, "reconfigure") and stream.errors != "backslashreplace":
            stream.reconfigure(errors="replace")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    given = argparse.Namespace(arguments=arguments, command=PROGRAM, interrupted="nothing was written")
    try:
        with _interrupts_not_lost(), _all_printed():
            _parser().parse_args(arguments, given)
            given.execute(given)
    except (LowRankError, CheckpointError, EvaluationError, TrainingError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever read the output, such as `head`, has what it wanted
        _drop_output()
        return 1
    except OSError as error:  # of a file or folder that no command thought of, or of the output
        _drop_output()
        print(f"error: {error.filename or given.command}: {error.strerror or error}", file=sys.stderr)
        return 1
    except MemoryError:
        print(f"error: {given.command} needs more memory than there is", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun hands on what the terminal has sent already
        if os.environ.get("RANK", "0") == "0":
            print(f"interrupted: {given.interrupted}", file=sys.stderr)
        return 130
    # While Python takes itself down it has nobody left to tell, and would print a traceback under what is finished.
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return 0


@contextlib.contextmanager
def _all_printed() -> Iterator[None]:
    """Has what a block prints arrive before it ends: when Python takes itself down, nobody is told of an error."""
    try:
        yield
    except SystemExit:  # after --help
        _flush()
        raise
    _flush()


def _flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def _drop_output() -> None:
    """Where nothing can be printed any more, what waits for it is given up; else Python fails at it when it ends."""
    try:
        _flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):  # no file
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def _interrupts_not_lost() -> Iterator[None]:
    """Has Ctrl-C end the block with a KeyboardInterrupt, wherever it falls.

    Out of a destructor or a callback, such as imports and forks leave, Python passes no exception on: it prints a
    traceback, and everything goes on as if nobody had asked; so the interrupt is given once more, a moment later. And a
    library that is interrupted while it is loaded may raise an error of its own instead.
    """
    hook, handler = sys.unraisablehook, signal.getsignal(signal.SIGINT)
    again: list[threading.Thread] = []
    asked = over = False
    inside = False  # the hook, where another interrupt would be lost as well

    def interrupt(number: int, frame: object) -> None:
        nonlocal asked
        asked = True
        if not inside:
            raise KeyboardInterrupt

    def once_more() -> None:
        time.sleep(0.01)
        while inside:
            time.sleep(0.01)
        if not over:
            _thread.interrupt_main()

    def lost(error: sys.UnraisableHookArgs) -> None:
        nonlocal inside
        if error.exc_type is not KeyboardInterrupt:
            hook(error)
            return
        inside = True
        again.append(threading.Thread(target=once_more, daemon=True))
        again[-1].start()
        inside = False

    ours = handler is signal.default_int_handler and threading.current_thread() is threading.main_thread()
    if ours:
        signal.signal(signal.SIGINT, interrupt)
    sys.unraisablehook = lost
    try:
        yield
    except Exception as error:
        if asked:
            raise KeyboardInterrupt from error
        raise
    finally:
        over = True
        for thread in again:
            thread.join()
        sys.unraisablehook = hook
        if ours:
            signal.signal(signal.SIGINT, handler)


def _parser() -> argparse.ArgumentParser:
    from . import __version__

    parser = _Parser(prog=PROGRAM, description="Low-rank representations for image models: train, measure and publish.")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (declare, run, interrupted) in COMMANDS.items():
        text = inspect.cleandoc(declare.__doc__ or "")
        command = commands.add_parser(
            name,
            help=text.splitlines()[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        declare(command)
        command.set_defaults(execute=run, interrupted=interrupted)
    return parser


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, like every other mistake, instead of behind all arguments that there are."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}. {self.prog} --help lists the arguments\n")


def _whole(least: int, below: int) -> Callable[[str], int]:
    def check(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
        if not least <= value < below:
            upper = "" if value < least else f" and less than {below}"
            raise argparse.ArgumentTypeError(f"{text} must be at least {least}{upper}")
        return value

    return check


_count, _seed, _depth = _whole(1, 2**63), _whole(0, 2**63), _whole(0, 2**63)


def _level(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (level := float(text)) <= 255:
            return level
    raise argparse.ArgumentTypeError(f"{text!r} is no number of levels of 255: above 0, at most 255")


def _precision(text: str) -> str:
    """Of an evaluation: no other than float32, with the reason."""
    if text != "float32":
        raise argparse.ArgumentTypeError(
            f"{text!r}: networks are evaluated in float32 alone. Attacks follow the gradient, and in half precision it "
            "rounds to equal logits, zeros and wrong signs: images would withstand by gradient masking, not because "
            "the network is robust. Leave --precision out; a network trained in bf16 is evaluated in float32, too"
        )
    return text


def _keywords(text: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(values := json.loads(text), dict):
            return values
    raise argparse.ArgumentTypeError(f"{text!r} is no JSON object, such as '{{\"img_size\": 32}}'")


def _digest(text: str) -> str:
    if not re.fullmatch("[0-9a-fA-F]{64}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no sha256, which has 64 hexadecimal digits")
    return text.lower()


def _say(*lines: str) -> None:
    print("\n".join(lines), flush=True)


def _command(*words: object, **options: object) -> str:
    """A command line of this program.

    Args:
        words: the command and its positional arguments.
        options: by the names that argparse gives them; None and False are left out, True is a flag.
    """
    given = [PROGRAM, *map(str, words)]
    for name, value in options.items():
        if value is not None and value is not False:
            given += ["--" + name.replace("_", "-"), *([] if value is True else [str(value)])]
    return shlex.join(given)


def _next(*commands: str) -> None:
    """What one would do after this command."""
    _say("", "next:", *(f"  {command}" for command in commands))


# ------------------------------------------------------------------------------------------------------------- train


def _declare_train(parser: argparse.ArgumentParser) -> None:
    """Train a network with low-rank branches, and its plain twin beside it.

      timm-lowrank train                                 # handwritten digits, one to two minutes
      timm-lowrank train cifar10-small --data PATH_OR_NAME
      timm-lowrank train digits --set lowrank.branches=1-LR --set seed=1 --output runs/1-LR
      accelerate launch -m timm_lowrank train cifar10-resnet18-fast

    The output folder gets config.yaml, metrics.csv, checkpoints/, model/ (loadable by timm), plots/spectrum.png,
    spectrum.json and summary.json; twin/ holds the same of the plain network.
    """
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="name of a recipe or a YAML file (default: digits)")
    parser.add_argument("--config", metavar="RECIPE", help="the same as RECIPE")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
        help="change a key of the recipe; dots reach inside: lowrank.reconstruction_weight=0.3",
    )  # fmt: skip
    parser.add_argument(
        "--data", metavar="PATH_OR_NAME",
        help='a folder of parquet files or of images (train/CLASS/NAME.png), a data set on the Hub such as '
        'uoft-cs/cifar10, or "digits"',
    )  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where the run goes (default: runs/RECIPE)")
    parser.add_argument(
        "--resume", choices=["auto"],
        help="continue from the newest complete checkpoint in the output folder, if there is one",
    )  # fmt: skip
    written = parser.format_help
    parser.format_help = lambda: f"{written()}\n{_recipe_help()}"  # type: ignore[method-assign] # read when asked for


def _recipe_help() -> str:
    """The recipes that come with the package and the keys of a recipe, for the end of `train --help`."""
    try:
        from .training.recipe import Recipe, recipe_names
    except ImportError as error:
        return f"The recipes and their keys cannot be shown: {error}\n"
    fields = Recipe.describe_fields()
    width = max(len(field.name) for field in fields)
    names = ", ".join(recipe_names())
    lines = [*textwrap.wrap(f"recipes: {names}", 100, subsequent_indent="  ", break_on_hyphens=False), ""]
    lines.append("keys of a recipe, for --set KEY=VALUE, with type, default and meaning:")
    for field in fields:
        head = f"  {field.name:<{width}}  "
        default = "required" if field.required else json.dumps(field.default)
        text = f"({field.type}; {default}) {field.text}"
        lines += textwrap.wrap(text, 110, initial_indent=head, subsequent_indent=" " * len(head))
    return "\n".join(lines) + "\n"


def _train(given: argparse.Namespace) -> None:
    import torch

    from .training import load_recipe, train

    if given.recipe is not None and given.config is not None:
        raise RecipeError(f"two recipes, {given.recipe} and --config {given.config}: give one")
    source = next((name for name in (given.recipe, given.config) if name is not None), "digits")
    recipe = load_recipe(source, given.overrides, data=given.data)
    if given.output is None and (Path(recipe.name).name != recipe.name or recipe.name in ("", "..")):
        raise RecipeError(f"name={recipe.name!r} is not the name of a folder in runs/: choose the folder with --output")
    output = given.output or Path("runs") / recipe.name
    train(recipe, output, resume=given.resume is not None)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if os.environ.get("RANK", "0") == "0":
        _say("", f"written to {output}: model/ (for timm.create_model), summary.json, plots/spectrum.png")
        _next(_command("evaluate", output))


# ---------------------------------------------------------------------------------------------------------- evaluate


def _declare_evaluate(parser: argparse.ArgumentParser) -> None:
    """Evaluate a trained network beside its plain twin: accuracy, attacks, noise, representations, gradient masking.

      timm-lowrank evaluate runs/digits                     # beside runs/digits/twin, about two minutes
      timm-lowrank evaluate runs/1-LR --against runs/plain --suite paper autoattack
      torchrun --nproc_per_node 4 -m timm_lowrank evaluate RUN --suite autoattack --limit 1000
      timm-lowrank evaluate hf-hub:USER/NAME --data uoft-cs/cifar10
      timm-lowrank evaluate TRAIN_PY_OUTPUT --data IMAGES      # model_best.pth.tar and args.yaml of timm's train.py
      timm-lowrank evaluate TRAINER_MODEL --data IMAGES        # save_model of transformers.Trainer

    Suites: quick (PGD, transfer, noise, spectrum, compression, diagnosis), paper (every attack and measurement of the
    paper), autoattack (AutoAttack standard, L_inf 2/255 and 8/255, L2 0.5). Several may be given together.

    The run folder gets evaluation.json, plots/*.png and report.html, one file to read in any browser. A killed
    evaluation is taken up again by the same command, from evaluation.json.partial.
    """
    parser.add_argument(
        "network", metavar="RUN_OR_MODEL",
        help="a run folder, a folder with config.json and model.safetensors (of timm or transformers), the output of "
        "timm's train.py, hf-hub:USER/NAME, or a timm name",
    )  # fmt: skip
    parser.add_argument(
        "--against", nargs="+", default=[], metavar="RUN_OR_MODEL",
        help="the networks beside it (default: the twin in the run folder, if there is one; none: no other)",
    )  # fmt: skip
    parser.add_argument(
        "--suite", nargs="+", choices=["quick", "paper", "autoattack"], default=["quick"], help="default: quick"
    )
    parser.add_argument("--data", metavar="PATH_OR_NAME", help="where the images are, if not where the run says")
    parser.add_argument("--limit", type=_count, metavar="N", help="test images (default: 500 for quick, else 1000)")
    parser.add_argument(
        "--train-limit", type=_count, metavar="N",
        help="training images that PCA and linear classifiers are fitted on (default: 2000, for paper 5000)",
    )  # fmt: skip
    parser.add_argument(
        "--radii", nargs="+", type=_level, metavar="LEVEL",
        help="radii in levels of 255, of which the smallest that misclassifies 99 %% is sought (default: up to 32)",
    )  # fmt: skip
    parser.add_argument(
        "--random-network", action="store_true",
        help="also the layer cushion of a network of the same architecture that was never trained (suite paper)",
    )  # fmt: skip
    parser.add_argument(
        "--spectrum-limit", type=_count, metavar="N",
        help="test images that spectra and effective ranks are taken of (default: twice the width of the widest layer, "
        "at most 2500, for paper 10000)",
    )  # fmt: skip
    parser.add_argument(
        "--other-labels", metavar="COLUMN",
        help="a column of other labels: how well a linear classifier tells them from the representation",
    )  # fmt: skip
    parser.add_argument(
        "--radius-unit", nargs="+", choices=["pixel", "normalized"], metavar="UNIT",
        help="of the radii of PGD and of the diagnosis: pixel (parts of the pixel range), normalized (of the standard "
        "deviation of each channel), or both (default: pixel; for paper both); AutoAttack knows pixel alone",
    )  # fmt: skip
    parser.add_argument(
        "--table-limit", type=_count, metavar="N",
        help="test images of the paper's Table 1: two units, three step sizes, four radii (default: as --limit)",
    )  # fmt: skip
    parser.add_argument(
        "--precision", type=_precision, default="float32", metavar="float32",
        help="float32 alone: gradients in bfloat16 or float16 mislead attacks",
    )  # fmt: skip
    parser.add_argument("--seed", type=_seed, default=0, help="of everything random (default 0)")
    parser.add_argument("--batch-size", type=_count, default=100, metavar="N", help="images in a batch (default 100)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where the report goes (default: the run folder)")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished evaluation that was another one")


def _evaluate(given: argparse.Namespace) -> None:
    from .environment import require
    from .evaluation.attacks.auto import find_package
    from .report import text_table
    from .suites import Options, evaluate, join_processes

    find_package()  # these every suite needs: their absence is said now, not in the middle
    require("matplotlib.figure", "matplotlib", "evaluate")
    require("sklearn.linear_model", "scikit-learn", "evaluate")
    options = Options(
        network=given.network, against=tuple(given.against), suites=tuple(dict.fromkeys(given.suite)), data=given.data,
        limit=given.limit, train_limit=given.train_limit, other_labels=given.other_labels, seed=given.seed,
        radius_units=None if given.radius_unit is None else tuple(given.radius_unit), table_limit=given.table_limit,
        spectrum_limit=given.spectrum_limit, random_network=given.random_network,
        radii=None if given.radii is None else tuple(level / 255 for level in given.radii),
        chunk=given.batch_size, output=given.output, overwrite=given.overwrite,
        command=shlex.join([PROGRAM, *given.arguments]),
    )  # fmt: skip
    state = join_processes()
    evaluation = evaluate(options, state)
    if evaluation is not None:
        folder = options.folder
        print(text_table(evaluation))
        _say("", f"written to {folder}: report.html, evaluation.json, plots/", f"the page: {folder / 'report.html'}")
        following = _command("push", folder, "USER/NAME", dry_run="preview")
        _next(following if (folder / "model").is_dir() else shlex.join(["open", str(folder / "report.html")]))
    if state.num_processes > 1:
        state.destroy_process_group()


# ----------------------------------------------------------------------------------------------------------- compare


def _declare_compare(parser: argparse.ArgumentParser) -> None:
    """Compare evaluated runs, averaged over seeds: what low rank bought beside the plain twin, and what it cost.

      timm-lowrank compare runs/N-LR-seed* runs/1-LR-seed* runs/2-LR-seed*
      timm-lowrank compare runs/digits --json figures.json

    Reads the evaluation.json of each run, which `evaluate` makes, and prints clean and robust accuracy, accuracy under
    noise, and for each layer the effective rank, the share of the test variance in its leading directions and the test
    accuracy of a max-margin classifier that sees only these. Runs in one folder whose names differ in a trailing
    "-seedN" alone are averaged, with the standard deviation over seeds; networks that were evaluated beside them, such
    as twins, too.
    """
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs that were evaluated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures of each run to this file")


def _compare(given: argparse.Namespace) -> None:
    from .training.compare import compare_runs

    comparison = compare_runs(given.runs)
    print(comparison.table())
    if given.json:
        with disk_errors(f"could not write {given.json}", "Choose another file with --json."):
            write_whole(given.json, json.dumps(comparison.to_dict(), indent=2) + "\n")
        _say("", f"written to {given.json}")


# --------------------------------------------------------------------------------------------------------- reproduce


def _declare_reproduce(parser: argparse.ArgumentParser) -> None:
    """Make a table, figure or claim of the paper beside ours: find the runs, train and measure what is missing.

      timm-lowrank reproduce --list                              # every entry, and which of its runs are there
      timm-lowrank reproduce --table 5 --output smoke            # smoke: a minute on digits; shows that it works
      timm-lowrank reproduce --table 1 --figure 2 --scale fast --data cifar10=PATH_OR_NAME --runs runs
      timm-lowrank reproduce --all --scale fast --existing       # from the runs that are there alone

    Runs lie in RUNS/RECIPE/CONDITION-seedK (N-LR, 1-LR, 2-LR, Bottle-LR, SN, ...), which is where new ones go. Each
    entry leaves NAME.md, NAME.json and NAME.png: our figure, the paper's, the difference, and how it was measured. What
    a file already says of runs that are not here is kept; another scale wants another --output.
    """
    parser.add_argument("--list", action="store_true", help="print what there is, what it needs, and what is there")
    parser.add_argument("--table", type=_count, action="append", default=[], metavar="N", help="of the paper, 1 to 10")
    parser.add_argument(
        "--figure", action="append", default=[], metavar="N", help='of the paper, 2 to 20, or "compactness"'
    )
    parser.add_argument("--claim", action="append", default=[], metavar="NAME", help="of the text; --list names them")
    parser.add_argument("--all", action="store_true", help="everything")
    parser.add_argument(
        "--scale", default="smoke", choices=["smoke", "fast", "paper"],
        help="smoke: minutes on digits; fast: whole data sets, hours on two cores; paper: its own recipes, for GPUs",
    )  # fmt: skip
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="FOLDER", help="of the runs (default: runs)")
    parser.add_argument(
        "--output", type=Path, default=Path("results"), metavar="FOLDER", help="where it is written (default: results)"
    )
    parser.add_argument(
        "--data", action="append", default=[], metavar="NAME=PATH_OR_NAME",
        help="where the images of cifar10, cifar100 or svhn are",
    )  # fmt: skip
    parser.add_argument("--seeds", type=_seed, nargs="+", metavar="K", help="to train (default: those of the scale)")
    parser.add_argument(
        "--recipes", nargs="+", default=[], metavar="NAME", help="of the scale, whose runs alone count (default: all)"
    )
    parser.add_argument("--existing", action="store_true", help="train and measure nothing, show what is there")
    parser.add_argument("--train-only", action="store_true", help="train what is missing, measure nothing")
    parser.add_argument("--images", type=_count, metavar="N", help="test images to evaluate on (default: the scale's)")
    parser.add_argument(
        "--train-images", type=_count, metavar="N", help="to fit linear classifiers and PCA on (default: the scale's)"
    )
    parser.add_argument(
        "--spectrum-limit",
        type=_count,
        metavar="N",
        help="test images for the spectrum (default: as many as the width)",
    )
    parser.add_argument(
        "--jobs", type=_count, default=1, metavar="N",
        help="runs that are trained and measured at a time, in processes that share cores and GPUs (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--fill", type=Path, action="append", default=[], metavar="PAGE",
        help="bring the tables that a Markdown page quotes up to what lies in OUTPUT (docs/reproduce.md)",
    )  # fmt: skip


def _reproduce(given: argparse.Namespace) -> None:
    from .reproduce import Options, fill_page, overview, reproduce

    names = [f"table-{n}" for n in given.table] + [f"figure-{n}" for n in given.figure]
    names += [f"claim-{name}" for name in given.claim]
    if not (names or given.all or given.list or given.fill):
        raise EvaluationError("say what: --table N, --figure N, --claim NAME or --all; --list shows what there is")
    if wrong := [text for text in given.data if "=" not in text]:
        raise EvaluationError(f"--data {wrong[0]}: write it as cifar10=PATH_OR_NAME")
    options = Options(
        names=() if given.all else tuple(dict.fromkeys(names)), scale=given.scale, runs=given.runs, output=given.output,
        data=dict(text.split("=", 1) for text in given.data), existing=given.existing,
        seeds=None if given.seeds is None else tuple(given.seeds), images=given.images, train_images=given.train_images,
        spectrum_limit=given.spectrum_limit, jobs=given.jobs, recipes=tuple(given.recipes),
        measure=not given.train_only,
    )  # fmt: skip
    if given.list:
        print(overview(options))
        return
    if names or given.all:
        reproduce(options)
    for page in given.fill:
        fill_page(page, options.output)
    _next(shlex.join(["open", str(options.output / "README.md")]))


# ------------------------------------------------------------------------------------------------------ push and pull


def _declare_push(parser: argparse.ArgumentParser) -> None:
    """Publish a trained run on the Hugging Face Hub: the network, its branches, its evaluation, and a card.

      timm-lowrank push runs/digits USER/NAME --dry-run preview   # writes what would be pushed, and pushes nothing
      timm-lowrank push runs/digits USER/NAME
      timm-lowrank push --all --user USER                       # every checkpoint of a clone of this project

    RUN is a finished run of `train`, evaluated or not. Everything goes in one commit; pushing again updates it, and
    keeps what was written into the card by hand. Log in with `hf auth login` or set HF_TOKEN.
    """
    parser.add_argument("run", type=Path, nargs="?", metavar="RUN", help="the folder of a finished run")
    parser.add_argument("repo_id", nargs="?", metavar="USER/NAME", help="the repository; is made if there is none")
    parser.add_argument("--all", action="store_true", help="instead of RUN: each of hub/checkpoints, as USER/NAME")
    parser.add_argument("--user", metavar="USER", help="with --all: the user or organisation")
    parser.add_argument(
        "--dry-run", type=Path, metavar="FOLDER",
        help="write exactly what would be pushed to a new folder, and push nothing",
    )  # fmt: skip
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository a private one")
    parser.add_argument("--token", help="instead of HF_TOKEN or the one of `hf auth login`; may be seen by others")
    parser.add_argument("--revision", metavar="BRANCH", help="the branch (default: the main one); is made if needed")
    parser.add_argument(
        "--license", metavar="ID",
        help="of the weights, as the Hub names it (default: the card's, else that of the pretrained weights that the "
        "training began from, else apache-2.0)",
    )  # fmt: skip
    parser.add_argument(
        "--dataset", metavar="NAME", help="the data set's name on the Hub, if the run had a copy of it in a folder"
    )
    parser.add_argument("--keep-card", action="store_true", help="leave the repository's README.md as it is")


def _push(given: argparse.Namespace) -> None:
    from .publish.run import publish_run

    if given.all or given.user:
        _push_all(given)
        return
    if given.run is None or given.repo_id is None:
        raise CheckpointError("give RUN and USER/NAME, or --all and --user USER")
    outcome = publish_run(
        given.run, given.repo_id, token=given.token, private=given.private, revision=given.revision,
        license=given.license, dataset=given.dataset, keep_card=given.keep_card, dry_run=given.dry_run,
    )  # fmt: skip
    _say(*outcome.description())
    if given.dry_run is None:
        _next(_command("pull", given.repo_id, revision=given.revision))
    else:  # the same without a dry run, and without the token, which is nobody's to read
        _next(_command(
            "push", given.run, given.repo_id, private=given.private, revision=given.revision, license=given.license,
            dataset=given.dataset, keep_card=given.keep_card,
        ))  # fmt: skip


def _push_all(given: argparse.Namespace) -> None:
    from .publish.checkpoints import push_all

    single = ("revision", "license", "dataset", "keep_card")
    if alone := ["--" + name.replace("_", "-") for name in single if getattr(given, name)]:
        raise CheckpointError(f"{', '.join(alone)} is for a single run, not for --all")
    if given.run is not None or not (given.all and given.user):
        raise CheckpointError("give --all and --user USER together, without RUN and USER/NAME")
    for outcome in push_all(given.user, token=given.token, private=given.private, dry_run=given.dry_run):
        _say(*outcome.description())
    if given.dry_run is None:
        _say("", "noted in hub/checkpoints.yaml and docs/hub.md: commit both")
    else:
        _next(_command("push", all=True, user=given.user, private=given.private))


def _declare_pull(parser: argparse.ArgumentParser) -> None:
    """Fetch a published checkpoint, verify it, and say what it is and how to load it.

      timm-lowrank pull USER/NAME                  # into huggingface_hub's cache
      timm-lowrank pull USER/NAME my-model         # into a new folder
      timm-lowrank pull cifar10-resnet10-2lr       # a checkpoint of this project by its bare name

    All files but pickles are fetched and compared with the sums that the Hub lists; what is damaged is fetched again.
    """
    parser.add_argument(
        "repo_id", metavar="USER/NAME", help="the repository, or the name of a checkpoint of this project"
    )
    parser.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", help="new or empty (default: the cache)")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit (default: the main branch)")
    parser.add_argument("--token", help="instead of HF_TOKEN or the one of `hf auth login`; may be seen by others")
    parser.add_argument(
        "--sha256", type=_digest, metavar="DIGITS", help="what model.safetensors must have, from someone you trust"
    )


def _pull(given: argparse.Namespace) -> None:
    from .publish import pull

    pulled = pull(given.repo_id, given.folder, revision=given.revision, token=given.token, sha256=given.sha256)
    _say(*pulled.description())


# -------------------------------------------------------------------------------------------------------------- layers


def _declare_layers(parser: argparse.ArgumentParser) -> None:
    """List the layers of a timm network that a branch can sit on, with their widths.

    timm-lowrank layers resnet18 --depth 1
    """
    parser.add_argument("model", metavar="MODEL", help="a timm name, for example resnet18")
    parser.add_argument(
        "--depth", type=_depth, default=2, metavar="N", help="only names of at most N parts (default 2; 0 for all)"
    )
    parser.add_argument(
        "--model-args", type=_keywords, default={}, metavar="JSON",
        help="keywords for timm.create_model, for example '{\"img_size\": 32}'",
    )  # fmt: skip


def _layers(given: argparse.Namespace) -> None:
    from .layers import list_layers

    try:
        listed = list_layers(given.model, **given.model_args)
    except (ValueError, TypeError, RuntimeError) as error:
        raise LowRankError(f"{given.model} with {given.model_args or 'no keywords'}: {error}") from error
    shown = [layer for layer in listed if not given.depth or layer.name.count(".") < given.depth]
    rows = [("layer", "kind", "shape", "view", "width")]
    rows += [(x.name, x.kind, " x ".join(map(str, x.shape)), x.view, f"{x.width:,}") for x in shown]
    print(columns(rows, right=[4]))
    if shown:
        keywords = "".join(f", {name}={value!r}" for name, value in given.model_args.items())
        _next(f'timm_lowrank.wrap("{given.model}", LowRankConfig(branches={{"{shown[-1].name}": RANK}}){keywords})')


# name: (declares the arguments; its docstring is the help), (runs the command), what Ctrl-C leaves behind
COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], Run, str]] = {
    "train": (_declare_train, _train, "continue with the same command and --resume auto"),
    "evaluate": (_declare_evaluate, _evaluate, "the same command continues"),
    "compare": (_declare_compare, _compare, "nothing was written"),
    "reproduce": (_declare_reproduce, _reproduce, "the same command goes on"),
    "push": (
        _declare_push, _push, "what had not been committed is not published; the same command begins again",
    ),
    "pull": (_declare_pull, _pull, "what has arrived is kept; the same command goes on"),
    "layers": (_declare_layers, _layers, "nothing was written"),
}  # fmt: skip
