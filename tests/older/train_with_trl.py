"""DPO by TRL on published pairs as its documentation shows it, by whichever versions are installed; prints the losses.

    python train_with_trl.py MODEL PAIRS OUT

Nothing of vcot is imported, and nothing of TRL is changed.
"""

import json
import sys

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import DPOConfig, DPOTrainer

source, pairs, out = sys.argv[1:]
trainer = DPOTrainer(
    model=AutoModelForImageTextToText.from_pretrained(source),
    args=DPOConfig(
        output_dir=out,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        max_steps=2,
        learning_rate=1e-3,
        max_length=None,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    ),
    train_dataset=load_dataset(pairs, split="train", cache_dir=f"{out}/cache"),
    eval_dataset=load_dataset(pairs, split="validation", cache_dir=f"{out}/cache"),
    processing_class=AutoProcessor.from_pretrained(source),
    peft_config=LoraConfig(r=4, target_modules="all-linear"),
)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
held_out = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
print(json.dumps({"losses": losses, "held_out": held_out}))
