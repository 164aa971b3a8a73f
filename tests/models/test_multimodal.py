"""The whole model: its size, mixed batches against single rows, and which weights a row may touch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import modalora
from modalora.contracts import Batch, Route
from modalora.errors import ShapeError
from modalora.models.multimodal import ModelConfig, Multimodal, parameter_counts, part_of
from modalora.models.sizes import phi4_multimodal, tiny
from modalora.nn.attend import BACKENDS
from modalora.nn.rope import Plain

KINDS = ("text", "image + speech", "speech", "image", "text", "speech", "image")
# float32 over the whole tiny model; worst seen 4e-7 in logits, 2e-7 in gradients; a bf16 slip (1e-2) must fail
TOLERANCE = {"atol": 1e-5, "rtol": 0}

Model = Callable[..., Multimodal]
Rows = Callable[..., Batch]


def gradients(model: Multimodal, batches: list[Batch]) -> dict[str, torch.Tensor | None]:
    """Gradients of the mean loss over all labelled tokens of the batches."""
    model.zero_grad(set_to_none=True)
    total = sum(int((batch.labels[:, 1:] != -100).sum()) for batch in batches if batch.labels is not None)
    for batch in batches:
        values, _ = model.loss(batch)
        (values.sum() / total).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def poison(model: Multimodal, *parts: str) -> None:
    with torch.no_grad():
        found = [parameter for name, parameter in model.named_parameters() if part_of(name) in parts]
        assert found
        for number, parameter in enumerate(found):
            parameter.fill_(float("nan") if number % 2 else float("inf"))


def test_phi4_multimodal_has_5574460384_numbers_in_2047_tensors() -> None:
    with torch.device("meta"):
        model = Multimodal(phi4_multimodal())
    assert len(model.state_dict()) == 2047
    counts = parameter_counts(model)
    assert counts == {
        "decoder": 3_836_021_760,
        "adapter.vision": 369_098_752,
        "adapter.speech": 461_373_440,
        "image.encoder": 428_565_440 + 2_304,
        "image.projector.vision": 12_982_272,
        "audio.encoder": 441_238_304,
        "audio.projector.speech": 12_589_056,
        "audio.projector.vision": 12_589_056,
    }
    assert sum(counts.values()) == 5_574_460_384


def test_logits_of_a_mixed_batch_equal_those_of_its_rows(make_model: Model, make_batch: Rows) -> None:
    model, batch = make_model(), make_batch(KINDS)
    with torch.no_grad():
        together = model(batch)
        for row, length in enumerate(batch.lengths.tolist()):
            alone = model(batch.select([row]))
            assert alone.shape[1] == length
            torch.testing.assert_close(together[row, :length], alone[0], **TOLERANCE)


def test_a_row_of_nano_gets_in_a_batch_what_it_gets_alone() -> None:
    assistant = modalora.load("nano")
    sound = np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)
    image = Image.effect_noise((400, 100), 80).convert("RGB")
    asked = [
        {"text": "Hello!"},
        {"image": image, "text": "How many blue squares are there?"},
        {"audio": (sound[:9_000], 8000), "text": "Transcribe the audio clip into text."},
        {"image": image, "audio": (sound, 8000), "text": "Is the spoken number the number of squares?"},
    ]
    rows = [
        [{"role": "user", "content": [{"type": kind, kind: given} for kind, given in one.items()]}] for one in asked
    ]
    batch = assistant.processor(rows)
    with torch.no_grad():
        together = assistant.model(batch)
        for row, length in enumerate(batch.lengths.tolist()):
            alone = assistant.model(batch.select([row]))[0]
            # the same bits on one thread of an AMD EPYC; more threads cut products elsewhere (4e-6 seen), and MKL's
            # AVX-512 sums fewer than 16 rows in another order: 1.4e-5 seen, eight roundings of logits up to 20
            torch.testing.assert_close(together[row, :length], alone, atol=3e-5, rtol=0)


def test_every_gradient_of_a_mixed_batch_equals_the_sum_over_its_rows(make_model: Model, make_batch: Rows) -> None:
    model, batch = make_model(), make_batch(KINDS)
    together = gradients(model, [batch])
    alone = gradients(model, [batch.select([row]) for row in range(len(KINDS))])
    used = {part_of(name) for name, grad in together.items() if grad is not None and bool(grad.any())}
    assert used == set(parameter_counts(model))
    for name, grad in together.items():
        other = alone[name]
        assert (grad is None) == (other is None), name
        if grad is not None:
            torch.testing.assert_close(grad, other, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


def test_rows_may_be_reordered(make_model: Model, make_batch: Rows) -> None:
    model, batch = make_model(), make_batch(KINDS[:4])
    order = [2, 0, 3, 1]
    with torch.no_grad():
        together, other = model(batch), model(batch.select(order))
    for new, old in enumerate(order):
        length = int(batch.lengths[old])
        torch.testing.assert_close(other[new, :length], together[old, :length], **TOLERANCE)


@pytest.mark.parametrize(
    ("kind", "idle"),
    [
        ("text", ("adapter.vision", "adapter.speech", "audio.projector.speech", "image.encoder", "audio.encoder")),
        ("image", ("adapter.speech", "audio.projector.speech", "audio.projector.vision", "audio.encoder")),
        ("speech", ("adapter.vision", "audio.projector.vision", "image.projector.vision", "image.encoder")),
        ("image + speech", ("adapter.speech", "audio.projector.speech")),
    ],
)
def test_a_row_reads_its_own_weights_only(
    make_model: Model, make_batch: Rows, kind: str, idle: tuple[str, ...]
) -> None:
    model, batch = make_model(), make_batch([kind])
    with torch.no_grad():
        before = model(batch)
    grads = gradients(model, [batch])
    poison(model, *idle)
    with torch.no_grad():
        assert torch.equal(model(batch), before)
    poisoned = gradients(model, [batch])
    for name, grad in grads.items():
        if part_of(name) in idle:
            assert grad is None
            assert poisoned[name] is None
        elif grad is not None:
            assert torch.equal(grad, poisoned[name]), name


def test_text_rows_of_a_mixed_batch_keep_every_bit_when_every_adapter_is_poisoned(
    make_model: Model, make_batch: Rows
) -> None:
    model, batch = make_model(), make_batch(("text", "image", "speech", "text"))
    with torch.no_grad():
        before = model(batch)
        poison(model, "adapter.vision", "adapter.speech")
        after = model(batch)
    assert torch.equal(before[[0, 3]], after[[0, 3]])
    assert bool(after[1, : batch.lengths[1]].isnan().any())


def test_image_and_speech_use_the_vision_adapter_and_the_vision_projector_of_sound(
    make_model: Model, make_batch: Rows
) -> None:
    model, batch = make_model(), make_batch(["image + speech"])
    grads = gradients(model, [batch])
    used = {part_of(name) for name, grad in grads.items() if grad is not None and bool(grad.any())}
    assert "adapter.vision" in used
    assert "audio.projector.vision" in used
    assert used.isdisjoint({"adapter.speech", "audio.projector.speech"})


def test_a_text_row_keeps_every_bit_beside_media(make_model: Model, make_batch: Rows) -> None:
    model = make_model()
    bare = Multimodal(ModelConfig(decoder=tiny().decoder)).eval()
    bare.load_state_dict({name: value for name, value in model.state_dict().items() if name in bare.state_dict()})
    batch = make_batch(["text", "text"])
    with torch.no_grad():
        assert torch.equal(model(batch), bare(batch))


def test_modes_leave_no_trace(make_model: Model, make_batch: Rows) -> None:
    model = make_model()
    batches = [make_batch([kind]) for kind in ("text", "image", "speech", "image + speech")]
    with torch.no_grad():
        first = [model(batch) for batch in batches]
        again = [model(batch) for batch in batches[::-1]][::-1]
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)


def test_media_fill_their_span_and_nothing_else(make_model: Model, make_batch: Rows) -> None:
    model, batch = make_model(), make_batch(["image + speech", "text"])
    with torch.no_grad():
        hidden, plain = model.embed(batch), model.decoder.embed_tokens(batch.input_ids)
    filled = (hidden != plain).any(-1)
    told = torch.zeros_like(filled)
    for item in batch.media:
        told[item.row, item.start : item.start + item.tokens] = True
    assert torch.equal(filled, told)


def test_features_and_placeholders_must_be_equally_many(make_model: Model, make_batch: Rows) -> None:
    batch = make_batch(["speech"])
    (item,) = batch.media
    wrong = replace(batch, media=(replace(item, tokens=item.tokens - 1),))
    with pytest.raises(ShapeError, match=f"{item.tokens} features for {item.tokens - 1} placeholder"):
        make_model()(wrong)


def test_loss_counts_labelled_tokens_only(make_model: Model, make_batch: Rows) -> None:
    model, batch = make_model(), make_batch(["speech", "text"])
    assert batch.labels is not None
    with torch.no_grad():
        values, rows = model.loss(batch)
        logits = model(batch)
    told = []
    for row in range(2):
        for column in range(1, batch.labels.shape[1]):
            if batch.labels[row, column] != -100:
                told.append(-logits[row, column - 1].log_softmax(-1)[batch.labels[row, column]])
    torch.testing.assert_close(values, torch.stack(told), **TOLERANCE)
    assert rows.tolist() == sorted(rows.tolist())
    with pytest.raises(ShapeError, match="labels"):
        model.loss(replace(batch, labels=None))


def test_losses_are_computed_for_real_tokens_alone(make_model: Model, make_batch: Rows) -> None:
    model, batch = make_model(), make_batch(KINDS)
    seen: list[int] = []
    for layer in model.decoder.layers:
        layer.register_forward_pre_hook(lambda module, given: seen.append(given[0].shape[0] * given[0].shape[1]))
    values, rows = model.loss(batch)
    real = int(batch.lengths.sum())
    assert seen == [real + -real % 8] * 2  # up to seven more, for products of even height
    assert seen[0] < batch.input_ids.numel()
    alone = [model.loss(batch.select([row]))[0] for row in range(len(KINDS))]
    torch.testing.assert_close(values, torch.cat(alone), **TOLERANCE)
    assert rows.tolist() == [row for row, own in enumerate(alone) for _ in own]


def test_rows_of_one_length_are_one_call_of_attention(
    make_model: Model, make_batch: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the batch they lie apart: 9, 7, 5, 9, 7, 5 ... tokens."""
    model, batch = make_model(), make_batch(["text"] * 9)
    calls: list[tuple[int, int]] = []
    run = BACKENDS["eager"].run
    monkeypatch.setitem(
        BACKENDS, "eager", replace(BACKENDS["eager"], run=lambda call: calls.append(call.q.shape[:2]) or run(call))
    )
    with torch.autocast("cpu", torch.bfloat16):
        model.loss(batch)
    filler = -int(batch.lengths.sum()) % 8
    assert calls == [(3, 7), (3, 9), (3, 11), (1, filler)] * len(model.decoder.layers)


def test_each_row_of_a_loss_has_its_own_table_of_angles(make_model: Model, make_batch: Rows) -> None:
    """Rows beyond the original window of 256 tokens beside short ones, as logits have them."""
    model, batch = make_model(), make_batch(["text", "image", "text"], words=270)
    batch = batch.select([0, 1, 2, 0])
    batch = replace(batch, lengths=torch.tensor([40, int(batch.lengths[1]), 266, 256]))
    assert batch.labels is not None
    labels = batch.labels.masked_fill(torch.arange(batch.labels.shape[1]) >= batch.lengths[:, None], -100)
    batch = replace(batch, labels=labels)
    with torch.no_grad():
        values, rows = model.loss(batch)
        logits = model(batch)
    at = (labels[:, 1:] != -100).nonzero(as_tuple=True)
    told = torch.nn.functional.cross_entropy(logits[at], labels[:, 1:][at], reduction="none")
    torch.testing.assert_close(values, told, **TOLERANCE)
    assert set(rows.tolist()) == {0, 1, 2, 3}


def test_losses_and_gradients_beside_poisoned_idle_adapters_keep_every_bit(make_model: Model, make_batch: Rows) -> None:
    batch = make_batch(("text", "image", "text", "image"))
    found = []
    for poisoned in (False, True):
        model = make_model()
        if poisoned:
            poison(model, "adapter.speech", "audio.encoder", "audio.projector.speech", "audio.projector.vision")
        found.append((model.loss(batch)[0], gradients(model, [batch])))
    (values, grads), (others, poisoned_grads) = found
    assert torch.equal(values, others)
    for name, grad in grads.items():
        other = poisoned_grads[name]
        assert (grad is None) == (other is None), name
        assert grad is None or torch.equal(grad, other), name


def test_reading_on_with_a_cache_equals_reading_anew(make_model: Model, make_batch: Rows) -> None:
    model, batch = make_model(), make_batch(KINDS[:4])
    new = torch.randint(0, 320, (3, 4))
    with torch.no_grad():
        cache = model.new_cache(4)
        logits = [model.read(batch, cache)]
        logits += [model.read_next(ids, batch.route, cache) for ids in new]
        for row, length in enumerate(batch.lengths.tolist()):
            own = batch.select([row])
            ids = torch.cat((own.input_ids, new[:, row][None]), dim=1)
            told = model(replace(own, input_ids=ids, lengths=torch.tensor([length + 3])))[0, length - 1 :]
            torch.testing.assert_close(torch.stack([step[row] for step in logits]), told, **TOLERANCE)


def test_a_row_read_token_by_token_beyond_the_room_of_its_cache_equals_the_row_at_once(make_model: Model) -> None:
    model, ids = make_model(), torch.randint(0, 320, (1, 150))
    batch = Batch(ids, torch.tensor([150]), Route((None,)))
    with torch.no_grad():
        cache = model.new_cache(1)  # a prompt of 5 has room for 69, then 138, then 276
        logits = [model.read(replace(batch, input_ids=ids[:, :5], lengths=torch.tensor([5])), cache)]
        logits += [model.read_next(ids[:, at], batch.route, cache) for at in range(5, 150)]
        torch.testing.assert_close(torch.cat(logits), model(batch)[0, 4:], **TOLERANCE)


def test_a_model_with_another_rope_is_the_one_built_with_it(make_model: Model, make_batch: Rows) -> None:
    rope = Plain(theta=500.0, rotated=0.75, window=512)
    model, batch = make_model(), make_batch(["text", "image"])
    built = make_model(replace(tiny(), decoder=replace(tiny().decoder, rope=rope)))
    with torch.no_grad():
        before = model(batch)
        model.set_rope(rope)
        assert torch.equal(model(batch), built(batch))
        assert not torch.equal(model(batch), before)


def test_networks_added_to_a_bf16_model_are_bf16(make_model: Model) -> None:
    model = make_model().bfloat16()
    projector = model.add_branch("image", "more")
    sizes = tiny().speech
    assert sizes is not None
    model.add_modality("echo", sizes)
    for network in (projector, model.encoders["echo"], model.projectors["echo"]):
        assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
