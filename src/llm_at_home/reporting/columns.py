"""The columns of each table: a figure's name in the record, its title, unit and decimals."""

from __future__ import annotations

from dataclasses import replace

from llm_at_home.reporting.cells import Column

_MODEL = Column("model", "Model", kind="text", terminal="Model")
_QUANT = Column("quant", "Quant", kind="text", terminal="Quant")
_ADAPTER = Column("adapter", "Adapter", kind="text", terminal="Adapter")
_DTYPE = Column("dtype", "Dtype", kind="text")
_DEVICE = Column("device", "Device", kind="text")
_KERNEL = Column("kernel", "Kernel", kind="text")
MEMORY = tuple(
    Column(key, title, "Memory", unit="GB", better="lower", terminal=terminal)
    for key, title, terminal in (
        ("torch_allocated_peak", "torch allocated, peak", "Mem GB"),
        ("torch_reserved_peak", "torch reserved, peak", ""),
        ("process_memory_peak", "process, peak", ""),
        ("resident_set_peak", "resident set, peak", "RSS GB"),
    )
)
_DECODE = Column(
    "decode_tokens_per_second",
    "decode",
    "Speed",
    unit="tokens/s",
    decimals=1,
    better="higher",
    terminal="Tok/s",
)
_ENERGY = (
    Column("energy_gross", "gross", "Energy", unit="Wh", decimals=2, better="lower"),
    Column("energy_net", "net", "Energy", unit="Wh", decimals=2, better="lower"),
)
ENERGY_PER_TOKEN = Column("energy_per_token", "per token", "Energy", unit="J/token", better="lower", terminal="J/token")
INFERENCE = (
    _MODEL,
    _QUANT,
    _ADAPTER,
    _DTYPE,
    _DEVICE,
    _KERNEL,
    Column("batch_size", "Batch", decimals=0),
    *MEMORY,
    Column("time_to_first_token", "first token", "Speed", unit="s", decimals=3, better="lower"),
    Column("prefill_tokens_per_second", "prefill", "Speed", unit="tokens/s", decimals=1, better="higher"),
    _DECODE,
    Column("output_tokens_per_second", "with prompts", "Speed", unit="tokens/s", decimals=1, better="higher"),
    Column("time_scaled_40k", "scaled to 40,000 tokens", "Speed", unit="h", better="lower"),
    *_ENERGY,
    ENERGY_PER_TOKEN,
    Column("energy_scaled_40k", "scaled to 40,000 tokens", "Energy", unit="Wh", decimals=1, better="lower"),
    Column("judge_score", "judge score", "Quality", "many", better="higher", terminal="Score"),
    Column("win_rate", "win rate", "Quality", "many", unit="%", decimals=1, better="higher"),
    Column("human_grade", "people, 1 to 5", "Quality", "many", better="higher"),
)
_AFTER = (
    Column("exact_match", "exact match", unit="%", decimals=1, better="higher", terminal="EM %"),
    Column("token_f1", "token F1", unit="%", decimals=1, better="higher"),
    Column("refusal_recall", "refusal recall", unit="%", decimals=1, better="higher"),
    Column("false_refusal_rate", "false refusals", unit="%", decimals=1, better="lower"),
    Column("perplexity_home_bench", "perplexity, home_bench", better="lower", terminal="PPL"),
)
FINETUNING = (
    _MODEL,
    _QUANT,
    _ADAPTER,
    _DEVICE,
    Column("trainable_parameters", "Trainable parameters", decimals=0),
    Column("steps", "Steps", decimals=0),
    *MEMORY,
    Column("steps_per_second", "steps", "Speed", unit="steps/s", decimals=3, better="higher", terminal="Steps/s"),
    Column("tokens_per_second", "tokens", "Speed", unit="tokens/s", decimals=0, better="higher"),
    *_ENERGY,
    Column("energy_per_step", "per step", "Energy", unit="J/step", decimals=1, better="lower", terminal="J/step"),
    Column("loss_first", "first", "Loss", decimals=3, better="lower"),
    Column("loss_last", "last", "Loss", decimals=3, better="lower", terminal="Loss"),
    *(replace(column, group="Quality, before → after", kind="pair") for column in _AFTER),
)
_KL = Column("kl_divergence", "", "Fidelity", unit="nats/token", decimals=4, better="lower")
QUANTIZATION = (
    _QUANT,
    replace(_MODEL, terminal=""),
    replace(_DTYPE, terminal="Dtype"),
    _DEVICE,
    _KERNEL,
    Column("make_time", "making", "Time", unit="s", decimals=0, better="lower"),
    Column("load_time", "loading", "Time", unit="s", decimals=1, better="lower"),
    Column("checkpoint_size", "on disk", "Size", unit="GB", decimals=3, better="lower"),
    Column("bits_per_weight", "bits per weight", "Size", better="lower", terminal="Bits"),
    Column("model_size", "in memory", "Size", unit="GB", decimals=3, better="lower"),
    *(column for column in MEMORY if column.key in ("torch_allocated_peak", "resident_set_peak")),
    _DECODE,
    replace(ENERGY_PER_TOKEN, terminal=""),
    Column("perplexity", "perplexity", "Fidelity", better="lower"),
    Column("perplexity_ratio", "perplexity ratio", "Fidelity", decimals=3, better="lower", terminal="PPL ratio"),
    replace(_KL, key="kl_divergence_mean", title="KL divergence, mean", terminal="KL"),
    replace(_KL, key="kl_divergence_mean_detectable", title="smallest KL divergence that shows"),
    replace(_KL, key="kl_divergence_p99", title="KL divergence, 99th percentile", decimals=3),
    Column("top1_agreement", "top-1 agreement", "Fidelity", unit="%", decimals=1, better="higher", terminal="Top-1 %"),
    replace(_KL, key="kl_divergence_mean_own_answers", title="KL divergence, mean, own answers"),
)
# Of the judge itself, from its planted pairs.
JUDGE_TESTED = (
    Column("judge_accuracy", "planted pairs right", "Judge", unit="%", decimals=0, better="higher"),
    Column("judge_accuracy_single", "right by scores", "Judge", unit="%", decimals=0, better="higher"),
    Column("judge_position_bias", "the first wins", "Judge", unit="%", decimals=0),
    Column("judge_length_bias", "padding wins", "Judge", unit="%", decimals=0),
)
EVALUATIONS = (
    Column("evaluation", "Evaluation", kind="text", terminal="Evaluation"),
    _MODEL,
    _QUANT,
    _ADAPTER,
    Column("on", "Questions or data", kind="text", terminal="On"),
    Column("figures", "Figures", kind="many", terminal="Figures"),
    Column("judgments", "made", "Judgments", decimals=0, terminal="Judgments"),
    Column("judgments_missing", "missing", "Judgments", decimals=0, better="lower", terminal="Missing"),
    *JUDGE_TESTED,
)
UNFINISHED = (
    Column("task", "Task", kind="text", terminal="Task"),
    Column("status", "Status", kind="text", terminal="Status"),
    _MODEL,
    _QUANT,
    replace(_ADAPTER, terminal=""),
    replace(_DEVICE, terminal=""),
    Column("error", "Error", kind="text", terminal="Error"),
    Column("folder", "Folder", kind="text", terminal="Folder"),
)


def by_key(columns: tuple[Column, ...], key: str) -> Column:
    """The column of this key."""
    return next(column for column in columns if column.key == key)
