from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from modalora.config import load_run
from modalora.config.recipes import RECIPES
from modalora.contracts import IGNORED
from modalora.data import genomes, organisms
from modalora.data.genome_rows import GeneRows, RepeatRows, WindowRows, repeat
from modalora.data.genomes import Gene, Genome, read_genome
from modalora.errors import ConfigError, DataError
from modalora.science import codons
from modalora.science.codons import END
from modalora.training.start import make_mixture, open_context

pytest.importorskip("Bio", reason="genomes are read with Biopython: pip install -e '.[science]'")

GENBANK = """\
LOCUS       MADE                     135 bp    DNA     linear   BCT 01-JAN-2000
DEFINITION  made.
ACCESSION   MADE
SOURCE      Made up
  ORGANISM  Made up
FEATURES             Location/Qualifiers
     CDS             1..99
                     /gene="one"
     CDS             complement(34..132)
                     /gene="two"
     CDS             join(1..30,OTHER.1:5..70)
                     /gene="elsewhere"
     CDS             1..100
                     /gene="no frame"
ORIGIN
        1 {letters}
//
"""


def random_letters(count: int, seed: int = 0) -> str:
    return "".join(np.random.default_rng(seed).choice(list("ACGT"), count))


@pytest.fixture
def made(tmp_path: Path) -> Path:
    path = tmp_path / "made.gb"
    path.write_text(GENBANK.format(letters=random_letters(135).lower()))
    return path


def genome(*sequences: str) -> Genome:
    genes = tuple(Gene(str(place), "Nobody", one[: len(one) // 3 * 3]) for place, one in enumerate(sequences))
    return Genome("made.fasta", "", genes, sequences, 0)


def test_genes_are_read_on_both_strands_and_what_has_no_frame_is_counted(made: Path) -> None:
    found = read_genome(made)
    letters = random_letters(135)
    assert [gene.letters for gene in found.genes] == [letters[:99], codons.reverse_complement(letters[33:132])]
    assert (found.organism, found.skipped, found.sequences) == ("Made up", 2, (letters,))


def test_a_gene_that_begins_in_a_codon_is_read_in_its_frame(made: Path) -> None:
    letters = random_letters(135)
    for start, wanted in (("2", letters[1:100]), ("3", None), ("4", None)):
        told = GENBANK.replace('/gene="no frame"', f"/codon_start={start}").replace('/gene="one"', "/codon_start=9")
        made.with_name(f"{start}.gb").write_text(told.format(letters=letters))
        found = read_genome(made.with_name(f"{start}.gb"))
        assert [gene.letters for gene in found.genes] == [codons.reverse_complement(letters[33:132])] + [wanted] * bool(
            wanted
        )


def test_a_gene_that_ends_behind_its_sequence_is_counted_and_a_cut_file_refused(made: Path) -> None:
    made.write_text(GENBANK.replace("1..99", "37..159").format(letters=random_letters(135)))
    assert [gene.name for gene in read_genome(made).genes] == ["two"]
    cut = made.with_name("cut.gb")
    cut.write_text(GENBANK.format(letters=random_letters(100)))
    with pytest.raises(DataError, match="cut.gb is cut short or altered: .*135.*100.*; copy or fetch it again"):
        read_genome(cut)


def test_letters_of_rna_are_read_as_those_of_dna(made: Path) -> None:
    wanted = read_genome(made)
    made.with_name("rna.GB").write_text(GENBANK.format(letters=random_letters(135).lower().replace("t", "u")))
    found = read_genome(made.with_name("rna.GB"))  # an ending in capitals, too
    assert (found.genes, found.sequences, found.skipped) == (wanted.genes, wanted.sequences, wanted.skipped)
    gene = "AUG" + "GCU" * 40 + "UAA"
    made.with_name("rna.fasta").write_text(f"\ufeff>one\nCC{gene}\n")  # as editors of Windows begin a file
    (one,) = read_genome(made.with_name("rna.fasta")).genes
    assert one.letters == gene.replace("U", "T")


def test_a_fasta_record_gives_its_longest_open_frame(tmp_path: Path) -> None:
    gene = "ATG" + "GCC" * 40 + "TAA"
    (tmp_path / "made.fasta").write_text(f">one Felis catus, a gene\nCC{gene}CATGAAATAG\n")
    (found,) = read_genome(tmp_path / "made.fasta").genes
    assert (found.letters, found.organism) == (gene, "Felis catus")
    assert genomes.longest_frame("CCATGAAATAGATGCCCCCCTGACC") == "ATGCCCCCCTGA"
    assert genomes.longest_frame("CCC") == ""
    assert genomes.longest_frame("ATGGCCGNAGCCTAAATGTAA") == "ATGTAA"


def test_a_gene_that_comes_nearly_twice_is_kept_once() -> None:
    one = random_letters(300)
    near = one[:290] + random_letters(10, 1)
    genes = [Gene("a", "x", one), Gene("b", "y", near), Gene("c", "z", random_letters(300, 2))]
    assert [gene.name for gene in genomes._distinct(genes)] == ["a", "c"]


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"arab1.gb is neither in .*; run `modalora data genomes`"):
        genomes.read_genomes(tmp_path, tmp_path, ["arab1.gb"])
    with pytest.raises(DataError, match=r"own.gb is neither in .*`data` must name a folder with genomes/"):
        genomes.read_genomes(tmp_path, tmp_path, ["own.gb"])
    (tmp_path / "NC_005816.gb").write_text(GENBANK.format(letters=random_letters(135)))
    with pytest.raises(DataError, match="has the sha256 [0-9a-f]{64}, not f11a45"):
        read_genome(tmp_path / "NC_005816.gb")
    (tmp_path / "words.fasta").write_text("no record at all\n")
    with pytest.raises(DataError, match="words.fasta") as error:
        read_genome(tmp_path / "words.fasta")
    assert "\n" not in str(error.value)
    (tmp_path / "protein.fasta").write_text(">one\nMSTEYKLVVVGAGGVGKSALTIQLIQ\n")
    with pytest.raises(DataError, match="protein.fasta: one holds E, I, L, P?.*which are no nucleotides; give DNA"):
        read_genome(tmp_path / "protein.fasta")
    empty = GENBANK.partition("ORIGIN")[0] + "CONTIG      join(OTHER.1:1..135)\n//\n"
    (tmp_path / "empty.gb").write_text(empty)
    with pytest.raises(DataError, match="empty.gb: MADE comes without its sequence; fetch it with it"):
        read_genome(tmp_path / "empty.gb")


def test_shares_lie_between_none_and_all() -> None:
    many = genome(random_letters(3000))
    with pytest.raises(ConfigError, match="made=7 is a share of the rows"):
        GeneRows([many], 20, made=7)
    with pytest.raises(ConfigError, match="inverted=-3 is a share of the rows"):
        RepeatRows([many], 64, inverted=-3)


def test_the_genetic_code_is_biopythons() -> None:
    from Bio.Data import CodonTable

    table = CodonTable.unambiguous_dna_by_id[11]
    assert {codon: table.forward_table.get(codon, "*") for codon in codons.CODONS} == organisms.AMINO


def test_made_up_organisms_keep_proteins_and_differ_in_their_codons() -> None:
    rng = np.random.default_rng(3)
    shares = []
    for _ in range(30):
        made = organisms.made_up(["MKKLLVAG*" * 5], rng, 60)
        assert len(made) == 60
        assert set(made) <= set(codons.CODONS)
        shares.append(np.mean([codon[2] in "GC" for codon in made]))
    assert np.std(shares) > 0.1  # from organisms rich in A and T to such rich in G and C


def test_rows_of_genes_are_whole_codons_of_one_genome() -> None:
    few = [genome(random_letters(90, seed), random_letters(120, seed + 10)) for seed in range(3)]
    rows, shuffled = GeneRows(few, 64), GeneRows(few, 64, shuffled=True)
    known = ["".join(gene.letters for gene in one.genes) for one in few]
    kept = 0
    for seed in range(20):
        ids = rows(np.random.default_rng(seed))
        assert len(ids) == 64
        pieces = codons.decode([END if one == END else one for one in ids])
        runs = "".join("," if one == END else codons.CODONS[one] for one in ids).split(",")
        assert any(all(run in own for run in runs) for own in known), pieces
        mixed = shuffled(np.random.default_rng(seed))
        runs = "".join("," if one == END else codons.CODONS[one] for one in mixed).split(",")
        kept += all(any(run in own for own in known) for run in runs)
    assert kept == 0


def test_windows_come_from_both_strands_in_any_frame() -> None:
    letters = random_letters(400)
    rows, other = WindowRows([genome(letters)], 20), codons.reverse_complement(letters)
    found = [codons.decode(rows(np.random.default_rng(seed))) for seed in range(60)]
    assert {one in letters for one in found} == {True, False}
    assert all(one in letters or one in other for one in found)
    assert {letters.index(one) % 3 for one in found if one in letters} == {0, 1, 2}
    with pytest.raises(DataError, match="none of these sequences has the 602 letters of a window"):
        WindowRows([genome(letters)], 200)


@pytest.mark.parametrize(("kind", "share"), [("inverted", 1.0), ("direct", 0.0)])
def test_a_row_of_repeats_holds_a_stretch_and_its_copy(kind: str, share: float) -> None:
    rows = RepeatRows([genome(random_letters(2000))], 96, inverted=share, least=8)
    distances = []
    for seed in range(60):
        ids = rows(np.random.default_rng(seed))
        assert len(ids) == 96
        # by chance, eight codons of 64 agree once in 10^14
        found = [
            (at, there)
            for at in range(81)
            for there in range(at + 8, 89)
            if ids[there : there + 8] == repeat(ids[at : at + 8], kind)
        ]
        assert found, seed
        distances.append(max(there - at for at, there in found))
    assert min(distances) < 30 < 60 < max(distances)


def test_kinds_of_repeats() -> None:
    ids = codons.encode("ATGGCC")
    assert codons.decode(repeat(ids, "inverted")) == "GGCCAT"
    assert codons.decode(repeat(ids, "direct")) == "ATGGCC"
    assert codons.decode(repeat(ids, "mirrored")) == "GCCATG"
    with pytest.raises(DataError, match="'sideways' is none of direct, inverted, mirrored"):
        repeat(ids, "sideways")


def test_a_recipe_reads_genomes_into_labelled_rows(made: Path, tmp_path: Path) -> None:
    (tmp_path / "genomes").mkdir()
    (tmp_path / "genomes" / "own.fasta").write_text(f">n\nATG{'GCCNAA' * 60}TAA\n{random_letters(3000)}\n")
    run = load_run(RECIPES / "genome-2-repeats.yaml", [
        f"data={tmp_path}", f"cache={tmp_path}", "window=64", "rows=4", "mixture.0.options={files: [own.fasta]}",
        "mixture.1.options={files: [own.fasta]}",
    ])  # fmt: skip
    (batch,) = make_mixture(run, open_context(run)).take()
    assert batch.input_ids.shape == (4, 64)
    assert batch.labels is not None
    unknown = batch.input_ids == codons.UNKNOWN
    assert (batch.labels[unknown] == IGNORED).all()
    assert (batch.labels[~unknown] == batch.input_ids[~unknown]).all()
    context = open_context(run)
    bad = run.mixture[0].model_copy(update={"options": {"files": ["own.fasta"], "without": ["arab1.gb"]}})
    wrong = run.model_copy(update={"mixture": [bad]})
    with pytest.raises(ConfigError, match="without: arab1.gb is none of the files own.fasta"):
        make_mixture(wrong, context)
    other = load_run(RECIPES / "nano-1-base.yaml", ["init=bundled/nano"])
    words = replace(context, processor=open_context(other).processor)
    with pytest.raises(ConfigError, match="genomes are read by a model of codons: init=genome"):
        make_mixture(run, words)


@pytest.mark.data
def test_no_training_gene_shares_twenty_codons_with_the_held_out_organism(data_folder: Path) -> None:
    cache = Path("runs/cache")  # where a person has fetched them, all; else those of the data folder
    here = [name for name in genomes.TRAINING if name not in genomes.FETCHED or (cache / "genomes" / name).is_file()]
    training = genomes.read_genomes(data_folder, cache, here)
    (held,) = genomes.read_genomes(data_folder, cache, list(genomes.HELD_OUT))
    assert not {gene.organism for one in training for gene in one.genes} & {gene.organism for gene in held.genes}
    stretches = {
        gene.letters[at : at + 60] for one in training for gene in one.genes for at in range(len(gene.letters) - 59)
    }
    assert len(stretches) > 80_000
    for gene in held.genes:
        assert not any(gene.letters[at : at + 60] in stretches for at in range(len(gene.letters) - 59))
    assert (len(held.genes), sum(len(gene.ids) for gene in held.genes)) == (10, 1938)
