"""Which adapter a run has: of its own training, or of the training run that its adapter's folder belongs to."""

from __future__ import annotations

from pathlib import Path

from llm_at_home.reporting import facts
from llm_at_home.reporting.load import Loaded


class Trained:
    """The training runs by their folders; an adapter may be of one that a newer run of its config has replaced."""

    def __init__(self, loaded: Loaded):
        found = [run for run in (*loaded.superseded, *loaded.runs) if run.record.task == "train"]
        self._folders = {run.path.parent.resolve(): run for run in found}

    def adapter(self, task: object, config: object, subject: object = None) -> str:
        """The adapter's name, "none", or the end of a path that belongs to no run here."""
        if task == "train":
            return facts.name_at(config, "adapter", "name")
        if facts.at(subject, "config"):
            return self.adapter(facts.at(subject, "task"), facts.at(subject, "config"))
        path = facts.at(config, "adapter_path")
        if not path:
            return "none"
        folder = Path(str(path)).resolve()
        for place in (folder, *folder.parents):
            if place in self._folders:
                return facts.name_at(self._folders[place].record.config, "adapter", "name")
        return facts.path_tail(path)
