"""Puts VISTA's lines into LLaVA's source, by syntax: whole lines are added, nothing is removed or moved.

    import vista_patch                            after the imports at the top of each file with one of these
    @vista_patch.vista_forward                    directly above `def forward`, where that calls the splice
    @vista_patch.vista_arguments                  directly above `@dataclass` of the model arguments
    vista_patch.vista_setup(trainer, model_args)  directly after the trainer is made, with the script's names

"The splice" is `prepare_inputs_labels_for_multimodal`, or a name that begins so: the method that puts image
features between the text embeddings (upstream: llava/model/llava_arch.py). What it takes and returns is read
by name, never by position or by the length of a tuple, since forks differ in both.

`plan` alone decides. It looks at the tree without our lines, so a file is stock if it equals what `plan`
started from, patched if it equals what `plan` made of it, and anything else was edited by hand.
"""

from __future__ import annotations

import difflib
import inspect
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import libcst as cst
from libcst.metadata import MetadataWrapper, PositionProvider

SPLICE = "prepare_inputs_labels_for_multimodal"
# What forward may unpack from the splice, and the word that marks the same slot in the splice's own return
# statements (upstream returns `new_input_embeds` into `inputs_embeds`).
SLOTS = {
    "input_ids": "input",
    "position_ids": "position",
    "attention_mask": "mask",
    "past_key_values": "past",
    "inputs_embeds": "embed",
    "labels": "label",
}
NEEDED = {"attention_mask", "inputs_embeds", "labels"}

IMPORT = "import vista_patch"
FORWARD = "@vista_patch.vista_forward"
ARGUMENTS = "@vista_patch.vista_arguments"
SETUP = "vista_patch.vista_setup"
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


class Refused(Exception):
    """The tree is not understood, or the term could not be right on it; the message says where and why."""


class Stale(Exception):
    """A class whose call of the splice fails before it computes anything: dead code beside others."""


class File:
    """A source file as it lies on disk (`current`), without our lines (`stock`) and with them (`patched`)."""

    def __init__(self, path: Path, name: str, data: bytes):
        self.path, self.name, self.current = path, name, data
        self.lines, self.numbers = without_our_lines(data)
        self.stock = b"".join(self.lines)
        self.inserts: set[tuple[int, bool, str, bytes]] = set()  # index, is no import, hook, its line
        try:
            wrapper = MetadataWrapper(cst.parse_module(self.stock), unsafe_skip_copy=True)
        except (cst.ParserSyntaxError, UnicodeDecodeError) as error:
            raise Refused(f"{name}: cannot be parsed as Python 3: {str(error).splitlines()[0]}") from None
        self.module, self.positions = wrapper.module, wrapper.resolve(PositionProvider)
        self.outline = Outline()
        self.module.visit(self.outline)

    def at(self, node: cst.CSTNode) -> str:
        return f"{self.name}:{self.numbers[self.positions[node].start.line - 1]}"

    def insert(self, hook: str, node: cst.CSTNode, after: bool = False) -> None:
        """Plans `hook` as a line above or after the statement `node`, in its indentation and newline."""
        first, last = self.positions[node].start.line, self.positions[node].end.line
        newline = re.search(rb"[\r\n]*\Z", self.lines[(last if after else first) - 1]).group()
        if not newline:
            raise Refused(f"{self.at(node)}: the file ends here without a newline, so no line can be added")
        indent = re.match(rb"[ \t]*", self.lines[first - 1]).group()
        index = last if after else first - 1
        self.inserts.add((index, hook != IMPORT, hook, indent + hook.encode() + newline))

    @property
    def patched(self) -> bytes:
        lines = list(self.lines)
        for index, _, _, line in sorted(self.inserts, reverse=True):
            lines.insert(index, line)
        return b"".join(lines)


class Outline(cst.CSTVisitor):
    """What `plan` looks for in a file, each with the function that it stands in (None: the module)."""

    def __init__(self) -> None:
        self.scope: list[cst.ClassDef | cst.FunctionDef] = []
        self.classes: dict[str, cst.ClassDef] = {}
        self.methods: list[tuple[cst.ClassDef, cst.FunctionDef]] = []
        self.calls: list[tuple[cst.FunctionDef | None, cst.Call]] = []
        self.returns: list[tuple[cst.FunctionDef | None, cst.Return]] = []
        self.assigns: list[tuple[cst.FunctionDef | None, cst.SimpleStatementLine, cst.Assign]] = []

    @property
    def function(self) -> cst.FunctionDef | None:
        return next((s for s in reversed(self.scope) if isinstance(s, cst.FunctionDef)), None)

    def visit_ClassDef(self, node: cst.ClassDef) -> None:
        self.classes[node.name.value] = node
        self.scope.append(node)

    def visit_FunctionDef(self, node: cst.FunctionDef) -> None:
        if self.scope and isinstance(self.scope[-1], cst.ClassDef):
            self.methods.append((self.scope[-1], node))
        self.scope.append(node)

    def leave_ClassDef(self, original_node: cst.ClassDef) -> None:
        self.scope.pop()

    def leave_FunctionDef(self, original_node: cst.FunctionDef) -> None:
        self.scope.pop()

    def visit_Call(self, node: cst.Call) -> None:
        self.calls.append((self.function, node))

    def visit_Return(self, node: cst.Return) -> None:
        self.returns.append((self.function, node))

    def visit_SimpleStatementLine(self, node: cst.SimpleStatementLine) -> None:
        self.assigns += [(self.function, node, part) for part in node.body if isinstance(part, cst.Assign)]


@dataclass
class Plan:
    """What was found in a tree and what `apply` makes of it. `refusal` is None where it may be applied."""

    root: Path
    files: dict[str, File] = field(default_factory=dict)
    classes: list[dict] = field(default_factory=list)
    scripts: list[dict] = field(default_factory=list)
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
            old, new = (re.findall(".*\n|.+", lines) for lines in (old, new))  # git ends lines at \n alone
            for line in difflib.unified_diff(old, new, f"a/{f.name}", f"b/{f.name}"):
                text += line if line.endswith("\n") else line + "\n\\ No newline at end of file\n"
            diffs[f.name] = text
        return diffs


def plan(root: Path) -> Plan:
    """Reads the tree at `root` and plans our lines for it; writes nothing.

    What cannot be patched stands in the plan's `refusal`, beside what was found until then. Raises Refused
    where `root` is no folder, OSError where it cannot be read.
    """
    if not root.is_dir():
        raise Refused(f"{root}: is no folder; give a checkout of LLaVA or a fork, or an installed `llava`")
    result, sources = Plan(root), {}
    for folder, folders, entries in os.walk(root):
        folders[:] = sorted(d for d in folders if d[0] != "." and d not in ("build", "site-packages"))
        for path in sorted(Path(folder, entry) for entry in entries if entry.endswith(".py")):
            sources[path.relative_to(root).as_posix()] = path.resolve(), path.read_bytes()

    def load(pattern: str) -> list[File]:
        """All files of interest so far, with those that `pattern` occurs in."""
        for name, (path, data) in sources.items():
            if name not in result.files and re.search(pattern.encode(), data):
                result.files[name] = File(path, name, data)
        return list(result.files.values())

    try:
        files = load(rf"{SPLICE}|\bHfArgumentParser\b|\bvista_patch\.vista_")
        plan_classes(result, files)
        plan_scripts(result, files, load)
        for f in result.touched:
            plan_import(f)
    except Refused as refusal:
        result.refusal = str(refusal)
    return result


def plan_classes(result: Plan, files: list[File]) -> None:
    """A line for each class whose forward calls the splice; each must be right, or be dead code."""
    for f in files:
        for cls, method in f.outline.methods:
            calls = [c for owner, c in f.outline.calls if owner is method and last_name(c).startswith(SPLICE)]
            if calls and method.name.value == "forward":
                try:
                    result.classes.append(read_class(f, cls, method, calls, files))
                    f.insert(FORWARD, method)
                except Stale as reason:
                    result.skipped.append(str(reason))
    if not result.classes:
        nothing = f"{result.root}: no class here has a forward that calls {SPLICE} and can run"
        raise Refused("; ".join([nothing, *result.skipped]))


def read_class(f: File, cls: cst.ClassDef, forward: cst.FunctionDef, calls: list[cst.Call], files: list[File]) -> dict:
    """What `check` tells of a class. Raises Refused if the term could not be right, Stale for dead code."""
    call, name = calls[0], last_name(calls[0])
    what = f"{f.at(call)}: {cls.name.value}.forward"
    if len(calls) > 1:
        raise Refused(f"{what} calls the splice {len(calls)} times, and VISTA follows one call a step")
    if not isinstance(call.func, cst.Attribute) or last_name(call.func.value) != "self":
        raise Refused(f"{what} does not call {name} on self")
    if "labels" not in signature(forward).parameters:
        raise Refused(f"{what} has no parameter `labels`")

    targets = next((names(a.targets[0].target) for _, _, a in f.outline.assigns if a.value is call), [])
    if NEEDED - set(targets):
        got = ", ".join(targets) or "no tuple of plain names"
        raise Refused(f"{what} unpacks {got} from {name}, and not {', '.join(sorted(NEEDED))}")
    unknown = [t for i, t in enumerate(targets) if t != "_" and (t not in SLOTS or t in targets[:i])]
    if unknown:
        raise Refused(f"{what} unpacks {', '.join(unknown)} from {name}; VISTA does not know what that is")

    g, splice = find_splice(f, cls, name, files)
    taken = signature(splice)
    keywords = {a.keyword.value: a for a in call.args if a.keyword}
    try:
        taken.bind("self", *[a for a in call.args if not a.keyword], **keywords)
    except TypeError as error:
        raise Stale(f"{what} is stale: {name} at {g.at(splice)} cannot be called so ({error})") from None
    returns = [r for owner, r in g.outline.returns if owner is splice]
    if not returns or not {"input_ids", "attention_mask", "labels"} <= set(taken.parameters):
        raise Refused(f"{g.at(splice)}: {name} takes no input_ids, attention_mask, labels, or returns nothing")
    for statement in returns:
        parts = statement.value.elements if isinstance(statement.value, cst.Tuple) else []
        if len(parts) != len(targets):
            got = f"{len(parts)} ({g.at(statement)})" if parts else f"no tuple ({g.at(statement)})"
            raise Refused(f"{what} unpacks {len(targets)} values, but {name} returns {got}")
        for target, part in zip(targets, parts, strict=True):
            value = g.module.code_for_node(part.value)
            if target != "_" and SLOTS[target] not in value and value != "None":
                raise Refused(f"{what} unpacks {target} where {name} returns {value} ({g.at(statement)})")
    newest = "D" if "modalities" in taken.parameters else "C" if "image_sizes" in taken.parameters else "B"
    return {
        "class": cls.name.value,
        "forward": f.at(forward),
        "generation": newest if "position_ids" in targets else "A",
        "splice": f"{name}({', '.join(list(taken.parameters)[1:])})",
        "splice_at": g.at(splice),
        "unpacks": targets,
    }


def plan_scripts(result: Plan, files: list[File], load) -> None:
    """Lines for each train script that is understood; the others are noted, but there must be one."""
    problems = []
    for f in files:
        if any(last_name(call) == "HfArgumentParser" for _, call in f.outline.calls):
            try:
                result.scripts.append(plan_script(f, load))
            except Refused as reason:
                problems.append(str(reason))
    if not result.scripts:
        problems = problems or [f"{result.root}: no script here parses its flags by HfArgumentParser"]
        raise Refused("; ".join(problems))
    result.skipped += problems


def plan_script(f: File, load) -> dict:
    function, parser = next((s, c) for s, c in f.outline.calls if last_name(c) == "HfArgumentParser")
    made = [(line, a) for s, line, a in f.outline.assigns if s is function and isinstance(a.value, cst.Call)]
    parsed = [a for _, a in made if last_name(a.value) == "parse_args_into_dataclasses"]
    results = names(parsed[0].targets[0].target) if len(parsed) == 1 else []
    kinds = names(parser.args[0].value) if parser.args else []
    if not kinds or len(results) < len(kinds):
        raise Refused(f"{f.at(parser)}: the parser does not get dataclasses by name, parsed into as many names")
    trainers = [(line, a) for line, a in made if last_name(a.value).endswith("Trainer")]
    calls = [c for s, c in f.outline.calls if s is function and last_name(c).endswith("Trainer")]
    alone = [names(a.targets[0].target) for line, a in trainers if len(line.body) == 1]
    if not calls or len(alone) != len(calls) or any(len(name) != 1 for name in alone):
        raise Refused(f"{f.at(parser)}: no trainer is made in this function, or not by a statement `name = ...`")

    # The first that is no TrainingArguments is the model's. Leftover strings may take a last name.
    pairs = zip(results, kinds, strict=False)
    found = [(name, *find_class(kind, f, load(rf"(?m)^\s*class {kind}\b"))) for name, kind in pairs]
    found = [m for m in found if "TrainingArguments" not in [last_name(base.value) for base in m[2].bases]]
    if not found:
        raise Refused(f"{f.at(parser)}: the parser is given nothing but TrainingArguments")
    arguments, g, cls = found[0]
    decorators = [d for d in cls.decorators if last_name(d.decorator) == "dataclass"]
    if not decorators:
        raise Refused(f"{g.at(cls)}: {cls.name.value} is not decorated with @dataclass")
    bound = [(s, t) for s, _, a in f.outline.assigns for t in a.targets if arguments in names(t.target)]
    bound = [t for s, t in bound if s is function]
    if len(bound) > 1:
        raise Refused(f"{f.at(bound[1])}: {arguments} is assigned again after parsing")

    for (line, _), (trainer,) in zip(trainers, alone, strict=True):
        f.insert(f"{SETUP}({trainer}, {arguments})", line, after=True)
    g.insert(ARGUMENTS, decorators[0])
    return {
        "parser": f.at(parser),
        "arguments": f"{arguments}: {cls.name.value}",
        "arguments_at": g.at(cls),
        "trainers": [f.at(line) for line, _ in trainers],
    }


def plan_import(f: File) -> None:
    """Our import goes after the last one above the first class or function, so that what a script sets up
    between its imports still comes first. Refuses a file that uses vista_patch by hand."""
    last = None
    for statement in f.module.body:
        parts = statement.body if isinstance(statement, cst.SimpleStatementLine) else []
        if parts and all(isinstance(part, (cst.Import, cst.ImportFrom)) for part in parts):
            last = statement
        elif last and isinstance(statement, (cst.ClassDef, cst.FunctionDef)):
            break
    if last is None or f.positions[last].end.line > min(f.inserts)[0]:
        raise Refused(f"{f.name}:1: has no import above its first class, so VISTA's has no place")
    f.insert(IMPORT, last, after=True)
    for number, line in zip(f.numbers, f.lines, strict=True):
        if re.search(rb"\bvista_patch\b", line):
            raise Refused(f"{f.name}:{number}: a use of vista_patch that `apply` did not write; remove it")
    cst.parse_module(f.patched)
    assert without_our_lines(f.patched)[0] == f.lines


def find_splice(f: File, cls: cst.ClassDef, name: str, files: list[File]) -> tuple[File, cst.FunctionDef]:
    """The definition of the method `name` that `cls` has, or inherits from the classes of this tree."""
    start, todo, seen = f.at(cls), [(f, cls)], []
    while todo:
        f, cls = todo.pop(0)
        seen.append(cls)
        for owner, method in f.outline.methods:
            if owner is cls and method.name.value == name:
                return f, method
        for base in cls.bases:
            if any(last_name(base.value) in g.outline.classes for g in files):
                found = find_class(last_name(base.value), f, files)
                todo += [found] if found[1] not in seen else []
    raise Refused(f"{start}: {name} is not defined by this class or by a base of it in this tree")


def find_class(name: str, near: File, files: list[File]) -> tuple[File, cst.ClassDef]:
    """The class `name` in the file nearest to `near`; refuses where there is none, or two are as near."""

    def shared(f: File) -> int:
        return len(Path(os.path.commonpath([f.name, near.name])).parts)

    found = sorted((f for f in files if name in f.outline.classes), key=shared, reverse=True)
    if not found or (found[1:] and shared(found[0]) == shared(found[1])):
        where = " and ".join(f.at(f.outline.classes[name]) for f in found[:2]) or "nowhere in this tree"
        raise Refused(f"{near.name}: uses a class {name}, which is defined {where}")
    return found[0], found[0].outline.classes[name]


def without_our_lines(data: bytes) -> tuple[list[bytes], list[int]]:
    """The lines that are not ours, and their numbers in `data`. An import without a hook is not ours."""
    lines = data.splitlines(keepends=True)
    ours = {i for i, line in enumerate(lines) if OUR_LINE.fullmatch(line)}
    if all(IMPORT.encode() in lines[i] for i in ours):
        ours = set()
    kept = [i for i in range(len(lines)) if i not in ours]
    return [lines[i] for i in kept], [i + 1 for i in kept]


def last_name(node: cst.BaseExpression) -> str:
    """`C` of `a.b.C` and of `a.b.C(...)`; empty where there is no such name."""
    node = node.func if isinstance(node, cst.Call) else node
    node = node.attr if isinstance(node, cst.Attribute) else node
    return node.value if isinstance(node, cst.Name) else ""


def names(node: cst.BaseExpression) -> list[str]:
    """The names in a tuple or list, or of a single name; empty where a part is anything else."""
    parts = [e.value for e in node.elements] if isinstance(node, (cst.Tuple, cst.List)) else [node]
    return [p.value for p in parts] if all(isinstance(p, cst.Name) for p in parts) else []


def signature(function: cst.FunctionDef) -> inspect.Signature:
    """The function's parameters, with whether they have defaults, for `bind`."""
    kinds, p = inspect.Parameter, function.params
    star = p.star_arg if isinstance(p.star_arg, cst.Param) else None
    groups = [(p.posonly_params, kinds.POSITIONAL_ONLY), (p.params, kinds.POSITIONAL_OR_KEYWORD)]
    groups += [
        ([star], kinds.VAR_POSITIONAL),
        (p.kwonly_params, kinds.KEYWORD_ONLY),
        ([p.star_kwarg], kinds.VAR_KEYWORD),
    ]
    return inspect.Signature(
        [kinds(q.name.value, kind, default=q.default or kinds.empty) for group, kind in groups for q in group if q]
    )
