"""Records as the runs leave them, with figures of the size that a laptop and a card give."""

import json
from types import SimpleNamespace

import pytest

from llm_at_home.records.schema import Reading, Record

CPU = {"model": "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "cores": 2}
PACKAGES = {"torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2", "numpy": "2.2.6"}
NO_METER = Reading.unknown("Wh", "no energy counter: /sys/class/powercap is not readable")


def reading(value, unit="1", method="synchronized_clock", spread=None, n=None):
    interval = (value - spread, value + spread) if spread else None
    return Reading(value, unit, method, interval, n)


def provenance(gpu=None, started_at="2026-11-20T10:00:00+00:00"):
    return {
        "git": {"commit": "0123456789abcdef0123456789abcdef01234567", "dirty": False},
        "packages": PACKAGES,
        "gpu": [{"name": gpu}] if gpu else None,
        "cpu": CPU,
        "started_at": started_at,
        "seconds": 61.5,
    }


def config(model="smollm2_135m", quant="none", gpu="auto", **more):
    base = {
        "model": {"name": model, "weights": "pretrained"},
        "quant": quant if isinstance(quant, dict) else {"name": quant},
        "gpu": {"name": gpu},
        "dtype": "float32",
        "data": {"name": "handbook"},
        "questions": {"name": "home_bench"},
        "limit": None,
    }
    return base | more


def speeds(decode=25.34):
    return {
        "time_to_first_token": reading(0.4127, "s"),
        "prefill_tokens_per_second": reading(212.4, "tokens/s"),
        "decode_tokens_per_second": reading(decode, "tokens/s", spread=0.41, n=5),
        "energy_gross": NO_METER,
        "energy_net": NO_METER,
        "energy_per_token": Reading.unknown("J/token", NO_METER.reason),
    }


def infer(config_hash="infer-1", gpu=None, started_at="2026-11-20T10:00:00+00:00", decode=25.34, **choices):
    readings = speeds(decode)
    if gpu:
        readings |= {
            "torch_allocated_peak": reading(5.219, "GB", "torch_peak"),
            "torch_reserved_peak": reading(5.604, "GB", "torch_peak"),
            "process_memory_peak": reading(6.127, "GB", "nvml_sampled_50ms"),
            "energy_gross": reading(1.234, "Wh", "nvml_counter"),
            "energy_net": reading(0.0312, "Wh", "nvml_counter"),
            "energy_per_token": reading(2.51, "J/token", "nvml_counter"),
        }
    else:
        readings["resident_set_peak"] = reading(1.048, "GB", "kernel_high_water_mark")
        for name in ("torch_allocated_peak", "torch_reserved_peak", "process_memory_peak", "device_memory_peak"):
            readings[name] = Reading.unknown("GB", "the run used the CPU only")
    return Record(
        "infer",
        config=config(**({"adapter_path": None} | choices)),
        config_hash=config_hash,
        provenance=provenance(gpu, started_at),
        kernel={
            "linear": "Linear",
            "layers": {"Linear": 210},
            "backend": "torch cpu",
            "attention": "sdpa",
            "threads": 2,
        },
        readings=readings,
    )


def train(config_hash="train-1", **choices):
    return Record(
        "train",
        config=config(**({"adapter": {"name": "lora"}, "trainer": {"max_steps": 100}} | choices)),
        config_hash=config_hash,
        provenance=provenance(started_at="2026-11-20T11:00:00+00:00"),
        readings={
            "trainable_parameters": reading(9_768_960, "1", "count"),
            "resident_set_peak": reading(2.310, "GB", "psutil"),
            "steps_per_second": reading(0.4812, "steps/s"),
            "tokens_per_second": reading(318.2, "tokens/s"),
            "energy_gross": NO_METER,
            "energy_net": NO_METER,
            "energy_per_step": Reading.unknown("J/step", NO_METER.reason),
            "loss_first": reading(3.4121, "nats/token", "trainer"),
            "loss_last": reading(0.0871, "nats/token", "trainer"),
        },
    )


def text_evaluation(match, config_hash, of=None, folder=None, **choices):
    subject = None
    if of:
        subject = {
            "folder": str(folder),
            "config_hash": of.config_hash,
            "task": of.task,
            "config": of.config,
        }
    return Record(
        "evaluate",
        config=config(**({"task": "text", "adapter_path": str(folder) if folder else None} | choices)),
        config_hash=config_hash,
        provenance=provenance(started_at="2026-11-20T12:00:00+00:00"),
        quality={
            "exact_match": reading(match, "1", "torchmetrics", n=240),
            "token_f1": reading(min(1, match + 0.02), "1", "torchmetrics", n=240),
            "refusal_recall": reading(0.75, "1", "rule", n=40),
            "false_refusal_rate": reading(0.004, "1", "rule", n=240),
            "perplexity_home_bench": reading(14.21, "1", "teacher_forcing"),
        },
        subject=subject,
    )


def judgment(of, config_hash, method="gpt4:single", score=6.25, missing=2):
    return Record(
        "evaluate",
        config={"task": "judge", "gpu": {"name": "auto"}, "limit": None},
        config_hash=config_hash,
        provenance=provenance(started_at="2026-11-20T13:00:00+00:00"),
        quality={
            "judge_score_mean": reading(score, "points", method, spread=0.5, n=48),
            "judge_score_turn_1": reading(score + 0.1, "points", method, n=48),
            "judge_score_coding": reading(score - 1, "points", method, n=6),
            "win_rate": reading(0.415, "1", method, n=24),
        },
        counts={"judgments": 48, "judgments_missing": missing},
        subject={"folder": "x", "config_hash": of.config_hash, "task": of.task, "config": of.config},
    )


def fidelity(config_hash, divergence, quant, bits=4.5, started_at="2026-11-20T14:00:00+00:00", **choices):
    """A record of task=fidelity; ``quant`` is a whole group, ``divergence`` None that of a model that overflows."""
    against = "against_own_unquantized_baseline"
    lost = {
        "perplexity": reading(41.67, "1", against, spread=7.0, n=40),
        "perplexity_ratio": reading(1.212, "1", against, spread=0.02, n=40),
        "kl_divergence_mean": Reading.unknown("nats/token", "the model's logits are not finite", against),
        "kl_divergence_p99": reading(1.391, "nats/token", against, spread=0.1, n=40),
        "top1_agreement": reading(0.693, "1", against, spread=0.013, n=40),
    }
    if divergence is not None:
        spread = divergence / 10
        lost["kl_divergence_mean"] = reading(divergence, "nats/token", against, spread=spread, n=40)
    lost |= {f"{name}_own_answers": one for name, one in lost.items()}
    lost |= {f"{name}_detectable": reading(0.0123, one.unit, against, n=40) for name, one in lost.items()}
    options = {"answers_seed": 0, "baseline_dtype": "float32"}
    return Record(
        "evaluate",
        config=config(**({"task": "fidelity", "quant": quant, "fidelity": options} | choices)),
        config_hash=config_hash,
        provenance=provenance(started_at=started_at),
        kernel={"linear": "Linear", "backend": "torch cpu"},
        readings={"bits_per_weight": reading(bits, "bits", "tensors_in_memory")},
        quality=lost,
    )


@pytest.fixture
def make():
    return SimpleNamespace(
        infer=infer,
        train=train,
        text=text_evaluation,
        judge=judgment,
        fidelity=fidelity,
        reading=reading,
        config=config,
    )


@pytest.fixture
def runs(tmp_path):
    return tmp_path / "multirun"


@pytest.fixture
def save(runs):
    """Write a record, or any text, as the record.json of a run folder."""

    def write(record, folder):
        path = runs / folder / "record.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(record if isinstance(record, str) else json.dumps(record.to_dict()), encoding="utf-8")
        return path

    return write
