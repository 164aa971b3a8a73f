"""The commands about model and adapter folders: convert, adapter, route explain over a batch, raw prompts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modalora.assistant import load
from modalora.checkpoint.adapters import save_adapter
from modalora.checkpoint.find import BUNDLED

DIGITS = str(BUNDLED / "demo" / "digits.wav")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def style(tmp_path: Path) -> Path:
    """A PEFT folder for nano: its speech adapter under another name."""
    save_adapter(load("nano").model, "speech", tmp_path / "style")
    return tmp_path / "style"


def test_a_model_goes_to_the_official_layout_and_back(run: Run, tmp_path: Path) -> None:
    there, back = str(tmp_path / "there"), str(tmp_path / "back")
    code, out, _ = run("convert", "nano", there, "--layout", "phi4mm")
    assert (code, out.splitlines()[0]) == (0, f"wrote {there}: layout phi4mm, 508 tensors, 13,212,720 parameters")
    assert run("convert", there, back, "--layout", "modalora")[0] == 0
    first, last = (load(folder).model.state_dict() for folder in ("nano", back))
    assert all(torch.equal(last[name], tensor) for name, tensor in first.items())
    shown = run("inspect", there)[1]
    assert "layout phi4mm" in shown
    assert "integrity  sizes and shapes" in shown
    code, _, err = run("convert", "nano", there, "--layout", "modalora")
    assert (code, "exists; give a new folder, nothing was written" in err) == (2, True)
    code, _, err = run("convert", "nano", str(tmp_path / "x"), "--layout", "phi3")
    assert (code, "has no place for" in err, (tmp_path / "x").exists()) == (2, True, False)
    assert err.rstrip().endswith("choose a layout that holds this model: modalora, phi4mm")


def test_an_adapter_is_listed_and_certified(run: Run, style: Path) -> None:
    assert (
        run("adapter", "list", "nano")[1].splitlines()[0] == "vision: rank 32, alpha 64, on every Linear of the decoder"
    )
    code, out, _ = run("adapter", "verify", "nano", str(style), "--json")
    found = json.loads(out)
    assert (code, found["consumed"], found["linears"], found["matched"]) == (0, 64, [32, 32], True)
    assert found["text_bits_changed"] == 0
    assert found["logit_change"] > 0.01
    assert "0 of " in run("adapter", "verify", "nano", str(style))[1].splitlines()[-1]
    tensors = load_file(style / "adapter_model.safetensors")
    save_file(
        {name: tensor * ("lora_A" in name) for name, tensor in tensors.items()}, style / "adapter_model.safetensors"
    )
    code, out, err = run("adapter", "verify", "nano", str(style))
    assert (code, out, "lora_B is zero in all 32 Linears" in err) == (2, "", True)


def test_a_sum_is_composed_and_merged(run: Run, style: Path, tmp_path: Path) -> None:
    given = ("--adapter", f"style={style}")
    code, out, _ = run("adapter", "compose", "nano", "vision+style@0.5", str(tmp_path / "both"), *given)
    assert (code, out) == (0, f"wrote {tmp_path / 'both'}: vision+style@0.5 as one adapter of rank 48\n")
    model = load("nano")
    model.load_adapter(style, "style")
    model.load_adapter(tmp_path / "both", "both")
    summed, composed = (model.logits("Hello there", route=route) for route in ("vision+style@0.5", "both"))
    torch.testing.assert_close(composed, summed, atol=1e-4, rtol=0)  # the same products, added in another order

    code, out, _ = run("adapter", "merge", "nano", "style", str(tmp_path / "merged"), *given)
    assert code == 0
    assert "left out, as they were trained on the decoder as it was: speech, vision" in out
    assert "no adapter is left for audio, image: ask about them with --route none" in out
    torch.testing.assert_close(
        load(tmp_path / "merged").logits("Hello there"), model.logits("Hello there", route="style"), atol=1e-4, rtol=0
    )
    code, out, _ = run("adapter", "merge", "nano", "vision + style", str(tmp_path / "spaced"), *given)
    assert (code, "decoder as it was: speech\n" in out) == (0, True)
    code, _, err = run("adapter", "merge", "nano", "mine", str(tmp_path / "x"))
    assert (code, "no adapter 'mine'" in err, (tmp_path / "x").exists()) == (2, True, False)
    code, _, err = run("adapter", "merge", "nano", "a", str(tmp_path / "x"), "--adapter", "mine")
    assert (code, "must be NAME=FOLDER" in err) == (2, True)


def test_route_explain_tells_what_the_released_code_would_do(run: Run, tmp_path: Path) -> None:
    more = tmp_path / "more.jsonl"
    shutil.copy(BUNDLED / "demo" / "scene.png", tmp_path)
    picture = {"type": "image", "image": "scene.png"}
    more.write_text(json.dumps({"messages": [{"role": "user", "content": [picture]}]}) + "\n")
    code, out, _ = run("route", "explain", "nano", "Which?", "--audio", DIGITS)
    assert (code, "released   the same" in out) == (0, True)
    out = run("route", "explain", "nano", "Which?", "--audio", DIGITS, "--batch", str(more))[1]
    assert "released   adapter vision, projectors audio -> vision: one mode for the whole batch" in out
    rows = run(
        "route", "explain", "nano", "Which?", "--audio", DIGITS, "--batch", str(more), "--compat", "official", "--json"
    )[1]
    assert [json.loads(line)["adapter"] for line in rows.splitlines()] == ["vision", "vision"]
    more.write_text("{")
    assert run("route", "explain", "nano", "Hi", "--batch", str(more))[0] == 2
    more.write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n\n{"messages": [{"role": "bot"}]}\n')
    code, _, err = run("route", "explain", "nano", "Hi", "--batch", str(more))
    assert (code, f"{more}, line 3: message 1 has role 'bot'" in err) == (2, True)
    more.write_text('{"messages": [{"role": "user", "content": "Hi"}]}\n' + "[" * 100_000)
    code, _, err = run("route", "explain", "nano", "Hi", "--batch", str(more))
    assert (code, f"{more}, line 2: it is nested deeper than 100" in err) == (2, True)
    code, _, err = run("route", "explain", "nano", "Hi", "--tags", "false")
    assert (code, "--tags is for --batch" in err) == (2, True)
    for tokens, told in (("0", "max_tokens=0 must be at least 1"), ("99999", "exceed this model's window")):
        code, _, err = run("route", "explain", "nano", "Hi", "--max-tokens", tokens)
        assert (code, told in err) == (2, True)
    assert "compat='x' must be 'official' or None" in run("route", "explain", "nano", "Hi", "--compat", "x")[2]


def test_route_explain_reads_a_file_as_ask_does(run: Run, tmp_path: Path) -> None:
    shutil.copy(BUNDLED / "demo" / "scene.png", tmp_path)
    rows = [
        {"messages": [{"role": "user", "content": "<image>Which?"}], "images": ["scene.png"], "n": 1},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
        {"instruction": "Is <image> a tag?"},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    asked = ("route", "explain", "nano", "Hi", "--json", "--batch", str(tmp_path / "rows.json"))
    code, _, err = run(*asked)
    assert (code, "line 1: it has 1 <image> places and 0 images; " in err, "set --tags=false when" in err) == (
        2,
        True,
        True,
    )
    (tmp_path / "rows.json").write_text(json.dumps(rows[:2]))
    code, out, err = run(*asked)
    assert [json.loads(line)["modalities"] for line in out.splitlines()] == [["text"], ["image"], ["text"]]
    assert (code, err) == (0, f"{tmp_path / 'rows.json'}: fields that are not read: n (1)\n")


def test_a_raw_prompt_is_taken_as_it_is(run: Run) -> None:
    asked = run("ask", "nano", "Repeat: hello", "--max-tokens", "4")[1]
    raw = "<|user|>Repeat: hello<|end|><|assistant|>"
    assert run("ask", "nano", raw, "--raw", "--max-tokens", "4")[1] == asked
    code, _, err = run("ask", "nano", "<|user|><|audio_1|><|end|><|assistant|>", "--raw")
    assert (code, "has 1 <|audio_N|> tags and 0 audio(s) were given" in err) == (2, True)
    code, _, err = run("ask", "nano", "Hi", "--rope", "long")
    assert (code, "this model has no long and short table" in err) == (2, True)


def test_a_name_that_a_command_uses_itself_is_free_for_adapters(run: Run, style: Path, tmp_path: Path) -> None:
    given = ("--adapter", f"composed={style}")
    code, out, _ = run("adapter", "compose", "nano", "composed+vision", str(tmp_path / "both"), *given)
    assert code == 0, out
    code, _, err = run("adapter", "compose", "nano", "vision@0", str(tmp_path / "none"))
    assert code == 2
    assert "has no weight but zero" in err
    assert not (tmp_path / "none").exists()


def test_a_target_that_cannot_be_made_is_told(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = run("convert", "nano", str(tmp_path / "file" / "out"), "--layout", "modalora")
    assert code == 2
    assert f"{tmp_path / 'file' / 'out'} cannot be made: " in err
    code, _, err = run("convert", "nano", str(tmp_path / "out"), "--layout", "modalora", "--shard-gb", "inf")
    assert code == 2
    assert "--shard-gb inf must be above 0 and below a million" in err
