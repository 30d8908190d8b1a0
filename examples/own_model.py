"""Quantize, train and save a language model of your own: the whole recipe, from a name to a small folder.

python examples/own_model.py Qwen/Qwen3-0.6B notes.txt my-2-bit-model --device cuda
"""

import argparse
import copy
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lcqat_min import LCQAT, TrainConfig, kl_to, quantize, train
from lcqat_min.harness import batches, load_text, sample_windows
from lcqat_min.packing import load_packed, save_packed

WINDOW = 256  # tokens that the model reads at once


def main(argv: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model", help="a name on the Hugging Face hub, or a folder")
    options.add_argument("text", help="a text file, a folder of them, or `docstrings` (offline)")
    options.add_argument("out", type=Path, help="a folder that does not exist yet")
    options.add_argument("--steps", type=int, default=60, help="of training, 4 windows each (default: 60)")
    options.add_argument("--device", default="cpu")
    args = options.parse_args(argv)
    if args.out.exists():
        options.error(f"{args.out} exists already: give a new folder, or remove it")
    config = TrainConfig(args.steps)
    args.out.parent.mkdir(parents=True, exist_ok=True)

    # 1. Load. What trains has to be in fp32. The teacher is the same model, unquantized.
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, trust_remote_code=False)
    teacher = copy.deepcopy(model.to(args.device))
    text = load_text(args.text, tokenizer, model=teacher)
    judged = text.test[:16_384]

    # 2. Quantize: rotate the weights, fit a codebook to each matrix, and round with error feedback.
    windows = sample_windows(text.train, min(128, len(text.train) // WINDOW), WINDOW, torch.Generator().manual_seed(0))
    quantize(model, windows.split(8), LCQAT())
    print(f"nats per token to the unquantized model: {kl_to(teacher, model, judged, WINDOW):.4f} once rounded")

    # 3. Train: distil the teacher into the quantized model. A run that was stopped goes on from the checkpoint.
    data = batches(text.train, WINDOW, 4, torch.Generator().manual_seed(1))
    checkpoint = args.out.with_name(f"{args.out.name}.checkpoint.safetensors")
    train(model, data, config, teacher, checkpoint=checkpoint)

    # 4. Save, then measure what the folder holds. bf16 halves what embeddings and norms take.
    print(save_packed(model, args.out, torch.bfloat16))
    tokenizer.save_pretrained(args.out)
    checkpoint.unlink()
    packed = load_packed(args.out).to(args.device)
    print(f"nats per token to the unquantized model: {kl_to(teacher, packed, judged, WINDOW):.4f} as saved")


if __name__ == "__main__":
    main()
