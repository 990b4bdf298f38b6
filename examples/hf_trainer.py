"""Packed training of a Hugging Face model in ``transformers.Trainer``, with the losses of unpacked training.

    pip install '.[hf]'
    python examples/hf_trainer.py

Runs on a CPU in well under a minute, on real text: networkx's docstrings. Four things make it packed: the plan of the
packs, the collator, the attention and the loss. Everything else is Trainer as you know it.
"""

import argparse
import tempfile

import transformers

import packops
from packops import hf
from packops.demo import corpus


def main(steps: int = 15, documents: int = 400) -> list[float]:
    text = corpus.load(
        vocab_size=1024, max_tokens=256, num_training=documents, num_held_out=0, seed=0, packages=["networkx"]
    )  # fmt: skip
    plan = packops.pack([len(document) for document in text.training], 1024)
    print(f"{len(text.training)} documents in {plan.num_packs} packs of 1024 tokens, {100 * plan.efficiency:.1f} % full")

    transformers.set_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=text.vocab_size, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    hf.apply(model, attention="packops_varlen")  # RoPE, attention and loss; hf.revert(model) undoes it
    print(hf.report(model))

    packs = [[text.training[number] for number in pack] for pack in plan]  # a training example is a pack of documents
    collate = packops.PackingCollator(names="hf")
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            output_dir=tempfile.mkdtemp(), max_steps=steps, learning_rate=1e-2, lr_scheduler_type="cosine", warmup_steps=2,
            per_device_train_batch_size=1, gradient_accumulation_steps=2,  # two packs a step: a mean over all their tokens
            remove_unused_columns=False, logging_steps=max(1, steps // 5), save_strategy="no", report_to=[], disable_tqdm=True,
            use_cpu=True, dataloader_pin_memory=False,
        ),
        train_dataset=packs,
        data_collator=lambda rows: collate([document for pack in rows for document in pack]),
    )  # fmt: skip
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--documents", type=int, default=400)
    history = main(**vars(parser.parse_args()))
    print(f"loss {history[0]:.3f} -> {history[-1]:.3f}")
