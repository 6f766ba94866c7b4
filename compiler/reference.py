"""The torch fp32 reference of a merged checkpoint: what every exported graph is measured against.

The model is built by transformers from `checkpoint.config` with its parameters on the meta device, then filled from the lazy tensors
(`load_state_dict(assign=True)`), so nothing is written to disk and no parameter is ever left at a random value: a name without a
tensor, a tensor without a name or another shape is a CheckpointError. Nothing of the checkpoint is executed (`auto_map` is dropped).

Names are matched after these rules, in this order:
1. `.gamma` / `.beta` of old checkpoints are `.weight` / `.bias`;
2. the base model's prefix (`bert.`, `model.`) is optional on either side;
3. two modules that transformers ties are one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from compiler.checkpoints.view import Checkpoint, TensorView
from compiler.errors import ArchitectureError, CheckpointError

if TYPE_CHECKING:
    import torch

# Keys of config.json that would run foreign code, or describe the file and not the model.
DROPPED_CONFIG = ("auto_map", "model_type", "transformers_version", "quantization_config", "dtype", "torch_dtype", "_name_or_path", "_attn_implementation")
# Buffers that some versions of transformers saved and all of them can compute.
COMPUTED = ("position_ids", "token_type_ids", "inv_freq", "attn.bias", "masked_bias")
TASK_CLASSES = {"text-generation": "AutoModelForCausalLM"}  # the rest is asked of optimum's TasksManager
SHOWN = 5  # names listed in a message


def reference_model(checkpoint: Checkpoint, auto_class: Any) -> torch.nn.Module:
    """The transformers model of `checkpoint`, float32, eval, eager attention, ready to run.

    auto_class  a task (`text-generation`, `feature-extraction`, ...) or an Auto class of transformers
    Raises ArchitectureError for a family that transformers does not know, CheckpointError (naming them) for missing, left-over or
    ill-shaped tensors.
    """
    import torch

    model = skeleton(checkpoint.config, auto_class, checkpoint.origin)
    drop_unused_pooler(model, checkpoint)
    state = {}
    for name, view in match_tensors(model, checkpoint).items():
        array = view.read()
        state[name] = torch.from_numpy(array if array.flags.writeable else array.copy())
    with torch.no_grad():
        model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if left:
        raise _missing(checkpoint, left)
    return model.eval().requires_grad_(False)


def skeleton(config: Mapping[str, Any], auto_class: Any, origin: str = "config.json") -> Any:
    """The model without weights: parameters on the meta device, computed buffers real. Raises ArchitectureError."""
    import torch
    from transformers import AutoConfig

    model_class = model_class_of(auto_class)
    family = str(config.get("model_type"))
    try:
        built = AutoConfig.for_model(family, **{key: value for key, value in config.items() if key not in DROPPED_CONFIG})
    except ValueError as error:
        raise ArchitectureError(f"{origin}: model_type", expected="a family that transformers knows", found=repr(family), remedy="check config.json") from error
    built.use_cache = bool(getattr(built, "use_cache", False))
    with parameters_on_meta():
        try:
            model = model_class.from_config(built, attn_implementation="eager", dtype=torch.float32)
        except ValueError as error:
            found = f"{family}, which {model_class.__name__} cannot build"
            raise ArchitectureError(f"{origin}: model_type", expected="a family for this task", found=found, remedy="choose another task or base") from error
    return model.eval()


def model_class_of(auto_class: Any) -> Any:
    """A task's Auto class by optimum's TasksManager; a class passes through. Raises ArchitectureError for an unknown task."""
    if not isinstance(auto_class, str):
        return auto_class
    if auto_class in TASK_CLASSES:
        import transformers

        return getattr(transformers, TASK_CLASSES[auto_class])
    from optimum.exporters.tasks import TasksManager

    try:
        return TasksManager.get_model_class_for_task(TasksManager.map_from_synonym(auto_class), library="transformers")
    except KeyError as error:
        raise ArchitectureError(
            "task", expected="a task of optimum's TasksManager", found=repr(auto_class), remedy="name feature-extraction or text-classification, for instance"
        ) from error


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Inside, each parameter becomes a meta tensor the moment a module takes it, before it is initialised, so no page of it is ever touched.

    Buffers stay real, for transformers computes some of them (rotary frequencies, position ids) in the constructors; `torch.device("meta")`
    would lose those.
    """
    import torch

    original = torch.nn.Module.register_parameter

    def register(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)
        original(module, name, parameter)

    torch.nn.Module.register_parameter = register
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = original


def match_tensors(model: Any, checkpoint: Checkpoint) -> dict[str, TensorView]:
    """Names of the model's state -> tensors of the checkpoint, by the rules of the module. Raises CheckpointError."""
    prefix = str(getattr(model, "base_model_prefix", "") or "")
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found: dict[str, TensorView] = {}
    for name, view in checkpoint.tensors.items():
        key = canonical(name, prefix)
        if key in found:
            raise CheckpointError(
                f"{checkpoint.origin}: {name}", expected="one tensor for each parameter", found="two that match", remedy="remove the duplicate"
            )
        found[key] = view
    wanted = {canonical(name, prefix): name for name in shapes}
    tied = tied_names(model)
    missing = [name for key, name in wanted.items() if key not in found and name not in tied and not name.endswith(COMPUTED)]
    if missing:
        raise _missing(checkpoint, missing)
    extra = [view.name for key, view in found.items() if key not in wanted and not ignorable(view.name, prefix, model, found)]
    if extra:
        expected = f"only tensors of {type(model).__name__}"
        raise CheckpointError(
            checkpoint.origin,
            expected=expected,
            found=f"unused {shown(extra)}",
            remedy="check the architecture and the task; a delta may belong to another base",
        )
    matched = {name: found[key] for key, name in wanted.items() if key in found and not name.endswith(COMPUTED)}
    for name, view in matched.items():
        if view.shape != shapes[name]:
            place = f"{checkpoint.origin}: {view.name}"
            raise CheckpointError(
                place, expected=f"shape {list(shapes[name])} by config.json", found=str(list(view.shape)), remedy="config and weights are of different models"
            )
    return matched


def canonical(name: str, prefix: str) -> str:
    """Rules 1 and 2: `bert.x.LayerNorm.gamma`, prefix `bert` -> `x.LayerNorm.weight`."""
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
        if name.endswith(old):
            name = name.removesuffix(old) + new
    return name.removeprefix(prefix + ".") if prefix else name


def ignorable(name: str, prefix: str, model: Any, found: Mapping[str, TensorView]) -> bool:
    """Tensors that a task may leave out: computed buffers, a pooler the task has none for, another task's head over a bare base model."""
    if name.endswith(COMPUTED) or "pooler." in name:
        return True
    bare = type(model).__name__.endswith("Model")
    prefixed = any(view.name.startswith(prefix + ".") for view in found.values())
    return bare and prefixed and not name.startswith(prefix + ".")


def tied_names(model: Any) -> set[str]:
    """Parameters that share another's tensor (rule 3) and may be absent from the file."""
    if not getattr(model.config, "tie_word_embeddings", True):
        return set()
    keys = getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or []
    return set(keys)


def drop_unused_pooler(model: Any, checkpoint: Checkpoint) -> None:
    """A pooler over a bare encoder serves no task of ours: where the checkpoint has none, the model gets none either."""
    if getattr(model, "pooler", None) is not None and not any("pooler." in name for name in checkpoint.tensors):
        model.pooler = None


def _missing(checkpoint: Checkpoint, names: list[str]) -> CheckpointError:
    remedy = "check the architecture and the task, or add the delta that brings them"
    return CheckpointError(checkpoint.origin, expected="a tensor for every parameter", found=f"none for {shown(names)}", remedy=remedy)


def shown(names: list[str]) -> str:
    """The first names of a list, and how many there are."""
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest
