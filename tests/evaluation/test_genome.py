from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from modalora.assistant import make_processor
from modalora.contracts import IGNORED, Batch, Route
from modalora.data.genomes import Gene, Genome, read_genome
from modalora.errors import ConfigError, DataError
from modalora.evaluation import genome as scores
from modalora.models.multimodal import Multimodal
from modalora.models.sizes import genome
from modalora.processing.processor import Row
from modalora.processing.tokenizer import TextTokenizer
from modalora.science import codons
from modalora.science.codons import END


@pytest.fixture(scope="module")
def model() -> Multimodal:
    torch.manual_seed(0)
    made = Multimodal(genome()).eval()
    with torch.no_grad():
        made.decoder.embed_tokens.weight.normal_(std=0.3)  # tied: else all codons are as likely
    return made


def random_ids(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 64, count).tolist()


def genome_of(*genes: list[int]) -> Genome:
    made = tuple(Gene(str(place), "Nobody", codons.decode(ids)) for place, ids in enumerate(genes))
    return Genome("made.fasta", "", made, (), 0)


def test_a_score_is_the_log_of_what_the_model_says_next(model: Multimodal) -> None:
    ids = [END, *random_ids(9), codons.UNKNOWN, *random_ids(5, 1), END]
    bits = scores.model_bits(model, ids, 64)
    for place in (1, 4, 12):
        prefix = Batch(torch.tensor([ids[:place]]), torch.tensor([place]), Route((None,)))
        with torch.inference_mode():
            logs = model(prefix)[0, -1, :64].double().log_softmax(-1)
        # float32 sums of 128 numbers in another order
        assert bits[place] == pytest.approx(-float(logs[ids[place]]) / np.log(2), abs=1e-4)
    assert np.isnan(bits[[0, 10, -1]]).all()  # the start, NNN, the end
    assert np.isnan(bits).sum() == 3


def test_windows_that_overlap_score_every_codon_once_with_half_a_window_before_it(model: Multimodal) -> None:
    ids = [END, *random_ids(40)]
    bits = scores.model_bits(model, ids, 16)
    assert not np.isnan(bits[1:]).any()
    np.testing.assert_allclose(bits[:16], scores.model_bits(model, ids[:16], 16), atol=1e-4)
    np.testing.assert_allclose(bits[16:24], scores.model_bits(model, ids[8:24], 16)[8:], atol=1e-4)
    with pytest.raises(ConfigError, match=r"window=9000 must lie in 4 \.\. 8192"):
        scores.model_bits(model, ids, 9000)


def test_padding_is_never_in_the_loss(model: Multimodal) -> None:
    processor = make_processor(genome(), TextTokenizer(codons.definition()))
    short, long = ([END, *random_ids(count), codons.UNKNOWN, END] for count in (7, 30))
    alone = processor.collate([Row(ids=short, labels=codons.targets(short))])
    both = processor.collate([Row(ids=ids, labels=codons.targets(ids)) for ids in (short, long)])
    assert both.labels is not None
    assert (both.labels[0, len(short) :] == IGNORED).all()
    assert both.labels[0, len(short) - 2] == IGNORED  # NNN
    own, rows = model.loss(both)
    assert int((rows == 0).sum()) == len(short) - 2  # all but the first id and NNN
    torch.testing.assert_close(own[rows == 0], model.loss(alone)[0])


def test_tables_are_probabilities_and_find_what_they_were_made_from() -> None:
    rng = np.random.default_rng(0)
    step = rng.permutation(64)  # a language in which each codon decides the next

    def told(count: int, noise: float, seed: int) -> list[int]:
        draw, ids = np.random.default_rng(seed), [3]
        while len(ids) < count:
            ids.append(int(draw.integers(64)) if draw.random() < noise else int(step[ids[-1]]))
        return [END, *ids, END]

    tables = scores.fit([told(3000, 0.1, seed) for seed in range(3)])
    rows = tables.bigram + tables.weight * tables.unigram
    assert tables.unigram.sum() == pytest.approx(1)
    assert rows.min() > 0
    fresh = told(2000, 0.1, 9)
    assert np.nanmean(tables.bigram_bits(fresh)) < 1.5  # its entropy is 1.05 bits
    assert np.nanmean(tables.unigram_bits(fresh)) > 5.9
    shuffled = [END, *np.random.default_rng(1).permutation(fresh[1:-1]).tolist(), END]
    assert np.nanmean(tables.bigram_bits(shuffled)) > np.nanmean(tables.unigram_bits(shuffled))
    assert np.nanmean(tables.unigram_bits(shuffled)) == pytest.approx(np.nanmean(tables.unigram_bits(fresh)))


def test_the_adaptive_table_learns_what_an_organism_prefers() -> None:
    draw = np.random.default_rng(0)
    few = [[END, *draw.choice(draw.permutation(64)[:16], 600).tolist(), END] for _ in range(5)]
    tables = scores.fit(few[:4])
    assert np.nanmean(tables.adaptive_bits(few[4])) < 4.5 < np.nanmean(tables.unigram_bits(few[4]))
    seen = tables.unigram.copy()
    tables.adaptive_bits(few[4])
    np.testing.assert_array_equal(tables.unigram, seen)  # scoring leaves the table alone
    with pytest.raises(DataError, match="there are 1"):
        scores.fit(few[:1])


def test_the_control_keeps_usage_and_loses_order() -> None:
    genes = genome_of(random_ids(50, 1), random_ids(30, 2))
    plain, mixed = scores.document_of(genes), scores.document_of(genes, np.random.default_rng(0))
    assert plain != mixed
    for one, other in zip(np.split(plain, [51]), np.split(mixed, [51]), strict=True):
        assert sorted(one) == sorted(other)
    assert [len(own) for own in scores.by_gene(plain, np.zeros(len(plain)))] == [50, 30]


def test_an_interval_covers_the_mean_and_narrows_with_more_groups() -> None:
    draw = np.random.default_rng(0)
    groups = [draw.normal(size=20) + 3 for _ in range(200)]
    mean, low, high = scores.mean_interval(groups)
    assert low < mean < high
    assert mean == pytest.approx(np.concatenate(groups).mean())
    _, few_low, few_high = scores.mean_interval(groups[:10])
    assert high - low < few_high - few_low


def test_long_genes_weigh_more_in_the_interval_as_in_the_mean() -> None:
    mean, low, high = scores.mean_interval([np.zeros(90), np.ones(10)] * 10)
    assert (mean, low < mean < high < 0.3) == (0.1, True)  # the mean of genes' own means is 0.5


def test_the_longest_inverted_repeat_is_found_to_the_letter() -> None:
    draw = np.random.default_rng(5)

    def letters(count: int) -> str:
        return "".join(draw.choice(list("ACGT"), count))

    copy, middle = letters(700), letters(301)
    # what touches the copies must not go on pairing by chance
    sequence = f"{letters(123)}A{copy}{middle}{codons.reverse_complement(copy)}A{letters(77)}"
    found = scores.inverted_repeat(sequence)
    inside = sequence[found.first : found.first + found.length]
    assert copy in inside
    assert sequence[found.second : found.second + found.length] == codons.reverse_complement(inside)
    assert found.length <= 704
    with pytest.raises(DataError, match="no inverted repeat of 200"):
        scores.inverted_repeat(letters(2000))


@pytest.mark.data
def test_the_chloroplast_holds_the_published_repeat(data_folder: Path) -> None:
    pytest.importorskip("Bio", reason="GenBank is read with Biopython")
    (letters,) = read_genome(data_folder / "genomes" / "NC_000932.gb").sequences
    assert scores.inverted_repeat(letters) == scores.InvertedRepeat(84_170, 128_214, 26_264)
    probes = scores.repeat_probes(letters, size=64, between=32)
    assert len(probes) == 136
    for probe in probes:
        assert codons.reverse_complement_ids(probe.first) == list(probe.second)
        assert (len(probe.first), len(probe.between)) == (64, 32)


def test_a_probe_that_cannot_see_the_first_copy_does_not_depend_on_it(model: Multimodal) -> None:
    first, middle = random_ids(20, 1), random_ids(10, 2)
    probe = scores.Probe(tuple(first), tuple(middle), tuple(codons.reverse_complement_ids(first)))
    other = scores.Probe(tuple(random_ids(20, 3)), tuple(middle), probe.second)
    kept = scores.Probe(other.first, probe.between, probe.second)
    short = scores.copy_bits(model, probe, "inverted", "short", other)
    np.testing.assert_array_equal(short, scores.copy_bits(model, kept, "inverted", "short", other))
    whole = scores.copy_bits(model, probe, "inverted", "whole", other)
    assert np.abs(whole - scores.copy_bits(model, probe, "inverted", "replaced", other)).max() > 1e-4
    assert whole.shape == (20,)


def test_a_scrambled_copy_holds_the_same_codons(model: Multimodal) -> None:
    first = [7] * 6  # in any order the same
    probe = scores.Probe(tuple(first), (1, 2, 3), tuple(codons.reverse_complement_ids(first)))
    one, other = (scores.copy_bits(model, probe, kind, "whole", probe) for kind in ("inverted", "scrambled"))
    np.testing.assert_array_equal(one, other)
    with pytest.raises(ConfigError, match="sight='half' must be one of whole, short, replaced"):
        scores.copy_bits(model, probe, "inverted", "half", probe)


def test_a_model_that_learns_order_beats_the_unigram_and_loses_it_where_codons_are_shuffled() -> None:
    step = np.random.default_rng(4).permutation(64)  # a language in which each codon mostly decides the next

    def gene(count: int, seed: int) -> list[int]:
        draw, ids = np.random.default_rng(seed), [int(seed) % 64]
        while len(ids) < count:
            ids.append(int(draw.integers(64)) if draw.random() < 0.1 else int(step[ids[-1]]))
        return ids

    torch.manual_seed(0)
    small = replace(genome().decoder, hidden_size=64, intermediate_size=96, num_hidden_layers=1)
    learner = Multimodal(replace(genome(), decoder=small)).train()
    optimizer = torch.optim.AdamW(learner.parameters(), lr=0.01)
    for number in range(60):
        ids = torch.tensor([[END, *gene(63, 16 * number + row)] for row in range(16)])
        values, _ = learner.loss(Batch(ids, torch.full((16,), 64), Route((None,) * 16), labels=ids))
        optimizer.zero_grad()
        values.mean().backward()
        optimizer.step()
    learner.eval()
    held = genome_of(gene(400, 5000), gene(400, 6000))
    plain, mixed = scores.document_of(held), scores.document_of(held, np.random.default_rng(0))
    tables = scores.fit([scores.document_of(genome_of(gene(2000, 7000 + place))) for place in range(3)])
    own, control = (np.nanmean(scores.model_bits(learner, one, 64)) for one in (plain, mixed))
    unigram, same = (np.nanmean(tables.unigram_bits(one)) for one in (plain, mixed))
    assert same == pytest.approx(unigram)
    assert own < unigram - 1
    assert control > unigram
