"""Genomes: files of genes and whole sequences.

Files are FASTA, GenBank or EMBL, read with Biopython. Those of `FILES` are known by their bytes: some lie in the data
folder under genomes/, the rest are test data of Biopython's source archive, which `modalora data genomes` fetches into
the cache. Training and held-out files have no organism in common.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tarfile
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from modalora.disk import digest
from modalora.errors import DataError, WorkError
from modalora.science.codons import encode

if TYPE_CHECKING:
    from Bio.SeqRecord import SeqRecord

TRAINING = {  # file -> sha256
    "NC_000932.gb": "a8b5d8239001f56a5b8b3ff047b10338b839329cf594aad36bfa4755a0dfb480",  # Arabidopsis, chloroplast
    "arab1.gb": "02f9e5659a90d1e77f87a8b83956b1f8b1fdbd640a3adc3839bb13d94e627196",  # Arabidopsis, chromosome 1
    "extra_keywords.gb": "da60c0c49dfa9e3dfd81758036d332ef2ac4e8b1e0bd3f58e1af9610da353c07",  # Drosophila
    "drosophila.fasta": "7ca851970adf3cb35a0c3738c60553f3a092a02061e0e344b7b0200611f21127",  # Adh of several flies
    "egfr_nucl.fa": "40de3eefa413a9ac90e84516fb7aeb1023007f8f399f9e92e25e45c14c836ea0",  # EGFR of a fly and of mammals
    "SC10H5.embl": "2678a5a997c344c4370f5af0ce9f75b33adc9f578c5f1a6a3eae74e5203aadc8",  # Streptomyces
    "TRBG361.embl": "ba8a00320b1048fdd3622e806ca61a0949054772076c69df892192128bbcf036",  # white clover
    "NC_001422.gbk": "e90976a8f739af9603925e86447e468ec37b9f09b0d20a181eb3cb42d5864eb3",  # phage phiX174
    "EU851978.gbk": "02de4db2d95efe11a72f8a73616f004f5542c740b332a804564af00eb3985034",  # influenza A, 2007
    "HM138502.gbk": "754ee5190d646725a26bdef9de8515b4612ff5e4b71d6ebcab5c7a02b400fe4f",  # influenza A, 2009
    "noref.gb": "20adafb225e96f2e92ec2162cb614d175851595af4050c49cb0a75899607b1cc",  # one human gene
}
HELD_OUT = {
    "NC_005816.gb": "f11a45c8abf0ae0b9340f3513595d50277ea2ae0f74acaef2666b2f42485f65a",  # Yersinia pestis, a plasmid
}
FILES = TRAINING | HELD_OUT
NUCLEOTIDES = "ACGTRYSWKMBDHVN-.*"  # IUPAC's letters, gaps, and what marks an end
LEAST = 30  # codons of a gene that is read

ARCHIVE = "biopython==1.88"
ARCHIVE_SHA256 = "9aaa31c0bda4d059f7b2ee00bfdb5cbb73ade3057aa4b737a7cc0187091d071a"
FETCHED = tuple(name for name in TRAINING if name not in ("NC_000932.gb", "drosophila.fasta", "egfr_nucl.fa"))


@dataclass(frozen=True, slots=True)
class Gene:
    """A coding sequence in whole codons, ACGT only."""

    name: str
    organism: str
    letters: str

    @property
    def ids(self) -> list[int]:
        """Its codons (science/codons.py)."""
        return encode(self.letters, partial="refuse")


@dataclass(frozen=True, slots=True)
class Genome:
    """What one file holds. skipped: coding sequences that cannot be used, as some reach into other records."""

    file: str
    sha256: str
    genes: tuple[Gene, ...]
    sequences: tuple[str, ...]
    skipped: int

    @property
    def organism(self) -> str:
        """The organism of the first gene."""
        return self.genes[0].organism if self.genes else self.file


def records(path: Path) -> list[SeqRecord]:
    """Return the records of a FASTA, GenBank or EMBL file, told by its ending; in capitals, T for U.

    Raises DataError.
    """
    try:
        from Bio import BiopythonWarning, SeqIO
    except ModuleNotFoundError:
        raise DataError(f"reading {path.name} needs Biopython; pip install -e '.[science]' in your clone") from None
    kinds = dict.fromkeys((".gb", ".gbk", ".gbff", ".genbank"), "genbank") | {".embl": "embl"}
    kind = kinds.get(path.suffix.lower(), "fasta")
    try:
        with warnings.catch_warnings(record=True) as told, path.open(encoding="utf-8-sig") as file:
            warnings.simplefilter("always", BiopythonWarning)
            found = list(SeqIO.parse(file, kind))
    except FileNotFoundError:
        raise DataError(f"{path} is missing; give a FASTA, GenBank or EMBL file") from None
    except (OSError, ValueError, TypeError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise DataError(
            f"{path} is no {kind} file: {reason:.200}; name it by its format (.gb, .embl, .fasta)"
        ) from None
    if not found:
        raise DataError(f"{path} holds no {kind} record; name it by its format (.gb, .embl, .fasta)")
    # other warnings are of coordinates in other records, which are skipped
    if cut := [str(one.message) for one in told if "xpected sequence length" in str(one.message)]:
        raise DataError(f"{path} is cut short or altered: {cut[0]}; copy or fetch it again")
    for record in found:
        if not record.seq.defined:
            raise DataError(f"{path}: {record.id} comes without its sequence; fetch it with it (NCBI: gbwithparts)")
        record.seq = record.seq.upper().replace("U", "T")
        if strange := set(str(record.seq)) - set(NUCLEOTIDES):
            listed = ", ".join(sorted(strange))
            raise DataError(f"{path}: {record.id} holds {listed:.60}, which are no nucleotides; give DNA or RNA")
    return found


@cache
def read_genome(path: Path) -> Genome:
    """Return the genes and sequences of a file: a gene that stands there twice, or nearly so, once.

    In GenBank and EMBL files the genes are the coding sequences; of a FASTA record, the longest open frame of this
    strand. Raises DataError, also when a file of `FILES` has other bytes than it had.
    """
    found = records(path)
    sha256 = digest(path)
    if sha256 != FILES.get(path.name, sha256):
        raise DataError(f"{path} has the sha256 {sha256}, not {FILES[path.name]}; fetch it again, or rename your own")
    genes: list[Gene] = []
    skipped = 0
    for record in found:
        coding = _coding(record) if record.annotations else [_open_frame(record)]
        usable = [gene for gene in coding if gene is not None and len(gene.letters) >= 3 * LEAST]
        skipped += len(coding) - len(usable)
        genes += usable
    return Genome(path.name, sha256, tuple(_distinct(genes)), tuple(str(one.seq) for one in found), skipped)


def _coding(record: SeqRecord) -> list[Gene | None]:
    organism = str(record.annotations.get("organism", record.id))
    genes: list[Gene | None] = []
    for feature in record.features:
        if feature.type != "CDS":
            continue
        start = feature.qualifiers.get("codon_start", ["1"])[0]
        try:
            letters = str(feature.extract(record.seq))
        except ValueError:  # it reaches into a record that is not here
            letters = ""
        # what ends behind the sequence is shorter than told; a gene that begins in the midst of a codon says where
        told = feature.location is not None and len(letters) == len(feature.location) and start in ("1", "2", "3")
        letters = letters[int(start) - 1 :] if told else ""
        first = feature.qualifiers.get("gene", feature.qualifiers.get("locus_tag", [f"CDS {len(genes) + 1}"]))[0]
        whole = letters and len(letters) % 3 == 0 and set(letters) <= set("ACGT")
        genes.append(Gene(first, organism, letters) if whole else None)
    return genes


def _open_frame(record: SeqRecord) -> Gene | None:
    letters = longest_frame(str(record.seq))
    words = re.search(r"\b([A-Z][a-z]+|[A-Z]\.) ?([a-z]{3,})", record.description)
    name = str(record.id)
    return Gene(name, f"{words[1]} {words[2]}" if words else name, letters) if letters else None


def longest_frame(letters: str) -> str:
    """Return the longest stretch from ATG to a stop codon, in any of the three frames of this strand."""
    found = re.findall(r"(?=(ATG(?:[ACGT]{3})*?(?:TAA|TAG|TGA)))", letters)
    return max(found, key=len, default="")


def _distinct(genes: Sequence[Gene], most: float = 0.9) -> list[Gene]:
    """Leave out genes that are as long as one before them and agree with it in more than `most` of their letters."""
    kept: list[Gene] = []
    for gene in genes:
        alike = [one for one in kept if len(one.letters) == len(gene.letters)]
        own = np.frombuffer(gene.letters.encode(), np.uint8)
        if not any((own == np.frombuffer(one.letters.encode(), np.uint8)).mean() > most for one in alike):
            kept.append(gene)
    return kept


def read_genomes(folder: Path, cache: Path, files: Sequence[str] = tuple(TRAINING)) -> list[Genome]:
    """Return genomes by file name, from folder/genomes or cache/genomes, or by path. Raises DataError."""
    return [read_genome(_find(folder, cache, name)) for name in files]


def _find(folder: Path, cache: Path, name: str) -> Path:
    places = [folder / "genomes" / name, cache / "genomes" / name, Path(name)]
    found = [place for place in places if place.is_file()]
    if not found:
        hint = "run `modalora data genomes`" if name in FETCHED else "`data` must name a folder with genomes/"
        raise DataError(f"{name} is neither in {places[0].parent} nor in {places[1].parent}; {hint}")
    return found[0]


def fetch_archive(folder: Path) -> Path:
    """Return Biopython's source archive in a folder, brought there through pip if it is not there yet.

    Raises WorkError when pip fails or the bytes are not the known ones.
    """
    if not (found := list(folder.glob("biopython-*.tar.gz"))):
        command = [
            sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "-d", str(folder), ARCHIVE
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = list(folder.glob("biopython-*.tar.gz"))
        if done.returncode or not found:
            raise WorkError(f"pip could not fetch {ARCHIVE}: {done.stderr[-500:].strip()}; try again with a network")
    (archive,) = found
    if digest(archive) != ARCHIVE_SHA256:
        raise WorkError(f"{archive} has not the sha256 {ARCHIVE_SHA256} and is not used; delete it and try again")
    return archive


def fetch_genomes(cache: Path) -> list[Path]:
    """Put the files of Biopython's source archive into cache/genomes and return them: 20 MB through pip, once.

    Raises WorkError when pip fails or the bytes are not the known ones.
    """
    target = cache / "genomes"
    wanted = [target / name for name in FETCHED]
    if all(path.is_file() for path in wanted):
        return wanted
    with tempfile.TemporaryDirectory() as folder:
        archive = fetch_archive(Path(folder))
        target.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as held:
            for member in held:
                name = Path(member.name).name
                if name in FETCHED and member.isfile() and (file := held.extractfile(member)) is not None:
                    content = file.read()
                    if hashlib.sha256(content).hexdigest() == FILES[name]:  # some names come twice
                        (target / name).write_bytes(content)
    if absent := [path.name for path in wanted if not path.is_file()]:
        raise WorkError(f"{ARCHIVE} holds no {', '.join(absent)} of the known bytes")
    return wanted
