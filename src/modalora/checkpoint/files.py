"""Files of a model folder: JSON, manifests and safetensors, checked before they are believed.

A folder is written whole or not at all. Nothing is read that lies outside it (a Hugging Face cache, whose snapshots are
links into its blobs, is one folder), no pickle is opened, and headers are checked before a tensor is made of them.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import re
import shutil
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from modalora.disk import CONFIG_BYTES, check_file, digest, draft_beside, parse_json, read_json, write_json
from modalora.errors import CheckpointError, WorkError, listed

FORMAT = 1
MANIFEST = "manifest.json"
MOST_TENSORS = 20_000


@dataclass(frozen=True, slots=True)
class Bounds:
    """The most that a kind of JSON file holds; brackets, colons and commas within words are counted too."""

    size: int  # bytes
    nested: int  # lists and objects
    pairs: int  # of a key and a value
    items: int  # commas

    def check(self, text: bytes) -> None:
        """Refuse a text that would take long to parse. Raises CheckpointError, without the file's name."""
        if (found := text.count(b"[") + text.count(b"{")) > self.nested:
            raise CheckpointError(f"it nests {found:,} lists and objects; at most {self.nested:,} are read")
        if (found := text.count(b":")) > self.pairs:
            raise CheckpointError(f"it has {found:,} keys; at most {self.pairs:,} are read")
        if (found := text.count(b",")) > self.items:
            raise CheckpointError(f"it lists {found:,} things; at most {self.items:,} are read")

    def check_file(self, path: Path) -> None:
        """Refuse a file that would take long to read. Raises CheckpointError; an absent file passes."""
        check_file(path, self.size)
        if path.is_file():
            try:
                self.check(path.read_bytes())
            except CheckpointError as error:
                raise CheckpointError(f"{path} is no file of its kind: {error}") from None


# a tensor has three lists and objects, four keys and up to eleven commas; the rest is for metadata
_HEADER = Bounds(4_000_000, nested=4 * MOST_TENSORS, pairs=5 * MOST_TENSORS, items=11 * MOST_TENSORS)
_INDEX = Bounds(4_000_000, nested=1000, pairs=2 * MOST_TENSORS, items=2 * MOST_TENSORS)  # a file name for each tensor
# o200k, the largest of a Phi model: 15.5 MB, 200,000 words, twice as many merges, which may be lists of two
RANKS_BYTES = 4_000_000  # cl100k: 1.7 MB
TOKENIZER_BOUNDS = Bounds(32_000_000, nested=700_000, pairs=500_000, items=2_000_000)
_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32,
    "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAME = re.compile(r"[\w./-]{1,250}", re.ASCII)
_TOLD = 20  # files in one message
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file named by another file. Raises CheckpointError when it leads out of the folder."""
    path = folder / name
    root = folder.resolve()
    # a Hugging Face cache keeps the files beside its snapshots, under their hashes
    roots = [root, *(one.parent / "blobs" for one in root.parents if one.name == "snapshots")]
    if not _lies_in(path, roots):
        raise CheckpointError(
            f"{folder} names the file {name!r:.120}, which lies outside the folder; it was not opened"
        )
    return path


def _lies_in(path: Path, roots: Sequence[Path]) -> bool:
    try:
        resolved = path.resolve()
        with suppress(FileNotFoundError, NotADirectoryError):
            path.stat()  # wrong names are errors only here; from Python 3.13 so are circles
    except (OSError, RuntimeError, ValueError):  # links in a circle, zeros and surrogates in a name
        return False
    return any(resolved.is_relative_to(root) for root in roots)


def write_folder(folder: Path, fill: Callable[[Path], None], *, manifest: bool = True) -> None:
    """Create `folder` from what `fill` writes into a draft beside it, then rename: a reader sees all of it or none.

    manifest: list every file with its SHA-256. Raises CheckpointError when the folder exists.
    """
    if folder.exists():
        raise CheckpointError(f"{folder} exists; give a new folder, nothing was written")
    draft = draft_beside(folder)
    try:
        draft.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be made: {error.strerror} ({error.filename}); give a folder that can be written"
        ) from None
    try:
        fill(draft)
        seal(draft, manifest=manifest)
        draft.rename(folder)
        sync(folder.parent)
    except (OSError, SafetensorError) as error:
        raise WorkError(f"{folder} could not be written, and nothing of it is left: {error}") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def seal(draft: Path, *, manifest: bool = True) -> None:
    """List every file of a draft with its SHA-256, and wait until files and folders are on the disk.

    Files get the rights that the draft was made with, the umask's: safetensors opens its own to one user alone.
    """
    rights = draft.stat().st_mode & 0o666
    for path in draft.rglob("*"):
        if path.is_file() and path.stat().st_mode & 0o666 != rights:
            path.chmod(rights)
    if manifest:
        files = {
            path.relative_to(draft).as_posix(): {"bytes": path.stat().st_size, "sha256": digest(path)}
            for path in sorted(draft.rglob("*"))
            if path.is_file()
        }
        write_json(draft / MANIFEST, {"format": FORMAT, "files": files})
    for path in [*draft.rglob("*"), draft]:
        sync(path)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def weights_digest(folder: Path) -> str | None:
    """Return what tells a folder's weights from others, by its manifest; None where it has none."""
    try:
        files: Any = read_json(folder / MANIFEST, most=CONFIG_BYTES)["files"]
        listed = sorted((name, told["sha256"]) for name, told in files.items() if name.endswith(".safetensors"))
    except (AttributeError, CheckpointError, KeyError, TypeError):
        return None
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest() if listed else None


def check_folder(folder: Path) -> None:
    """Refuse what is no folder, where a model's is wanted. Raises CheckpointError."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give a model folder or the name of a bundled model")


def check_manifest(folder: Path, needed: Sequence[str] = ()) -> None:
    """Compare every file that the manifest lists with it; the needed ones must be listed.

    Raises CheckpointError naming each file that is missing, altered, unlisted or outside the folder.
    """
    check_folder(folder)
    manifest = read_json(folder / MANIFEST, most=CONFIG_BYTES)
    files: Any = manifest.get("files")
    whole = isinstance(files, dict) and all(isinstance(told, dict) for told in files.values())
    if manifest.get("format") != FORMAT or not whole:
        raise CheckpointError(f"{folder / MANIFEST} is not a manifest of format {FORMAT}")
    if len(files) > MOST_TENSORS:
        raise CheckpointError(f"{folder / MANIFEST} lists {len(files):,} files; at most {MOST_TENSORS:,} are read")
    wrong = [f"{name} is not in the manifest" for name in needed if name not in files]
    for name, told in files.items():
        path = folder / name
        if not _lies_in(path, [folder.resolve()]):
            wrong.append(f"{name!r:.120} lies outside the folder")
        elif not path.is_file():
            wrong.append(f"{name} is missing")
        elif path.stat().st_size != told.get("bytes"):
            wrong.append(f"{name} has {path.stat().st_size} bytes, the manifest says {told.get('bytes')}")
        elif digest(path) != told.get("sha256"):
            wrong.append(f"{name} was altered: its SHA-256 is not the manifest's")
    if wrong:
        raise CheckpointError(
            f"{folder} fails its manifest: {listed(wrong, _TOLD)}; copy the folder again from its source"
        )


@dataclass(frozen=True, slots=True)
class Entry:
    """What a header tells of a tensor."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


class Weights:
    """The tensors of a folder, in one safetensors file or in shards with an index, memory-mapped.

    entries: what the headers tell, by stored name. metadata: of a single file. `get` gives a view of the file, whose
    pages are read when they are used.
    """

    def __init__(self, folder: Path, stem: str = "model") -> None:
        """Read the headers. Raises CheckpointError when a file is missing, no safetensors, or breaks a rule."""
        self.folder = folder
        single, index = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
        self.entries: dict[str, Entry] = {}
        self.metadata: dict[str, str] = {}
        self._open: dict[Path, Any] = {}
        if (folder / single).exists() or (folder / single).is_symlink():
            self.entries, self.metadata = _read_header(inside(folder, single))
            return
        listing = inside(folder, index)
        if not listing.exists():
            pickles = sorted(path.name for kind in _PICKLES for path in folder.glob(kind))
            had = f"; {pickles[0]} is a pickle, which can run code and is never opened" if pickles else ""
            kind = "model" if stem == "model" else "adapter"
            raise CheckpointError(f"{folder} has neither {single} nor {index}{had}; save the {kind} as safetensors")
        _INDEX.check_file(listing)
        listed = read_json(listing).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
            raise CheckpointError(f"{listing} has no weight_map of tensor names to file names")
        for name in dict.fromkeys(listed.values()):
            found, _ = _read_header(inside(folder, name))
            if twice := sorted(set(found) & set(self.entries)):
                raise CheckpointError(
                    f"{folder}: {twice[0]} stands in {name} and in {self.entries[twice[0]].file.name}"
                )
            self.entries |= found
        place = {name: entry.file.name for name, entry in self.entries.items()}
        wrong = [name for name, file in listed.items() if place.get(name) != Path(file).name]
        wrong += [name for name in self.entries if name not in listed]
        if wrong:
            raise CheckpointError(
                f"{folder / index} and the shards differ on {len(wrong)} tensors, among them {wrong[0]}; "
                "copy the folder again from its source"
            )

    def get(self, name: str) -> Tensor:
        """Return a stored tensor on the CPU. Raises KeyError for an unknown name."""
        path = self.entries[name].file
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from None
        tensor: Tensor = self._open[path].get_tensor(name)
        return tensor


def _read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Return a file's tensors and metadata, refusing what no writer of safetensors makes."""
    fields, before, size = _parse_header(path)
    metadata = fields.pop("__metadata__", None)
    found = {name: _read_entry(path, name, told) for name, told in fields.items()}
    at = 0
    for begin, end in sorted(span for _, span in found.values()):
        if begin != at:
            raise CheckpointError(f"{path}: its tensors overlap or leave a gap at byte {min(begin, at):,}")
        at = end
    if at != size - before:
        raise CheckpointError(
            f"{path} has {size:,} bytes and its header promises {at + before:,}; it is cut short or was altered"
        )
    return {name: entry for name, (entry, _) in found.items()}, metadata if isinstance(metadata, dict) else {}


def _parse_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """Return the fields of a file's header, the bytes before its numbers, and those of the whole file."""
    try:
        check_file(path, sys.maxsize)
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            if not 2 <= length <= min(_HEADER.size, size - 8):
                raise CheckpointError(
                    f"it has {size:,} bytes and a header of {length:,}, and at most {_HEADER.size:,} are read; it is "
                    "cut short, or no safetensors"
                )
            header = file.read(length)
        if header.count(b'"data_offsets"') > MOST_TENSORS:  # before a million of them are parsed
            raise CheckpointError(f"its header lists more than {MOST_TENSORS:,} tensors")
        _HEADER.check(header)
        fields = parse_json(header.decode("utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}; copy the folder again from its source"
        ) from None
    except (CheckpointError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error!s:.200}") from None
    if not isinstance(fields, dict) or len(fields) > MOST_TENSORS:
        raise CheckpointError(f"{path}: its header must be an object of at most {MOST_TENSORS:,} tensors")
    return fields, 8 + length, size


def _read_entry(path: Path, name: str, told: Any) -> tuple[Entry, tuple[int, int]]:
    """Return what a header tells of a tensor, and the bytes from where to where it lies."""
    try:
        dtype, shape, (begin, end) = told["dtype"], tuple(told["shape"]), told["data_offsets"]
        sound = all(type(n) is int and 0 <= n < 2**31 for n in shape) and type(begin) is type(end) is int
        count = 1
        for n in shape:
            count *= n
        sound = sound and len(shape) <= 8 and bool(_NAME.fullmatch(name)) and count < 2**48
        sound = sound and 0 <= begin <= end and (end - begin) * 8 == count * _BITS[dtype]
    except (KeyError, TypeError, ValueError):
        sound = False
    if isinstance(told, dict) and str(told.get("dtype")).startswith(("F8_", "F4", "F6_")):
        raise CheckpointError(
            f"{path}: {name!r:.80} has dtype {told['dtype']!r:.20}, numbers of 8 bits or fewer; expand them to "
            "bf16 with the tool that made the file"
        )
    if not sound:
        raise CheckpointError(f"{path}: the header's entry {name!r:.80} is no tensor: {told!r:.120}")
    return Entry(path, dtype, shape), (begin, end)


def fitted(tensor: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """Return a tensor in a dtype. Raises CheckpointError when a finite number would become infinite."""
    if tensor.dtype == dtype:
        return tensor
    found = tensor.to(dtype)
    narrower = torch.finfo(dtype).max < torch.finfo(tensor.dtype).max
    if narrower and bool((infinite := found.isinf()).any()) and bool((infinite & tensor.isfinite()).any()):
        wider = "the file was altered" if dtype == torch.float32 else "load the model with dtype='float32'"
        raise CheckpointError(
            f"{what} holds {float(tensor.abs().nan_to_num(0, 0).max()):.3g}, which {dtype} cannot tell from infinity; "
            f"{wider}"
        )
    return found


def sort_metadata(path: Path) -> None:
    """Put a safetensors file's metadata in order, which its writer does not: equal tensors are then equal files."""
    with path.open("r+b") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        fields = json.loads(file.read(length))
        fields["__metadata__"] = dict(sorted(fields["__metadata__"].items()))
        header = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
        if len(header) > length:
            raise WorkError(f"{path}: its header of {length} bytes cannot be put in order")
        file.seek(8)
        file.write(header.ljust(length))


def mapped() -> list[tuple[int, int]]:
    """Return where the memory of this process is that maps safetensors files: begin and end; none outside Linux."""
    if sys.platform != "linux":
        return []
    found = re.findall(rb"^(\w+)-(\w+) .*\.safetensors$", Path("/proc/self/maps").read_bytes(), re.MULTILINE)
    return [(int(begin, 16), int(end, 16)) for begin, end in found]


def release(tensor: Tensor, spans: Sequence[tuple[int, int]]) -> None:
    """Give back the memory of a tensor that is a view of a mapped file: its pages are read again when next used.

    spans: what `mapped` gave since the tensor was made. Any other tensor is left as it is.
    """
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if start < stop and any(begin <= start and stop <= end for begin, end in spans):
        size = ctypes.c_size_t(stop - start)
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), size, ctypes.c_int(4))  # MADV_DONTNEED


def write_tensors(folder: Path, tensors: Iterator[tuple[str, Tensor]], *, shard_bytes: int) -> None:
    """Write tensors as one file, or as shards of at most `shard_bytes` (a larger tensor alone) with an index."""
    shards: list[Path] = []
    where: dict[str, int] = {}
    held: dict[str, Tensor] = {}
    total = used = 0

    def flush() -> None:
        nonlocal used
        shards.append(folder / f"model-{len(shards) + 1:05d}.safetensors")
        save_file(held, shards[-1], metadata={"format": "pt"})
        held.clear()
        used = 0

    for name, tensor in tensors:
        if held and used + tensor.nbytes > shard_bytes:
            flush()
        held[name], where[name] = tensor.contiguous(), len(shards)
        used, total = used + tensor.nbytes, total + tensor.nbytes
    flush()
    if len(shards) == 1:
        shards[0].rename(folder / "model.safetensors")
        return
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for path, name in zip(shards, names, strict=True):
        path.rename(folder / name)
    index = {"metadata": {"total_size": total}, "weight_map": {name: names[place] for name, place in where.items()}}
    write_json(folder / "model.safetensors.index.json", index)
