"""The command line: parse, one library call, print. Heavy imports happen inside the command that needs them.

Exit codes: 0 done or PASS, 1 error, 2 usage, 3 limit exceeded (FAIL), 4 INCONCLUSIVE.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from compiler.cli_bench import bench_command
from compiler.cli_compare import compare_command
from compiler.cli_delta import delta_group
from compiler.cli_distil import distil_command
from compiler.cli_parts import AS_JSON, DELTAS, OUT, Commands, Interrupted
from compiler.cli_parts import finish as _finish
from compiler.cli_parts import mixture as _mixture
from compiler.cli_parts import print_json as _print_json
from compiler.cli_parts import progress as _progress
from compiler.cli_targets import targets_group
from compiler.cli_trust import cache_group, explain_command, rebuild_command, sbom_command, sign_command
from targets.errors import TrimtabError
from targets.telemetry import switch_off

if TYPE_CHECKING:
    from compiler.store import Store

LIMITS = click.option("--limit", "limits", multiple=True, metavar="KEY=VALUE", help="A limit laid over the bundle's own, e.g. tpot_p95_ms=12.")
JUNIT = click.option("--junit", type=click.Path(path_type=Path), help="File for the verdict as JUnit XML.")
MAX_SECONDS = click.option(
    "--max-seconds", type=click.FloatRange(0), default=0.0, metavar="S", help="Cap on measuring a target; what is undecided then is INCONCLUSIVE. 0: none."
)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="trimtab")
def cli() -> None:
    """Compile a base transformer plus its trained deltas into a verified deployment bundle for one named machine.

    \b
    Example:
      trimtab compile examples/01-support-assistant/recipe.yaml --out out
      trimtab run out/support-assistant-here "Spindle 2 is overheating."
    """


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line; a user's mistake is one line on stderr and an exit code, never a traceback. With --json also the error as JSON on stdout.

    SIGTERM ends it as Ctrl-C does: temporary folders are removed and nothing is published.
    """
    switch_off()
    given = sys.argv[1:] if arguments is None else list(arguments)
    with contextlib.suppress(ValueError):  # only the main thread may set it
        signal.signal(signal.SIGTERM, _terminated)
    try:
        # Without standalone mode click returns the code of an Exit; commands themselves return nothing.
        code = cli.main(args=given, prog_name="trimtab", standalone_mode=False) or 0
    except TrimtabError as error:
        code = _tell(error, given)
    except MemoryError as error:
        code = _tell(_system_error("memory", "enough of it", str(error) or "none left", "close other programs, or use a machine with more", "MEMORY"), given)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone: nothing left to say
        code = 1
    except OSError as error:
        reason = error.strerror or type(error).__name__
        code = _tell(_system_error(str(error.filename or "system"), "that it works", reason, "check the path, its permissions and the system's limits"), given)
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt, Interrupted):
        after_typed = "\n" if sys.stderr.isatty() else ""  # a terminal shows ^C
        click.echo(f"{after_typed}trimtab: interrupted; nothing was published", err=True)
        code = 130
    except Terminated:
        click.echo("trimtab: terminated; nothing was published", err=True)
        code = 143
    sys.exit(code)


class Terminated(BaseException):
    """SIGTERM came: raised wherever the program is, so that every `finally` runs."""


def _terminated(_number: int, _frame: object) -> NoReturn:
    raise Terminated


def _system_error(place: str, expected: str, found: str, remedy: str, code: str = "SYSTEM") -> TrimtabError:
    return TrimtabError(place, expected=expected, found=found, remedy=remedy, code=code)


def _tell(error: TrimtabError, given: Sequence[str]) -> int:
    click.echo(f"trimtab: {error}", err=True)
    if "--json" in given:
        _print_json({"error": error.as_dict()})
    return error.exit_code


def _store() -> Store:
    from compiler.store import Store

    return Store.default()


@cli.command("compile")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--target", "targets", multiple=True, help="Only these profiles of the recipe; repeatable.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("out"), show_default=True, help="Folder that receives the bundles.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Lay a value over the recipe, e.g. quantize.scheme=int4-g32.")
@JUNIT
@MAX_SECONDS
@AS_JSON
def compile_command(recipe: Path, targets: tuple[str, ...], out: Path, settings: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Compile RECIPE: merge, quantize, export, validate, package. Publishes a bundle only when its verdict is PASS.

    \b
    Example:
      trimtab compile recipe.yaml --out out --set quantize.scheme=int4-g32
    """
    from compiler.judge import write_junit
    from compiler.pipeline import compile_recipe
    from compiler.recipe import load_recipe
    from compiler.report.summary import print_report, summary_line

    outcomes = compile_recipe(load_recipe(recipe, settings), _store(), out, _progress(as_json), targets, options["max_seconds"])
    if options["junit"]:
        write_junit(outcomes, options["junit"])
    if as_json:
        _print_json([outcome.as_dict() for outcome in outcomes])
    else:
        for outcome in outcomes:
            print_report(outcome.document)
            click.echo(summary_line(outcome.document))
            click.echo(f"bundle  {outcome.bundle}" if outcome.bundle else "bundle  none: a bundle is published only on PASS")
            click.echo(f"report  {outcome.report}")
    raise click.exceptions.Exit(_worst_exit(outcome.exit_code for outcome in outcomes))


def _worst_exit(codes: Any) -> int:
    """FAIL (3) outweighs INCONCLUSIVE (4) outweighs PASS (0)."""
    return max(codes, key=lambda code: {0: 0, 4: 1, 3: 2}[code], default=0)


@cli.command("plan")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Lay a value over the recipe.")
@AS_JSON
def plan_command(recipe: Path, settings: tuple[str, ...], as_json: bool) -> None:
    """Show what compiling RECIPE will run, what is cached, and the predicted size, latency and memory.

    \b
    Example:
      trimtab plan recipe.yaml
    """
    from compiler.foresight import prediction_lines
    from compiler.pipeline import plan_recipe
    from compiler.recipe import load_recipe

    plans = plan_recipe(load_recipe(recipe, settings), _store())
    if as_json:
        _print_json(plans)
        return
    for plan in plans:
        size = "size not known yet" if plan["predicted_size_mb"] is None else f"about {plan['predicted_size_mb']:.1f} MB of weights (predicted)"
        click.echo(f"{plan['name']} for {plan['target']}: {size}")
        for row in plan.get("chosen", {}).get("rows", ()):
            click.echo(f"  {row['name']:36s} {row['scheme']:18s} {row['bytes'] / 1e6:8.3f} MB   KL {row['kl']:.2e}")
        for line in prediction_lines(plan["prediction"]):
            click.echo(f"  {line}")
        for row in plan["steps"]:
            click.echo(f"  {row['stage']:9s} {row['state']:12s} {row['key'][:12]:13s}{_brief(row['params'])}")


def _brief(params: dict[str, Any]) -> str:
    text = ", ".join(f"{key}={json.dumps(value)}" for key, value in params.items() if value not in (None, {}, []))
    return text if len(text) < 100 else text[:97] + "..."


@cli.command("merge")
@click.argument("base")
@DELTAS
@click.option("--combine", default="linear", show_default=True, help="How several deltas are combined: see docs/deltas.md.")
@click.option("--density", type=float, help="Share of each difference that is kept (ties, magnitude_prune, dare_*); default 0.2.")
@click.option("--seed", type=int, help="Seed of dare_*; default 0.")
@click.option("--rank", type=int, help="Rank of svd.")
@click.option("--dtype", type=click.Choice(["F32", "F16", "BF16"]), help="Stored type; default: as in the base.")
@click.option(
    "--rollback",
    is_flag=False,
    flag_value="auto",
    type=click.Choice(["auto", "residual", "reference"]),
    help="Keep what takes the merge back: residuals of the base's words, or a reference to the base; auto: residuals unless larger than the base.",
)
@click.option("--only", multiple=True, metavar="PATTERN", help="Change only modules that match, e.g. 'model.layers.3.*'; repeatable.")
@click.option("--scale", multiple=True, metavar="PATTERN=X", help="Factor of the deltas on modules that match, e.g. '*.mlp.*=0.5'; the last match wins.")
@click.option("--accept-base", metavar="DIGEST", help="Digest of BASE (trimtab inspect shows it): merge although a delta was made from another.")
@OUT
@AS_JSON
def merge_command(base: str, deltas: tuple[str, ...], dtype: str | None, rollback: str | None, out: Path, as_json: bool, **mix: Any) -> None:
    """Merge deltas into BASE and write a checkpoint, block by block.

    \b
    Example:
      trimtab merge models/base --delta adapters/a=0.7 --delta adapters/b=0.3 --out merged
      trimtab merge models/base --delta adapters/a --delta adapters/b --combine ties --density 0.3 --out merged
      trimtab merge models/base --delta adapters/a --only '*.mlp.*' --scale 'model.layers.3.*=0.5' --out merged
    """
    from compiler import delta_tools, model_tools
    from compiler.deltas.combine import combine_named

    only, scale, accepted = mix.pop("only"), mix.pop("scale"), mix.pop("accept_base")
    method = combine_named(mix.pop("combine"), **mix, place="--combine")
    mixture = _mixture(base, deltas, method, only, scale, accepted)
    if rollback:
        _finish(delta_tools.merge_reversibly(mixture, dtype, out, rollback, _progress(as_json)), as_json)
    else:
        _finish(model_tools.merge_files(mixture, dtype, out, _progress(as_json)), as_json)


@cli.command("quantize")
@click.argument("base")
@DELTAS
@click.option("--scheme", required=True, help="intB-gN[-asym][-s16].")
@OUT
@AS_JSON
def quantize_command(base: str, deltas: tuple[str, ...], scheme: str, out: Path, as_json: bool) -> None:
    """Write BASE (with deltas merged) as a float32 checkpoint whose weights went through SCHEME: what the bundle will know.

    \b
    Example:
      trimtab quantize models/base --scheme int4-g32 --out seen-through-int4
    """
    from compiler import model_tools

    _finish(model_tools.quantize_files(_mixture(base, deltas), scheme, out, _progress(as_json)), as_json)


@cli.command("export")
@click.argument("base")
@DELTAS
@click.option("--scheme", default="fp32", show_default=True, help="intB-gN[-asym][-s16], as-is, int8, int8-stored, int8-dynamic[-vnni], fp16, fp32.")
@click.option("--task", help="Encoder task; default: read from the checkpoint.")
@OUT
@AS_JSON
def export_command(base: str, deltas: tuple[str, ...], scheme: str, task: str | None, out: Path, as_json: bool) -> None:
    """Merge, quantize and write BASE as ONNX in one stream, without validation.

    \b
    Example:
      trimtab export models/base --delta adapters/a --scheme int4-g64 --out onnx
    """
    from compiler import model_tools

    _finish(model_tools.export_files(_mixture(base, deltas), scheme, task, out, _progress(as_json)), as_json)


@cli.command("validate")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--target", help="Profile name or file; default: the bundle's own target.")
@LIMITS
@click.option("--scenario", "scenarios", multiple=True, metavar="KEY=VALUE", help="Laid over the bundle's own scenarios, e.g. server.rate_per_s=2.")
@click.option("--report", type=click.Path(path_type=Path), help="Folder for report.html and report.json.")
@JUNIT
@MAX_SECONDS
@AS_JSON
def validate_command(bundle: Path, target: str | None, limits: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Verify BUNDLE, try its behaviours, measure it on this machine, and decide its limits again.

    \b
    Example:
      trimtab validate out/support-assistant-here --limit tpot_p95_ms=12
      trimtab validate out/support-assistant-here --scenario server.rate_per_s=2 --limit server.latency_p95_ms=4000
    """
    from compiler.judge import validate_bundle, write_folder, write_junit
    from compiler.report.summary import print_report, summary_line

    outcome = validate_bundle(bundle, target, limits, _progress(as_json), options["max_seconds"], options["scenarios"])
    if options["report"]:
        write_folder(outcome.document, options["report"])
    if options["junit"]:
        write_junit([outcome], options["junit"])
    if as_json:
        _print_json(outcome.as_dict())
    else:
        print_report(outcome.document)
        click.echo(summary_line(outcome.document))
    raise click.exceptions.Exit(outcome.exit_code)


@cli.command("run")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("prompt")
@click.option("--adapter", metavar="NAME", default="", help="Answer with this unmerged adapter of the bundle; default: the base alone.")
@click.option("--raw", is_flag=True, help="Do not apply the chat template.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=256, show_default=True)
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=click.FloatRange(0, 1), default=1.0, show_default=True)
@click.option("--top-k", type=click.IntRange(0), default=0, show_default=True, help="0 keeps all tokens.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--verify/--no-verify", default=True, show_default=True, help="Compare every byte with the manifest before anything is loaded.")
@click.option("--lookup", is_flag=True, help="Draft tokens from the text so far and check them together, while that is faster. Greedy only.")
@AS_JSON
def run_command(bundle: Path, prompt: str, as_json: bool, **options: Any) -> None:
    """Generate from PROMPT, or encode or classify it, with BUNDLE.

    \b
    Example:
      trimtab run out/support-assistant-here "Coolant is dripping under lathe 3."
      trimtab run out/tenants-here "Coolant is dripping under lathe 3." --adapter support
    """
    from compiler.commands import run_bundle

    run_bundle(bundle, prompt, as_json, options)


@cli.command("inspect")
@click.argument("path")
@AS_JSON
def inspect_command(path: str, as_json: bool) -> None:
    """Say what PATH is: a bundle, a checkpoint or an adapter, and what is in it.

    \b
    Example:
      trimtab inspect out/support-assistant-here
    """
    from compiler.commands import describe
    from compiler.foresight import prediction_lines

    description = describe(path)
    if as_json:
        _print_json(description)
        return
    prediction = description.pop("prediction", {})
    for key, value in description.items():
        click.echo(f"{key:14s} {value if not isinstance(value, (list, dict)) else json.dumps(value, ensure_ascii=False)}")
    for line in prediction_lines(prediction) if prediction else ():
        click.echo(line)


@cli.command("verify")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--no-selftest", is_flag=True, help="Check hashes only.")
@click.option("--public-key", type=click.Path(path_type=Path), help="Also require signatures by this key (PEM). Needs trimtab[sign].")
@click.option("--state", type=click.Path(path_type=Path), help="File of this machine with the highest release seen of each name: refuse a lower one.")
@AS_JSON
def verify_command(bundle: Path, no_selftest: bool, public_key: Path | None, state: Path | None, as_json: bool) -> None:
    """Check every hash of BUNDLE, its signature where a key is given, then let it answer its own self-test.

    \b
    Example:
      trimtab verify out/support-assistant-here
      trimtab verify out/support-assistant-here --public-key release.pub --state /var/lib/releases.json
    """
    from runtimes.bundle import verify_bundle
    from runtimes.selftest import run_selftest

    if state and not public_key:
        raise click.UsageError("--state needs --public-key: an unsigned release number proves nothing")
    files = verify_bundle(bundle)
    release = None
    if public_key:
        from compiler.signing import verify_signed

        release = verify_signed(bundle, public_key)
    canaries = [] if no_selftest else run_selftest(bundle)
    if state and release:
        from compiler.signing import raise_state

        raise_state(state, release, bundle)
    if as_json:
        _print_json({"bundle": str(bundle), "files": len(files), "canaries": len(canaries), "release": release, "verified": True})
    else:
        signed = f", signed release {release['version']}" if release else ""
        click.echo(f"{bundle}: {len(files)} files match their hashes, {len(canaries)} canaries answered as they should{signed}")


for command in (
    bench_command,
    cache_group,
    compare_command,
    delta_group,
    distil_command,
    explain_command,
    rebuild_command,
    sbom_command,
    sign_command,
    targets_group,
):
    cli.add_command(command)
