"""Makes GPTQModel's checkpoints from calibration text, once, and reads them and published ones with a named kernel."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llm_at_home.errors import Refusal
from llm_at_home.models import source
from llm_at_home.models.loading import fetched, load_tokenizer, load_weights
from llm_at_home.quantization import calibration, mixed_bits
from llm_at_home.quantization.gptq_kernels import kernel_for
from llm_at_home.quantization.gptq_output import library_output
from llm_at_home.records.cached import cached, is_made
from llm_at_home.records.hashing import package_versions

KIND = "quantized"
MADE = "making.json"
# What decides the codes; the kernel that multiplies with them does not.
SETTINGS = ("algorithm", "bits", "target_bits", "group_size", "desc_act", "sym", "calibration")
# The kernels that can write codes, on any device; the automatic choice wants a GPU for AWQ.
PACKING = {"gptq": "gptq_torch", "awq": "awq_torch", "exl3": "exl3_exllama_v3"}
VERSIONS = ("torch", "transformers", "gptqmodel")


def checkpoint_key(config: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the codes depend on: the source's identity, the method, the calibration text and the versions."""
    quant = config["quant"]
    texts = calibration.calibration_texts(quant["calibration"], config["seed"])
    return {
        "source": source.identity(config["model"]),
        "settings": {key: quant[key] for key in SETTINGS if key in quant},
        "calibration": calibration.calibration_hash(texts),
        "device": config["gpu"]["device"],
        "packages": package_versions(VERSIONS),
        **({"inputs": "of its own for each layer"} if quant["algorithm"] == "awq" else {}),
        **({"mixture": mixed_bits.VERSION} if quant.get("target_bits") is not None else {}),
    }


def is_there(config: Mapping[str, Any]) -> bool:
    """Whether the cache has the checkpoint."""
    return is_made(KIND, checkpoint_key(config))


def ensure(config: Mapping[str, Any]) -> Path:
    """The folder of the checkpoint, made now if it is not in the cache."""
    key = checkpoint_key(config)
    if not is_made(KIND, key):
        print(f"making {config['quant']['name']} of {config['model']['name']}, once", file=sys.stderr)
    return cached(KIND, key, lambda folder: _make(config, folder))


def _make(config: Mapping[str, Any], folder: Path) -> None:
    """Quantize the source and write the checkpoint, its tokenizer, and what the making cost."""
    import torch

    start = time.perf_counter()
    quant, device = config["quant"], config["gpu"]["device"]
    tokenizer = load_tokenizer(config["model"])
    texts = calibration.calibration_texts(quant["calibration"], config["seed"])
    rows = [tokenizer(text)["input_ids"][: quant["calibration"]["max_length"]] for text in texts]
    # Float32 costs a GPU more memory than it has to spare, and AWQ's codes are written from 16-bit weights only.
    dtype = "float32" if device == "cpu" and quant["algorithm"] != "awq" else "bfloat16"
    with library_output(), _inputs_of_their_own():
        from gptqmodel import BACKEND, GPTQModel
        from gptqmodel.looper import loop_processor

        # Its logs would go to ./logs, wherever that is.
        loop_processor._PROJECT_LOG_DIR = folder / "logs"
        settings = _settings(config, rows, dtype)
        maker = GPTQModel.load(fetched(config["model"]), settings, dtype=getattr(torch, dtype), device=device)
        maker.layer_callback = _Progress(maker.model.config.num_hidden_layers)
        examples = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in rows]
        maker.quantize(examples, batch_size=1, backend=BACKEND(PACKING[quant["algorithm"]]))
        maker.save(str(folder))
    shutil.rmtree(folder / "logs", ignore_errors=True)
    tokenizer.save_pretrained(folder)
    cost: dict[str, Any] = {"seconds": time.perf_counter() - start, "calibration_tokens": sum(map(len, rows))}
    cost["resident_set_peak"] = resident_set_peak()
    if device == "cuda":
        cost["torch_allocated_peak"] = torch.cuda.max_memory_allocated() / 1e9
    (folder / MADE).write_text(json.dumps(cost))


@contextlib.contextmanager
def _inputs_of_their_own() -> Iterator[None]:
    """Give each layer its own copy of its recorded inputs before AWQ scales them in place.

    Layers with the same input (query, key and value; gate and up) share one tensor on a CPU, where GPTQModel's copy to
    the host copies nothing: scaled once for each of them, it misleads the search for the clipping bounds, and the
    result loses as much as plain rounding. On a GPU the copies are real.
    """
    from gptqmodel.looper import awq_processor

    scale = awq_processor.apply_scale

    def apply_scale(module: Any, scales: Any, input_feat_dict: dict[str, Any] | None = None) -> Any:
        for name, recorded in (input_feat_dict or {}).items():
            input_feat_dict[name] = recorded.clone()  # type: ignore[index]
        return scale(module, scales, input_feat_dict=input_feat_dict)

    awq_processor.apply_scale = apply_scale
    try:
        yield
    finally:
        awq_processor.apply_scale = scale


def _settings(config: Mapping[str, Any], rows: list[list[int]], dtype: str) -> Any:
    """GPTQModel's own configuration of the method."""
    from gptqmodel.quantization.config import FORMAT, METHOD, AWQConfig, EXL3Config, GPTQConfig

    quant = config["quant"]
    if quant["algorithm"] == "awq":
        return AWQConfig(
            bits=quant["bits"],
            group_size=quant["group_size"],
            sym=quant["sym"],
            method=METHOD.AWQ,
            format=FORMAT.GEMM,
            offload_to_disk=False,
        )
    if quant["algorithm"] == "exl3":
        return EXL3Config(bits=float(quant["bits"]), offload_to_disk=False)
    options = {"group_size": quant["group_size"], "desc_act": quant["desc_act"], "sym": quant["sym"]}
    if quant.get("target_bits") is None:
        return GPTQConfig(bits=quant["bits"], offload_to_disk=False, **options)
    dense = load_weights(config["model"], dtype, config["gpu"]["device"])
    chosen = mixed_bits.choose_for(dense, rows, quant["target_bits"], quant["group_size"], quant["sym"])
    dynamic = {f"+:^{re.escape(name)}$": {"bits": bits} for name, bits in chosen.items()}
    return GPTQConfig(bits=4, dynamic=dynamic, offload_to_disk=False, **options)


def read(folder: str, config: Mapping[str, Any]) -> Any:
    """A checkpoint in GPTQModel's, AutoGPTQ's or AutoAWQ's format, on its device, with the kernel chosen by name.

    Raises:
        Refusal: when no kernel can run it here.
    """
    import torch

    with library_output():
        from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

        stored = QuantizeConfig.from_pretrained(folder)
        kernel = kernel_for(config, _bits_of(stored))
        try:
            loaded = GPTQModel.load(
                folder,
                device=config["gpu"]["device"],
                dtype=getattr(torch, config["dtype"]),
                backend=BACKEND(kernel),
                trust_remote_code=config["model"]["trust_remote_code"],
            )
        except NotImplementedError as error:
            why = str(error).splitlines()[0]
            raise Refusal(
                f"kernel {kernel} cannot run this checkpoint ({why}): name another in quant.kernel"
            ) from error
        except ValueError as error:
            raise Refusal(f"GPTQModel cannot read this checkpoint: {' '.join(str(error).split())[:300]}") from error
    model = loaded.model.requires_grad_(False).eval()
    if len(set(getattr(model, "hf_device_map", {}).values())) == 1:
        del model.hf_device_map  # which is for models spread over devices: PEFT's prefix tuning looks for a GPU in it
    model.llm_at_home_checkpoint = str(folder)
    return model


def _bits_of(stored: Any) -> list[int]:
    """The bits that a checkpoint's layers may have: its own, and those of the layers that have others."""
    overridden = {int(rule["bits"]) for rule in (stored.dynamic or {}).values() if "bits" in rule}
    return sorted({int(stored.bits), *overridden})


class _Progress:
    """Says how far the making is: one line that is overwritten on a terminal, ten lines elsewhere."""

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.start = time.perf_counter()
        self.stream = sys.stderr
        self._shown = -1

    def layer_complete(self, layer_idx: int, submodule_finalized: bool) -> None:
        """Called by GPTQModel after each decoder layer, twice: its weights are final at the second call."""
        done = layer_idx + 1
        if not submodule_finalized or done <= self._shown:
            return
        on_terminal = self.stream.isatty()
        if on_terminal or done == self.layers or done * 10 // self.layers > self._shown * 10 // self.layers:
            seconds = time.perf_counter() - self.start
            line = f"quantized layer {done} of {self.layers}, {seconds:.0f} s, {resident_set_peak():.1f} GB at most"
            self.stream.write(f"\r{line}" if on_terminal and done < self.layers else f"{line}\n")
            self.stream.flush()
        self._shown = done


def resident_set_peak() -> float:
    """The largest resident set of this process so far, in GB of 10^9 bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
