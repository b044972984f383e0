"""Puts a PEFT adapter on a base model, for training or for use."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llm_at_home.errors import Refusal
from llm_at_home.quantization.gptq_output import library_output

# Keys of the adapter group that are ours and not its class's.
OWN_KEYS = ("name", "trains", "implementation", "starts_as_identity", "schedule", "loftq")


LACKS = "lacks weights for layers of this model: name the model that it was trained on with model="
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PUBLISHED_FILES = ["adapter_config.json", "adapter_model.*"]


def adapter_folder(path: str | Path) -> Path:
    """The folder with ``adapter_config.json``: the one given, the one that a training run saved, or the hub's.

    Args:
        path: a folder, or a hub id (``OWNER/NAME``) where there is no such folder.

    Raises:
        Refusal: when there is none.
    """
    from llm_at_home.records import store

    folder = Path(path)
    if not (folder / "adapter_config.json").is_file() and (folder / store.POINTER).is_file():
        folder = store.run_folder(folder)
    for candidate in (folder, folder / "adapter"):
        if (candidate / "adapter_config.json").is_file():
            return candidate
    if not folder.exists() and HUB_ID.fullmatch(str(path)):
        return _published(str(path))
    raise Refusal(f"{path} holds no adapter_config.json: give a training run's folder or a saved adapter's")


def _published(hub_id: str) -> Path:
    """A published adapter, fetched into the hub's own cache."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=PUBLISHED_FILES))
    except (OSError, ValueError) as error:
        why = str(error).strip().splitlines()[0]
        raise Refusal(f"{hub_id} is no folder, and the hub does not give it ({why}): give a folder") from error
    if not (folder / "adapter_config.json").is_file():
        raise Refusal(f"{hub_id} on the hub holds no adapter_config.json: it is no adapter; use model.source={hub_id}")
    return folder


def prepare_for_training(
    model: Any, adapter: Mapping[str, Any], saved: str | Path | None = None, steps: int | None = None
) -> Any:
    """The model with what is to be trained made trainable, in training mode.

    Args:
        model: the base, as :func:`llm_at_home.quantization.base.load_base` gives it.
        adapter: the ``adapter`` group; ``trains`` is ``adapter``, ``all`` or ``nothing``.
        saved: an adapter to go on training, instead of a fresh one.
        steps: optimizer steps of the run, for an adapter whose ``schedule`` counts them.

    Raises:
        Refusal: for a saved adapter that does not fit this model.
    """
    if adapter["trains"] == "all":
        return model.requires_grad_(True).train()
    model.requires_grad_(False)
    if adapter["trains"] == "nothing":
        return model
    from hydra.utils import instantiate

    with library_output():
        from peft import get_peft_model

        from llm_at_home.adapters import methods, norms

        methods.register(adapter.get("implementation", methods.FACTORED))
        if saved is not None:
            folder = adapter_folder(saved)
            further = _without_constants(_further(model, folder))
            norms.widen(further, folder)
            return further
        options = {key: value for key, value in adapter.items() if key not in OWN_KEYS}
        if options.get("target_modules") == "all-linear":
            options["target_modules"] = _linear_names(model)
        if "schedule" in adapter:
            options |= rank_schedule(adapter["schedule"], steps)
        with _without_gptqmodel():
            made = get_peft_model(model, instantiate(options, _convert_="object")).train()
    if adapter.get("loftq"):
        from llm_at_home.adapters import loftq

        loftq.start(made)
    norms.widen(made)
    return _without_constants(made)


def _further(model: Any, folder: Path) -> Any:
    from peft import PeftModel

    with _fitting(folder), _without_gptqmodel():
        return PeftModel.from_pretrained(model, str(folder), is_trainable=True).train()


@contextmanager
def _without_gptqmodel() -> Iterator[None]:
    """Keep PEFT from importing gptqmodel, for seconds, only to ask of each layer whether it is one of gptqmodel's.

    Where nothing has imported it, no layer is.
    """
    from peft.tuners.lora import awq, gptq
    from peft.utils import other

    asking: tuple[Any, ...] = () if "gptqmodel" in sys.modules else (awq, gptq, other)
    asked = {module: module.is_gptqmodel_available for module in asking}
    for module in asked:
        module.is_gptqmodel_available = lambda: False
    try:
        yield
    finally:
        for module, available in asked.items():
            module.is_gptqmodel_available = available


@contextmanager
def _fitting(folder: Path) -> Iterator[None]:
    """Refuse an adapter that does not fit, also where PEFT would only warn and leave fresh what the file lacks."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*missing adapter keys")
            yield
    except UserWarning as warning:
        raise Refusal(f"the adapter in {folder} {LACKS}") from warning
    except (RuntimeError, ValueError) as error:
        raise Refusal(f"the adapter in {folder} does not fit this model: {str(error).splitlines()[0]}") from error


def _without_constants(model: Any) -> Any:
    for name, parameter in model.named_parameters():
        # AdaLoRA's constant, which PEFT makes anew, and trainable, when it casts it to a 16-bit base's dtype.
        if ".ranknum." in name:
            parameter.requires_grad_(False)
    return model


def rank_schedule(schedule: Mapping[str, float], steps: int | None) -> dict[str, int]:
    """AdaLoRA's schedule (Zhang et al. 2023, section 3.3) in the optimizer steps of a run.

    Args:
        schedule: shares of the run: ``initial`` before the rank falls, ``final`` after it has reached its target.
        steps: of the run.

    Returns:
        ``total_step``, ``tinit`` and ``tfinal``, as ``peft.AdaLoraConfig`` takes them.

    Raises:
        Refusal: when no step is left for the rank to fall in.
    """
    if steps is None:
        raise Refusal("adapter=adalora needs to know the steps of the run: give trainer.max_steps")
    # At the very first step the scores are all zero, and would take every direction away.
    initial, final = max(2, round(schedule["initial"] * steps)), round(schedule["final"] * steps)
    if steps - final - initial < 1:
        raise Refusal(
            f"adapter=adalora has no step left to lower its rank in (trainer.max_steps={steps}): give more steps, or "
            "smaller shares in adapter.schedule"
        )
    return {"total_step": steps, "tinit": initial, "tfinal": final}


def _linear_names(model: Any) -> list[str]:
    """The last names of the linear layers: PEFT's own ``all-linear`` finds none of GPTQModel's."""
    from llm_at_home.quantization.layers import linear_layers

    return sorted({name.rpartition(".")[2] for name, _ in linear_layers(model)})


def attach_saved(model: Any, path: str | Path) -> Any:
    """The model with a saved adapter on it, for use, in evaluation mode.

    Raises:
        Refusal: when the folder holds no adapter, or one that does not fit this model.
    """
    folder = adapter_folder(path)
    with _fitting(folder), library_output():
        from peft import PeftModel

        from llm_at_home.adapters import methods

        methods.register()
        with _without_gptqmodel():
            return PeftModel.from_pretrained(model, str(folder)).eval()


def add_saved(model: Any, path: str | Path, name: str) -> None:
    """Load a further adapter beside those that are there; PEFT's ``model.set_adapter(name)`` switches to it.

    Args:
        model: as :func:`attach_saved` gives it.
        path: of the adapter.
        name: it is called so from now on.

    Raises:
        Refusal: when it does not fit this model, or beside the adapters that are there.
    """
    folder = adapter_folder(path)
    try:
        with library_output(), _without_gptqmodel():
            missing = model.load_adapter(str(folder), name).missing_keys
    except (RuntimeError, ValueError, TypeError) as error:
        raise Refusal(f"the adapter in {folder} does not fit here: {str(error).splitlines()[0]}") from error
    if any("prompt_encoder" not in key for key in missing):  # which is of use in training alone
        raise Refusal(f"the adapter in {folder} does not fit here: it {LACKS}")
    model.eval()


def merged(model: Any) -> Any:
    """The base with the adapter's update added to its weights, and no adapter any more.

    Raises:
        Refusal: for an adapter that is no update of weights.
    """
    if model.active_peft_config.is_prompt_learning:
        raise Refusal("a prompt has no place in the weights: serve it beside the base with adapter_path=")
    _untie(model)
    try:
        return model.merge_and_unload()
    except (ValueError, NotImplementedError) as error:
        raise Refusal(f"this adapter is not merged: {str(error).splitlines()[0]}") from error


def _untie(model: Any) -> None:
    """Give the output head a weight of its own where an update belongs to it alone, or to the embeddings alone.

    PEFT would add the update to the one tensor that both are, and with it to the other.
    """
    import torch
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    bases = [getattr(end, "base_layer", end) for end in ends]
    # PEFT itself puts tuned tokens on both.
    tuned = [isinstance(end, BaseTunerLayer) and not isinstance(end, TrainableTokensLayer) for end in ends]
    if any(tuned) and bases[0].weight is bases[1].weight:
        bases[1].weight = torch.nn.Parameter(bases[1].weight.detach().clone(), requires_grad=False)
        model.get_base_model().config.tie_word_embeddings = False


def trainable_parameters(model: Any) -> int:
    """How many parameters take gradients."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
