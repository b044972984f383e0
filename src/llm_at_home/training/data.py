"""The data module: conversations to padded batches, in an order that a resumed run continues exactly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule

from llm_at_home.models.chat import IGNORED, Encoded
from llm_at_home.training.counting import counted
from llm_at_home.training.shapes import Shapes

GROUPED_BATCHES = 8  # neighbours in the random order that group_by_length may exchange, in batches


class ResumableLoader:
    """Batches of encoded conversations; a permutation a pass, drawn from seed and pass number alone.

    Lightning saves ``state_dict()`` with its checkpoints, so that a resumed run goes on with the very next batch.

    Args:
        conversations: what to draw from.
        batch_size: conversations in a batch; the last of a pass may be smaller.
        pad_id: token id that fills the shorter ones, on the right.
        seed: of the order.
        group_by_length: put conversations of similar length into a batch, so that fewer tokens are padding. Only
            neighbours in the random order are regrouped, and the batches are shuffled again.
        packing: the conversations of a batch stand one after the other in one row, without padding.
        shapes: round batches up to a few shapes, for a compiled model.
    """

    def __init__(
        self,
        conversations: Sequence[Encoded],
        batch_size: int,
        pad_id: int,
        seed: int,
        group_by_length: bool = False,
        packing: bool = False,
        shapes: Shapes | None = None,
    ) -> None:
        self.shapes = shapes
        self.conversations = conversations
        self.batch_size = batch_size
        self.pad_id = pad_id
        self.seed = seed
        self.group_by_length = group_by_length
        self.packing = packing
        self.rank, self.processes = 0, 1
        self.epoch = 0
        self.position = 0

    def share(self, rank: int, processes: int) -> None:
        """Draw every ``processes``-th batch alone, beginning with number ``rank``: as many in each process.

        Where a pass leaves a process without its last batch, it gets one that the loss looks at nowhere.
        """
        self.rank, self.processes = rank, processes

    def __len__(self) -> int:
        return -(-len(self.conversations) // (self.batch_size * self.processes))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        batches = self._batches()
        while self.position < len(self):
            number = self.position * self.processes + self.rank
            self.position += 1
            if number < len(batches):
                batch = [self.conversations[i] for i in batches[number]]
            else:
                ids = self.conversations[0].input_ids[:1]
                batch = [Encoded(ids, [IGNORED] * len(ids), truncated=True)]
            made = pack(batch) if self.packing else collate(batch, self.pad_id)
            yield counted(self.shapes.fill(made, self.pad_id) if self.shapes else made)
        self.epoch += 1
        self.position = 0

    def _batches(self) -> list[list[int]]:
        """The batches of this pass, as indices: a function of seed and pass number alone."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.conversations), generator=generator).tolist()
        if self.group_by_length:
            size = self.batch_size * GROUPED_BATCHES
            chunks = [order[i : i + size] for i in range(0, len(order), size)]
            order = [i for chunk in chunks for i in sorted(chunk, key=lambda i: len(self.conversations[i].input_ids))]
        batches = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        if self.group_by_length:
            batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        return batches

    def state_dict(self) -> dict[str, int]:
        """Where the next batch stands."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there."""
        self.epoch, self.position = state["epoch"], state["position"]


def collate(conversations: Sequence[Encoded], pad_id: int) -> dict[str, torch.Tensor]:
    """Pad on the right: ``input_ids``, ``attention_mask``, ``labels``, each of shape (conversations, longest)."""
    length = max(len(c.input_ids) for c in conversations)

    def padded(rows: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([row + [fill] * (length - len(row)) for row in rows])

    return {
        "input_ids": padded([c.input_ids for c in conversations], pad_id),
        "attention_mask": padded([[1] * len(c.input_ids) for c in conversations], 0),
        "labels": padded([c.labels for c in conversations], IGNORED),
    }


def pack(conversations: Sequence[Encoded]) -> dict[str, torch.Tensor]:
    """One row without padding: ``input_ids``, ``position_ids``, ``labels``, each of shape (1, tokens of all).

    Positions begin anew with each conversation, from which transformers makes a mask that lets none look at another;
    and none has to predict the first token of the next.
    """
    rows = {
        "input_ids": [token for c in conversations for token in c.input_ids],
        "position_ids": [position for c in conversations for position in range(len(c.input_ids))],
        "labels": [label for c in conversations for label in (IGNORED, *c.labels[1:])],
    }
    return {key: torch.tensor([row]) for key, row in rows.items()}


def random_conversations(count: int, length: int, vocabulary: int, seed: int) -> list[Encoded]:
    """Random token ids of one length, the loss over all: for resource figures of a model without a tokenizer."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, vocabulary, (count, length), generator=generator).tolist()
    return [Encoded(row, row, truncated=False) for row in rows]


class ChatDataModule(LightningDataModule):
    """Training batches for :class:`llm_at_home.training.module.CausalLMModule`.

    Args:
        conversations: encoded; those without a token for the loss are dropped and counted.
        batch_size: conversations in a micro-batch.
        pad_id: the tokenizer's padding token.
        seed: of the order.
        order: ``group_by_length``, ``packing`` and ``shapes``, as :class:`ResumableLoader` takes them.

    Raises:
        ValueError: when nothing is left to train on.
    """

    def __init__(self, conversations: Sequence[Encoded], batch_size: int, pad_id: int, seed: int, **order: Any) -> None:
        super().__init__()
        kept = [c for c in conversations if c.trained_tokens > 0]
        if not kept:
            raise ValueError("no conversation has an assistant token within data.max_length")
        self.counts = {
            "conversations": len(kept),
            "conversations_truncated": sum(c.truncated for c in kept),
            "conversations_dropped": len(conversations) - len(kept),
        }
        self.conversations = kept
        self._loader = ResumableLoader(kept, batch_size, pad_id, seed, **order)

    def train_dataloader(self) -> Any:
        """The one loader of this run; of several processes each has its share."""
        if self.trainer is not None:
            self._loader.share(self.trainer.global_rank, self.trainer.world_size)
        return self._loader
