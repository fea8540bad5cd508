"""What an export to GGUF can be told beside its file type: one value, for the command and Python.

    convert("Qwen/Qwen3-0.6B", to="gguf", type="Q3_K_M", gguf=GgufOptions(imatrix=Path("q.gguf")))

Valid once built: what excludes each other, or would silently do nothing, is refused here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from qtool.errors import UnknownName, UsageError

SEARCHES = ("plain", "best")
# Of `--search best` alone, under the command's names.
_SEARCH_OPTIONS = {
    "calibration": "--calibration",
    "num_samples": "--num-samples",
    "sequence_length": "--sequence-length",
    "seed": "--seed",
    "trust_remote_code": "--trust-remote-code",
}
# gguf-split's units: powers of 1000.
_UNITS = {"M": 10**6, "G": 10**9}
_SIZE = re.compile(r"(\d+)([MG])")


@dataclass(frozen=True, slots=True)
class GgufOptions:
    """pre                  tokenizer.ggml.pre, where the tokenizer's is not recognized
    imatrix              a file of importance, of llama.cpp or of `qtool imatrix`
    tensor_types         "REGEX=TYPE" each; the first that fits a tensor's name decides
    output_type          of the head
    embedding_type       of the token embedding
    pure                 one type for all, no mix
    leave_output_tensor  the head stays as it is
    target_bits          types chosen so that the tensors have at most that many bits a weight
    search               "best" runs calibration data and chooses codes by the outputs' error
    calibration, num_samples, sequence_length, seed, trust_remote_code
                         of that search; None for what recipes take by default
    split_max_bytes      a file ends before its tensors exceed this
    split_max_tensors    a file has at most so many tensors
    no_tensor_first_split  the first of several files has the metadata and no tensors
    """

    pre: str | None = None
    imatrix: Path | None = None
    tensor_types: tuple[str, ...] = ()
    output_type: str | None = None
    embedding_type: str | None = None
    pure: bool = False
    leave_output_tensor: bool = False
    target_bits: float | None = None
    search: str = "plain"
    calibration: str | None = None
    num_samples: int | None = None
    sequence_length: int | None = None
    seed: int | None = None
    trust_remote_code: bool = False
    split_max_bytes: int | None = None
    split_max_tensors: int | None = None
    no_tensor_first_split: bool = False

    def __post_init__(self) -> None:
        bits = self.target_bits
        if bits is not None and (self.pure or not 0 < bits <= 32):
            raise UsageError(
                f"--target-bits {bits:g} "
                + ("and --pure exclude each other" if self.pure else "is not between 0 and 32")
            )
        if self.search not in SEARCHES:
            raise UnknownName("search", self.search, SEARCHES)
        if self.search != "best":
            for name, option in _SEARCH_OPTIONS.items():
                given = getattr(self, name)
                if given is not None and given is not False:
                    raise UsageError(
                        f"{option} is of the search that runs the model, and --search is plain",
                        "add --search best, or leave it out",
                    )
        self._check_split()

    def _check_split(self) -> None:
        limits = {
            "--split-max-size": self.split_max_bytes,
            "--split-max-tensors": self.split_max_tensors,
        }
        given = {option: value for option, value in limits.items() if value is not None}
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} exclude each other", "as in gguf-split")
        for option, value in given.items():
            if value < 1:
                raise UsageError(f"{option} {value} is not positive")
        if self.no_tensor_first_split and not given:
            raise UsageError(
                "--no-tensor-first-split is for models in several files",
                "add --split-max-size 2G or --split-max-tensors 128",
            )

    @property
    def is_split(self) -> bool:
        return self.split_max_bytes is not None or self.split_max_tensors is not None


def parse_size(text: str) -> int:
    """Bytes of gguf-split's "500M" or "2G"."""
    match = _SIZE.fullmatch(text)
    if match is None or int(match[1]) == 0:
        raise UsageError(
            f"--split-max-size {text!r} is no size",
            "give a whole number of megabytes or gigabytes: 500M, 2G",
        )
    return int(match[1]) * _UNITS[match[2]]
