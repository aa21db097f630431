"""From nothing, or from whatever is there, to a complete dataset: look, fetch, check, unpack, count."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from seglight.data.findings import listing
from seglight.prepare.download import Download, download, fault, room
from seglight.prepare.folder import Record, alone
from seglight.prepare.recipe import Archive, Recipe
from seglight.prepare.state import Options, State, as_it_is, own, place, survey
from seglight.prepare.unpack import merge, unpack
from seglight.prepare.words import Bar, PrepareError, Say, shown, silent, size


def prepare(recipe: Recipe, root: Path, options: Options, say: Say = silent, bar: Bar = silent) -> list[State]:
    """Complete a dataset's folder. Can be interrupted at any moment and repeated.

    What is there is kept, and nothing is overwritten or removed, except archives with `options.remove`.

    Args:
        recipe: the dataset.
        root: its folder; it need not exist.
        options: see there.
        say: told what happens.
        bar: told how far it is.

    Returns:
        What is there now. With `options.verify` its numbers are the official ones.

    Raises:
        PrepareError: with all that is missing or wrong, and what to do.
        ValueError: options that name what does not exist.
    """
    if unknown := [part for part in options.parts if part not in recipe.extras]:
        parts = listing(list(recipe.extras)) or "none"
        raise ValueError(f"{recipe.name} has no part {listing(unknown)}. Its parts: {parts}.")
    if options.source is not None and not options.source.is_dir():
        raise ValueError(f"--from {options.source} is no folder.")
    states = survey(recipe, root, options)
    if all(state.complete for state in states) and not options.remove:
        return states
    if missing := [state for state in states if state.todo and not (state.moving or state.file or state.archive.urls)]:
        raise PrepareError(_please(recipe, root, missing))
    with alone(root, say):
        states = survey(recipe, root, options)  # another process may have finished it meanwhile
        _plan(root, states, options, say)
        for state in states:
            if state.todo:
                _complete(state, root, options, say, bar)
        states = survey(recipe, root, options)
        if problems := [text for state in states for text in _problems(state, options)]:
            raise PrepareError("\n".join([f"{root} is not complete:", *(f"  - {text}" for text in problems)]))
        if options.remove:
            _remove(states, root, options, say)
            states = survey(recipe, root, options)
    return states


def _please(recipe: Recipe, root: Path, missing: Sequence[State]) -> str:
    """What a person has to get."""
    lines = ["These files need an account or a form, so nobody but you can get them:"]
    for page in dict.fromkeys(state.archive.page for state in missing):
        lines.append(f"  from {page}")
        lines += [f"    {s.archive.name}  (about {size(s.archive.bytes)})" for s in missing if s.archive.page == page]
    lines.append(f"Put them into {root} and run the same command again, or say where they are: --from DIR.")
    return "\n".join(lines)


def _plan(root: Path, states: Sequence[State], options: Options, say: Say) -> None:
    """Say what is going to happen, and refuse what does not fit on the disk."""
    needed = 0.0
    for state in states:
        archive = state.archive
        about = archive.bytes if options.verify else state.file.stat().st_size if state.file else 0.0
        if not state.todo:
            say(f"have      {archive.name}" + ("" if state.file else ", unpacked"))
            continue
        if state.moving:
            say(f"continue  {archive.name}, unpacked, not yet in its place")
            continue
        as_file = archive.plain or as_it_is(archive, options)
        if not as_file or state.file not in (None, place(archive, root)):
            needed += about
        if state.file:
            say(f"use       {state.file}")
        else:
            needed += max(about - state.part, 0)
            notes = [size(about)] if about else []
            notes += [f"{size(state.part)} of it are here"] if state.part else []
            say(f"download  {archive.name}" + (f" ({', '.join(notes)})" if notes else ""))
    if needed:
        room(root, int(needed), "This")


def _complete(state: State, root: Path, options: Options, say: Say, bar: Bar) -> None:
    """Fetch one archive, check it, unpack it, move its files to their places."""
    archive, record = state.archive, Record(root)
    new, whole = own(root, archive, "unpacking"), own(root, archive, "unpacked")
    if not state.moving:
        file = state.file or _fetch(archive, root, options, say, bar)
        if state.file and options.verify and (wrong := fault(file, archive.size, archive.digest, bar)):
            raise PrepareError(_not_official(file, archive, wrong))
        if options.verify:
            say(f"checked   {_compared(archive)}")
        if archive.plain or (as_it_is(archive, options) and file == place(archive, root)):
            _keep(archive, file, root, options, record, say)
            return
        say(f"unpack    {file.name}")
        _clear(new)
        unpack(file, new / "content", archive.take, bar)
        record.set(archive.name, bytes=file.stat().st_size, verified=options.verify)
        new.rename(whole)  # from here on it is known to be whole
    inside = f"{archive.into}/" if archive.into else ""
    differs = {inside + name: length for name, length in merge(whole / "content", root / archive.into).items()}
    record.set(archive.name, **{**record[archive.name], "counts": archive.unpacked(root), "differs": differs})
    whole.rename(new)  # only files that were not needed are left
    _clear(new)


def _clear(folder: Path) -> None:
    if folder.is_dir():
        shutil.rmtree(folder)


def _fetch(archive: Archive, root: Path, options: Options, say: Say, bar: Bar) -> Path:
    urls = [_on(mirror, archive.name) for mirror in options.mirrors] or archive.urls
    job = Download(
        place(archive, root),
        urls,
        archive.size if options.verify else None,
        archive.digest if options.verify else None,
    )
    say(f"fetch     {shown(urls[0])}")
    try:
        return download(job, lambda text: say(f"          {text}"), bar)
    except PrepareError as error:
        hint = "\nIf a mirror is meant to have other files than the official ones: --no-verify."
        raise PrepareError(f"{error}{hint if options.mirrors and options.verify else ''}") from error


def _on(mirror: str, name: str) -> str:
    parts = urlsplit(mirror)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def _keep(archive: Archive, file: Path, root: Path, options: Options, record: Record, say: Say) -> None:
    """Use a file as it is; one from elsewhere is copied."""
    here = place(archive, root)
    if file != here:
        say(f"copy      {file}")
        here.parent.mkdir(parents=True, exist_ok=True)
        new = here.with_name(f".{here.name}.new")
        shutil.copyfile(file, new)
        new.rename(here)
    found = archive.counted(root)
    if archive.counts and not any(found):
        raise PrepareError(
            f"{file} holds no {listing([count.path for count in archive.counts], 2)}, or its end is missing: a "
            f"download that was interrupted looks like this. Get it again from {archive.page}."
        )
    record.set(archive.name, bytes=here.stat().st_size, verified=options.verify, counts=found)


def _compared(archive: Archive) -> str:
    facts = [f"{archive.size:,} bytes"] if archive.size else []
    facts += [archive.digest.replace(":", " ")] if archive.digest else []
    return ", ".join(facts) or "nothing: no official checksum is known; what it holds is counted"


def _not_official(file: Path, archive: Archive, wrong: str) -> str:
    text = f"{file} {wrong}, as the official one has. Nothing of it was used.\n"
    if archive.size and archive.urls and file.stat().st_size < archive.size:
        text += f"If it is a download that was interrupted, rename it to {file.name}.part: then it is continued.\n"
    return text + "Otherwise move it away and run the same command again, or use it unverified with --no-verify."


def _problems(state: State, options: Options) -> list[str]:
    """Why an archive is still not complete."""
    found = []
    if state.differs:
        names = [f"{name} ({now:,} bytes, {size:,} in it)" for name, (now, size) in state.differs.items()]
        found.append(
            f"Here before, and not as in {state.archive.name}: {listing(names, 3)}. They were kept. Move them away and "
            "run the same command again."
        )
    if options.verify:
        found += [f"{count.what}: {number:,} instead of {count.expected:,}" for count, number in state.wrong()]
    if state.todo and not found:
        found.append(f"{state.archive.name}: its files are not all there.")
    return found


def _remove(states: Sequence[State], root: Path, options: Options, say: Say) -> None:
    """Remove archives whose content is there, counted and equal to the official numbers."""
    for state in states:
        archive, path = state.archive, place(state.archive, root)
        if archive.plain or not path.is_file():
            continue
        unpacked = all(count.fits(number) for count, number in zip(archive.counts, archive.unpacked(root), strict=True))
        if options.verify and unpacked:
            say(f"remove    {path}")
            path.unlink()
        else:
            say(f"keep      {path}: " + ("it is read as it is" if options.verify else "its content is not verified"))
