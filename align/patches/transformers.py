"""Patches of transformers."""

from __future__ import annotations

import importlib.metadata
import sys
import types
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from align.errors import UserError
from align.patches.signatures import private_name

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def wrap_templates(limit: Callable[[Any], Any]) -> None:
    """Have ``limit`` compile every chat template of this process; a second call has no effect.

    Replaces ``transformers.utils.chat_template_utils._compile_jinja_template``. transformers' tokenizers, trl, vLLM and
    lm-eval all compile templates with that function, and none of them offers a hook to limit what a template may use.
    The patch was written for transformers 5.17.

    Args:
        limit: Receives transformers' own function and returns the function to use instead of it.
    """
    path = "transformers.utils.chat_template_utils:_compile_jinja_template"
    compile_template = private_name("transformers", path, ["chat_template"])
    from transformers.utils import chat_template_utils

    if not hasattr(compile_template, "is_limited"):
        limited = limit(compile_template)
        limited.is_limited = True
        chat_template_utils._compile_jinja_template = limited


def save_only(model: Any, trained: Collection[str], save: Callable[..., None]) -> None:
    """Have the Trainer save and resume only some tensors of ``model``, which is no peft model.

    Replaces ``save_pretrained`` and ``_keys_to_ignore_on_save`` of this one model. The Trainer saves checkpoints of a
    ``PreTrainedModel`` by the first, and compares the second with the tensors that a checkpoint lacks: otherwise it
    lists every frozen tensor as missing. The patch was written for transformers 5.17.

    Args:
        model: The model to change.
        trained: Names of the tensors that are saved.
        save: Method that replaces ``save_pretrained``.
    """
    private_name("transformers", "transformers:PreTrainedModel._keys_to_ignore_on_save")
    model._keys_to_ignore_on_save = sorted(set(model.state_dict()) - set(trained))
    model.save_pretrained = types.MethodType(save, model)


def save_everything(model: PreTrainedModel, write: Callable[..., None], **options: Any) -> None:
    """Call transformers' own ``save_pretrained`` of a model that ``save_only`` changed.

    Replaces ``transformers.modeling_utils.safe_save_file`` meanwhile: safetensors reads all tensors of a file into
    memory. The patch was written for transformers 5.17.

    Args:
        model: The model to save.
        write: Receives the tensors of a file by name, its path, and its ``metadata``.
        options: Arguments of ``save_pretrained``.
    """
    parameters = ["tensors", "filename", "metadata"]
    original = private_name("transformers", "transformers.modeling_utils:safe_save_file", parameters)
    module: Any = sys.modules["transformers.modeling_utils"]
    ignored = model._keys_to_ignore_on_save
    model._keys_to_ignore_on_save = None
    module.safe_save_file = write
    try:
        type(model).save_pretrained(model, **options)
    finally:
        module.safe_save_file = original
        model._keys_to_ignore_on_save = ignored


def revert_conversion(model: nn.Module, tensors: dict[str, Any]) -> dict[str, Any]:
    """Return tensors of ``model``, by their names in memory, as ``save_pretrained`` names and shapes them.

    Calls ``transformers.core_model_loading.revert_weight_conversion``; transformers has no public function for it. The
    patch was written for transformers 5.17.
    """
    path = "transformers.core_model_loading:revert_weight_conversion"
    converted: dict[str, Any] = private_name("transformers", path, ["model", "state_dict"])(model, tensors)
    return converted


def attention_name(config: Any) -> str:
    """Return the name of the attention that a model with this config uses.

    Reads ``_attn_implementation``, which ``set_attn_implementation`` sets; transformers has no public accessor. The
    patch was written for transformers 5.17.
    """
    private_name("transformers", "transformers:PreTrainedConfig._attn_implementation")
    return str(config._attn_implementation)


def record_router_logits(model: PreTrainedModel, router: type[nn.Module]) -> None:
    """Have the forward pass of a Granite mixture return the logits of its routers, of the class ``router``.

    Adds ``router_logits`` to ``_can_record_outputs``, from which transformers installs its hooks. Its Granite mixtures
    lack the entry: their load-balancing loss is the integer 0, for which training crashes. A model that has the entry
    stays as it is. The patch was written for transformers 5.17.

    Args:
        model: The causal language model; all models of its family change.
        router: Class of the routers, whose forward pass returns experts, weights and logits.
    """
    private_name("transformers", "transformers:PreTrainedModel._can_record_outputs")
    recorder = private_name(
        "transformers",
        "transformers.utils.output_capturing:OutputRecorder",
        ["target_class", "index", "layer_name", "class_name", "capture_initial_hidden_state"],
    )
    recorded = type(model)._can_record_outputs
    if recorded is not None:
        recorded.setdefault("router_logits", recorder(router, index=2))


def computes_router_loss(model: PreTrainedModel) -> bool:
    """Return whether a mixture's class computes a load-balancing loss; Llama 4 has only the config's fields for it.

    Looks for ``load_balancing_loss_func`` in the class's module. The function was written for transformers 5.17.
    """
    private_name("transformers", "transformers.models.mixtral.modeling_mixtral:load_balancing_loss_func")
    modules = {base.__module__ for base in type(model).__mro__}
    return any("load_balancing_loss_func" in vars(sys.modules[module]) for module in modules)


def use_one_device(arguments: Any) -> None:
    """Have a Trainer with these ``TrainingArguments`` train on one device, however many are visible.

    Sets ``_n_gpu``, which ``n_gpu`` computes once and returns. A single process would use all devices through
    ``nn.DataParallel``; there is no option against that. The patch was written for transformers 5.17.
    """
    private_name("transformers", "transformers:TrainingArguments.n_gpu")
    devices = min(1, arguments.n_gpu)
    if not hasattr(arguments, "_n_gpu"):
        raise UserError(f"transformers {transformers_version()}: TrainingArguments has no _n_gpu.")
    arguments._n_gpu = devices


def keep_curve_names() -> None:
    """Stop the integrations of trackers from renaming curves, such as ``test_loss`` to ``test/loss``.

    Replaces ``rewrite_logs`` of ``transformers.integrations.integration_utils``. The patch was written for transformers
    5.17.
    """
    private_name("transformers", "transformers.integrations.integration_utils:rewrite_logs", ["d"])
    import transformers.integrations.integration_utils as module

    def keep_names(d: dict[str, Any]) -> dict[str, Any]:
        return dict(d)

    module.rewrite_logs = keep_names


TRACKER_MODULES = {"mlflow": "_ml_flow", "wandb": "_wandb", "trackio": "_trackio"}
"""Name of an integration -> its callback's attribute with the tracker's module."""


def tracker_module(callback: Any, name: str) -> Any:
    """Return the module that the callback of the integration ``name`` imported.

    The function was written for transformers 5.17.
    """
    attribute = TRACKER_MODULES[name]
    if not hasattr(callback, attribute):
        raise UserError(f"transformers {transformers_version()}: {type(callback).__name__} has no {attribute}.")
    return getattr(callback, attribute)


def replace_tracker_module(callback: Any, name: str, module: Any) -> None:
    """Have the callback of the integration ``name`` call ``module``, to pass options that the callback omits."""
    tracker_module(callback, name)
    setattr(callback, TRACKER_MODULES[name], module)


def transformers_version() -> str:
    """Return the installed version."""
    return importlib.metadata.version("transformers")
