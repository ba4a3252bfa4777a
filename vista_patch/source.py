"""Puts VISTA's lines into LLaVA's source, by syntax: whole lines are added, nothing is removed or moved.

    import vista_patch                            after the imports at the top of each file with one of these
    @vista_patch.vista_forward                    directly above `def forward`, where that calls the splice
    @vista_patch.vista_arguments                  directly above `@dataclass` of the model arguments
    vista_patch.vista_setup(trainer, model_args)  directly after the trainer is made, with the script's names

"The splice" is `prepare_inputs_labels_for_multimodal`, or a name that begins so: the method that puts image
features between the text embeddings (upstream: llava/model/llava_arch.py). What it takes and returns is read
by name, never by position or by the length of a tuple, since forks differ in both. Where its embeddings go
from there is followed too: the term needs them to reach the decoder whole, and the images by no other way.

`plan` alone decides. It looks at the tree without our lines, so a file is stock if it equals what `plan`
started from, patched if it equals what `plan` made of it, and anything else was edited by hand.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import inspect
import os
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path

SPLICE = "prepare_inputs_labels_for_multimodal"
# What forward unpacks from the splice and hands to the decoder, and the word that marks the same slot in the
# splice's own return statements (upstream returns `new_input_embeds` into `inputs_embeds`). What else a fork
# unpacks must not reach its decoder.
SLOTS = {
    "input_ids": "input",
    "position_ids": "position",
    "attention_mask": "mask",
    "past_key_values": "past",
    "inputs_embeds": "embed",
    "labels": "label",
    "cache_position": "cache",
}
LARGEST = 2 << 20  # bytes of a source file; no model file that we know has 0.3 MiB
NEEDED = {"attention_mask", "inputs_embeds", "labels"}

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


class Refused(Exception):
    """The tree is not understood, or the term could not be right on it; the message says where and why."""


class Stale(Exception):
    """A class whose call of the splice fails before it computes anything: dead code beside others."""


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
            line = self.numbers[error.lineno - 1] if getattr(error, "lineno", None) else 1
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

    def at(self, node: ast.AST) -> str:
        return f"{self.name}:{self.numbers[node.lineno - 1]}"

    def alone(self, node: ast.stmt) -> bool:
        """Whether nothing else but a comment stands on the lines of the statement."""
        before = self.lines[node.lineno - 1][: node.col_offset]
        after = self.lines[node.end_lineno - 1][node.end_col_offset :]
        return not before.strip(b" \t\f\xef\xbb\xbf") and bool(re.fullmatch(rb"[ \t\f]*;?[ \t\f]*(#.*)?[\r\n]*", after))

    def insert(self, hook: str, first: int, after: int | None = None) -> None:
        """Plans `hook` above line `first`, or after line `after`: in the indentation of `first`, with its newline."""
        newline = re.search(rb"[\r\n]*\Z", self.lines[(after or first) - 1]).group()
        if not newline:
            raise Refused(f"{self.name}:{first}: the file ends here without a newline, so no line can be added")
        indent = re.match(rb"[ \t]*", self.lines[first - 1]).group()
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

    def fail(error: OSError) -> None:
        raise error

    for folder, folders, entries in os.walk(root, onerror=fail):
        copies = [d for d in folders if d in ("build", "site-packages")]
        result.skipped += [f"{Path(folder, d).relative_to(root).as_posix()}: a built or installed copy" for d in copies]
        folders[:] = sorted(d for d in folders if d[0] != "." and d not in copies)
        for path in sorted(Path(folder, entry) for entry in entries if entry.endswith(".py")):
            name = path.relative_to(root).as_posix()
            data = read(path)
            if data is None:
                result.skipped.append(f"{name}: is not a regular file of at most {LARGEST >> 20} MiB")
            else:
                sources[name] = path.resolve(), data

    def load(*words: str, trains: bool = False) -> list[File]:
        """All files of interest so far, with those that one of `words` occurs in (of those that train our classes)."""
        for name in [n for n, (_, data) in sources.items() if any(word.encode() in data for word in words)]:
            if trains and not imports_model(name, sources[name][1], result):
                continue
            path, data = sources.pop(name)
            try:
                result.files[name] = File(path, name, data)
            except Refused as reason:
                # One that Python cannot read cannot run: dead code, unless it is a model file or has our lines.
                if re.search(rb"\bvista_patch\b|self\.%s" % SPLICE.encode(), data):
                    raise
                result.skipped.append(str(reason))
        return list(result.files.values())

    try:
        plan_classes(result, load(SPLICE, "vista_patch.vista_"), load)
        plan_scripts(result, load("HfArgumentParser", trains=True), load)
        for name, (_, data) in sources.items():
            if b"ArgumentParser(" not in data or not imports_model(name, data, result):
                continue
            if own := re.search(rb"(deepspeed\.initialize|\.backward|Trainer)\(", data):
                line = data.count(b"\n", 0, own.start()) + 1
                result.skipped.append(f"{name}:{line}: trains with flags of its own, so without --vista; {BY_HAND}")
        for f in result.touched:
            plan_import(f)
    except Refused as refusal:
        result.refusal = str(refusal)
    return result


def read(path: Path) -> bytes | None:
    """The bytes of a source file; None where it is too large, or a link to nothing, or no regular file: to read a
    pipe may wait for ever, a device may never end."""
    if not path.is_file():
        return None
    with path.open("rb") as stream:
        data = stream.read(LARGEST + 1)
    return data if len(data) <= LARGEST else None


def plan_classes(result: Plan, files: list[File], load) -> None:
    """A line for each class whose forward calls the splice; each must be right, or be dead code."""
    refused, elsewhere = [], []
    for f in files:
        owners = {method: cls for cls, method in f.methods}
        for method, call in f.calls:
            if not last_name(call).startswith(SPLICE):
                continue
            if method not in owners or method.name != "forward":
                name = f"{owners[method].name}.{method.name}" if method in owners else "a function"
                elsewhere.append(f"{f.at(call)}: {name}, no model's forward, calls {ast.unparse(call.func)}")
                continue
            try:
                result.classes.append(read_class(f, owners[method], method, call, files, load))
                f.insert(FORWARD, method.lineno)
            except Stale as reason:
                result.skipped.append(str(reason))
            except Refused as reason:
                refused.append(str(reason))
    if refused:
        raise Refused("; ".join(dict.fromkeys(refused)))
    if not result.classes:
        for f in load("inputs_embeds, labels", "inputs_embeds, attention_mask, labels"):
            forwards = {method: cls.name for cls, method in f.methods if method.name == "forward"}
            for method, assign in f.assigns:
                if method in forwards and {"inputs_embeds", "labels"} <= set(names(assign.targets[0])):
                    made = ast.unparse(getattr(assign.value, "func", assign.value))
                    elsewhere.append(f"{f.at(assign)}: {forwards[method]}.forward makes its embeddings by {made}")
        nothing = f"{result.root}: no class here has a forward that calls self.{SPLICE} and can run"
        raise Refused("; ".join([nothing, *elsewhere[:5], *result.skipped]))


def read_class(f: File, cls: ast.ClassDef, forward: ast.FunctionDef, call: ast.Call, files: list[File], load) -> dict:
    """What `check` tells of a class. Raises Refused if the term could not be right, Stale for dead code."""
    name, what = last_name(call), f"{f.at(call)}: {cls.name}.forward"
    calls = [c for method, c in f.calls if method is forward and last_name(c).startswith(SPLICE)]
    if len(calls) > 1:
        raise Refused(f"{what} calls the splice {len(calls)} times, and VISTA follows one call a step")
    if ast.unparse(call.func) != f"self.{name}":
        raise Refused(f"{what} does not call {name} on self")
    if "labels" not in signature(forward).parameters:
        raise Refused(f"{what} has no parameter `labels`")

    targets = next((names(a.targets[0]) for _, a in f.assigns if a.value is call), [])
    if NEEDED - set(targets):
        got = ", ".join(targets) or "no tuple of plain names"
        raise Refused(f"{what} unpacks {got} from {name}, and not {', '.join(sorted(NEEDED))}")
    twice = [t for i, t in enumerate(targets) if t != "_" and t in targets[:i]]
    if twice:
        raise Refused(f"{what} unpacks {', '.join(twice)} twice from {name}")

    found = find_method(f, cls, name, files)
    if found is None:
        raise Refused(f"{f.at(cls)}: {name} is not defined by this class or by a base of it in this tree")
    g, splice = found
    taken = signature(splice)
    keywords = {k.arg: k.value for k in call.keywords if k.arg}
    try:
        given = taken.bind("self", *call.args, **keywords).arguments
    except TypeError as error:
        raise Stale(f"{what} is stale: {name} at {g.at(splice)} cannot be called so ({error})") from None
    returns = [r for method, r in g.returns if method is splice]
    if not returns or not {"input_ids", "attention_mask", "labels"} <= set(taken.parameters):
        raise Refused(f"{g.at(splice)}: {name} takes no input_ids, attention_mask, labels, or returns nothing")
    for statement in returns:
        parts = statement.value.elts if isinstance(statement.value, ast.Tuple) else []
        if len(parts) != len(targets):
            got = f"{len(parts)} ({g.at(statement)})" if parts else f"no tuple ({g.at(statement)})"
            raise Refused(f"{what} unpacks {len(targets)} values, but {name} returns {got}")
        for target, part in zip(targets, parts, strict=True):
            value = ast.unparse(part)
            if SLOTS.get(target, "") not in value and value != "None":
                raise Refused(f"{what} unpacks {target} where {name} returns {value} ({g.at(statement)})")

    images = set().union(*(mentioned(value) for slot, value in given.items() if slot not in SLOTS))
    images = (images | set(targets)) - set(SLOTS) - {"_", "self"}
    decoder = find_decoder(f, cls, [(f, forward, "inputs_embeds")], images, files, load)
    if not decoder:
        raise Refused(f"{what} hands inputs_embeds to no self.<decoder>(...) or super().forward(...) by its name")
    newest = "D" if "modalities" in taken.parameters else "C" if "image_sizes" in taken.parameters else "B"
    return {
        "class": cls.name,
        "forward": f.at(forward),
        "generation": newest if "position_ids" in taken.parameters else "A",
        "splice": f"{name}({', '.join(list(taken.parameters)[1:])})",
        "splice_at": g.at(splice),
        "unpacks": targets,
        "decoder": decoder,
    }


def find_decoder(f: File, cls: ast.ClassDef, way: list, images: set[str], files: list[File], load) -> list[str]:
    """What a forward hands the embeddings to in the end, as its source calls that.

    `way`: the file, the function and the name of the embeddings in it, of `cls.forward` and of each method that
    they were handed on to. Raises Refused where they do not arrive as spliced, where what gets them is not a
    module's own forward (it may drop tokens), or where one of the names `images` goes along.
    """
    g, method, embeds = way[-1]
    decoders, what = [], f"{cls.name}.forward"
    for owner, assign in g.assigns:
        again = owner is method and embeds in names(assign.targets[0]) and embeds in mentioned(assign.value)
        if again and not ast.unparse(assign.value).startswith(f"{embeds}."):  # which is a cast
            by = ast.unparse(getattr(assign.value, "func", assign.value))
            raise Refused(f"{g.at(assign)}: {what} packs rows, or drops tokens, by {by}")
    for owner, call in g.calls:
        func, name = ast.unparse(call.func), last_name(call)
        if owner is not method or not func.startswith(("self.", "super(")):
            continue
        given, inner = {k.arg: k.value for k in call.keywords if k.arg}, None
        if func == f"self.{name}":
            inner = find_method(f, cls, name, files)
        elif func.startswith("super("):
            inner = find_method(g, next(c for c, m in g.methods if m is method), name, files, above=True)
        if inner:
            # Where it is not called so, or by *args, what is given by name is known all the same.
            with contextlib.suppress(TypeError):
                given = signature(inner[1]).bind("self", *call.args, **given).arguments
        into = next((slot for slot, v in given.items() if isinstance(v, ast.Name) and v.id == embeds), None)
        if into is None:
            continue
        along = {slot: mentioned(value) & images for slot, value in given.items()}
        if inner:
            here = {slot for slot, found in along.items() if found}
            further = find_decoder(f, cls, [*way, (*inner, into)], here, files, load)
            decoders += [f"{func} > {d}" for d in further]
            if further or func.startswith("self."):
                continue
        along = sorted(set().union(*along.values()))
        if along:
            raise Refused(
                f"{g.at(call)}: {what} hands {', '.join(along)} to {func}: images enter inside the decoder too"
            )
        others = load(f"def {name}(") if func.count(".") > 1 and name != "forward" else []
        if any(name == m.name for h in others for _, m in h.methods):
            raise Refused(f"{g.at(call)}: {what} calls {func}, no module's own forward: it may drop tokens")
        decoders.append(func)
    return list(dict.fromkeys(decoders))


def plan_scripts(result: Plan, files: list[File], load) -> None:
    """Lines for each train script that is understood; the others are noted, but not all may be others."""
    problems = []
    for f in files:
        if any(last_name(call) == "HfArgumentParser" for _, call in f.calls):
            try:
                result.scripts.append(plan_script(f, load))
            except Refused as reason:
                problems.append(str(reason))
    if problems and not result.scripts:
        raise Refused("; ".join(problems))
    if not result.scripts:
        problems = [
            f"{result.root}: no script here parses its flags by HfArgumentParser, so none gets --vista; {BY_HAND}"
        ]
    result.skipped += problems


def plan_script(f: File, load) -> dict:
    function, parser = next((s, c) for s, c in f.calls if last_name(c) == "HfArgumentParser")
    made = [a for s, a in f.assigns if s is function and isinstance(a.value, ast.Call)]
    parsed = [a for a in made if last_name(a.value) == "parse_args_into_dataclasses"]
    results = names(parsed[0].targets[0]) if len(parsed) == 1 else []
    kinds = names(parser.args[0]) if parser.args else []
    if not kinds or len(results) < len(kinds):
        raise Refused(f"{f.at(parser)}: the parser does not get dataclasses by name, parsed into as many names")
    calls = [c for s, c in f.calls if s is function and last_name(c).endswith("Trainer")]
    for call in calls:
        if re.search("PO[A-Z]|KTO|Reward", last_name(call)):
            raise Refused(
                f"{f.at(call)}: {last_name(call)} makes a loss of its own from logits, which VISTA is no part of"
            )
    trainers = [a for a in made if last_name(a.value).endswith("Trainer")]
    alone = [names(a.targets[0]) for a in trainers if f.alone(a)]
    if not calls or len(alone) != len(calls) or any(len(name) != 1 for name in alone):
        raise Refused(f"{f.at(parser)}: no trainer is made in this function, or not by a statement `name = ...`")

    # The first that is no TrainingArguments is the model's. Leftover strings may take a last name.
    pairs = zip(results, kinds, strict=False)
    found = [(name, *find_class(kind, f, [f] if kind in f.classes else load(f"class {kind}"))) for name, kind in pairs]
    found = [m for m in found if "TrainingArguments" not in [last_name(base) for base in m[2].bases]]
    if not found:
        raise Refused(f"{f.at(parser)}: the parser is given nothing but TrainingArguments")
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
    if last is None or last.end_lineno > min(f.inserts)[0]:
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


def find_method(
    f: File, cls: ast.ClassDef, name: str, files: list[File], above: bool = False
) -> tuple[File, ast.FunctionDef] | None:
    """The method `name` that `cls` has (unless `above` it is asked for) or inherits from classes of this tree."""
    todo, seen = [(f, cls)], []
    while todo:
        f, cls = todo.pop(0)
        for owner, method in f.methods:
            if owner is cls and method.name == name and (seen or not above):
                return f, method
        seen.append(cls)
        imports = [s for s in f.tree.body if isinstance(s, ast.ImportFrom) and s.module]
        theirs = {a.name for s in imports if s.module.split(".")[0] == "transformers" for a in s.names}
        for base in (last_name(b) for b in cls.bases):
            if base not in theirs and any(base in g.classes for g in files):
                found = find_class(base, f, files)
                todo += [found] if found[1] not in seen else []
    return None


def find_class(name: str, near: File, files: list[File]) -> tuple[File, ast.ClassDef]:
    """The class `name` as `near` imports it, else in the nearest file; refuses where there is none, or two."""

    def shared(f: File) -> int:
        return len(Path(os.path.commonpath([f.name, near.name])).parts)

    imports = [s for s in near.tree.body if isinstance(s, ast.ImportFrom) and name in [a.name for a in s.names]]
    modules = {(s.module or "").rpartition(".")[2] for s in imports}
    found = [f for f in files if name in f.classes]
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


def last_name(node: ast.expr) -> str:
    """`C` of `a.b.C` and of `a.b.C(...)`; empty where there is no such name."""
    node = node.func if isinstance(node, ast.Call) else node
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def names(node: ast.expr) -> list[str]:
    """The names in a tuple or list, or of a single name; empty where a part is anything else."""
    parts = node.elts if isinstance(node, (ast.Tuple, ast.List)) else [node]
    return [p.id for p in parts] if all(isinstance(p, ast.Name) for p in parts) else []


def mentioned(node) -> set[str]:
    """All names that occur in an expression."""
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} if isinstance(node, ast.AST) else set()


def signature(function: ast.FunctionDef) -> inspect.Signature:
    """The function's parameters, with whether they have defaults, for `bind`."""
    kinds, a = inspect.Parameter, function.args
    plain = [*a.posonlyargs, *a.args]
    defaults = [kinds.empty] * (len(plain) - len(a.defaults)) + a.defaults
    kind = [kinds.POSITIONAL_ONLY] * len(a.posonlyargs) + [kinds.POSITIONAL_OR_KEYWORD] * len(a.args)
    found = [kinds(p.arg, k, default=d) for p, k, d in zip(plain, kind, defaults, strict=True)]
    found += [kinds(a.vararg.arg, kinds.VAR_POSITIONAL)] if a.vararg else []
    for p, default in zip(a.kwonlyargs, a.kw_defaults, strict=True):
        found.append(kinds(p.arg, kinds.KEYWORD_ONLY, default=default or kinds.empty))
    return inspect.Signature(found + ([kinds(a.kwarg.arg, kinds.VAR_KEYWORD)] if a.kwarg else []))
