"""Adds VISTA's lines to the source of LLaVA or a fork, tells whether they are there, takes them out again.

  check PATH [--json]     prints what was found; exit code 0 patched, 1 stock, 2 other or refused
  apply PATH [--dry-run]  adds the lines to all files or to none, or prints the diff; 0 done, 2 refused
  revert PATH             gives back the stock bytes of all files or of none; 0 done, 2 refused

PATH is a checkout of LLaVA or of a fork, or an installed copy (site-packages/llava). A refusal changes
nothing and names the file, the line and the reason.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from .source import Plan, Refused, plan

CODES = {"patched": 0, "stock": 1, "other": 2}


class Torn(Exception):
    """Some files were written and could not be put back."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vista_patch", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True, metavar="check | apply | revert")
    check_args, apply_args, revert_args = (commands.add_parser(name) for name in ("check", "apply", "revert"))
    for command in (check_args, apply_args, revert_args):
        command.add_argument("path", type=Path, metavar="PATH")
    check_args.add_argument("--json", action="store_true", help="print it as JSON")
    apply_args.add_argument("--dry-run", action="store_true", help="print the diff and change nothing")
    args = parser.parse_args(argv)
    try:
        found, code = plan(args.path), 0
        if args.command == "check":
            report, code = check(found, args.json), CODES[found.verdict]
        elif found.refusal:
            raise Refused(found.refusal)
        elif args.command == "apply" and args.dry_run:
            report = "\n".join(found.diff().values())
        else:
            report = change(found, "patched" if args.command == "apply" else "stock") + "\n"
    except Torn as reason:
        print(f"vista_patch {args.command}: {reason}", file=sys.stderr)
        return 2
    except (Refused, OSError) as reason:
        print(f"vista_patch {args.command}: refused, tree untouched: {reason}", file=sys.stderr)
        return 2
    try:
        say(report)
    except OSError as error:
        changed = args.command != "check" and not getattr(args, "dry_run", False)
        done = "done, but " if changed else ""
        print(f"vista_patch {args.command}: {done}the report cannot be printed: {error}", file=sys.stderr)
        return 0 if changed else 2
    return code


def say(report: str) -> None:
    """Prints the report. Names of files go out as the bytes that they are, whatever the encoding of stdout.

    A closed stdout and a reader that has gone away (`| head`) are no errors: nobody wants the rest. Raises OSError
    where the report is lost otherwise, as on a full disk.
    """
    if sys.stdout is None:
        return
    try:
        sys.stdout.buffer.write(report.encode("utf-8", "surrogateescape"))
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes the rest when it ends
        if not isinstance(error, BrokenPipeError):
            raise


def change(found: Plan, wanted: str) -> str:
    """Makes the tree `patched` or `stock` and returns the report. Each file is judged alone, so a half patched tree
    can go either way. Raises Refused or OSError with all files as before, Torn where that failed too."""
    changes = {}
    for f in found.files.values():
        if f.current not in (f.stock, f.patched):
            raise Refused(f"{f.name}: its VISTA lines were edited, moved or removed; put the file back")
        if f.current != getattr(f, wanted):
            changes[f.path] = f.current, getattr(f, wanted)
    ends = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}  # wait until all files are written
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    try:
        write_all(changes)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    report = [f"{wanted}: {path}" for path in changes] + [f"skipped {note}" for note in found.skipped]
    return "\n".join(report if changes else [*report, f"{found.root}: already {wanted}"])


def write_all(changes: dict[Path, tuple[bytes, bytes]]) -> None:
    """Writes `changes` (file: bytes before and after), all or none. Raises as `change` does.

    Both versions are laid beside each file first, so going back needs no more disk. They take its place
    and leave its inode alone: an installed file may share it, by hard link, with a package cache.
    """
    ready: dict[Path, list[str]] = {}
    replaced: list[Path] = []
    try:
        for path, versions in changes.items():
            for data in versions:
                handle, temporary = tempfile.mkstemp(prefix=".vista_patch-", dir=path.parent)
                ready.setdefault(path, []).append(temporary)
                with open(handle, "wb") as stream:
                    stream.write(data)
                shutil.copymode(path, temporary)
        for path, (_, after) in ready.items():
            now = path.read_bytes()
            if now not in changes[path]:
                raise Refused(f"{path}: was changed while this command ran; run it again")
            if now == changes[path][0]:  # or another run of this command was faster
                os.replace(after, path)
                replaced.append(path)
    except BaseException as reason:
        try:
            for path in replaced:
                os.replace(ready[path][0], path)
        except OSError as error:
            raise Torn(f"{reason}; then {path} could not be put back ({error}): run `revert`") from None
        raise
    finally:
        for temporary in (t for pair in ready.values() for t in pair):
            Path(temporary).unlink(missing_ok=True)


def check(found: Plan, as_json: bool) -> str:
    lines, files = sum(len(f.inserts) for f in found.touched), len(found.touched)
    verdicts = {
        "stock": f"apply would add {lines} lines to {files} files",
        "patched": f"VISTA's {lines} lines are in {files} files, as apply puts them there",
        "other": "some files have VISTA's lines as apply puts them there, others do not",
    }
    reason = found.refusal or verdicts[found.verdict]
    if as_json:
        told = {"verdict": found.verdict, "reason": reason, "classes": found.classes}
        return json.dumps(told | {"scripts": found.scripts, "skipped": found.skipped}, indent=2) + "\n"
    report = [f"class {c['class']}, forward at {c['forward']}" for c in found.classes]
    for s in found.scripts:
        report += [f"train script {s['parser']}", f"  {s['arguments']} from {s['arguments_at']}"]
        report += [f"  trainer at {', '.join(s['trainers'])}"]
    report += [f"skipped {note}" for note in found.skipped]
    return "\n".join([*report, f"{found.verdict}: {reason}"]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
