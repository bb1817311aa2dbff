"""A pickled torch.nn.Module as a state dict: what its pickle says of its attributes, read as plain data.

The class stays a name. Nothing is made of it, so what is found is what the file says, whatever the class would do.

Source: torch/nn/modules/module.py, `_save_to_state_dict` and `state_dict`, for the order and what is left out.
"""

from __future__ import annotations

from typing import Any

from farcast_cli.formats.torch_pickle import Made, TensorRef

_TABLES = {"_parameters", "_buffers", "_modules"}
_WITH_ATTRIBUTES = "_rebuild_parameter_with_state"


def is_module(node: object) -> bool:
    """Whether an object of a pickle is a module, by its attributes."""
    return (
        isinstance(node, Made) and bool(_attributes(node)) and all(isinstance(_attributes(node)[key], dict) for key in _TABLES)
    )


def as_state_dict(node: Any) -> Any:
    """What holds the weights of a node of a tree: a module's state dict, or the node itself."""
    return state_of_module(node) if is_module(node) else node


def state_of_module(node: Made) -> dict[Any, Any]:
    """Its state dict: parameters first, then buffers, then those of its children."""
    attributes = _attributes(node)
    unsaved = attributes.get("_non_persistent_buffers_set")
    unsaved = unsaved if isinstance(unsaved, (set, frozenset, list, tuple)) else ()
    found = {name: _tensor(value) for name, value in attributes["_parameters"].items() if value is not None}
    found |= {name: value for name, value in attributes["_buffers"].items() if value is not None and name not in unsaved}
    children = ((name, state_of_module(child)) for name, child in attributes["_modules"].items() if is_module(child))
    return found | {f"{name}.{inner}": value for name, state in children for inner, value in state.items()}


def _attributes(node: Made) -> dict[Any, Any]:
    """The attributes of a module; none of any other object."""
    found = node.states[-1] if node.states else None
    return found if isinstance(found, dict) and found.keys() >= _TABLES else {}


def _tensor(value: Any) -> Any:
    """A parameter that has attributes of its own, without them."""
    inner = value.args[0] if isinstance(value, Made) and value.maker.name == _WITH_ATTRIBUTES and value.args else None
    return inner if isinstance(inner, TensorRef) else value
