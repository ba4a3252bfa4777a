"""Puts VISTA's lines into the source of LLaVA or a fork: whole lines are added, nothing is removed or moved.

    import vista_patch                            after the imports at the top of each file with one of these
    @vista_patch.vista_forward                    directly above `def forward`, where that calls the splice
    @vista_patch.vista_arguments                  directly above `@dataclass` of the model arguments
    vista_patch.vista_setup(trainer, model_args)  directly after the trainer is made, with the script's names

"The splice" is `prepare_inputs_labels_for_multimodal`, or a name that begins so: the method that puts image
features between the text embeddings (upstream: llava/model/llava_arch.py). Its name finds the class to decorate,
and that is all: what the splice takes and returns, and what the decoder does with it, is seen at the first
training step, where `vista_forward` adds the term or refuses. What no step can tell is refused or noted here: no
class to decorate, no trainer to set up, a trainer that drops the model's loss, a script that trains another class.

`plan` alone decides. It looks at the tree without our lines, so a file is stock if it equals what `plan`
started from, patched if it equals what `plan` made of it, and anything else was edited by hand.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SPLICE = "prepare_inputs_labels_for_multimodal"
LARGEST = 2 << 20  # bytes of a source file; no model file that we know has 0.3 MiB

IMPORT = "import vista_patch"
FORWARD = "@vista_patch.vista_forward"
ARGUMENTS = "@vista_patch.vista_arguments"
SETUP = "vista_patch.vista_setup"
BY_HAND = "set model.config.vista = {'metric': 'l2'} where the model is made"
OUR_LINE = re.compile(
    rb"[ \t]*(import vista_patch|@vista_patch\.vista_(forward|arguments)"
    rb"|vista_patch\.vista_setup\([^\s,()]+, [^\s,()]+\))[\r\n]+"
)
REASONS = {
    FORWARD: """\
The spliced batch and the decoder's output meet in the model's forward alone, so the term is added there.
With VISTA off the decorator calls the stock forward and does nothing else.
""",
    ARGUMENTS: """\
The stock parser makes its flags from the fields of dataclasses, so --vista and its settings are fields too.
""",
    SETUP: """\
The settings belong in model.config, which checkpoints keep, and the term's parts in the trainer's log:
both can be reached once the trainer is made.
""",
}


Load = Callable[..., "list[File]"]  # of `plan`: reads the files that hold one of the words


class Refused(Exception):
    """The tree cannot be patched; the message says where and why."""


class File:
    """A source file as it lies on disk (`current`), without our lines (`stock`) and with them (`patched`).

    Python's own parser is enough, and twenty times as fast as one that keeps comments: only whole lines are
    added, so all that is needed of a statement is the lines that it stands on. Raises Refused.
    """

    def __init__(self, path: Path, name: str, data: bytes):
        self.path, self.name, self.current = path, name, data
        self.lines, self.numbers = without_our_lines(data)
        self.stock = b"".join(self.lines)
        self.inserts: set[tuple[int, bool, str, bytes]] = set()  # index, is no import, hook, its line
        # Calls, returns and assignments, each with the function that it stands in (None: the module).
        self.classes: dict[str, ast.ClassDef] = {}
        self.methods: list[tuple[ast.ClassDef, ast.FunctionDef]] = []
        self.calls: list[tuple[ast.FunctionDef | None, ast.Call]] = []
        self.returns: list[tuple[ast.FunctionDef | None, ast.Return]] = []
        self.assigns: list[tuple[ast.FunctionDef | None, ast.Assign]] = []
        try:
            self.tree = parse(self.stock)
            self.outline(self.tree, None)
        except (SyntaxError, ValueError) as error:
            at = getattr(error, "lineno", None)
            line = self.numbers[at - 1] if at else 1
            raise Refused(f"{name}:{line}: this Python cannot read it: {getattr(error, 'msg', error)}") from None
        except (RecursionError, MemoryError):
            raise Refused(f"{name}:1: an expression here is nested too deeply for this Python to read") from None

    def outline(self, parent: ast.AST, function: ast.FunctionDef | None) -> None:
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, ast.FunctionDef):
                if isinstance(parent, ast.ClassDef):
                    self.methods.append((parent, node))
                self.outline(node, node)
                continue
            if isinstance(node, ast.ClassDef):
                self.classes[node.name] = node
            elif isinstance(node, ast.Call):
                self.calls.append((function, node))
            elif isinstance(node, ast.Return):
                self.returns.append((function, node))
            elif isinstance(node, ast.Assign):
                self.assigns.append((function, node))
            self.outline(node, function)

    def at(self, node: ast.stmt | ast.expr) -> str:
        return f"{self.name}:{self.numbers[node.lineno - 1]}"

    def alone(self, node: ast.stmt) -> bool:
        """Whether nothing else but a comment stands on the lines of the statement."""
        before = self.lines[node.lineno - 1][: node.col_offset]
        after = self.lines[end_line(node) - 1][node.end_col_offset :]
        return not before.strip(b" \t\f\xef\xbb\xbf") and bool(re.fullmatch(rb"[ \t\f]*;?[ \t\f]*(#.*)?[\r\n]*", after))

    def insert(self, hook: str, first: int, after: int | None = None) -> None:
        """Plans `hook` above line `first`, or after line `after`: in the indentation of `first`, with its newline."""
        above = self.lines[(after or first) - 1]
        newline = above[len(above.rstrip(b"\r\n")) :]
        if not newline:
            raise Refused(f"{self.name}:{first}: the file ends here without a newline, so no line can be added")
        line = self.lines[first - 1]
        indent = line[: len(line) - len(line.lstrip(b" \t"))]
        index = first - 1 if after is None else after
        self.inserts.add((index, hook != IMPORT, hook, indent + hook.encode() + newline))

    @property
    def patched(self) -> bytes:
        lines = list(self.lines)
        for index, _, _, line in sorted(self.inserts, reverse=True):
            lines.insert(index, line)
        return b"".join(lines)


@dataclass
class Plan:
    """What was found in a tree and what `apply` makes of it. `refusal` is None where it may be applied."""

    root: Path
    files: dict[str, File] = field(default_factory=dict)
    classes: list[dict[str, str]] = field(default_factory=list)
    scripts: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    refusal: str | None = None

    @property
    def touched(self) -> list[File]:
        return [f for f in self.files.values() if f.inserts]

    @property
    def verdict(self) -> str:
        """`patched`, `stock` or `other`."""
        for verdict in ("stock", "patched") if self.refusal is None else ():
            if all(f.current == getattr(f, verdict) for f in self.files.values()):
                return verdict
        return "other"

    def diff(self) -> dict[str, str]:
        """Per touched file: its reasons, then the unified diff, stock to patched, that `git apply` takes."""
        diffs = {}
        for f in self.touched:
            hooks = {hook.partition("(")[0] for _, _, hook, _ in f.inserts}
            text = "".join(reason for hook, reason in REASONS.items() if hook in hooks) + "\n"
            old, new = (d.decode("utf-8", "surrogateescape") for d in (f.stock, f.patched))
            before, after = (re.findall(".*\n|.+", lines) for lines in (old, new))  # git ends lines at \n alone
            for line in difflib.unified_diff(before, after, f"a/{f.name}", f"b/{f.name}"):
                text += line if line.endswith("\n") else line + "\n\\ No newline at end of file\n"
            diffs[f.name] = text
        return diffs


def plan(root: Path) -> Plan:
    """Reads the tree at `root` and plans our lines for it; writes nothing.

    If the tree cannot be patched, the plan's `refusal` says why, and the plan has what was found until then. Raises
    Refused if `root` is no folder, OSError if it cannot be read.
    """
    if not root.is_dir():
        raise Refused(f"{root}: is no folder; give a checkout of LLaVA or a fork, or an installed `llava`")
    result, sources = Plan(root), {}
    sought: set[str] = set()  # a search reads the whole tree, and scripts ask for the same classes

    def fail(error: OSError) -> None:
        raise error

    for folder, folders, entries in os.walk(root, onerror=fail):
        copies = [d for d in folders if d in ("build", "site-packages")]
        result.skipped += [f"{Path(folder, d).relative_to(root).as_posix()}: a built or installed copy" for d in copies]
        folders[:] = sorted(d for d in folders if d[0] != "." and d not in copies)
        for path in sorted(Path(folder, entry) for entry in entries if entry.endswith(".py")):
            name = path.relative_to(root).as_posix()
            data = None if re.search("[\x00-\x1f\x7f]", name) else read(path)  # a name must not forge our report
            if data is None:
                shown = name.encode("unicode_escape").decode()
                result.skipped.append(
                    f"{shown}: is not a regular file of at most {LARGEST >> 20} MiB with a plain name"
                )
            else:
                sources[name] = path.resolve(), data

    def load(*words: str, trains: bool = False) -> list[File]:
        """All files read so far, with those that hold one of `words` (and import a patched model, if `trains`)."""
        new = [word.encode() for word in words if word not in sought]
        sought.update(words)
        for name in [n for n, (_, data) in sources.items() if any(word in data for word in new)]:
            if trains and not imports_model(name, sources[name][1], result):
                continue
            path, data = sources.pop(name)
            try:
                result.files[name] = File(path, name, data)
            except Refused as reason:
                if b"vista_patch" in data:  # our lines may be in it
                    raise
                result.skipped.append(str(reason))  # what Python cannot read cannot run
        return list(result.files.values())

    try:
        forwards = plan_classes(result, load(SPLICE, "vista_patch.vista_"))
        plan_scripts(result, load("HfArgumentParser", trains=True), forwards, load)
        for name, (_, data) in sources.items():
            if b"ArgumentParser(" not in data or not imports_model(name, data, result):
                continue
            if own := re.search(rb"(deepspeed\.initialize|\.backward|Trainer)\(", data):
                line = data.count(b"\n", 0, own.start()) + 1
                result.skipped.append(f"{name}:{line}: trains without HfArgumentParser, so without --vista; {BY_HAND}")
        for f in result.touched:
            plan_import(f)
    except Refused as refusal:
        result.refusal = str(refusal)
        # Another package in the tree may be the reason: look whether one alone can be patched.
        above = {folder for c in result.classes for folder in list(Path(c["forward"]).parents)[:-1]}
        for package in sorted(above, key=lambda package: len(package.parts)):
            alone = plan(root / package)
            if alone.refusal is None and alone.scripts:
                result.refusal += f"; the subfolder {root / package} can be patched alone"
                break
    return result


def read(path: Path) -> bytes | None:
    """The bytes of a source file. None if it is too large, a link to nothing, or no regular file: a pipe may wait
    for ever, and a device may never end."""
    if not path.is_file():
        return None
    with path.open("rb") as stream:
        data = stream.read(LARGEST + 1)
    return data if len(data) <= LARGEST else None


def plan_classes(result: Plan, files: list[File]) -> set[ast.FunctionDef]:
    """A line for each class whose forward calls the splice. A forward that can only fail is dead code: it is noted.

    Returns all these forwards. Raises Refused if none can run.
    """
    forwards, elsewhere = set(), []
    for f in files:
        owners = {method: cls for cls, method in f.methods}
        for method, call in f.calls:
            if not last_name(call).startswith(SPLICE):
                continue
            cls = owners.get(method) if method else None
            own = cls and last_name(getattr(call.func, "value", call)) == "self"
            if not method or not cls or not own or method.name != "forward":
                name = f"{cls.name}.{method.name}" if method and cls else "a function"
                elsewhere.append(
                    f"{f.at(call)}: {name} calls {last_name(call)}, but is no `forward` that calls it on self"
                )
            elif defect := find_defect(f, cls, method, call, files):
                result.skipped.append(f"{f.at(call)}: {cls.name}.forward {defect}")
                forwards.add(method)
            else:
                result.classes.append({"class": cls.name, "forward": f.at(method)})
                f.insert(FORWARD, method.lineno)
                forwards.add(method)
    if not result.classes:
        none = f"{result.root}: no class here has a forward that calls self.{SPLICE} and can run"
        raise Refused("; ".join([none, *(result.skipped or elsewhere), "vista_patch.patch(model) needs no such class"]))
    return forwards


def find_defect(f: File, cls: ast.ClassDef, forward: ast.FunctionDef, call: ast.Call, files: list[File]) -> str:
    """Why this forward fails as soon as it runs, or can train on no labels; empty if it may be right."""
    if "labels" not in parameters(forward):
        return "has no parameter `labels`, so it is no training step"
    targets = next((a.targets[0] for _, a in f.assigns if a.value is call), None)
    for g, splice in find_methods(f, cls, last_name(call), files)[:1]:
        last = [r for method, r in g.returns if method is splice][-1:]  # where it has spliced; others have no images
        counts = [len(t.elts) for t in (targets, *(r.value for r in last)) if isinstance(t, ast.Tuple)]
        if len(set(counts)) == 2:
            return f"is stale: it unpacks {counts[0]} values, but the splice returns {counts[1]} ({g.at(last[0])})"
    return ""


def plan_scripts(result: Plan, files: list[File], forwards: set[ast.FunctionDef], load: Load) -> None:
    """Lines for each train script that is understood. The others are noted; it is refused if all are others."""
    problems = []
    for f in files:
        if any(last_name(call) == "HfArgumentParser" for _, call in f.calls):
            try:
                result.scripts.append(plan_script(f, load))
                result.skipped += find_unreached(f, forwards, load)
            except Refused as reason:
                problems.append(str(reason))
    if problems and not result.scripts:
        raise Refused("; ".join(problems))
    if not result.scripts:
        problems = [f"{result.root}: no train script here uses HfArgumentParser, so none gets --vista; {BY_HAND}"]
    result.skipped += problems


def find_unreached(f: File, forwards: set[ast.FunctionDef], load: Load) -> list[str]:
    """Notes on the models of this tree that a script makes and that train past the lines of ours."""
    notes = {}
    for _, call in f.calls:
        made = getattr(call.func, "value", call) if last_name(call) == "from_pretrained" else call.func
        name = last_name(made)
        if not name[:1].isupper() or name in notes or last_name(getattr(made, "value", made)) == "transformers":
            continue
        files = load(f"class {name}(")
        with contextlib.suppress(Refused):  # there is no class of this name in the tree, or two
            found = find_methods(*find_class(name, f, files), "forward", files)
            if not found:
                continue
            g, forward = found[0]
            through = any(s is forward and last_name(c) == "super" for s, c in g.calls)
            reached = forward in forwards or (through and any(method in forwards for _, method in found))
            if not reached and (forward.args.kwarg or "labels" in parameters(forward)):
                notes[name] = f"{f.at(call)}: makes {name}, whose forward ({g.at(forward)}) VISTA does not reach"
    return list(notes.values())


def plan_script(f: File, load: Load) -> dict[str, Any]:
    """Plans the lines of one train script. Raises Refused if it is not understood, or its trainer drops the loss."""
    function, parser = next((s, c) for s, c in f.calls if last_name(c) == "HfArgumentParser")
    made = [a for s, a in f.assigns if s is function and isinstance(a.value, ast.Call)]
    parsed = [a for a in made if last_name(a.value) == "parse_args_into_dataclasses"]
    results = names(parsed[0].targets[0]) if len(parsed) == 1 else []
    kinds = names(parser.args[0]) if parser.args else []
    if not kinds or len(results) < len(kinds):
        raise Refused(f"{f.at(parser)}: the parser gets no tuple of dataclasses, or its results get no names")
    calls = [c for s, c in f.calls if s is function and last_name(c).endswith("Trainer")]
    for call in calls:
        if re.search("PO[A-Z]|KTO|Reward", last_name(call)):
            raise Refused(f"{f.at(call)}: {last_name(call)} makes its own loss from the logits and drops the model's")
    trainers = [a for a in made if last_name(a.value).endswith("Trainer")]
    alone = [names(a.targets[0]) for a in trainers if f.alone(a)]
    if not calls or len(alone) != len(calls) or any(len(name) != 1 for name in alone):
        raise Refused(f"{f.at(parser)}: this function makes no trainer by a statement `name = SomeTrainer(...)`")

    # The first that is no TrainingArguments is the model's. Leftover strings may take a last name.
    pairs = zip(results, kinds, strict=False)
    found = [(name, *find_class(kind, f, [f] if kind in f.classes else load(f"class {kind}"))) for name, kind in pairs]
    found = [m for m in found if "TrainingArguments" not in [last_name(base) for base in m[2].bases]]
    if not found:
        raise Refused(f"{f.at(parser)}: the parser gets nothing but TrainingArguments")
    arguments, g, cls = found[0]
    decorators = [d for d in cls.decorator_list if last_name(d) == "dataclass"]
    if not decorators:
        raise Refused(f"{g.at(cls)}: {cls.name} is not decorated with @dataclass")
    bound = [t for s, a in f.assigns if s is function for t in a.targets if arguments in names(t)]
    if len(bound) > 1:
        raise Refused(f"{f.at(bound[1])}: {arguments} is assigned again after parsing")

    for made_here, (trainer,) in zip(trainers, alone, strict=True):
        f.insert(f"{SETUP}({trainer}, {arguments})", made_here.lineno, after=made_here.end_lineno)
    g.insert(ARGUMENTS, decorators[0].lineno)
    return {
        "parser": f.at(parser),
        "arguments": f"{arguments}: {cls.name}",
        "arguments_at": g.at(cls),
        "trainers": [f.at(made_here) for made_here in trainers],
    }


def plan_import(f: File) -> None:
    """Our import goes after the last one above the first class or function, so that what a script sets up
    between its imports still comes first. Refuses a file that uses vista_patch by hand."""
    last = None
    for statement in f.tree.body:
        if isinstance(statement, (ast.Import, ast.ImportFrom)) and f.alone(statement):
            last = statement
        elif last and isinstance(statement, (ast.ClassDef, ast.FunctionDef)):
            break
    if last is None or end_line(last) > min(f.inserts)[0]:
        raise Refused(f"{f.name}:1: has no import above its first class, so VISTA's has no place")
    f.insert(IMPORT, last.lineno, after=last.end_lineno)
    for number, line in zip(f.numbers, f.lines, strict=True):
        if re.search(rb"\bvista_patch\b", line):
            raise Refused(f"{f.name}:{number}: a use of vista_patch that `apply` did not write; remove it")
    parse(f.patched)
    assert without_our_lines(f.patched)[0] == f.lines


def imports_model(name: str, data: bytes, result: Plan) -> bool:
    """Whether a script imports from a folder on the way to a class that is patched."""
    folders = {folder for f in result.touched for folder in Path(f.name).parents}
    called = {folder.name for folder in folders} | {result.root.resolve().name}
    for dots, first in re.findall(rb"(?m)^[ \t]*(?:from|import)[ \t]+(\.*)(\w*)", data):
        if Path(name).parents[: len(dots)][-1] in folders if dots else first.decode() in called:
            return True
    return False


def find_methods(f: File, cls: ast.ClassDef, name: str, files: list[File]) -> list[tuple[File, ast.FunctionDef]]:
    """The methods `name` of the class and of its bases in this tree, nearest first."""
    line = [(f, cls)]
    for f, cls in line:  # which grows meanwhile
        for base in map(last_name, cls.bases):
            with contextlib.suppress(Refused):  # the base is defined elsewhere, or twice as near
                line += [c for c in [find_class(base, f, files)] if c not in line]
    return [(g, m) for g, owner in line for c, m in g.methods if c is owner and m.name == name]


def find_class(name: str, near: File, files: list[File]) -> tuple[File, ast.ClassDef]:
    """The class `name` as `near` imports it, else in the nearest file. Raises Refused if there is none, or two."""

    def shared(f: File) -> int:
        return len(Path(os.path.commonpath([f.name, near.name])).parts)

    imports = [s for s in near.tree.body if isinstance(s, ast.ImportFrom) and name in [a.name for a in s.names]]
    modules = {(s.module or "").rpartition(".")[2] for s in imports}
    theirs = any((s.module or "").split(".")[0] == "transformers" for s in imports)  # a copy of it may lie in the tree
    found = [f for f in files if name in f.classes and not theirs]
    found = [f for f in found if Path(f.name).stem in modules] or found
    found.sort(key=shared, reverse=True)
    if not found or (found[1:] and shared(found[0]) == shared(found[1])):
        where = " and ".join(f.at(f.classes[name]) for f in found[:2]) or "nowhere in this tree"
        raise Refused(f"{near.name}: uses a class {name}, which is defined {where}")
    return found[0], found[0].classes[name]


def without_our_lines(data: bytes) -> tuple[list[bytes], list[int]]:
    """The lines that are not ours, and their numbers in `data`. An import without a hook is not ours."""
    lines = data.splitlines(keepends=True)
    ours = {i for i, line in enumerate(lines) if OUR_LINE.fullmatch(line)}
    if all(IMPORT.encode() in lines[i] for i in ours):
        ours = set()
    kept = [i for i in range(len(lines)) if i not in ours]
    return [lines[i] for i in kept], [i + 1 for i in kept]


def parse(data: bytes) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # upstream's "\d" is not ours to complain about
        return ast.parse(data)


def end_line(node: ast.stmt) -> int:
    return node.end_lineno or node.lineno


def last_name(node: ast.expr) -> str:
    """`C` of `a.b.C` and of `a.b.C(...)`; empty where there is no such name."""
    node = node.func if isinstance(node, ast.Call) else node
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def names(node: ast.expr) -> list[str]:
    """The names in a tuple or list, or of a single name; empty where a part is anything else."""
    parts = node.elts if isinstance(node, (ast.Tuple, ast.List)) else [node]
    found = [p.id for p in parts if isinstance(p, ast.Name)]
    return found if len(found) == len(parts) else []


def parameters(function: ast.FunctionDef) -> list[str]:
    """The names of a method's parameters after `self`, less *args and **kwargs."""
    a = function.args
    return [p.arg for p in [*a.posonlyargs, *a.args, *a.kwonlyargs]][1:]
