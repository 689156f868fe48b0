"""Files and overrides merged into one document, and the document taken apart into its stages."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minillm.config.errors import Problem
from minillm.config.loader.document import merge, read_file, read_override
from minillm.config.nearest import nearest
from minillm.config.root import OF_THE_RUN, STAGE_SHAPE
from minillm.config.shape import child_value
from minillm.config.tree import COMMAND_LINE, Node, Origin, wrap

MAIN = "main"  # the stage of a file without stages


def stage_documents(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The plain keys of each stage of a plain document: its own merged over those that the stages share."""
    return {name: tree.plain() for name, tree in stage_trees(wrap(document, Origin("")), []).items()}


def load_document(
    files: list[Path], overrides: Sequence[str], problems: list[Problem], base: dict[str, Any] | None = None
) -> tuple[Node, bool]:
    """(the merged document, True where all files and overrides could be read).

    Args:
        files: YAML files, merged left to right.
        overrides: `group.key=value`, merged over the files.
        problems: receives what is wrong.
        base: keys that the files are merged over.
    """
    document = wrap(base or {}, Origin(str(files[0]) if files else COMMAND_LINE))
    whole = True
    for file in files:
        node = read_file(file, problems)
        whole &= node is not None
        document = document if node is None else _merge_documents(document, node)
    written = Node({}, Origin(COMMAND_LINE))
    for override in overrides:
        node = read_override(override, problems)
        whole &= node is not None
        # among overrides none replaces another's group: the order of `method.name=` and its keys is free
        written = written if node is None else merge(written, node, None)
    if whole:
        written = _known_stages(document, written, problems)
    return _merge_documents(document, written), whole


def _merge_documents(under: Node, over: Node) -> Node:
    merged = merge(shared_tree(under), shared_tree(over), STAGE_SHAPE)
    below, above = under.value.get("stages"), over.value.get("stages")
    stages = below if above is None else above
    if below is not None and above is not None and isinstance(below.value, dict) and isinstance(above.value, dict):
        names = {**below.value, **above.value}
        for name in below.value.keys() & above.value.keys():
            if above.value[name].value is None:  # taken away, as everything that is null above
                del names[name]
            else:
                names[name] = merge(below.value[name], above.value[name], STAGE_SHAPE)
        stages = Node(names, below.origin)
    return merged if stages is None else Node({**merged.value, "stages": stages}, merged.origin)


def shared_tree(node: Node) -> Node:
    """The keys of a document that all its stages share: those beside `stages`."""
    return Node({key: item for key, item in node.value.items() if key != "stages"}, node.origin)


def _known_stages(document: Node, written: Node, problems: list[Problem]) -> Node:
    """The overrides without stages that no file has: such a name is misspelt, and never a new stage."""
    known, asked = (child_value(node.plain(), "stages") for node in (document, written))
    if not isinstance(asked, dict):
        return written
    known = known if isinstance(known, dict) else {}
    for name in asked.keys() - known.keys():
        near = nearest(name, known)
        hint = f"did you mean {near}?" if near else f"there are {', '.join(known)}" if known else "there are none"
        problems.append(Problem(COMMAND_LINE, None, f"stages.{name}", f"no file has this stage ({hint})"))
    stages = written.value["stages"]
    kept = Node({name: node for name, node in stages.value.items() if name in known}, stages.origin)
    return Node({**written.value, "stages": kept}, written.origin)


def stage_trees(document: Node, problems: list[Problem]) -> dict[str, Node]:
    """The keys of each stage, in order: its own merged over those that the stages share.

    An entry that is no stage is left out, and added to `problems`.
    """
    stages, shared = document.value.get("stages"), shared_tree(document)
    if stages is None or stages.value == {}:
        return {MAIN: shared}
    if not isinstance(stages.value, dict):
        problems.append(stages.origin.problem("expected names of stages, each with the keys that it changes"))
        return {MAIN: shared}
    trees = {}
    for name, own in stages.value.items():
        if not name.replace("-", "").replace("_", "").isalnum():
            problems.append(
                own.origin.problem("a stage's name is letters, digits, - and _: a folder is called after it")
            )
        if own.value is None:  # a stage that changes nothing
            own = Node({}, own.origin)
        if not isinstance(own.value, dict):
            problems.append(own.origin.problem("expected the keys that this stage changes"))
            continue
        for key in ("stages", *OF_THE_RUN):
            node, depth = own.closest(tuple(key.split(".")))
            if depth == key.count(".") + 1:
                problems.append(node.origin.problem("belongs to the whole run: move it to the top of the file"))
        own = Node({key: node for key, node in own.value.items() if key not in ("stages", *OF_THE_RUN)}, own.origin)
        trees[name] = merge(shared, own, STAGE_SHAPE)
    return trees
