"""The worked example of a modality: DNA on the bundled model (examples/dna)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import modalora
from modalora import modality
from modalora.config import load_run
from modalora.errors import DataError, MediaError
from modalora.processing.questions import question_messages
from modalora.science.codons import NUMBER
from modalora.training.run import run_recipe

pytest.importorskip("Bio", reason="the example reads genes with Biopython: pip install -e '.[science]'")
EXAMPLE = Path(__file__).parents[1] / "examples" / "dna"
FASTA = ">gene\nATGGCC\nAAATAA\n"


@pytest.fixture(scope="module", name="dna")
def example() -> Iterator[Any]:
    """The module of the example, as if it were installed."""
    sys.path.insert(0, str(EXAMPLE))
    import modalora_dna

    before = dict(modality._given)
    modality.register(modalora_dna.MODALITY)
    yield modalora_dna
    sys.path.remove(str(EXAMPLE))
    modality._given.clear()
    modality._given.update(before)


@pytest.fixture(scope="module")
def assistant(dna: Any) -> modalora.Assistant:
    torch.manual_seed(0)
    assistant = modalora.load("nano")
    assistant.add_modality("dna")
    with torch.no_grad():
        for linear in assistant.model.decoder.routed().values():  # an adapter that does change its own rows
            linear.lora_B["dna"].normal_(std=0.05)
    return assistant


def test_codons_are_read_in_frame_and_what_is_no_codon_is_unknown(dna: Any, tmp_path: Path) -> None:
    sizes = dna.Sizes()
    item, tokens = dna.features("ATGgccuaaNNAcc", sizes)
    assert tokens == 4
    assert item["codons"].tolist() == [NUMBER["ATG"], NUMBER["GCC"], NUMBER["TAA"], dna.UNKNOWN]
    (tmp_path / "gene.fasta").write_text(FASTA)
    assert torch.equal(
        dna.features(tmp_path / "gene.fasta", sizes)[0]["codons"], dna.features("ATGGCCAAATAA", sizes)[0]["codons"]
    )
    (encoded,) = sizes.encoder()([item])
    assert encoded.shape == (4, sizes.hidden_size)


@pytest.mark.parametrize(
    ("payload", "told"),
    [
        ("absent.fasta", "'absent.fasta' is neither DNA letters nor a fasta file of one record"),
        ("absent.gb", "nor a genbank file of one record"),
        ("ACG" * 800, "the DNA has 800 whole codons; give 1 to 768"),
    ],
)
def test_what_is_no_dna_is_refused(dna: Any, payload: str, told: str) -> None:
    with pytest.raises(MediaError, match=told):
        dna.features(payload, dna.Sizes())


def test_two_records_are_refused(dna: Any, tmp_path: Path) -> None:
    (tmp_path / "two.fasta").write_text(FASTA + FASTA)
    with pytest.raises(MediaError, match="of one record"):
        dna.features(tmp_path / "two.fasta", dna.Sizes())


def test_answers_of_the_tasks_are_biopythons(dna: Any) -> None:
    from Bio.Seq import Seq

    rng = np.random.default_rng(0)
    gene = dna.Gene("made", "Nobody", "".join(rng.choice(list("ACGT"), size=300)))
    for _ in range(20):
        asked, answered = dna.task(dna.TRANSLATE, gene, rng)
        sequence = Seq(asked["content"][0]["dna"])
        assert answered["content"].replace(" ", "") == str(sequence.translate(table=11))
        asked, answered = dna.task(dna.REVERSE, gene, rng)
        sequence = Seq(asked["content"][0]["dna"])
        assert answered["content"].replace(" ", "") == str(sequence.reverse_complement())


def test_tasks_ask_about_any_number_of_codons_up_to_the_most(dna: Any) -> None:
    rng = np.random.default_rng(0)
    gene = dna.Gene("made", "Nobody", "ATG" * 100)
    most = dna.LENGTHS[dna.TRANSLATE]
    drawn = {len(dna.task(dna.TRANSLATE, gene, rng)[0]["content"][0]["dna"]) // 3 for _ in range(100)}
    assert drawn == set(range(1, most + 1))
    assert {len(dna.task(dna.TRANSLATE, gene, rng, most)[0]["content"][0]["dna"]) for _ in range(9)} == {3 * most}


def test_the_scored_probabilities_of_the_64_codons_sum_to_one(dna: Any, assistant: modalora.Assistant) -> None:
    stretches = [(["ATG", "AAA"], [*before, codon]) for before in ([], ["GCC", "CAT"]) for codon in dna.CODONS]
    logs = torch.stack([own[-1] for own in dna.codon_logs(assistant, stretches)]).view(2, 64)
    torch.testing.assert_close(logs.exp2().sum(1), torch.ones(2, dtype=logs.dtype), atol=1e-5, rtol=0)
    assert logs.std() > 0.1  # not one number 64 times


def test_a_score_is_the_log_of_what_the_model_says_next(dna: Any, assistant: modalora.Assistant) -> None:
    """The longhand way: ask for the logits after each prefix, one by one, and normalise over the tokens that go on."""
    tokenizer = assistant.processor.tokenizer
    (scored,) = dna.codon_logs(assistant, [(["ATG", "AAA"], ["GCC", "TAT"])])
    spelled = {codon: tokenizer.encode(f"A {codon}")[1:] for codon in dna.CODONS}
    row = assistant.processor.row(dna.conversation(["ATG", "AAA"], dna.CONTINUE, "GCC"), answer=False)
    row.ids = row.ids[: row.ids.index(tokenizer.control("<|assistant|>")) + 1] + tokenizer.encode("GCC")
    total = 0.0
    for at, token in enumerate(spelled["TAT"]):
        row.labels = list(row.ids)
        with torch.inference_mode():
            logs = assistant.model(assistant.processor.collate([row]))[0, -1].double().log_softmax(-1)
        allowed = {path[at] for path in spelled.values() if path[:at] == spelled["TAT"][:at]}
        total += float(logs[token] - logs[sorted(allowed)].logsumexp(0)) / np.log(2)
        row.ids = [*row.ids, token]
    assert float(scored[1]) == pytest.approx(total, abs=1e-4)  # float32 logits up to 30


def test_text_pictures_and_sound_keep_every_bit(assistant: modalora.Assistant) -> None:
    plain = modalora.load("nano")
    demo = modalora.checkpoint.find.BUNDLED / "demo"
    for messages in (
        question_messages("The old man went home."),
        question_messages("How many?", image=demo / "scene.png"),
        question_messages("", audio=demo / "number.wav"),
    ):
        assert torch.equal(assistant.logits(messages), plain.logits(messages))


def test_dna_is_asked_like_any_other_medium(
    assistant: modalora.Assistant, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    assistant.save(tmp_path / "model")
    (tmp_path / "gene.fasta").write_text(FASTA)
    code, out, _ = run("ask", str(tmp_path / "model"), "Translate.", "--media", f"dna={tmp_path / 'gene.fasta'}")
    assert code == 0
    assert out.strip() == assistant.ask("Translate.", media={"dna": "ATGGCCAAATAA"}).text.strip()


def test_absent_genomes_are_named(dna: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="NC_000932.gb is missing; `data` must name a folder with genomes"):
        dna.training_genes(tmp_path)


@pytest.mark.data
def test_no_training_row_holds_a_held_out_gene(dna: Any, data_folder: Path) -> None:
    genes = dna.training_genes(data_folder)
    plastid = dna.coding_genes(data_folder / "genomes" / dna.PLASTID)
    plasmid = dna.coding_genes(data_folder / "genomes" / dna.PLASMID)
    assert (len(plasmid), len(genes)) == (10, 81)
    held = [gene for gene in plastid if gene.name in dna.HELD_OUT]
    assert len(held) == len(dna.HELD_OUT)
    assert not {gene.letters for gene in genes} & {gene.letters for gene in (*held, *plasmid)}
    stretches = {gene.letters[at : at + 60] for gene in genes for at in range(len(gene.letters) - 59)}
    for gene in plasmid:  # nor twenty codons of the plasmid
        assert not any(gene.letters[at : at + 60] in stretches for at in range(len(gene.letters) - 59))


@pytest.mark.data
def test_the_recipe_trains_its_own_parts_on_the_frozen_model(
    dna: Any, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = ["steps=2", "rows=2", "whiten=[]", f"data={data_folder}", "optim.warmup_steps=0"]
    run_recipe(load_run(EXAMPLE / "recipe.yaml", overrides))
    before, after = modalora.load("nano"), modalora.load("runs/dna/model")
    kept = before.model.state_dict()
    assert all(torch.equal(after.model.state_dict()[name], tensor) for name, tensor in kept.items())
    verdict = before.load_adapter("runs/dna/dna-lora", "dna")
    assert (verdict.modules, len(verdict.zero)) == (("dna",), 0)
