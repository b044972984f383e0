"""A transformers tokenizer as the metadata of a ``.gguf`` file.

llama.cpp knows two kinds that Llama models use: byte-level BPE with merges (``gpt2``), whose way of splitting text
before the merges it knows by name, and SentencePiece BPE with scores (``llama``). Both are told from the tokenizer's
own rules, so that a file never claims a way of splitting that transformers does not use.
"""

from __future__ import annotations

import json
import re
from typing import Any

from llm_at_home.errors import Refusal

BYTE = re.compile(r"<0x[0-9A-F]{2}>")
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
HINT = "convert it with llama.cpp's own converter and give quant.path=FILE"


def add_vocabulary(writer: Any, tokenizer: Any, size: int) -> None:
    """Write tokens, their types, merges or scores, special ids and the chat template.

    Args:
        writer: a ``gguf.GGUFWriter``.
        tokenizer: a fast transformers tokenizer.
        size: rows of the embedding; ids that the tokenizer does not use are filled up.

    Raises:
        Refusal: for a tokenizer that llama.cpp would read otherwise than transformers does.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise Refusal(f"this model's tokenizer has no tokenizer.json, which quant=gguf reads: {HINT}")
    rules = json.loads(backend.to_str())
    kind, pre = tokenizer_kind(rules)
    tokens, types = _tokens(tokenizer, size)
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    merges = [pair.split(" ") if isinstance(pair, str) else list(pair) for pair in rules["model"]["merges"]]
    if kind == "gpt2":
        writer.add_token_merges([" ".join(pair) for pair in merges])
    else:
        writer.add_token_scores(_scores(tokens, merges))
    writer.add_token_types(types)
    writer.add_add_space_prefix(kind == "llama" and _has_prefix(rules))
    _add_special(writer, tokenizer)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def tokenizer_kind(rules: dict[str, Any]) -> tuple[str, str]:
    """llama.cpp's names of the tokenizer's kind and of its way of splitting text.

    Args:
        rules: the content of a ``tokenizer.json``.

    Raises:
        Refusal: for any that this writer does not know.
    """
    if rules["model"]["type"] != "BPE":
        raise Refusal(f"quant=gguf cannot write a {rules['model']['type']} tokenizer: {HINT}")
    if rules["model"].get("byte_fallback"):
        return "llama", "default"
    splitter = rules["pre_tokenizer"] or {}
    steps = splitter["pretokenizers"] if splitter.get("type") == "Sequence" else [splitter]
    last = steps[-1]
    if last.get("type") == "ByteLevel" and not last["add_prefix_space"] and rules["normalizer"] is None:
        before = [(step["type"], step.get("individual_digits"), step.get("pattern")) for step in steps[:-1]]
        if before == [] and last["use_regex"]:
            return "gpt2", "gpt-2"
        if before == [("Digits", True, None)] and last["use_regex"]:
            return "gpt2", "smollm"
        if before == [("Split", None, {"Regex": LLAMA3_SPLIT})] and not last["use_regex"]:
            return "gpt2", "llama-bpe"
    raise Refusal(f"quant=gguf does not know this tokenizer's way of splitting text: {HINT}")


def _tokens(tokenizer: Any, size: int) -> tuple[list[str], list[int]]:
    from gguf import TokenType

    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    if max(by_id) >= size:
        raise Refusal(
            f"the tokenizer has {max(by_id) + 1} tokens and the model's embedding {size} rows: mend the model"
        )
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(size)]
    types = [TokenType.NORMAL if number in by_id else TokenType.UNUSED for number in range(size)]
    for number, token in enumerate(tokens):
        if BYTE.fullmatch(token):
            types[number] = TokenType.BYTE
    for number, added in tokenizer.added_tokens_decoder.items():
        types[number] = TokenType.CONTROL if added.special else TokenType.USER_DEFINED
    return tokens, [int(kind) for kind in types]


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """SentencePiece merges the pair whose result scores highest; the order of the merges gives the same ranking."""
    rank: dict[str, int] = {}
    for i, pair in enumerate(merges):
        rank.setdefault("".join(pair), i)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _has_prefix(rules: dict[str, Any]) -> bool:
    """Whether a blank is put before the text."""
    text = json.dumps([rules["normalizer"], rules["pre_tokenizer"]])
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text


def _add_special(writer: Any, tokenizer: Any) -> None:
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(len(ids) > 1 and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(len(ids) > 1 and ids[-1] == tokenizer.eos_token_id)
    for name, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("unk", writer.add_unk_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            add(number)
