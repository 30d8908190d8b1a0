"""Train a quantized model by transformers' Trainer, for those whose code is built around it.

    python examples/trainer.py my-2-bit-model Qwen/Qwen3-0.6B notes.txt my-trained-model

Three things are not the Trainer's own: the loss, which is the distance to the unquantized model; the optimizer, since
each kind of parameter has a rate in its own unit (qat/config.py); and saving, which `save_packed` does. All else
(devices, accumulation of gradients, logging, callbacks) is as everywhere with a Trainer.

Limits: windows without padding; where there is some, compare logits[mask] alone. The Trainer saves no checkpoints, as
from_pretrained would not know the layers in them: use lcqat_min.train if a run must continue after a stop.
"""

import argparse
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from lcqat_min import TrainConfig, kl_to
from lcqat_min.harness import load_text, windows
from lcqat_min.packing import load_packed, save_packed
from lcqat_min.qat import distillation_loss, parameter_groups

WINDOW = 256  # tokens that the model reads at once


class DistillationTrainer(Trainer):
    """A Trainer whose loss is KL(teacher || model), nats per token, over input_ids [B, T]."""

    def __init__(
        self,
        model: torch.nn.Module,
        teacher: torch.nn.Module,
        windows: torch.Tensor,
        arguments: TrainingArguments,
        **rates: float,
    ):
        """windows: token ids [N, T]. arguments: with max_steps. rates: those of TrainConfig, in its units.

        Raises as TrainConfig and parameter_groups do: for no steps, and for a model that is not in fp32.
        """
        config = TrainConfig(arguments.max_steps, **rates)
        optimizer = torch.optim.AdamW(parameter_groups(model, config), betas=(0.9, 0.95), weight_decay=0.0)
        super().__init__(
            model,
            arguments,
            train_dataset=[{"input_ids": window} for window in windows],
            optimizers=(optimizer, LambdaLR(optimizer, config.rate)),
        )
        self.teacher = teacher.to(self.args.device).eval()

    def compute_loss(self, model, inputs, return_outputs=False, **others):
        """The mean over the batch; the Trainer divides it by the number of batches that it accumulates."""
        outputs = model(input_ids=inputs["input_ids"], use_cache=False)
        with torch.no_grad():
            target = self.teacher(input_ids=inputs["input_ids"], use_cache=False).logits
        loss = distillation_loss(outputs.logits, target)
        return (loss, outputs) if return_outputs else loss


def main(argv: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("packed", type=Path, help="a folder that save_packed wrote, with a tokenizer")
    options.add_argument("teacher", help="name or folder of the unquantized model that it was made from")
    options.add_argument("text", help="a text file, a folder of them, or `docstrings`")
    options.add_argument("out", type=Path, help="a folder that does not exist yet")
    options.add_argument("--steps", type=int, default=60, help="of 4 windows each (default: 60)")
    args = options.parse_args(argv)
    if args.out.exists():
        options.error(f"{args.out} exists already: give a new folder, or remove it")

    tokenizer = AutoTokenizer.from_pretrained(args.packed, trust_remote_code=False)
    packed = load_packed(args.packed, trainable=True)
    dtype, model = packed.dtype, packed.float()  # what trains has to be in fp32
    teacher = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.float32, trust_remote_code=False)
    text = load_text(args.text, tokenizer, model=model)

    arguments = TrainingArguments(
        output_dir=args.out.parent,
        max_steps=args.steps,
        per_device_train_batch_size=4,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
    )  # writes no files
    trainer = DistillationTrainer(model, teacher, windows(text.train, WINDOW), arguments)
    judged = text.test[:16_384]
    before = kl_to(teacher, model, judged, WINDOW)
    trainer.train()
    after = kl_to(teacher, model, judged, WINDOW)
    print(f"KL to the unquantized model, nats per token: {before:.4f} before, {after:.4f} after")
    print(save_packed(model, args.out, dtype))
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
