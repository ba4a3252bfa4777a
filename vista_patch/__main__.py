"""Adds VISTA's lines to LLaVA source, tells whether they are there, takes them out again.

  check PATH [--json]     tells what was found; exit code 0 patched, 1 stock, 2 other or refused
  apply PATH [--dry-run]  all files or none, or prints the diff; 0 done (or nothing to do), 2 refused
  revert PATH             gives the stock bytes back; 0 done (or nothing to do), 2 refused

PATH is a checkout of LLaVA or of a fork, or an installed copy (site-packages/llava). Where the lines could
not be right nothing is changed, and the reason is told with its file and line.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

from .source import Plan, Refused, plan

CODES = {"patched": 0, "stock": 1, "other": 2}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vista_patch", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True, metavar="check | apply | revert")
    check_args, apply_args, revert_args = (commands.add_parser(name) for name in ("check", "apply", "revert"))
    for command in (check_args, apply_args, revert_args):
        command.add_argument("path", type=Path, metavar="PATH")
    check_args.add_argument("--json", action="store_true", help="tell it as JSON")
    apply_args.add_argument("--dry-run", action="store_true", help="print the diff and change nothing")
    args = parser.parse_args(argv)
    try:
        found = plan(args.path)
        if args.command == "check":
            return check(found, args.json)
        if found.refusal:
            raise Refused(found.refusal)
        if args.command == "apply" and args.dry_run:
            sys.stdout.buffer.write("\n".join(found.diff().values()).encode("utf-8", "surrogateescape"))
            return 0
        change(found, "patched" if args.command == "apply" else "stock")
        return 0
    except (Refused, OSError) as reason:
        print(f"vista_patch {args.command}: refused, tree untouched: {reason}", file=sys.stderr)
        return 2


def change(found: Plan, wanted: str) -> None:
    """To `patched` or `stock`. Each file is judged alone, so a half patched tree can go either way."""
    changes = {}
    for f in found.files.values():
        if f.current not in (f.stock, f.patched):
            raise Refused(f"{f.name}: its VISTA lines were edited, moved or removed; put the file back")
        if f.current != getattr(f, wanted):
            changes[f.path] = f.current, getattr(f, wanted)
    write_all(changes)
    for path in changes:
        print(f"{wanted}: {path}")
    for note in found.skipped:
        print(f"skipped {note}")
    if not changes:
        print(f"{found.root}: already {wanted}")


def write_all(changes: dict[Path, tuple[bytes, bytes]]) -> None:
    """Writes `changes` (file: bytes before and after), all or none. Raises OSError, with all files as before.

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
            os.replace(after, path)
            replaced.append(path)
    except BaseException:
        for path in replaced:
            os.replace(ready[path][0], path)
        raise
    finally:
        for temporary in (t for pair in ready.values() for t in pair):
            Path(temporary).unlink(missing_ok=True)


def check(found: Plan, as_json: bool) -> int:
    lines, files = sum(len(f.inserts) for f in found.touched), len(found.touched)
    verdicts = {
        "stock": f"apply would add {lines} lines to {files} files",
        "patched": f"VISTA's {lines} lines are in {files} files, as apply puts them there",
        "other": "some files have VISTA's lines as apply puts them there, others do not",
    }
    reason = found.refusal or verdicts[found.verdict]
    if as_json:
        told = {"verdict": found.verdict, "reason": reason, "classes": found.classes}
        print(json.dumps(told | {"scripts": found.scripts, "skipped": found.skipped}, indent=2))
        return CODES[found.verdict]
    for c in found.classes:
        print(f"class {c['class']}, forward at {c['forward']}\n  unpacks {', '.join(c['unpacks'])}")
        print(f"  from {c['splice']} at {c['splice_at']}, generation {c['generation']}")
        print(f"  decoder {', '.join(c['decoder'])}")
    for s in found.scripts:
        print(f"train script {s['parser']}\n  {s['arguments']} from {s['arguments_at']}")
        print(f"  trainer at {', '.join(s['trainers'])}")
    for note in found.skipped:
        print(f"skipped {note}")
    print(f"{found.verdict}: {reason}")
    return CODES[found.verdict]


if __name__ == "__main__":
    sys.exit(main())
