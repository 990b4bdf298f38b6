"""Supervised fine-tuning with TRL's ``SFTTrainer(packing=True)``, its loss and its attention those of packops.

    pip install '.[trl]'
    python examples/trl_sft.py

Runs on a CPU in well under a minute, on real text: the model learns to continue the first line of networkx's docstrings, which is
not scored itself. TRL packs the documents and says where they begin; ``attention="packops_varlen"`` keeps them apart without
flash-attn. The loss is the one that ``packops.hf.apply`` gave the model, hence the two lines of ``PackedSFTTrainer``: TRL's own
loss would not ask the model for one. (Without ``apply``, ``SFTTrainer(compute_loss_func=packops.hf.compute_loss_func)`` works
too, but costs a second forward.)
"""

import argparse
import tempfile

import datasets
import tokenizers
import transformers
import trl

from packops import hf
from packops.demo import corpus

END = corpus.END_OF_TEXT


class PackedSFTTrainer(trl.SFTTrainer):
    def compute_loss(self, *args, **kwargs):
        return transformers.Trainer.compute_loss(self, *args, **kwargs)


def build_tokenizer(texts: list[str]) -> transformers.PreTrainedTokenizerFast:
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=1024, special_tokens=[END], show_progress=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token=END, pad_token=END)


def main(steps: int = 15, documents: int = 300) -> list[float]:
    texts = [text[:600] for text in corpus.read_documents(("networkx",))[:documents]]
    rows = [{"prompt": "Explain: " + text.splitlines()[0] + "\n", "completion": text} for text in texts]
    tokenizer = build_tokenizer([row["prompt"] + row["completion"] for row in rows])

    transformers.set_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    hf.apply(model, attention="packops_varlen")
    trainer = PackedSFTTrainer(
        model,
        trl.SFTConfig(
            output_dir=tempfile.mkdtemp(), packing=True, max_length=1024, max_steps=steps, learning_rate=1e-2,
            per_device_train_batch_size=1, gradient_accumulation_steps=2, lr_scheduler_type="cosine", warmup_steps=2,
            logging_steps=max(1, steps // 5), save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, bf16=False,
            activation_checkpointing=False, dataloader_pin_memory=False,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--documents", type=int, default=300)
    history = main(**vars(parser.parse_args()))
    print(f"loss {history[0]:.3f} -> {history[-1]:.3f}")
