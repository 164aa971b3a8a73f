"""Records of WebDataset tar files."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from modalora.data.files.limits import MOST_BYTES, Fields
from modalora.data.files.texts import Lines, parse_json
from modalora.errors import DataError

IMAGES = frozenset("jpg jpeg png webp gif bmp tif tiff ppm jp2 avif".split())
SOUNDS = frozenset("wav flac mp3 ogg opus".split())


class Tar:
    """Groups of tar members with one key: "a/7.json", "a/7.jpg" are one record.

    Its fields are those of the .json member; text members stand under their ending (.txt as "text"), pictures and
    sounds under "images" and "audios", or where the JSON names them by ending or file name.
    """

    unit = "record"
    identity = ""

    def __init__(self, path: Path, plain: Path, members: Lines) -> None:
        """path: what messages name. plain: the tar file that is read. members: offset and size of each member."""
        self.path, self.plain, self.members = path, plain, members

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.members)

    def line(self, number: int) -> int:
        """Return its number, counted from 1."""
        return number + 1

    def key(self, number: int) -> str:
        """Return what its members are called before the ending."""
        return str(self.members.read(number)["key"])

    def read(self, number: int) -> Fields:
        """Return one record. Raises DataError when it cannot be read."""
        group = self.members.read(number)
        key, held = group["key"], {}
        with self.plain.open("rb") as file:
            for ending, (offset, size) in group["members"].items():
                if size > MOST_BYTES:
                    raise DataError(f"member {key}.{ending} has {size:,} bytes, and at most {MOST_BYTES:,} are read")
                file.seek(offset)
                held[ending] = file.read(size)
        fields: dict[str, Any] = {}
        for ending, data in held.items():
            if ending == "json":
                fields |= parse_json(data)
        media: dict[str, list[bytes]] = {"images": [], "audios": []}
        for ending, data in held.items():
            kind = ending.rpartition(".")[2]
            if kind in IMAGES | SOUNDS:
                media["images" if kind in IMAGES else "audios"].append(data)
            elif ending != "json":
                name, text = "text" if ending == "txt" else ending, _text(data, f"{key}.{ending}")
                if fields.setdefault(name, text) != text:
                    raise DataError(f"{key}.json has {name!r} and {key}.{ending} says another; keep one of them")
        named = {PurePosixPath(f"{key}.{ending}").name: data for ending, data in held.items()} | held
        return _with_members(fields, media, held, named)


def _text(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise DataError(f"member {name} is not UTF-8 text; save it as UTF-8, or leave it out of the tar") from None


def _with_members(
    fields: dict[str, Any], media: Mapping[str, list[bytes]], members: Mapping[str, bytes], named: Mapping[str, bytes]
) -> dict[str, Any]:
    """Put media where the JSON names them; others of that sort become fields, which no form reads and a check lists."""
    for plural, found in media.items():
        for key in (plural, plural[:-1]):
            if isinstance(given := fields.get(key), str | list):
                names = [given] if isinstance(given, str) else given
                fields[key] = [named.get(name, name) if isinstance(name, str) else name for name in names]
                used = {id(data) for data in fields[key]}
                kept = {id(data) for data in found} - used
                left = [name for name, data in members.items() if id(data) in kept]
                fields |= dict.fromkeys(left, "a member that the JSON does not name")
                break
        else:
            if found:
                fields[plural] = found
    return fields


def index_tar(path: Path, target: Path) -> None:
    """Write key, and offset and size by ending, of every group, a JSON line each."""
    key, members = "", dict[str, tuple[int, int]]()
    try:
        with tarfile.open(path, "r:") as tar, target.open("w", encoding="utf-8") as lines:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                if not member.isfile() or member.issparse():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, ending = name.partition(".")
                own = f"{folder}/{stem}" if folder else stem
                if own != key and members:
                    lines.write(json.dumps({"key": key, "members": members}) + "\n")
                    members = {}
                key = own
                if ending.lower() in members:
                    raise DataError(f"{path} has the member {member.name!r} twice; names must differ")
                members[ending.lower()] = (member.offset_data, member.size)
            if members:
                lines.write(json.dumps({"key": key, "members": members}) + "\n")
            end = tar.offset
        with path.open("rb") as file:  # an unreadable header ends tarfile's reading without a word
            file.seek(end)
            if (block := file.read(512)).strip(b"\0") or len(block) < 512:
                raise DataError(f"{path} is damaged or cut short at byte {end:,}; copy or export it again")
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{path} is no whole tar file ({error}); copy or export it again") from None
