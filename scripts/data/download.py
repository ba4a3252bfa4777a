"""Downloads, unpacks and checks what an experiment's config names; scripts/data/sources.toml says where it comes from.

    python -m scripts.data.download EXPERIMENT [--tasks TASK...] [--offline] [--verify]

TO.partial holds what is on its way, and is continued. data/.sums/NAME lists the files of a source that lies whole in
its place, in the form of `sha256sum --check`; it is written last. What lies there already, a link to your own copy for
instance, is counted, hashed once and taken as it is, or refused: nothing in it is changed. One process downloads at a
time; others wait, and find it done. For a machine without a network: copy all of data/ to it (rsync -aL), and run this
there with --offline --verify. docs/security.md says what is checked and what is trusted.

The hub's usual variables hold: HF_TOKEN, HF_TOKEN_PATH, HF_ENDPOINT (a mirror), HF_HUB_OFFLINE.
HF_HUB_ENABLE_HF_TRANSFER=1 is for lines above 1 Gb/s: a file of the hub that is cut off then starts again.
"""

import argparse
import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import signal
import stat
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from scripts import config
from scripts.common import lock, sha256, write_whole
from scripts.data import rows, subset, weights
from scripts.data.catalog import CATALOG, DATA, DataError, Expected, Source, needed
from scripts.data.disk import ends_where_nobody_reads, files, hash_all, say
from scripts.outside import checked_name, matches, scrub

LOCK = DATA / "sources.lock.json"
AT_ONCE = 4  # sources, and files of one
LONGEST = 600  # seconds that a server may make it wait
TRIES = 6  # without a byte more, then it gives up: after 1 + 2 + 4 + 8 + 16 s
UNPACKED = 2  # times an archive's size: pictures do not compress, so what claims more is a bomb
LOCAL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS}


def gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count:,} bytes"


# What lies in its place


def check_count(source: Source, path: Path) -> None:
    """Raises DataError unless `path` holds files of every kind, and as many, as the catalog says."""
    found = [os.path.relpath(file, path) for file in files(path)]
    for name in found if path.is_dir() else []:
        checked_name(name)
    only = chosen(source.only, found) if path.is_dir() and not source.unpack else {}
    lost = [pattern for pattern, names in only.items() if not names]
    if lost or (source.files and len(found) != source.files):
        lack = f"no {lost[0]}" if lost else f"{len(found)} files, not {source.files}"
        raise DataError(f"{path} holds {lack}: complete it, or move it away and run again")


def take(source: Source) -> None:
    """Takes what the user put in a source's place, as it is. Raises DataError where it would have to be changed."""
    check_count(source, source.to)
    away = f"or move {source.to} away and run again"
    if wrong := misnamed(source, files(source.to)):
        ((old, new),) = source.rename.items()
        raise DataError(f"{len(wrong)} files end in {old}, first {wrong[0]}; the JSON says {new}: rename them, {away}")
    if (settings := generation_config(source, source.to)) is not None:
        file, why = source.to / "generation_config.json", "without it training fails at its last save"
        raise DataError(f"{file} lacks {source.generation_config}, {why}: write {json.dumps(settings)} there, {away}")
    if source.to.is_dir() and (pickles := weights.pickled(source.to)):
        convert = f".venv/bin/python -m scripts.data.weights {source.to} makes safetensors of it"
        raise DataError(f"{pickles[0]} is a pickle, which can run code when training loads it: {convert}, {away}")
    sums = hash_all(source.to)
    if source.to.is_file() and source.sha256 not in ("", *sums.values()):
        raise DataError(f"{source.to} has not the sha256 of sources.toml: move it away and run again")
    record(source, sums)


def check_part(source: Source) -> None:
    """Makes a list that is a part of another one where it is missing. Raises DataError where another list is there, or
    where the rule gives another one than at its first use."""
    there = source.to.is_file()
    if there and source.sums.is_file() and source.sums.read_text("utf-8").split("  ")[0] == sha256(source.to):
        return
    made = subset.part(Path(source.of), source.below, source.every)
    rule = subset.rule(Path(source.of), source.below, source.every)
    digest, locks = hashlib.sha256(made).hexdigest(), read_locks()
    if there and source.to.read_bytes() != made:
        raise DataError(f"{source.to} is not {rule}: move it away and run again")
    where, trusted = LOCK, locks.get(source.name, {}).get("sha256", {}).get(source.to.name)
    if source.sha256:
        where, trusted = CATALOG, source.sha256
    if trusted not in (None, digest):
        raise DataError(f"{source.name}: {rule} has sha256 {digest}, and {where} says {trusted}: if the other list is "
                        "meant, remove the hash there")  # fmt: skip
    if not there:
        source.to.parent.mkdir(parents=True, exist_ok=True)
        write_whole(source.to, made)
        say(f"{source.name}: {source.to} is {rule}; trusted at first use: it has sha256 {digest}")
    locks[source.name] = {"sha256": {source.to.name: digest}}
    write_whole(LOCK, json.dumps(locks, indent=1, sort_keys=True))
    record(source, {str(source.to): digest})


def record(source: Source, sums: dict[str, str]) -> None:
    """Notes that a source is whole: the last step."""
    source.sums.parent.mkdir(parents=True, exist_ok=True)
    write_whole(source.sums, "".join(f"{digest}  {file}\n" for file, digest in sorted(sums.items())))


def misnamed(source: Source, found: list[str]) -> list[str]:
    """The files whose ending the catalog says to change."""
    there = set(found)
    return [
        file
        for old, new in source.rename.items()
        for file in found
        if file.endswith(old) and file.removesuffix(old) + new not in there
    ]


def generation_config(source: Source, folder: Path) -> dict | None:
    """What generation_config.json must say, by the catalog; None where it says so."""
    if not source.generation_config:
        return None
    settings = json.loads((folder / "generation_config.json").read_text("utf-8"))
    if not isinstance(settings, dict):
        raise DataError(f"{folder}/generation_config.json holds no settings")
    wanted = settings | source.generation_config
    return None if wanted == settings else wanted


def mend(source: Source, path: Path) -> None:
    """Changes what the catalog says must be changed, in a download that is not in its place yet."""
    wrong = misnamed(source, files(path))
    for old, new in source.rename.items():
        for file in wrong:
            os.replace(file, file.removesuffix(old) + new)
        if wrong:
            say(f"{source.name}: {len(wrong)} {old} files are now called {new}, as the JSON calls them")
    if (settings := generation_config(source, path)) is not None:
        write_whole(path / "generation_config.json", json.dumps(settings, indent=2))
        say(f"{source.name}: generation_config.json now has {source.generation_config}; {CATALOG.name} says why")
    if path.is_dir() and not source.unpack and (pickles := weights.convert(path)):
        for pickled in [*pickles, *path.glob("*.bin.index.json")]:
            pickled.unlink()
        say(f"{source.name}: {len(pickles)} pickled weight files, first {pickles[0].name}, are now safetensors")


def lacking(source: Source, verify: bool) -> str:
    """What a source that was whole lacks now; "" if nothing."""
    lines = source.sums.read_text("utf-8", "surrogateescape").removesuffix("\n").split("\n")
    sums = {file: digest for digest, file in (line.split("  ", 1) for line in lines)}
    found = hash_all(source.to) if verify else dict.fromkeys(files(source.to))
    wrong = [file for file in sums if file not in found or (verify and found[file] != sums[file])]
    what = f"{len(wrong)} of {len(sums)} files {'changed or missing' if verify else 'missing'}, first"
    return f"{source.name}: {what} {wrong[0]}: rm -r {source.to} and run again" if wrong else ""


# Download


def bring(sources: list[Source], offline: bool) -> list[str]:
    """Downloads what is not whole yet. Returns what failed, or under --offline what is missing."""

    def todo() -> list[Source]:
        return [source for source in sources if not (source.sums.exists() and source.to.exists())]

    def each(step: Callable[[Source], None], them: list[Source], all_of_them: bool = True) -> list[str]:
        errors: list[str] = []

        def try_it(source: Source) -> None:
            try:
                if all_of_them or not errors:
                    step(source)
            except (DataError, OSError, ValueError) as error:
                errors.append(f"{source.name}: {error}")

        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(try_it, them))
        return errors

    if not todo():
        return []
    DATA.mkdir(exist_ok=True)
    with alone(DATA / ".lock"):
        own = [source for source in todo() if files(source.to)]
        for source in own:
            say(f"{source.name}: {source.to} is there already: trusts it as it is, and hashes it")
        if errors := each(take, own):
            return errors
        left = todo()
        if offline:
            return [f"{source.name} is missing: {source.to}, from {source.repo or source.url[0]}" for source in left]
        locks, guard = read_locks(), threading.Lock()
        if any(source.repo for source in left):
            warn_of_token()
        if errors := each(lambda source: plan(source, locks.get(source.name, {})), left, all_of_them=False):
            return errors
        check_disk(left)
        threading.Thread(target=progress, args=[left], daemon=True).start()
        return each(lambda source: get(source, locks, guard), left)


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Waits until no other process has this lock, and has it."""
    try:
        held = lock(path, say, lambda: say("another process is at work in data/: waiting for it"))
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise DataError(f"{path} is a link, which no lock is: remove it") from None
        raise
    try:
        yield
    finally:
        os.close(held)


def read_locks() -> dict[str, dict]:
    """What was trusted at its first use: {source: {"revision": ..., "sha256": {file: ...}}}"""
    if not LOCK.exists():
        return {}
    try:
        locks = json.loads(LOCK.read_text("utf-8"))
        if not all(isinstance(entry.get("sha256"), dict) for entry in locks.values()):
            raise ValueError("an entry has no hashes")
    except (ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{LOCK} is damaged ({error}): mend it, or move it away to trust what comes next") from None
    return locks


def warn_of_token() -> None:
    """Says that the user's token goes where it may not belong."""
    from huggingface_hub import constants, get_token

    address = urlsplit(constants.ENDPOINT)
    at_home = (address.hostname or "").endswith(("huggingface.co", "hf.co"))
    if get_token() and (address.scheme != "https" or not at_home):
        how = "" if address.scheme == "https" else ", unencrypted"
        say(f"warning: your Hugging Face token goes to {constants.ENDPOINT}{how}, as HF_ENDPOINT says: unset HF_TOKEN "
            "unless that is meant (HF_TOKEN_PATH=/dev/null where you are logged in)")  # fmt: skip


def chosen(patterns: list[str], names: Iterable[str]) -> dict[str, list[str]]:
    """{pattern: the names that fit it}; safetensors in the place of pickled weights (*.bin), where there are any."""
    names = list(names)
    safe = any(matches(name, weights.SAFE) for name in names)
    patterns = [weights.SAFE if safe and pattern.endswith(".bin") else pattern for pattern in patterns]
    return {pattern: [name for name in names if matches(name, pattern)] for pattern in patterns}


def plan(source: Source, locked: dict) -> None:
    """Asks the hub for the commit, and the names, sizes and hashes of its files."""
    work = (source.partial, source.downloads, source.partial / "files")
    strange = set(os.listdir(source.partial)) - {"download", "files"} if source.partial.is_dir() else set()
    if strange or any(folder.is_symlink() for folder in work):
        raise DataError(f"{source.partial} is where this works, and holds what others put there: move it away")
    if source.url:
        source.expected = {source.url[0].rsplit("/", 1)[1]: Expected(source.bytes, source.sha256, bool(source.sha256))}
        return
    from huggingface_hub import HfApi

    pinned = source.revision or locked.get("revision", "")
    about: dict[str, Any] = {"repo_type": source.type, "revision": pinned or "main", "files_metadata": True}
    info = attempts(source, lambda: HfApi().repo_info(source.repo, **about))
    if pinned not in ("", info.sha):
        raise DataError(f"the hub gives {info.sha} of {source.repo} for {pinned}")
    source.revision = info.sha
    listed = {checked_name(file.rfilename): file for file in info.siblings or []}
    for pattern, names in chosen(source.only, listed).items():
        if not names:
            raise DataError(f"{source.repo} has no {pattern}, but {', '.join(list(listed)[:10])}")
        for name in names:
            file, pin = listed[name], source.sha256 or locked.get("sha256", {}).get(name, "")
            if not isinstance(file.size, int):
                raise DataError(f"the hub tells no size of {name} in {source.repo}")
            source.expected[name] = Expected(file.size, pin or (file.lfs.sha256 if file.lfs else ""), bool(pin))


def check_disk(sources: list[Source]) -> None:
    """Before a byte is downloaded: archives, and beside them about as much again when they are unpacked."""
    need: dict[int, int] = {}
    for source in sources:
        folder = next(parent for parent in source.to.parents if parent.exists())
        device = os.stat(folder).st_dev
        whole = sum(file.bytes for file in source.expected.values())
        twice = source.unpack or any(matches(name, weights.PICKLED) for name in source.expected)
        need[device] = need.get(device, 0) + whole * (2 if twice else 1) - size(source.partial)
        if need[device] > (free := shutil.disk_usage(folder).free):
            needs = f"{source.name} and those before it need {gigabytes(need[device])}"
            raise DataError(f"{needs} of disk, {gigabytes(free)} are free at {folder}: make room, or link it elsewhere")


def size(folder: Path) -> int:
    """Bytes on disk: a file that hf_transfer fills from several places is long from its start."""
    total = 0
    for file in files(folder):
        try:
            found = os.stat(file)
        except FileNotFoundError:  # moved meanwhile
            continue
        total += min(found.st_size, found.st_blocks * 512)
    return total


def progress(sources: list[Source]) -> None:
    """A bar of all downloads together; a line every half minute where no one watches."""
    there = {source.name: size(source.downloads) for source in sources}
    total = sum(file.bytes for source in sources for file in source.expected.values())
    say(f"{len(sources)} to download, {gigabytes(total)}")
    every = 1 if sys.stderr.isatty() else 30
    with ends_where_nobody_reads():
        bar = tqdm(total=total, initial=sum(there.values()), unit="B", unit_scale=True, mininterval=0)
    while True:
        time.sleep(every)
        for source in sources:  # a download's folder goes when it is in place
            there[source.name] = max(there[source.name], size(source.downloads))
        with ends_where_nobody_reads():
            bar.update(sum(there.values()) - bar.n)


def attempts(source: Source, once: Callable):
    """What once() returns. Tries again while the network is to blame, and gives up after TRIES without a byte more."""
    tries, had = 0, -1
    while True:
        try:
            return once()
        except (OSError, RuntimeError) as error:  # requests' are OSErrors, hf_transfer's RuntimeErrors
            causes: list[BaseException] = [error]
            while cause := causes[-1].__cause__ or causes[-1].__context__:
                causes.append(cause)
            if LOCAL & {getattr(c, "errno", None) for c in causes} or "No space left" in str(causes[-1]):
                raise DataError(f"{causes[-1]}: mend that and run again, it continues") from None
            said = [cause for cause in causes if isinstance(cause, (OSError, RuntimeError))][-1]
            text = scrub(str(said).split("\n")[0])
            responses = [given for c in causes if (given := getattr(c, "response", None)) is not None]
            response = responses[0] if responses else None
            status = response.status_code if response is not None else 0
            if 400 <= status < 500 and status not in (408, 416, 429):
                token = ": what is private or has terms to accept needs HF_TOKEN" if status in (401, 403) else ""
                raise DataError(text + token) from None
            got = size(source.downloads)
            tries, had = 1 if got > had else tries + 1, got
            if tries == TRIES:
                raise DataError(f"{text}: given up after {TRIES} tries; run again to continue") from None
            after = response.headers.get("Retry-After", "") if response is not None else ""
            wait = max(2 ** (tries - 1), min(int(after), LONGEST) if after.isdecimal() else 0)
            say(f"{source.name}: {text}: goes on in {wait} s, with {gigabytes(got)} there")
            time.sleep(wait)


def get(source: Source, locks: dict, guard: threading.Lock) -> None:
    """Downloads, checks, unpacks, mends, puts in place; then locks what was trusted, and notes that it is whole."""
    source.downloads.mkdir(parents=True, exist_ok=True)
    for url in source.url or [""]:
        try:
            attempts(source, lambda url=url: get_url(source, url) if url else get_hub(source))
            found = check_hashes(source)
            break
        except DataError as error:
            if url == (source.url or [""])[-1]:
                raise
            say(f"{source.name}: {error}; trying the mirror")
    path = source.downloads
    if source.unpack:
        (name,) = found
        path = source.partial / "files"
        try:
            unpack(source, source.downloads / name, path)
        except DataError as error:
            if source.expected[name].pinned:
                raise
            shutil.rmtree(source.partial)  # what no one vouches for may be better the next time
            raise DataError(f"{error}: deleted; run again to download it anew") from None
    check_count(source, path)
    mend(source, path)
    if source.to.suffix == ".json":
        (name,) = found
        path = path / name
    sums = {os.path.join(source.to, os.path.relpath(file, path)) if path.is_dir() else str(source.to): digest
            for file, digest in hash_all(path).items()}  # fmt: skip
    with guard:
        pin(source, locks, found, url)
    os.replace(path, source.to)
    record(source, sums)
    shutil.rmtree(source.partial, ignore_errors=True)


def pin(source: Source, locks: dict, found: dict[str, str], url: str) -> None:
    """Keeps the revision and the hashes of a whole source, and tells which of them no one vouched for."""
    entry = {"sha256": found} | ({"revision": source.revision} if source.repo else {})
    if entry == locks.get(source.name):
        return
    say(f"{source.name}: {f'{source.repo}@{source.revision}' if source.repo else url}")
    trusted = [name for name in found if not source.expected[name].pinned]
    heavy = [name for name in trusted if matches(name, weights.SAFE) or matches(name, weights.PICKLED)]
    rest = [name for name in trusted if name not in heavy]
    for name in heavy + rest[:1]:
        more = f", and {len(rest) - 1} more files" if name in rest and len(rest) > 1 else ""
        say(f"{source.name}: trusted at first use: {name} has sha256 {found[name]}{more}")
    locks[source.name] = entry
    write_whole(LOCK, json.dumps(locks, indent=1, sort_keys=True))


class Bounded(io.BufferedWriter):
    """A file that takes no more than was announced."""

    def __init__(self, path: Path, mode: str, count: int):
        super().__init__(io.FileIO(str(path), mode))  # hf_transfer wants a str for a name
        self.count = count

    def write(self, data) -> int:
        if self.tell() + len(data) > self.count:
            self.truncate(0)
            raise DataError(f"{os.path.basename(self.name)} goes on after the {self.count:,} bytes announced: deleted")
        return super().write(data)


def get_hub(source: Source) -> None:
    """Each file by its name: what a listing says the second time is not asked."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    def get_file(name: str) -> None:
        path, count = source.downloads / name, source.expected[name].bytes
        partial = path.with_name(path.name + ".incomplete")
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        have = partial.stat().st_size if partial.exists() else 0
        if have > count or constants.HF_HUB_ENABLE_HF_TRANSFER:  # which leaves holes
            partial.unlink(missing_ok=True)
            have = 0
        url = hf_hub_url(source.repo, name, repo_type=source.type, revision=source.revision)
        with Bounded(partial, "ab", count) as file:
            http_get(url, file, resume_size=have, headers=build_hf_headers(), expected_size=count)
        os.replace(partial, path)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(get_file, source.expected))


def get_url(source: Source, url: str) -> None:
    """Appends what is still to come."""
    import requests

    ((name, (count, *_)),) = source.expected.items()
    path = source.downloads / name
    have = path.stat().st_size if path.exists() else 0
    if have == count:
        return
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=30) as response:
        if response.status_code == 416:
            path.unlink()
        response.raise_for_status()
        length = response.headers.get("Content-Range", response.headers.get("Content-Length", "")).rsplit("/", 1)[-1]
        if length != str(count):
            raise DataError(f"{url} has {length} bytes, not {count}")
        with Bounded(path, "ab" if response.status_code == 206 else "wb", count) as file:
            for chunk in response.iter_content(1 << 18):
                file.write(chunk)


def check_hashes(source: Source) -> dict[str, str]:
    """{file: sha256} of a finished download; a wrong one is deleted."""
    found = {os.path.relpath(path, source.downloads): digest for path, digest in hash_all(source.downloads).items()}
    for file in found.keys() - source.expected.keys():  # left by a process that was killed
        (source.downloads / file).unlink()
        del found[file]
    for file, digest in found.items():
        right = source.expected[file].sha256
        if right not in ("", digest):
            (source.downloads / file).unlink()
            hint = ""
            if source.expected[file].pinned and not source.sha256:
                hint = f"; the other is in {LOCK} since its first use: if this one is right, remove {source.name} there"
            raise DataError(f"{file} has sha256 {digest}, not {right}: deleted{hint}")
    return found


# Archives


def unpack(source: Source, path: Path, out: Path) -> None:
    """Unpacks a zip, nothing but plain files, all of them below `out`; what is there and whole is left as it is."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = checked_members(source, archive, path.stat().st_size)
            say(f"{source.name}: unpacks {len(members)} files")
            for name, member in members.items():
                target = out / name
                there = target.exists() and target.stat().st_size == member.file_size
                if there and zlib.crc32(target.read_bytes()) == member.CRC:
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as packed, open(target, "wb") as file:
                    shutil.copyfileobj(packed, file, 1 << 20)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, zlib.error) as error:
        raise DataError(f"{path.name} is refused: {error}") from None


def checked_members(source: Source, archive: zipfile.ZipFile, count: int) -> dict[str, zipfile.ZipInfo]:
    """{path without the folder that all have in common: member}. Raises BadZipFile for what no data set holds."""
    members = {}
    for member in archive.infolist():
        name, kind = member.filename, stat.S_IFMT(member.external_attr >> 16)
        try:
            checked_name(name.removesuffix("/"))
        except ValueError as error:
            raise zipfile.BadZipFile(str(error)) from None
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise zipfile.BadZipFile(f"{name!r} is a link or a device")
        if name in members:
            raise zipfile.BadZipFile(f"{name!r} is there twice")
        if not member.is_dir():
            members[name] = member
    if both := next((name for name in members if any(str(p) in members for p in Path(name).parents)), None):
        raise zipfile.BadZipFile(f"{both!r} lies below a file")
    unpacked = sum(member.file_size for member in members.values())
    if unpacked > UNPACKED * count:
        raise zipfile.BadZipFile(f"its {gigabytes(count)} would become {gigabytes(unpacked)}")
    if not members or (source.files and len(members) != source.files):
        raise zipfile.BadZipFile(f"it holds {len(members)} files, not {source.files or 'some'}")
    common = os.path.commonpath([os.path.dirname(name) for name in members])
    return {os.path.relpath(name, common) if common else name: member for name, member in members.items()}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/data.sh", allow_abbrev=False)
    parser.add_argument("experiment")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="the data sets of these instead of the config's")
    parser.add_argument("--offline", action="store_true", help="no network: only check, and name what is missing")
    parser.add_argument("--verify", action="store_true", help="hash every file again")
    parser.add_argument("--decode", action="store_true", help="decode every picture whole, not only its header")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # at once: it all continues
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # goes to other addresses than HF_ENDPOINT
    offline = args.offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    try:
        loaded = config.load(args.experiment, tasks=args.tasks)
        sources, own = needed(loaded)
        stages = [] if loaded["checkpoint"] else [rows.Stage.of(loaded, stage) for stage in config.STAGES]
        problems = [f"{args.experiment} needs {path}, which is not there" for path in own if not path.exists()]
        parts = [source for source in sources if source.of]
        problems += bring([source for source in sources if not source.of], offline)
        for source in parts if not problems else []:
            with alone(DATA / ".lock"):
                check_part(source)
        if not problems:
            problems = list(filter(None, (lacking(source, args.verify) for source in sources)))
        if not problems:
            problems = [problem for stage in stages for problem in rows.check(stage, args.decode)]
    except config.ConfigError as error:
        print(f"config: {error}", file=sys.stderr)
        return 2
    except (DataError, OSError, ValueError) as error:
        problems = [str(error)]
    for problem in problems:
        say(problem)
    if not problems:
        say(f"{args.experiment}: all there" + (", every file as it was" if args.verify and sources else ""))
    return 2 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
