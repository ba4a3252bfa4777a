"""Downloads, unpacks and checks what an experiment's config names; scripts/data/sources.toml says where it comes from.

    python -m scripts.data.download EXPERIMENT [--offline] [--verify]

TO.partial holds what is on its way, and is continued. data/.sums/NAME lists the files of a source that lies whole in
its place, in the form of `sha256sum --check`; it is written last. What lies there already, a link to your own copy for
instance, is counted, hashed once and taken. One process downloads at a time; others wait, and find it done. For a
machine without a network: copy all of data/ to it (rsync -aL), and run this there with --offline --verify.

The hub's usual variables hold: HF_TOKEN, HF_TOKEN_PATH, HF_ENDPOINT (a mirror), HF_HUB_OFFLINE.
HF_HUB_ENABLE_HF_TRANSFER=1 is for lines above 1 Gb/s: a file of the hub that is cut off then starts again.
"""

import argparse
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import stat
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from tqdm import tqdm

from scripts import config

DATA = Path("data")
LOCK = DATA / "sources.lock.json"
CATALOG = Path(__file__).with_name("sources.toml")
AT_ONCE = 4  # sources, files of one, and threads that hash
TRIES = 6  # without a byte more, then it gives up: after 1 + 2 + 4 + 8 + 16 s
UNPACKED = 2  # times an archive's size: pictures do not compress, so what claims more is a bomb
LOCAL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS}


class DataError(Exception):
    """What the user must mend; its text is the whole message."""


@dataclass
class Source:
    """A table of scripts/data/sources.toml, where its keys are explained."""

    name: str
    to: Path
    licence: str = ""
    url: list[str] = field(default_factory=list)
    bytes: int = 0
    sha256: str = ""
    repo: str = ""
    type: str = "model"
    revision: str = ""
    only: list[str] = field(default_factory=list)
    unpack: bool = False
    files: int = 0
    tasks: list[str] = field(default_factory=list)
    rename: dict[str, str] = field(default_factory=dict)
    generation_config: dict[str, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.to = Path(self.to)
        self.sums = DATA / ".sums" / self.name
        self.partial = self.to.with_name(self.to.name + ".partial")
        self.downloads = self.partial / "download"
        self.expected: dict[str, tuple[int, str]] = {}  # file -> bytes, sha256 or ""; plan() fills it in


def say(text: str) -> None:
    tqdm.write(f"data: {text}", file=sys.stderr)


def gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count:,} bytes"


def needed(loaded: dict) -> tuple[list[Source], list[Path], dict[Path, Path]]:
    """Of a config: its sources, the paths that no source provides, and {training JSON: its image folder}."""
    try:
        sources = [Source(name, **table) for name, table in config.tomllib.loads(CATALOG.read_text()).items()]
    except (config.tomllib.TOMLDecodeError, TypeError) as error:
        raise DataError(f"{CATALOG}: {error}") from None
    stages = {Path(s["data_path"]): Path(s["image_folder"]) for s in (loaded["pretrain"], loaded["finetune"])}
    models = {Path(loaded["train"][key]) for key in ("model_name_or_path", "vision_tower")}
    paths, tasks = {*stages, *stages.values(), *models}, set(loaded["tasks"])
    chosen = [s for s in sources if paths & {s.to, *s.to.parents} or tasks & set(s.tasks)]
    provided = {path for source in chosen for path in (source.to, *source.to.parents)}
    return chosen, sorted(paths - provided), stages


# What lies in its place


def files(path: Path) -> list[str]:
    """The files below a folder, links followed: one scan of each folder, no stat of each file. Of a file: itself."""
    if path.is_file():
        return [str(path)]
    return [os.path.join(parent, name) for parent, _, names in os.walk(path, followlinks=True) for name in names]


def hash_all(path: Path) -> dict[str, str]:
    """{file: sha256}"""

    def sha256(file: str) -> str:
        digest = hashlib.sha256()
        with open(file, "rb") as opened:
            while chunk := opened.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()

    found = sorted(files(path))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(zip(found, pool.map(sha256, found), strict=True))


def take(source: Source, path: Path) -> None:
    """Puts a download in place, or takes what the user put there. The list of its files is written last."""
    found = [os.path.relpath(file, path) for file in files(path)]
    lost = [p for p in source.only if path.is_dir() and not source.unpack and not any(fnmatch(f, p) for f in found)]
    if lost or (source.files and len(found) != source.files):
        lack = f"no {lost[0]}" if lost else f"{len(found)} files, not {source.files}"
        raise DataError(f"{path} holds {lack}: complete it, or move it away and run again")
    if path != source.to:
        os.replace(path, source.to)
    sums = hash_all(source.to)
    if source.to.is_file() and source.sha256 not in ("", *sums.values()):
        raise DataError(f"{path} has not the sha256 of sources.toml: move it away and run again")
    mend(source, sums)
    source.sums.parent.mkdir(parents=True, exist_ok=True)
    write(source.sums, "".join(f"{digest}  {file}\n" for file, digest in sorted(sums.items())))
    shutil.rmtree(source.partial, ignore_errors=True)


def mend(source: Source, sums: dict[str, str]) -> None:
    """Changes what scripts/data/sources.toml says must be changed."""
    for old, new in source.rename.items():
        wrong = [file for file in sums if file.endswith(old) and file.removesuffix(old) + new not in sums]
        for file in wrong:
            os.replace(file, file.removesuffix(old) + new)
            sums[file.removesuffix(old) + new] = sums.pop(file)
        if wrong:
            say(f"{source.name}: {len(wrong)} {old} files are now called {new}, as the JSON calls them")
    if source.generation_config:
        file = source.to / "generation_config.json"
        settings = json.loads(file.read_text())
        if settings | source.generation_config != settings:
            write(file, json.dumps(settings | source.generation_config, indent=2))
            sums.update(hash_all(file))
            say(f"{source.name}: {file} now has {source.generation_config}; scripts/data/sources.toml says why")


def write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


def lacking(source: Source, verify: bool) -> str:
    """What a source that was whole lacks now; "" if nothing."""
    sums = {file: digest for digest, file in (line.split("  ", 1) for line in source.sums.read_text().splitlines())}
    found = hash_all(source.to) if verify else dict.fromkeys(files(source.to))
    wrong = [file for file in sums if file not in found or (verify and found[file] != sums[file])]
    what = f"{len(wrong)} of {len(sums)} files {'changed or missing' if verify else 'missing'}, first"
    return f"{source.name}: {what} {wrong[0]}: rm -r {source.to} and run again" if wrong else ""


def check_images(path: Path, folder: Path) -> str:
    """What a training JSON asks for and the folder lacks; "" if nothing. It costs seconds, a failed training hours."""
    try:
        rows = json.loads(path.read_bytes())
        images = [[row["image"]] if isinstance(row.get("image"), str) else row.get("image") or [] for row in rows]
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path} is not a list of conversations: {error}") from None
    asked = {image for row in images for image in row}
    there = {file[len(str(folder)) + 1 :] for file in files(folder)}
    # What stock joins with the folder may also lead out of it.
    missing = [image for image in sorted(asked - there) if not (folder / image).exists()]
    listed = DATA / f"{path.stem}.missing.txt"
    if missing:
        DATA.mkdir(exist_ok=True)
        write(listed, "".join(f"{image}\n" for image in missing))
        first = ", ".join(missing[:3])
        return f"{path}: {len(missing)} of {len(asked)} images are not in {folder}: {first} ... ({listed} has them all)"
    if listed.exists():
        listed.unlink()
    rest = f"{sum(map(bool, images))} with one of {len(asked)} images of {folder}, where all are"
    say(f"{path}: {len(rows)} rows, {rest}; {len(there - asked)} others are there")
    return ""


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
    with open(DATA / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process is at work in data/: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        own = [source for source in todo() if files(source.to)]
        for source in own:
            say(f"{source.name}: {source.to} is there already: hashes it and takes it")
        if errors := each(lambda source: take(source, source.to), own):
            return errors
        left = todo()
        if offline:
            return [f"{source.name} is missing: {source.to}, from {source.repo or source.url[0]}" for source in left]
        locks, guard = json.loads(LOCK.read_text()) if LOCK.exists() else {}, threading.Lock()
        if errors := each(lambda source: plan(source, locks.get(source.name, {})), left, all_of_them=False):
            return errors
        check_disk(left)
        threading.Thread(target=progress, args=[left], daemon=True).start()
        return each(lambda source: get(source, locks, guard), left)


def plan(source: Source, locked: dict) -> None:
    """Asks the hub for the commit, and the names, sizes and hashes of its files."""
    if source.url:
        source.expected = {source.url[0].rsplit("/", 1)[1]: (source.bytes, source.sha256)}
        return
    from huggingface_hub import HfApi

    pinned = source.revision or locked.get("revision", "")
    about = {"repo_type": source.type, "revision": pinned or "main", "files_metadata": True}
    info = attempts(source, lambda: HfApi().repo_info(source.repo, **about))
    if pinned not in ("", info.sha):
        raise DataError(f"the hub gives {info.sha} of {source.repo} for {pinned}")
    source.revision = info.sha
    for pattern in source.only:
        found = [file for file in info.siblings if fnmatch(file.rfilename, pattern)]
        if not found:
            raise DataError(f"{source.repo} has no {pattern}, but {', '.join(f.rfilename for f in info.siblings[:10])}")
        for file in found:
            known = source.sha256 or locked.get("sha256", {}).get(file.rfilename)
            source.expected[file.rfilename] = (file.size, known or (file.lfs.sha256 if file.lfs else ""))


def check_disk(sources: list[Source]) -> None:
    """Before a byte is downloaded: archives, and beside them about as much again when they are unpacked."""
    need: dict[int, int] = {}
    for source in sources:
        folder = next(parent for parent in source.to.parents if parent.exists())
        device = os.stat(folder).st_dev
        whole = sum(count for count, _ in source.expected.values())
        need[device] = need.get(device, 0) + whole * (2 if source.unpack else 1) - size(source.partial)
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
    total = sum(count for source in sources for count, _ in source.expected.values())
    say(f"{len(sources)} to download, {gigabytes(total)}")
    every = 1 if sys.stderr.isatty() else 30
    bar = tqdm(total=total, initial=sum(there.values()), unit="B", unit_scale=True, mininterval=0)
    while True:
        time.sleep(every)
        for source in sources:  # a download's folder goes when it is in place
            there[source.name] = max(there[source.name], size(source.downloads))
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
            text = re.sub(r"\?\S+|(?<=//)[^/@\s]+@", "", f"{causes[-1]}".split("\n")[0])  # no signatures, no secrets
            response = next((c.response for c in causes if getattr(c, "response", None) is not None), None)
            status = response.status_code if response is not None else 0
            if 400 <= status < 500 and status not in (408, 416, 429):
                token = ": what is private or has terms to accept needs HF_TOKEN" if status in (401, 403) else ""
                raise DataError(text + token) from None
            got = size(source.downloads)
            tries, had = 1 if got > had else tries + 1, got
            if tries == TRIES:
                raise DataError(f"{text}: given up after {TRIES} tries; run again to continue") from None
            after = response.headers.get("Retry-After", "") if status else ""
            wait = max(2 ** (tries - 1), int(after) if after.isdigit() else 0)
            say(f"{source.name}: {text}: goes on in {wait} s, with {gigabytes(got)} there")
            time.sleep(wait)


def get(source: Source, locks: dict, guard: threading.Lock) -> None:
    """Downloads, checks, unpacks, puts in place."""
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
    with guard:
        locked = {"sha256": found} | ({"revision": source.revision} if source.repo else {})
        if locked != locks.get(source.name):
            trusted = [f"{file} has sha256 {digest}" for file, digest in found.items() if not source.expected[file][1]]
            what = f"{source.repo}@{source.revision}" if source.repo else url
            more = f", and {len(trusted) - 1} more files" if len(trusted) > 1 else ""
            say(f"{source.name}: {what}" + (f"; trusted at first use: {trusted[0]}{more}" if trusted else ""))
            locks[source.name] = locked
            write(LOCK, json.dumps(locks, indent=1, sort_keys=True))
    path = source.downloads
    if source.unpack:
        path = source.partial / "files"
        unpack(source, source.downloads / next(iter(found)), path)
    take(source, path / next(iter(found)) if source.to.suffix == ".json" else path)


def get_hub(source: Source) -> None:
    from huggingface_hub import snapshot_download

    snapshot_download(
        source.repo,
        repo_type=source.type,
        revision=source.revision,
        local_dir=source.downloads,
        allow_patterns=list(source.expected),
        max_workers=AT_ONCE,
    )
    shutil.rmtree(source.downloads / ".cache", ignore_errors=True)  # its notes on what it was at


def get_url(source: Source, url: str) -> None:
    """Appends what is still to come."""
    import requests

    ((name, (count, _)),) = source.expected.items()
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
        with open(path, "ab" if response.status_code == 206 else "wb") as file:
            for chunk in response.iter_content(1 << 18):
                file.write(chunk)


def check_hashes(source: Source) -> dict[str, str]:
    """{file: sha256} of a finished download; a wrong one is deleted."""
    found = {os.path.relpath(path, source.downloads): digest for path, digest in hash_all(source.downloads).items()}
    for file, digest in found.items():
        _, right = source.expected.get(file, (0, "none: the source has no such file"))
        if right not in ("", digest):
            (source.downloads / file).unlink()
            raise DataError(f"{file} has sha256 {digest}, not {right}: deleted")
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
        if {"", ".", ".."} & set(name.removesuffix("/").split("/")) or "\\" in name or "\n" in name:
            raise zipfile.BadZipFile(f"{name!r} leads out of its folder")
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise zipfile.BadZipFile(f"{name!r} is a link or a device")
        if name in members:
            raise zipfile.BadZipFile(f"{name!r} is there twice")
        if not member.is_dir():
            members[name] = member
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
    parser.add_argument("--offline", action="store_true", help="no network: only check, and name what is missing")
    parser.add_argument("--verify", action="store_true", help="hash every file again")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # at once: it all continues
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # goes to other addresses than HF_ENDPOINT
    offline = args.offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    try:
        sources, own, stages = needed(config.load(args.experiment))
        problems = [f"{args.experiment} needs {path}, which is not there" for path in own if not path.exists()]
        problems += bring(sources, offline)
        if not problems:
            problems = list(filter(None, (lacking(source, args.verify) for source in sources)))
        if not problems:
            problems = list(filter(None, (check_images(*stage) for stage in stages.items())))
    except config.ConfigError as error:
        print(f"config: {error}", file=sys.stderr)
        return 2
    except (DataError, OSError) as error:
        problems = [str(error)]
    for problem in problems:
        say(problem)
    if not problems:
        say(f"{args.experiment}: all there" + (", every file as it was" if args.verify and sources else ""))
    return 2 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
