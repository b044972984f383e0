"""Merging an adapter into its base: ``python -m llm_at_home.tasks.merge adapter_path=RUN out=FOLDER``."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from llm_at_home.records.schema import Reading, Record
from llm_at_home.records.tracking import Tracker
from llm_at_home.tasks import launch

PROBE = "The merged model must say what the adapter on its base says, token by token."


def run(config: dict[str, Any], folder: Path, record: Record, tracker: Tracker | None) -> None:
    """Write the merged model, and say in the record how far its logits are from the adapter's on its base.

    Args:
        config: a resolved configuration of ``conf/merge.yaml``.
        folder: the run folder; the model goes to ``config["out"]``.
        record: ``quality`` gets ``logit_difference``, relative; ``readings`` gets ``sparsity_merged`` where the base
            is pruned: what the update leaves of its zeros.
        tracker: MLflow, or None.

    Raises:
        Refusal: for an adapter that cannot be merged.
    """
    from llm_at_home.adapters.attach import attach_saved, merged
    from llm_at_home.adapters.start import probe_logits
    from llm_at_home.models.loading import load_tokenizer
    from llm_at_home.pruning.base import is_pruned, load_base
    from llm_at_home.pruning.checkpoint import sparsity_by_layer

    tokenizer = load_tokenizer(config["model"])
    ids = tokenizer(PROBE)["input_ids"]
    model = attach_saved(load_base(config), config["adapter_path"])
    before = probe_logits(model, ids)
    whole = merged(model)
    after = probe_logits(whole, ids)
    difference = float((after - before).norm() / before.norm())
    record.quality["logit_difference"] = Reading(difference, "1", "relative_logit_difference", n=len(before))
    if is_pruned(config):
        left = list(sparsity_by_layer(whole).values())
        share = sum(left) / len(left)
        record.readings["sparsity_merged"] = Reading(share, "1", "mean_of_layers/zeros_counted", n=len(left))
        record.notes.append(f"dense again: the update fills the zeros, and {share:.1%} of the weights are zero")
    _write(config, whole, tokenizer)
    record.notes.append(f"written to {config['out']}")


def _write(config: Mapping[str, Any], model: Any, tokenizer: Any) -> None:
    """Under a temporary name first, so that a full disk leaves nothing that looks whole."""
    out = Path(config["out"])
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        if config["gguf"]:
            from llm_at_home.quantization import gguf_write, modelfile

            file = temporary / "model.gguf"
            gguf_write.write(file, model, tokenizer, config["gguf"], out.name)
            modelfile.write(file, tokenizer, model.config.max_position_embeddings)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@hydra.main(version_base="1.3", config_path="../../../conf", config_name="merge")
def main(config: DictConfig) -> float | list[float] | None:
    """Merge in a process of its own and return the metric."""
    return launch.job("merge", config)


if __name__ == "__main__":
    launch.run(main)
