"""Files made to harm are refused: within a second, within 64 MB, and without opening anything outside the folder."""

from __future__ import annotations

import gc
import itertools
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from modalora.checkpoint.card import read_card
from modalora.checkpoint.files import Weights, check_manifest
from modalora.checkpoint.store import load_model
from modalora.checkpoint.write import save_model
from modalora.errors import CheckpointError, ConfigError, InputError
from modalora.models.multimodal import ModelConfig, Multimodal
from modalora.models.sizes import tiny
from small import fox


def header(fields: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[object], begin: object = 0, end: object = 8, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


DATA = b"\0" * 8
FILES: dict[str, bytes] = {
    "nothing": b"",
    "eight bytes": struct.pack("<Q", 8),
    "a length beyond the file": header({}, length=2**40),
    "a length of all ones": header({}, length=2**64 - 1),
    "no JSON": header(b"{" + b"[" * 40),
    "nested 100,000 deep": header(b"[" * 100_000 + b"]" * 100_000),
    "a list": header([]),
    "no UTF-8": header(b'{"\xff": 1}'),
    "a shape of 2^40": header({"a": entry([2**40])}, DATA),
    "a shape that overflows": header({"a": entry([2**31 - 1] * 8)}, DATA),
    "a negative shape": header({"a": entry([-2])}, DATA),
    "a shape of text": header({"a": entry(["2"])}, DATA),
    "a shape of floats": header({"a": entry([2.0])}, DATA),
    "a shape of true": header({"a": entry([True])}, DATA),
    "9 axes": header({"a": entry([1] * 9, 0, 4)}, DATA),
    "more data than the shape": header({"a": entry([1])}, DATA),
    "offsets backwards": header({"a": entry([2], 8, 0)}, DATA),
    "offsets that are text": header({"a": entry([2], "0", "8")}, DATA),
    "offsets beyond the file": header({"a": entry([2], 8, 16)}, DATA),
    "overlapping tensors": header({"a": entry([2]), "b": entry([1], 4, 8)}, DATA),
    "a gap": header({"a": entry([1], 4, 8)}, DATA),
    "bytes left over": header({"a": entry([1], 0, 4)}, DATA),
    "an unknown dtype": header({"a": entry([2], dtype="F33")}, DATA),
    "a dtype that is a list": header({"a": entry([2], dtype=["F32"])}, DATA),
    "a key twice": header(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        DATA,
    ),
    "the last of 200,000 keys twice": header(
        b"{" + b",".join(b'"%d":1' % (number % 199_999) for number in range(1, 200_000)) + b',"0":1}'
    ),
    "a name with a zero": header({"a\0b": entry([2])}, DATA),
    "a name of 10,000 letters": header({"a" * 10_000: entry([2])}, DATA),
    "an entry that is a number": header({"a": 3}, DATA),
    "a million empty tensors": header({str(number): entry([0], 0, 0) for number in range(1_000_000)}),
    "30,000 empty tensors": header({str(number): entry([0], 0, 0) for number in range(30_000)}),
    "a pickle": pickle.dumps({"a": 1}),
    "a million nested lists": header(b'{"a":[' + b"[]," * 1_300_000 + b"[]]}"),
    "a million nested objects": header(b'{"a":[' + b"{}," * 1_300_000 + b"{}]}"),
    "metadata of 300,000 keys": header(
        b'{"__metadata__":{' + b",".join(b'"%d":"a"' % n for n in range(300_000)) + b"}}"
    ),
    "a list of 990,000 numbers": header(b'{"a":[' + b"1e9," * 990_000 + b"1]}"),
    "numbers of 8 bits": header({"a": entry([8], dtype="F8_E4M3")}, DATA),
}


INDEXES: dict[str, bytes] = {
    "a million lists": b'{"a":[' + b"[]," * 1_300_000 + b"[]]}",
    "two million lists": b'{"a":[' + b"[]," * 2_660_000 + b"[]]}",
    "a million objects": b'{"a":[' + b"{}," * 1_300_000 + b"{}]}",
    "nested 100,000 deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "200,000 names": b'{"weight_map":{' + b",".join(b'"%d":"a"' % number for number in range(200_000)) + b"}}",
    "200,000 files": b'{"weight_map":{' + b",".join(b'"%d":"%d"' % (n, n) for n in range(200_000)) + b"}}",
    "a million numbers": b'{"a":[' + b"1e9," * 990_000 + b"1]}",
}
TOKENIZERS: dict[str, bytes] = {
    "10 million lists": b'{"a":[' + b"[]," * 10_000_000 + b"[]]}",
    "90 MB": b'{"a":"' + b"a" * 90_000_000 + b'"}',
    "a million words": b'{"model":{"type":"BPE","vocab":{'
    + b",".join(b'"%d":%d' % (number, number) for number in range(1_000_000))
    + b'},"merges":[]},"added_tokens":[]}',
    "7 million numbers": b'{"a":[' + b"1e9," * 7_000_000 + b"1]}",
    "no control tokens": b'{"model":{"type":"BPE","vocab":{"a":0},"merges":[]}}',
}


def seconds(action: Callable[[], object]) -> float:
    """Return the least CPU seconds of three tries, without walks of the garbage collector through other tests' heap."""
    took = []
    gc.freeze()
    try:
        for _ in range(3):
            started = time.process_time()
            action()
            took.append(time.process_time() - started)
    finally:
        gc.unfreeze()
    return min(took)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_no_writer_makes_is_refused_in_a_second(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(FILES[name])

    def refused() -> None:
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            Weights(tmp_path)

    assert seconds(refused) < 1


@pytest.mark.parametrize("name", INDEXES)
def test_an_index_that_no_writer_makes_is_refused_in_a_second(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(INDEXES[name])

    def refused() -> None:
        with pytest.raises(
            CheckpointError, match=r"model\.safetensors\.index\.json (has .* at most|is no file of its)"
        ):
            Weights(tmp_path)

    assert seconds(refused) < 1


def test_the_index_of_20_000_tensors_is_read(tmp_path: Path) -> None:
    names = [
        f"base_model.model.model.layers.{number}.self_attn.qkv_proj.lora_A.default.weight" for number in range(20_000)
    ]
    tensors = {name: entry([0], 0, 0) for name in names}
    (tmp_path / "model-00001-of-00001.safetensors").write_bytes(header(tensors))
    index = {"metadata": {"total_size": 0}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    assert list(Weights(tmp_path).entries) == names


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_that_no_library_writes_is_refused_in_a_second(name: str, folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(TOKENIZERS[name])

    def refused() -> None:
        with pytest.raises(
            CheckpointError, match=r"tokenizer\.json (has .* at most|is no file of its|is not a tokenizer)"
        ):
            load_model(folder)

    assert seconds(refused) < 1


def test_a_tokenizer_of_200_064_words_is_read(folder: Path) -> None:
    """As large as o200k: twice as many merges as words, each a list of two."""
    fields = json.loads((folder / "tokenizer.json").read_text())
    vocabulary, letters = fields["model"]["vocab"], [one for one in fields["model"]["vocab"] if len(one) == 1]
    made = ("".join(parts) for size in (2, 3) for parts in itertools.product(letters, repeat=size))
    merges = fields["model"]["merges"]
    for word in made:
        if len(vocabulary) == 200_064 - len(fields["added_tokens"]):
            break
        if word not in vocabulary:
            vocabulary[word] = len(vocabulary)
            merges += [[word[:at], word[at:]] for at in range(1, len(word))]
    for token in fields["added_tokens"]:
        token["id"] = len(vocabulary)
        vocabulary[token["content"]] = len(vocabulary)
    assert len(merges) > 300_000
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="has 200064 ids, the config's vocab_size is 320"):
        load_model(folder)


def test_the_worst_of_them_take_little_memory(tmp_path: Path, folder: Path) -> None:
    """In a process of its own: what the refusals add to its peak."""
    script = """
import resource, sys
from pathlib import Path
from modalora.checkpoint.files import Weights
from modalora.checkpoint.store import load_model
from modalora.errors import CheckpointError
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
for folder in map(Path, sys.argv[1:]):
    try:
        load_model(folder) if (folder / "config.json").exists() else Weights(folder)
    except CheckpointError:
        continue
    raise SystemExit("accepted")
print(peak() - before)
"""
    folders = []
    worst = (
        "a million empty tensors", "30,000 empty tensors", "nested 100,000 deep", "a million nested lists",
        "metadata of 300,000 keys", "a list of 990,000 numbers",
    )  # fmt: skip
    files = [("model.safetensors", FILES[name]) for name in worst]
    files += [("model.safetensors.index.json", text) for text in INDEXES.values()]
    for number, (file, text) in enumerate(files):
        folders.append(tmp_path / str(number))
        folders[-1].mkdir()
        (folders[-1] / file).write_bytes(text)
    for name, text in TOKENIZERS.items():
        folders.append(tmp_path / name)
        shutil.copytree(folder, folders[-1])
        (folders[-1] / "tokenizer.json").write_bytes(text)
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, folders)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 64_000  # kB


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_model(Multimodal(ModelConfig(decoder=tiny().decoder)), fox(), tmp_path / "m", layout="phi3")
    return tmp_path / "m"


def link(folder: Path, name: str) -> None:
    outside = folder.parent / f"outside-{name}"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"])
def test_a_link_out_of_the_folder_is_not_followed(folder: Path, name: str) -> None:
    load_model(folder)
    link(folder, name)
    with pytest.raises(CheckpointError, match="lies outside the folder; it was not opened"):
        load_model(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"])
def test_a_pipe_is_not_waited_for(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match="is a pipe or a device"):
        load_model(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
def test_links_in_a_circle_are_told(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to(name)
    with pytest.raises(CheckpointError, match=name):
        load_model(folder)


@pytest.mark.parametrize("name", ["x\0y", "x\ud800y", "x" * 5000, "../../etc/passwd", "/dev/zero"])
def test_a_shard_of_a_name_that_no_file_has_is_told(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="lies outside the folder; it was not opened"):
        load_model(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_config_of_many_megabytes_is_not_parsed(folder: Path, name: str) -> None:
    (folder / name).write_text('{"a": [' + "[]," * 1_000_000 + "[]]}")

    def refused() -> None:
        with pytest.raises(CheckpointError, match="at most 1,000,000 are read"):
            load_model(folder)

    assert seconds(refused) < 1


OWN: list[tuple[dict[str, object], str]] = [
    ({"adapters": {"../x": {"r": 2, "lora_alpha": 2}}}, "'../x' cannot name an adapter"),
    ({"branches": {"smell": ["a"]}}, "branches are of 'smell', a modality that this model lacks"),
    ({"aliases": {"a": "nowhere"}}, "aliases leads from 'a' to 'nowhere', which is no adapter"),
    ({"notes": [1]}, r"notes=\[1\] must be an object"),
    ({"stop_ids": [10**400]}, "stop_ids has a large number; it must be a token id"),
    ({"tokens": {"eos_token_id": -1}}, "eos_token_id has -1"),
    ({"tokens": {"x": 1}}, "tokens=.* must be an object of bos_token_id"),
]


@pytest.mark.parametrize(("change", "told"), OWN)
def test_a_config_of_our_own_names_what_there_is(tmp_path: Path, change: dict[str, object], told: str) -> None:
    torch.manual_seed(0)
    save_model(Multimodal(ModelConfig(decoder=tiny().decoder)), fox(), tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises((CheckpointError, ConfigError), match=told):
        read_card(tmp_path / "m", check=False)


@pytest.mark.parametrize("name", ["x\0y", "x\ud800y", "x" * 5000, "loop"])
def test_a_manifest_of_names_that_no_file_has_is_told(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 1, "files": {name: {"bytes": 1}}}))
    with pytest.raises(CheckpointError, match="lies outside the folder"):
        check_manifest(tmp_path)


def test_a_manifest_of_too_many_names_is_not_walked(tmp_path: Path) -> None:
    files = {str(number): {} for number in range(30_000)}
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))
    with pytest.raises(CheckpointError, match="lists 30,000 files; at most 20,000 are read"):
        check_manifest(tmp_path)


def test_the_links_of_a_hugging_face_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--phi" / "snapshots" / "abc"
    blobs = tmp_path / "models--phi" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in folder.iterdir():
        path.rename(blobs / path.name.upper())
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / path.name.upper())
    load_model(snapshot)


@pytest.fixture
def native(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    sizes = tiny()
    assert sizes.speech is not None
    sizes = replace(sizes, speech=replace(sizes.speech, segment=500))
    save_model(Multimodal(sizes), fox(), tmp_path / "m", layout="phi4_multimodal")
    return tmp_path / "m"


def test_adapters_in_folders_of_a_hugging_face_cache_are_followed(native: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--phi" / "snapshots" / "abc", tmp_path / "models--phi" / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(path for path in sorted(native.rglob("*")) if path.is_file()):
        path.rename(blobs / str(number))
        place = snapshot / path.relative_to(native)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(blobs / str(number))
    assert load_model(snapshot).model.adapters == ("vision", "speech")
    (tmp_path / "secret.json").write_text("{}")
    (snapshot / "vision-lora" / "adapter_config.json").unlink()
    (snapshot / "vision-lora" / "adapter_config.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(CheckpointError, match="lies outside the folder; it was not opened"):
        load_model(snapshot)


def test_an_adapter_folder_that_is_a_link_out_is_not_followed(native: Path) -> None:
    link(native, "vision-lora")
    with pytest.raises(CheckpointError, match="names the file 'vision-lora', which lies outside the folder"):
        load_model(native)


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("preprocessor_config.json", {"dynamic_hd": "36"}, "dynamic_hd='36' must be a number of crops"),
        ("preprocessor_config.json", {"dynamic_hd": None}, "dynamic_hd=None must be"),
        ("preprocessor_config.json", {"dynamic_hd": True}, "dynamic_hd=True must be"),
        ("config.json", {"sliding_window": "a"}, "sliding_window='a'"),
        ("config.json", {"model_type": []}, r"has model_type \[\]"),
        ("vision-lora/adapter_config.json", {"modules_to_save": 5}, "modules_to_save=5; it must be a list"),
        ("vision-lora/adapter_config.json", {"modules_to_save": "norm"}, "modules_to_save='norm'; it must be a list"),
        ("vision-lora/adapter_config.json", {"lora_alpha": float("nan")}, "lora_alpha=nan: .* a finite number"),
        ("vision-lora/adapter_config.json", {"lora_alpha": float("inf")}, "lora_alpha=inf: .* a finite number"),
        (
            "vision-lora/adapter_config.json",
            {"alpha_pattern": {"o_proj": float("inf")}},
            "o_proj=inf: .* a finite number",
        ),
        ("vision-lora/adapter_config.json", {"target_modules": "(([a-z_.0-9]+)+)+!"}, "could take for ever to match"),
        ("vision-lora/adapter_config.json", {"rank_pattern": {"(.|..)*!": 4}}, "could take for ever to match"),
        ("vision-lora/adapter_config.json", {"target_modules": ".*" * 20 + "!"}, "could take for ever to match"),
    ],
)
def test_a_value_of_another_kind_is_told_at_once(native: Path, name: str, change: dict[str, object], told: str) -> None:
    path = native / name
    path.write_text(json.dumps(json.loads(path.read_text()) | change))

    def load() -> None:
        with pytest.raises((CheckpointError, ConfigError), match=told):
            load_model(native)

    assert seconds(load) < 1


@pytest.mark.parametrize(
    "change",
    [
        lambda fields: fields.update(hidden_size=10**12),
        lambda fields: fields.update(num_hidden_layers=10**9),
        lambda fields: fields.update(vocab_size=-1),
        lambda fields: fields.update(vocab_size=10**400),
        lambda fields: fields.update(rms_norm_eps="1e-5; import os"),
        lambda fields: fields.update(num_attention_heads=0),
        lambda fields: fields.update(auto_map={"AutoModel": "os.system"}, model_type="os.system"),
        lambda fields: fields.update(
            rope_scaling={"type": "longrope", "short_factor": [0] * 6, "long_factor": [1] * 6}
        ),
        lambda fields: fields.update(
            rope_scaling={"type": "longrope", "short_factor": [1] * 5, "long_factor": [1] * 5}
        ),
    ],
)
def test_a_config_cannot_allocate(folder: Path, change: Callable[[dict[str, object]], None]) -> None:
    fields = json.loads((folder / "config.json").read_text())
    change(fields)
    (folder / "config.json").write_text(json.dumps(fields))

    def refused() -> None:
        with pytest.raises(InputError):
            load_model(folder)

    assert seconds(refused) < 1


def test_a_template_that_never_ends_is_not_run(folder: Path) -> None:
    endless = "{% for a in range(10**9) %}{% for b in range(10**9) %}x{% endfor %}{% endfor %}"
    for name in ("tokenizer_config.json", "chat_template.json"):
        (folder / name).write_text(json.dumps({"chat_template": endless}))
    (folder / "chat_template.jinja").write_text(endless)
    assert seconds(lambda: load_model(folder)) < 1
    assert load_model(folder).chat.default_system is None


def test_a_pickle_in_place_of_weights_is_named_and_not_opened(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    canary = folder.parent / "opened"
    (folder / "pytorch_model.bin").write_bytes(f"cos\nsystem\n(S'touch {canary}'\ntR.".encode())
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is a pickle, which can run code and is never opened"):
        load_model(folder)
    assert not canary.exists()
