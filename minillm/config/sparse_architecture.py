"""The configuration of a mixture of experts from that of a dense model, in the words of transformers.

Importing this takes seconds: transformers comes with it.
"""

import copy
from dataclasses import fields
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from minillm import UserError
from minillm.config.upcycle import ANY, SPARSE_FORMS, SparseForm, UpcycleConfig

KEY = "student.init=upcycle"
# What a configuration says of its file and not of its model.
_NOT_OF_THE_MODEL = ("model_type", "architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path")
_UNDECLARED = ("head_dim",)  # which every attention layer reads where its configuration has it


def upcycled_architecture(architecture: PreTrainedConfig, keys: UpcycleConfig) -> PreTrainedConfig:
    """The configuration of the mixture of experts; the one given stays as it is.

    A model that sees pictures gets it in the place of its text_config.
    Raises UserError for an architecture without a sparse form, and for a value that the sparse form cannot say.
    """
    dense = architecture.get_text_config(decoder=True)
    form = form_of(dense)
    values = _values(dense, form)
    values |= {form.experts: keys.num_experts, form.per_token: keys.num_experts_per_tok}
    values |= {form.width: dense.intermediate_size} | copy.deepcopy(form.fixed)
    values |= _places(dense, form, keys)
    sparse = CONFIG_MAPPING[form.model_type](**values)
    if dense is architecture:
        return sparse
    whole = copy.deepcopy(architecture)
    (name,) = (name for name in whole.sub_configs if getattr(architecture, name, None) is dense)
    setattr(whole, name, sparse)
    return whole


def form_of(dense: PreTrainedConfig) -> SparseForm:
    """The sparse form of a dense architecture. Raises UserError where it has none, or has experts already."""
    kind = dense.model_type
    if kind in SPARSE_FORMS:
        return SPARSE_FORMS[kind]
    sparse = {form.model_type for form in SPARSE_FORMS.values()}
    if kind in sparse or getattr(dense, "num_experts_per_tok", None):
        raise UserError(f"{KEY}: a {kind} is a mixture of experts already; train it with init: pretrained")
    raise UserError(
        f"{KEY}: transformers has no architecture that is a {kind} with experts in the place of its feed-forward layers; "
        f"choose one of {', '.join(SPARSE_FORMS)}"
    )


def _values(dense: PreTrainedConfig, form: SparseForm) -> dict[str, Any]:
    """All that the dense configuration says, in the keys of the sparse one."""
    family = CONFIG_MAPPING[form.model_type]
    says, known = ({one.name for one in fields(each)} for each in (type(dense), family))
    values = {}
    for key, value in dense.to_dict().items():
        if key in _NOT_OF_THE_MODEL:
            continue
        kept = key in known or key not in says or key in _UNDECLARED  # what neither declares is kept by both
        if not (form.only[key] in (ANY, value) if key in form.only else kept):
            raise UserError(
                f"{KEY}: this {dense.model_type} has {key}: {value!r}, which no {form.model_type} can have; choose another "
                "model"
            )
        if kept:
            values[key] = value
    kinds = set(getattr(dense, "layer_types", None) or ())
    if "layer_types" not in known and kinds:
        if len(kinds) > 1:
            raise UserError(
                f"{KEY}: the layers of this {dense.model_type} attend in {len(kinds)} ways (layer_types), and those of a "
                f"{form.model_type} in one; choose another model"
            )
        values["use_sliding_window"] = kinds == {"sliding_attention"}
    return values


def _places(dense: PreTrainedConfig, form: SparseForm, keys: UpcycleConfig) -> dict[str, Any]:
    """The keys that say which layers have experts."""
    count = dense.num_hidden_layers
    if keys.layers is not None:
        return _listed(count, form, keys)
    if keys.every > count:
        raise UserError(
            f"student.upcycle.every: with {keys.every} no layer has experts, since the model has {count} layers"
        )
    if form.layer_step is not None:
        return {form.layer_step: keys.every}
    if keys.every > 1:
        raise UserError(
            f"student.upcycle.every: every layer of a {form.model_type} has experts; leave it at 1, or choose one of "
            f"{_having('layer_step')}"
        )
    return {}


def _listed(count: int, form: SparseForm, keys: UpcycleConfig) -> dict[str, Any]:
    """Those of a list of layers."""
    layers = sorted(keys.layers)
    if keys.every > 1:
        raise UserError(
            "student.upcycle.layers: it says which layers have experts, and so does `every`; leave one of them out"
        )
    if layers[-1] >= count:
        beyond = ", ".join(str(layer) for layer in layers if layer >= count)
        raise UserError(f"student.upcycle.layers: the model has the layers 0 to {count - 1}, no {beyond}")
    twice = next((layer for layer, after in zip(layers, layers[1:], strict=False) if layer == after), None)
    if twice is not None:
        raise UserError(f"student.upcycle.layers: names {twice} more than once")
    if form.dense_layers is not None:
        return {form.layer_step: 1, form.dense_layers: [layer for layer in range(count) if layer not in layers]}
    if form.between is not None:
        first, last = form.between
        step = 1 if len(layers) == 1 else layers[1] - layers[0]
        if layers != list(range(layers[0], layers[-1] + 1, step)) or (layers[0] + 1) % step:
            raise UserError(
                f"student.upcycle.layers: a {form.model_type} has experts in every n-th layer between a first and a last one, "
                f"with n = 2 the layers 1, 3, 5, ...; choose such a list, or one of {_having('dense_layers')}"
            )
        return {form.layer_step: step, first: layers[0], last: layers[-1]}
    if len(layers) < count:
        raise UserError(
            f"student.upcycle.layers: every layer of a {form.model_type} has experts; leave it out, or choose one of "
            f"{_having('layer_step')}"
        )
    return {}


def _having(key: str) -> str:
    """The dense architectures whose sparse form has a key."""
    return ", ".join(name for name, one in SPARSE_FORMS.items() if getattr(one, key) is not None)
