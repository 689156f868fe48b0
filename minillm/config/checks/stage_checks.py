"""All checks of a stage, and the selection of what they report. None of them loads a weight.

A check is a function of the facts, and of the groups that its other parameters are named after. It is left out where one
of these groups is itself in error, and nothing is reported of a key that depends on another one in error.
"""

import inspect
from collections.abc import Iterator

from minillm.config.checks.architecture_checks import causal_models, fresh_architecture, sparse_form
from minillm.config.checks.data_checks import (
    contexts_read,
    corpus_used,
    evaluation_prompts,
    few_shot_prompts,
    forget_used,
    held_out_contexts_read,
    held_out_parsers_used,
    packages_of_data,
    parsers_used,
    training_pairs,
    training_prompts,
)
from minillm.config.checks.deepspeed_checks import deepspeed_file, deepspeed_installed, sharding_keys
from minillm.config.checks.evaluation_checks import (
    comparable,
    evaluation_keys_used,
    measurable,
    measured_after_training,
)
from minillm.config.checks.facts import Facts, Idle, as_path, beside
from minillm.config.checks.length_checks import answers_fit, corpus_fits, evaluation_fits
from minillm.config.checks.method_checks import (
    adapters_trained,
    evaluations_made,
    fields_there,
    images_shown,
    material,
    own_keys,
    teacher_needed,
)
from minillm.config.checks.model_checks import (
    adapters,
    installed,
    own_adapters,
    pruned_layers,
    quantized,
    revisions,
    servers,
    student_form,
    trained_parts,
)
from minillm.config.checks.place_checks import places_exist
from minillm.config.checks.rollout_checks import (
    cuda_graphs_usable,
    mixture_in_one_graph,
    neutral_sampling,
    one_temperature,
    sampling_keys_used,
    several_answers,
    shared_coins_usable,
    shared_prompts_read,
    whole_batches,
    written_several_times,
)
from minillm.config.checks.several_teachers_checks import (
    held_out_records_have_fields,
    records_have_fields,
    several_teachers,
    teachers_in_turn,
)
from minillm.config.checks.training_checks import (
    balance_added_once,
    experts_to_balance,
    length_of_training,
    schedule_arguments,
    trainable_weights,
)
from minillm.config.errors import Finding
from minillm.config.root import STAGE_SHAPE
from minillm.config.shape import Group, KeyPath, Leaf, group_of, walk
from minillm.config.tree import COMMAND_LINE, Node

CHECKS = (
    places_exist,
    student_form,
    pruned_layers,
    causal_models,
    fresh_architecture,
    sparse_form,
    trained_parts,
    adapters,
    adapters_trained,
    own_adapters,
    installed,
    revisions,
    quantized,
    servers,
    several_teachers,
    records_have_fields,
    held_out_records_have_fields,
    teachers_in_turn,
    deepspeed_installed,
    sharding_keys,
    deepspeed_file,
    material,
    images_shown,
    fields_there,
    corpus_used,
    forget_used,
    training_prompts,
    training_pairs,
    few_shot_prompts,
    packages_of_data,
    contexts_read,
    held_out_contexts_read,
    parsers_used,
    held_out_parsers_used,
    teacher_needed,
    own_keys,
    evaluations_made,
    neutral_sampling,
    one_temperature,
    whole_batches,
    sampling_keys_used,
    cuda_graphs_usable,
    mixture_in_one_graph,
    shared_coins_usable,
    several_answers,
    shared_prompts_read,
    written_several_times,
    answers_fit,
    corpus_fits,
    evaluation_fits,
    length_of_training,
    trainable_weights,
    balance_added_once,
    experts_to_balance,
    schedule_arguments,
    measurable,
    comparable,
    evaluation_keys_used,
    measured_after_training,
    evaluation_prompts,
)


def check_stage(facts: Facts) -> list[Finding]:
    """The findings of all checks in a stage. A key without effect is reported once."""
    in_error = [finding.path for finding in facts.findings]
    meant = [finding.instead for finding in facts.findings if finding.instead is not None]
    in_error += [path for path in meant if walk(None, facts.data, path)[1] is None]  # else it is there as well
    findings, idle = [], {}
    for check in CHECKS:
        groups = list(inspect.signature(check).parameters)[1:]
        if any(name not in facts.groups for name in groups):
            continue
        for found in check(facts, *(facts.groups[name] for name in groups)):
            read = (found.path, *map(as_path, found.reads))
            if any(_overlap(path, wrong) for path in read for wrong in in_error):
                continue
            if isinstance(found, Idle):
                for finding in _written_idle_keys(facts, found):
                    idle.setdefault(finding.path, finding)
            else:
                findings.append(Finding(found.path, found.message))
    said = {finding.path for finding in findings}
    return findings + [finding for path, finding in idle.items() if path not in said]


def _written_idle_keys(facts: Facts, found: Idle) -> Iterator[Finding]:
    """The keys at or below an idle one that someone wrote for this stage by mistake."""
    top = None if facts.tree is None else facts.tree.at(found.path)
    if top is None:
        return
    because = as_path(found.reads[0])
    cause, shape = facts.tree.at(because), walk(STAGE_SHAPE, facts.data, because)[0]
    for path, node in top.leaves(found.path):
        by_default = cause is None and isinstance(shape, Leaf)
        meant = node.origin.file == COMMAND_LINE or by_default or cause is not None and beside(node, cause)
        if meant and not _is_unset(facts, path, node):
            yield Finding(path, found.message, "idle")


def _is_unset(facts: Facts, path: KeyPath, node: Node) -> bool:
    """True for a key with its default value, as in a configuration with all defaults written out."""
    if node.origin.file == COMMAND_LINE:
        return False
    group = group_of(*walk(STAGE_SHAPE, facts.data, path[:-1]))
    method = facts.groups.get("method")
    if path[0] == "method" and len(path) == 2 and method is not None:
        return node.plain() == method.unset_value(path[1])
    field = group.model.model_fields.get(path[-1]) if isinstance(group, Group) else None
    return field is not None and node.plain() == field.get_default(call_default_factory=True)


def _overlap(one: KeyPath, other: KeyPath) -> bool:
    length = min(len(one), len(other))
    return one[:length] == other[:length]
