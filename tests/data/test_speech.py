"""Spoken digits, their variations, strings of them, questions about them, and synthetic voices."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.random import default_rng

from modalora.data.numbers import DIGITS, number_words
from modalora.data.questions import questions
from modalora.data.scenes import nlvr_like
from modalora.data.speech import TRANSCRIBE, Clip, digit_string, read_wave, speech_questions, spoken_digits
from modalora.data.variation import PITCH, SILENCE, TEMPO, augment, shift_formants, stretch
from modalora.data.voices import Voice, draw_voices, espeak, picture_questions, sentences, trim, voice_bank
from modalora.errors import DataError

needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
SPEAKERS = ("ada", "ben")


def seconds(clip: Clip) -> float:
    return len(clip.wave) / clip.rate


def buzz(seconds: float = 0.5, rate: int = 8000, pitch: float = 120.0) -> np.ndarray:
    """A vowel of sorts: harmonics of the pitch under a formant at 700 Hz."""
    time = np.arange(round(seconds * rate)) / rate
    multiples = np.arange(1, int(3500 / pitch))
    levels = np.exp(-(((multiples * pitch - 700) / 300) ** 2)) + 0.01
    return (0.3 * (levels[:, None] * np.sin(2 * np.pi * pitch * multiples[:, None] * time)).sum(0)).astype(np.float32)


def rows() -> list[Clip]:
    return [Clip(buzz(0.3 + 0.02 * n), 8000, (word,), who) for who in SPEAKERS for n, word in enumerate(DIGITS)]


ROWS = rows()


def centre(wave: np.ndarray, rate: int = 8000) -> float:
    """Mean frequency of the power, Hz."""
    power = np.abs(np.fft.rfft(wave)) ** 2
    return float((np.fft.rfftfreq(len(wave), 1 / rate) * power).sum() / power.sum())


@pytest.fixture(scope="session")
def data(data_folder: Path) -> Path:
    return data_folder


def test_augmentation_is_finite_and_bounded_and_keeps_its_length_relation():
    rng = default_rng(0)
    for rate in (8000, 16_000, 22_050):
        wave = buzz(rate=rate)
        for _ in range(40):
            out = augment(wave, rate, rng)
            slowest = len(wave) / min(PITCH[0], TEMPO[0]) + 2 * SILENCE[1] * rate
            assert out.dtype == np.float32
            assert out.ndim == 1
            assert np.isfinite(out).all()
            assert np.abs(out).max() <= 1
            assert np.abs(out).max() > 0.01
            assert len(wave) / max(PITCH[1], TEMPO[1]) - 2 <= len(out) <= slowest + 2


def test_augmentation_is_decided_by_the_generator():
    wave = buzz()
    first, again, other = (augment(wave, 8000, default_rng(seed)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_augmentation_leaves_what_it_was_given_alone():
    wave = buzz()
    before = wave.copy()
    for seed in range(20):
        augment(wave, 8000, default_rng(seed))
    np.testing.assert_array_equal(wave, before)


@pytest.mark.parametrize("length", [1, 7, 400])
def test_the_shortest_and_the_silent_clip_can_be_augmented(length):
    for seed in range(20):
        assert np.isfinite(augment(np.zeros(length, np.float32), 8000, default_rng(seed))).all()


@pytest.mark.parametrize("factor", [0.6, 0.8, 1.0, 1.3, 1.8])
def test_stretching_changes_duration_and_not_pitch(factor):
    wave = buzz(1.0)
    out = stretch(wave, 8000, factor)
    assert len(out) == round(len(wave) * factor)
    assert abs(centre(out) - centre(wave)) < 20
    assert abs(out.std() / wave.std() - 1) < 0.1


@pytest.mark.parametrize("factor", [0.8, 1.25])
def test_formants_move_and_pitch_stays(factor):
    wave = buzz(1.0)
    out = shift_formants(wave, 8000, factor)
    assert len(out) == len(wave)
    assert abs(centre(out) / centre(wave) / factor - 1) < 0.12
    spectrum = np.abs(np.fft.rfft(out))
    assert spectrum[np.arange(240, 2400, 120)].sum() > 5 * spectrum[np.arange(300, 2400, 120)].sum()


def test_formants_shifted_by_one_give_the_wave_back():
    np.testing.assert_allclose(shift_formants(buzz(), 8000, 1.0), buzz(), atol=1e-5)


@pytest.mark.parametrize("augmented", [True, False])
def test_a_digit_string_is_decided_by_the_generator(augmented):
    first, again = (digit_string(ROWS, default_rng(5), 3, 7, augmented=augmented) for _ in range(2))
    np.testing.assert_array_equal(first.wave, again.wave)
    assert (first.words, first.rate) == (again.words, again.rate)


def test_a_digit_string_has_as_many_words_as_asked_for():
    rng = default_rng(0)
    counts = {len(digit_string(ROWS, rng, 3, 5).words) for _ in range(60)}
    assert counts == {3, 4, 5}


def test_a_plain_digit_string_holds_its_recordings_in_the_order_of_its_words():
    tones = [Clip(buzz(0.3, pitch=200.0 + 40 * n), 8000, (word,), "ada") for n, word in enumerate(DIGITS)]
    for seed in range(20):
        clip = digit_string(tones, default_rng(seed), 2, 4, augmented=False)
        start = 0
        for word in clip.words:
            body = tones[DIGITS.index(word)].wave[40:-40]
            found = int(np.correlate(clip.wave[start:], body, "valid").argmax()) + start
            np.testing.assert_allclose(clip.wave[found : found + len(body)], body, atol=1e-6)
            start = found + len(body)


def test_digit_strings_come_at_8_khz_and_at_times_at_others():
    rng = default_rng(0)
    rates = [digit_string(ROWS, rng, 1, 2).rate for _ in range(200)]
    assert 100 < rates.count(8000) < 180
    assert 20 < rates.count(16_000) < 80
    assert {digit_string(ROWS, rng, 1, 2, augmented=False).rate for _ in range(20)} == {8000}


def test_rows_of_different_rates_meet_in_one_string():
    mixed = [*ROWS, *(Clip(buzz(rate=16_000), 16_000, (word,), "synthetic") for word in DIGITS)]
    rng = default_rng(1)
    for _ in range(60):
        clip = digit_string(mixed, rng, augmented=bool(rng.integers(2)))
        assert 0.05 < seconds(clip) / len(clip.words) < 2.1


def test_a_digit_string_mostly_has_one_speaker():
    rng = default_rng(0)
    named = [digit_string(ROWS, rng, 5, 7, augmented=False).speaker for _ in range(200)]
    assert 150 < sum(speaker in SPEAKERS for speaker in named) < 195


def test_an_impossible_string_is_refused():
    with pytest.raises(DataError, match="low=4, high=3"):
        digit_string(ROWS, default_rng(0), 4, 3)
    with pytest.raises(DataError, match="0 rows"):
        digit_string([], default_rng(0))


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "zero"), (9, "nine"), (13, "thirteen"), (20, "twenty"), (40, "forty"), (63, "sixty three")],
)
def test_numbers_have_words(number, words):
    assert number_words(number) == words


def test_number_words_are_all_different_and_end_at_99():
    assert len({number_words(number) for number in range(100)}) == 100
    with pytest.raises(DataError, match="100"):
        number_words(100)


def test_questions_about_three_seven_have_the_right_answers():
    clip = Clip(buzz(), 8000, ("three", "seven", "three"))
    wanted = {
        "What is the first digit?": "three",
        "Which digit is spoken last?": "three",
        "How many digits are spoken?": "three",
        "Add the numbers.": "thirteen",
        "What is the largest digit?": "seven",
        "What is the smallest digit?": "three",
        "Is there a seven?": "yes",
        "Is the digit nine spoken?": "no",
        "Say the digits backwards.": "three seven three",
        "Write down the digits you hear.": "three seven three",
    }
    seen: dict[str, set[str]] = {}
    for seed in range(300):
        asked = speech_questions(clip, default_rng(seed))
        assert asked[0] == (TRANSCRIBE, "three seven three")
        for question, answer in asked:
            seen.setdefault(question, set()).add(answer)
    assert all(len(answers) == 1 for answers in seen.values())  # one wording, one answer
    assert {question: seen[question] for question in wanted} == {key: {value} for key, value in wanted.items()}


def test_yes_and_no_are_about_as_frequent():
    rng, answers = default_rng(0), []
    for _ in range(400):
        clip = Clip(buzz(), 8000, tuple(DIGITS[n] for n in rng.integers(10, size=rng.integers(1, 8))))
        answers += [answer for question, answer in speech_questions(clip, rng) if question.startswith("Is ")]
    assert 140 < answers.count("yes") < 260


def test_a_clip_of_other_words_has_no_digit_questions():
    with pytest.raises(DataError, match="hello"):
        speech_questions(Clip(buzz(), 8000, ("hello",)), default_rng(0))


def test_a_missing_recording_file_is_named_with_what_belongs_there(tmp_path):
    with pytest.raises(DataError, match=r"spoken_digits.train\.parquet.*audio"):
        spoken_digits(tmp_path, "train")


def test_bytes_that_are_no_sound_are_refused():
    with pytest.raises(DataError, match="not a sound file"):
        read_wave(b"hello")


def test_missing_espeak_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="install espeak-ng with your system's package manager"):
        espeak("three", voice="en-us", speed=150, pitch=50)


@needs_espeak
def test_espeak_says_the_text_at_its_own_rate():
    clip = espeak("three seven", voice="en-gb+f2", speed=150, pitch=50)
    assert (clip.rate, clip.words) == (22_050, ("three", "seven"))
    assert 0.4 < seconds(clip) < 2.5
    assert np.abs(clip.wave).max() > 0.05


@needs_espeak
def test_a_voice_that_does_not_exist_is_refused():
    with pytest.raises(DataError, match="voice='nobody'"):
        espeak("three", voice="nobody", speed=150, pitch=50)


@needs_espeak
def test_a_voice_bank_is_spoken_once_and_read_afterwards(tmp_path, monkeypatch):
    voices = (Voice("en-us"), Voice("en-gb+f2", 140, 60))
    first = voice_bank(("three", "how many circles"), tmp_path, voices=voices)
    monkeypatch.setenv("PATH", "")  # nobody can speak any more
    again = voice_bank(("three", "how many circles"), tmp_path, voices=voices)
    assert [clip.text for clip in first] == ["three", "three", "how many circles", "how many circles"]
    assert len({clip.speaker for clip in first}) == 2
    assert len(list(tmp_path.iterdir())) == 1
    for one, other in zip(first, again, strict=True):
        assert (one.words, one.rate, one.speaker) == (other.words, 16_000, other.speaker)
        np.testing.assert_array_equal(one.wave, other.wave)
    with pytest.raises(DataError, match="espeak-ng"):
        voice_bank(("four",), tmp_path, voices=voices)


def test_drawn_voices_differ():
    assert len(set(draw_voices(100))) == 100


def test_trimming_keeps_the_sound_and_drops_the_silence():
    wave = np.concatenate([np.zeros(4000, np.float32), buzz(), np.zeros(2000, np.float32)])
    assert 4000 <= len(trim(wave, 8000)) <= 4320


def test_sentences_are_plain_lower_case_words_and_the_splits_are_apart():
    train, validation = sentences(), sentences("validation")
    assert len(train) > 250
    assert len(validation) > 25
    assert not set(train) & set(validation)
    assert all(text.replace(" ", "").isalpha() and text == text.lower() for text in train + validation)


def test_questions_to_be_spoken_are_such_as_pictures_are_asked_and_the_splits_are_apart():
    train, validation = picture_questions(), picture_questions("validation")
    assert len(train) == 226
    assert len(validation) == 22
    assert not set(train) & {*validation, *sentences("validation")}
    assert not set(validation) & set(sentences())
    rng = np.random.default_rng(0)
    asked = {
        question.lower().rstrip("?")
        for _ in range(600)
        for question, _ in questions(nlvr_like(rng), rng, 24, ("count", "color", "position"))
    }
    # red and green are asked after in other pictures alone
    assert len(asked & {*train, *validation}) > 150
    with pytest.raises(DataError, match="split='test'"):
        picture_questions("test")


@pytest.mark.data
def test_recordings_have_their_word_and_speaker(data):
    clips = spoken_digits(data, "validation")
    assert len(clips) == 200
    assert {clip.text for clip in clips} == set(DIGITS)
    assert all(clip.rate == 8000 and 0.1 < seconds(clip) < 2 and np.abs(clip.wave).max() <= 1 for clip in clips)


@pytest.mark.data
@pytest.mark.parametrize("speaker", ["george", "jackson", "lucas", "nicolas"])
def test_a_speaker_left_out_is_absent_and_one_kept_is_alone(data, speaker):
    everyone = spoken_digits(data, "train")
    rest = spoken_digits(data, "train", without=speaker)
    alone = spoken_digits(data, "train", only=speaker)
    assert speaker not in {clip.speaker for clip in rest}
    assert {clip.speaker for clip in alone} == {speaker}
    assert len(rest) + len(alone) == len(everyone)
    sounds = {clip.wave.tobytes() for clip in alone}
    assert not any(clip.wave.tobytes() in sounds for clip in rest)


@pytest.mark.data
def test_an_unknown_speaker_is_refused_with_the_known_ones(data):
    with pytest.raises(DataError, match="george"):
        spoken_digits(data, "train", without="nobody")
