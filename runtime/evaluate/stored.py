"""The original's predictions from a file, for when the original itself is too large to have beside.

Two kinds are read:

- `llama-perplexity --kl-divergence-base` files (`tools/perplexity/perplexity.cpp`): the whole
  vocabulary of each scored token in 16 bits, clipped at 16 nats. 11 GB for Llama 2, 37 GB for
  Llama 3, and a floor of about 5e-4 nats under every result.

      "_logits_"  u32 window  i32 vocab  i32 windows  i32 tokens[windows * window]
      for each scored token: f32 scale, f32 smallest, u16 code[vocab rounded up to even]
      ln p = scale * code + smallest; terms with ln p <= -16 are left out

- Our own, written with `--save-reference`: in float32 the TOP_TOKENS likeliest tokens of each
  prediction, the probability P_rest of all others together, and SAMPLES of those others drawn by
  their probability. A hundredth of the size. With r the ratio q / p of each within the rest, both
  normalised there,

      KLD = sum over the likeliest of p (ln p - ln q) + P_rest (ln P_rest - ln Q_rest)
            + P_rest * mean over the samples of (r - 1 - ln r)

  The first line is exact, and the last has the right mean (that of r - 1 is 0), is never negative,
  and is of second order in what q moves, so that few samples do (J. Schulman, "Approximating KL
  divergence", 2020). Everything else (perplexity, delta p, same top token) is exact.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qtool.errors import FormatError, UsageError
from qtool.output import flush_to_disk
from qtool.runtime.evaluate.divergence import TokenDivergence

MAGIC = b"_logits_"
HEADER = struct.Struct("<8sIii")
# Below this, llama-perplexity leaves a term out.
LLAMA_CPP_CLIP = -16.0

TOP_TOKENS = 256
SAMPLES = 64
FORMAT_NAME = "qtool reference 1"
SUFFIX = ".safetensors"


class StoredReference(Protocol):
    """tokens [windows * window] int64: the text that was scored."""

    @property
    def name(self) -> str: ...

    @property
    def tokens(self) -> Tensor: ...

    @property
    def window(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    def compare(self, window: int, first: int, logits: Tensor, targets: Tensor) -> TokenDivergence:
        """logits [rows, vocab] float32 and targets [rows], of the window of that number from its
        scored token number `first` on.
        """
        ...


def is_stored_reference(path: Path) -> bool:
    """Whether the file is one of the two; GGUF files and folders are models."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC or path.suffix == SUFFIX


def open_stored(path: Path) -> StoredReference:
    with path.open("rb") as file:
        is_llama_cpps = file.read(len(MAGIC)) == MAGIC
    return LlamaCppLogits(path) if is_llama_cpps else TopTokens.open(path)


class LlamaCppLogits:
    """A mapped file of llama-perplexity's: only the rows that are asked for are read."""

    def __init__(self, path: Path) -> None:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(HEADER.size)
            if len(header) < HEADER.size:
                raise FormatError(f"{path} ends within its header of {HEADER.size} bytes")
            _, window, vocab_size, num_windows = HEADER.unpack(header)
            if not (4 <= window < 2**24 and 2 <= vocab_size < 2**24 and 1 <= num_windows < 2**24):
                raise FormatError(
                    f"{path} says {num_windows} windows of {window} tokens of {vocab_size}"
                )
            words = 2 * ((vocab_size + 1) // 2) + 4
            scored = window - 1 - window // 2
            start = HEADER.size + 4 * num_windows * window
            needed = start + 2 * words * scored * num_windows
            if size != needed:
                raise FormatError(
                    f"{path} has {size} bytes; {num_windows} windows of {window} tokens of a "
                    f"vocabulary of {vocab_size} take {needed}",
                    "llama-perplexity was interrupted, or the file is damaged: make it anew",
                )
            tokens = np.fromfile(file, dtype="<i4", count=num_windows * window)
        if tokens.min() < 0 or tokens.max() >= vocab_size:
            raise FormatError(f"{path} holds tokens outside its vocabulary of {vocab_size}")
        self.name = path.name
        self.window = window
        self.vocab_size = vocab_size
        self.tokens = torch.from_numpy(tokens.astype(np.int64))
        shape = (num_windows, scored, words)
        self._rows = np.memmap(path, dtype="<u2", mode="r", offset=start, shape=shape)

    def compare(self, window: int, first: int, logits: Tensor, targets: Tensor) -> TokenDivergence:
        ln_p = self.log_probs(window, first, len(logits)).to(logits.device)
        # Operation by operation what perplexity.cpp does, in its types: rounding is in the sixth
        # digit that it prints.
        highest, top = logits.max(dim=-1, keepdim=True)
        log_sum = (logits - highest).exp_().sum(dim=-1, keepdim=True, dtype=torch.float64).log()
        total = highest + log_sum.float()
        index = targets[:, None]
        nll = (total - logits.gather(-1, index)).squeeze(-1)
        reference_nll = -ln_p.gather(-1, index).squeeze(-1)
        terms = ln_p.exp() * ((ln_p - logits) + total)
        terms.masked_fill_(ln_p <= LLAMA_CPP_CLIP, 0.0)
        return TokenDivergence(
            nll=nll.double(),
            reference_nll=reference_nll.double(),
            kld=terms.sum(dim=-1, dtype=torch.float64),
            delta_p=((-nll).exp() - (-reference_nll).exp()).double(),
            top=top.squeeze(-1),
            reference_top=ln_p.argmax(dim=-1),
        )

    def log_probs(self, window: int, first: int, count: int) -> Tensor:
        """[count, vocab] float32, from scored token number `first` on."""
        rows = np.array(self._rows[window, first : first + count])
        head = torch.from_numpy(rows[:, :4].copy().view("<f4"))
        codes = torch.from_numpy(rows[:, 4 : 4 + self.vocab_size].astype(np.int32))
        return head[:, :1] * codes + head[:, 1:]


class TopTokens:
    """ids, ln_p [rows, k]; rest, target [rows] ln of the others' sum and of the token that came;
    samples, ln_p_samples [rows, SAMPLES].
    """

    def __init__(
        self,
        name: str,
        tokens: Tensor,
        window: int,
        vocab_size: int,
        ids: Tensor,
        ln_p: Tensor,
        rest: Tensor,
        target: Tensor,
        samples: Tensor,
        ln_p_samples: Tensor,
    ) -> None:
        self.name = name
        self.tokens = tokens
        self.window = window
        self.vocab_size = vocab_size
        self._scored = window - 1 - window // 2
        self._columns = (ids, ln_p, rest, target, samples, ln_p_samples)

    @classmethod
    def open(cls, path: Path) -> TopTokens:
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT_NAME:
                    raise FormatError(
                        f"{path} is neither a stored reference nor a model's folder",
                        "--against takes a model, a file written with --save-reference, or one "
                        "of llama-perplexity --kl-divergence-base",
                    )
                columns = {name: file.get_tensor(name) for name in file.keys()}
            window, vocab_size = int(metadata["window"]), int(metadata["vocab_size"])
            tokens = columns["tokens"].long()
            scored = tokens.numel() // window * (window - 1 - window // 2)
            ids, ln_p = columns["ids"].long(), columns["ln_p"]
            rest, target = columns["rest"], columns["target"]
            samples, ln_p_samples = columns["samples"].long(), columns["ln_p_samples"]
            fits = ids.shape == ln_p.shape and samples.shape == ln_p_samples.shape
            fits &= len(ids) == len(rest) == len(target) == len(samples) == scored
            found = (*tokens.aminmax(), *ids.aminmax(), *samples.aminmax())
            if not fits or min(found) < 0 or max(found) >= vocab_size:
                raise FormatError(f"{path}: its tensors do not belong together")
        except (SafetensorError, KeyError, ValueError, RuntimeError, ZeroDivisionError) as error:
            raise FormatError(f"{path} is no stored reference: {error}") from error
        held = (ids, ln_p, rest, target, samples, ln_p_samples)
        return cls(path.name, tokens, window, vocab_size, *held)

    def compare(self, window: int, first: int, logits: Tensor, targets: Tensor) -> TokenDivergence:
        start = window * self._scored + first
        rows = slice(start, start + len(logits))
        ids, ln_p, rest, target, samples, ln_p_samples = (
            column[rows].to(logits.device) for column in self._columns
        )
        ln_q = logits.log_softmax(dim=-1)
        of_top = ln_q.gather(-1, ids)
        others = ln_q.scatter(-1, ids, -math.inf)
        ln_q_rest = others.logsumexp(dim=-1)
        kld = torch.linalg.vecdot(ln_p.exp(), ln_p - of_top)
        ln_r = (ln_q.gather(-1, samples) - ln_q_rest[:, None]) - (ln_p_samples - rest[:, None])
        within = (ln_r.exp() - 1 - ln_r).mean(dim=-1)
        kld += torch.where(rest == -math.inf, 0.0, rest.exp() * (rest - ln_q_rest + within))
        nll = -ln_q.gather(-1, targets[:, None]).squeeze(-1).double()
        return TokenDivergence(
            nll=nll,
            reference_nll=-target.double(),
            kld=kld.double(),
            delta_p=(-nll).exp() - target.double().exp(),
            top=ln_q.argmax(dim=-1),
            reference_top=ids[:, 0],
        )


class Recorder:
    """Keeps the likeliest tokens of a model's predictions, in their order, and writes them."""

    def __init__(self, path: Path) -> None:
        if path.suffix != SUFFIX:
            raise UsageError(f"{path} must end in {SUFFIX}", f"write {path.stem}{SUFFIX}")
        if not path.absolute().parent.is_dir():
            raise UsageError(f"{path.parent} is not a folder, so {path.name} cannot be made there")
        self._path = path
        self._parts: list[tuple[Tensor, ...]] = []
        self._vocab_size = 0
        self._draws = torch.Generator().manual_seed(0)

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """logits [rows, vocab] float32, targets [rows], of the next scored tokens."""
        self._vocab_size = logits.shape[-1]
        ln_p = logits.log_softmax(dim=-1)
        top, ids = ln_p.topk(min(TOP_TOKENS, self._vocab_size), dim=-1)
        others = ln_p.scatter(-1, ids, -math.inf)
        rest = others.logsumexp(dim=-1)
        # A rest of nothing (a vocabulary no larger than TOP_TOKENS) is drawn from evenly, in vain.
        weights = torch.where(rest[:, None] == -math.inf, 1.0, (others - rest[:, None]).exp())
        samples = torch.multinomial(weights.cpu(), SAMPLES, True, generator=self._draws)
        target = ln_p.gather(-1, targets[:, None]).squeeze(-1)
        columns = (ids.int(), top, rest, target, samples.int())
        ln_p_samples = ln_p.cpu().gather(-1, samples)
        self._parts.append((*(column.cpu() for column in columns), ln_p_samples))

    def write(self, tokens: Tensor, window: int) -> None:
        """The file appears when it is complete.  tokens [at least windows * window] int64"""
        names = ("ids", "ln_p", "rest", "target", "samples", "ln_p_samples")
        joined = [torch.cat(parts) for parts in zip(*self._parts, strict=True)]
        num_windows = len(joined[0]) // (window - 1 - window // 2)
        used = tokens[: num_windows * window].int()
        metadata = {
            "format": FORMAT_NAME,
            "window": str(window),
            "vocab_size": str(self._vocab_size),
        }
        partial = self._path.with_name(f".{self._path.name}.partial")
        columns = {"tokens": used, **dict(zip(names, joined, strict=True))}
        save_file(columns, partial, metadata=metadata)
        # safetensors writes for the owner alone; this is to be passed on.
        partial.chmod(0o644)
        flush_to_disk(partial)
        partial.replace(self._path)
