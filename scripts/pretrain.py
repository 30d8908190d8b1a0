"""Train the demo model `models/doc-llama` from scratch: a tokenizer and a Llama of 4.5 M parameters.

Why a model of our own: 2-bit rounding must hurt before quantization-aware training can heal anything, and
it hurts only a model whose weights are full of knowledge. Downloadable models are large for a laptop, and
a model that has seen little text hardly notices 2 bits. So this one is small and trained long on the
docstrings of this computer. At every evaluation the script also measures the model after plain 2-bit
rounding: the ratio of the two perplexities says how full the model is.

    Muon (orthogonalized momentum)  for the matrices inside the layers      AdamW  for embeddings and norms
    rate:  warm-up 100 steps | constant | linear decay to 0 over the last 30 % of the run

The constant phase needs no plan: how long the run will be is decided only where the decay begins. Hence a
run that is stopped before can be extended, and `--max-minutes` begins the decay early enough to end in
time.

    python scripts/pretrain.py                        # start, or go on after an interruption
    python scripts/pretrain.py --max-minutes 60       # fit into an hour
    python scripts/pretrain.py --device cuda          # on a GPU

Everything is in runs/pretrain/: checkpoint/ (to go on from), snapshot/ (a model folder), log.jsonl.
The end of the run writes the model folder with its model card.
"""

import argparse
import itertools
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import LongTensor, Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from lcqat_min.harness.batches import batches, windows  # noqa: E402
from lcqat_min.harness.text import documents, load_text  # noqa: E402

END_OF_TEXT = "<|endoftext|>"
VOCABULARY, WINDOW, BATCH = 4096, 256, 16
STEP_TOKENS = WINDOW * BATCH
WARMUP_STEPS, DECAY_SHARE, SAVE_EVERY = 100, 0.3, 200
EVALUATION_WINDOWS = 64  # 16 k validation tokens during the run
PROMPTS = ("Return the", "Compute the eigenvalues of", "Parameters\n----------\n")
CARD = """---
license: mit
language: en
library_name: transformers
pipeline_tag: text-generation
---

# doc-llama

A small Llama that has read Python documentation. [`scripts/pretrain.py`](../../scripts/pretrain.py)
trained it from scratch, to be quantized: small enough for a laptop, trained long enough
that 2 bits hurt. It writes text like docstrings and knows nothing else; it is not an assistant.

| | |
|---|---|
{table}

The text is what the reader has on disk: the docstrings of the packages this project installs and of the
standard library, split by a hash of each text (`lcqat_min/harness/text.py`). "2-bit rounding" is the plainest
kind: each weight of the linear layers (not the head) to the nearest of -1.5, -0.5, 0.5, 1.5 times a
scale, the best for its row. Perplexities change a little with the versions of those packages; compare
models on one machine.

## The course of training

Perplexities on 16 k validation tokens.

| step | M tokens | training loss | perplexity | after 2-bit rounding | ratio |
|---|---|---|---|---|---|
{course}

## Samples

Temperature 0.7, top-p 0.95, seed {seed}.

{samples}
"""


def train_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the training split alone, written to `folder`; loaded from there if it exists."""
    if not (folder / "tokenizer.json").exists():
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
        )
        bpe.train_from_iterator(documents("docstrings")["train"], trainer)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=bpe,
            bos_token=END_OF_TEXT,
            eos_token=END_OF_TEXT,
            model_max_length=512,
            clean_up_tokenization_spaces=False,
        )
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def new_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)  # transformers draws initial weights from the global generator
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def new_optimizers(model: nn.Module, args: argparse.Namespace) -> dict[str, torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "layers." in name]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": [model.get_input_embeddings().weight], "weight_decay": args.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    optimizers = {
        "muon": torch.optim.Muon(
            matrices, lr=args.muon_lr, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        "adamw": torch.optim.AdamW(groups, lr=args.adamw_lr, betas=(0.9, 0.95)),
    }
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def rate(step: int, total: int) -> float:
    """The share of the peak learning rate at `step` (from 0) of `total`: warm-up, stable, decay."""
    warm = (step + 1) / WARMUP_STEPS
    cool = (total - step) / (DECAY_SHARE * total)
    return min(warm, 1.0, cool)


def autocast(device: torch.device) -> AbstractContextManager:
    return torch.autocast(device.type, dtype=torch.bfloat16)


def loss_of(model: nn.Module, batch: LongTensor) -> Tensor:
    """Mean cross-entropy of the next token, in nats."""
    with autocast(batch.device):
        logits = model(input_ids=batch, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: nn.Module, rows: LongTensor) -> float:
    model.eval()
    losses = [loss_of(model, batch).double() for batch in rows.split(BATCH)]  # windows are of equal length
    sizes = [len(batch) for batch in rows.split(BATCH)]
    model.train()
    return math.exp(sum(loss.item() * n for loss, n in zip(losses, sizes, strict=True)) / len(rows))


def round_two_bits(weight: Tensor) -> Tensor:
    """Nearest of {-1.5, -0.5, 0.5, 1.5} * s with, for each row, the best of 40 scales s in squared error."""
    mean_size = weight.abs().mean(dim=1, keepdim=True)
    best, least = torch.empty_like(weight), torch.full_like(mean_size, math.inf)
    for factor in torch.linspace(0.4, 2.4, 40).tolist():
        scale = mean_size * factor
        rounded = ((weight / scale - 0.5).round().clamp(-2, 1) + 0.5) * scale
        error = (rounded - weight).square().sum(dim=1, keepdim=True)
        best = torch.where(error < least, rounded, best)
        least = torch.minimum(error, least)
    return best


@torch.no_grad()
def rounded_perplexity(model: LlamaForCausalLM, rows: LongTensor) -> float:
    """Perplexity with all linear layers but the tied head rounded to 2 bits, which are then put back."""
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not model.lm_head]
    originals = [m.weight.detach().clone() for m in linears]
    for m in linears:
        m.weight.copy_(round_two_bits(m.weight))
    try:
        return perplexity(model, rows)
    finally:
        for m, original in zip(linears, originals, strict=True):
            m.weight.copy_(original)


# ------------------------------------------------------------------------------------------ stop and go on


def save_checkpoint(folder: Path, model: nn.Module, optimizers: dict, state: dict) -> None:
    """One folder, replaced as a whole: an interruption leaves the old or the new one, never a mixture."""
    fresh, old = folder.with_name("checkpoint.new"), folder.with_name("checkpoint.old")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    tensors = {f"model.{name}": p.detach().contiguous() for name, p in model.named_parameters()}
    for kind, optimizer in optimizers.items():
        for index, values in optimizer.state_dict()["state"].items():
            tensors |= {f"{kind}.{index}.{key}": value.contiguous() for key, value in values.items()}
    save_file(tensors, fresh / "tensors.safetensors")
    (fresh / "state.json").write_text(json.dumps(state, indent=2) + "\n")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder: Path, model: nn.Module, optimizers: dict) -> dict | None:
    """The state given to `save_checkpoint`, with model and optimizers as they were; None if there is none."""
    old = folder.with_name("checkpoint.old")
    if old.exists() and not folder.exists():  # interrupted between the two renames
        os.replace(old, folder)
    if not folder.exists():
        return None
    tensors = load_file(folder / "tensors.safetensors")
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(tensors[f"model.{name}"])
    for kind, optimizer in optimizers.items():
        content = optimizer.state_dict()
        for name, value in tensors.items():
            if name.startswith(f"{kind}."):
                _, index, key = name.split(".")
                content["state"].setdefault(int(index), {})[key] = value
        optimizer.load_state_dict(content)
    return json.loads((folder / "state.json").read_text())


def save_model_folder(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """config.json, model.safetensors in bf16 and tokenizer files; each file is replaced as a whole."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(fresh.iterdir()):
        os.replace(file, folder / file.name)
    fresh.rmdir()


# ------------------------------------------------------------------------------------------------- the run


def planned_total(state: dict, args: argparse.Namespace) -> int:
    """Steps of the whole run: those of --tokens, or as many as --max-minutes allows at the speed so far.

    The plan is open until its last DECAY_SHARE begins; from there on it is kept in state["total"].
    """
    if "total" in state:
        return state["total"]
    total = max(args.tokens // STEP_TOKENS, WARMUP_STEPS)
    if args.max_minutes and state["step"] >= WARMUP_STEPS:
        total = min(total, int(args.max_minutes * 60 * state["step"] / state["seconds"]))
    total = max(total, state["step"] + 1)
    if state["step"] >= (1 - DECAY_SHARE) * total:
        # A plan that was cut short late still gets its full share of decay.
        state["total"] = total = int(state["step"] / (1 - DECAY_SHARE))
    return total


def train(
    model: LlamaForCausalLM,
    optimizers: dict[str, torch.optim.Optimizer],
    train_ids: LongTensor,
    state: dict,
    args: argparse.Namespace,
    save: Callable[[float, float], None],
) -> None:
    """From state["step"] to the end of the run, calling save(mean loss, rate) every SAVE_EVERY steps."""
    stream = batches(train_ids, WINDOW, BATCH, torch.Generator().manual_seed(args.seed))
    stream = itertools.islice(stream, state["step"], None)  # the same order as without an interruption
    bar = tqdm(initial=state["step"], unit="step")
    clock, losses = time.monotonic(), []
    while state["step"] < (total := planned_total(state, args)):
        bar.total, share = total, rate(state["step"], total)
        losses.append(step(model, optimizers, next(stream).to(model.device), share))
        state["step"] += 1
        state["seconds"], clock = state["seconds"] + time.monotonic() - clock, time.monotonic()
        bar.update()
        bar.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.3f}")
        if state["step"] % SAVE_EVERY == 0 or state["step"] == total:
            save(sum(losses) / len(losses), share)
            losses = []
    bar.close()


def step(model: nn.Module, optimizers: dict, batch: LongTensor, share: float) -> float:
    """One update at `share` of the peak learning rates; the loss before it."""
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * share
    loss = loss_of(model, batch)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers.values():
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.item()


def log(model: LlamaForCausalLM, rows: LongTensor, loss: float, share: float, state: dict, path: Path) -> None:
    full, rounded = perplexity(model, rows), rounded_perplexity(model, rows)
    line = {
        "step": state["step"],
        "tokens": state["step"] * STEP_TOKENS,
        "minutes": round(state["seconds"] / 60, 2),
        "rate": round(share, 4),
        "train_loss": round(loss, 4),
        "validation_perplexity": round(full, 3),
        "rounded_perplexity": round(rounded, 3),
        "ratio": round(rounded / full, 4),
    }
    state.setdefault("log", []).append(line)
    with open(path, "w") as file:  # all of the state's log, so that a resumed run repeats no line
        file.writelines(json.dumps(entry) + "\n" for entry in state["log"])
    tqdm.write(json.dumps(line), file=sys.stderr)


# ------------------------------------------------------------------------------------------ the model card


@torch.no_grad()
def sample(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str) -> str:
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    ids = model.generate(**inputs, max_new_tokens=80, do_sample=True, temperature=0.7, top_p=0.95, pad_token_id=0)
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def write_card(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    test: LongTensor,
    train_tokens: int,
    state: dict,
    args: argparse.Namespace,
) -> None:
    model.eval()
    full, rounded = perplexity(model, test), rounded_perplexity(model, test)
    torch.manual_seed(args.seed)
    samples = "\n\n".join(f"```text\n{sample(model, tokenizer, prompt)}\n```" for prompt in PROMPTS)
    seen = state["step"] * STEP_TOKENS
    facts = {
        "parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M",
        "shape": f"4 layers, hidden 256, intermediate 768, 4 heads, trained on windows of {WINDOW} tokens",
        "weights": "bf16, embeddings tied to the head",
        "tokenizer": f"byte-level BPE of the training split, {VOCABULARY} entries",
        "text": f"docstrings: {train_tokens / 1e6:.2f} M training tokens",
        "tokens seen": f"{seen / 1e6:.2f} M ({seen / train_tokens:.2f} epochs) in steps of {STEP_TOKENS}",
        "matrices": f"Muon, rate {args.muon_lr:g} (RMS matched to AdamW), weight decay {args.weight_decay:g}",
        "embeddings, norms": f"AdamW, rate {args.adamw_lr:g}",
        "schedule": f"{WARMUP_STEPS} steps warm-up, constant, last {DECAY_SHARE:.0%} linear decay to 0",
        "command": f"`{state['command']}`: {state['seconds'] / 60:.0f} minutes on {args.device}",
        "torch": torch.__version__,
        "**test perplexity**": f"**{full:.2f}** ({test.numel() / 1e3:.0f} k tokens in windows of {WINDOW})",
        "**after 2-bit rounding**": f"**{rounded:.2f}**, that is {rounded / full:.2f} times",
    }
    table = "\n".join(f"| {name} | {fact} |" for name, fact in facts.items())
    card = CARD.format(table=table, course=course(state["log"]), samples=samples, seed=args.seed)
    (args.output / "README.md").write_text(card, encoding="utf-8")


def course(lines: list[dict]) -> str:
    """About twelve lines of the log, the last one among them, as rows of a Markdown table."""
    apart = max(1, round(len(lines) / 12))
    return "\n".join(
        f"| {r['step']} | {r['tokens'] / 1e6:.2f} | {r['train_loss']:.3f} | {r['validation_perplexity']:.2f} "
        f"| {r['rounded_perplexity']:.2f} | {r['ratio']:.2f} |"
        for r in reversed(lines[::-apart])
    )


# --------------------------------------------------------------------------------------------- command line


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=18_000_000, help="length of the run")
    parser.add_argument("--max-minutes", type=float, help="begin the decay early enough to end by then")
    parser.add_argument("--muon-lr", type=float, default=6e-3)
    parser.add_argument("--adamw-lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "pretrain", help="checkpoints and log")
    parser.add_argument("--output", type=Path, default=ROOT / "models" / "doc-llama", help="the model folder")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    tokenizer = train_tokenizer(args.output)
    splits = load_text("docstrings", tokenizer)
    device = torch.device(args.device)
    model = new_model(args.seed).to(device)
    optimizers = new_optimizers(model, args)
    state = load_checkpoint(args.run / "checkpoint", model, optimizers)
    if state is None:
        state = {"step": 0, "seconds": 0.0, "command": " ".join(["python", *sys.argv])}
    else:
        print(f"going on from step {state['step']}", file=sys.stderr)
    args.run.mkdir(parents=True, exist_ok=True)
    validation = windows(splits.validation, WINDOW)[:EVALUATION_WINDOWS].to(device)

    def save(loss: float, share: float) -> None:
        log(model, validation, loss, share, state, args.run / "log.jsonl")
        save_checkpoint(args.run / "checkpoint", model, optimizers, state)
        save_model_folder(model, tokenizer, args.run / "snapshot")

    train(model, optimizers, splits.train, state, args, save)
    save_model_folder(model, tokenizer, args.output)
    write_card(model, tokenizer, windows(splits.test, WINDOW).to(device), len(splits.train), state, args)
    print(f"wrote {args.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
