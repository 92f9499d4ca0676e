"""The plain way: TRL's trainer on the published Parquet file, which goes on from its last checkpoint.

python train_trl.py SETTINGS.json        (bench/peers/trainers.py writes it)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoProcessor, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import DPOConfig, DPOTrainer


class Log(TrainerCallback):  # type: ignore[misc]
    """A line of JSON for each step."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: object) -> None:
        with (Path(args.output_dir) / "log.jsonl").open("a") as file:
            file.write(json.dumps(logs | {"step": state.global_step}) + "\n")


def main(settings: dict[str, Any]) -> None:
    out, model = Path(settings["out"]), settings["model"]
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(output_dir=str(out), **settings["arguments"]),
        train_dataset=load_dataset("parquet", data_files=settings["pairs"], split="train"),
        processing_class=AutoProcessor.from_pretrained(model),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **settings["lora"]),
        callbacks=[Log()],
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(out)))
    trainer.save_model()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
