"""Train a small Llama from text: how the bundled model was made, and how to make a better one.

    python scripts/train_small_model.py train.txt.xz --validation valid.txt --out books --minutes 60

Text is one file, plain or .xz, its documents separated by `<|endoftext|>`. From it come a
byte-level BPE tokenizer, a cache of tokens, and a model of the bundled shapes: hidden 256,
feed-forward 768, 8 layers, 4 heads of 64 with 2 key-value heads, context 512, tied embeddings.
Every row is a multiple of 256, so that group 128, K-quants and Marlin tiles all fit.

The recipe: AdamW (0.9, 0.95), weight decay 0.1 on matrices only, 100 warm-up steps to 2e-3, then
linear decay to 5 % of it, 16 random windows of 512 tokens a step, gradient norm clipped to 1, bf16
autocast. The decay follows whichever of --steps and --minutes is nearer to its end.

Work in progress (tokenizer, tokens, checkpoint) lies in OUT.training, and the same command goes on
from there. Windows are drawn from (seed, step), so a resumed run sees what an unbroken one sees.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import lzma
import math
import os
import sys
import textwrap
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qtool.cli import print_error
from qtool.errors import QtoolError, UsageError
from qtool.json_files import write_json
from qtool.output import OutputFolder
from qtool.progress import bar

END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2; the last two for chats
TOKENIZER_CHARACTERS = 30_000_000  # more text changes few of 4,096 merges and takes long

Tokens = npt.NDArray[np.uint16]


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 768
    num_layers: int = 8
    num_heads: int = 4
    num_kv_heads: int = 2
    context: int = 512


@dataclasses.dataclass(frozen=True, slots=True)
class Training:
    """What decides the result; a checkpoint is continued only by the same values."""

    steps: int | None = None
    minutes: float | None = None
    windows: int = 16
    peak_rate: float = 2e-3
    final_fraction: float = 0.05
    warmup_steps: int = 100
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise UsageError("nothing says when to stop", "pass --steps, --minutes or both")

    def progress(self, step: int, seconds: float) -> float:
        """How much of the run is over, 0 to 1, by the limit that is nearer."""
        by_steps = 0.0 if self.steps is None else step / self.steps
        by_time = 0.0 if self.minutes is None else seconds / (60 * self.minutes)
        return min(1.0, max(by_steps, by_time))

    def learning_rate(self, step: int, progress: float) -> float:
        warmup = min(1.0, (step + 1) / self.warmup_steps)
        return self.peak_rate * warmup * (1 - (1 - self.final_fraction) * progress)


BOOKS_7M = Shape()
RECIPE = Training(steps=1)

# Text and tokens


def read_text(path: Path) -> str:
    if not path.is_file():
        raise UsageError(f"{path} is not a file", "name a text file, plain or .xz")
    data = path.read_bytes()
    try:
        return (lzma.decompress(data) if path.suffix == ".xz" else data).decode("utf-8")
    except (lzma.LZMAError, UnicodeDecodeError) as error:
        raise QtoolError(f"{path} does not read as text: {error}") from error


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """Byte-level BPE: any text round-trips, whatever it was trained on."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    documents = text[:TOKENIZER_CHARACTERS].split(END_OF_TEXT)
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> Tokens:
    """All documents in a row, each closed by the id of END_OF_TEXT."""
    if tokenizer.get_vocab_size() > 2**16:
        raise UsageError("tokens are kept in 16 bits", "pick a --vocab-size of at most 65536")
    documents = [document for document in text.split(END_OF_TEXT) if document.strip()]
    end = np.array([tokenizer.token_to_id(END_OF_TEXT)], dtype=np.uint16)
    pieces = []
    with bar("encoding", total=len(documents)) as progress:
        for document in documents:
            pieces += [np.array(tokenizer.encode(document).ids, dtype=np.uint16), end]
            progress.advance()
    return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.uint16)


def prepare(
    work: Path, train: Path, validation: Path | None, shape: Shape
) -> tuple[Tokenizer, Tokens, Tokens]:
    """Tokenizer, training tokens, held-out tokens: from the cache in `work` when it fits the files.

    Without a validation file the last 2 % of the tokens are held out.
    """
    sources = [path for path in (train, validation) if path is not None]
    key = {
        "vocab_size": shape.vocab_size,
        "files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sources},
    }
    names = ("tokenizer.json", "train.npy", "validation.npy")
    stamp = work / "tokens.json"
    if not (stamp.is_file() and json.loads(stamp.read_text()) == key):
        text = read_text(train)
        with bar("training the tokenizer", total=1) as progress:
            tokenizer = train_tokenizer(text, shape.vocab_size)
            progress.advance()
        tokens = encode(tokenizer, text)
        if validation is None:
            kept = len(tokens) - len(tokens) // 50
            tokens, held_out = tokens[:kept], tokens[kept:]
        else:
            held_out = encode(tokenizer, read_text(validation))
        tokenizer.save(str(work / names[0]))
        np.save(work / names[1], tokens)
        np.save(work / names[2], held_out)
        write_json(stamp, key)
    tokenizer = Tokenizer.from_file(str(work / names[0]))
    tokens, held_out = (np.load(work / name, mmap_mode="r") for name in names[1:])
    for name, values in (("training", tokens), ("held-out", held_out)):
        if len(values) <= shape.context + 1:
            raise UsageError(
                f"{len(values)} {name} tokens do not fill one window of {shape.context}",
                "give more text, or a smaller --context",
            )
    return tokenizer, tokens, held_out


def draw_windows(
    tokens: Tokens, count: int, context: int, seed: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Inputs and targets, each [count, context] int64, from random places.

    With context 3 and a start of 5: inputs are tokens [5, 8), targets are tokens [6, 9).
    """
    starts = np.random.default_rng(seed).integers(0, len(tokens) - context, size=count)
    rows = np.stack([tokens[start : start + context + 1] for start in starts]).astype(np.int64)
    window = torch.from_numpy(rows).to(device)
    return window[:, :-1], window[:, 1:]


# Model and steps


def build_model(shape: Shape, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        max_position_embeddings=shape.context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def build_optimizer(
    model: nn.Module, training: Training, device: torch.device
) -> torch.optim.AdamW:
    """Decay on matrices only: a norm's gain shrunk towards zero would mute its layer."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": training.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=training.peak_rate, betas=training.betas, fused=device.type == "cuda"
    )


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, dtype=torch.bfloat16)


def mean_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats a token, under bf16 autocast with the logits in float32."""
    with autocast(inputs.device):
        logits = model(input_ids=inputs, use_cache=False).logits
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


@torch.no_grad()
def validation_loss(
    model: nn.Module, tokens: Tokens, *, context: int, batches: int = 24, windows: int = 8
) -> float:
    """Mean nats a token over the same `batches * windows` random windows at every call."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    losses = [
        mean_loss(model, *draw_windows(tokens, windows, context, (1234, batch), device)).item()
        for batch in range(batches)
    ]
    model.train(was_training)
    return sum(losses) / len(losses)


@dataclasses.dataclass(slots=True)
class State:
    """Where a run stands; what a checkpoint holds beside weights and optimizer."""

    step: int = 0
    seconds: float = 0.0
    validation: float = math.nan  # nats a token, when last measured


def save_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: State,
    key: dict[str, Any],
) -> None:
    partial = path.with_suffix(".partial")
    torch.save(
        {
            "key": key,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "state": dataclasses.asdict(state),
        },
        partial,
    )
    os.replace(partial, path)


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, key: dict[str, Any]
) -> State:
    if not path.is_file():
        return State()
    saved = torch.load(path, map_location="cpu", weights_only=True)
    if saved["key"] != key:
        differs = sorted(name for name in key if saved["key"].get(name) != key[name])
        raise UsageError(
            f"{path} was begun with other values of: {', '.join(differs)}",
            "repeat the first command to go on, or remove the folder to begin anew",
        )
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return State(**saved["state"])


def train(
    model: LlamaForCausalLM,
    tokens: Tokens,
    held_out: Tokens,
    training: Training,
    *,
    context: int,
    checkpoint: Path,
    key: dict[str, Any],
    compile_model: bool,
    validate_every: int,
    checkpoint_every: int,
) -> State:
    device = next(model.parameters()).device
    optimizer = build_optimizer(model, training, device)
    state = load_checkpoint(checkpoint, model, optimizer, key)
    if state.step:
        click.echo(f"going on from step {state.step}", err=True)
    stepper: nn.Module = torch.compile(model) if compile_model else model  # type: ignore[assignment]
    model.train()
    began = time.monotonic() - state.seconds
    recent = torch.zeros(
        (), device=device
    )  # running mean on the device: no wait for it at each step
    with bar("training", total=1000) as progress_bar:
        shown = 0
        while (progress := training.progress(state.step, state.seconds)) < 1.0:
            rate = training.learning_rate(state.step, progress)
            for group in optimizer.param_groups:
                group["lr"] = rate
            seed = (training.seed, state.step)
            loss = mean_loss(
                stepper, *draw_windows(tokens, training.windows, context, seed, device)
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), training.clip)
            optimizer.step()
            state.step += 1
            state.seconds = time.monotonic() - began
            recent = loss.detach() if state.step == 1 else 0.98 * recent + 0.02 * loss.detach()
            progress_bar.advance(int(1000 * progress) - shown)
            shown = int(1000 * progress)
            if state.step % validate_every == 0:
                state.validation = validation_loss(model, held_out, context=context)
                click.echo(
                    f"step {state.step}  {state.seconds / 60:.1f} min  rate {rate:.2e}  "
                    f"train {recent.item():.3f}  validation {state.validation:.3f}",
                    err=True,
                )
            if state.step % checkpoint_every == 0:
                save_checkpoint(checkpoint, model, optimizer, state, key)
    state.validation = validation_loss(model, held_out, context=context)
    save_checkpoint(checkpoint, model, optimizer, state, key)
    return state


# What is written


def write_model(
    folder: Path, model: LlamaForCausalLM, tokenizer_file: Path, context: int, card: str
) -> None:
    model.to(dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_file),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        model_max_length=context,
    )
    tokenizer.save_pretrained(folder)
    (folder / "MODEL_CARD.md").write_text(card, encoding="utf-8")


def model_card(
    name: str,
    shape: Shape,
    training: Training,
    state: State,
    *,
    num_parameters: int,
    num_train_tokens: int,
    sources: list[Path],
    device: torch.device,
) -> str:
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    num_seen = state.step * training.windows * shape.context
    paragraphs = (
        f"Llama architecture, {num_parameters / 1e6:.2f} M parameters: hidden {shape.hidden_size}, "
        f"feed-forward {shape.intermediate_size}, {shape.num_layers} layers, {shape.num_heads} "
        f"heads with {shape.num_kv_heads} key-value heads, context {shape.context}, tied "
        f"embeddings, bf16. Tokenizer: byte-level BPE of {shape.vocab_size:,}; `<|endoftext|>` is "
        "0, `<|im_start|>` and `<|im_end|>` are reserved and unused in training. A base model: no "
        "chat template.",
        f"Data: {', '.join(f'`{path.name}`' for path in sources)}; {num_train_tokens / 1e6:.1f} M "
        f"training tokens. Training: {num_seen / 1e6:.1f} M tokens in {state.step:,} steps of "
        f"{training.windows} windows, AdamW {training.betas}, weight decay {training.weight_decay} "
        f"on matrices, peak rate {training.peak_rate} after {training.warmup_steps} warm-up steps, "
        f"linear decay to {training.final_fraction:.0%}, gradient clip {training.clip}, bf16 "
        f"autocast, seed {training.seed}; {state.seconds / 60:.0f} minutes on {kind} with torch "
        f"{torch.__version__}. Validation loss {state.validation:.3f} nats a token over 24 x 8 "
        "fixed random windows of the held-out text.",
        "Written by `scripts/train_small_model.py`.",
    )
    filled = (textwrap.fill(paragraph, width=120) for paragraph in paragraphs)
    return f"# {name}\n\n" + "\n\n".join(filled) + "\n"


def device_named(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda, and torch sees no CUDA device", "use --device cpu")
    return torch.device(name)


@click.command(help=__doc__.split("\n\n")[0] if __doc__ else None)
@click.argument("text", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--validation", type=click.Path(path_type=Path), help="Held-out text file.")
@click.option("--steps", type=click.IntRange(min=1), help="Stop after so many steps.")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), help="Stop after so long.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option("--windows", default=RECIPE.windows, show_default=True, help="Windows a step.")
@click.option("--rate", default=RECIPE.peak_rate, show_default=True, help="Peak learning rate.")
@click.option("--vocab-size", default=BOOKS_7M.vocab_size, show_default=True)
@click.option("--context", default=BOOKS_7M.context, show_default=True, help="Tokens a window.")
@click.option("--layers", default=BOOKS_7M.num_layers, show_default=True)
@click.option("--seed", default=RECIPE.seed, show_default=True)
@click.option("--validate-every", default=250, show_default=True, help="Steps between.")
@click.option("--checkpoint-every", default=250, show_default=True, help="Steps between.")
@click.option("--compile", "compile_model", is_flag=True, help="torch.compile; pays on CUDA.")
@click.option("--force", is_flag=True, help="Replace OUT if it is there.")
def main(
    text: Path,
    out: Path,
    validation: Path | None,
    steps: int | None,
    minutes: float | None,
    device: str,
    windows: int,
    rate: float,
    vocab_size: int,
    context: int,
    layers: int,
    seed: int,
    validate_every: int,
    checkpoint_every: int,
    compile_model: bool,
    force: bool,
) -> None:
    shape = Shape(vocab_size=vocab_size, num_layers=layers, context=context)
    training = Training(steps=steps, minutes=minutes, windows=windows, peak_rate=rate, seed=seed)
    sources = [path for path in (text, validation) if path is not None]
    for path in sources:
        if not path.is_file():
            raise UsageError(f"{path} is not a file", "name a text file, plain or .xz")
    target = device_named(device)
    output = OutputFolder(out, force=force)  # refuses now what it would refuse after the training
    work = out.with_name(f"{out.name}.training")
    work.mkdir(parents=True, exist_ok=True)
    _, tokens, held_out = prepare(work, text, validation, shape)
    model = build_model(shape, seed).to(target)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    click.echo(
        f"{num_parameters / 1e6:.2f} M parameters, {len(tokens) / 1e6:.1f} M training tokens, "
        f"{len(held_out) / 1e6:.2f} M held out, on {target}",
        err=True,
    )
    state = train(
        model,
        tokens,
        held_out,
        training,
        context=context,
        checkpoint=work / "checkpoint.pt",
        key={**dataclasses.asdict(shape), **dataclasses.asdict(training)},
        compile_model=compile_model,
        validate_every=validate_every,
        checkpoint_every=checkpoint_every,
    )
    card = model_card(
        out.name,
        shape,
        training,
        state,
        num_parameters=num_parameters,
        num_train_tokens=len(tokens),
        sources=sources,
        device=target,
    )
    with output as stage:
        write_model(stage.path, model, work / "tokenizer.json", context, card)
    click.echo(f"{out}: validation {state.validation:.3f} nats a token after {state.step} steps")


if __name__ == "__main__":
    try:
        main()
    except QtoolError as error:
        print_error(error)
        sys.exit(error.exit_code)
